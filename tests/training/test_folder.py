"""Run folders are made once and never overwritten."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import yaml

from detdistill.errors import RunError
from detdistill.training.folder import new_folder, resume_folder, start_folder
from detdistill.training.metrics_table import MetricsTable, read_rows
from tests.training import small


def test_a_folder_that_exists_is_refused(teacher: Path, tmp_path: Path):
    before = {path: path.stat().st_mtime_ns for path in teacher.rglob("*")}
    with pytest.raises(RunError, match=r"run folder .*teacher exists; give another --out, or --resume true"):
        small.train(teacher, role="teacher", epochs=1, seed=5)
    assert {path: path.stat().st_mtime_ns for path in teacher.rglob("*")} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match=r"run folder .*file exists"):
        small.train(tmp_path / "file")


def test_an_empty_folder_may_be_used(tmp_path: Path):
    assert new_folder(tmp_path, "x") == tmp_path
    start_folder(tmp_path, {"epochs": 3})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"epochs": 3}


def test_without_out_a_new_folder_under_runs(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = new_folder(None, "train-fcos-seed0")
    assert path.parent == Path("runs")
    assert path.name.startswith("train-fcos-seed0-2")
    assert not path.exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(RunError, match=r"cannot (make the run folder|use) .*; give another --out") as caught:
            start_folder(new_folder(path, "x"), {})
        assert str(path) in str(caught.value)


def _start(path: Path, barrier, results) -> None:
    new_folder(path, "x")
    barrier.wait(30)
    try:
        start_folder(path, {"who": multiprocessing.current_process().name})
    except RunError as error:
        results.put(str(error))
    else:
        results.put("made")


def test_two_runs_that_start_together_do_not_share(tmp_path: Path):
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(2), fork.Queue()
    children = [fork.Process(target=_start, args=(tmp_path / "run", barrier, results)) for _ in range(2)]
    for child in children:
        child.start()
    said = sorted(results.get(timeout=30) for _ in children)
    for child in children:
        child.join()
    assert said[0] == "made"
    assert said[1].endswith("exists; give another --out, or --resume true to continue the run")


def test_the_run_of_the_first_process_stays(tmp_path: Path, monkeypatch):
    """The first process takes the temporary file of the second for one that a killed process left."""

    def taken_meanwhile(source: Path, target: Path) -> None:
        source.unlink()
        target.write_text("who: first\n")
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("detdistill.training.folder.os.link", taken_meanwhile)
    with pytest.raises(RunError, match="exists; give another --out"):
        start_folder(tmp_path / "run", {"who": "second"})
    assert (tmp_path / "run" / "config.yaml").read_text() == "who: first\n"


def test_a_setting_that_did_not_exist_yet_had_its_default(tmp_path: Path):
    start_folder(tmp_path / "run", {"epochs": 3})
    assert resume_folder(tmp_path / "run", {"epochs": 3, "sync_bn": False}).path == tmp_path / "run"
    with pytest.raises(RunError, match="sync_bn was False and is now True"):
        resume_folder(tmp_path / "run", {"epochs": 3, "sync_bn": True})


def test_what_cannot_be_resumed(tmp_path: Path):
    with pytest.raises(RunError, match="--resume true needs --out with the run folder"):
        small.train(None, resume=True)  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"nothing contains no run to resume \(no config.yaml\); leave out --resume"):
        small.train(tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_what_decides_nothing_may_change(tmp_path: Path):
    start_folder(tmp_path / "run", {"epochs": 3, "out": "a", "resume": False, "report": True, "jobs": 1, "score_teacher": True})
    config = {"epochs": 3, "out": "b", "resume": True, "report": False, "jobs": 2, "score_teacher": False}
    assert resume_folder(tmp_path / "run", config).path == tmp_path / "run"
    with pytest.raises(RunError, match=r"cannot resume .*run: epochs was 3 and is now 4; use the same settings"):
        resume_folder(tmp_path / "run", {**config, "epochs": 4})


def test_the_table_grows_and_is_taken_up_again(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path)
    table.add({"stage": "a", "step": 1, "loss": 0.25})
    table.add({"stage": "a", "step": 2, "loss": 0.5, "train/cls": 1e-9})
    table.add({"stage": "b", "step": 1, "loss": 1.0, "train/kd": 2})
    rows = read_rows(path)
    assert [row["train/cls"] for row in rows] == ["", "1e-09", ""]
    assert rows[2]["train/kd"] == "2"
    with path.open("a") as file:
        file.write("b,2,1")  # a crash while writing
    assert read_rows(path) == rows
    MetricsTable(path, keep=lambda stage, step: stage == "a" and step <= 2)
    kept = read_rows(path)
    assert [(row["stage"], row["step"]) for row in kept] == [("a", "1"), ("a", "2")]
    assert "train/kd" not in kept[0]
    MetricsTable(path)
    assert read_rows(path) == []


@pytest.mark.parametrize("written", [0, 5, 100])
def test_a_process_killed_while_it_starts_a_run_does_not_stop_the_next(tmp_path: Path, written: int, monkeypatch):
    text = Path.write_text

    def killed_halfway(self, content, **options):
        text(self, content[:written], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed_halfway)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # nothing is cleaned up by a process that is killed
    with pytest.raises(KeyboardInterrupt):
        start_folder(new_folder(tmp_path / "run", "x"), {"epochs": 3})
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"contains no run to resume"):
        resume_folder(tmp_path / "run", {"epochs": 3})
    start_folder(new_folder(tmp_path / "run", "x"), {"epochs": 3})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "config.yaml"]
    assert resume_folder(tmp_path / "run", {"epochs": 3}).checkpoints.is_dir()


def test_a_damaged_config_is_named(tmp_path: Path):
    for content in (b"epochs: [", b"\xff\xfe\x00", b"- a", b""):
        (tmp_path / "config.yaml").write_bytes(content)
        with pytest.raises(RunError, match=r"config.yaml (cannot be read: .*|holds no settings); start a new run"):
            resume_folder(tmp_path, {"epochs": 3})


def test_a_refused_run_leaves_no_folder_and_a_trained_one_is_kept(tmp_path: Path):
    folder = start_folder(tmp_path / "run", {})
    folder.discard(folder_too=True)
    assert not folder.path.exists()
    folder = start_folder(tmp_path / "run", {})
    MetricsTable(folder.metrics).add({"stage": "train", "step": 1})
    folder.discard(folder_too=True)
    assert folder.metrics.exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    start_folder(mine, {}).discard(folder_too=False)
    assert list(mine.iterdir()) == []
