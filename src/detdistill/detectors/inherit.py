"""Head inheritance: the student starts with the teacher's neck and head, wherever their tensors have the same shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from detdistill.detectors.contract import Detector


@runtime_checkable
class HasClassRows(Protocol):
    """Knows which rows of its tensors belong to which class."""

    def class_rows(self, name: str) -> Tensor | None:
        """Rows of the state-dict tensor ``name`` (indices along its first dimension) that belong to each class.

        Returns:
            [K, m] int64; the rows not named in it belong to the background. None: the tensor does not depend on classes.
        """
        ...


@dataclass(frozen=True)
class Inherited:
    """What a student took over."""

    copied: tuple[str, ...]
    """State-dict names of the student's tensors that now hold the teacher's values (of the shared classes, at least)."""
    skipped: tuple[tuple[str, str], ...]
    """Names of neck and head that were left as they were, and why."""

    def __str__(self) -> str:
        """One line."""
        if not self.copied and len(self.skipped) == 1:
            return f"nothing inherited: {self.skipped[0][1]}"
        skipped = f"; {len(self.skipped)} skipped, the first is {': '.join(self.skipped[0])}" if self.skipped else ""
        return f"{len(self.copied)} tensors of neck and head inherited from the teacher{skipped}"


@torch.no_grad()
def inherit_head(student: Detector, teacher: Detector) -> Inherited:
    """Copy the teacher's neck and head into the student, tensor by tensor, where name and shape agree.

    Values are copied, not shared. With different class lists the outputs are copied class by class, matched by name;
    the student's other classes keep their values.

    Args:
        student: changed in place, in its neck and head (``parts``).
        teacher: a detector of the same kind, on any backbone.
    """
    if type(student) is not type(teacher):
        reason = f"the student {student.spec.name} and the teacher {teacher.spec.name} are different kinds of detector"
        return Inherited((), (("neck and head", reason),))
    same_classes = student.spec.classes == teacher.spec.classes
    if not (same_classes or (isinstance(student, HasClassRows) and isinstance(teacher, HasClassRows))):
        reason = f"class lists differ and {student.spec.name} does not tell which outputs belong to which class"
        return Inherited((), (("neck and head", reason),))
    theirs = teacher.state_dict()
    parts = student.parts()
    inherited = set(parts.names(student, (*parts.neck, *parts.head)))
    copied: list[str] = []
    skipped: list[tuple[str, str]] = []
    for name, mine in student.state_dict().items():
        if name not in inherited:
            continue
        reason = _copy(name, mine, theirs[name], student, teacher) if name in theirs else "the teacher has no such tensor"
        if reason:
            skipped.append((name, reason))
        else:
            copied.append(name)
    return Inherited(tuple(copied), tuple(skipped))


def _copy(name: str, mine: Tensor, theirs: Tensor, student: Detector, teacher: Detector) -> str:
    """Copy one tensor; the reason when that cannot be, else nothing."""
    # Pretrained models may have more outputs than classes (COCO's 91), so equal classes do not mean equal rows.
    if isinstance(student, HasClassRows) and isinstance(teacher, HasClassRows):
        my_rows, their_rows = student.class_rows(name), teacher.class_rows(name)
        if my_rows is not None and their_rows is not None:
            return _copy_classes(mine, theirs, my_rows, their_rows, student.spec.classes, teacher.spec.classes)
    if mine.shape != theirs.shape:
        return f"its shape is {list(mine.shape)}, the teacher's {list(theirs.shape)}"
    mine.copy_(theirs)
    return ""


def _copy_classes(
    mine: Tensor, theirs: Tensor, my_rows: Tensor, their_rows: Tensor, classes: tuple[str, ...], known: tuple[str, ...]
) -> str:
    """Copy the rows of the classes that both know, and those of the background."""
    if mine.shape[1:] != theirs.shape[1:] or my_rows.shape[1] != their_rows.shape[1]:
        return f"its shape is {list(mine.shape)}, the teacher's {list(theirs.shape)}"
    shared = [name for name in classes if name in known]
    if not shared:
        return "the class lists have no name in common"
    to = my_rows[[classes.index(name) for name in shared]].flatten()
    source = their_rows[[known.index(name) for name in shared]].flatten()
    my_background, their_background = _others(my_rows, mine.shape[0]), _others(their_rows, theirs.shape[0])
    if len(my_background) == len(their_background):
        to, source = torch.cat([to, my_background]), torch.cat([source, their_background])
    mine[to.to(mine.device)] = theirs[source.to(theirs.device)].to(mine)
    return ""


def _others(rows: Tensor, count: int) -> Tensor:
    """The rows of ``range(count)`` that belong to no class, in order."""
    free = torch.ones(count, dtype=torch.bool)
    free[rows.flatten()] = False
    return torch.nonzero(free).flatten()
