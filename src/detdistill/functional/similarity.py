"""Similarity of two pyramids, for monitoring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def mean_cosine(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Cosine similarity of student and teacher maps, averaged over images and levels.

    Args:
        student: L maps [B, C, H, W], already adapted to the teacher's channels and size.
        teacher: L maps of the same shapes.

    Returns:
        [] between -1 and 1, detached.
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([F.cosine_similarity(mine.flatten(1), fixed.flatten(1)).mean() for mine, fixed in pairs]).mean()
