"""One switch for the arithmetic of losses: float32 (or float64), whatever precision the networks run in."""

from __future__ import annotations

import torch


def full_precision(device: torch.device | str) -> torch.autocast:
    """Inside, autocast is off on a device; what is computed of float32 tensors stays float32.

    Losses, and the layers that a method adds for them, are computed so: half precision has three digits, and sums over maps
    need more. Networks that run inside, such as a second pass of the student's decoder, would lose autocast too: they
    belong outside.

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
