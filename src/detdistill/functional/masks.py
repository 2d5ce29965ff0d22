"""Foreground masks from boxes or from a teacher's predictions, and boxes drawn as maps.

The rules for the cells that a box covers are in ``functional.cells``. All masks are constants: no gradient flows to boxes or
predictions.

Shape letters: B images, G boxes of an image, H x W cells of a map, K classes, P predictions of an image, A anchors of a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from detdistill.functional.assign import pairwise_iou
from detdistill.functional.cells import CHUNK, BoxCells, floor_ceil_cells, truncated_cells, truncated_span
from detdistill.functional.dense_maps import prediction_grid
from detdistill.structures import Dense

# ---------------------------------------------------------------------------------------------------------- from boxes


def union_mask(cells: Sequence[BoxCells]) -> Tensor:
    """Cells that any box of their image covers, by any rule of ``functional.cells``.

    Args:
        cells: covered cells of each of B images, on maps of equal size; an image without boxes has no foreground.

    Returns:
        [B, H, W] bool.

    Example:
        >>> from detdistill.functional.cells import center_cells
        >>> boxes = [torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.zeros(0, 4)]
        >>> union_mask([center_cells(some, stride=8, map_hw=(1, 2)) for some in boxes]).tolist()
        [[[True, False]], [[False, False]]]
    """
    return torch.stack([image.union() for image in cells])


def foreground_mask(boxes_xyxy: Sequence[Tensor], image_hw: Sequence[tuple[float, float]], map_hw: tuple[int, int]) -> Tensor:
    """Cells that any box of their image covers, by FGD's rule (``cells.floor_ceil_cells``); every box counts on every level.

    Args:
        boxes_xyxy: B tensors [G_b, 4]; an image without boxes has no foreground.
        image_hw: B pairs of height and width, see ``cells.floor_ceil_span``.
        map_hw: rows and columns of the map.

    Returns:
        [B, H, W] bool.
    """
    pairs = zip(boxes_xyxy, image_hw, strict=True)
    return union_mask([floor_ceil_cells(boxes, size, map_hw) for boxes, size in pairs])


def gaussian_mask(boxes_xyxy: Sequence[Tensor], stride: float, map_hw: tuple[int, int], variance: float = 2.0) -> Tensor:
    """TADF's mask: a Gaussian over each box with its maximum in the middle; where boxes overlap, the largest value.

    ``exp(-((x - x0) / (w / 2))^2 / variance) * exp(-((y - y0) / (h / 2))^2 / variance)`` on the cells of the box, 0 elsewhere.
    Sun et al., "Distilling Object Detectors with Task Adaptive Regularization", 2020, discretised as in DeFeat's code. The
    cells are those of ``cells.truncated_cells``. The middle of w columns counted from 0 is w / 2, so the first column is
    further from it than the last. A box smaller than a cell has the value 1 in its one cell.

    Args:
        boxes_xyxy: B tensors [G_b, 4], pixels of the image; the boxes of this level only (``cells.level_of_box``), or all.
        stride: stride of the map in pixels.
        map_hw: rows and columns of the map.
        variance: the paper's sigma squared, in units of half the box's sides.

    Returns:
        [B, H, W] in the boxes' dtype, at least float32; 0..1, all 0 for an image without boxes.

    Example:
        >>> gaussian_mask([torch.tensor([[0.0, 0.0, 16.0, 16.0]])], stride=8, map_hw=(2, 3))[0].log().tolist()
        [[-1.0, -0.5, -inf], [-0.5, 0.0, -inf]]
    """
    return torch.stack([_largest_bell(boxes.detach(), stride, map_hw, variance) for boxes in boxes_xyxy])


def _largest_bell(boxes: Tensor, stride: float, map_hw: tuple[int, int], variance: float) -> Tensor:
    cells, span = truncated_cells(boxes, stride, map_hw), truncated_span(boxes, stride, map_hw)
    small = (span[:, :2] == span[:, 2:]).any(dim=1, keepdim=True)
    bells = []
    for axis, inside in ((1, cells.rows), (0, cells.columns)):
        start, count = span[:, axis, None], (span[:, axis + 2, None] - span[:, axis, None])
        half = (count.to(torch.promote_types(boxes.dtype, torch.float32)) / 2).masked_fill(count == 0, 1)
        index = torch.arange(inside.shape[1], device=boxes.device)
        bell = torch.exp(-(((index - start) - half) / half).square() / variance)
        bells.append(bell.masked_fill(small, 1).masked_fill(~inside, 0))
    return maximum_over_boxes(bells[0], bells[1], torch.mul)


def label_map(
    boxes_xyxy: Sequence[Tensor],
    labels: Sequence[Tensor],
    image_hw: tuple[int, int],
    num_classes: int,
    intensity: Sequence[Tensor] | None = None,
) -> Tensor:
    """Draw ground truth as one plane for each class: the input of LabelEnc.

    At pixel (x, y), whole numbers from 0, a box with centre (cx, cy) has the value ``1 - max(|x - cx| / w, |y - cy| / h)``: 1 in
    its middle, 0.5 on its border, 0 outside. Where boxes of a class overlap, the largest value is taken. Hao et al.,
    "LabelEnc: A New Intermediate Supervision Method for Object Detection", ECCV 2020, released code.

    Args:
        boxes_xyxy: B tensors [G_b, 4], pixels. Boxes narrower or lower than one pixel are left out; in the released code a box
            without area makes the whole map NaN.
        labels: B tensors [G_b] int64, 0 .. K-1.
        image_hw: height and width of the padded batch.
        num_classes: K.
        intensity: B tensors [G_b], a factor for each box (the paper's augmentation: ``min(1, 2 u)`` with u uniform in 0..1);
            None: 1.

    Returns:
        [B, K, H, W] in the boxes' dtype, at least float32; 0 or 0.5..1 without ``intensity``, all 0 without boxes.

    Example:
        >>> label_map([torch.tensor([[1.0, 0.0, 3.0, 2.0]])], [torch.tensor([0])], (3, 5), num_classes=1)[0, 0].tolist()
        [[0.0, 0.5, 0.5, 0.5, 0.0], [0.0, 0.5, 1.0, 0.5, 0.0], [0.0, 0.5, 0.5, 0.5, 0.0]]
    """
    factors = [None] * len(boxes_xyxy) if intensity is None else intensity
    images = []
    for boxes, own, factor in zip(boxes_xyxy, labels, factors, strict=True):
        wide = boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32))
        planes = wide.new_zeros(num_classes, *image_hw)
        visible = (wide[:, 2:] - wide[:, :2] >= 1).all(dim=1)
        for label in sorted(set(own[visible].tolist())):
            mine = visible & (own == label)
            planes[label] = _largest_tent(wide[mine], image_hw, None if factor is None else factor[mine])
        images.append(planes)
    return torch.stack(images)


def _largest_tent(boxes: Tensor, image_hw: tuple[int, int], factor: Tensor | None) -> Tensor:
    slopes = []
    for axis in (1, 0):
        start, end = boxes[:, axis, None], boxes[:, axis + 2, None]
        place = torch.arange(image_hw[1 - axis], device=boxes.device, dtype=boxes.dtype)
        slope = 1 - (place - (start + end) / 2).abs() / (end - start)
        slope = slope.masked_fill(slope < 0.5, 0)
        slopes.append(slope if factor is None else slope * factor[:, None])
    return maximum_over_boxes(slopes[0], slopes[1], torch.minimum)


def maximum_over_boxes(down: Tensor, across: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Maximum over G boxes at each cell, where a box's value combines one number for the row and one for the column.

    Boxes are processed in chunks, so that many boxes on a fine map need no tensor [G, H, W].

    Args:
        down: [G, H] numbers for the rows: at least 0, and 0 in rows outside the box.
        across: [G, W] numbers for the columns: at least 0, and 0 in columns outside the box.
        combine: ``torch.mul`` or ``torch.minimum``.

    Returns:
        [H, W]; 0 in cells without a box.

    Example:
        >>> down, across = torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([[3.0, 0.0], [1.0, 1.0]])
        >>> maximum_over_boxes(down, across, torch.mul).tolist()
        [[1.0, 1.0], [6.0, 1.0]]
    """
    largest = down.new_zeros(down.shape[1], across.shape[1])
    count = max(1, CHUNK // max(1, largest.numel()))
    for rows, columns in zip(torch.split(down, count), torch.split(across, count), strict=True):
        if len(rows):
            largest = torch.maximum(largest, combine(rows[:, :, None], columns[:, None, :]).amax(dim=0))
    return largest


# ---------------------------------------------------------------------------------------------------- from predictions


def best_scores(logits: Tensor, softmax: bool = False) -> Tensor:
    """The largest probability of any object class.

    Args:
        logits: [..., K] sigmoid logits, or [..., K+1] softmax logits with the background last; treated as constant.
        softmax: the logits are softmax logits.

    Returns:
        [...] 0..1, at least float32.

    Example:
        >>> best_scores(torch.tensor([0.0, -1.0])).item(), best_scores(torch.tensor([0.0, 0.0, 9.0]).log(), softmax=True).item()
        (0.5, 0.0)
    """
    fixed = logits.detach()
    fixed = fixed.float() if fixed.dtype.itemsize < 4 else fixed
    return fixed.softmax(dim=-1)[..., :-1].amax(dim=-1) if softmax else fixed.amax(dim=-1).sigmoid()


def score_mask(prediction: Dense, level: int) -> Tensor:
    """Largest class probability in each cell, over classes and anchors.

    The feature richness of FRS (Du et al., "Distilling Object Detectors with Feature Richness", NeurIPS 2021) and TBD's mask
    for classes. The mask is soft: it is not thresholded, and is above 0 also in cells without objects. For a first stage (RPN)
    it is the objectness. For softmax outputs, which FRS does not treat, the background column is left out.

    Args:
        prediction: treated as constant.
        level: number of the level in ``prediction.levels``.

    Returns:
        [B, H, W] 0..1, at least float32.

    Raises:
        DetdistillError: as ``dense_maps.prediction_grid``.
    """
    logits = prediction.logits[:, prediction_grid(prediction, level)]  # [B, A, H, W, K or K+1]
    return best_scores(logits, prediction.softmax).amax(dim=1)


def overlap_mask(prediction: Dense, level: int, boxes_xyxy: Sequence[Tensor]) -> Tensor:
    """Largest IoU in each cell between a predicted box of the cell and any ground-truth box.

    TBD's mask for boxes (a reconstruction: Tang et al., "Task-balanced distillation for object detection", 2023, has no code).

    Args:
        prediction: decoded boxes, treated as constant.
        level: number of the level in ``prediction.levels``.
        boxes_xyxy: B tensors [G_b, 4] of ground truth; an image without boxes has 0 everywhere.

    Returns:
        [B, H, W] 0..1, at least float32.

    Raises:
        DetdistillError: as ``dense_maps.prediction_grid``.
    """
    found = prediction.boxes_xyxy.detach()[:, prediction_grid(prediction, level)]  # [B, A, H, W, 4]
    found = found.float() if found.dtype.itemsize < 4 else found
    masks = []
    for mine, wanted in zip(found, boxes_xyxy, strict=True):
        best = mine.new_zeros(mine.shape[:3].numel())
        for some in torch.split(wanted.to(mine.dtype), max(1, CHUNK // len(best))):
            if len(some):
                best = torch.maximum(best, pairwise_iou(some, mine.flatten(0, 2)).amax(dim=0))
        masks.append(best.view(mine.shape[:3]).amax(dim=0))
    return torch.stack(masks)
