"""Vector codes of places and labelled boxes: sine position codes, and descriptors of ground-truth boxes.

Each code follows the paper or code it is named after; the codes differ in order, scale and the place of a cell.

Shape letters: B images, N boxes or queries of an image, D channels, H x W cells of a map, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NO_CLASS = -1
"""Label of a box that is no object; its one-hot class is all zeros."""

# ----------------------------------------------------------------------------------------------------------- sine codes


def sine_positions(places: Tensor, channels: int) -> Tensor:
    """Sine and cosine code of places, y in the first half of the channels, x in the second; temperature 10000 (as in DETR).

    Channel 2k of a half is ``sin(2 pi y / 10000^(4k / D))``, channel 2k + 1 the cosine.

    Args:
        places: [..., 2] x and y, 0..1; scaled to 0..2 pi, so that equal places on different levels have equal codes.
        channels: D, any number.

    Returns:
        [..., D].

    Example:
        >>> sine_positions(torch.tensor([0.25, 0.5]), 4).round().int().tolist()  # y: sine and cosine of pi; x: of pi / 2
        [0, -1, 1, 0]
    """
    count = math.ceil(channels / 4)  # sine and cosine of each frequency, for each of two axes
    angles = _angles(places, count)
    codes = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # [..., 2, 2 * count]
    return codes.flip(-2).flatten(-2)[..., :channels]


def detr_positions(padding: Tensor, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """DETR's position code of each cell, relative to the valid cells of its image.

    ``sine_positions`` of ``row / (valid rows + 1e-6)`` and ``column / (valid columns + 1e-6)``, with rows and columns counted
    from 1. The last valid row is therefore at 1, and not at ``1 - 0.5 / H`` as for centres of cells
    (``deformable.cell_centers``). Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, released code. Also
    used for the keys of ICD.

    Args:
        padding: [B, H, W] bool, True where a cell shows padding only; valid cells are a rectangle from the top left corner.
        channels: D.
        dtype: type of the result.

    Returns:
        [B, H, W, D]; the codes of padded cells have no meaning.

    Example:
        >>> one_row = torch.zeros(1, 1, 2, dtype=torch.bool)
        >>> detr_positions(one_row, 4)[0, 0, :, 2:].round().int().tolist()  # x: sine and cosine of pi, and of 2 pi
        [[0, -1], [0, 1]]
    """
    valid = (~padding).to(torch.promote_types(dtype, torch.float32))  # half precision cannot count the cells of a fine map
    rows, columns = valid.cumsum(dim=1), valid.cumsum(dim=2)
    y, x = rows / (rows[:, -1:] + 1e-6), columns / (columns[:, :, -1:] + 1e-6)
    return sine_positions(torch.stack([x, y], dim=-1), channels).to(dtype)


def _angles(places: Tensor, count: int) -> Tensor:
    """[..., 2, count] angles of places [..., 2]; angle k is ``2 pi place / 10000^(k / count)``."""
    exponents = torch.arange(count, device=places.device, dtype=places.dtype) / count
    return places[..., None] * (2 * math.pi / 10000**exponents)


# ---------------------------------------------------------------------------------------------------------- descriptors


def relative_boxes(boxes_xyxy: Tensor, size_hw: Tensor | tuple[float, float]) -> Tensor:
    """Boxes as centre and size, as fractions of the image: UniKD's descriptor without the class.

    Lao et al., "UniKD", ICCV 2023, equation 3. DETRs predict boxes in the same form.

    Args:
        boxes_xyxy: [..., 4] pixels.
        size_hw: [2] height and width of the valid image in pixels.

    Returns:
        [..., 4] cxcywh, 0..1 for boxes inside the image.

    Example:
        >>> relative_boxes(torch.tensor([[0.0, 2.0, 8.0, 4.0]]), (4, 16)).tolist()
        [[0.25, 0.75, 0.5, 0.5]]
    """
    height_width = size_hw if isinstance(size_hw, Tensor) else boxes_xyxy.new_tensor(size_hw)
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=-1) / height_width.flip(0).repeat(2)


def point_descriptors(points_xy01: Tensor, sizes_wh: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """ICD's descriptor of an object: one-hot class, sine code of a point, one-hot bins of the box's width and height.

    K numbers for the class. 128 for x and 128 for y: 64 sines, then 64 cosines, of ``2 pi x / 10000^(k / 64)``
    (``sine_positions`` alternates sines and cosines, and begins with y). 5 bins for the width and 5 for the height; bin
    ``floor(clamp(1.44 ln(pixels) - 5, 0, 4))`` is 1. Kang et al., "Instance-Conditional Knowledge Distillation for Object
    Detection", NeurIPS 2021, released PyTorch code; that code computes the pixels of all images from the size of the last one.

    Args:
        points_xy01: [..., 2] x and y as fractions of the image; ICD draws them near the centre of a box.
        sizes_wh: [..., 2] width and height of the box in pixels. For a side of 0 all bins are 0 (used for padded queries).
        labels: [...] int64 class of the box, 0 .. K-1.
        num_classes: K.

    Returns:
        [..., K + 266] in the points' dtype.

    Example:
        >>> point, size, label = torch.zeros(1, 2), torch.tensor([[100.0, 2000.0]]), torch.tensor([1])
        >>> code = point_descriptors(point, size, label, num_classes=3)
        >>> code[0, :3].tolist(), code[0, 3:259].sum().item(), code[0, 259:].tolist()
        ([0.0, 1.0, 0.0], 128.0, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    """
    angles = _angles(points_xy01, 64)
    sines = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # [..., 256]
    sizes = sizes_wh.to(points_xy01.dtype).clamp(min=0)
    number = (1.44 * sizes.log() - 5).clamp(0, 4).floor()  # 0 for a side of 0, too
    bins = (number[..., None] == torch.arange(5, device=number.device)) & (sizes[..., None] > 0)
    return torch.cat([_one_hot(labels, num_classes, sines.dtype), sines, bins.flatten(-2).to(sines.dtype)], dim=-1)


def boxes_with_context(boxes_xyxy: Tensor, labels: Tensor, image_hw: tuple[int, int], context: bool) -> tuple[Tensor, Tensor]:
    """The boxes that LGD describes: boxes clamped to the pixels of the image, followed by a box over the whole image.

    Zhang et al., "LGD: Label-Guided Self-Distillation for Object Detection", AAAI 2022, released code.

    Args:
        boxes_xyxy: [G, 4] pixels of one image.
        labels: [G] int64, 0 .. K-1.
        image_hw: height and width of the padded batch.
        context: add the box over the whole image.

    Returns:
        Boxes [N, 4], x in 0 .. width - 1 and y in 0 .. height - 1, and labels [N]. N is G, or G + 1 with ``context``; the label
        of the context box is ``NO_CLASS``. If G is 0, the result is one box (0, 0, 1, 1) with label ``NO_CLASS``.

    Example:
        >>> boxes, labels = boxes_with_context(torch.tensor([[2.0, -1.0, 9.0, 3.0]]), torch.tensor([5]), (4, 8), context=True)
        >>> boxes.tolist(), labels.tolist()
        ([[2.0, 0.0, 7.0, 3.0], [0.0, 0.0, 7.0, 3.0]], [5, -1])
    """
    height, width = image_hw
    none = labels.new_full((1,), NO_CLASS)
    if len(boxes_xyxy) == 0:
        boxes_xyxy, labels = boxes_xyxy.new_tensor([[0.0, 0.0, 1.0, 1.0]]), none
    elif context:
        whole = boxes_xyxy.new_tensor([[0.0, 0.0, width, height]])
        boxes_xyxy, labels = torch.cat([boxes_xyxy, whole]), torch.cat([labels, none])
    x, y = boxes_xyxy[:, 0::2].clamp(0, width - 1), boxes_xyxy[:, 1::2].clamp(0, height - 1)
    return torch.stack([x, y], dim=-1).flatten(1), labels


def corner_descriptors(boxes_xyxy: Tensor, labels: Tensor, image_hw: tuple[int, int], num_classes: int) -> Tensor:
    """LGD's descriptor of a box: corners as fractions of the image, then the one-hot class, all scaled to -1..1.

    ``2 d - 1`` with d = (x1 / width, y1 / height, x2 / width, y2 / height, one-hot class); classes other than the box's own are
    -1. LGD (see ``boxes_with_context``), released code.

    Args:
        boxes_xyxy: [N, 4] pixels, from ``boxes_with_context``.
        labels: [N] int64, 0 .. K-1, or ``NO_CLASS``.
        image_hw: height and width of the padded batch.
        num_classes: K.

    Returns:
        [N, 4 + K] in the boxes' dtype.

    Example:
        >>> corner_descriptors(torch.tensor([[0.0, 1.0, 4.0, 3.0]]), torch.tensor([1]), (4, 8), num_classes=2).tolist()
        [[-1.0, -0.5, 0.0, 0.5, -1.0, 1.0]]
    """
    height, width = image_hw
    corners = boxes_xyxy / boxes_xyxy.new_tensor([width, height, width, height])
    return 2 * torch.cat([corners, _one_hot(labels, num_classes, corners.dtype)], dim=-1) - 1


def _one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """[..., K] one-hot classes; all zeros for ``NO_CLASS``."""
    return (labels[..., None] == torch.arange(num_classes, device=labels.device)).to(dtype)
