"""Assignments of predictions to ground truth, the positives they select, and final detections.

Shape letters: B images, L decoder layers, P dense predictions of an image, R regions of the batch, N queries of an image,
M positives of the batch, K classes, D detections of an image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from detdistill.structures.base import Movable

if TYPE_CHECKING:
    from detdistill.structures.predictions import Origin


NEGATIVE = -1


IGNORED = -2


@dataclass(frozen=True)
class Assignment(Movable):
    """Assignment of predictions to ground-truth boxes. It may come from the detector itself, a teacher or a cache."""

    matched: Tensor
    """int64 index of the ground-truth box within its image's ``Target`` (crowd boxes counted); -1 negative, -2 ignored.
    [B, P] for ``Dense``, [R] for ``Regions``, [L, B, N] for ``Queries``."""
    weights: Tensor | None = None
    """Loss weights of the shape of ``matched``; None: all 1."""
    normalizer: Tensor | None = None
    """[] divisor of the losses; None: the detector's own rule."""

    def as_ignored(self, where: Tensor) -> Assignment:
        """The same assignment with the predictions of a bool mask (shape of ``matched``) ignored by every loss."""
        return replace(self, matched=self.matched.masked_fill(where, IGNORED))


@dataclass(frozen=True)
class Positives(Movable):
    """Predictions that an assignment matched to a ground-truth box, flat over the batch (and over decoder layers)."""

    image: Tensor
    """[M] index of the image."""
    ground_truth: Tensor
    """[M] index of the ground-truth box within its image."""
    index: Tensor
    """[M] index of the prediction along P, R or N."""
    layer: Tensor
    """[M] decoder layer; 0 for other families."""
    labels: Tensor
    """[M] class of the ground-truth box."""
    targets_xyxy: Tensor
    """[M, 4] ground-truth box in pixels."""
    logits: Tensor
    """[M, K] sigmoid logits, or [M, K+1] softmax logits with the background last."""
    boxes_xyxy: Tensor
    """[M, 4] predicted box in pixels, differentiable."""
    softmax: bool = False

    def __len__(self) -> int:
        return self.image.shape[0]


@dataclass(frozen=True)
class Detections(Movable):
    """Final boxes of one image, best first."""

    boxes_xyxy: Tensor
    """[D, 4] pixels of the batch's image tensor."""
    scores: Tensor
    """[D] scores, 0..1."""
    labels: Tensor
    """[D] class labels, 0 .. K-1."""
    origin: Origin | None = None

    def __len__(self) -> int:
        return self.boxes_xyxy.shape[0]
