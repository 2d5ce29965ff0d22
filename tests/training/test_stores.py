"""Caches and run folders in a bucket of a real S3 server, behind a network that fails."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from detdistill import api
from detdistill.cache.knowledge import KnowledgeCache
from detdistill.cache.storage import CacheError, run_storage
from detdistill.errors import RunError
from detdistill.progress import Progress
from detdistill.settings import TrainSettings
from detdistill.training.folder import new_folder
from detdistill.training.kept_runs import kept_copy
from detdistill.training.mirror import MARKER, Mirror, at_url, fetch, listed, working_folder
from detdistill.training.module import StageModule
from tests.s3_server import BUCKET, network, objects, prefix_of, server, url  # noqa: F401
from tests.training import small
from tests.training.test_from_cache import VIEWS, cache, offline

# ruff: noqa: F811


def test_a_cache_in_a_bucket_behind_a_failing_network(teacher, url, network, tmp_path):
    faults = iter([503, "drop", "lost", "cut", 500] * 1000)
    network.fault = lambda asked: next(faults) if asked.number % 3 == 2 else None
    made = cache(teacher, url)
    assert (made.folder, made.records, made.complete) == (url, VIEWS, True)
    assert "48 records" in api.verify_cache(url, progress=Progress(quiet=True))
    offline(url, tmp_path / "run")
    small.distill(teacher, tmp_path / "online", "pkd")
    assert small.rows(tmp_path / "run") == small.rows(tmp_path / "online"), "what a run with the teacher learns"


def test_an_unfinished_cache_in_a_bucket_is_continued(teacher, url, network, server):
    stored = lambda asked: asked.method == "PUT" and asked.path.endswith(".safetensors")  # noqa: E731
    seen = [0]

    def fault(asked):
        seen[0] += stored(asked)
        return 507 if stored(asked) and seen[0] > 2 else None

    network.fault = fault
    with pytest.raises(
        CacheError, match=rf"^cannot write to {url}: the store is full \(507\); finished records are kept: make space"
    ):
        cache(teacher, url)
    there = objects(server, prefix_of(url))
    assert len([name for name in there if name.endswith(".safetensors")]) == 2, "no half shard"
    with pytest.raises(CacheError, match=r"unfinished: 28 of 48 records are missing .*run the same `detdistill cache` again"):
        offline(url, "unused")
    network.fault = lambda asked: None
    assert cache(teacher, url).complete
    assert there < objects(server, prefix_of(url)), "what was there is kept"


def test_two_writers_in_one_bucket(teacher, url, tmp_path):
    made = cache(teacher, url, devices=2)
    assert (made.records, made.complete) == (VIEWS, True)
    names = KnowledgeCache.open(url).folder.sizes("shards")
    assert {name[:8] for name in names} == {"000of002", "001of002"}


def test_a_cache_in_a_bucket_that_is_missing(teacher, network):
    with pytest.raises(CacheError, match=r"s3://nowhere/x/cache.json cannot be read: there is no such bucket; make the bucket"):
        cache(teacher, "s3://nowhere/x")
    with pytest.raises(CacheError, match=rf"^s3://{BUCKET}/x is no cache \(it has no cache.json\); make one with"):
        KnowledgeCache.open(f"s3://{BUCKET}/x")


# -------------------------------------------------------------------------------------------------------------- run folders


@pytest.fixture(autouse=True)
def other_cache(tmp_path, monkeypatch):
    """Working folders of these tests are not those of other tests."""
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path / "kept"))


def test_a_run_at_a_url_is_the_run_in_a_folder(teacher, url, network, server, tmp_path):
    faults = iter([503, "drop", "lost", "cut", 500] * 1000)
    network.fault = lambda asked: next(faults) if asked.number % 5 == 4 else None
    done = small.distill(teacher, url, "pkd")
    small.distill(teacher, tmp_path / "here", "pkd")
    assert small.unequal_runs(tmp_path / "here", done.folder) == []
    names = {name.removeprefix(prefix_of(url) + "/") for name in objects(server, prefix_of(url))}
    assert {
        "files.json",
        "config.yaml",
        "metrics.csv",
        "summary.json",
        "checkpoints/last.ckpt",
        "student/model.safetensors",
    } < names
    assert not [name for name in names if "~" in name or "lock" in name]


def stopped_at(step, monkeypatch):
    """Training raises an error at a step."""
    before = StageModule.training_step

    def stops(self, batch, index):
        if self.global_step == step:
            raise RunError("stopped")
        return before(self, batch, index)

    monkeypatch.setattr(StageModule, "training_step", stops)


def test_a_run_is_continued_on_another_machine(teacher, url, network, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stopped_at(9, patched)
        with pytest.raises(RunError, match="stopped"):
            small.distill(teacher, url, "pkd", checkpoint_every=4)
    shutil.rmtree(working_folder(url))
    done = small.distill(teacher, url, "pkd", checkpoint_every=4, resume=True)
    small.distill(teacher, tmp_path / "here", "pkd", checkpoint_every=4)
    assert small.unequal_runs(tmp_path / "here", done.folder) == []
    with pytest.raises(RunError, match=rf"^run folder {url} exists; give another --out, or --resume true to continue the run"):
        small.distill(teacher, url, "pkd")


def test_a_store_that_is_away_stops_no_training(teacher, url, network, tmp_path, monkeypatch):
    going = [True]
    before = StageModule.training_step

    def goes(self, batch, index):
        going[0] = self.global_step < 2
        return before(self, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(StageModule, "training_step", goes)
        network.fault = lambda asked: None if going[0] else 503
        with pytest.raises(RunError, match=r"the store answers 503 .*; the finished run lies in .*, and --resume true sends it$"):
            small.distill(teacher, url, "pkd")
    network.fault = lambda asked: None
    assert fetch(run_storage(url), tmp_path / "now")[0].files == {}, "nothing was half sent"
    done = small.distill(teacher, url, "pkd", resume=True)
    assert len(small.rows(done.folder)) == 14
    found, _ = listed(run_storage(url))
    assert {"summary.json", "student/student.json", "metrics.csv"} < found.files.keys()
    assert done.folder == working_folder(url)


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content)


def read(url, folder):
    shutil.rmtree(folder, ignore_errors=True)
    fetch(run_storage(url), folder)
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else {}


def test_the_url_shows_a_whole_run_whenever_the_network_is_lost(url, network, tmp_path, monkeypatch):
    monkeypatch.setattr("detdistill.cache.retries.ATTEMPTS", 1)
    first, second = {"a": "1", "b": "1", "c": "1"}, {"a": "2", "b": "2", "c": "1", "d": "2"}
    seen, whole = [], False
    for good in range(20):
        here, there = tmp_path / f"local{good}", f"{url}/{good}"
        mirror = Mirror(run_storage(there), here, None)
        write(here, **first)
        mirror.push()
        write(here, **second)
        start = len(network.asked)
        network.fault = lambda asked, last=start + good: 503 if asked.number >= last else None
        try:
            mirror.push()
            whole = True
        except (OSError, RunError):
            pass
        network.fault = lambda asked: None
        seen.append(read(there, tmp_path / "fetched"))
        assert seen[-1] in (first, second)
        if whole:
            break
        mirror.push()
        assert read(there, tmp_path / "fetched") == second
    assert whole
    assert seen[0] == first
    assert seen[-1] == second
    assert len(seen) > 5, "it was lost in the midst of things"


def test_of_two_runs_at_one_url_the_later_one_goes_on(url, network, server, tmp_path):
    folder = run_storage(url)
    one = Mirror(folder, tmp_path / "one", None)
    write(tmp_path / "one", a="1")
    one.push()
    with pytest.raises(RunError, match=rf"^{url} was taken over by another run \(process \d+ on .* by its clock\)"):
        Mirror(folder, tmp_path / "other", None)
    two = Mirror(folder, tmp_path / "two", fetch(folder, tmp_path / "two"))
    write(tmp_path / "one", a="one's")
    with pytest.raises(RunError, match=r"was taken over by another run .*, so this one ends; what it has trained lies in .*one$"):
        one.push()
    write(tmp_path / "two", a="two's")
    two.push(last=True)
    assert read(url, tmp_path / "fetched") == {"a": "two's"}
    assert objects(server, prefix_of(url)) == {f"{prefix_of(url)}/{name}" for name in ("a", MARKER)}


def test_the_claim_of_a_run_that_sent_nothing_is_no_run(url, network, tmp_path):
    Mirror(run_storage(url), tmp_path / "killed", None)

    def ends_early():
        with at_url(TrainSettings(out=Path(url)), print) as (mine, mirror):
            assert mine.out == working_folder(url)
            assert mirror.list.files == {}
            raise RuntimeError("nothing done")

    with pytest.raises(RuntimeError, match="nothing done"):
        ends_early()
    assert listed(run_storage(url)) is None, "a run that ends before it has sent anything leaves nothing"


@pytest.fixture(scope="module")
def trained(teacher, tmp_path_factory):
    """A baseline and a distilled run."""
    folder = tmp_path_factory.mktemp("runs")
    return small.train(folder / "baseline", role="baseline").folder, small.distill(teacher, folder / "pkd", "pkd").folder


def sent(folder, url, tmp_path):
    """Send a run that was trained in a local folder."""
    local = shutil.copytree(folder, tmp_path / "sent" / folder.name)
    Mirror(run_storage(url), local, None).push(last=True)


def test_runs_at_urls_are_compared_reported_and_evaluated(trained, url, network, tmp_path):
    for folder in trained:
        sent(folder, f"{url}/{folder.name}", tmp_path)
    (gain,) = api.compare([f"{url}/baseline", f"{url}/pkd"])
    (local,) = api.compare(trained)
    assert gain == local
    assert api.compare([url]) == [local], "a folder of runs"
    before = len(network.asked)
    assert api.compare([f"{url}/baseline", f"{url}/pkd"]) == [local]
    assert {asked.path.rpartition("/")[2] for asked in network.asked[before:]} == {MARKER}, "nothing is fetched twice"
    page = api.report([f"{url}/pkd"], out=tmp_path / "page.html")
    assert "pkd" in page.read_text()
    wanted = api.evaluate(str(trained[1]), small.DATA, progress=Progress(quiet=True)).metrics
    for name in ("", "/student", "/checkpoints/last.ckpt"):
        assert api.evaluate(f"{url}/pkd{name}", small.DATA, progress=Progress(quiet=True)).metrics == wanted
    done = small.distill(f"{url}/pkd", tmp_path / "next", "pkd", epochs=1, init=f"{url}/baseline")
    assert json.loads((done.folder / "summary.json").read_text())["teacher"] == f"{url}/pkd"


def test_a_student_that_was_copied_to_a_url_is_read(trained, url, network):
    folder = run_storage(url)
    for path in (trained[1] / "student").iterdir():
        folder.send(path.name, path)
    api.evaluate(url, small.DATA, progress=Progress(quiet=True))
    before = len(network.asked)
    api.evaluate(url, small.DATA, progress=Progress(quiet=True))
    assert not [asked for asked in network.asked[before:] if "model.safetensors" in asked.path], "sizes and tags are the same"
    folder.write("model.safetensors", b"other")
    with pytest.raises(ValueError, match=r"model.safetensors differs from its checksum"):
        api.evaluate(url, small.DATA, progress=Progress(quiet=True))


def test_damage_at_a_url_is_named(trained, url, network, tmp_path):
    sent(trained[0], url, tmp_path)
    run_storage(url).write("summary.json", b"{}")
    with pytest.raises(
        RunError, match=rf"^{url}/summary.json is damaged: it differs from its checksum in files.json; send the run"
    ):
        kept_copy(url)
    run_storage(url).remove("summary.json")
    with pytest.raises(RunError, match=rf"^{url}: a file of its files.json is missing; send the run again by --resume true"):
        kept_copy(url)
    with pytest.raises(RunError, match=r"^s3://detdistill/nothing: nothing is there; check the URL"):
        kept_copy("s3://detdistill/nothing")


def test_what_is_not_served_at_urls_is_refused(teacher, url, network):
    quiet = Progress(quiet=True)
    with pytest.raises(RunError, match=rf"^{url} contains no run to resume \(no files.json\); leave out --resume"):
        small.distill(teacher, url, "pkd", resume=True)
    with pytest.raises(RunError, match=rf"^out: {url} is a URL: several runs \(--baseline, --seeds\) work in one local folder"):
        small.distill(teacher, url, "pkd", baseline=True)
    with pytest.raises(RunError, match=rf"and {url} is a URL; use --devices alone, or a shared folder"):
        small.distill(teacher, url, "pkd", nodes=2)
    with pytest.raises(RunError, match=rf"^out: {url} is a URL: this is written to the local disk; give a folder or file"):
        api.predict(str(teacher), "images", url, progress=quiet)
    with pytest.raises(RunError, match=rf"^out: {url}/report.html is a URL: the page is written to the local disk"):
        api.report([url])
    with pytest.raises(RunError, match="there is no such bucket; make the bucket, or correct the URL"):
        small.distill(teacher, "s3://nowhere/x", "pkd")
    with pytest.raises(RunError, match=rf"^out: {url} is a URL, which only single runs of train and distill write to"):
        new_folder(Path(url), "find")
    assert not objects(network.server, prefix_of(url))


def test_runs_at_other_urls_go_through_fsspec(tmp_path):
    url = f"memory://runs/{tmp_path.name}"
    folder = run_storage(url)
    one = Mirror(folder, tmp_path / "one", None)
    write(tmp_path / "one", a="1", b="1")
    one.push()
    two = Mirror(folder, tmp_path / "two", fetch(folder, tmp_path / "two"))
    with pytest.raises(RunError, match="was taken over by another run"):
        one.push()
    write(tmp_path / "two", a="2")
    two.push()
    assert read(url, tmp_path / "fetched") == {"a": "2", "b": "1"}
    two.push(last=True)
    assert set(folder.tree()) == {"a", "b", MARKER}
    assert (Path(kept_copy(f"{url}/a"))).read_text() == "2"


def test_a_run_at_a_url_is_exported_and_predicts(trained, url, network, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (64, 64), "grey").save(images / "one.png")
    sent(trained[1], url, tmp_path)
    quiet = Progress(quiet=True)
    made = api.export(url, tmp_path / "made" / "model.torchscript", format="torchscript", size=64, progress=quiet)
    found = api.predict(url, images, tmp_path / "drawn", progress=quiet)
    assert (found.images, (tmp_path / "drawn" / "detections.json").exists()) == (1, True)
    other = run_storage(f"{url}-files")
    for path in made.file.parent.glob("*.*"):
        other.send(path.name, path)
    same = api.evaluate(f"{url}-files/model.torchscript", small.DATA, progress=quiet).metrics
    assert same == api.evaluate(str(made.file), small.DATA, progress=quiet).metrics
