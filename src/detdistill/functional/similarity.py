"""Similarity of two pyramids, for monitoring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
    return torch.stack(
        [_cosine(mine.flatten(1), fixed.flatten(1)).mean() for mine, fixed in zip(student, teacher, strict=True)]
    ).mean()


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    """[B, N], [B, N] -> [B]. Dot products need no copies of the maps, unlike ``F.cosine_similarity``."""
    dots = (torch.einsum("bn,bn->b", one, other) for one, other in ((first, second), (first, first), (second, second)))
    product, mine, theirs = dots
    return product / (mine.sqrt() * theirs.sqrt()).clamp(min=1e-8)
