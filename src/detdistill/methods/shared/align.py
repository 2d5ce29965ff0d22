"""Align the pyramids of student and teacher: pairs of levels, channels and map sizes.

All methods use this alignment, unless a method's paper defines its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.contract import DetectorSpec
from detdistill.functional.dense_maps import Partners
from detdistill.methods.shared.needs import ANCHOR_ATOL, ANCHOR_RTOL, PairError
from detdistill.structures import Dense, Features


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

    Every student level is paired with the teacher level of the nearest stride, if the strides differ by at most a factor of 1.5
    (SSD's strides are not powers of two). Levels without a partner are left out.

    Args:
        slug: the method's slug, for messages.
        student: gives ``channels`` and ``strides`` of the student.
        teacher: gives ``channels`` and ``strides`` of the teacher.
        levels: student levels (indices) to keep; negative indices count from the end. None: all that have a partner.

    Raises:
        PairError: no level has a partner, or ``levels`` contains a level that does not exist or has no partner.
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


def check_same_anchors(slug: str, student: Dense, teacher: Dense, partners: Partners) -> None:
    """Check that each prediction and its partner belong to the same anchor, where cells have several anchors.

    Numbers and sides of the anchors are compared before the first image (``Needs.same_anchors``). Only a prediction shows their
    places, which depend on the size of the images, and the sides where a description does not state them: a cache of an earlier
    version, or a detector from elsewhere. With one anchor for each cell nothing is checked, because the partner is then the
    right one whatever the anchor's sides.

    Args:
        slug: the method's slug, for the message.
        student: its prediction.
        teacher: the teacher's prediction of the same images, with ``priors_xyxy``.
        partners: pairs of both predictions.

    Raises:
        PairError: an anchor differs from its partner by more than a hundredth of a pixel (or 0.1 % of its size).
    """
    if not bool((student.anchors > 0).any()):
        return
    mine, theirs = student.priors_xyxy.detach(), partners.take(teacher.priors_xyxy)
    apart = partners.mask[..., None] & ~mine.isclose(theirs, rtol=ANCHOR_RTOL, atol=ANCHOR_ATOL)
    if bool(apart.any()):
        image, index, _ = (int(number) for number in torch.nonzero(apart)[0])
        sides = [(boxes[image, index, 2:] - boxes[image, index, :2]).tolist() for boxes in (mine, theirs)]
        shown = [f"{width:g}x{height:g}" for width, height in sides]
        raise PairError(
            f"{slug}: it compares predictions of equal anchors, but anchor {int(student.anchors[index])} of level "
            f"{int(student.levels[index])} has {shown[0]} pixels in the student and {shown[1]} in the teacher; build both with "
            f"the same anchors"
        )


def resize_like(student: Tensor, teacher: Tensor) -> Tensor:
    """Resize the student's map [B, C, h, w] to the teacher's height and width (bilinear, corners not aligned)."""
    if student.shape[-2:] == teacher.shape[-2:]:
        return student
    return F.interpolate(student, size=teacher.shape[-2:], mode="bilinear", align_corners=False)


class LevelAdapters(nn.ModuleList):
    """Convolutions with bias that map the student's channels to the teacher's, one for each pair of levels.

    Pairs of equal channels get the identity, unless ``always``.
    """

    def __init__(
        self,
        pairs: Sequence[LevelPair],
        always: bool = False,
        *,
        kernel: int = 1,
        shared: bool = False,
        activation: Callable[[], nn.Module] | None = None,
        initialize: Callable[[nn.Conv2d], None] | None = None,
    ) -> None:
        """Build the adapters.

        Args:
            pairs: the pairs of levels.
            always: use a convolution for pairs of equal channels, too.
            kernel: side of the convolution, odd; the map keeps its size.
            shared: pairs with the same student channels and the same teacher channels share one convolution.
            activation: makes a module that follows each convolution, e.g. ``nn.ReLU``; None: no activation.
            initialize: initialises a convolution's weights; None: PyTorch's default.
        """
        super().__init__()
        made: dict[tuple[int, int], nn.Module] = {}
        for pair in pairs:
            channels = pair.student_channels, pair.teacher_channels
            if channels[0] == channels[1] and not always:
                self.append(nn.Identity())
                continue
            if not shared or channels not in made:
                convolution = nn.Conv2d(*channels, kernel, padding=kernel // 2)
                if initialize is not None:
                    initialize(convolution)
                made[channels] = convolution if activation is None else nn.Sequential(convolution, activation())
            self.append(made[channels])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map each student map [B, Cs, h, w] to the channels of its partner, [B, Ct, h, w]."""
        return [adapter(level) for adapter, level in zip(self, maps, strict=True)]


class ConvolutionAdapters(nn.ModuleDict):
    """Three 3x3 convolutions with ReLUs between them, shared by all levels of equal width; maps keep width and size.

    The adapter of LabelEnc and LGD, whose pyramids have one width. Weights are initialised by PyTorch's default.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        """Build one adapter for each different width of a pyramid's levels; its key is the width."""
        super().__init__()
        for width in sorted(set(channels)):
            layers = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
            self[str(width)] = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Adapt each map [B, C_l, H_l, W_l]."""
        return [self[str(level.shape[1])](level) for level in maps]


@dataclass(frozen=True)
class PairedMaps:
    """Align two pyramids: paired levels, the student's maps in the teacher's channels and, with ``resize``, at its size."""

    pairs: Sequence[LevelPair]
    adapters: nn.Module
    """Maps the student's maps, in the order of ``pairs``, to the teacher's channels. The method registers it as its submodule;
    ``PairedMaps`` is not a module, so that the parameters have only one name."""
    resize: bool = False
    """Resize the student's maps to the teacher's height and width after the adapter (``resize_like``)."""

    def __call__(self, student: Features, teacher: Features) -> tuple[list[Tensor], list[Tensor]]:
        """Return the student's maps [B, C, h, w], with gradient, and the teacher's maps [B, C, H, W], level by level."""
        theirs = [teacher.maps[pair.teacher] for pair in self.pairs]
        mine: list[Tensor] = self.adapters([student.maps[pair.student] for pair in self.pairs])
        if self.resize:
            mine = [resize_like(level, fixed) for level, fixed in zip(mine, theirs, strict=True)]
        return mine, theirs
