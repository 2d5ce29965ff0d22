"""Assignment of anchors, points, proposals or predicted boxes to ground truth: by overlap, or by distance and size.

Shape letters: P boxes or points to be matched, G ground-truth boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detdistill.functional.precision import at_least_float32
from detdistill.structures import IGNORED, NEGATIVE


def pairwise_iou(first_xyxy: Tensor, second_xyxy: Tensor) -> Tensor:
    """[N, M] intersection over union of every box of one set [N, 4] with every box of another [M, 4].

    The union is at least 1e-6, so that boxes without area have IoU 0 and not NaN. Boxes of half precision give float32.
    """
    first_xyxy, second_xyxy = at_least_float32(first_xyxy), at_least_float32(second_xyxy)
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

    A box is negative if its largest IoU is below ``negative``. It is matched to the ground truth of its largest IoU (the first
    on ties) if that IoU is at least ``positive``. In between it is ignored. With ``low_quality``, every ground truth
    whose best IoU is at least ``min_positive`` is also matched to ALL boxes of exactly that IoU, even if these were negative,
    ignored or matched otherwise. If several ground truths claim a box in this way, the last one is matched to it.

    Args:
        boxes_xyxy: [P, 4].
        ground_truth_xyxy: [G, 4]; if G is 0, all boxes are negative.
        positive: smallest IoU of a positive box.
        negative: IoU below which a box is negative.
        min_positive: smallest IoU of a low-quality match. With 0, as in mmdet's RetinaNet, a ground truth that
            overlaps no box is matched to every box; any number above 0 prevents that.
        low_quality: allow low-quality matches.

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
        last = (claims * numbers).amax(dim=0) - 1  # [P], -1 for unclaimed boxes
        matched = torch.where(last >= 0, last, matched)
    return matched


@torch.no_grad()
def point_assign(points_xy: Tensor, strides: Tensor, ground_truth_xyxy: Tensor, scale: float = 4.0, count: int = 1) -> Tensor:
    """Match each ground truth to the points nearest its centre, on the level of its size (RepPoints, section 4).

    The level of a box of w x h pixels is the one of stride ``2^l``, ``l = trunc((log2(w / scale) + log2(h / scale)) / 2)``,
    or the nearest existing level. Distances are measured in box widths and heights. A point that is among the nearest points of
    several ground truths is matched to the nearest of them (the first on ties); the others get no point as a substitute.

    Args:
        points_xy: [P, 2] pixels.
        strides: [P] stride of each point's level, powers of 2.
        ground_truth_xyxy: [G, 4]; if G is 0, all points are negative.
        scale: side of the boxes of a level, in strides.
        count: number of nearest points of each ground truth.

    Returns:
        [P] int64: index of the ground truth, -1 negative.

    Example:
        >>> points = torch.tensor([[0.0, 0.0], [8.0, 0.0], [16.0, 0.0], [0.0, 0.0]])
        >>> strides = torch.tensor([8, 8, 8, 16])
        >>> point_assign(points, strides, torch.tensor([[4.0, -10.0, 36.0, 30.0], [-40.0, -40.0, 50.0, 50.0]])).tolist()
        [-1, -1, 0, 1]
    """
    matched = torch.full((len(points_xy),), NEGATIVE, dtype=torch.int64, device=points_xy.device)
    if len(points_xy) == 0 or len(ground_truth_xyxy) == 0:
        return matched
    point_levels = strides.to(ground_truth_xyxy).log2().round().long()
    centers = (ground_truth_xyxy[:, :2] + ground_truth_xyxy[:, 2:]) / 2
    sizes = (ground_truth_xyxy[:, 2:] - ground_truth_xyxy[:, :2]).clamp(min=1e-6)
    wanted = (sizes / scale).log2().mean(dim=1).trunc().long().clamp(int(point_levels.min()), int(point_levels.max()))
    for level in sorted(set(wanted.tolist())):
        boxes, points = torch.nonzero(wanted == level).flatten(), torch.nonzero(point_levels == level).flatten()
        distances = ((points_xy[points] - centers[boxes, None]) / sizes[boxes, None]).norm(dim=-1)  # [g, p]
        closest = distances.topk(min(count, len(points)), dim=1, largest=False).indices
        claims = torch.full_like(distances, torch.inf).scatter(1, closest, distances.gather(1, closest))
        best, first = claims.min(dim=0)  # [p]
        matched[points] = torch.where(best.isfinite(), boxes[first], NEGATIVE)
    return matched
