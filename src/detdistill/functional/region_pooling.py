"""RoIAlign whose gradient is fast on a CPU.

torchvision's backward pass on a CPU computes the cells and weights of every sample anew for each channel. Here they are computed
once, as a sparse matrix from cells to bins, and the gradient is one product with its transpose. Values are torchvision's own.

Shape letters: B images, C channels, H rows and W columns of a map, R regions, S side of a pooled region, n samples along a bin's
side.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torchvision.ops import roi_align

from detdistill.functional.scattered_rows import scattered_rows


def pool_rois(maps: Tensor, rois: Tensor, size: int, scale: float, sampling_ratio: int, aligned: bool) -> Tensor:
    """RoIAlign (He et al., "Mask R-CNN", section 3) of one map; equals ``torchvision.ops.roi_align``.

    Args:
        maps: [B, C, H, W] float32 or float64; gradient flows.
        rois: [R, 5] image and box x1, y1, x2, y2 in pixels, finite; constant.
        size: S.
        scale: cells per pixel.
        sampling_ratio: samples along each side of a bin; 0: the number of cells along that side.
        aligned: shift by half a cell; False: boxes are also at least one cell wide and high.

    Returns:
        [R, C, S, S].
    """
    if maps.device.type == "cpu" and maps.requires_grad and torch.is_grad_enabled() and len(rois):
        return cast(Tensor, _Pooled.apply(maps, rois, size, scale, sampling_ratio, aligned))
    pooled: Tensor = roi_align(maps, rois, size, scale, sampling_ratio, aligned)
    return pooled


LARGEST_PIECE = 2**22
"""Weights that are held at a time in the backward pass; a box over a whole fine map has tens of thousands."""


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, rois: Tensor, size: int, scale: float, sampling_ratio: int, aligned: bool) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.shape, ctx.settings = maps.shape, (size, scale, sampling_ratio, aligned)
        pooled: Tensor = roi_align(maps, rois, size, scale, sampling_ratio, aligned)
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (rois,) = ctx.saved_tensors
        size, scale, sampling_ratio, aligned = ctx.settings
        images, channels, height, width = ctx.shape
        found = grad.new_zeros(images * height * width, channels)
        pieces = (
            (piece, samples)
            for mine, samples in _by_samples(rois, size, scale, sampling_ratio, aligned)
            for piece in torch.split(mine, max(1, LARGEST_PIECE // (4 * samples[0] * samples[1] * size * size)))
        )
        for mine, samples in pieces:
            weights, index = _cells(rois[mine], samples, (height, width), size, scale, aligned)
            rows = grad[mine].permute(0, 2, 3, 1).reshape(-1, channels).contiguous()
            found += scattered_rows(rows, index, weights, len(found))
        return found.view(images, height, width, channels).permute(0, 3, 1, 2), None, None, None, None, None


def _sides(rois: Tensor, scale: float, aligned: bool) -> tuple[Tensor, Tensor]:
    """First corner [R, 2] as row and column, and height and width [R, 2], in cells."""
    corners = rois[:, [2, 1, 4, 3]] * scale - (0.5 if aligned else 0.0)
    sides = corners[:, 2:] - corners[:, :2]
    return corners[:, :2], sides if aligned else sides.clamp(min=1.0)


def _by_samples(
    rois: Tensor, size: int, scale: float, sampling_ratio: int, aligned: bool
) -> list[tuple[Tensor, tuple[int, int]]]:
    """Regions [R'] with the same number of samples in their bins' height and width; those without samples have no gradient."""
    if sampling_ratio > 0:
        return [(torch.arange(len(rois)), (sampling_ratio, sampling_ratio))]
    counts = (_sides(rois, scale, aligned)[1] / size).ceil().long()
    kinds, which = torch.unique(counts, dim=0, return_inverse=True)
    pairs = [(rows, columns) for rows, columns in kinds.tolist()]
    return [(torch.nonzero(which == kind).flatten(), pair) for kind, pair in enumerate(pairs) if min(pair) > 0]


def _cells(
    rois: Tensor, samples: tuple[int, int], shape: tuple[int, int], size: int, scale: float, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Weights [R * S * S, n] of the cells of each bin, and the cells' places [R * S * S, n] among those of all images."""
    first, sides = _sides(rois, scale, aligned)
    (row_weights, rows), (column_weights, columns) = (
        _along(first[:, axis], sides[:, axis], samples[axis], shape[axis], size) for axis in (0, 1)
    )
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]  # [R, S, S, 2n, 2n]
    places = rows[:, :, None, :, None] * shape[1] + columns[:, None, :, None, :]
    places = places + rois[:, 0].int()[:, None, None, None, None] * (shape[0] * shape[1])
    return weights.reshape(len(rois) * size * size, -1), places.reshape(len(rois) * size * size, -1)


def _along(first: Tensor, side: Tensor, samples: int, cells: int, size: int) -> tuple[Tensor, Tensor]:
    """Along one axis, the weights [R, S, 2n] of the cells of each bin and their numbers, as torchvision's kernel has them."""
    steps = (torch.arange(size * samples, dtype=first.dtype) + 0.5) / samples
    places = first[:, None] + steps * (side / size)[:, None]  # [R, S * n]
    inside = (places >= -1) & (places <= cells)
    places = places.clamp(0, cells - 1)
    low = places.floor()
    part = places - low
    weights = torch.stack([1 - part, part], dim=-1) * inside[..., None] / samples
    numbers = torch.stack([low, (low + 1).clamp(max=cells - 1)], dim=-1).int()
    return weights.view(len(first), size, 2 * samples), numbers.view(len(first), size, 2 * samples)
