"""Weights that are shared out among processes (FSDP) train as those that every process keeps whole (DDP)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from detdistill import api
from detdistill.detectors.build import build_detector
from detdistill.errors import RunError
from detdistill.progress import Progress
from detdistill.training import sharded
from detdistill.training.sharded import ShardedModule
from tests.training import small
from tests.training.together import together

BACKBONE = "resnet10t,channels=8-8-16-16,stem=8"
MODELS = {
    "fcos": f"fcos:{BACKBONE},neck=32,levels=3-4,convs=1",
    "faster_rcnn": f"faster_rcnn:{BACKBONE},neck=16,levels=3-4,mlp=16,proposals=20,rois=64,norm=frozen",
    "rt_detr": f"rt_detr:{BACKBONE},dim=16,heads=2,ffn=16,queries=8,decoder=2,denoising=0",
}
STEPS: dict[str, Any] = {
    **small.SETTINGS,
    "epochs": 1,
    "steps": 4,
    "batch": 2,
    "devices": 2,
    "monitor_every": 0,
    "optimizer": "sgd",  # Adam divides rounding errors by themselves
    "lr": 0.01,
}


def train(out: Path, model: str = MODELS["fcos"], **settings: Any) -> None:
    with Progress(quiet=True) as progress:
        api.train(model, small.DATA, out=out, progress=progress, **{**STEPS, **settings})


def distill(teacher: Path, out: Path, method: str, **settings: Any) -> None:
    small.distill(teacher, out, method, **{**STEPS, **settings})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def assert_equal_runs(first: Path, second: Path) -> None:
    """The same losses and the same student, up to rounding."""
    rows = small.rows(first), small.rows(second)
    assert len(rows[0]) == len(rows[1]) > 1
    for one, other in zip(*rows, strict=True):
        for name in one:
            if one[name] and name != "stage":
                assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-5, abs=1e-5), name
    students = weights(first), weights(second)
    assert students[0].keys() == students[1].keys()
    for key, value in students[0].items():
        torch.testing.assert_close(students[1][key], value, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_losses_and_weights_are_those_of_ddp(name: str, tmp_path: Path):
    lr = 0.001 if name == "rt_detr" else 0.01  # its losses tell more about rounding errors
    for strategy in ("ddp", "fsdp"):
        assert together(2, lambda rank, s=strategy: train(tmp_path / s, MODELS[name], strategy=s, lr=lr)) == [0, 0]
    assert_equal_runs(tmp_path / "ddp", tmp_path / "fsdp")
    summary = json.loads((tmp_path / "fsdp" / "summary.json").read_text())
    assert summary["parameters"] == build_detector(MODELS[name], summary["data"]["classes"]).count_parameters()


@pytest.mark.parametrize("method", ["pkd", "fgd+cwd"])
def test_a_teacher_is_shared_out_too(method: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = ShardedModule.on_train_start
    seen = tmp_path / "seen"

    def look(self: ShardedModule) -> None:
        before(self)
        taught = [p for one in self.method.teachers() for p in one.detector.parameters() if isinstance(p, DTensor)]
        own = [*taught, *self.student.parameters(), *self.method.parameters()]
        assert len(taught) == 3 * 8, "three blocks of the backbone"
        assert all(isinstance(p, DTensor) for p in own)
        seen.write_text(f"{sum(p.to_local().numel() for p in own)} {sum(p.numel() for p in own)}")

    monkeypatch.setattr(ShardedModule, "on_train_start", look)
    for strategy in ("ddp", "fsdp"):
        assert together(2, lambda rank, s=strategy: distill(teacher, tmp_path / s, method, strategy=s)) == [0, 0]
    assert_equal_runs(tmp_path / "ddp", tmp_path / "fsdp")
    mine, all_of_them = map(int, seen.read_text().split())
    assert mine == pytest.approx(all_of_them / 2, rel=0.05)


def test_a_run_that_was_stopped_is_continued_exactly(teacher: Path, tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = {"strategy": "fsdp", "optimizer": "adamw", "steps": 6, "checkpoint_every": 2}

    def killed(rank: int) -> None:
        before = ShardedModule.training_step

        def step(self: ShardedModule, batch: Any, index: int) -> Any:
            if self.global_step == 4:
                small.die()
            return before(self, batch, index)

        ShardedModule.training_step = step  # type: ignore[method-assign]
        distill(teacher, cut, "fgd", **settings)

    assert together(2, lambda rank: distill(teacher, whole, "fgd", **settings)) == [0, 0]
    assert together(2, killed) == [-9, -9]
    assert small.checkpoint(cut)["global_step"] == 4
    assert together(2, lambda rank: distill(teacher, cut, "fgd", **settings, resume=True)) == [0, 0]
    assert small.unequal_runs(whole, cut) == []
    names = {name for name, tensor in small.checkpoint(whole)["state_dict"].items() if isinstance(tensor, DTensor)}
    assert names == set(), "the checkpoint is whole"


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("pkd", {"ema": 0.9}, "the moving average (--ema) would need the whole weights in every step"),
        ("pkd", {"balance": 0.3}, "--balance measures gradients of whole weights"),
        ("pkd>fgd", {}, "trains in 2 stages, and a student cannot be shared out twice; use --strategy ddp"),
        ("unikd,queries=6,adaptor_layers=0,extractor_epochs=0.5", {}, "unikd trains in 2 stages, and a student cannot be shared"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    method: str, settings: dict[str, Any], said: str, teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    assert together(2, lambda rank: distill(teacher, run, method, strategy="fsdp", **settings)) == [2, 2]
    (line,) = {line for line in capfd.readouterr().err.splitlines() if line.startswith("detdistill: ")}
    assert line.startswith("detdistill: strategy fsdp: ")
    assert said in line
    assert not run.exists(), "nothing was trained"


def test_one_process_has_nobody_to_share_with(tmp_path: Path):
    with pytest.raises(RunError, match="strategy fsdp: there is one process to share with; give --devices"):
        train(tmp_path / "run", devices=1, strategy="fsdp")


def test_a_detector_whose_blocks_are_no_modules_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sharded, "blocks", lambda detector: [detector.model.head.classification_head])  # run layer by layer
    assert together(2, lambda rank: train(tmp_path / "run", strategy="fsdp")) == [2, 2]
    assert "detdistill: strategy fsdp: fcos:resnet10t" in (told := capfd.readouterr().err)
    assert "uses weights of a block without calling the block; use --strategy ddp" in told
