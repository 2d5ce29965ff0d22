"""Students that were given in Python: a fresh copy for each run, checks before the training, and reading a trained one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detdistill.detectors.contract import Detector, Teacher
from detdistill.detectors.load import load_detector
from detdistill.detectors.options import OWN
from detdistill.detectors.wrap import WrappedModel
from detdistill.errors import ModelError, RunError, name_list


@dataclass(frozen=True)
class OwnStudent:
    """A student that was given in Python."""

    name: str
    """Name in place of a model string, ``own:NAME``."""
    build: Callable[[], Detector]
    """Makes the detector with its initial weights, anew for each run."""


def own_student(given: Detector | Callable[[], Detector]) -> OwnStudent:
    """A student from a detector or from a function that builds one.

    A detector is copied now and for each run, so every run starts from the same weights, and the given one is not trained. A
    function is called for each run after its seed was set, so baseline and distilled run of a seed start from the same weights,
    and other seeds from others.

    Raises:
        ModelError: the student cannot be trained or evaluated, cannot be copied, or the function returns no detector.
    """
    if not isinstance(given, nn.Module):
        return _of_function(given)
    if not isinstance(given, Detector):
        raise ModelError(
            f"student: a {type(given).__name__} is no detector yet; wrap it: detdistill.wrap(model, taps=[...], ...)"
        )
    _check_trainable(given)
    _check_copyable(given, "each run needs a fresh copy; give a function that builds the wrapped model instead")
    try:
        initial = copy.deepcopy(given)
    except Exception as error:  # modules may hold anything: open files, tensors of a graph
        raise ModelError(
            f"student: {given.spec.name} cannot be copied ({' '.join(str(error).split())}); give a function that builds it"
        ) from error
    return OwnStudent(f"{OWN}:{given.spec.name}", lambda: copy.deepcopy(initial))


def _of_function(function: Callable[[], Detector]) -> OwnStudent:
    def build() -> Detector:
        detector: Any = function()
        if not isinstance(detector, Detector):
            what = f"returned a {type(detector).__name__}, not a detector"
            raise ModelError(f"student: the function {what}; return detdistill.wrap(model, taps=[...], loss=..., detect=...)")
        _check_trainable(detector)
        return detector

    with torch.random.fork_rng():  # built once for its name and the checks
        first, second = build(), build()
    if first is second or {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}:
        raise ModelError("student: the function returns the same model twice; it must build a new one in each call")
    return OwnStudent(f"{OWN}:{first.spec.name}", build)


def check_own_student(student: Detector, classes: Sequence[str], averaged: bool) -> None:
    """Check that a student fits the data and the run.

    Args:
        student: the student.
        classes: class names of the data in label order.
        averaged: a moving average (a copy) of the student is evaluated.

    Raises:
        ModelError: its classes are not those of the data in this order, or a moving average is impossible.
    """
    if tuple(student.spec.classes) != tuple(classes):
        raise ModelError(
            f"student: {student.spec.name} has the classes ({name_list(student.spec.classes) or 'none'}), but the data have "
            f"({name_list(classes)}); give wrap(..., classes=[...]) the data's classes in this order"
        )
    if averaged:
        _check_copyable(student, "ema evaluates a copy; leave ema out, or take the module from the output")


def check_one_process(names: Sequence[str | None], processes: int) -> None:
    """Check that runs with models given in Python stay in this process.

    Args:
        names: names of student and teacher.
        processes: largest number of processes at the same time.

    Raises:
        RunError: there would be several processes.
    """
    own = [name for name in names if name is not None and name.startswith(f"{OWN}:")]
    if own and processes > 1:
        raise RunError(
            f"jobs, devices, on: {own[0]} was given in Python and cannot be sent to other processes; use jobs=1, devices=1 and "
            "on=local, or start the seeds one by one in a script of your own"
        )


def load_own(build: Callable[[], Detector], folder: Path) -> Detector:
    """The trained student of a finished run, for a model that was given in Python.

    Raises:
        ModelError: the folder is damaged or belongs to another model.
    """
    detector = build()
    if not isinstance(detector, WrappedModel):
        return load_detector(folder)
    detector.load_exported(folder / "student")
    return detector


def _check_trainable(detector: Detector) -> None:
    if isinstance(detector, WrappedModel) and (lacking := detector.lacks):
        raise ModelError(f"student: {detector.spec.name} was wrapped without {' and '.join(lacking)}; give them to wrap(...)")
    if not any(parameter.requires_grad for parameter in detector.parameters()):
        raise ModelError(
            f"student: no parameter of {detector.spec.name} can be trained (requires_grad is False, as in a Teacher's detector)"
        )


def _check_copyable(detector: Detector, why: str) -> None:
    if isinstance(detector, WrappedModel) and (bound := detector.bound_functions()):
        raise ModelError(
            f"student: {' and '.join(bound)} of {detector.spec.name} refers to the model itself, so a copy would use the layers "
            f"of the original: {why}"
        )


def is_own(student: Any) -> bool:
    """Whether a student was given in Python: a module, a teacher, or a function that builds it."""
    return isinstance(student, nn.Module | Teacher) or (callable(student) and not isinstance(student, type))
