"""Losses with soft targets: divergences and cross-entropies between the class scores of student and teacher.

No function here averages over predictions; the caller does, as its paper says. The sum or mean over classes is part of a
function's definition, and so is the factor T^2 for a temperature T. The teacher's scores are always treated as constant.

Shape letters: K classes (or bins of a distribution), ``...`` any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_CHUNK = {"cpu": 2**17}
"""Numbers that are compared at a time, by kind of device."""
LARGE_CHUNK = 2**26
"""The same for other devices."""


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """Kullback-Leibler divergence of softmaxes, ``T^2 * sum_c p_c (log p_c - log q_c)``: the sum over classes.

    ``p = softmax(teacher / T)`` and ``q = softmax(student / T)``. The factor T^2 keeps the size of the gradient for all T
    (Hinton et al., "Distilling the Knowledge in a Neural Network", section 2). Adding a number to all logits of a row does not
    change the result.

    The value is computed as the sum of ``q - p - p r`` with ``r = log q - log p``. This equals the formula because p and q
    sum to 1, and its terms are never negative. It keeps the digits that the formula loses for nearly equal rows: for random
    logits 0.3 apart, T = 10 and float32 the formula is wrong by up to 0.1 %. The gradient is ``T (q - p)``.

    Args:
        student_logits: any shape; gradient flows.
        teacher_logits: the same shape or one that broadcasts to it, treated as constant.
        temperature: T, above 0.
        dim: dimension of the classes.

    Returns:
        The student's shape without ``dim``; at least 0, and exactly 0 for equal logits.

    Example:
        >>> kl_divergence(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        tensor([0.1109])
    """
    return cast(Tensor, _KLDivergence.apply(student_logits, teacher_logits.detach(), temperature, dim))


class _KLDivergence(torch.autograd.Function):
    """Custom autograd function that keeps one tensor for the backward pass (``q - p``); autograd would keep two.

    A few rows are computed at a time, so that the temporary tensors stay in a CPU's cache.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
        mine, theirs = (side.movedim(dim, -1) for side in (student, teacher.expand_as(student)))
        shape, classes = mine.shape, mine.shape[-1]
        mine, theirs = mine.reshape(-1, classes), theirs.reshape(-1, classes)
        difference, total = torch.empty_like(mine), mine.new_empty(len(mine))
        for part in _blocks(mine):
            own, q, own_best = _softmax(mine[part], temperature)
            fixed, p, best = _softmax(theirs[part], temperature)
            ratio = own.sub_(fixed).add_(own_best - best)  # log q - log p
            # q - p with all its digits, as (q - p) / (q + p) = tanh(r / 2)
            torch.mul(q.add_(p), torch.tanh(ratio / 2), out=difference[part])
            total[part] = torch.addcmul(difference[part], p, ratio, value=-1).sum(-1)
        ctx.save_for_backward(difference.view(shape).movedim(-1, dim))
        ctx.temperature, ctx.dim = temperature, dim
        result: Tensor = total.mul_(temperature**2).view(shape[:-1])
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (difference,) = ctx.saved_tensors
        return (ctx.temperature * grad).unsqueeze(ctx.dim) * difference, None, None, None


def _softmax(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [R, K] less their maximum, their softmax, and the logarithm of its maximum [R, 1].

    The sum of the first and the last is the logarithm of the softmax. It costs no second exponential of each logit, and large
    logits lose no digits.
    """
    centered = logits - logits.amax(-1, keepdim=True)
    if temperature != 1:
        centered.div_(temperature)
    probabilities = centered.softmax(-1)
    return centered, probabilities, probabilities.amax(-1, keepdim=True).log()


def mean_kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """``kl_divergence`` divided by the number of classes: the mean over classes, as in mmdet, LD and DSIG.

    Args:
        student_logits: any shape; gradient flows.
        teacher_logits: the same shape, treated as constant.
        temperature: T, above 0.
        dim: the dimension of the classes.

    Returns:
        The shape without ``dim``.
    """
    return kl_divergence(student_logits, teacher_logits, temperature, dim) / student_logits.shape[dim]


def soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    class_weights: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Cross-entropy with the teacher's softmax, ``-sum_c w_c p_c log q_c``; no factor T^2.

    Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS 2017 (w is 1.5 for
    the background and 1 for objects). The result is not divided by the sum of the weights. For equal logits it is the teacher's
    entropy and not 0; with unequal weights the gradient is not 0 there, either.

    Args:
        student_logits: any shape; gradient flows.
        teacher_logits: the same shape, treated as constant.
        temperature: of both softmaxes, above 0.
        class_weights: [K]; None: all 1.
        dim: the dimension of the classes.

    Returns:
        The shape without ``dim``.

    Example:
        >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.0, -99.0]]), class_weights=torch.tensor([1.5, 1.0]))
        tensor([1.0397])
    """
    p = (teacher_logits.detach() / temperature).softmax(dim)
    if class_weights is not None:
        p = p * class_weights.view(-1, *[1] * (p.ndim - 1 - dim % p.ndim))
    return -(p * (student_logits / temperature).log_softmax(dim)).sum(dim)


def soft_binary_cross_entropy(logits: Tensor, targets: Tensor, power: float = 0.0) -> Tensor:
    """``|t - s|^power * BCE(s, t)`` of each class with ``s = sigmoid(logits)``, not reduced.

    With power 0 it is the cross-entropy ``-t log s - (1 - t) log(1 - s)``; its smallest value is the target's entropy and not
    0. With a power above 0 it is 0 at the target: the classification loss of GFL (power 2, see ``quality_focal_loss``) and the
    distillation of class scores in BCKD and CrossKD (power 1). The gradient flows through both factors.

    Args:
        logits: [..., K].
        targets: [..., K] probabilities, treated as constant.
        power: 0, or at least 1 (between them the gradient is not finite at the target).

    Returns:
        [..., K].

    Example:
        >>> soft_binary_cross_entropy(torch.zeros(2), torch.tensor([0.5, 0.0]), power=2.0)
        tensor([0.0000, 0.1733])
    """
    fixed = targets.detach()
    entropy = F.binary_cross_entropy_with_logits(logits, fixed, reduction="none")
    if power == 0:
        return entropy
    gap = (fixed - logits.sigmoid()).abs()
    return (gap if power == 1 else gap**power) * entropy


def soft_binary_rows(student_logits: Tensor, teacher_logits: Tensor, power: float = 0.0) -> Tensor:
    """``soft_binary_cross_entropy`` with the teacher's sigmoids, summed over the classes of each row.

    The values and the gradient are the same; they are computed for a few rows at a time, and one tensor is kept for the backward
    pass, where autograd keeps five.

    Args:
        student_logits: [..., K]; gradient flows.
        teacher_logits: [..., K], treated as constant.
        power: 0, or at least 1.

    Returns:
        [...].

    Example:
        >>> soft_binary_rows(torch.zeros(2, 2), torch.tensor([[0.0, -99.0], [0.0, 0.0]]), power=1.0)
        tensor([0.3466, 0.0000])
    """
    return cast(Tensor, _SoftBinaryRows.apply(student_logits, teacher_logits.detach(), power))


class _SoftBinaryRows(torch.autograd.Function):
    """Keeps the slope of each class for the backward pass.

    With E the cross-entropy and g = s - t it is ``|g|^power * g + power * |g|^(power - 1) * sign(g) * s (1 - s) * E``.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, power: float) -> Tensor:
        mine, theirs = (side.reshape(-1, student.shape[-1]) for side in (student, teacher.expand_as(student)))
        total = mine.new_empty(len(mine))
        slope = torch.empty_like(mine) if ctx.needs_input_grad[0] else None
        for part in _blocks(mine):
            x, target = mine[part], theirs[part].sigmoid()
            score = x.sigmoid()
            gap = score - target
            entropy = F.softplus(x).addcmul_(target, x, value=-1)
            size = gap.abs() ** power  # 1 for a power of 0, also where the gap is 0
            total[part] = (size * entropy).sum(-1)
            if slope is not None:
                out = torch.mul(size, gap, out=slope[part])
                if power:
                    by = gap.sign() if power == 1 else gap.sign().mul_(gap.abs() ** (power - 1)).mul_(power)
                    out.addcmul_(by.mul_(entropy), score.addcmul_(score, score, value=-1))
        ctx.save_for_backward(slope)
        ctx.shape = student.shape
        return total.view(student.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * grad.reshape(-1, 1)).view(ctx.shape), None, None


def largest_score_gap(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The largest ``|t - s|`` of the sigmoids of a row's classes, without gradient.

    Args:
        student_logits: [..., K], at least one class.
        teacher_logits: [..., K].

    Returns:
        [...].
    """
    mine, theirs = (side.detach().reshape(-1, side.shape[-1]) for side in (student_logits, teacher_logits))
    gaps = mine.new_empty(len(mine))
    for part in _blocks(mine):
        gaps[part] = mine[part].sigmoid().sub_(theirs[part].sigmoid()).abs_().amax(-1)
    return gaps.view(student_logits.shape[:-1])


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of rows [R, K] that hold about as many numbers as stay in a CPU's cache."""
    size = max(1, ROWS_CHUNK.get(rows.device.type, LARGE_CHUNK) // max(1, rows.shape[-1]))
    return (slice(start, start + size) for start in range(0, len(rows), size))


def binary_kl_divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """``t log(t / s) + (1 - t) log((1 - t) / (1 - s))`` of each class with sigmoids s and t, not reduced.

    Logarithms of sigmoids are taken from the logits, so they are finite, and 0 log 0 is 0. For a temperature, divide the
    logits and multiply by its square.

    Args:
        student_logits: [..., K]; gradient flows.
        teacher_logits: [..., K], treated as constant.

    Returns:
        [..., K], 0 for equal logits.

    Example:
        >>> binary_kl_divergence(torch.tensor([0.0, 2.0]), torch.tensor([99.0, 2.0]))
        tensor([0.6931, 0.0000])
    """
    fixed = teacher_logits.detach()
    yes = fixed.sigmoid() * (F.logsigmoid(fixed) - F.logsigmoid(student_logits))
    no = (-fixed).sigmoid() * (F.logsigmoid(-fixed) - F.logsigmoid(-student_logits))
    return yes + no


def focal_kl_divergence(student_logits: Tensor, teacher_logits: Tensor, power: float = 0.5) -> Tensor:
    """``((t - s)^2 + 1e-6)^(power / 2) * binary_kl_divergence`` of each class, not reduced.

    The soft labels of LAD (Nguyen et al., "Improving Object Detection by Label Assignment Distillation", WACV 2022, released
    code). The 1e-6 keeps the gradient finite at equal scores; the gradient flows through both factors.

    Args:
        student_logits: [..., K]; gradient flows.
        teacher_logits: [..., K], treated as constant.
        power: exponent of the difference of the scores.

    Returns:
        [..., K], 0 for equal logits.
    """
    gap = teacher_logits.detach().sigmoid() - student_logits.sigmoid()
    return (gap.square() + 1e-6) ** (power / 2) * binary_kl_divergence(student_logits, teacher_logits)
