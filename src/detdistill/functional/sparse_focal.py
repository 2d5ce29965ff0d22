"""The focal loss of rows that have at most one positive class, in little memory.

Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, with alpha 0.25 and gamma 2, as in
``torchvision.ops.sigmoid_focal_loss``. That function keeps about ten tensors of the size of the logits for the backward pass,
and needs another one for the targets. Here the targets are indices, and the gradient is computed from the logits alone.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

ALPHA = 0.25
BLOCK = 1 << 18
"""About this many logits are handled at a time, so that intermediate results stay in the processor's cache."""


def focal_rows(logits: Tensor, positive: Tensor) -> Tensor:
    """Focal loss of each row, summed over its classes: alpha_t * (1 - p_t)^2 * BCE.

    The gradient is that of ``sigmoid_focal_loss``, and can be differentiated again (in as much memory as there).

    Args:
        logits: [..., C].
        positive: [...] int64, the class whose target is 1; -1: all targets of the row are 0.

    Returns:
        [...].

    Example:
        >>> focal_rows(torch.zeros(2, 3), torch.tensor([1, -1]))
        tensor([0.3033, 0.3899])
    """
    rows = _Focal.apply(logits.reshape(-1, logits.shape[-1]), positive.reshape(-1))
    return cast(Tensor, rows.view(positive.shape))


class _Focal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, positive: Tensor) -> Tensor:
        ctx.save_for_backward(logits, positive)
        step = _rows(logits)
        sums = [logits.new_zeros(0)]
        for part, wanted in zip(torch.split(logits, step), torch.split(positive, step), strict=True):
            values = F.softplus(part).mul_(torch.sigmoid(part).square_()).mul_(1 - ALPHA)
            chosen, where = _chosen(part, wanted)
            values[where] = ALPHA * torch.sigmoid(-chosen).square() * F.softplus(-chosen)
            sums.append(values.sum(dim=1))
        return torch.cat(sums)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, positive = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is part of a graph: its own gradient is wanted
            return _differentiable(logits, positive) * gradient[:, None], None
        found = torch.empty_like(logits)
        step = _rows(logits)
        parts = (torch.split(each, step) for each in (logits, positive, gradient, found))
        for part, wanted, by, out in zip(*parts, strict=True):
            p = torch.sigmoid(part)
            torch.mul(F.softplus(part), 1 - p, out=out)
            out.mul_(2).add_(p).mul_(p.square_()).mul_((by * (1 - ALPHA))[:, None])
            chosen, where = _chosen(part, wanted)
            out[where] = _slope_of_positives(chosen) * by[where[0]]
        return found, None


def _chosen(logits: Tensor, positive: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Logits of the positive classes, and their rows and columns."""
    row = torch.nonzero(positive >= 0).flatten()
    where = (row, positive[row])
    return logits[where], where


def _slope_of_positives(logits: Tensor) -> Tensor:
    other = torch.sigmoid(-logits)  # 1 - p
    return -ALPHA * other.square() * (2 * torch.sigmoid(logits) * F.softplus(-logits) + other)


def _differentiable(logits: Tensor, positive: Tensor) -> Tensor:
    """Derivative of each loss by its logit, by operations that torch can differentiate."""
    p = torch.sigmoid(logits)
    slope = (1 - ALPHA) * p.square() * (2 * (1 - p) * F.softplus(logits) + p)
    chosen, where = _chosen(logits, positive)
    return slope.index_put(where, _slope_of_positives(chosen))


def _rows(logits: Tensor) -> int:
    """Rows of a block. On a GPU, few large kernels are quicker than many small ones."""
    return max(1, BLOCK * (64 if logits.is_cuda else 1) // max(1, logits.shape[1]))
