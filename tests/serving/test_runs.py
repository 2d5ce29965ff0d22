"""`detdistill teach` and `distill --served`, from the first question to the finished run."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from rich.console import Console

import detdistill
from detdistill import api, cli
from detdistill.cache.knowledge import KnowledgeCache
from detdistill.cache.storage import CacheError, LocalFolder
from detdistill.detectors.contract import Teacher
from detdistill.errors import RunError
from detdistill.methods.shared.contract import Method
from detdistill.progress import Progress
from detdistill.serving.messages import ServingError
from tests.serving.near import passes_of
from tests.training import small

VIEWS = 48
"""24 images and their mirror images."""
UNIKD = "unikd,queries=6,adaptor_layers=0,extractor_epochs=0.5"


def teach(teacher, method="pkd", told=None, **settings):
    console = None if told is None else Console(file=told, width=300)
    wanted = {**{key: small.SETTINGS[key] for key in ("size", "batch", "device", "threads")}, "data": small.DATA, **settings}
    return api.teach(str(teacher), method, "127.0.0.1:0", progress=Progress(console, quiet=console is None), **wanted)


def learn(url, out, method="pkd", teacher=None, **settings):
    with Progress(quiet=True) as progress:
        wanted = {**small.SETTINGS, "score_teacher": False, "served": url, "timeout": 20.0, **settings}
        return api.distill(teacher, small.MODEL, wanted.pop("data", small.DATA), method, out=out, progress=progress, **wanted)


def losses_of(folder):
    """Every loss and monitor of every step."""
    left_out = ("stage", "lr", "step", "epoch", "total")
    rows = [row for row in small.rows(folder) if row["loss"]]
    return [{name: float(value) for name, value in row.items() if value and name not in left_out} for row in rows]


def assert_same_runs(one, other):
    mine, theirs = losses_of(one), losses_of(other)
    assert len(mine) == len(theirs) > 0
    for first, second in zip(mine, theirs, strict=True):
        assert first == pytest.approx(second, rel=1e-6, abs=1e-6)
    students = [small.checkpoint(folder)["state_dict"] for folder in (one, other)]
    for name, weight in students[0].items():
        torch.testing.assert_close(weight, students[1][name], rtol=1e-6, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("method", ["pkd", "fgd+cwd,on=logits"])
def test_a_run_from_a_served_teacher_is_the_run_with_its_own(teacher, tmp_path, method):
    """With augmentation that no cache can hold."""
    views = {"steps": 3, "colour": 0.3, "scale_jitter": (0.7, 1.4), "mosaic": 0.3}
    small.distill(teacher, tmp_path / "online", method, **views)
    with teach(teacher, method) as server:
        learn(server.url, tmp_path / "served", method, **views)
        # The request behind the last step is on its way when the run ends.
        assert server.passes.images in (12, 16)
    assert_same_runs(tmp_path / "online", tmp_path / "served")
    summary = json.loads((tmp_path / "served" / "summary.json").read_text())
    assert summary["teacher"] == str(teacher)
    assert summary["served"]["path"] == server.url
    assert summary["cache"] is None
    config = yaml.safe_load((tmp_path / "served" / "config.yaml").read_text())
    assert (config["served"], config["teacher"]) == (server.url, None)
    inputs = [json.loads((tmp_path / name / "inputs.json").read_text())["teacher"] for name in ("online", "served")]
    assert inputs[0] == inputs[1]


def test_the_student_s_process_never_runs_a_teacher(teacher, tmp_path, monkeypatch):
    with teach(teacher) as server:
        lecture, main = server.lecture.teach, []
        before = Teacher.observe

        def observe(self, *rest):
            import threading

            main.append(threading.current_thread().name)
            return before(self, *rest)

        monkeypatch.setattr(Teacher, "observe", observe)
        learn(server.url, tmp_path / "run", steps=2)
        assert set(main) == {"teacher"}
        assert lecture is not None


def test_images_of_unequal_canvases_and_a_larger_teacher_s_view(teacher, tmp_path):
    views = {"size": 32, "teacher_size": 64, "resize": "short_side", "scales": (0.5, 1.0), "steps": 3, "in_memory": False}
    small.distill(teacher, tmp_path / "online", "fitnet", **views)
    with teach(teacher, "fitnet") as server:
        learn(server.url, tmp_path / "served", "fitnet", **views)
    assert_same_runs(tmp_path / "online", tmp_path / "served")


def test_networks_that_are_trained_first_come_from_the_server(teacher, tmp_path):
    told, stages = io.StringIO(), str(tmp_path / "stages")
    small.distill(teacher, tmp_path / "online", UNIKD, stages=stages, steps=2)
    with pytest.raises(RunError, match=r"teach: unikd,.* trains .* first, on the students' data; give --data"):
        teach(teacher, UNIKD, data=None, stages=stages)
    with teach(teacher, UNIKD, told, stages=stages, steps=2, epochs=small.SETTINGS["epochs"]) as server:
        assert "trained before" in told.getvalue()
        learn(server.url, tmp_path / "served", UNIKD, stages=str(tmp_path / "empty"), steps=2)
    assert not (tmp_path / "empty").exists()
    mine, theirs = losses_of(tmp_path / "online"), losses_of(tmp_path / "served")
    assert theirs == [pytest.approx(row, rel=1e-5, abs=1e-6) for row in mine[-2:]]


def test_a_run_goes_on_with_a_server_that_was_started_again_elsewhere(teacher, tmp_path):
    with teach(teacher) as server:
        learn(server.url, tmp_path / "whole", checkpoint_every=5)
        assert small.killed(lambda: _dies_at_step_8(server.url, tmp_path / "parts")) == -9
    with teach(teacher) as server:
        learn(server.url, tmp_path / "parts", checkpoint_every=5, resume=True)
        assert small.unequal_runs(tmp_path / "whole", tmp_path / "parts") == []
    other = small.train(tmp_path / "other", role="teacher", steps=1, seed=6).folder
    (tmp_path / "parts" / "summary.json").unlink()
    with teach(other) as server, pytest.raises(RunError, match="the teacher changed since the run started"):
        learn(server.url, tmp_path / "parts", checkpoint_every=5, resume=True)


def _dies_at_step_8(url, out):
    small.die_at_step(8)
    learn(url, out, checkpoint_every=5)


def test_baseline_and_distilled_runs_side_by_side(teacher, tmp_path):
    with teach(teacher) as server:
        result = learn(server.url, tmp_path / "both", epochs=1, baseline=True)
    assert [gain.method for gain in result.gains] == ["pkd"]
    assert "served" not in (tmp_path / "both" / "baseline-seed0" / "config.yaml").read_text()


# -------------------------------------------------------------------------------------------------- a cache on the way


def test_what_is_said_is_written_and_the_second_epoch_reads(teacher, tmp_path):
    told = io.StringIO()
    folder = tmp_path / "cache"
    with teach(teacher, told=told, out=folder, shard=10, batch=4, flip=0.0) as server:
        seen = passes_of(server.lecture)
        server.passes.teach = server.lecture.teach
        learn(server.url, tmp_path / "first", flip=0.0, epochs=2)
        assert sum(seen) == 24
        assert server.read_records == 24
        assert told.getvalue().count("is finished: 24 records; students may use it with --cache now") == 1
        learn(server.url, tmp_path / "second", flip=0.0, epochs=1)
        assert sum(seen) == 24
        assert server.in_words() == f"24 images taught in 6 passes, 48 read from {folder}"
    small.distill(teacher, tmp_path / "online", "pkd", flip=0.0)
    assert_same_runs(tmp_path / "online", tmp_path / "first")
    with Progress(quiet=True) as progress:
        keys = {key: small.SETTINGS[key] for key in ("size", "batch", "device", "threads")}
        api.cache(str(teacher), tmp_path / "made", small.DATA, "pkd", progress=progress, store="float32", flip=0.0, **keys)
        said = api.verify_cache(folder, str(teacher), records=6, device="cpu", progress=progress)
        found = re.match(r"24 of 24 records, all checksums right; 6 compared with the teacher: largest difference (\S+) %", said)
        assert float(found[1]) < 1e-3
        api.distill(None, small.MODEL, small.DATA, "pkd", cache=str(folder), out=tmp_path / "offline", progress=progress,
                    **{**small.SETTINGS, "flip": 0.0, "steps": 1})  # fmt: skip
    mine, made = KnowledgeCache.open(str(folder)), KnowledgeCache.open(str(tmp_path / "made"))
    assert mine.about.fingerprint == made.about.fingerprint
    assert mine.index.places.keys() == made.index.places.keys()
    for key, place in mine.index.places.items():
        assert place.source == made.index.places[key].source
        for part, other in zip(mine.read(key), made.read(key), strict=True):
            for one, two in zip(part.features.maps, other.features.maps, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_an_unfinished_cache_is_kept_and_continued(teacher, tmp_path):
    folder = tmp_path / "cache"
    with teach(teacher, out=folder) as server:
        learn(server.url, tmp_path / "first", steps=2)
        taught = server.passes.images
    assert len(KnowledgeCache.open(str(folder)).index.places) == taught in (8, 12)
    told = io.StringIO()
    with teach(teacher, told=told, out=folder) as server:
        assert f"{taught} of 48 records in {folder}" in told.getvalue()
        learn(server.url, tmp_path / "again", steps=2)
        assert (server.passes.images, server.read_records) == (0, taught)
    keys = {key: small.SETTINGS[key] for key in ("size", "batch", "device", "threads")}
    with Progress(quiet=True) as progress:
        made = api.cache(str(teacher), folder, small.DATA, "pkd", progress=progress, **keys)
    assert (made.records, made.complete, made.store) == (VIEWS, True, "float32")
    with teach(teacher, out=folder) as server:
        learn(server.url, tmp_path / "whole", epochs=1)
        assert (server.passes.images, server.read_records) == (0, 24)


def test_a_full_disk_is_said_once_and_the_teacher_goes_on(teacher, tmp_path, monkeypatch):
    told, before = io.StringIO(), LocalFolder.write

    def full(self, name, *content):
        if "shards" in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        before(self, name, *content)

    with teach(teacher, told=told, out=tmp_path / "cache", shard=4) as server:
        monkeypatch.setattr(LocalFolder, "write", full)
        learn(server.url, tmp_path / "run", epochs=1)
    assert told.getvalue().count("No space left on device; the teacher goes on without writing, 0 records are kept") == 1
    assert len(losses_of(tmp_path / "run")) == 6


def test_a_damaged_record_is_taught_again_and_said(teacher, tmp_path):
    folder, told = tmp_path / "cache", io.StringIO()
    with teach(teacher, out=folder, flip=0.0) as server:
        learn(server.url, tmp_path / "first", flip=0.0, epochs=1)
    for shard in folder.glob("shards/*.safetensors"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    with teach(teacher, told=told, out=folder, flip=0.0) as server:
        learn(server.url, tmp_path / "second", flip=0.0, epochs=1)
        assert (server.passes.images, server.read_records) == (1, 23)
    assert told.getvalue().count("is damaged (its checksum is wrong)") == 1
    # Alone in its pass, the image's maps differ in their last digits.
    mine, theirs = losses_of(tmp_path / "first"), losses_of(tmp_path / "second")
    assert theirs == [pytest.approx(row, rel=1e-4, abs=1e-6) for row in mine]


def test_students_with_other_data_or_views_are_refused_where_a_cache_is_written(teacher, tmp_path):
    with teach(teacher, out=tmp_path / "cache") as server:
        with pytest.raises(ServingError, match=r"the cache it writes is of other training images or boxes \(digits:train=24"):
            learn(server.url, tmp_path / "run", data="digits:train=24,val=8,size=64,seed=1")
        with pytest.raises(ServingError, match=r"the run would draw size=96 \(the cache it writes has 64\)"):
            learn(server.url, tmp_path / "run", size=96)
        with pytest.raises(CacheError, match=r"colour=0\.3 makes endlessly many views"):
            learn(server.url, tmp_path / "run", colour=0.3)
        with pytest.raises(ServingError, match=r"refuses \(409\): the cache that is written holds other training images"):
            _other(server.url, "x")
        with pytest.raises(ServingError, match=r"refuses \(409\): the cache that is written has no view '0/64x64'"):
            _other(server.url, server.description.about.data_fingerprint)
    with pytest.raises(CacheError, match=r"colour=0\.3 makes endlessly many views"):
        teach(teacher, out=tmp_path / "other", colour=0.3)
    with pytest.raises(RunError, match=r"teach: a cache belongs to training images; give --data with --out"):
        teach(teacher, out=tmp_path / "other", data=None)
    with pytest.raises(CacheError, match="is a cache of other store"):
        teach(teacher, out=tmp_path / "cache", store="int8")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "other").exists()


def _other(url, data):
    from detdistill.serving.client import ServedTeacher
    from tests.tiny import tiny_batch

    served = ServedTeacher(url, 5)
    served._data = data
    served._taught([tiny_batch(1)], ["0/64x64"])


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_a_served_teacher_cannot_replace_is_said(teacher, tmp_path):
    with pytest.raises(
        RunError, match=r"crosskd: it runs the teacher's own .* when it learns, which no cache holds; give --teacher"
    ):
        learn("http://127.0.0.1:1", tmp_path / "run", "crosskd")
    with pytest.raises(RunError, match="served: the knowledge comes from one place; leave out --cache or --served"):
        learn("http://127.0.0.1:1", tmp_path / "run", cache="x")
    with pytest.raises(RunError, match="inherit: it copies weights of the teacher; give --teacher"):
        learn("http://127.0.0.1:1", tmp_path / "run", inherit=True)
    with pytest.raises(RunError, match="served: its outputs are those of one method at all times; leave out --served"):
        learn("http://127.0.0.1:1", tmp_path / "run", "pkd>mgd")
    with pytest.raises(ServingError, match=r"no answer for 0\.1 s"):
        learn("http://127.0.0.1:1", tmp_path / "run", timeout=0.1)
    with pytest.raises(ServingError, match="DETDISTILL_TOKEN") as caught:
        learn("http://me:SECRET@127.0.0.1:1", tmp_path / "run")
    assert "SECRET" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_method_that_runs_the_teacher_when_it_learns_has_both(teacher, tmp_path):
    small.distill(teacher, tmp_path / "online", "crosskd,depth=1", steps=2)
    told = io.StringIO()
    with teach(teacher, "crosskd,depth=1", told) as server:
        assert "so its students need --teacher too" in told.getvalue()
        learn(server.url, tmp_path / "both", "crosskd,depth=1", teacher=str(teacher), steps=2)
        other = small.train(tmp_path / "other", role="teacher", steps=1, seed=6).folder
        with pytest.raises(ServingError, match="is not that of --teacher"):
            learn(server.url, tmp_path / "run", "crosskd,depth=1", teacher=str(other))
    assert_same_runs(tmp_path / "online", tmp_path / "both")


def test_a_served_teacher_that_is_given_as_a_cache_is_recognised(teacher, tmp_path):
    pytest.importorskip("aiohttp")
    with teach(teacher) as server, pytest.raises(CacheError, match="if `detdistill teach` answers there, give --served"):
        learn(None, tmp_path / "run", cache=server.url)


def test_a_token_from_the_environment_binds_both_sides(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("DETDISTILL_TOKEN", "a-secret-word")
    with teach(teacher) as server:
        learn(server.url, tmp_path / "run", steps=1)
        monkeypatch.setenv("DETDISTILL_TOKEN", "another")
        with pytest.raises(ServingError, match=r"refuses \(401\): the token is missing or wrong"):
            learn(server.url, tmp_path / "other", steps=1)
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"a-secret-word" not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"devices": 2}, "devices: a served teacher is one process; start one for each device"),
        ({"store": "auto"}, "store: 'auto' is not one of float32, float16, bfloat16, int8, int6"),
        ({"queue": 0}, "queue: 0 is not a whole number, 1 or more"),
        ({"method": "pkd>mgd"}, "teach: it works with one trained teacher"),
        ({"method": "pkd+lgd"}, "teach: lgd learns from no teacher; leave it out here, students may add it"),
        ({"student": 3}, "student: a served teacher needs a model string here, not a int"),
    ],
)
def test_bad_settings_of_a_server_are_named(teacher, settings, said):
    method = settings.pop("method", "pkd")
    with pytest.raises(detdistill.DetdistillError, match=re.escape(said)):
        teach(teacher, method, **settings)


def test_doctor_asks_a_served_teacher_too(teacher):
    with teach(teacher) as server, Progress(quiet=True) as progress:
        keys = {key: small.SETTINGS[key] for key in ("size", "batch", "device", "threads")}
        found = api.doctor(None, small.MODEL, small.DATA, "pkd", served=server.url, progress=progress, probe_steps=2, **keys)
    texts = [finding.text for finding in found.findings if finding.level == "stop"]
    assert texts == []


# --------------------------------------------------------------------------------------------------- the command line


def test_the_command_line_serves_until_ctrl_c(teacher, tmp_path, forked_python):
    words = ["--teacher", str(teacher), "--listen", "127.0.0.1:0", "--out", str(tmp_path / "cache"), "--device", "cpu"]
    command = [sys.executable, "-m", "detdistill", "teach", *words, "--data", small.DATA, "--size", "64", "--flip", "0"]
    # A shell's background process ignores Ctrl-C, and so would all that it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        signal.signal(signal.SIGINT, before)
        try:
            for line in process.stdout:
                if found := re.search(r"students learn with --served (http://\S+); Ctrl-C ends it", line):
                    break
            settings = {**small.SETTINGS, "flip": 0, "steps": 2}
            options = [word for key, value in settings.items() for word in (f"--{key}", str(value).lower())]
            where = ["--student", small.MODEL, "--data", small.DATA, "--served", found[1], "--out", str(tmp_path / "run")]
            cli.main(["distill", *where, *options])
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            left = process.communicate(timeout=60)[0]
        finally:
            process.kill()
    assert process.returncode == 0
    assert re.search(r"\d+ images taught in \d passes, 0 read from", left)
    assert "Traceback" not in left
    assert len(KnowledgeCache.open(str(tmp_path / "cache")).index.places) in (8, 12)
    assert len(losses_of(tmp_path / "run")) == 2
    assert os.path.exists(tmp_path / "run" / "student")


def test_a_port_that_is_taken_ends_the_command_before_anything_is_loaded(teacher, monkeypatch, capsys):
    with teach(teacher) as server:
        monkeypatch.setattr(Method, "__init__", lambda *_: pytest.fail("built"))
        with pytest.raises(SystemExit):
            cli.main(["teach", "--teacher", str(teacher), "--listen", server.url.removeprefix("http://")])
    assert "is taken by another process; give another port" in capsys.readouterr().err
