"""Attention transfer: the student's maps should be strong where the teacher's maps are.

Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, Eq. 2 with the squared distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.detectors.contract import Detector, Teacher
from detdistill.functional.precision import full_precision
from detdistill.methods.shared.align import pair_levels, resize_like
from detdistill.methods.shared.contract import Method
from detdistill.structures import Batch, Clock, Losses, Observation, Taught
from detdistill.values import Weight


def attention_map(maps: Tensor) -> Tensor:
    """Mean over channels of the squared values of maps [B, C, H, W]: [B, H, W]."""
    return maps.square().mean(dim=1)


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], weight: float = 1.0) -> Tensor:
    """Squared distance of attention maps scaled to unit length (``2 - 2 cos``): mean over images, sum over levels.

    Args:
        student: L maps [B, h, w]; gradient flows. Maps of another size are resized to the teacher's.
        teacher: L maps [B, H, W], treated as constant.
        weight: factor of every level.

    Returns:
        [] the loss; each level is between 0 and ``2 * weight``.

    Example:
        >>> float(attention_loss([torch.tensor([[[1.0, 0.0]]])], [torch.tensor([[[0.0, 5.0]]])]))
        2.0
    """
    levels = []
    for mine, theirs in zip(student, teacher, strict=True):
        resized = resize_like(mine[:, None], theirs[:, None])
        gap = F.normalize(resized.flatten(1), dim=1) - F.normalize(theirs.detach().flatten(1), dim=1)
        levels.append(gap.square().sum(dim=1).mean())
    return weight * torch.stack(levels).sum()


@dataclass(frozen=True)
class AttentionTaught(Taught):
    """The teacher's attention maps. They have one channel instead of hundreds, so a cache of them is small."""

    maps: tuple[Tensor, ...]
    """One map [B, H, W] for each level of the teacher."""


class AttentionTransfer(Method[AttentionTaught]):
    """Attention transfer between the feature maps of two necks; levels are paired by stride."""

    slug = "attention"
    title = "Paying More Attention to Attention (ICLR 2017)"
    bibtex = "@inproceedings{zagoruyko2017attention, ...}"
    teach_settings = ()  # no hyper-parameter changes what `teach` returns: one cache serves all values

    def __init__(self, teacher: Teacher, student: Detector, *, weight: Weight = 1.0, levels: Sequence[int] | None = None) -> None:
        """Pair the levels.

        Args:
            teacher: any detector.
            student: any detector.
            weight: factor of every level.
            levels: indices of the student levels to use; None: all that have a partner.
        """
        super().__init__(teacher, student)  # checks the pair against `needs`; hyper-parameters are checked already
        self.weight = weight
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)

    @torch.no_grad()
    def teach(self, batch: Batch) -> AttentionTaught:
        """Compute the attention maps of all levels, because the levels that are compared depend on the student."""
        features = self.teacher.observe(batch).features
        with full_precision(batch.images.device):
            return AttentionTaught(tuple(attention_map(level.float()) for level in features.maps))

    def learn(self, student: Detector, seen: Observation, taught: AttentionTaught, batch: Batch, clock: Clock) -> Losses:
        """Compute the term ``attention``."""
        with full_precision(batch.images.device):
            mine = [attention_map(seen.features.maps[pair.student]) for pair in self.pairs]
            theirs = [taught.maps[pair.teacher] for pair in self.pairs]
            return Losses({"attention": attention_loss(mine, theirs, self.weight)})
