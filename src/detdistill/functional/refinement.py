"""Targets of a refinement module, which moves anchors before a head classifies them (MimicDet)."""

from __future__ import annotations

import torch
from torch import Tensor

from detdistill.functional.precision import at_least_float32
from detdistill.structures import NEGATIVE


@torch.no_grad()
def refinement_assign(centers_xy: Tensor, levels: Tensor, ground_truth_xyxy: Tensor, unit: float, share: float = 0.3) -> Tensor:
    """Match each ground truth to the anchors of its level whose centres lie in its central area.

    A box belongs to level l if the square root of its area is from ``unit * 2^l`` to twice that; smaller boxes belong to the
    first level, larger ones to the last. A box whose central area holds no centre takes the nearest one of its level: without
    that (our addition) small boxes would train nothing. An anchor of several boxes takes the smallest.

    Args:
        centers_xy: [P, 2] of the anchors, pixels.
        levels: [P] level of each anchor, from 0.
        ground_truth_xyxy: [G, 4]; if G is 0, all anchors are negative.
        unit: pixels.
        share: side of the central area, to which its border belongs, as a fraction of the box's side.

    Returns:
        [P] int64: index of the ground truth, -1 negative.

    Example:
        >>> centers = torch.tensor([[0.0, 0.0], [8.0, 0.0], [16.0, 0.0], [0.0, 0.0]])
        >>> boxes = torch.tensor([[-4.0, -12.0, 20.0, 12.0], [15.0, -2.0, 20.0, 3.0]])
        >>> refinement_assign(centers, torch.tensor([0, 0, 0, 1]), boxes, 32.0).tolist()
        [-1, 0, 1, -1]
    """
    matched = torch.full((len(centers_xy),), NEGATIVE, dtype=torch.int64, device=centers_xy.device)
    if len(centers_xy) == 0 or len(ground_truth_xyxy) == 0:
        return matched
    boxes, points = at_least_float32(ground_truth_xyxy), at_least_float32(centers_xy)
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6)
    area = sides.prod(dim=1)
    wanted = (area.sqrt() / unit).log2().floor().clamp(0, int(levels.max())).long()
    distances = (points[None] - (boxes[:, None, :2] + boxes[:, None, 2:]) / 2).abs() / sides[:, None]  # [G, P, 2]
    mine = levels[None] == wanted[:, None]
    inside = mine & (distances <= share / 2).all(dim=-1)
    far = distances.norm(dim=-1).masked_fill(~mine, torch.inf)
    nearest = torch.zeros_like(inside).scatter(1, far.argmin(dim=1, keepdim=True), True) & mine
    claims = torch.where(inside.any(dim=1, keepdim=True), inside, nearest)
    best, smallest = torch.where(claims, area[:, None], torch.inf).min(dim=0)
    return torch.where(best.isfinite(), smallest, matched)
