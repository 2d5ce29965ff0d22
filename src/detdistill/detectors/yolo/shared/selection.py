"""Final boxes of a YOLO: every class of every prediction above the threshold, then NMS within each class.

The package's own function stops after a time limit and then gives images without boxes; this one has no limit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

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
