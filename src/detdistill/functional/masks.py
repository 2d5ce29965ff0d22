"""Maps of weights made from boxes: which cells are foreground."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detdistill.functional.cells import BoxCells, floor_ceil_cells


def union_mask(cells: Sequence[BoxCells]) -> Tensor:
    """Cells that any box of their image covers, by any rule of ``functional.cells``.

    Args:
        cells: one for each of B images, on maps of one size; an image without boxes has no foreground.

    Returns:
        [B, H, W] bool.
    """
    return torch.stack([image.union() for image in cells])


def foreground_mask(boxes_xyxy: Sequence[Tensor], image_hw: Sequence[tuple[float, float]], map_hw: tuple[int, int]) -> Tensor:
    """Cells that any box of their image covers, by FGD's rule (``cells.floor_ceil_cells``); every box counts on every level.

    Args:
        boxes_xyxy: B tensors [G_b, 4]; an image without boxes has no foreground.
        image_hw: B pairs, see ``floor_ceil_cells``.
        map_hw: rows and columns of the map.

    Returns:
        [B, H, W] bool.
    """
    pairs = zip(boxes_xyxy, image_hw, strict=True)
    return union_mask([floor_ceil_cells(boxes, size, map_hw) for boxes, size in pairs])
