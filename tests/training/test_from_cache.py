"""`detdistill cache` and `distill --cache`, from the first record to the finished run."""

import dataclasses
import errno
import io
import json
import shutil

import pytest
import torch
from rich.console import Console

from detdistill import api, cli
from detdistill.cache.knowledge import KnowledgeCache
from detdistill.cache.storage import CacheError, LocalFolder, storage
from detdistill.errors import DetdistillWarning, RunError
from detdistill.methods.shared.contract import Method
from detdistill.progress import Progress
from tests.training import small

VIEWS = 48
"""24 images and their mirror images."""
UNIKD = "unikd,queries=6,adaptor_layers=0,extractor_epochs=0.5"


def cache(teacher, out, method="pkd", **settings):
    with Progress(quiet=True) as progress:
        keys = ("size", "batch", "device", "threads")
        wanted = {**{key: small.SETTINGS[key] for key in keys}, "store": "float32", "shard": 10, **settings}
        return api.cache(str(teacher), out, wanted.pop("data", small.DATA), method, progress=progress, **wanted)


def offline(folder, out, method="pkd", teacher=None, **settings):
    with Progress(quiet=True) as progress:
        wanted = {**small.SETTINGS, "score_teacher": False, "cache": str(folder), **settings}
        data = wanted.pop("data", small.DATA)
        return api.distill(teacher, small.MODEL, data, method, out=out, progress=progress, **wanted)


@pytest.fixture(scope="module")
def filled(teacher, tmp_path_factory):
    """A finished cache of features; not to be changed."""
    folder = tmp_path_factory.mktemp("caches") / "features"
    made = cache(teacher, folder)
    assert (made.records, made.complete, made.store) == (VIEWS, True, "float32")
    return folder


@pytest.fixture
def copied(filled, tmp_path):
    """One that may be changed."""
    return shutil.copytree(filled, tmp_path / "cache")


# -------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("method", ["pkd", "fgd+mgd,weight=0.001"])
def test_a_run_without_its_teacher_learns_what_the_run_with_it_learns(teacher, filled, tmp_path, method, monkeypatch):
    small.distill(teacher, tmp_path / "online", method)

    def never(*_):
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(Method, "teach", never)
    offline(filled, tmp_path / "offline", method)
    one, other = (small.rows(tmp_path / name) for name in ("online", "offline"))
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        for name in mine:
            if mine[name] and name not in ("stage", "lr") and not name.startswith("val/"):
                assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-4, abs=1e-6), (mine["step"], name)
    students = [small.checkpoint(tmp_path / name)["state_dict"] for name in ("online", "offline")]
    for name, weight in students[0].items():
        torch.testing.assert_close(weight, students[1][name], rtol=1e-3, atol=1e-5)
    summary = json.loads((tmp_path / "offline" / "summary.json").read_text())
    assert summary["teacher"] == str(teacher)
    assert summary["cache"]["fingerprint"] == KnowledgeCache.open(str(filled)).about.fingerprint
    assert summary["teacher_parameters"] == json.loads((tmp_path / "online" / "summary.json").read_text())["teacher_parameters"]


@pytest.mark.parametrize("method", ["fitnet,hint_share=1+pkd", "cwd+fitnet,hint_share=0.5"])
def test_earlier_stages_learn_from_a_cache_too_on_the_command_line(teacher, filled, tmp_path, method, monkeypatch):
    """A stage of hints beside another method, whose records are shared."""
    small.distill(teacher, tmp_path / "online", method)
    monkeypatch.setattr(Method, "teach", lambda *_: pytest.fail("the teacher was asked"))
    words = {key: str(small.SETTINGS[key]).lower() for key in small.SETTINGS}
    options = [word for key, value in words.items() for word in (f"--{key}", value)]
    where = ["--student", small.MODEL, "--data", small.DATA, "--cache", str(filled), "--out", str(tmp_path / "offline")]
    cli.main(["distill", *where, "--method", method, *options])
    one, other = (small.rows(tmp_path / name) for name in ("online", "offline"))
    hints = 12 if "hint_share=1+" in method else 6
    assert [row["stage"] for row in other if row["loss"]] == ["hint"] * hints + ["distill"] * 12
    for mine, theirs in zip(one, other, strict=True):
        for name in mine:
            if mine[name] and name not in ("stage", "lr") and not name.startswith("val/"):
                assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-3, abs=1e-6), (mine["step"], name)
    assert all(float(row["train/fitnet"]) > 0 for row in other if row["stage"] == "hint" and row["loss"])


