"""Attention maps of a feature map: softmax of its mean absolute value, over cells and over channels.

FKD (ICLR 2021), FGD (CVPR 2022) and the methods built on them use these. Both attention maps have mean 1. They are computed in
at least float32, because a sum of magnitudes divided by a small temperature overflows half precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

CHUNK = {"cpu": 2**18}
"""Numbers of maps that are computed at a time, by kind of device: the temporary tensors stay in a CPU's cache."""
LARGE_CHUNK = 2**26
"""The same for other devices."""


def spatial_attention(maps: Tensor, temperature: float) -> Tensor:
    """``H*W * softmax over cells (mean over channels of |maps| / temperature)``; gradient flows.

    Args:
        maps: [B, C, H, W].
        temperature: above 0; smaller is more peaked.

    Returns:
        [B, H, W], at least float32; each image sums to H*W.

    Example:
        >>> spatial_attention(torch.tensor([[[[0.0, 2.0]], [[0.0, 0.0]]]]), temperature=1.0).sum().item()
        2.0
    """
    batch, channels, height, width = maps.shape
    # The L1 norm is |maps| summed in one pass: no second map, forward or kept for backward.
    strength = torch.linalg.vector_norm(maps, ord=1, dim=1, dtype=_wide(maps.dtype)) / channels
    attention: Tensor = height * width * (strength.flatten(1) / temperature).softmax(dim=1)
    return attention.view(batch, height, width)


def channel_attention(maps: Tensor, temperature: float) -> Tensor:
    """``C * softmax over channels (mean over cells of |maps| / temperature)``; gradient flows.

    Args:
        maps: [B, C, H, W].
        temperature: above 0; smaller is more peaked.

    Returns:
        [B, C], at least float32; each image sums to C.

    Example:
        >>> channel_attention(torch.tensor([[[[-3.0]], [[3.0]]]]), temperature=1.0).tolist()
        [[1.0, 1.0]]
    """
    _, channels, height, width = maps.shape
    strength = torch.linalg.vector_norm(maps, ord=1, dim=(2, 3), dtype=_wide(maps.dtype)) / (height * width)
    attention: Tensor = channels * (strength / temperature).softmax(dim=1)
    return attention


def attentions(maps: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``spatial_attention`` [B, H, W] and ``channel_attention`` [B, C] of the same maps, in one pass; gradient flows.

    Args:
        maps: [B, C, H, W].
        temperature: above 0.

    Example:
        >>> cells, channels = attentions(torch.tensor([[[[0.0, 2.0]], [[0.0, 0.0]]]]), temperature=1.0)
        >>> cells.sum().item(), channels.sum().item()
        (2.0, 2.0)
    """
    batch, channels, height, width = maps.shape
    of_cells, of_channels = cast(tuple[Tensor, Tensor], _Magnitudes.apply(maps))
    cells = height * width * (of_cells / channels / temperature).softmax(dim=1)
    return cells.view(batch, height, width), channels * (of_channels / (height * width) / temperature).softmax(dim=1)


class _Magnitudes(torch.autograd.Function):
    """Sums of magnitudes over channels [B, H*W] and over cells [B, C], some channels at a time, without a second map."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(maps)
        rows, wide = maps.flatten(2), _wide(maps.dtype)
        cells = rows.new_zeros(len(rows), rows.shape[2], dtype=wide)
        channels = rows.new_empty(rows.shape[:2], dtype=wide)
        for part in channel_parts(maps):
            sizes = rows[:, part].to(wide).abs()
            cells += sizes.sum(dim=1)
            channels[:, part] = sizes.sum(dim=2)
        return cells, channels

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_cells: Tensor, of_channels: Tensor) -> Tensor:
        (maps,) = ctx.saved_tensors
        rows = maps.flatten(2)
        result = torch.empty_like(rows)
        for part in channel_parts(maps):
            torch.mul(rows[:, part].sgn(), (of_cells[:, None] + of_channels[:, part, None]).to(rows.dtype), out=result[:, part])
        return result.view_as(maps)


def channel_parts(maps: Tensor) -> Iterator[slice]:
    """Slices over the channels of maps [B, C, H, W], each of so many numbers that they stay in a CPU's cache."""
    count = CHUNK.get(maps.device.type, LARGE_CHUNK) // max(1, maps.numel() // max(1, maps.shape[1]))
    return (slice(start, start + max(1, count)) for start in range(0, maps.shape[1], max(1, count)))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype
