"""Divisors and weights of losses: positives of an assignment, and numbers of all processes of a distributed run.

Functions that speak to other processes do so where ``torch.distributed`` is initialised; all processes must call them equally
often. In a single process they give back what they were given.

Shape letters: B images, P predictions of an image, L levels, M positives of the batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from detdistill.structures import IGNORED, Assignment

EPSILON = torch.finfo(torch.float32).eps
"""1.2e-7: what mmdet adds to every divisor of a loss."""


# ----------------------------------------------------------------------------------------------------------- processes


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor of any shape over all processes, without a graph."""
    value = value.detach().clone()
    if _distributed():
        dist.all_reduce(value)
    return value


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a floating-point tensor of any shape over all processes, without a graph.

    A loss that each process divides by the mean of a count, and whose gradients are averaged over processes, has the gradient
    of one process with the whole batch.
    """
    value = sum_over_ranks(value)
    if _distributed():
        value /= dist.get_world_size()
    return value


def gather_over_ranks(rows: Tensor) -> Tensor:
    """The rows of all processes, this one's first, without a graph.

    Args:
        rows: [N, ...]; N may differ between processes, the other dimensions not.

    Returns:
        [sum of N, ...]: this process's rows, then those of the others in the order of their ranks.
    """
    rows = rows.detach()
    if not _distributed():
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = max(int(count) for count in counts)  # a gathering needs equal shapes
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    pieces = [piece[: int(count)] for piece, count in zip(gathered, counts, strict=True)]
    own = dist.get_rank()
    return torch.cat([rows, *pieces[:own], *pieces[own + 1 :]])


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


# --------------------------------------------------------------------------------------------------------- assignments


def number_of_positives(assignment: Assignment, like: Tensor) -> Tensor:
    """[] mmdet's divisor of dense losses: the positives of a batch, each image counting at least 1.

    Averaged over processes, plus 1.2e-7. Never 0: an image without boxes counts 1.

    Args:
        assignment: of a dense prediction, [B, P].
        like: the result has its floating-point type.

    Example:
        >>> float(number_of_positives(Assignment(torch.tensor([[0, 0, 1, -1], [-1, -1, -2, -1]])), torch.ones(())))
        4.0
    """
    positives = (assignment.matched >= 0).sum(dim=1).clamp(min=1).sum()
    return mean_over_ranks(positives.to(like.dtype)) + EPSILON


def positives_per_level(assignment: Assignment, levels: Tensor, num_levels: int) -> Tensor:
    """[L] int64 how many positives of the batch each level has, in this process.

    Args:
        assignment: of a dense prediction, [B, P].
        levels: [P] level of each prediction.
        num_levels: L.

    Example:
        >>> matched = torch.tensor([[0, -1, 2], [-1, -1, 0]])
        >>> positives_per_level(Assignment(matched), torch.tensor([0, 0, 1]), num_levels=3).tolist()
        [1, 2, 0]
    """
    per_prediction = (assignment.matched >= 0).sum(dim=0)
    return torch.zeros(num_levels, dtype=torch.int64, device=levels.device).index_add(0, levels, per_prediction)


def label_weights(assignment: Assignment, like: Tensor) -> Tensor:
    """How much each prediction counts in a class loss: 0 where it is ignored, else the assignment's weight, or 1.

    Args:
        assignment: of any prediction.
        like: the result has its floating-point type.

    Returns:
        The shape of ``assignment.matched``.

    Example:
        >>> label_weights(Assignment(torch.tensor([[3, -1, -2]])), torch.ones(())).tolist()
        [[1.0, 1.0, 0.0]]
    """
    matched = assignment.matched
    weights = like.new_ones(matched.shape) if assignment.weights is None else assignment.weights.to(like.dtype)
    return weights.masked_fill(matched == IGNORED, 0.0)


def number_objects(image: Tensor, ground_truth: Tensor) -> tuple[Tensor, int]:
    """Number the ground-truth boxes that have a positive, so that positives can be summed or compared object by object.

    Args:
        image: [M] index of each positive's image.
        ground_truth: [M] index of its box within the image.

    Returns:
        [M] int64 the number of each positive's object, from 0 by image and box, and how many objects there are.

    Example:
        >>> numbers, count = number_objects(torch.tensor([0, 0, 1, 0]), torch.tensor([5, 2, 2, 5]))
        >>> numbers.tolist(), count
        ([1, 0, 2, 1], 3)
    """
    boxes = int(ground_truth.max()) + 1 if len(ground_truth) else 0
    objects, numbers = torch.unique(image * boxes + ground_truth, return_inverse=True)
    return numbers, len(objects)
