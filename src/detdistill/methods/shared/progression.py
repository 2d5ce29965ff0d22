"""Methods one after the other, ``pkd@small>pkd@large``: a sequence of teachers for one student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from detdistill.detectors.contract import Detector, Teacher
from detdistill.methods.shared.contract import Method, Stage, looks_of
from detdistill.methods.shared.needs import Needs
from detdistill.structures import Look


class Progression(Method[Any]):
    """Several methods, usually with teachers of growing size, each for an equal part of the run.

    A sequence of teachers from weak to strong may teach a small student more than the strongest alone: Cao et al., "Learning
    Lightweight Object Detectors via Multi-Teacher Progressive Distillation" (ICML 2023), who train the student for a whole
    schedule under each teacher. Here the turns share the run's budget, so that a baseline of the same budget compares; each turn
    has an optimizer and a learning-rate schedule of its own, as there.
    """

    slug = "progression"
    title = "methods one after the other"
    bibtex = ""

    def __init__(self, turns: Sequence[Method[Any]], student: Detector) -> None:
        """Join methods.

        Args:
            turns: the methods, in their order; each may be a composition.
            student: the detector that is trained.
        """
        super().__init__(None, student)
        self.turns = nn.ModuleList(turns)
        self.trains_alone = tuple(dict.fromkeys(name for turn in turns for name in turn.trains_alone))

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """No requirements: each method has already checked its own."""
        return Needs(teacher=None)

    @property
    def methods(self) -> tuple[Method[Any], ...]:
        """The methods, in their order."""
        return tuple(self.turns)  # type: ignore[arg-type]

    @property
    def members(self) -> tuple[str, ...]:
        """Slugs of all methods, each once."""
        return tuple(dict.fromkeys(name for turn in self.methods for name in turn.members))

    def stages(self, student: Detector) -> tuple[Stage, ...]:
        """All stages of each method; their last stages share the run equally, and the last of all is ``distill``."""
        found: list[Stage] = []
        for number, turn in enumerate(self.methods, start=1):
            *earlier, last = turn.stages(student)
            mark = "" if number == len(self.turns) else f"-{number}"
            found += [replace(stage, name=f"{stage.name}{mark}") for stage in earlier]
            found.append(replace(last, name=f"{last.name}{mark}", share=last.share / len(self.turns)))
        return tuple(found)

    def teachers(self) -> tuple[Teacher, ...]:
        """The teachers of all methods, without duplicates."""
        return tuple(dict.fromkeys(teacher for turn in self.methods for teacher in turn.teachers()))

    def looks(self) -> dict[Teacher, Look]:
        """The parts of each teacher's pass that the methods request together."""
        return looks_of([method for turn in self.methods for method in getattr(turn, "methods", (turn,))])
