"""Generalised focal loss (GFL): class scores that predict the IoU of the box, and box sides as distributions.

Li et al., "Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes for Dense Object Detection",
NeurIPS 2020.

Shape letters: N predictions, K classes, D = last bin of a side (``reg_max``): D + 1 bins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.functional.soft_targets import soft_binary_cross_entropy


def quality_focal_loss(logits: Tensor, quality: Tensor, beta: float = 2.0) -> Tensor:
    """|y - sigmoid(x)|^beta * BCE(x, y) of every class, not reduced (equation 5; gradients flow through both factors).

    Args:
        logits: [..., K].
        quality: [..., K] target y: for a positive, the IoU of its box at its class; 0 elsewhere. Treated as constant.
        beta: exponent of the weight; larger values give well predicted classes less weight.

    Returns:
        Same shape.

    Example:
        >>> quality_focal_loss(torch.zeros(1, 2), torch.tensor([[0.5, 0.0]]))
        tensor([[0.0000, 0.1733]])
    """
    return soft_binary_cross_entropy(logits, quality, beta)


def distribution_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with the two bins next to a distance, weighted by nearness (equation 6), not reduced.

    Args:
        logits: [N, D+1] logits of the distribution of one side each.
        target: [N] distance in bins, at least 0 and below D.

    Returns:
        [N].

    Example:
        >>> distribution_focal_loss(torch.tensor([[0.0, 20.0, 20.0]]), torch.tensor([1.5]))
        tensor([0.6931])
    """
    below = target.long()
    weight = target - below
    left, right = (F.cross_entropy(logits, bins, reduction="none") for bins in (below, below + 1))
    return left * (1 - weight) + right * weight


def distribution_mean(logits: Tensor, bins: int) -> Tensor:
    """The expected distance of each side (equation 3: the integral), in bins.

    Args:
        logits: [..., S * bins] logits of S sides, one side after the other.
        bins: number of bins of a side, D + 1.

    Returns:
        [..., S], differentiable.

    Example:
        >>> distribution_mean(torch.tensor([0.0, 0.0, 0.0, -99.0, -99.0, 9.0]), bins=3).tolist()
        [1.0, 2.0]
    """
    probabilities = logits.view(*logits.shape[:-1], -1, bins).softmax(dim=-1)
    # not a matrix product: autocast would make that half precision
    return (probabilities * torch.arange(bins, dtype=logits.dtype, device=logits.device)).sum(dim=-1)