def test_images_of_unequal_canvases_learn_the_same_too(teacher, tmp_path):
    views = {"size": 64, "resize": "short_side", "scales": (0.5, 1.0), "steps": 4}
    made = cache(teacher, tmp_path / "cache", **{key: views[key] for key in ("size", "resize", "scales")})
    assert made.records == 2 * VIEWS
    small.distill(teacher, tmp_path / "online", "fitnet", in_memory=False, **views)
    offline(tmp_path / "cache", tmp_path / "offline", "fitnet", in_memory=False, **views)
    one, other = (small.rows(tmp_path / name) for name in ("online", "offline"))
    losses = [[float(row["loss"]) for row in rows if row["loss"]] for rows in (one, other)]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_resumed_offline_run_ends_where_an_uninterrupted_one_does(filled, tmp_path):
    offline(filled, tmp_path / "whole", "mgd,weight=0.001")
    offline(filled, tmp_path / "parts", "mgd,weight=0.001", checkpoint_every=5)
    code = small.killed(lambda: _dies_at_step_8(filled, tmp_path / "killed"))
    assert code == -9
    offline(filled, tmp_path / "killed", "mgd,weight=0.001", checkpoint_every=5, resume=True)
    assert small.unequal_runs(tmp_path / "parts", tmp_path / "killed") == []


def _dies_at_step_8(folder, out):
    small.die_at_step(8)
    offline(folder, out, "mgd,weight=0.001", checkpoint_every=5)


def test_baseline_and_distilled_runs_side_by_side(filled, tmp_path):
    result = offline(filled, tmp_path / "both", epochs=1, baseline=True)
    assert [gain.method for gain in result.gains] == ["pkd"]
    assert "cache" not in (tmp_path / "both" / "baseline-seed0" / "config.yaml").read_text()


def test_a_cache_behind_a_url(teacher, tmp_path):
    url = f"memory://{tmp_path.name}/cache"
    assert cache(teacher, url, store="auto").complete
    result = offline(url, tmp_path / "run", steps=2)
    assert json.loads((result.folder / "summary.json").read_text())["cache"]["path"] == url


# ---------------------------------------------------------------------------------------------------------- writing it


def test_a_forecast_writes_nothing(teacher, tmp_path):
    made = cache(teacher, tmp_path / "cache", dry_run=True, store="auto")
    assert not (tmp_path / "cache").exists()
    assert (made.records, made.complete, made.forecast.records) == (0, False, VIEWS)
    real = cache(teacher, tmp_path / "cache", store=made.store)
    written = sum(path.stat().st_size for path in (tmp_path / "cache" / "shards").glob("*.safetensors"))
    assert made.forecast.bytes[real.store] == pytest.approx(written, rel=0.35), "headers weigh more when maps are this small"


