"""Bring two pyramids together: which levels are compared, at which size, in how many channels.

One shared answer for all methods; a method has its own only where its paper does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.contract import DetectorSpec
from detdistill.methods.shared.contract import PairError


@dataclass(frozen=True)
class LevelPair:
    """One student level and the teacher level it is compared with."""

    student: int
    teacher: int
    student_channels: int
    teacher_channels: int


def pair_levels(
    slug: str, student: DetectorSpec, teacher: DetectorSpec, levels: Sequence[int] | None = None
) -> tuple[LevelPair, ...]:
    """Pair levels by stride, finest first.

    Every student level is compared with the teacher level of the nearest stride, if that is within a factor of 1.5
    (SSD's strides are not powers of two); other levels have no partner and are left out.

    Args:
        slug: the method, for messages.
        student: its ``channels`` and ``strides``.
        teacher: likewise.
        levels: student levels (indices) to keep; None keeps all that have a partner. Negative indices count from the end.

    Raises:
        PairError: no level has a partner, or ``levels`` names one that does not exist or has none.
    """
    pairs: dict[int, LevelPair] = {}
    taken: set[int] = set()
    for mine, stride in enumerate(student.strides):
        ratios = [abs(math.log(other / stride)) for other in teacher.strides]
        theirs = min(range(len(ratios)), key=ratios.__getitem__)
        if ratios[theirs] <= math.log(1.5) and theirs not in taken:
            taken.add(theirs)
            pairs[mine] = LevelPair(mine, theirs, student.channels[mine], teacher.channels[theirs])
    if not pairs:
        raise PairError(
            f"{slug}: no common level: student {student.name} has strides {student.strides}, "
            f"teacher {teacher.name} has {teacher.strides}; choose levels that meet, e.g. by levels= in the model's name"
        )
    if levels is None:
        return tuple(pairs.values())
    chosen = [level + len(student.strides) if level < 0 else level for level in levels]
    for level in chosen:
        if level not in pairs:
            raise PairError(
                f"{slug}: levels={list(levels)}: student level {level} has no partner; "
                f"levels with one: {sorted(pairs)} (strides {[student.strides[i] for i in sorted(pairs)]})"
            )
    return tuple(pairs[level] for level in chosen)


def resize_like(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's map [B, C, h, w] at the teacher's height and width (bilinear, corners not aligned)."""
    if student.shape[-2:] == teacher.shape[-2:]:
        return student
    return F.interpolate(student, size=teacher.shape[-2:], mode="bilinear", align_corners=False)


class ChannelAdapters(nn.ModuleList):
    """One 1x1 convolution for each pair of levels whose channels differ (with bias, PyTorch's initialisation)."""

    def __init__(self, pairs: Sequence[LevelPair], always: bool = False) -> None:
        """Build them; ``always`` adapts equal channels too."""
        super().__init__(
            nn.Conv2d(pair.student_channels, pair.teacher_channels, 1)
            if always or pair.student_channels != pair.teacher_channels
            else nn.Identity()
            for pair in pairs
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Each student map [B, Cs, h, w] with the channels of its partner, [B, Ct, h, w]."""
        return [adapter(level) for adapter, level in zip(self, maps, strict=True)]


def float32(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps in at least float32: distillation losses are never computed in half precision."""
    return [level.float() if level.dtype.itemsize < 4 else level for level in maps]
