"""Divisors and weights of losses: numbers of positives, and sums and means over the processes of a distributed run.

Functions that communicate do so if ``torch.distributed`` is initialised; then all processes must call them equally often. In
a single process they return the values of their input.

Shape letters: B images, P predictions of an image, L levels, M positives of the batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from detdistill.structures import IGNORED, Assignment

EPSILON = torch.finfo(torch.float32).eps
"""1.2e-7: mmdet adds this to every divisor of a loss."""


# ----------------------------------------------------------------------------------------------------------- processes


def number_of_ranks() -> int:
    """Number of processes; 1 if ``torch.distributed`` is not initialised."""
    return dist.get_world_size() if _distributed() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor of any shape over all processes, detached."""
    value = value.detach().clone()
    if _distributed():
        dist.all_reduce(value)
    return value


def mean_over_ranks(value: Tensor, least: float | None = None) -> Tensor:
    """The mean of a tensor of any shape over all processes, detached; in several processes a floating-point one.

    If each process divides its loss by the mean of a count, and gradients are averaged over processes, the gradient equals
    that of a single process with the whole batch.

    Args:
        value: of this process.
        least: the smallest sum over all processes, for divisors that are at least 1, for example; None: no limit.
    """
    value = sum_over_ranks(value)
    if least is not None:
        value = value.clamp(min=least)
    return value / dist.get_world_size() if _distributed() else value


def divisor_over_ranks(count: int, like: Tensor) -> Tensor | int:
    """Divisor of a loss that is summed over the things of a batch: their number, at least 1; see ``mean_over_ranks``.

    Args:
        count: number of things of this process.
        like: tensor on the device of the loss.

    Returns:
        ``max(1, count)`` in a single process, else a tensor [].
    """
    if not _distributed():
        return max(1, count)
    return mean_over_ranks(torch.tensor(float(count), device=like.device), least=1)


def share_over_ranks(value: Tensor, least: float = 1.0) -> Tensor | float:
    """Factor on a loss that was divided by this process's count, so that it is divided by the mean count instead.

    For losses of other libraries, which divide by the count of the batch before this package sees them.

    Args:
        value: the count of this process, floating-point, any shape.
        least: the divisor of the loss is at least this.

    Returns:
        ``max(value, least) / mean_over_ranks(value, least)``; 1.0 in a single process.
    """
    if not _distributed():
        return 1.0
    return value.detach().clamp(min=least) / mean_over_ranks(value, least)


def gather_over_ranks(rows: Tensor) -> Tensor:
    """Gather the rows of all processes, detached; this process's rows come first.

    Args:
        rows: [N, ...]; N may differ between processes, the other dimensions must not.

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
    """[] mmdet's divisor of dense losses: the number of positives of a batch, where each image counts at least 1.

    Averaged over processes, plus 1.2e-7.

    Args:
        assignment: assignment [B, P] of a dense prediction.
        like: tensor whose floating-point type the result has.

    Example:
        >>> float(number_of_positives(Assignment(torch.tensor([[0, 0, 1, -1], [-1, -1, -2, -1]])), torch.ones(())))
        4.0
    """
    positives = (assignment.matched >= 0).sum(dim=1).clamp(min=1).sum()
    return mean_over_ranks(positives.to(like.dtype)) + EPSILON


def positives_per_level(assignment: Assignment, levels: Tensor, num_levels: int) -> Tensor:
    """[L] int64 number of positives of the batch on each level, in this process.

    Args:
        assignment: assignment [B, P] of a dense prediction.
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
    """Weight of each prediction in a classification loss: 0 if it is ignored, else the assignment's weight (default 1).

    Args:
        assignment: assignment of any family of predictions.
        like: tensor whose floating-point type the result has.

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
    """Number the ground-truth boxes that have positives, so that positives can be summed or compared for each box.

    Args:
        image: [M] index of each positive's image.
        ground_truth: [M] index of each positive's ground-truth box within the image.

    Returns:
        [M] int64 number of each positive's box, counted from 0 in the order of images and boxes; and the number of boxes.

    Example:
        >>> numbers, count = number_objects(torch.tensor([0, 0, 1, 0]), torch.tensor([5, 2, 2, 5]))
        >>> numbers.tolist(), count
        ([1, 0, 2, 1], 3)
    """
    boxes = int(ground_truth.max()) + 1 if len(ground_truth) else 0
    objects, numbers = torch.unique(image * boxes + ground_truth, return_inverse=True)
    return numbers, len(objects)
