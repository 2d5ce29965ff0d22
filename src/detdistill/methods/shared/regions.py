"""Regions of a training step: boxes that a detector proposes, and labels and box deltas of the regions that it trains on.

The student's prediction of a step holds the pooled features of its regions, and ``Teacher.predict_regions`` keeps those of
the teacher, so that the methods of a composition pool the regions of a step once.

Shape letters: B images, R regions of the whole batch, M positive regions, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from detdistill.detectors.contract import DetectionHead
from detdistill.functional.regions import propose
from detdistill.structures import IGNORED, Batch, Dense, Positives, Prediction, Queries, Regions

BEFORE_NMS = 2000
"""Predictions of each level that enter non-maximum suppression, as in Faster R-CNN's training."""
NMS_IOU = 0.7
"""IoU above which the box of lower score is dropped, as in Faster R-CNN."""


@torch.no_grad()
def proposed_boxes(prediction: Prediction, batch: Batch, count: int) -> list[Tensor]:
    """The boxes that a detector proposes, best first, clipped to the image and without boxes of zero area.

    Dense predictions and first stages are ranked and suppressed by ``propose``. A region prediction without a first stage
    (read from a cache) gives its input boxes without inserted ground truth. Queries give the boxes of the last layer, ranked
    by class score and not suppressed.

    Args:
        prediction: of any family.
        batch: the images.
        count: largest number of boxes of an image; there may be fewer, or none.

    Returns:
        [n_b, 4] pixels for each of the B images.
    """
    if isinstance(prediction, Queries):
        return _boxes_of_queries(prediction, batch, count)
    dense = prediction if isinstance(prediction, Dense) else prediction.first
    if dense is not None:
        return propose(dense, batch.sizes, before=BEFORE_NMS, nms=NMS_IOU, after=count).boxes_xyxy
    assert isinstance(prediction, Regions)
    start = prediction.before_refinement()
    own = start.origin.ground_truth < 0
    given = [start.boxes_xyxy[own & (start.origin.image == image)] for image in range(len(batch))]
    return [boxes[:count] for boxes in usable_boxes(given, batch)]


def _boxes_of_queries(prediction: Queries, batch: Batch, count: int) -> list[Tensor]:
    logits = prediction.logits[-1]
    scores = (logits.softmax(dim=-1)[..., :-1] if prediction.softmax else logits).amax(dim=-1)
    center, size = prediction.boxes_cxcywh01[-1].chunk(2, dim=-1)
    scale = batch.sizes.flip(1).repeat(1, 2)[:, None].to(center)
    boxes = torch.cat([center - size / 2, center + size / 2], dim=-1) * scale
    ranked = [mine[order] for mine, order in zip(boxes, scores.argsort(dim=1, descending=True), strict=True)]
    return [mine[:count] for mine in usable_boxes(ranked, batch)]


def usable_boxes(boxes_xyxy: Sequence[Tensor], batch: Batch) -> list[Tensor]:
    """Boxes clipped to their images, without those that then have no area or are not finite; B tensors [n_b, 4]."""
    clipped = [clip_boxes_to_image(boxes, size) for boxes, size in zip(boxes_xyxy, batch.sizes.tolist(), strict=True)]
    return [boxes[has_area(boxes)] for boxes in clipped]


def has_area(boxes_xyxy: Tensor) -> Tensor:
    """[R] bool, True for finite boxes [R, 4] of positive width and height."""
    return boxes_xyxy.isfinite().all(dim=1) & (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(dim=1)


def label_regions(head: DetectionHead, regions: Regions, batch: Batch) -> tuple[Tensor, Positives]:
    """Label the regions that a detector trains on, by its own assignment.

    Args:
        head: the detector that predicted the regions.
        regions: its prediction; of a cascade, the prediction of one of its stages.
        batch: gives the ground truth.

    Returns:
        [R] int64 class of each region: K for the background, -2 (``IGNORED``) for regions that the detector ignores; and the
        positives, whose ``index`` is the row of each positive region.
    """
    assignment = head.assign(regions, batch)
    positives = head.positives(regions, assignment, batch)
    labels = torch.full_like(assignment.matched, regions.logits.shape[1] - 1)
    labels[positives.index] = positives.labels
    return labels.masked_fill(assignment.matched == IGNORED, IGNORED), positives


def of_class(boxes: Tensor, labels: Tensor) -> Tensor:
    """For each region the four numbers of one class: [M, K, 4], or class-agnostic [M, 1, 4], and labels [M] -> [M, 4].

    Example:
        >>> of_class(torch.arange(16.0).view(2, 2, 4), torch.tensor([1, 0])).tolist()
        [[4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]]
    """
    column = labels if boxes.shape[1] > 1 else torch.zeros_like(labels)
    return boxes[torch.arange(len(boxes), device=boxes.device), column]
