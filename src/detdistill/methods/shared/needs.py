"""Requirements of a method on teacher and student (``Needs``), and their check before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

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

ANCHOR_RTOL, ANCHOR_ATOL = 1e-3, 0.01
"""Coordinates of equal anchors may differ by this fraction, or by this number of pixels."""


class PairError(DetdistillError):
    """A method cannot be used with this teacher and student; the message gives the reason and methods that can be used."""

    def __init__(self, reason: str, others: Callable[[], Sequence[str]] | None = None) -> None:
        """Compose the message.

        Args:
            reason: the reason, in one line.
            others: finds slugs of methods that can be used with the pair; called when the message is read, for it takes a second.
        """
        super().__init__(reason)
        self.reason, self.others = reason, others

    def __str__(self) -> str:
        """The reason, and the methods that can be used."""
        found = () if self.others is None else self.others()
        return self.reason + (f"; methods that could serve this pair: {', '.join(found)}" if found else "")

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the message is complete."""
        return type(self), (str(self),)


@dataclass(frozen=True)
class Needs:
    """Requirements of a method on teacher and student, for given hyper-parameters."""

    teacher: Look | None = FEATURES
    """Parts of the teacher's pass that ``teach`` requests besides the features. None: the method has no teacher."""
    student: Look = FEATURES
    """Parts of the student's pass that ``learn`` requests besides features and prediction."""
    teacher_families: tuple[str, ...] = ()
    """Families that the teacher may belong to; empty: any."""
    student_families: tuple[str, ...] = ()
    """Families that the student may belong to; empty: any."""
    student_capabilities: tuple[type, ...] = ()
    """Protocols that the student must have because ``learn`` calls its parts."""
    teacher_capabilities: tuple[type, ...] = ()
    """Protocols that the teacher must have because ``learn`` calls its parts; a cache cannot replace them."""
    teaching_capabilities: tuple[type, ...] = ()
    """Protocols that the teacher must have because ``teach`` calls its parts; a cache can replace them."""
    advice: Mapping[type, str] = field(default_factory=dict)
    """What to set if a side lacks a capability, by its protocol: ``{HasMapsBeforeEncoder: "set tap=encoder"}``."""
    live_teacher: str = ""
    """Reason why ``learn`` needs the teacher itself and a cache is not enough; empty: a cache is enough."""
    same_classes: bool = False
    """The teacher must have every class of the student, by name, because class scores are compared."""
    outputs: Literal["any", "same", "sigmoid"] = "any"
    """Required class scores: ``any``; ``same``: sigmoid or softmax, but the same on both sides; ``sigmoid``: on both sides."""
    same_cells: bool = False
    """For each level of the student the teacher must have a level with the same stride and the same number of anchors of a cell,
    because dense predictions are compared one by one."""
    same_anchors: bool | tuple[int, ...] = False
    """Besides ``same_cells``: where cells have several anchors, these must have equal sides in teacher and student, because each
    prediction is compared with that of the same anchor. True: on all levels; else on these levels of the student."""
    box_distributions: bool = False
    """Both sides must predict box sides as distributions (``spec.box_bins`` above 0), because these are compared."""
    one_size: str = ""
    """Reason why teacher and student must see images of one size, beside those that the other fields give; empty: none."""
    assignment: bool = False
    """``learn`` reads the student's own assignment. A step then assigns once, for ``learn`` (``seen.assignment``) and for the
    student's own loss."""

    def why_live(self) -> str:
        """Reason why a cache is not enough; empty if it is enough."""
        if self.live_teacher or not self.teacher_capabilities:
            return self.live_teacher
        names = ", ".join(CAPABILITIES[capability] for capability in self.teacher_capabilities)
        return f"it runs the teacher's own {names} when it learns, which no cache holds"

    def why_one_size(self) -> str:
        """Reason why teacher and student must see images of one size; empty if the teacher's view can be converted."""
        if self.teacher is None:
            return ""
        if self.teacher.attention:
            return "it compares the teacher's attention to cells"
        if self.why_live():
            return "it runs the teacher on the student's images when it learns"
        if self.box_distributions:
            return "it compares distributions over distances in pixels"
        return self.one_size


def check_pair(slug: str, needs: Needs, teacher: Teacher | None, student: Detector) -> None:
    """Check that teacher and student meet the requirements of a method.

    Raises:
        PairError: they do not; the message names the detector, the missing part, and the methods that can be used with the pair.
    """
    reason = why_not(needs, teacher, student)
    if not reason:
        return
    raise PairError(f"{slug}: {reason}", partial(others_serving, slug, teacher, student))


def others_serving(slug: str, teacher: Teacher | None, student: Detector) -> list[str]:
    """Slugs of the other methods that can be used with a pair."""
    from detdistill.methods.shared.compose import serving_methods  # late: it looks into all files of methods

    return [other for other in serving_methods(teacher, student) if other != slug]


