"""What goes wrong in a run is said in one line, and nothing good is lost."""

from __future__ import annotations

import errno
import io
import json
import math
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from detdistill import api, cli
from detdistill.data.discover import load_data
from detdistill.detectors.contract import Teacher
from detdistill.detectors.load import load_detector
from detdistill.errors import RunError
from detdistill.methods.mgd import MGD
from detdistill.progress import Progress
from detdistill.structures import Losses, map_tensors
from detdistill.training import folder as folder_module
from detdistill.training.folder import write_text
from detdistill.training.metrics_table import MetricsTable, idle_terms
from detdistill.training.module import NonFiniteLoss, StageModule
from tests.training import small


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, how: str) -> list[tuple[int, ...]]:
    """Let MGD's loss, or only its gradient, be NaN at a step; returns where the images' ids will be."""
    learn, seen_ids = MGD.learn, []

    def spoilt(self, student, seen, taught, batch, clock):
        losses = learn(self, student, seen, taught, batch, clock)
        if clock.step != step:
            return losses
        seen_ids.append(batch.ids)
        term = losses.terms["mgd"]
        if how == "gradient":
            term.register_hook(lambda gradient: gradient * float("inf"))
            return losses
        return Losses({"mgd": term * float("nan")}, losses.monitors)

    monkeypatch.setattr(MGD, "learn", spoilt)
    return seen_ids


