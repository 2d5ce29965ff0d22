"""Losses of HEAD: an assistant's or a student's layers against the teacher's, and the masked loss between necks.

Shape letters: B images, R regions of the whole batch, D width of a layer, C channels, H x W cells of a level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.functional.cells import BoxCells
from detdistill.functional.counting import share_over_ranks
from detdistill.structures import Origin


def head_layer_loss(student: Sequence[Tensor], target: Sequence[Tensor], weight: float = 2.0) -> Tensor:
    """Mean squared difference of matching layers, summed over layers: ``sum_l weight * mean((s_l - t_l)^2)``.

    The released code gives each layer the weight; the paper averages the layers, so its factor is ``weight`` times their number.
    It serves AKD (fully connected layers of two region heads, or towers of two dense heads, level by level), the CKD of two dense
    heads, and the dense assistant without a teacher.

    Args:
        student: layers or levels of any shape, after their adapters; gradient flows.
        target: layers of the same shapes, treated as constant.
        weight: factor of each layer; 2 for fully connected layers, 1 for towers.

    Returns:
        [] the loss; a layer without rows adds 0, connected to the student.

    Example:
        >>> float(head_layer_loss([torch.ones(3, 4), torch.zeros(3, 4)], [torch.zeros(3, 4), torch.zeros(3, 4)]))
        2.0
    """
    means = [_mean_square(mine, fixed) for mine, fixed in zip(student, target, strict=True)]
    return weight * torch.stack(means).sum()


def head_ckd_loss(student: Tensor, target: Tensor, origin: Origin, weight: float = 2.0) -> Tensor:
    """Mean squared difference between the student's cells and a region head's features of the boxes that came from them (CKD).

    Args:
        student: [R', D] vectors of the R' regions with an origin cell, in their order (``features_at_origin``), after psi;
            gradient flows.
        target: [R, D] last hidden layer of the region head of the teacher (or assistant), treated as constant. Rows of regions
            without an origin cell (ground truth) are left out.
        origin: origin of the R regions.
        weight: factor; 2 with a teacher, 1.3 without.

    Returns:
        [] the loss; 0, connected to the student, if no region has an origin cell (the released code gives NaN).

    Example:
        >>> origin = Origin(*(torch.tensor(part) for part in ([0, 0], [0, -1], [[1, 0], [-1, -1]], [0, -1], [-1, 0])))
        >>> float(head_ckd_loss(torch.ones(1, 4), torch.zeros(2, 4), origin))
        2.0
    """
    return weight * _mean_square(student, target[origin.level >= 0])


def _mean_square(student: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference, over all processes; 0, connected to the student, of tensors without entries."""
    share = share_over_ranks(torch.tensor(float(student.numel()), device=student.device))
    return F.mse_loss(student, target.detach()) * share if student.numel() else student.sum()


def head_neck_mask(boxes_xyxy: Sequence[Tensor], stride: float, map_hw: tuple[int, int], negative_gain: float = 9.0) -> Tensor:
    """Weights of a level's cells: the cells of all boxes share a weight of 1, all others a weight of ``negative_gain``.

    A box covers the cells from its truncated start to the one after its truncated end, as in the released code.

    Args:
        boxes_xyxy: B tensors [G, 4] in pixels; an image may have none.
        stride: pixels of a cell.
        map_hw: rows and columns of the level.
        negative_gain: sum of the background's weights.

    Returns:
        [B, H, W].

    Example:
        >>> head_neck_mask([torch.tensor([[0.0, 0.0, 7.0, 7.0]])], 8, (1, 4), negative_gain=1.0).tolist()
        [[[0.5, 0.5, 0.5, 0.5]]]
    """
    masks = torch.stack([_covered(boxes, stride, map_hw) for boxes in boxes_xyxy])
    foreground, background = (side / side.sum(dim=(1, 2), keepdim=True).clamp(min=1) for side in (masks, 1 - masks))
    return foreground + negative_gain * background


def _covered(boxes_xyxy: Tensor, stride: float, map_hw: tuple[int, int]) -> Tensor:
    """[H, W] 1 for cells of any box, else 0."""
    boxes = boxes_xyxy.float() / stride
    start, end = boxes[:, :2].trunc().clamp(min=0), boxes[:, 2:].trunc() + 2
    spans = []
    for axis, count in ((1, map_hw[0]), (0, map_hw[1])):
        index = torch.arange(count, device=boxes.device)
        spans.append((index >= start[:, axis, None]) & (index < end[:, axis, None]))
    return BoxCells(*spans).union().float()


def head_neck_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor], weight: float = 0.1) -> Tensor:
    """Masked mean squared difference of necks: mean over images, channels and cells of ``mask * (s - t)^2``, summed over levels.

    An extra of the released code of June 2022. The masks are normalised and the mean divides by all cells again, so the loss is
    small.

    Args:
        student: L maps [B, C, H, W] in the teacher's channels; gradient flows.
        teacher: L maps of the same shapes, treated as constant.
        masks: L weights [B, H, W] (``head_neck_mask``).
        weight: factor; 0.1 or 1 in released settings.

    Returns:
        [] the loss.
    """
    levels = []
    for mine, fixed, mask in zip(student, teacher, masks, strict=True):
        squares = (mine - fixed.detach()).square().mean(dim=1)  # [B, H, W]
        levels.append((squares * mask).mean())
    return weight * torch.stack(levels).sum()
