"""Copy weights into the student wherever the tensors have the same shape: the teacher's neck and head, or all of a detector's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from detdistill.detectors.contract import Detector


@runtime_checkable
class HasClassRows(Protocol):
    """A detector that maps the rows of its output tensors to classes."""

    def class_rows(self, name: str) -> Tensor | None:
        """Find the rows (indices along the first dimension) of the state-dict tensor ``name`` that belong to each class.

        Returns:
            [K, m] int64 row indices; all other rows belong to the background. None: the tensor does not depend on classes.
        """
        ...


@dataclass(frozen=True)
class Inherited:
    """Result of ``inherit_head`` and ``start_from``."""

    copied: tuple[str, ...]
    """State-dict names of the student's tensors that hold the teacher's values, at least for the shared classes."""
    skipped: tuple[tuple[str, str], ...]
    """State-dict names of neck and head that were not changed, each with the reason."""

    def __str__(self) -> str:
        """Summarise in one line."""
        if not self.copied and len(self.skipped) == 1:
            return f"nothing inherited: {self.skipped[0][1]}"
        skipped = f"; {len(self.skipped)} skipped, the first is {': '.join(self.skipped[0])}" if self.skipped else ""
        return f"{len(self.copied)} tensors of neck and head inherited from the teacher{skipped}"


@torch.no_grad()
def inherit_head(student: Detector, teacher: Detector) -> Inherited:
    """Copy the teacher's neck and head into the student, tensor by tensor, where name and shape agree.

    Values are copied, not shared. If the class lists differ, the outputs are copied class by class, matched by name;
    the student's other classes keep their values.

    Args:
        student: detector; its neck and head (``parts``) are changed in place.
        teacher: detector of the same Python class, on any backbone. With another class, nothing is copied.

    Returns:
        Names of the copied tensors, and the skipped ones with reasons.
    """
    if type(student) is not type(teacher):
        reason = f"the student {student.spec.name} and the teacher {teacher.spec.name} are different kinds of detector"
        return Inherited((), (("neck and head", reason),))
    same_classes = student.spec.classes == teacher.spec.classes
    if not (same_classes or (isinstance(student, HasClassRows) and isinstance(teacher, HasClassRows))):
        reason = f"class lists differ and {student.spec.name} does not tell which outputs belong to which class"
        return Inherited((), (("neck and head", reason),))
    parts = student.parts()
    return _copy_named(parts.names(student, (*parts.neck, *parts.head)), student, teacher)


@torch.no_grad()
def start_from(student: Detector, source: Detector) -> Inherited:
    """Copy all weights of another detector into the student, tensor by tensor, where name and shape agree.

    If the class lists differ, the outputs are copied class by class, matched by name; other classes keep their values.

    Args:
        student: detector; changed in place.
        source: detector of the same architecture. Of another one, the parts with the same names are copied, e.g. the backbone.

    Returns:
        Names of the copied tensors, and the skipped ones with reasons.
    """
    return _copy_named(student.state_dict(), student, source)


def _copy_named(names: Iterable[str], student: Detector, source: Detector) -> Inherited:
    """Copy the tensors of these state-dict names where possible."""
    theirs, wanted = source.state_dict(), set(names)
    copied: list[str] = []
    skipped: list[tuple[str, str]] = []
    for name, mine in student.state_dict().items():
        if name not in wanted:
            continue
        reason = _copy(name, mine, theirs[name], student, source) if name in theirs else "the other detector has no such tensor"
        if reason:
            skipped.append((name, reason))
        else:
            copied.append(name)
    return Inherited(tuple(copied), tuple(skipped))


def _copy(name: str, mine: Tensor, theirs: Tensor, student: Detector, teacher: Detector) -> str:
    """Copy one tensor if possible; return the reason if not, else an empty string."""
    # Pretrained models may have more outputs than classes (COCO's 91), so equal classes do not mean equal rows.
    if isinstance(student, HasClassRows) and isinstance(teacher, HasClassRows):
        my_rows, their_rows = student.class_rows(name), teacher.class_rows(name)
        if my_rows is not None and their_rows is not None:
            return _copy_classes(mine, theirs, my_rows, their_rows, student.spec.classes, teacher.spec.classes)
    if mine.shape != theirs.shape:
        return f"its shape is {list(mine.shape)}, the other's {list(theirs.shape)}"
    mine.copy_(theirs)
    return ""


def _copy_classes(
    mine: Tensor, theirs: Tensor, my_rows: Tensor, their_rows: Tensor, classes: tuple[str, ...], known: tuple[str, ...]
) -> str:
    """Copy the rows of the shared classes, and those of the background; return the reason if not possible, else ''."""
    if mine.shape[1:] != theirs.shape[1:] or my_rows.shape[1] != their_rows.shape[1]:
        return f"its shape is {list(mine.shape)}, the other's {list(theirs.shape)}"
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