@pytest.mark.parametrize(("cut", "alone"), [(False, False), (True, False), (True, True)])
def test_a_term_without_gradient_is_said(cut: bool, alone: bool, teacher: Path, tmp_path: Path, monkeypatch):
    """The commonest silent failure: a loss that is there and falls on nobody. A method may name terms that train it alone."""
    learn = MGD.learn

    def detached(self, student, seen, taught, batch, clock):
        losses = learn(self, student, seen, taught, batch, clock)
        return Losses({"mgd": losses.terms["mgd"].detach()}, losses.monitors)

    if cut:
        monkeypatch.setattr(MGD, "learn", detached)
    if alone:
        monkeypatch.setattr(MGD, "trains_alone", ("mgd",))
    console = Console(file=io.StringIO(), width=300)
    small.distill(teacher, tmp_path / "run", console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("mgd: no gradient in any measurement, so the term had no effect" in said) == (cut and not alone)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [5.0, 0.0])
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_not_finite(how: str, clip: float, accumulate: int, teacher: Path, tmp_path: Path, monkeypatch):
    ids = spoil(monkeypatch, 4, how)
    settings = {"batch": 4 // accumulate, "accumulate": accumulate, "clip": clip, "checkpoint_every": 1, "monitor_every": 0}
    with pytest.raises(NonFiniteLoss) as caught:
        small.distill(teacher, tmp_path / "run", **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert "at step 4 (epoch 0)" in text
    assert "lower lr" in text
    assert text.endswith("checkpoints/last.ckpt")
    if how == "loss":
        assert text.startswith("loss mgd is not finite")
        assert f"on images {list(ids[0])}" in text
    else:
        assert text.startswith("the gradient (")
        assert f"on images {list(ids[-1])}" in text
    content = small.checkpoint(tmp_path / "run")
    assert content["global_step"] == 4
    assert all(torch.isfinite(value).all() for value in content["state_dict"].values())
    assert load_detector(tmp_path / "run" / "checkpoints" / "last.ckpt", [str(digit) for digit in range(10)]) is not None
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("saved", [True, False])
def test_a_teacher_that_gives_nan_is_named(saved: bool, teacher: Path, tmp_path: Path, monkeypatch):
    """Neither the learning rate nor a checkpoint that does not exist is spoken of."""
    observe = Teacher.observe

    def spoilt(self, *arguments, **options):
        seen = observe(self, *arguments, **options)
        calls.append(1)
        return map_tensors(seen, lambda tensor: tensor * float("nan")) if len(calls) > good else seen

    good, calls = 2 if saved else 0, []
    monkeypatch.setattr(Teacher, "observe", spoilt)
    with pytest.raises(NonFiniteLoss) as caught:
        small.distill(teacher, tmp_path / "run", checkpoint_every=1)
    text = str(caught.value)
    assert text.startswith(f"the teacher's output is NaN at step {good} (epoch 0) on images [")
    assert "; check the teacher's weights, or verify the cache; " in text
    assert text.endswith("checkpoints/last.ckpt" if saved else "; there is no checkpoint yet")
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists() == saved
    assert "lower lr" not in text


def test_a_teacher_that_gives_nan_to_an_earlier_stage_is_named(teacher: Path, tmp_path: Path, monkeypatch):
    """UniKD's extractors learn on the teacher itself, not on what is taught."""
    observe = Teacher.observe
    monkeypatch.setattr(
        Teacher,
        "observe",
        lambda *given, **options: map_tensors(observe(*given, **options), lambda tensor: tensor * float("nan")),
    )
    with pytest.raises(NonFiniteLoss, match=r"the teacher's output is NaN at step 0 .*; there is no checkpoint yet"):
        small.distill(teacher, tmp_path / "run", "unikd", stages=tmp_path / "stages")


def test_weights_ruined_by_a_finite_gradient_are_not_saved(tmp_path: Path, monkeypatch):
    """The step itself overflows: loss and gradient were finite."""
    step = torch.optim.SGD.step

    def overflowing(self: Any, closure: Any = None) -> Any:
        result = step(self, closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["steps"] = state.get("steps", 0) + 1
                if state["steps"] == 3:
                    parameter.data.fill_(float("inf"))
        return result

    monkeypatch.setattr(torch.optim.SGD, "step", overflowing)
    with pytest.raises(NonFiniteLoss, match=r"is not finite after step 3; lower lr"):
        small.train(tmp_path / "run", optimizer="sgd", schedule="constant", checkpoint_every=1)
    content = small.checkpoint(tmp_path / "run")
    assert content["global_step"] == 2
    assert all(torch.isfinite(value).all() for value in content["state_dict"].values())


def test_an_absurd_learning_rate_ends_with_2_and_one_line(tmp_path: Path, capsys):
    settings = {**small.SETTINGS, "optimizer": "sgd", "schedule": "constant", "clip": 0, "lr": 1e30, "checkpoint_every": 1}
    flags = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--model", small.MODEL, "--data", small.DATA, "--out", str(tmp_path / "run"), *flags])
    assert caught.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("detdistill: ")]
    assert len(said) == 1
    assert "not finite" in said[0]
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    if path.exists():
        assert all(torch.isfinite(value).all() for value in small.checkpoint(tmp_path / "run")["state_dict"].values())


def test_a_last_batch_of_one_image_whose_levels_have_one_cell(tmp_path: Path):
    """BatchNorm of one value per channel, which torch refuses in training."""
    model = "ssdlite:resnet10t,channels=8-16-16-24,stem=8,neck=16,levels=3-7"
    with Progress(quiet=True) as progress:
        settings = {**small.SETTINGS, "epochs": 1, "out": tmp_path / "run", "progress": progress}
        result = api.train(model, "digits:train=5,val=2,size=64,seed=0", **settings)
    assert result.summary["steps"] == 2
    assert all(math.isfinite(float(row["loss"])) for row in small.rows(tmp_path / "run") if row["loss"])


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "failing", [no_space, lambda *_, **__: (_ for _ in ()).throw(RuntimeError("unexpected pos 64 vs 0\nC++"))]
)
def test_disk_full_while_saving_a_checkpoint(failing: Any, tmp_path: Path, monkeypatch):
    save = torch.save
    calls = []

    def sometimes(content: Any, file: Any, *rest: Any, **options: Any) -> None:
        calls.append(file)
        if len(calls) == 3:
            failing()
        save(content, file, *rest, **options)

    monkeypatch.setattr(torch, "save", sometimes)
    with pytest.raises(
        RunError, match=r"cannot save .*last.ckpt: .*; the previous one is kept. Make space and .*--resume true"
    ) as c:
        small.train(tmp_path / "run", checkpoint_every=1)
    assert "\n" not in str(c.value)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "last.ckpt.crc32"]
    assert small.checkpoint(tmp_path / "run")["global_step"] == 2
    monkeypatch.undo()
    small.train(tmp_path / "run", checkpoint_every=1, resume=True)
    small.train(tmp_path / "whole", checkpoint_every=1)
    assert small.unequal_runs(tmp_path / "whole", tmp_path / "run") == []


