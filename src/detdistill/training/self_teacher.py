"""The student's own moving average as its teacher (``--teacher self:ema``): a control that knows nothing the student does not.

The mean teacher of Tarvainen and Valpola, "Mean teachers are better role models" (NeurIPS 2017), for any method: if a student
gains as much from its own average as from a larger teacher, the gain is not the teacher's knowledge.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detdistill.detectors.contract import Detector, Teacher
from detdistill.errors import RunError, nearest

PREFIX = "self:"
"""What the names of teachers begin with that are made from the student."""
KINDS = ("ema", "trained")
"""``self:ema``: the student's moving average; ``self:trained``: the student's own model, trained alone beforehand."""
DECAY = 0.999
"""Decay of the average, that of Mean Teacher for most of the training."""


@dataclass(frozen=True)
class OwnAverage:
    """A teacher that is the moving average of the run's student."""

    decay: float = DECAY

    def of(self, student: Detector) -> AverageTeacher:
        """The teacher for a student: a copy of it."""
        return AverageTeacher(student, self.decay)


class AverageTeacher(Teacher):
    """The exponential moving average of a student's weights and buffers; frozen and in eval mode as any teacher."""

    def __init__(self, student: Detector, decay: float) -> None:
        """Start with a copy of the student.

        Args:
            student: the student; its later changes enter by ``follow`` only.
            decay: share of the old average that remains after a step, 0 or more and below 1.
        """
        super().__init__(copy.deepcopy(student))
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def follow(self, student: Detector) -> None:
        """Move the average towards the student after an optimizer step.

        The decay grows from 0, as in Mean Teacher: after step t it is ``min(decay, 1 - 1 / t)``, so that the random weights of
        the start are forgotten at once. Integers (counters of batch norms) are copied.
        """
        self.steps += 1
        decay = min(self.decay, 1 - 1 / self.steps)
        theirs = student.state_dict()
        for name, mine in self.detector.state_dict().items():
            if mine.is_floating_point():
                mine.lerp_(theirs[name].to(mine), 1 - decay)
            else:
                mine.copy_(theirs[name])

    def state_dict(self) -> dict[str, Any]:
        """Average and number of steps, for a resumed run."""
        return {"steps": self.steps, "average": {name: value.cpu() for name, value in self.detector.state_dict().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of ``state_dict``, exactly."""
        average: dict[str, Tensor] = state["average"]
        self.steps = int(state["steps"])
        self.detector.load_state_dict(average)


def read_self(text: str) -> OwnAverage | None:
    """The teacher of a text such as ``self:ema,decay=0.99``; None for ``self:trained``.

    Raises:
        RunError: another word after ``self:``, or a setting that it does not have.
    """
    kind, *settings = [piece.strip() for piece in text.removeprefix(PREFIX).split(",")]
    if kind not in KINDS:
        raise RunError(
            f"teacher {text}: there is no {PREFIX}{kind}{nearest(kind, KINDS)}; {PREFIX}ema is the student's moving average, "
            f"{PREFIX}trained the student trained alone; both have the student's architecture, so none is given"
        )
    if kind == "trained":
        if settings:
            raise RunError(f"teacher {text}: {PREFIX}trained has no settings; write --teacher {PREFIX}trained")
        return None
    decay = DECAY
    for setting in settings:
        name, _, value = setting.partition("=")
        if name != "decay":
            raise RunError(f"teacher {text}: no setting {name!r}; write --teacher {PREFIX}ema,decay={DECAY}")
        decay = _fraction(text, value)
    return OwnAverage(decay)


def _fraction(text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise RunError(f"teacher {text}: decay {value!r} is not a number from 0 to below 1")
    return number
