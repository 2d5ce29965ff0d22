"""Final boxes of a YOLO: every class of every prediction above the threshold, then NMS within each class.

The package's own function stops after a time limit and then gives images without boxes; this one has no limit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

CANDIDATES = 30_000
"""Best candidates of an image that reach NMS."""
APART = 7680.0
"""Pixels by which the boxes of one class are moved from those of the next, so that one NMS serves all classes."""


def select(boxes_xyxy: Tensor, scores: Tensor, *, threshold: float, iou: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the detections of an image.

    Args:
        boxes_xyxy: [P, 4] in pixels.
        scores: [P, K], 0..1.
        threshold: detections score above it.
        iou: of two boxes of one class with a larger IoU, the better one stays.
        most: largest number of detections.

    Returns:
        Index of the prediction [D], label [D] and score [D], best first.
    """
    index, label = torch.nonzero(scores > threshold, as_tuple=True)
    score = scores[index, label]
    if len(index) > CANDIDATES:
        best = score.argsort(descending=True)[:CANDIDATES]
        index, label, score = index[best], label[best], score[best]
    kept = nms(boxes_xyxy[index] + label[:, None].to(boxes_xyxy.dtype) * APART, score, iou)[:most]
    return index[kept], label[kept], score[kept]


def select_clipped(
    boxes_xyxy: Tensor,
    scores: Tensor,
    size_hw: tuple[int, int],
    *,
    single_label: bool,
    threshold: float,
    iou: float,
    most: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the detections of an image as the package libreyolo does: boxes are clipped to the image before NMS.

    Args:
        boxes_xyxy: [P, 4] in pixels.
        scores: [P, K], 0..1.
        size_hw: height and width of the image.
        single_label: take the best class of each prediction only.
        threshold: detections score above it.
        iou: of two boxes of one class with a larger IoU, the better one stays.
        most: largest number of detections.

    Returns:
        Box [D, 4], index of the prediction [D], label [D] and score [D], best first. Boxes without area and those that are no
        numbers are left out.
    """
    if single_label:
        best, classes = scores.max(dim=1)
        index = torch.nonzero(best > threshold).flatten()
        score, label = best[index], classes[index]
    else:
        index, label = torch.nonzero(scores > threshold, as_tuple=True)
        score = scores[index, label]
        if len(index) > max(most, CANDIDATES):
            chosen = score.topk(max(most, CANDIDATES)).indices
            index, label, score = index[chosen], label[chosen], score[chosen]
    height, width = size_hw
    limit = boxes_xyxy.new_tensor([width, height, width, height])
    boxes = torch.minimum(boxes_xyxy[index].clamp(min=0), limit)
    usable = torch.nonzero((boxes[:, 2:] > boxes[:, :2]).all(dim=1)).flatten()
    boxes, index, label, score = boxes[usable], index[usable], label[usable], score[usable]
    kept = batched_nms(boxes, score, label, iou)
    if single_label or len(kept) > most:
        kept = kept[score[kept].topk(min(len(kept), most)).indices]
    return boxes[kept], index[kept], label[kept], score[kept]
