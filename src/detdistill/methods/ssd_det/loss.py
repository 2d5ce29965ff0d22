"""The bags of boxes of SSD-Det, their merging, and the focal loss; the method and its source are in ``method.py``.

Shape letters: n objects of the batch, P boxes of a bag, K classes, L levels, D width of the refiner, B images, G boxes of an
image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

RATIOS = (1.0, 1.2, 1.3, 0.8, 0.7)
TINY = 1e-12


def ssd_det_bag(boxes_xyxy: Tensor, ratios: Sequence[float] = RATIOS, shift: float = 0.2) -> Tensor:
    """The bag of boxes around each box: its width and its height times all pairs of ratios, each result with four moved copies.

    The order is: ratios of the width, then of the height, then the box, the box moved left, right, up and down by ``shift`` of
    its own side. With a first ratio of 1, box 0 is the given box. Nothing is clipped.

    Args:
        boxes_xyxy: [..., 4], treated as constant.
        ratios: R ratios for either side.
        shift: distance of the moved copies, as a fraction of their sides.

    Returns:
        [..., 5 R R, 4].

    Example:
        >>> ssd_det_bag(torch.tensor([[0.0, 0.0, 10.0, 20.0]]), ratios=(1.0,))[0].int().tolist()
        [[0, 0, 10, 20], [-2, 0, 8, 20], [2, 0, 12, 20], [0, -4, 10, 16], [0, 4, 10, 24]]
    """
    boxes = boxes_xyxy.detach()
    center, side = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    sides = side[..., None, :] * side.new_tensor(list(itertools.product(ratios, ratios)))  # [..., RR, 2]
    moves = side.new_tensor([(0, 0), (-shift, 0), (shift, 0), (0, -shift), (0, shift)])
    middles = center[..., None, None, :] + sides[..., None, :] * moves  # [..., RR, 5, 2]
    half = (sides / 2)[..., None, :]
    return torch.cat([middles - half, middles + half], dim=-1).flatten(-3, -2)


def ssd_det_merge(boxes_xyxy: Tensor, scores: Tensor, topk: int = 7) -> Tensor:
    """Merge the boxes of highest score of each bag: their mean, weighted by the scores. Bags without any score: a plain mean.

    Args:
        boxes_xyxy: [n, P, 4], treated as constant.
        scores: [n, P], 0 or more, treated as constant.
        topk: number of boxes that are merged.

    Returns:
        [n, 4].

    Example:
        >>> ssd_det_merge(torch.tensor([[[0.0] * 4, [4.0] * 4, [9.0] * 4]]), torch.tensor([[3.0, 1.0, 0.5]]), topk=2).tolist()
        [[1.0, 1.0, 1.0, 1.0]]
    """
    best, index = scores.detach().topk(min(topk, scores.shape[1]), dim=1)
    weights = best / best.sum(dim=1, keepdim=True).clamp(min=TINY) + 1e-8
    chosen = boxes_xyxy.detach().gather(1, index[..., None].expand(-1, -1, 4))
    return (chosen * (weights / weights.sum(dim=1, keepdim=True))[..., None]).sum(dim=1)


def ssd_det_focal(probabilities: Tensor, wanted: Tensor) -> Tensor:
    """``(p - y)^2 * BCE(p, y)`` of probabilities and targets of one shape, not reduced; 1e-6 is added inside the logarithms."""
    bce = wanted * (probabilities + 1e-6).log() + (1 - wanted) * (1 - probabilities + 1e-6).log()
    return -(probabilities - wanted).square() * bce


def ssd_det_random_boxes(size_hw: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    """Random boxes [count, 4] in and around an image: each side is uniform, from -0.2 to 1.2 times the image's."""
    height, width = size_hw
    start = torch.rand(count, 2, generator=generator) * 1.2 - 0.2
    end = start + torch.rand(count, 2, generator=generator) * (1.2 - start)
    return torch.cat([start, end], dim=1) * torch.tensor([width, height, width, height])
