"""A region head that is trained beside a one-stage head, on the same features: layers and R-CNN losses.

Methods that train it as an assistant or as a teacher use it, and so does the detector MimicDet.

Shape letters: B images, R regions of the whole batch, C channels, D width of the hidden layers, K classes, S side of a region.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.functional.cells import level_of_box
from detdistill.functional.counting import divisor_over_ranks
from detdistill.functional.regions import SampledRegions, encode_boxes, pool_boxes
from detdistill.structures import Batch, Features, Origin

POOLED_LEVELS = 4
"""Number of levels that regions are pooled from, finest first, as in Faster R-CNN."""
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""Weights of the box deltas (standard deviations 0.1, 0.1, 0.2, 0.2), as in Faster R-CNN."""


class RegionOutput(NamedTuple):
    """Output of ``RegionHead`` for R regions."""

    logits: Tensor
    """[R, K+1], background last."""
    deltas: Tensor
    """[R, K, 4], or class-agnostic [R, 1, 4]."""
    class_hidden: Tensor
    """[R, D] what the class outputs read, after its ReLU."""
    box_hidden: Tensor
    """[R, D] what the box outputs read, after its ReLU; with ``branches=1`` the same tensor."""


class RegionHead(nn.Module):
    """Region head: RoIAlign, hidden layers, K+1 class logits and box deltas.

    With one branch (Faster R-CNN) two fully connected layers serve class and box, and each class has its own deltas. With two
    branches (as in Double-Head R-CNN, Wu et al., CVPR 2020) the class has two fully connected layers, and the box four 3x3
    convolutions, one fully connected layer and class-agnostic deltas.
    """

    def __init__(self, channels: int, classes: int, width: int, branches: int = 1, size: int = 7) -> None:
        """Build the layers; the outputs are initialised from normal distributions as in Faster R-CNN.

        Args:
            channels: C of all pooled levels.
            classes: K.
            width: D.
            branches: 1 or 2.
            size: S.
        """
        super().__init__()
        self.size = size
        inner = channels * size**2
        self.classification = nn.Sequential(nn.Flatten(), nn.Linear(inner, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.box: nn.Sequential | None = None
        if branches == 2:
            blocks = [part for _ in range(4) for part in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())]
            self.box = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(inner, width), nn.ReLU())
        self.logits = nn.Linear(width, classes + 1)
        self.deltas = nn.Linear(width, 4 * classes if branches == 1 else 4)
        for layer, deviation in ((self.logits, 0.01), (self.deltas, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def predict(self, features: Features, boxes_xyxy: Sequence[Tensor], levels: Tensor | None = None) -> RegionOutput:
        """Pool the boxes, B tensors [R_b, 4] in pixels, and compute the outputs, image by image in the order of the boxes.

        Args:
            features: maps of C channels; gradient flows.
            boxes_xyxy: treated as constant.
            levels: [R] level of each box. None: mmdet's rule, by which boxes below 112 pixels are pooled from the finest level,
                below 224 from the next, and so on, up to the fourth.
        """
        if levels is None:
            features = features.take(range(min(POOLED_LEVELS, len(features.maps))))
            levels = level_of_box(torch.cat(list(boxes_xyxy)), len(features.maps))
        pooled = pool_boxes(features, boxes_xyxy, self.size, levels, sampling_ratio=2)
        class_hidden = self.classification(pooled)
        box_hidden = class_hidden if self.box is None else self.box(pooled)
        outputs = (self.logits(class_hidden), self.deltas(box_hidden).unflatten(1, (-1, 4)), class_hidden, box_hidden)
        return RegionOutput(*(output if output.dtype == torch.float64 else output.float() for output in outputs))


def region_loss(output: RegionOutput, regions: SampledRegions, batch: Batch) -> Tensor:
    """Cross-entropy over the K+1 classes plus L1 of the positives' deltas, summed and divided by the number of regions.

    The number is the mean over processes.

    Args:
        output: for the regions, in their order; gradient flows.
        regions: boxes and matches.
        batch: gives labels and boxes of the ground truth.

    Returns:
        [] the loss; 0, connected to the head, without regions.
    """
    boxes, matched = torch.cat(regions.boxes_xyxy), torch.cat(regions.matched)
    labels, wanted = torch.full_like(matched, output.logits.shape[1] - 1), torch.zeros_like(boxes)
    first = 0
    for rows, target in zip(regions.matched, batch.targets, strict=True):
        mine = first + torch.nonzero(rows >= 0).flatten()
        labels[mine] = target.labels[matched[mine]]
        wanted[mine] = target.boxes_xyxy[matched[mine]].to(wanted.dtype)
        first += len(rows)
    positive = torch.nonzero(matched >= 0).flatten()
    count = divisor_over_ranks(len(matched), output.logits)
    column = labels[positive] if output.deltas.shape[1] > 1 else torch.zeros_like(positive)
    deltas = encode_boxes(wanted[positive], boxes[positive], BOX_WEIGHTS).to(output.deltas.dtype)
    distance = F.l1_loss(output.deltas[positive, column], deltas, reduction="sum")
    return (F.cross_entropy(output.logits, labels, reduction="sum") + distance) / count


def staggered_levels(boxes_xyxy: Tensor, origin: Origin, count: int) -> Tensor:
    """The level that each box is pooled from in MimicDet: the one below its origin, of half the stride.

    Args:
        boxes_xyxy: [R, 4].
        origin: of the boxes. Boxes of the finest level are pooled from that; inserted ground truth by its size
            (``level_of_box``).
        count: number of levels.

    Returns:
        [R] int64.
    """
    return torch.where(origin.level >= 0, (origin.level - 1).clamp(min=0), level_of_box(boxes_xyxy, count))
