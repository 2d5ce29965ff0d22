"""Runs that take a second: 24 images of 64 pixels, a detector of some thousand parameters, one thread."""

from __future__ import annotations

import csv
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from detdistill import api
from detdistill.progress import Progress

MODEL = "fcos:resnet10t,channels=16-16-16-16,stem=8,neck=32,levels=3-4,convs=1"
DATA = "digits:train=24,val=8,size=64,seed=0"
SETTINGS: dict[str, Any] = {
    "size": 64,
    "batch": 4,
    "device": "cpu",
    "threads": 1,
    "epochs": 2,
    "in_memory": True,
    "monitor_every": 3,
    "log_every": 1,
    "report": False,
}
STEPS = 12
"""24 images, 2 epochs, 4 at a time."""


def train(out: Path, **settings: Any) -> Any:
    with Progress(quiet=True) as progress:
        return api.train(MODEL, DATA, out=out, progress=progress, **{**SETTINGS, **settings})


def distill(teacher: Path, out: Path, method: str = "mgd,weight=0.001", console: Console | None = None, **settings: Any) -> Any:
    with Progress(console, quiet=console is None) as progress:
        wanted = {**SETTINGS, "score_teacher": False, **settings}
        return api.distill(str(teacher), MODEL, DATA, method, out=out, progress=progress, **wanted)


def checkpoint(folder: Path, name: str = "last.ckpt") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / name, map_location="cpu", weights_only=True)


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without what must differ."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """Every place where two nested values are not exactly equal."""
    if type(first) is not type(second):
        return [f"{where}: {type(first).__name__} and {type(second).__name__}"]
    if isinstance(first, torch.Tensor):
        return [] if first.shape == second.shape and torch.equal(first, second) else [where]
    if isinstance(first, dict):
        if list(first) != list(second):
            return [f"{where}: keys {list(first)} and {list(second)}"]
        return [text for key in first for text in differences(first[key], second[key], f"{where}/{key}")]
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            return [f"{where}: {len(first)} and {len(second)} items"]
        pairs = enumerate(zip(first, second, strict=True))
        return [text for index, (one, two) in pairs for text in differences(one, two, f"{where}/{index}")]
    return [] if first == second else [f"{where}: {first!r} and {second!r}"]


def unequal_runs(first: Path, second: Path) -> list[str]:
    """Every difference between the last checkpoints, the tables and the students of two runs, seconds apart."""
    parts = []
    for folder in (first, second):
        content = checkpoint(folder)
        wanted = {key: content[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")}
        evaluation = content["callbacks"]["Evaluation"]
        for scores in (evaluation["latest"],):
            scores.pop("seconds")
        own = {key: content["detdistill"][key] for key in ("stage", "images", "random")}
        parts.append({**wanted, "evaluation": evaluation, "own": own, "rows": rows(folder)})
    students = [(folder / "student" / "model.safetensors").read_bytes() for folder in (first, second)]
    return differences(*parts) + ([] if students[0] == students[1] else ["student/model.safetensors"])


def killed(action: Callable[[], Any]) -> int:
    """Do something in a fork of this process (that spares importing torch again); its exit code, -9 when killed."""
    child = multiprocessing.get_context("fork").Process(target=action)
    child.start()
    child.join(120)
    assert child.exitcode is not None, "the fork hangs"
    return child.exitcode


def die_at_step(step: int) -> None:
    """From now on, trainings in this process, a fork, are killed before this step."""
    from detdistill.training.module import StageModule

    before = StageModule.training_step

    def training_step(self: Any, batch: Any, index: int) -> Any:
        if self.global_step == step:
            die()
        return before(self, batch, index)

    StageModule.training_step = training_step  # type: ignore[method-assign]


def die() -> None:
    """As the kernel's out-of-memory killer ends a process."""
    os.kill(os.getpid(), signal.SIGKILL)
