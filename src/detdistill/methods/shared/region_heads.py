"""Parts beside ``functional.region_heads`` with which methods train a region head on the features of a one-stage student.

The region head is an assistant, or a teacher that is trained with the student. It is a part of the method and never exported.

Shape letters: R regions of the whole batch, C channels, D width of the hidden layers, A anchors of a cell.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.functional.regions import SampledRegions, propose, sample_regions
from detdistill.methods.shared.regions import BEFORE_NMS
from detdistill.structures import Batch, Dense


def regions_of_dense(
    prediction: Dense,
    batch: Batch,
    *,
    before: int = BEFORE_NMS,
    nms: float,
    after: int,
    count: int,
    positive_fraction: float,
    iou: float = 0.5,
) -> SampledRegions:
    """Regions for the training of a region head from a one-stage detector's prediction, which takes the part of a first stage.

    Predictions are ranked by their best class, suppressed as in a region proposal network, joined by the ground truth, and
    sampled. All steps keep the origin of each box. An image may have fewer regions than ``count``, or none.

    Args:
        prediction: of the one-stage detector; no gradient flows to its boxes.
        batch: gives the sizes and the ground truth.
        before: largest number of predictions of a level before non-maximum suppression (NMS).
        nms: IoU of NMS within a level.
        after: largest number of boxes of an image after NMS.
        count: number of regions sampled of each image.
        positive_fraction: largest fraction of positives.
        iou: smallest IoU of a positive.
    """
    found = propose(prediction, batch.sizes, before=before, nms=nms, after=after)
    return sample_regions(
        found.boxes_xyxy, found.origins, batch.targets, count=count, positive_fraction=positive_fraction, iou=iou
    )


class AnchorLinear(nn.Module):
    """A linear layer with weights of its own for each anchor of a cell ("decoupled" in HEAD's released code).

    The parameters are those of ``nn.Linear(C, A * D)``; a row only computes the D outputs of its anchor.
    """

    def __init__(self, inputs: int, outputs: int, anchors: int) -> None:
        """C inputs, D outputs, A anchors; PyTorch's initialisation."""
        super().__init__()
        self.anchors = anchors
        self.layer = nn.Linear(inputs, outputs * anchors)

    def forward(self, rows: Tensor, anchor: Tensor) -> Tensor:
        """Rows [R, C] of the anchors [R] -> [R, D]."""
        weights = self.layer.weight.view(self.anchors, -1, rows.shape[1])
        biases = self.layer.bias.view(self.anchors, -1)
        index = [torch.nonzero(anchor == number).flatten() for number in range(self.anchors)]
        found = [F.linear(rows[mine], weights[number], biases[number]) for number, mine in enumerate(index)]
        return torch.cat(found)[torch.cat(index).argsort()]
