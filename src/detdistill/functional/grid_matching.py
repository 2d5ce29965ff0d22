"""Match the anchors of a grid to boxes by their overlap, without computing the overlap of every pair.

The anchors of a level that have the same number within their cell have nearly the same size, their left and right sides depend
on the column only, and their upper and lower sides on the row only. So the largest overlap of a box with all of them is known
from one row and one column, and the pairs that can reach a threshold lie in a small window. Only these are computed, by the
same operations as ``torchvision.ops.box_iou``, so the matches are equal to those of the full matrix bit by bit.

Shape letters: P anchors of an image, G boxes, A anchors of a cell, H rows and W columns of a level, N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detdistill.structures import IGNORED, NEGATIVE

SLACK = 1e-5
"""Relative room for rounding in the bounds that decide which pairs are computed."""


@dataclass(frozen=True)
class Grid:
    """The anchors of one level, in the order row, column, anchor."""

    start: int
    """Index of the first of these anchors among all anchors."""
    sides_x: Tensor
    """[2, A, W] left and right sides."""
    sides_y: Tensor
    """[2, A, H] upper and lower sides."""


@dataclass(frozen=True)
class Overlaps:
    """The pairs of a box and an anchor whose IoU reaches the threshold or is the largest of the box."""

    box: Tensor
    """[N] index of the box."""
    anchor: Tensor
    """[N] index of the anchor."""
    iou: Tensor
    """[N]."""
    largest: Tensor
    """[G] largest IoU of each box."""


def grids(priors_xyxy: Tensor, levels: Tensor, cells: Tensor, anchors: Tensor) -> list[Grid] | None:
    """The levels of a grid of anchors, or None if the anchors do not lie on such a grid.

    Args:
        priors_xyxy: [P, 4] anchors.
        levels: [P] level of each.
        cells: [P, 2] row and column of each.
        anchors: [P] number of each within its cell.
    """
    found, start = [], 0
    _, counts = torch.unique_consecutive(levels, return_counts=True)
    for count in counts.tolist():
        mine = slice(start, start + count)
        height, width = (cells[mine].amax(dim=0) + 1).tolist()
        number = int(anchors[mine].amax()) + 1
        if height * width * number != count:
            return None
        boxes = priors_xyxy[mine].view(height, width, number, 4)
        x, y = boxes[:1, :, :, 0::2], boxes[:, :1, :, 1::2]
        if not bool(boxes[..., 0::2].eq(x).all() & boxes[..., 1::2].eq(y).all()):
            return None
        found.append(Grid(start, x[0].permute(2, 1, 0), y[:, 0].permute(2, 1, 0)))
        start += count
    return found


@torch.no_grad()
def large_overlaps(boxes_xyxy: Tensor, levels: Sequence[Grid], threshold: float) -> Overlaps | None:
    """Compute the IoU of every pair that reaches ``threshold`` or the largest IoU of its box.

    Args:
        boxes_xyxy: [G, 4], at least one, with an area above zero.
        levels: the anchors.
        threshold: above 0.

    Returns:
        The pairs; other pairs of a smaller IoU may be among them. None if a box overlaps no anchor.
    """
    areas = (boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])
    shared, reached, possible = [], [], []
    for level in levels:
        across = _shared(boxes_xyxy[:, 0], boxes_xyxy[:, 2], level.sides_x)
        down = _shared(boxes_xyxy[:, 1], boxes_xyxy[:, 3], level.sides_y)
        widths, heights = level.sides_x[1] - level.sides_x[0], level.sides_y[1] - level.sides_y[0]
        (best_x, column), (best_y, row) = across.max(dim=-1), down.max(dim=-1)
        inside = best_x * best_y
        theirs = widths.T.gather(0, column) * heights.T.gather(0, row)
        reached.append(inside / (theirs + areas[:, None] - inside))
        smallest = widths.amin(dim=-1) * heights.amin(dim=-1) + areas[:, None]
        possible.append(inside / (smallest - inside) * (1 + SLACK))
        shared.append((across, down, best_x, best_y, smallest))
    least = torch.cat(reached, dim=1).amax(dim=1)
    if not bool((least > 0).all()):  # also if one is not a number
        return None
    wanted = least.clamp(max=threshold)
    pairs = [_pairs(boxes_xyxy, areas, wanted, *each) for each in zip(levels, possible, shared, strict=True)]
    box, anchor, iou = (torch.cat(column) for column in zip(*pairs, strict=True))
    largest = least.scatter_reduce(0, box, iou, "amax")
    return Overlaps(box, anchor, iou, largest)


def _shared(low: Tensor, high: Tensor, sides: Tensor) -> Tensor:
    """Length that each box [G] shares with each side [A, n] of the anchors: [G, A, n]."""
    return (torch.minimum(high[:, None, None], sides[1]) - torch.maximum(low[:, None, None], sides[0])).clamp_(min=0)


def _pairs(
    boxes_xyxy: Tensor, areas: Tensor, wanted: Tensor, level: Grid, possible: Tensor, shared: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Box, anchor and IoU of the pairs of a level that may reach the IoU ``wanted`` [G] of their box."""
    across, down, best_x, best_y, smallest = shared
    box, number = torch.nonzero(possible >= wanted[:, None], as_tuple=True)
    least = wanted[box] / (1 + wanted[box]) * smallest[box, number] * (1 - SLACK)  # of the intersection
    first_x, count_x = _window(across[box, number] * best_y[box, number, None] >= least[:, None])
    first_y, count_y = _window(down[box, number] * best_x[box, number, None] >= least[:, None])
    counts = count_x * count_y
    item = torch.repeat_interleave(counts)
    within = torch.arange(len(item), device=item.device) - (counts.cumsum(0) - counts)[item]
    row = first_y[item] + within // count_x[item]
    column = first_x[item] + within % count_x[item]
    box, number = box[item], number[item]
    inside = across[box, number, column] * down[box, number, row]
    width = level.sides_x[1, number, column] - level.sides_x[0, number, column]
    height = level.sides_y[1, number, row] - level.sides_y[0, number, row]
    iou = inside / (areas[box] + width * height - inside)
    kept = iou >= wanted[box]
    cells = level.sides_x.shape[2]
    anchor = level.start + (row * cells + column) * level.sides_x.shape[1] + number
    return box[kept], anchor[kept], iou[kept]


