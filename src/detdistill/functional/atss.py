"""Adaptive training sample selection (ATSS): assignment of anchors to boxes by the statistics of their overlaps.

Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample Selection",
CVPR 2020, algorithm 1. GFL, LD and others use it, too.

Shape letters: P anchors of an image, G ground-truth boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detdistill.functional.assign import pairwise_iou
from detdistill.structures import NEGATIVE


@torch.no_grad()
def atss_assign(anchors_xyxy: Tensor, levels: Tensor, ground_truth_xyxy: Tensor, candidates: int = 9) -> tuple[Tensor, Tensor]:
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
        >>> atss_assign(anchors, torch.zeros(3, dtype=torch.int64), torch.tensor([[2.0, -8.0, 16.0, 8.0]]))[0].tolist()
        [-1, 0, -1]
    """
    matched = torch.full((len(anchors_xyxy),), NEGATIVE, dtype=torch.int64, device=anchors_xyxy.device)
    none = anchors_xyxy.new_zeros(len(anchors_xyxy))
    if len(anchors_xyxy) == 0 or len(ground_truth_xyxy) == 0:
        return matched, none
    overlaps = pairwise_iou(anchors_xyxy, ground_truth_xyxy)  # [P, G]
    centers = (anchors_xyxy[:, :2] + anchors_xyxy[:, 2:]) / 2
    index, threshold = _candidates(centers, levels, ground_truth_xyxy, overlaps, candidates)
    own = overlaps.gather(0, index)
    from_start = centers[index] - ground_truth_xyxy[None, :, :2]
    to_end = ground_truth_xyxy[None, :, 2:] - centers[index]
    inside = torch.cat([from_start, to_end], dim=-1).amin(dim=-1) > 0.01
    claims = torch.full_like(overlaps, -1.0)
    claims.scatter_(0, index, torch.where((own >= threshold) & inside, own, -1.0))
    best, box = claims.max(dim=1)  # max gives the first of equal boxes
    positive = best >= 0
    return torch.where(positive, box, matched), torch.where(positive, best, none)


@torch.no_grad()
def atss_thresholds(anchors_xyxy: Tensor, levels: Tensor, ground_truth_xyxy: Tensor, candidates: int = 9) -> Tensor:
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
        >>> atss_thresholds(anchors, torch.zeros(2, dtype=torch.int64), anchors[:1])
        tensor([1.2071])
    """
    overlaps = pairwise_iou(anchors_xyxy, ground_truth_xyxy)
    centers = (anchors_xyxy[:, :2] + anchors_xyxy[:, 2:]) / 2
    return _candidates(centers, levels, ground_truth_xyxy, overlaps, candidates)[1]


def _candidates(
    centers: Tensor, levels: Tensor, ground_truth_xyxy: Tensor, overlaps: Tensor, candidates: int
) -> tuple[Tensor, Tensor]:
    """Indices [c, G] of each box's candidates, and the threshold [G] of their IoUs."""
    box_centers = (ground_truth_xyxy[:, :2] + ground_truth_xyxy[:, 2:]) / 2
    distances = (centers[:, None] - box_centers[None]).pow(2).sum(dim=-1).sqrt()  # [P, G]
    chosen = []
    for level in torch.unique(levels).tolist():
        mine = torch.nonzero(levels == level).flatten()
        nearest = distances[mine].topk(min(candidates, len(mine)), dim=0, largest=False).indices
        chosen.append(mine[nearest])
    index = torch.cat(chosen)
    own = overlaps.gather(0, index)
    return index, own.mean(dim=0) + (own.std(dim=0) if len(own) > 1 else 0)  # one value has no deviation
