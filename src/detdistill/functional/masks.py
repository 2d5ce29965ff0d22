"""Which cells of a feature map belong to ground-truth boxes, by FGD's rule.

Every box counts on every level. A box covers the cells from the floor of its start to the ceil of its end, BOTH ENDS
INCLUSIVE, so a box whose edges lie on the grid covers one row and one column more than it fills (FGD, CVPR 2022, released
code; the paper only says "inside the box").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def box_cells(boxes_xyxy: Tensor, image_hw: tuple[float, float], map_hw: tuple[int, int]) -> Tensor:
    """First and last column and row of each box on a map.

    Args:
        boxes_xyxy: [G, 4] float, pixels of the image.
        image_hw: height and width in pixels of what the map shows. The padded tensor's size is geometrically right; the
            released code of FGD divides by the size before padding.
        map_hw: rows and columns of the map.

    Returns:
        [G, 4] int64 ``(wmin, hmin, wmax, hmax)``; ends are inclusive and may lie beyond the map's edge (FGD needs the area
        before clipping); negative ones become 0, where the released code would count from the map's other side.

    Example:
        >>> box_cells(torch.tensor([[8.0, -3.0, 17.0, 16.0]]), (32, 32), (4, 4)).tolist()
        [[1, 0, 3, 2]]
    """
    (image_height, image_width), (height, width) = image_hw, map_hw
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    # Divide before multiplying, as the released code does: floor and ceil see the same rounding.
    starts = [(x1 / image_width * width).floor(), (y1 / image_height * height).floor()]
    ends = [(x2 / image_width * width).ceil(), (y2 / image_height * height).ceil()]
    return torch.stack([*starts, *ends], dim=-1).long().clamp(min=0)


def cell_regions(cells: Tensor, map_hw: tuple[int, int]) -> Tensor:
    """[G, H, W] bool: the region of each of ``box_cells``' [G, 4] on a map of H x W, clipped by the map's edge."""
    height, width = map_hw
    wmin, hmin, wmax, hmax = cells[:, :, None].unbind(1)  # [G, 1] each
    rows = torch.arange(height, device=cells.device)
    columns = torch.arange(width, device=cells.device)
    in_rows = (rows >= hmin) & (rows <= hmax)  # [G, H]
    in_columns = (columns >= wmin) & (columns <= wmax)  # [G, W]
    return in_rows[:, :, None] & in_columns[:, None, :]


def foreground_mask(boxes_xyxy: Sequence[Tensor], image_hw: Sequence[tuple[float, float]], map_hw: tuple[int, int]) -> Tensor:
    """Cells that any box of their image covers.

    Args:
        boxes_xyxy: B tensors [G_b, 4]; an image without boxes has no foreground.
        image_hw: B pairs, see ``box_cells``.
        map_hw: rows and columns of the map.

    Returns:
        [B, H, W] bool.
    """
    pairs = zip(boxes_xyxy, image_hw, strict=True)
    return torch.stack([cell_regions(box_cells(boxes, size, map_hw), map_hw).any(dim=0) for boxes, size in pairs])