def test_a_disk_that_is_too_small_is_said_before(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(LocalFolder, "free_bytes", lambda self: 400_000)
    with pytest.raises(CacheError, match=r"would need about 4\d\d kB as float32, .* has 400 kB free; try --store (float16|int8)"):
        cache(teacher, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def _killed_while_writing(teacher, folder):
    before, count = LocalFolder.write, [0]

    def write(self, name, *content):
        count[0] += name.endswith(".safetensors")
        if count[0] == 3:
            whole = b"".join(content)
            (self.path / name).write_bytes(whole[: len(whole) // 2])  # as a disk without our care would leave it
            small.die()
        before(self, name, *content)

    LocalFolder.write = write
    cache(teacher, folder)


def test_a_killed_cache_goes_on_where_it_stopped(teacher, tmp_path):
    folder = tmp_path / "cache"
    assert small.killed(lambda: _killed_while_writing(teacher, folder)) == -9
    half = KnowledgeCache.open(str(folder))
    assert len(half.index.places) == 20, "two whole shards"
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("shards/*.json")}
    with pytest.raises(CacheError, match=r"unfinished: 28 of 48 records are missing .*run the same `detdistill cache` again"):
        offline(folder, tmp_path / "run")
    assert cache(teacher, folder).complete
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    manifests = [json.loads(path.read_text())["content"]["records"] for path in folder.glob("shards/*.json")]
    assert sum(map(len, manifests)) == VIEWS, "nothing twice"
    assert len(list(folder.glob("shards/*.safetensors"))) == len(manifests), "and nothing half"
    assert cache(teacher, folder).records == VIEWS, "a third time there is nothing to do"


def test_a_full_disk_is_said_and_the_rest_is_written_when_there_is_space(teacher, tmp_path, monkeypatch):
    folder, before, count = tmp_path / "cache", LocalFolder.write, [0]

    def full(self, name, *content):
        count[0] += 1
        if count[0] > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        before(self, name, *content)

    monkeypatch.setattr(LocalFolder, "write", full)
    with pytest.raises(CacheError, match=r"No space left on device; finished records are kept: make space and run the same"):
        cache(teacher, folder)
    monkeypatch.undo()
    assert len(KnowledgeCache.open(str(folder)).index.places) == 20
    assert cache(teacher, folder).complete


def test_several_writers_share_the_work(teacher, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    first = cache(teacher, folder, devices=2, store="auto")
    assert (first.records, first.complete) == (VIEWS // 2, False)
    monkeypatch.setenv("RANK", "1")
    second = cache(teacher, folder, devices=2, store="auto")
    assert (second.records, second.complete, second.store) == (VIEWS, True, first.store)
    writers = {path.name[:8] for path in folder.glob("shards/*.json")}
    assert writers == {"000of002", "001of002"}


def test_devices_start_processes_of_their_own(teacher, tmp_path, forked_python):
    made = cache(teacher, tmp_path / "cache", devices=2)
    assert (made.records, made.complete) == (VIEWS, True)
    assert {path.name[:8] for path in (tmp_path / "cache").glob("shards/*.json")} == {"000of002", "001of002"}
    with pytest.raises(CacheError, match="nodes: start the same command on every machine with torchrun"):
        cache(teacher, tmp_path / "other", nodes=2)


# -------------------------------------------------------------------------------------------------------------- refusals


def test_a_run_that_draws_other_views_is_refused(filled, tmp_path):
    with pytest.raises(CacheError, match=r"colour=0\.3 and mosaic=0\.5 make endlessly many views"):
        offline(filled, tmp_path / "run", colour=0.3, mosaic=0.5)
    with pytest.raises(CacheError, match=r"would draw size=96 \(the cache has 64\); scale 0\.8 \(the cache has 1\)"):
        offline(filled, tmp_path / "run", size=96, scales=(0.8,))
    with pytest.raises(CacheError, match=r"cwd,on=logits learns from features and prediction, it holds features"):
        offline(filled, tmp_path / "run", "cwd,on=logits")
    with pytest.raises(CacheError, match="other training images or boxes"):
        offline(filled, tmp_path / "run", data="digits:train=24,val=8,size=64,seed=1")
    with pytest.raises(CacheError, match="is no cache"):
        offline(tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_cache_cannot_replace_is_said(filled, tmp_path):
    with pytest.raises(RunError, match=r"teacher: \w+ needs a teacher \(--teacher\), a cache of its outputs \(--cache\)"):
        offline(filled, tmp_path / "run", cache=None)
    with pytest.raises(RunError, match="inherit: it copies weights of the teacher; give --teacher"):
        offline(filled, tmp_path / "run", inherit=True)


def test_another_teacher_is_refused_and_the_right_one_may_be_named(teacher, filled, tmp_path):
    other = small.train(tmp_path / "other", role="teacher", steps=1, seed=6).folder
    with pytest.raises(CacheError, match="made by another teacher"):
        offline(filled, tmp_path / "run", teacher=str(other))
    result = offline(filled, tmp_path / "run", teacher=str(teacher), steps=2, inherit=True)
    assert json.loads((result.folder / "summary.json").read_text())["inherit"]
    with pytest.raises(CacheError, match=r"is a cache of other teacher \(other weights or classes\)"):
        cache(other, filled)


def test_a_damaged_record_stops_the_run_by_name(copied, tmp_path):
    for shard in copied.glob("shards/*.safetensors"):
        content = bytearray(shard.read_bytes())
        content[-9] ^= 1
        shard.write_bytes(content)
    with pytest.raises(CacheError, match=r"the record of image .* is damaged \(its checksum is wrong\)"):
        offline(copied, tmp_path / "run")


def test_reading_writes_nothing(filled, tmp_path, monkeypatch):
    def read_only(self, name, content):
        if self.path == filled:
            raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(LocalFolder, "write", read_only)
    offline(filled, tmp_path / "run", steps=1)


def test_a_disk_that_takes_nothing_is_said(teacher, tmp_path, monkeypatch):
    def read_only(self, name, content):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(LocalFolder, "write", read_only)
    with pytest.raises(CacheError, match=r"cannot write to .*cache: Read-only file system"):
        cache(teacher, tmp_path / "cache")


def test_verify_compares_with_the_living_teacher(teacher, copied, tmp_path):
    with Progress(quiet=True) as progress:
        said = api.verify_cache(copied, str(teacher), records=6, device="cpu", progress=progress)
        assert said.startswith("48 of 48 records, all checksums right; 6 compared with the teacher: largest difference")
        assert api.verify_cache(copied, progress=progress) == "48 of 48 records, all checksums right"
        other = small.train(tmp_path / "other", role="teacher", steps=1, seed=6).folder
        with pytest.raises(CacheError, match="another teacher"):
            api.verify_cache(copied, str(other), device="cpu", progress=progress)
        # A cache that claims to be this teacher's and is not.
        lying = KnowledgeCache.open(str(copied))
        made = cache(other, tmp_path / "lie")
        lie = KnowledgeCache.open(made.folder)
        claims = dataclasses.replace(lie.about, teacher_fingerprint=lying.about.teacher_fingerprint)
        from detdistill.cache.shards import sealed, unsealed

        (tmp_path / "lie" / "cache.json").write_bytes(sealed({"format": 1, **dataclasses.asdict(claims)}))
        for path in (tmp_path / "lie" / "shards").glob("*.json"):
            path.write_bytes(sealed({**unsealed(path.read_bytes(), ""), "cache": claims.fingerprint}))
        with pytest.raises(CacheError, match=r"does not agree with the teacher: 6 records differ by up to"):
            api.verify_cache(tmp_path / "lie", str(teacher), records=6, device="cpu", progress=progress)
        next(copied.glob("shards/*.safetensors")).unlink()
        with pytest.raises(CacheError, match="is missing"):
            api.verify_cache(copied, progress=progress)


# -------------------------------------------------------------------------------------------- methods with earlier stages


def test_what_an_earlier_stage_learnt_is_in_the_cache(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = cache(teacher, tmp_path / "cache", UNIKD, student=small.MODEL, epochs=2, stages=tmp_path / "stages")
    assert made.complete
    assert len(list((tmp_path / "stages").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "cache" / "stages").glob("*.safetensors"))) == 1
    online = small.distill(teacher, tmp_path / "online", UNIKD, stages=tmp_path / "stages").folder
    run = offline(tmp_path / "cache", tmp_path / "offline", UNIKD, stages=tmp_path / "none").folder
    assert {row["stage"] for row in small.rows(run)} == {"distill"}
    losses = [[float(row["loss"]) for row in small.rows(folder) if row["loss"]] for folder in (online, run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    again = cache(teacher, tmp_path / "cache", UNIKD, student=small.MODEL, epochs=2, stages=tmp_path / "stages")
    assert again.complete
    with Progress(quiet=True) as progress:
        said = api.verify_cache(tmp_path / "cache", str(teacher), records=4, device="cpu", progress=progress)
    assert "4 compared with the teacher" in said
    for path in (tmp_path / "cache" / "stages").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(RunError, match=r"stage extractors has no result in .*cache nor in .*none"):
        offline(tmp_path / "cache", tmp_path / "lost", UNIKD, stages=tmp_path / "none")


def test_images_that_changed_since_the_cache_was_made_are_refused(teacher, tmp_path):
    from detdistill.data.discover import load_data

    data = tmp_path / "data"
    root = load_data(small.DATA).train.root
    shutil.copytree(root, data)
    folder = tmp_path / "cache"
    cache(teacher, folder, data=str(data))
    first = load_data(str(data)).train.records[0].path
    content = bytearray(first.read_bytes())
    first.write_bytes(content)  # the same bytes at another time
    offline(folder, tmp_path / "same", data=str(data), epochs=1)
    content[-20] ^= 1
    first.write_bytes(content)
    with pytest.raises(CacheError, match=rf"1 of 24 images changed since it was made \(the first: {first}\); restore them"):
        offline(folder, tmp_path / "other", data=str(data), epochs=1)


def test_verify_counts_what_is_missing(copied):
    shard = sorted((copied / "shards").glob("*.json"))[0]
    lost = len(json.loads(shard.read_text())["content"]["records"])
    shard.unlink()
    with pytest.raises(CacheError, match=rf"is unfinished: {VIEWS - lost} of {VIEWS} records, all checksums right; run the same"):
        api.verify_cache(copied, progress=Progress(quiet=True))


def test_no_file_of_a_run_holds_the_password_of_its_cache(teacher, filled, tmp_path):
    url = "memory://me:SECRET@host/cache"
    with pytest.warns(DetdistillWarning, match="is hidden"):
        remote = storage(url)
    for path in filled.rglob("*.*"):
        remote.write(str(path.relative_to(filled)), path.read_bytes())
    with pytest.warns(DetdistillWarning, match="is hidden"):
        offline(url, tmp_path / "run", report=True)
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"SECRET" not in path.read_bytes(), path
    assert "me:***@host" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_teacher_trained_at_another_size_is_named(teacher, tmp_path):
    told = io.StringIO()
    small.distill(teacher, tmp_path / "run", "pkd", Console(file=told, width=200), size=96, epochs=1)
    assert "the teacher was trained with size 64 and is shown images with size 96: it may detect less there" in told.getvalue()
    told = io.StringIO()
    small.distill(teacher, tmp_path / "same", "pkd", Console(file=told, width=200), epochs=1)
    assert "was trained with" not in told.getvalue()


def test_brackets_in_a_path_are_no_markup(teacher, tmp_path):
    told = io.StringIO()
    small.distill(teacher, tmp_path / "a[" / "red]", "pkd", Console(file=told, width=200), epochs=1)
    small.distill(teacher, tmp_path / "a[" / "red]", "pkd", Console(file=told, width=200), epochs=1, resume=True)
    assert "a[/red] is finished" in told.getvalue()
