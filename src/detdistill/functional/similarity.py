"""Similarity of two pyramids, for monitoring, and of pairs of vectors, as a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.functional.counting import divisor_over_ranks


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


def cosine_distance(first: Tensor, second: Tensor) -> Tensor:
    """Mean over rows of ``1 - cos(first, second)``; gradient flows to both.

    Args:
        first: [M, D]. A row of zeros has the cosine 0 and no gradient.
        second: [M, D].

    Returns:
        [] between 0 and 2; 0, connected to the arguments, without rows.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> float(cosine_distance(rows, 3 * rows)), float(cosine_distance(rows, -rows))
        (0.0, 2.0)
    """
    cosine = F.cosine_similarity(first, second, dim=1, eps=1e-8)
    zero = ~((first != 0).any(dim=1) & (second != 0).any(dim=1))  # the gradient there would be of the order of 1 / eps
    return (1 - cosine.masked_fill(zero, 0.0)).sum() / divisor_over_ranks(len(first), first)


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    """[B, N], [B, N] -> [B]. Dot products need no copies of the maps, unlike ``F.cosine_similarity``."""
    dots = (torch.einsum("bn,bn->b", one, other) for one, other in ((first, second), (first, first), (second, second)))
    product, mine, theirs = dots
    return product / (mine.sqrt() * theirs.sqrt()).clamp(min=1e-8)