def why_not(needs: Needs, teacher: Teacher | None, student: Detector) -> str:
    """The first requirement that a pair does not meet, in words; empty if it meets all."""
    return next(_reasons(needs, teacher, student), "")


def _reasons(needs: Needs, teacher: Teacher | None, student: Detector) -> Iterator[str]:
    if needs.teacher is not None and teacher is None:
        yield "it needs a teacher; give one with --teacher"
    learning = (*needs.student_capabilities, *_capabilities(needs.student))
    yield from _lacking("student", student, learning, needs.student_families, needs.advice)
    yield from _too_deep("student", student, needs.student)
    if needs.teacher is None or teacher is None:
        return
    if not teacher.present and (why := needs.why_live()):
        yield f"{why}; give the teacher too (--teacher {teacher.spec.name})"
    wanted = (*needs.teacher_capabilities, *needs.teaching_capabilities, *_capabilities(needs.teacher))
    yield from _lacking("teacher", teacher.detector, wanted if teacher.present else (), needs.teacher_families, needs.advice)
    if teacher.present:
        yield from _too_deep("teacher", teacher.detector, needs.teacher)
    mine, theirs = student.spec, teacher.spec
    if theirs.family == "features" and (needs.teacher.prediction or needs.same_classes):
        yield f"it learns from predictions, but the teacher {theirs.name} outputs feature maps only; take a method on maps"
    yield from _class_reasons(needs, mine, theirs)
    for side, spec in (("student", mine), ("teacher", theirs)):
        if needs.box_distributions and not spec.box_bins:
            yield (
                f"it compares distributions of box sides, but the {side} {spec.name} predicts each side as one number; take "
                f"detectors such as gfl, d_fine or deimv2"
            )
    cells = set(zip(theirs.strides, theirs.anchors, strict=False))
    if needs.same_cells and not (mine.anchors and set(zip(mine.strides, mine.anchors, strict=False)) <= cells):
        yield (
            f"it compares predictions cell by cell, but the student {mine.name} has strides {mine.strides} with {mine.anchors} "
            f"anchors of a cell, the teacher {theirs.name} {theirs.strides} with {theirs.anchors}; take two detectors of one "
            f"kind and equal levels="
        )
    elif needs.same_anchors:
        levels = range(len(mine.strides)) if needs.same_anchors is True else needs.same_anchors or ()
        yield from _anchor_reasons(mine, theirs, levels)


def _anchor_reasons(mine: DetectorSpec, theirs: DetectorSpec, levels: Iterable[int]) -> Iterator[str]:
    """The first anchor that differs. The only anchor of a cell never does: its partner is the right one whatever its sides."""
    if max(mine.anchors, default=1) == 1 or mine.coding is None or theirs.coding is None:
        return
    own_levels = dict(zip(mine.strides, mine.coding.anchors_wh, strict=False))
    other_levels = dict(zip(theirs.strides, theirs.coding.anchors_wh, strict=False))
    for stride in [mine.strides[level] for level in levels if -len(mine.strides) <= level < len(mine.strides)]:
        pairs = zip(own_levels.get(stride, ()), other_levels.get(stride, ()), strict=False)
        for number, (own, other) in enumerate(pairs):
            # Half sides are compared, as corners of an anchor around (0, 0).
            if any(abs(a - b) / 2 > ANCHOR_ATOL + ANCHOR_RTOL * b / 2 for a, b in zip(own, other, strict=True)):
                yield (
                    f"it compares predictions of equal anchors, but anchor {number} of stride {stride} has "
                    f"{own[0]:g}x{own[1]:g} pixels in the student {mine.name} and {other[0]:g}x{other[1]:g} in the teacher "
                    f"{theirs.name}; build both with the same anchors"
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


def _lacking(
    side: str, detector: Detector, capabilities: tuple[type, ...], families: tuple[str, ...], advice: Mapping[type, str]
) -> Iterator[str]:
    if families and detector.spec.family not in families:
        yield (
            f"the {side} {detector.spec.name} predicts {detector.spec.family}; it needs a {side} that predicts "
            f"{' or '.join(families)}"
        )
    missing = [kind for kind in dict.fromkeys(capabilities) if not isinstance(detector, kind)]
    if missing:
        said = [", ".join(CAPABILITIES[kind] for kind in missing), *(advice[kind] for kind in missing if kind in advice)]
        yield f"the {side} {detector.spec.name} lacks {'; '.join(said)}"


def _too_deep(side: str, detector: Detector, look: Look) -> Iterator[str]:
    if look.towers and isinstance(detector, HasTowers) and max(look.towers) > detector.tower_depth:
        yield (
            f"it looks at the towers of the {side} {detector.spec.name} after {max(look.towers)} blocks, but they have "
            f"{detector.tower_depth}; choose a smaller depth, or build the detector with more blocks"
        )


def _capabilities(look: Look) -> Iterator[type]:
    """Protocols that a detector must have to return the parts of ``look``."""
    if look.backbone:
        yield HasBackboneFeatures
    if look.towers:
        yield HasTowers
    if look.attention:
        yield HasQueries
