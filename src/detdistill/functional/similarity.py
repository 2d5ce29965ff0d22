"""How alike two pyramids are: a number to watch, not to train on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def mean_cosine(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Cosine of the two maps of each image and level, averaged over both: 1 same direction, 0 unrelated.

    Args:
        student: L maps [B, C, H, W], already aligned.
        teacher: L maps of the same shapes.

    Returns:
        [] between -1 and 1, without a graph.
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([F.cosine_similarity(mine.flatten(1), fixed.flatten(1)).mean() for mine, fixed in pairs]).mean()