def test_a_file_really_too_large(tmp_path: Path):
    """The kernel refuses to write more than so many bytes of a file: as on a full disk, in torch's own writer."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            small.train(tmp_path / "run")
        except RunError as error:
            (tmp_path / "said").write_text(str(error))
            raise SystemExit(2) from error

    assert small.killed(limited) == 2
    said = (tmp_path / "said").read_text()
    assert said.startswith(f"cannot save {tmp_path / 'run' / 'checkpoints' / 'best.ckpt'}: ")
    assert "there is no earlier one" in said
    assert "\n" not in said
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_disk_full_while_writing_the_result(tmp_path: Path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("detdistill.training.run.save_student", no_space)
        with pytest.raises(RunError, match=r"cannot write the result into .*run: No space.*finish the run with --resume true"):
            small.train(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(folder_module.os, "replace", no_space)
        patched.setattr(folder_module.os, "link", no_space)
        with pytest.raises(RunError, match=r"cannot save|cannot write"):
            small.train(tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not list((tmp_path / "run").rglob("*.tmp"))
    monkeypatch.setattr(StageModule, "training_step", lambda *_: pytest.fail("trained again"))
    result = small.train(tmp_path / "run", resume=True)
    assert result.summary["steps"] == small.STEPS
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"] == result.scores.metrics


def test_disk_full_while_writing_config(tmp_path: Path, monkeypatch):
    load_data(small.DATA)  # makes the images
    with monkeypatch.context() as patched:
        patched.setattr(folder_module.os, "replace", no_space)
        patched.setattr(folder_module.os, "link", no_space)
        with pytest.raises(RunError, match=r"cannot make the run folder .*: No space left on device; give another --out"):
            small.train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_disk_full_while_writing_the_table(tmp_path: Path, monkeypatch):
    table = MetricsTable(tmp_path / "metrics.csv")
    table.add({"stage": "train", "step": 1})
    before = table.path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", no_space)
        with pytest.raises(RunError, match=r"cannot write .*metrics.csv: No space left on device; make space and continue"):
            table.add({"stage": "train", "step": 2, "train/new": 0.5})
    assert table.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    shutil.rmtree(tmp_path)
    with pytest.raises(RunError, match=r"cannot write .*metrics.csv"):
        MetricsTable(tmp_path / "metrics.csv")


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "cuda"}, "device: cuda is not available here; use --device cpu"),
        ({"precision": "16"}, "precision: 16 needs a GPU; use bf16 or 32"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_what_this_machine_cannot_do(settings: dict[str, Any], said: str, tmp_path: Path):
    with pytest.raises(RunError, match=said):
        small.train(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_processes_that_would_share_a_folder_without_knowing(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="2 processes were started, but --devices times --nodes is 1"):
        small.train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_interrupted_by_the_keyboard(tmp_path: Path, monkeypatch):
    step = StageModule.training_step

    def interrupted(self: Any, *arguments: Any) -> Any:
        if self.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(StageModule, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            small.train(tmp_path / "run", checkpoint_every=1)
    small.train(tmp_path / "run", checkpoint_every=1, resume=True)
    small.train(tmp_path / "whole", checkpoint_every=1)
    assert small.unequal_runs(tmp_path / "whole", tmp_path / "run") == []


def test_idle_terms_need_two_measurements():
    first = {"stage": "distill", "loss": "1", "share/a": "0", "share/b": "0", "share/c": "1"}
    assert idle_terms([first]) == ()
    assert idle_terms([first, {"share/a": "", "share/b": "0"}, {"share/a": 0.0, "share/b": "0.1", "share/c": "0"}]) == ("a",)
