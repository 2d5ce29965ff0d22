"""Losses of DeFeat: foreground and background of maps, and foreground and background predictions, apart.

Shape letters: B images, C channels, H x W cells of a level, G boxes of an image, R regions or cells of the batch, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from detdistill.functional.cells import level_of_box, truncated_cells
from detdistill.functional.counting import divisor_over_ranks, mean_over_ranks
from detdistill.functional.masks import union_mask
from detdistill.functional.soft_targets import binary_kl_divergence, kl_divergence

Normalization = Literal["level", "pyramid"]
Decay = Literal["none", "linear", "cosine", "up_down"]


class DeFeatTerms(NamedTuple):
    """The unweighted losses of a part of the detector, [] each."""

    foreground: Tensor
    background: Tensor


def defeat_masks(
    boxes_xyxy: Sequence[Tensor], strides: Sequence[float], maps_hw: Sequence[tuple[int, int]], base: float = 56.0
) -> list[Tensor]:
    """Foreground of each level: the cells of the boxes that belong to the level by their size.

    Each box marks one level (``cells.level_of_box``), by truncated coordinates with an exclusive end (``cells.truncated_cells``).

    Args:
        boxes_xyxy: B tensors [G, 4] in pixels, clipped to their images.
        strides: strides of L levels in pixels, finest first.
        maps_hw: rows and columns of the L maps.
        base: side in pixels; boxes of less than twice this side belong to the finest level.

    Returns:
        L masks [B, H, W] bool; all False for an image without boxes.

    Example:
        >>> boxes = [torch.tensor([[0.0, 0.0, 20.0, 8.0], [0.0, 0.0, 120.0, 120.0]])]
        >>> fine, coarse = defeat_masks(boxes, (8, 64), [(2, 3), (1, 2)])
        >>> fine.int().tolist(), coarse.int().tolist()
        ([[[1, 1, 0], [0, 0, 0]]], [[[1, 0]]])
    """
    levels = [level_of_box(boxes, len(strides), base) for boxes in boxes_xyxy]
    masks = []
    for index, (stride, map_hw) in enumerate(zip(strides, maps_hw, strict=True)):
        own = [boxes[level == index] for boxes, level in zip(boxes_xyxy, levels, strict=True)]
        masks.append(union_mask([truncated_cells(boxes, stride, map_hw) for boxes in own]))
    return masks


def defeat_backbone_masks(
    boxes_xyxy: Sequence[Tensor], stride: float, grid_hw: tuple[int, int], maps_hw: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Foreground of the backbone's maps: the cells of all boxes on the grid of the neck's finest level, resized to each map.

    Args:
        boxes_xyxy: B tensors [G, 4] in pixels, clipped to their images.
        stride: stride of the neck's finest level in pixels.
        grid_hw: rows and columns of the neck's finest level.
        maps_hw: rows and columns of the backbone's L maps.

    Returns:
        L masks [B, H, W] bool, each cell that of the nearest cell of the grid.
    """
    fine = union_mask([truncated_cells(boxes, stride, grid_hw) for boxes in boxes_xyxy])
    return [nearest_mask(fine, map_hw) for map_hw in maps_hw]


def nearest_mask(mask: Tensor, map_hw: tuple[int, int]) -> Tensor:
    """Resize masks [B, h, w] bool to [B, H, W]: each cell is that of the nearest cell."""
    return torch.nn.functional.interpolate(mask[:, None].float(), size=map_hw, mode="nearest")[:, 0] > 0


def defeat_map_terms(
    student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor], normalization: Normalization = "level"
) -> DeFeatTerms:
    """Half the mean squared difference over the foreground, and over the background.

    Args:
        student: L maps [B, C, H, W] in the teacher's channels and at its size; gradient flows.
        teacher: L maps of the same shapes, treated as constant.
        masks: L masks [B, H, W] bool, True for foreground.
        normalization: ``level``: the mean of each level, then the mean over levels (released code); ``pyramid``: one mean over
            the numbers of all levels. An empty region gives 0.

    Returns:
        Both losses; means over images, channels and cells.

    Example:
        >>> mask = torch.tensor([[[True, False, False]]])
        >>> terms = defeat_map_terms([torch.ones(1, 4, 1, 3)], [torch.zeros(1, 4, 1, 3)], [mask])
        >>> terms.foreground.item(), terms.background.item()
        (0.5, 0.5)
    """
    sums, counts = [], []
    for mine, fixed, mask in zip(student, teacher, masks, strict=True):
        cells = (mine - fixed.detach()).square().sum(dim=1)
        regions = torch.stack([mask, ~mask])
        sums.append((cells * regions).sum(dim=(1, 2, 3)))
        counts.append(2 * mine.shape[1] * regions.sum(dim=(1, 2, 3)))
    total, count = torch.stack(sums), torch.stack(counts)  # [L, 2]
    if normalization == "pyramid":
        total, count = total.sum(dim=0, keepdim=True), count.sum(dim=0, keepdim=True)
    return DeFeatTerms(*(total / mean_over_ranks(count, least=1)).mean(dim=0))


def defeat_head_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    foreground: Tensor,
    background: Tensor,
    temperature: float = 1.0,
    background_temperature: float | None = None,
    softmax: bool = True,
) -> DeFeatTerms:
    """Divergence of the class scores, ``T^2 KL(teacher || student)``, averaged over foreground and over background predictions.

    Args:
        student_logits: [R, K+1] softmax or [R, K] sigmoid logits; gradient flows.
        teacher_logits: the same shape, treated as constant.
        foreground: [R] bool, True for predictions of an object.
        background: [R] bool; predictions in neither group are ignored.
        temperature: T of the foreground.
        background_temperature: T of the background; None: that of the foreground, as in the released code.
        softmax: False: the sum of the divergences of the K two-way distributions, for sigmoid scores (our reading of the paper's
            one-stage form, for which the released code is incomplete).

    Returns:
        Both losses; 0 for an empty group.

    Example:
        >>> student, teacher = torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0], [9.0, 9.0]])
        >>> terms = defeat_head_terms(student, teacher, torch.tensor([True, False, False]), torch.tensor([False, True, True]))
        >>> round(terms.foreground.item(), 4), terms.background.item()
        (0.1109, 0.0)
    """
    means = []
    for group, t in ((foreground, temperature), (background, background_temperature or temperature)):
        mine, fixed = student_logits[group], teacher_logits[group].detach()
        if softmax:
            divergence = kl_divergence(mine, fixed, t)
        else:
            divergence = t**2 * binary_kl_divergence(mine / t, fixed / t).sum(dim=-1)
        means.append(divergence.sum() / divisor_over_ranks(len(mine), mine))
    return DeFeatTerms(*means)


def defeat_decay(progress: float, decay: Decay) -> float:
    """Factor of all losses in the course of training.

    Args:
        progress: 0 at the first step, 1 at the end.
        decay: ``linear``: from 1 to 0; ``cosine``: from 1 to 0 by half a cosine; ``up_down``: from 1 to 2 in the first quarter,
            then to 0; ``none``: 1.

    Example:
        >>> [defeat_decay(progress, "up_down") for progress in (0.0, 0.25, 1.0)]
        [1.0, 2.0, 0.0]
    """
    if decay == "linear":
        return 1 - progress
    if decay == "cosine":
        return 0.5 * float(torch.cos(torch.tensor(torch.pi * progress, dtype=torch.float64))) + 0.5
    if decay == "up_down":
        return 1 + 4 * progress if progress < 0.25 else 2 - 2 * (progress - 0.25) / 0.75
    return 1.0