def _window(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first and number of the places from the first to the last true one of each row; a row has at least one."""
    marks = mask.to(torch.uint8)
    first, behind = marks.argmax(dim=1), marks.flip(1).argmax(dim=1)
    return first, mask.shape[1] - behind - first


@torch.no_grad()
def match_by_overlap(
    boxes_xyxy: Tensor, priors_xyxy: Tensor, found: Overlaps, low: float, high: float, keep_best: bool
) -> Tensor:
    """Match each anchor to the box of its largest IoU (the first of equal ones).

    Args:
        boxes_xyxy: [G, 4].
        priors_xyxy: [P, 4] anchors.
        found: result of ``large_overlaps`` with the threshold ``low``.
        low: anchors with a smaller IoU are negative.
        high: anchors with at least this IoU are positive; those between are ignored.
        keep_best: the anchors with the largest IoU of a box are positive whatever it is; each is matched to its own best box.

    Returns:
        [P] index of the box, -1 negative, -2 ignored.
    """
    best = priors_xyxy.new_zeros(len(priors_xyxy)).scatter_reduce(0, found.anchor, found.iou, "amax")
    mine = found.iou == best[found.anchor]
    box = torch.full((len(best),), len(boxes_xyxy), device=best.device)
    box = box.scatter_reduce(0, found.anchor[mine], found.box[mine], "amin")
    matched = torch.where(best >= high, box, torch.where(best >= low, IGNORED, NEGATIVE))
    if keep_best:
        chosen = torch.unique(found.anchor[found.iou == found.largest[found.box]])
        known = best[chosen] >= low
        matched[chosen[known]] = box[chosen[known]]
        unknown = chosen[~known]
        if len(unknown):
            matched[unknown] = _nearest_box(boxes_xyxy, priors_xyxy[unknown])
    return matched


def best_anchors(found: Overlaps, priors: int) -> Tensor:
    """Index [G] of the anchor with the largest IoU of each box, the first of equal ones; ``priors`` is the number of anchors."""
    mine = found.iou == found.largest[found.box]
    return found.box.new_full((len(found.largest),), priors).scatter_reduce(0, found.box[mine], found.anchor[mine], "amin")


def _nearest_box(boxes_xyxy: Tensor, anchors_xyxy: Tensor) -> Tensor:
    """Index of the box of the largest IoU for each anchor [n], by the operations of ``box_iou``."""
    left, top, right, bottom = (side[:, None] for side in boxes_xyxy.unbind(1))
    areas = (anchors_xyxy[:, 2] - anchors_xyxy[:, 0]) * (anchors_xyxy[:, 3] - anchors_xyxy[:, 1])
    across = (torch.minimum(right, anchors_xyxy[:, 2]) - torch.maximum(left, anchors_xyxy[:, 0])).clamp_(min=0)
    down = (torch.minimum(bottom, anchors_xyxy[:, 3]) - torch.maximum(top, anchors_xyxy[:, 1])).clamp_(min=0)
    inside = across.mul_(down)
    return (inside / ((right - left) * (bottom - top) + areas - inside)).argmax(dim=0)
