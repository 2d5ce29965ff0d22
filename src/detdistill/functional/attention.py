"""Attention maps of a feature map: softmax of its mean absolute value, over cells and over channels.

FKD (ICLR 2021), FGD (CVPR 2022) and the methods built on them use these. Both attention maps have mean 1. They are computed in
at least float32, because a sum of magnitudes divided by a small temperature overflows half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype
