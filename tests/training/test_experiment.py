"""Runs that belong together: over seeds, with baselines, one after the other or side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from detdistill.errors import RunError
from detdistill.settings import DistillSettings
from detdistill.training import experiment
from detdistill.training.plan import Plan
from detdistill.training.session import Session
from tests.training import small

BOTH = {"baseline": True, "seeds": (0, 1), "epochs": 1, "method": "pkd"}
NAMES = ["baseline-seed0", "distilled-seed0", "baseline-seed1", "distilled-seed1"]
SAME = ("role", "student", "teacher", "method", "seed", "epochs", "steps", "images_seen", "batch", "metrics", "per_class", "data")


def summaries(folder: Path) -> list[dict[str, Any]]:
    read = [json.loads((folder / name / "summary.json").read_text()) for name in NAMES]
    return [{key: summary[key] for key in SAME} for summary in read]


@pytest.fixture(scope="module")
def one_by_one(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "experiment"
    small.distill(teacher, folder, **BOTH)
    return folder


def test_plans(teacher: Path, tmp_path: Path):
    settings = DistillSettings(**{**small.SETTINGS, **BOTH}, out=tmp_path, jobs=3, resume=True)
    plan = Plan(small.MODEL, small.DATA, settings, role="distilled", teacher=str(teacher))
    plans = experiment.plans_of(plan, tmp_path)
    assert [p.settings.out.name for p in plans] == NAMES
    assert [p.role for p in plans] == ["baseline", "distilled"] * 2
    for single in plans:
        config = single.config()
        assert config["report"] is False
        assert config["resume"] is False, "there is nothing to resume yet"
        assert ("teacher" in config) == (single.role == "distilled")
        assert "baseline" not in config or config["baseline"] is False
        assert config.get("score_teacher", False) is False


def test_folders_and_teacher_numbers(one_by_one: Path, teacher: Path, tmp_path: Path):
    made = sorted(path.name for path in one_by_one.iterdir())
    assert made == sorted([*NAMES, "compare.json"])
    assert not list(one_by_one.rglob("report.html"))
    assert len({json.dumps(summary) for summary in summaries(one_by_one)}) == 4
    for summary in summaries(one_by_one):
        assert summary["steps"] == 6
        assert summary["images_seen"] == 24
    baselines = [small.checkpoint(one_by_one / name)["state_dict"] for name in ("baseline-seed0", "baseline-seed1")]
    assert small.differences(*baselines) != []


@pytest.mark.slow
def test_side_by_side_gives_the_same(one_by_one: Path, teacher: Path, tmp_path: Path, forked_python: None):
    result = small.distill(teacher, tmp_path / "parallel", **BOTH, jobs=2)
    assert summaries(tmp_path / "parallel") == summaries(one_by_one)
    for name in NAMES:
        assert small.unequal_runs(tmp_path / "parallel" / name, one_by_one / name) == []
    assert [path.name for path in result.runs] == NAMES
    assert not list((tmp_path / "parallel").rglob("report.html"))


def test_resume_does_what_is_missing(one_by_one: Path, teacher: Path, tmp_path: Path, monkeypatch):
    done: list[str] = []
    stopped = [False, True]
    run = experiment.run

    def watched(session: Session, *rest: Any) -> Any:
        if session.plan.title == "baseline, seed 1" and stopped.pop():
            raise RunError("no more")
        done.append(session.plan.title)
        return run(session, *rest)

    monkeypatch.setattr(experiment, "run", watched)
    with pytest.raises(RunError, match="no more"):
        small.distill(teacher, tmp_path / "e", **BOTH)
    before = (tmp_path / "e" / "baseline-seed0" / "summary.json").stat().st_mtime_ns
    small.distill(teacher, tmp_path / "e", **BOTH, resume=True)
    assert done == ["baseline, seed 0", "distilled, seed 0", "baseline, seed 1", "distilled, seed 1"]
    assert summaries(tmp_path / "e") == summaries(one_by_one)
    assert (tmp_path / "e" / "baseline-seed0" / "summary.json").stat().st_mtime_ns == before
    with pytest.raises(RunError, match=r"cannot resume .*baseline-seed0: lr was 0.001 and is now 0.5"):
        small.distill(teacher, tmp_path / "e", **BOTH, lr=0.5, resume=True)
    with pytest.raises(RunError, match="exists; give another --out"):
        small.distill(teacher, tmp_path / "e", **BOTH)


@pytest.mark.slow
def test_a_failing_child_gives_its_last_line(teacher: Path, tmp_path: Path, forked_python: None):
    (tmp_path / "e" / "distilled-seed0").mkdir(parents=True)
    settings = DistillSettings(**{**small.SETTINGS, "method": "pkd", "seeds": (0,), "epochs": 1}, out=tmp_path / "e", jobs=2)
    plan = Plan(small.MODEL, small.DATA, settings, role="distilled", teacher=str(teacher))
    (single,) = experiment.plans_of(plan, tmp_path / "e")
    (tmp_path / "e" / "distilled-seed0" / "mine").write_text("")
    with pytest.raises(
        RunError, match=r"distilled, seed 0 failed: detdistill: run folder .*distilled-seed0 exists; give another"
    ):
        experiment.run_side_by_side([single], settings, small.Progress(quiet=True))


def test_a_run_that_reads_other_data_is_stopped(tmp_path: Path):
    (tmp_path / "metrics.csv").write_text("stage,step,total,epoch,lr,seconds,loss\n,1,6,0,0.1,1,2.5\n")
    (tmp_path / "inputs.json").write_text('{"training data": "a", "validation data": "b", "teacher": "c"}')
    settings = DistillSettings(out=tmp_path)
    plan = Plan("fcos:resnet18", "/data/coco", settings, role="distilled", title="distilled, seed 0")
    same = {"training data": "a", "validation data": "b"}
    experiment._Followed(plan, small.Progress(quiet=True), same, None).look()
    other = experiment._Followed(plan, small.Progress(quiet=True), {**same, "validation data": "x"}, None)
    with pytest.raises(
        RunError, match=r"^distilled, seed 0: the validation data differ between this machine and the run's; /data/coco"
    ):
        other.look()


def test_a_result_that_is_not_seen_here(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(experiment, "SEEN", 0.1)
    settings = DistillSettings(out=tmp_path)
    followed = experiment._Followed(Plan("fcos:resnet18", "digits", settings), small.Progress(quiet=True), {}, None)
    with pytest.raises(
        RunError, match=r"ended well, but .*summary.json is not seen here; --out must be on a disk that all nodes"
    ):
        followed.ended(0, "")


def test_under_a_launcher(teacher: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="several runs cannot be started by torchrun"):
        small.distill(teacher, tmp_path / "e", **BOTH, devices=2)


def test_configs_run_again_as_they_are(one_by_one: Path):
    config = yaml.safe_load((one_by_one / "distilled-seed1" / "config.yaml").read_text())
    assert (config["seed"], config["seeds"], config["method"]) == (1, [], "pkd")
