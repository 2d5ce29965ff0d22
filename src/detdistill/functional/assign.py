"""Which ground-truth box each anchor, proposal or predicted box belongs to, by overlap.

Shape letters: P boxes to be matched, G ground-truth boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detdistill.structures import IGNORED, NEGATIVE


def pairwise_iou(first_xyxy: Tensor, second_xyxy: Tensor) -> Tensor:
    """[N, M] intersection over union of every box of one set [N, 4] with every box of another [M, 4].

    The union is at least 1e-6, so that boxes without an area overlap nothing instead of not being a number.
    """
    corner = torch.maximum(first_xyxy[:, None, :2], second_xyxy[None, :, :2])
    opposite = torch.minimum(first_xyxy[:, None, 2:], second_xyxy[None, :, 2:])
    shared = (opposite - corner).clamp(min=0).prod(dim=-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(dim=-1) for boxes in (first_xyxy, second_xyxy)]
    return shared / (areas[0][:, None] + areas[1][None, :] - shared).clamp(min=1e-6)


@torch.no_grad()
def max_iou_assign(
    boxes_xyxy: Tensor,
    ground_truth_xyxy: Tensor,
    positive: float,
    negative: float,
    min_positive: float = 0.0,
    low_quality: bool = True,
) -> Tensor:
    """Match boxes to the ground truth they overlap most (Ren et al., "Faster R-CNN", section 3.1.2, with mmdet's ties).

    A box is negative when its largest IoU is below ``negative``, and belongs to the ground truth of that IoU (the first
    one on ties) when it is at least ``positive``; in between it is ignored. With ``low_quality``, every ground truth
    whose best IoU is at least ``min_positive`` also takes ALL boxes of exactly that IoU, whatever they were before; the
    last ground truth that claims a box has it.

    Args:
        boxes_xyxy: [P, 4].
        ground_truth_xyxy: [G, 4]; without any, all boxes are negative.
        positive: IoU from which on a box is positive.
        negative: IoU below which a box is negative.
        min_positive: the least best IoU of a low-quality match. With 0, as mmdet's RetinaNet has it, a ground truth that
            overlaps nothing takes every box of IoU 0; any number above 0 prevents that.
        low_quality: allow such matches.

    Returns:
        [P] int64: index of the ground truth, -1 negative, -2 ignored.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 4.5], [20.0, 20.0, 30.0, 30.0]])
        >>> max_iou_assign(boxes, torch.tensor([[0.0, 0.0, 10.0, 10.0]]), positive=0.5, negative=0.4).tolist()
        [0, -2, -1]
    """
    matched = torch.full((len(boxes_xyxy),), NEGATIVE, dtype=torch.int64, device=boxes_xyxy.device)
    if len(boxes_xyxy) == 0 or len(ground_truth_xyxy) == 0:
        return matched
    overlaps = pairwise_iou(ground_truth_xyxy, boxes_xyxy)  # [G, P]
    best, nearest = overlaps.max(dim=0)  # [P]; max gives the first of equal ground truths
    matched = torch.where(best >= negative, IGNORED, matched)
    matched = torch.where(best >= positive, nearest, matched)
    if low_quality:
        best_box = overlaps.amax(dim=1, keepdim=True)  # [G, 1]
        claims = (overlaps == best_box) & (best_box >= min_positive)
        numbers = torch.arange(1, len(ground_truth_xyxy) + 1, device=matched.device)[:, None]
        last = (claims * numbers).amax(dim=0) - 1  # [P], -1 where nobody claims
        matched = torch.where(last >= 0, last, matched)
    return matched
