"""Cells of a feature map that a box covers, by the rules of released codes, and the pyramid level that a box belongs to.

Papers say "inside the box", but their codes differ by a row or a column, which matters on a coarse level. The rules are:

| rule | first cell | last cell | a box smaller than a cell | methods |
| --- | --- | --- | --- | --- |
| ``floor_ceil_cells`` | floor of the start | ceil of the end | its cell and the next | FGD, modified FitNet |
| ``truncated_cells`` | start, truncated | before the end, truncated | its cell | DeFeat, TADF |
| ``center_cells`` | centre beyond the start | centre before the end | maybe none | PGD, LD |
| ``index_cells`` | index at or beyond the start | index at or before the end | maybe none | LGD |

The cells of a box are always whole rows crossed with whole columns (``BoxCells``), so no map for each box is needed.

Shape letters: G boxes of an image, H x W cells of a level, P anchors or points.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detdistill.functional.assign import pairwise_iou

CHUNK = 2**22
"""Largest size of a temporary tensor with one entry for each box and each place; more boxes are processed in chunks."""


class BoxCells(NamedTuple):
    """The cells of each of G boxes on a map of H x W: a cell belongs to a box if its row AND its column do."""

    rows: Tensor
    """[G, H] bool."""
    columns: Tensor
    """[G, W] bool."""

    def regions(self) -> Tensor:
        """[G, H, W] bool: the cells of each box."""
        return self.rows[:, :, None] & self.columns[:, None, :]

    def union(self) -> Tensor:
        """[H, W] bool: the cells of any box; all False if there are no boxes."""
        # The product counts the boxes on each cell. In half precision (autocast) it rounds, but never to 0.
        return (self.rows.float().T @ self.columns.float()) > 0

    def counts(self) -> Tensor:
        """[G] int64: the number of cells of each box on the map."""
        return self.rows.sum(dim=1) * self.columns.sum(dim=1)


# ------------------------------------------------------------------------------------------------------------ the rules


def floor_ceil_span(boxes_xyxy: Tensor, image_hw: tuple[float, float], map_hw: tuple[int, int]) -> Tensor:
    """First and last column and row of each box by FGD's rule, both inclusive.

    A coordinate x becomes ``x / image width * W``; starts are rounded down, ends up. A box whose edges lie on the grid covers
    one row and one column more than it fills. Yang et al., "Focal and Global Knowledge Distillation", CVPR 2022, released
    code; the paper only says "inside the box".

    Args:
        boxes_xyxy: [G, 4] float, pixels of the image.
        image_hw: height and width in pixels of the area that the map shows. The padded tensor's size is geometrically right;
            the released code of FGD divides by the size before padding.
        map_hw: rows and columns of the map.

    Returns:
        [G, 4] int64 (first column, first row, last column, last row). Last ones may lie beyond the map's edge: FGD needs the
        area before clipping. Negative ones become 0, where the released code would count from the map's other side.

    Example:
        >>> floor_ceil_span(torch.tensor([[8.0, -3.0, 17.0, 16.0]]), (32, 32), (4, 4)).tolist()
        [[1, 0, 3, 2]]
    """
    (image_height, image_width), (height, width) = image_hw, map_hw
    x1, y1, x2, y2 = _wide(boxes_xyxy).unbind(-1)
    # Divide before multiplying, as the released code does: floor and ceil see the same rounding.
    starts = [(x1 / image_width * width).floor(), (y1 / image_height * height).floor()]
    ends = [(x2 / image_width * width).ceil(), (y2 / image_height * height).ceil()]
    return torch.stack([*starts, *ends], dim=-1).long().clamp(min=0)


def floor_ceil_cells(boxes_xyxy: Tensor, image_hw: tuple[float, float], map_hw: tuple[int, int]) -> BoxCells:
    """The cells of each box by FGD's rule: ``floor_ceil_span``, clipped by the map's edge.

    Example:
        >>> floor_ceil_cells(torch.tensor([[8.0, 0.0, 16.0, 7.0]]), (32, 32), (4, 4)).union().int().tolist()
        [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    """
    span = floor_ceil_span(boxes_xyxy, image_hw, map_hw)
    return _cells(span[:, :2], span[:, 2:] + 1, map_hw)


def truncated_span(boxes_xyxy: Tensor, stride: float, map_hw: tuple[int, int]) -> Tensor:
    """First column and row of each box, and the column and row after its last, by the rule of DeFeat's code.

    All four coordinates are divided by the stride, truncated towards zero and clipped by the map's edge, so the last cell that
    a box covers in part is left out. The span of a small box is empty; ``truncated_cells`` then gives it one cell.

    Args:
        boxes_xyxy: [G, 4] float, pixels of the image.
        stride: pixels of one step on the map.
        map_hw: rows and columns of the map.

    Returns:
        [G, 4] int64 (first column, first row, column after the last, row after the last). Starts are at least 0, ends at most
        the size of the map.

    Example:
        >>> truncated_span(torch.tensor([[8.0, 3.0, 31.0, 7.0]]), stride=8, map_hw=(2, 4)).tolist()
        [[1, 0, 3, 0]]
    """
    span = (_wide(boxes_xyxy) / stride).trunc().long()
    height, width = map_hw
    return torch.cat([span[:, :2].clamp(min=0), span[:, 2:3].clamp(max=width), span[:, 3:].clamp(max=height)], dim=1)


def truncated_cells(boxes_xyxy: Tensor, stride: float, map_hw: tuple[int, int]) -> BoxCells:
    """The cells of each box by the rule of DeFeat's code: truncated, the end exclusive, one cell for a small box.

    Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR 2021, released code; also TADF's masks. Where
    ``truncated_span`` leaves no row or no column, the box has the one cell in which it starts, even if it is long in the other
    direction. The released code fails where that cell lies just beyond the right or bottom edge; here it is the last one on
    the map. A box far beyond the map's edge has no cell. Clip boxes to their image first: a box less than a stride left of it
    or above it is truncated to the first cell.

    Args:
        boxes_xyxy: [G, 4] float, pixels of the image.
        stride: pixels of one step on the map.
        map_hw: rows and columns of the map.

    Example:
        >>> boxes = torch.tensor([[0.0, 8.0, 23.0, 16.0], [25.0, 0.0, 30.0, 32.0]])  # the second is less than a cell wide
        >>> [region.int().tolist() for region in truncated_cells(boxes, 8, (2, 4)).regions()]
        [[[0, 0, 0, 0], [1, 1, 0, 0]], [[0, 0, 0, 1], [0, 0, 0, 0]]]
    """
    start, end = truncated_span(boxes_xyxy, stride, map_hw).split_with_sizes([2, 2], dim=1)
    small = (start == end).any(dim=1, keepdim=True) & (start <= end).all(dim=1, keepdim=True)
    last = torch.stack([start[:, 0].clamp(max=map_hw[1] - 1), start[:, 1].clamp(max=map_hw[0] - 1)], dim=1)
    return _cells(torch.where(small, last, start), torch.where(small, last + 1, end), map_hw)


def center_cells(
    boxes_xyxy: Tensor, stride: float, map_hw: tuple[int, int], offset: float = 0.5, margin: float = 0.0
) -> BoxCells:
    """The cells whose centre lies strictly inside a box: the rule of PGD and of LD's codes, see ``points_inside``.

    Args:
        boxes_xyxy: [G, 4] float, pixels of the image.
        stride: pixels of one step on the map.
        map_hw: rows and columns of the map.
        offset: the centre of the first cell, in strides: 0.5 for points as FCOS has them, 0 for anchors as mmdet has them.
        margin: as in ``points_inside``.

    Example:
        >>> center_cells(torch.tensor([[4.0, 0.0, 21.0, 8.0]]), 8, (1, 4)).union().tolist()
        [[False, True, True, False]]
    """
    boxes, (height, width) = _wide(boxes_xyxy), map_hw
    spans = []
    for count, start, end in ((height, boxes[:, 1], boxes[:, 3]), (width, boxes[:, 0], boxes[:, 2])):
        centers = (torch.arange(count, device=boxes.device, dtype=boxes.dtype) + offset) * stride
        spans.append(((centers - start[:, None]) > margin) & ((end[:, None] - centers) > margin))
    return BoxCells(*spans)


def index_cells(boxes_xyxy: Tensor, image_hw: tuple[float, float], map_hw: tuple[int, int]) -> BoxCells:
    """The cells whose INDEX lies inside a scaled box, ends inclusive: LGD's rule.

    A coordinate x becomes ``x * (W / image width)``; column u belongs to the box if ``|center - u| / size <= 0.5``, rows
    likewise. So regions lie half a cell further left and up than by cell centres. A box without width or height has no cell,
    and a small one may have none. Zhang et al., "LGD: Label-Guided Self-Distillation for Object Detection", AAAI 2022,
    released code.

    Args:
        boxes_xyxy: [G, 4] float, pixels of the image; clamped before as ``positions.boxes_with_context`` does.
        image_hw: height and width in pixels of the area that the map shows: the padded tensor.
        map_hw: rows and columns of the map.

    Example:
        >>> index_cells(torch.tensor([[4.0, 0.0, 16.0, 7.0]]), (8, 32), (1, 4)).union().tolist()
        [[False, True, True, False]]
    """
    boxes = _wide(boxes_xyxy)
    spans = []
    for axis in (1, 0):  # y, then x
        image, count = image_hw[1 - axis], map_hw[1 - axis]
        start, end = boxes[:, axis] * (count / image), boxes[:, axis + 2] * (count / image)
        center, size = (start + end) * 0.5, end - start
        index = torch.arange(count, device=boxes.device)
        spans.append(((center[:, None] - index).abs() / size[:, None]) <= 0.5)  # never true for a size of 0
    return BoxCells(*spans)


def points_inside(points_xy: Tensor, boxes_xyxy: Tensor, margin: float = 0.0) -> Tensor:
    """Which points lie strictly inside which boxes: all four distances to the sides are larger than ``margin``.

    For points of any detector, such as the centres of ``Dense.priors_xyxy``; ``center_cells`` is the same on a regular map.

    Args:
        points_xy: [P, 2] pixels.
        boxes_xyxy: [G, 4] pixels.
        margin: 0 in LD's code, 1e-10 in PGD's (Yang et al., "Prediction-Guided Distillation", ECCV 2022).

    Returns:
        [P, G] bool. A point on a side is outside.

    Example:
        >>> points_inside(torch.tensor([[4.0, 4.0], [8.0, 4.0]]), torch.tensor([[0.0, 0.0, 8.0, 8.0]])).tolist()
        [[True], [False]]
    """
    x, y = _wide(points_xy)[:, :, None].unbind(1)  # [P, 1] each
    x1, y1, x2, y2 = _wide(boxes_xyxy).unbind(1)
    return ((x - x1) > margin) & ((y - y1) > margin) & ((x2 - x) > margin) & ((y2 - y) > margin)


def anchors_near_boxes(anchors_xyxy: Tensor, boxes_xyxy: Tensor, fraction: float = 0.5, plus_one: bool = False) -> Tensor:
    """Select the anchors near a box by the rule of FGFI: their IoU is above a fraction of the box's largest IoU.

    Each box selects the anchors whose IoU with it is larger than ``fraction`` times its largest IoU with any of the given
    anchors; the result is the union over the boxes. A box that overlaps no anchor selects none. Wang et al., "Distilling Object
    Detectors with Fine-grained Feature Imitation", CVPR 2019, released code. DeFeat's masks of type "roi" and LD's fine-grained
    regions use the same rule; the given anchors are those of the box's level only (``level_of_box``), or those of all levels.

    Args:
        anchors_xyxy: [P, 4] pixels; anchors that cross the border of the image are included.
        boxes_xyxy: [G, 4] pixels.
        fraction: psi; with 0 all anchors that overlap a box are selected, with 1 none.
        plus_one: measure widths and heights as ``x2 - x1 + 1``, as FGFI's own code does; False in DeFeat's and LD's.

    Returns:
        [P] bool; all False if there are no boxes.

    Example:
        >>> anchors = torch.tensor([[0.0, 0.0, 8.0, 8.0], [8.0, 0.0, 16.0, 8.0], [16.0, 0.0, 24.0, 8.0]])
        >>> anchors_near_boxes(anchors, torch.tensor([[2.0, 0.0, 9.0, 8.0]])).tolist()
        [True, False, False]
    """
    anchors, boxes = _wide(anchors_xyxy), _wide(boxes_xyxy)
    if plus_one:
        step = boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
        anchors, boxes = anchors + step, boxes + step
    near = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
    for some in torch.split(boxes, max(1, CHUNK // max(1, len(anchors)))):
        overlaps = pairwise_iou(some, anchors)  # [g, P]
        if overlaps.numel():
            near |= (overlaps > fraction * overlaps.amax(dim=1, keepdim=True)).any(dim=0)
    return near


# ------------------------------------------------------------------------------------------------------------ the level


def level_of_box(boxes_xyxy: Tensor, num_levels: int, base: float = 56.0, plus_one: bool = True) -> Tensor:
    """Index of the pyramid level that each box belongs to by its size; 0 is the finest level.

    ``floor(log2(sqrt(width * height) / base + 1e-6))``, clamped to the existing levels: mmdet's rule for regions. Boxes below
    twice the base belong to level 0, below four times to level 1, and so on.

    Args:
        boxes_xyxy: [G, 4] pixels.
        num_levels: number of levels of the pyramid.
        base: side in pixels; 56 for a pyramid that begins at stride 4 (released codes use it for other pyramids, too).
        plus_one: measure widths and heights as ``x2 - x1 + 1``, as DeFeat, FGFI on pyramids, TADF and Mimic do; False in
            SSD-Det's code.

    Returns:
        [G] int64.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 111.0, 111.0], [0.0, 0.0, 110.0, 110.0], [0.0, 0.0, 9999.0, 9999.0]])
        >>> level_of_box(boxes, num_levels=5).tolist()
        [1, 0, 4]

        The masks of DeFeat on a pyramid, each box on its own level:

        >>> levels = level_of_box(boxes, num_levels=2)
        >>> [int(truncated_cells(boxes[levels == l], 4 * 2**l, (8, 8)).union().sum()) for l in range(2)]
        [64, 64]
    """
    boxes = _wide(boxes_xyxy)
    sizes = (boxes[:, 2:] - boxes[:, :2] + (1 if plus_one else 0)).clamp(min=0)
    scale = sizes.prod(dim=1).sqrt()
    return (scale / base + 1e-6).log2().floor().clamp(0, num_levels - 1).long()


def _cells(start: Tensor, end: Tensor, map_hw: tuple[int, int]) -> BoxCells:
    """The cells on the map from ``start`` [G, 2] (column and row) up to ``end``, exclusive."""
    height, width = map_hw
    rows = torch.arange(height, device=start.device)
    columns = torch.arange(width, device=start.device)
    in_rows = (rows >= start[:, 1:]) & (rows < end[:, 1:])
    in_columns = (columns >= start[:, :1]) & (columns < end[:, :1])
    return BoxCells(in_rows, in_columns)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: half precision is off by pixels at the far side of an image."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
