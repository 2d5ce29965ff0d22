"""Adaptive training sample selection (ATSS): assignment of anchors to boxes by the statistics of their overlaps.

Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample Selection",
CVPR 2020, algorithm 1. GFL, LD and others use it, too.

Shape letters: P anchors of an image, G ground-truth boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detdistill.functional.precision import at_least_float32
from detdistill.structures import NEGATIVE


@torch.no_grad()
def atss_assign(anchors_xyxy: Tensor, levels: Tensor, ground_truth_xyxy: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """Match the anchors of one image to its ground truth.

    The candidates of a ground truth are the ``candidates`` anchors of each level whose centres are nearest to its centre. Of
    these, it is matched to the ones whose IoU is at least mean + standard deviation (unbiased) of the candidates' IoUs, and
    whose centre lies inside the box by more than 0.01 pixel. An anchor that several boxes claim is matched to the box of
    highest IoU (the first on ties).

    If several anchors are equally near, ``torch.topk`` decides which are candidates; this may differ between devices.

    Args:
        anchors_xyxy: [P, 4] anchors that may be matched.
        levels: [P] level of each anchor.
        ground_truth_xyxy: [G, 4]; if G is 0, all anchors are negative.
        candidates: number of candidates for each level and box; levels with fewer anchors give all of them.

    Returns:
        [P] int64: index of the ground truth or -1; and [P] its IoU with the anchor, 0 for negatives.

    Example:
        >>> anchors = torch.tensor([[-8.0, -8.0, 8.0, 8.0], [0.0, -8.0, 16.0, 8.0], [8.0, -8.0, 24.0, 8.0]])
        >>> atss_assign(anchors, torch.zeros(3, dtype=torch.int64), torch.tensor([[2.0, -8.0, 16.0, 8.0]]), 9)[0].tolist()
        [-1, 0, -1]
    """
    matched = torch.full((len(anchors_xyxy),), NEGATIVE, dtype=torch.int64, device=anchors_xyxy.device)
    none = anchors_xyxy.new_zeros(len(anchors_xyxy))
    if len(anchors_xyxy) == 0 or len(ground_truth_xyxy) == 0:
        return matched, none
    centers = (anchors_xyxy[:, :2] + anchors_xyxy[:, 2:]) / 2
    index, own, threshold = _candidates(anchors_xyxy, centers, levels, ground_truth_xyxy, candidates)
    from_start = centers[index] - ground_truth_xyxy[None, :, :2]
    to_end = ground_truth_xyxy[None, :, 2:] - centers[index]
    inside = torch.cat([from_start, to_end], dim=-1).amin(dim=-1) > 0.01
    candidate, box = torch.nonzero((own >= threshold) & inside, as_tuple=True)
    anchor, overlap = index[candidate, box], own[candidate, box]
    best = own.new_zeros(len(matched)).scatter_reduce(0, anchor, overlap, "amax")
    first = overlap == best[anchor]
    claimed = torch.full_like(matched, len(ground_truth_xyxy)).scatter_reduce(0, anchor[first], box[first], "amin")
    return torch.where(claimed < len(ground_truth_xyxy), claimed, matched), best


@torch.no_grad()
def atss_thresholds(anchors_xyxy: Tensor, levels: Tensor, ground_truth_xyxy: Tensor, candidates: int) -> Tensor:
    """Smallest IoU of a positive anchor for each ground truth: mean + standard deviation of the candidates' IoUs.

    Args:
        anchors_xyxy: [P, 4], at least one.
        levels: [P] level of each anchor.
        ground_truth_xyxy: [G, 4].
        candidates: as in ``atss_assign``.

    Returns:
        [G].

    Example:
        >>> anchors = torch.tensor([[0.0, 0.0, 8.0, 8.0], [8.0, 0.0, 16.0, 8.0]])
        >>> atss_thresholds(anchors, torch.zeros(2, dtype=torch.int64), anchors[:1], candidates=9)
        tensor([1.2071])
    """
    centers = (anchors_xyxy[:, :2] + anchors_xyxy[:, 2:]) / 2
    return _candidates(anchors_xyxy, centers, levels, ground_truth_xyxy, candidates)[2]


def _candidates(
    anchors_xyxy: Tensor, centers: Tensor, levels: Tensor, ground_truth_xyxy: Tensor, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices [c, G] of each box's candidates, their IoUs [c, G], and the threshold [G] of these."""
    box_centers = (ground_truth_xyxy[:, :2] + ground_truth_xyxy[:, 2:]) / 2
    across, down = ((centers[:, None, axis] - box_centers[None, :, axis]).square_() for axis in (0, 1))
    distances = across.add_(down).sqrt_()  # [P, G]; boxes of equal distance are ordered by their square roots
    chosen = []
    for level in torch.unique(levels).tolist():
        mine = torch.nonzero(levels == level).flatten()
        nearest = distances[mine].topk(min(candidates, len(mine)), dim=0, largest=False).indices
        chosen.append(mine[nearest])
    index = torch.cat(chosen)
    own = _iou(anchors_xyxy[index], ground_truth_xyxy)
    return index, own, own.mean(dim=0) + (own.std(dim=0) if len(own) > 1 else 0)  # one value has no deviation


def _iou(candidates_xyxy: Tensor, ground_truth_xyxy: Tensor) -> Tensor:
    """IoU [c, G] of each box with its own candidates [c, G, 4], by the operations of ``pairwise_iou``."""
    anchors, boxes = at_least_float32(candidates_xyxy), at_least_float32(ground_truth_xyxy)
    corner = torch.maximum(anchors[..., :2], boxes[:, :2])
    opposite = torch.minimum(anchors[..., 2:], boxes[:, 2:])
    shared = (opposite - corner).clamp(min=0).prod(dim=-1)
    areas = [(each[..., 2:] - each[..., :2]).prod(dim=-1) for each in (anchors, boxes)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-6)
