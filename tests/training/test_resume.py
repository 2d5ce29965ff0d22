"""A run that was killed and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from detdistill.errors import RunError
from detdistill.training.callbacks import Checkpoints, Evaluation, Records
from detdistill.training.module import StageModule
from tests.training import small

DISTILLED = {"checkpoint_every": 1}
"""MGD has layers of its own and draws random masks; images are flipped at random; every step is saved."""


def kill_when(
    monkeypatch: pytest.MonkeyPatch, where: type, method: str, moment: str, step: int, stage: str | None = None
) -> None:
    """Let the process die before or after a method is called at a step."""
    original = getattr(where, method)

    def replaced(self: Any, trainer: Any, module: Any, *rest: Any) -> Any:
        now = trainer.global_step == step and stage in (None, module.stage.name)
        if now and moment == "before":
            small.die()
        result = original(self, trainer, module, *rest)
        if now:
            small.die()
        return result

    monkeypatch.setattr(where, method, replaced)


KILLS = {
    "mid-epoch": (Checkpoints, "on_train_batch_end", "after", 2),
    "mid-epoch, not saved yet": (Checkpoints, "on_train_batch_end", "before", 4),
    "second epoch": (Checkpoints, "on_train_batch_end", "after", 9),
    "last step of an epoch": (Checkpoints, "on_train_batch_end", "after", 6),
    "in evaluation": (Evaluation, "run", "before", 6),
    "after evaluation": (Evaluation, "run", "after", 6),
    "between epochs": (Checkpoints, "on_train_epoch_end", "after", 6),
    "last step": (Checkpoints, "on_train_batch_end", "after", 12),
    "after the last evaluation": (Evaluation, "run", "after", 12),
    "after the last checkpoint": (Checkpoints, "on_train_epoch_end", "after", 12),
}


@pytest.fixture(scope="module")
def uninterrupted(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    small.distill(teacher, folder, **DISTILLED)
    return folder


def test_the_run_uses_what_a_resume_could_lose(uninterrupted: Path, teacher: Path, tmp_path: Path):
    content = small.checkpoint(uninterrupted)
    assert content["global_step"] == small.STEPS
    assert any(key.startswith("method.generators") for key in content["state_dict"])
    small.distill(teacher, tmp_path / "again", **DISTILLED)
    assert small.unequal_runs(uninterrupted, tmp_path / "again") == []
    small.distill(teacher, tmp_path / "other", **DISTILLED, seed=1)
    assert len(small.unequal_runs(uninterrupted, tmp_path / "other")) > 50


@pytest.mark.parametrize("kill", KILLS)
def test_killed_and_resumed_equals_uninterrupted(kill: str, uninterrupted: Path, teacher: Path, tmp_path: Path, monkeypatch):
    where, method, moment, step = KILLS[kill]
    with monkeypatch.context() as patched:
        kill_when(patched, where, method, moment, step)
        assert small.killed(lambda: small.distill(teacher, tmp_path / "run", **DISTILLED)) == -9
    assert not (tmp_path / "run" / "summary.json").exists()
    small.distill(teacher, tmp_path / "run", **DISTILLED, resume=True)
    assert small.unequal_runs(uninterrupted, tmp_path / "run") == []
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (uninterrupted, tmp_path / "run")]
    for key in ("steps", "images_seen", "epochs", "metrics", "per_class", "errors", "best_ap", "config_fingerprint"):
        assert summaries[0][key] == summaries[1][key], key
    assert summaries[0]["images_seen"] == 48


def test_killed_before_the_first_checkpoint(uninterrupted: Path, teacher: Path, tmp_path: Path, monkeypatch):
    with monkeypatch.context() as patched:
        kill_when(patched, Records, "on_train_batch_end", "after", 1)
        assert small.killed(lambda: small.distill(teacher, tmp_path / "run", **DISTILLED)) == -9
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    small.distill(teacher, tmp_path / "run", **DISTILLED, resume=True)
    assert small.unequal_runs(uninterrupted, tmp_path / "run") == []


def test_killed_twice(uninterrupted: Path, teacher: Path, tmp_path: Path, monkeypatch):
    for step in (3, 8):
        with monkeypatch.context() as patched:
            kill_when(patched, Checkpoints, "on_train_batch_end", "after", step)
            resume = step > 3
            assert small.killed(lambda resume=resume: small.distill(teacher, tmp_path / "run", **DISTILLED, resume=resume)) == -9
    small.distill(teacher, tmp_path / "run", **DISTILLED, resume=True)
    assert small.unequal_runs(uninterrupted, tmp_path / "run") == []


VARIANTS: dict[str, dict[str, Any]] = {
    "moving average": {"ema": 0.7},
    "accumulate": {"accumulate": 2, "batch": 2},
    "accumulate with a rest": {"accumulate": 4, "batch": 4},
    "cosine with warm-up": {"schedule": "cosine", "warmup_steps": 4, "optimizer": "sgd", "lr": 0.01},
    "so many steps": {"steps": 9},
    "steps that end with an epoch": {"steps": 12},
    "evaluated seldom": {"evaluate_every": 5},
    "saved seldom": {"checkpoint_every": 4},
    "mosaic and zoom": {"mosaic": 0.5, "scale_jitter": (0.5, 1.5), "colour": 0.3, "in_memory": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_resume_bit_equal(variant: str, teacher: Path, tmp_path: Path, monkeypatch):
    settings = {**DISTILLED, **VARIANTS[variant]}
    small.distill(teacher, tmp_path / "whole", **settings)
    steps = small.checkpoint(tmp_path / "whole")["global_step"]
    with monkeypatch.context() as patched:
        kill_when(patched, Records, "on_train_batch_end", "after", steps - 2)
        assert small.killed(lambda: small.distill(teacher, tmp_path / "run", **settings)) == -9
    small.distill(teacher, tmp_path / "run", **settings, resume=True)
    assert small.unequal_runs(tmp_path / "whole", tmp_path / "run") == []


@pytest.mark.slow
def test_workers_resume_bit_equal(teacher: Path, tmp_path: Path, monkeypatch):
    small.distill(teacher, tmp_path / "whole", **DISTILLED)
    with monkeypatch.context() as patched:
        kill_when(patched, Checkpoints, "on_train_batch_end", "after", 3)
        assert small.killed(lambda: small.distill(teacher, tmp_path / "run", **DISTILLED, workers=1)) == -9
    small.distill(teacher, tmp_path / "run", **DISTILLED, workers=1, resume=True)
    assert small.unequal_runs(tmp_path / "whole", tmp_path / "run") == []


def test_a_finished_run_is_left_alone(uninterrupted: Path, teacher: Path, monkeypatch):
    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(uninterrupted.rglob("*")) if path.is_file()}

    before = contents()
    monkeypatch.setattr(StageModule, "training_step", lambda *_: pytest.fail("trained again"))
    again = small.distill(teacher, uninterrupted, **DISTILLED, resume=True)
    assert contents() == before
    assert again.runs == (uninterrupted,)
    alone = small.train(teacher, role="teacher", epochs=1, seed=5, resume=True)
    assert alone.summary == json.loads((teacher / "summary.json").read_text())
    assert alone.scores.metrics == alone.summary["metrics"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"epochs": 3}, "epochs was 2 and is now 3"),
        ({"lr": 0.5}, "lr was 0.001 and is now 0.5"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"method": "pkd"}, "method was 'mgd,weight=0.001' and is now 'pkd'"),
        ({"dis": 2.0}, "distill_weight was 1.0 and is now 2.0"),
    ],
)
def test_changed_settings_are_refused(changed: dict[str, Any], named: str, uninterrupted: Path, teacher: Path):
    with pytest.raises(RunError, match=named) as caught:
        small.distill(teacher, uninterrupted, **{**DISTILLED, **changed}, resume=True)
    assert str(uninterrupted) in str(caught.value)


def test_a_broken_checkpoint_is_said(teacher: Path, tmp_path: Path, monkeypatch):
    with monkeypatch.context() as patched:
        kill_when(patched, Checkpoints, "on_train_batch_end", "after", 3)
        assert small.killed(lambda: small.distill(teacher, tmp_path / "run", **DISTILLED)) == -9
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"cannot resume from .*last.ckpt"):
        small.distill(teacher, tmp_path / "run", **DISTILLED, resume=True)


def test_other_data_or_another_teacher_is_refused_unless_told(tmp_path: Path):
    """The fingerprints of the start are compared; a finished file of an earlier version has none."""
    from detdistill.training.folder import INPUTS, check_inputs

    (tmp_path / INPUTS).write_text(json.dumps({"training data": "a", "validation data": "b", "teacher": "c"}))
    check_inputs(tmp_path, {"training data": "a", "validation data": "b", "teacher": "c"})
    with pytest.raises(
        RunError, match=r"cannot resume .*: the training data and the teacher changed since .* --allow_changes true"
    ):
        check_inputs(tmp_path, {"training data": "x", "validation data": "b", "teacher": "y"})
    (tmp_path / INPUTS).unlink()
    check_inputs(tmp_path, {"training data": "x"})


def test_a_run_keeps_the_fingerprints_it_started_with(uninterrupted: Path, teacher: Path, tmp_path: Path):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    kept = json.loads((folder / "inputs.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    assert kept["training data"] == summary["data"]["fingerprint"]
    assert len(kept["teacher"]) >= 8
    (folder / "summary.json").unlink()
    (folder / "inputs.json").write_text(json.dumps({**kept, "validation data": "another"}))
    with pytest.raises(RunError, match="the validation data changed since the run started"):
        small.distill(teacher, folder, **DISTILLED, resume=True)
    small.distill(teacher, folder, **DISTILLED, resume=True, allow_changes=True)
    assert json.loads((folder / "inputs.json").read_text()) == kept
