"""A pair of tiny detectors with a method, and what the checks of all methods share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from detdistill.detectors.contract import Detector, Teacher
from detdistill.methods.fitnet import FitNet
from detdistill.methods.pkd import PKD
from detdistill.methods.shared.contract import Composition, Method, Stage, teach_by_canvas
from detdistill.structures import Batch, Clock, Losses
from tests.tiny import TinyDense

MIDDLE = Clock(step=5, total=10, epoch=1)
"""Past every warm-up's zero."""


@dataclasses.dataclass
class _Pair:
    method_class: type[Method]
    hyperparameters: Mapping[str, Any]
    teacher_class: type[Detector] | None
    student_class: type[Detector]
    channels: int
    teacher: Teacher | None = None
    student: Detector | None = None

    def build(self, seed: int = 2, composed: bool = False) -> Method:
        """A new student and method on the same teacher, the same for equal seeds; ``composed``: beside another method."""
        with torch.random.fork_rng(devices=[]):
            if self.teacher is None and self.teacher_class is not None:
                self.teacher = Teacher(self.teacher_class(channels=(self.channels, self.channels), seed=1))
            self.student = self.student_class(seed=seed)
            torch.manual_seed(seed)
            method = self.method_class(self.teacher, self.student, **self.hyperparameters)
            if not composed:
                return method
            other = FitNet if self.method_class is PKD else PKD
            return Composition([method, other(self.teacher or Teacher(TinyDense(seed=1)), self.student)], self.student)

    def forget(self) -> None:
        if self.teacher is not None:
            self.teacher.forget()


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a nested structure with their paths."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{path}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from tensors(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from tensors(getattr(value, f.name), f"{path}.{f.name}")


def assert_same(first: Any, second: Any, message: str, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Every tensor of two nested structures is equal."""
    mine, theirs = dict(tensors(first)), dict(tensors(second))
    assert mine.keys() == theirs.keys(), message
    for path, tensor in mine.items():
        torch.testing.assert_close(
            tensor, theirs[path], rtol=rtol, atol=atol, equal_nan=True, msg=lambda text, path=path: f"{message}{path}: {text}"
        )


def run_stage(stage: Stage, student: Detector, method: Method, batch: Batch, clock: Clock = MIDDLE) -> Losses:
    """One step and its gradients, with only that trainable which the stage says (and which was so before)."""
    before = {p: p.requires_grad for p in (*student.parameters(), *method.parameters())}
    open_to: list[nn.Module] = list(stage.trains(clock))
    chosen = {p for module in open_to for p in module.parameters()}
    for parameter, required in before.items():
        parameter.requires_grad_(required and parameter in chosen)
        parameter.grad = None
    losses = stage_losses(stage, batch, clock)
    losses.total().backward()
    for parameter, required in before.items():
        parameter.requires_grad_(required)
    return losses


def stage_losses(stage: Stage, batch: Batch, clock: Clock = MIDDLE) -> Losses:
    """One step of a stage on what its method is taught online."""
    taught = None if stage.learns_from is None else teach_by_canvas(stage.learns_from, batch)
    return stage.step(batch, taught, clock)
