"""What a method asks of both sides, and why a pair cannot give it: said before the first image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from detdistill.detectors.contract import (
    CAPABILITIES,
    FEATURES,
    Detector,
    DetectorSpec,
    HasBackboneFeatures,
    HasQueries,
    HasTowers,
    Teacher,
)
from detdistill.errors import DetdistillError, name_list
from detdistill.structures import Look


class PairError(DetdistillError):
    """This teacher, this student and this method cannot work together; the message says why and what would."""

    def __init__(self, reason: str, others: Sequence[str] = ()) -> None:
        """Say why.

        Args:
            reason: in one line.
            others: slugs of methods that could serve the pair.
        """
        super().__init__(reason + (f"; methods that could serve this pair: {', '.join(others)}" if others else ""))
        self.reason = reason


@dataclass(frozen=True)
class Needs:
    """What a method asks of both sides, for given hyper-parameters."""

    teacher: Look | None = FEATURES
    """What ``teach`` looks at, beside the features; None: the method has no teacher."""
    student: Look = FEATURES
    """What ``learn`` looks at in the student's pass, beside features and prediction."""
    teacher_families: tuple[str, ...] = ()
    """Families that can teach; empty: any."""
    student_families: tuple[str, ...] = ()
    """Families that can learn; empty: any."""
    student_capabilities: tuple[type, ...] = ()
    """Protocols of parts of the student that ``learn`` calls itself."""
    teacher_capabilities: tuple[type, ...] = ()
    """Protocols of parts of the teacher that ``learn`` calls itself; a cache does not hold them."""
    live_teacher: str = ""
    """Why ``learn`` needs the teacher itself, so that a cache of what was taught is not enough; empty: it is enough."""
    same_classes: bool = False
    """Class scores are compared: the teacher must know every class of the student by name."""
    outputs: Literal["any", "same", "sigmoid"] = "any"
    """How classes are scored: anyhow, by the same function on both sides, or by a sigmoid for each class on both sides."""
    same_cells: bool = False
    """Dense predictions are compared one by one: each level of the student has one of the teacher's with the same stride and
    as many anchors of a cell."""

    def why_live(self) -> str:
        """Why a cache is not enough; empty: it is."""
        if self.live_teacher or not self.teacher_capabilities:
            return self.live_teacher
        names = ", ".join(CAPABILITIES[capability] for capability in self.teacher_capabilities)
        return f"it runs the teacher's own {names} when it learns, which no cache holds"


def check_pair(slug: str, needs: Needs, teacher: Teacher | None, student: Detector) -> None:
    """Say what is missing before the first image.

    Raises:
        PairError: naming the side, its detector, what is missing, and the methods that need nothing that this pair lacks.
    """
    reason = why_not(needs, teacher, student)
    if not reason:
        return
    from detdistill.methods.shared.compose import serving_methods  # late: it looks into all files of methods

    raise PairError(f"{slug}: {reason}", [other for other in serving_methods(teacher, student) if other != slug])


def why_not(needs: Needs, teacher: Teacher | None, student: Detector) -> str:
    """What a pair lacks, in words; empty: nothing."""
    return next(_reasons(needs, teacher, student), "")


def _reasons(needs: Needs, teacher: Teacher | None, student: Detector) -> Iterator[str]:
    if needs.teacher is not None and teacher is None:
        yield "it needs a teacher; give one with --teacher"
    learning = (*needs.student_capabilities, *_capabilities(needs.student))
    yield from _lacking("student", student, learning, needs.student_families)
    if needs.teacher is None or teacher is None:
        return
    if not teacher.present and (why := needs.why_live()):
        yield f"{why}; give the teacher too (--teacher {teacher.spec.name})"
    teaching = (*needs.teacher_capabilities, *_capabilities(needs.teacher)) if teacher.present else ()
    yield from _lacking("teacher", teacher.detector, teaching, needs.teacher_families)
    mine, theirs = student.spec, teacher.spec
    yield from _class_reasons(needs, mine, theirs)
    cells = set(zip(theirs.strides, theirs.anchors, strict=False))
    if needs.same_cells and not (mine.anchors and set(zip(mine.strides, mine.anchors, strict=False)) <= cells):
        yield (
            f"it compares predictions cell by cell, but the student {mine.name} has strides {mine.strides} with {mine.anchors} "
            f"anchors of a cell, the teacher {theirs.name} {theirs.strides} with {theirs.anchors}; take two detectors of one "
            f"kind and equal levels="
        )


def _class_reasons(needs: Needs, mine: DetectorSpec, theirs: DetectorSpec) -> Iterator[str]:
    unknown = [name for name in mine.classes if name not in theirs.classes]
    if needs.same_classes and unknown:
        yield (
            f"it compares class scores, but the teacher does not know {name_list(unknown)}; its classes: "
            f"{name_list(theirs.classes)}"
        )
    kinds = {False: "sigmoid", True: "softmax"}
    if needs.outputs == "same" and mine.softmax != theirs.softmax:
        yield (
            f"it compares class scores, but the teacher {theirs.name} has {kinds[theirs.softmax]} and the student {mine.name} "
            f"{kinds[mine.softmax]} classes"
        )
    for side, spec in (("teacher", theirs), ("student", mine)):
        if needs.outputs == "sigmoid" and spec.softmax:
            yield (
                f"the {side} {spec.name} has softmax classes with a background, but the method compares sigmoid scores of single "
                f"classes"
            )


def _lacking(side: str, detector: Detector, capabilities: tuple[type, ...], families: tuple[str, ...]) -> Iterator[str]:
    if families and detector.spec.family not in families:
        yield (
            f"the {side} {detector.spec.name} predicts {detector.spec.family}; it needs a {side} that predicts "
            f"{' or '.join(families)}"
        )
    missing = [CAPABILITIES[kind] for kind in dict.fromkeys(capabilities) if not isinstance(detector, kind)]
    if missing:
        yield f"the {side} {detector.spec.name} lacks {', '.join(missing)}"


def _capabilities(look: Look) -> Iterator[type]:
    """Protocols that a detector must have to show what is looked at."""
    if look.backbone:
        yield HasBackboneFeatures
    if look.towers:
        yield HasTowers
    if look.attention:
        yield HasQueries
