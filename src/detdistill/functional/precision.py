"""Full precision for the computation of losses, independent of the precision of the networks."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(device: torch.device | str) -> torch.autocast:
    """Switch autocast off on a device inside the context, so that results of float32 tensors are float32.

    Losses, and the layers that a method adds for them, are computed in this context, because half precision has only three
    digits and sums over maps need more. Run networks outside of it, for example a second pass of the student's decoder;
    inside they would lose autocast, too.

    Example:
        >>> layer, row = torch.nn.Linear(2, 2), torch.ones(1, 2)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     outside = layer(row).dtype
        ...     with full_precision("cpu"):
        ...         inside = layer(row).dtype
        >>> outside, inside
        (torch.bfloat16, torch.float32)
    """
    return torch.autocast(torch.device(device).type, enabled=False)


def at_least_float32(tensor: Tensor) -> Tensor:
    """A tensor of half precision as float32; others as they are. Areas of boxes in pixels overflow half precision.

    Example:
        >>> at_least_float32(torch.ones(1).half()).dtype, at_least_float32(torch.ones(1).double()).dtype
        (torch.float32, torch.float64)
    """
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor
