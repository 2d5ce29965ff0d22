"""Losses of DSIG: nodes and edges of a graph of regions, pyramids, class scores and box deltas.

Shape letters: B images, R regions of the whole batch, M foreground regions, C channels, S side of a pooled region, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.functional.counting import divisor_over_ranks
from detdistill.functional.relations import cosine_gram
from detdistill.functional.soft_targets import mean_kl_divergence
from detdistill.methods.shared.align import resize_like


class DSIGNodes(NamedTuple):
    """The unweighted losses of the nodes, [] each."""

    foreground: Tensor
    background: Tensor


def dsig_feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the pyramids' maps, added over levels.

    Args:
        student: L maps [B, C, H, W]; gradient flows. Maps of another size are resized to the teacher's.
        teacher: L maps [B, C, H, W], treated as constant.

    Returns:
        [] the loss.
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([F.mse_loss(resize_like(mine, theirs), theirs.detach()) for mine, theirs in pairs]).sum()


def dsig_node_losses(
    student: Tensor, teacher: Tensor, image: Tensor, foreground: Tensor, background: Tensor, alpha: float = 7.5
) -> DSIGNodes:
    """Mean squared difference of the nodes within an image, added over images, for foreground and background.

    The background of an image with n foreground and m background regions is multiplied by ``alpha * n / m``. An image without
    foreground therefore gives 0 for both, and one without background gives 0 for the background.

    Args:
        student: [R, C, S, S] pooled regions; gradient flows.
        teacher: [R, C, S, S] pooled from the same boxes, treated as constant.
        image: [R] index of each region's image.
        foreground: [R] bool.
        background: [R] bool; regions that are neither do not count.
        alpha: factor of the background.

    Example:
        >>> rows, both = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1), torch.tensor([True, False])
        >>> losses = dsig_node_losses(rows, torch.zeros(2, 1, 1, 1), torch.tensor([0, 0]), both, ~both)
        >>> float(losses.foreground), float(losses.background)
        (1.0, 30.0)
    """
    squares = F.mse_loss(student, teacher.detach(), reduction="none").flatten(1).mean(dim=1)
    images = int(image.max()) + 1 if len(image) else 0
    of_foreground, of_background = (
        torch.bincount(image[mask], minlength=images).to(squares) for mask in (foreground, background)
    )
    one = foreground / of_foreground.clamp(min=1)[image]
    other = background * (of_foreground / of_background.clamp(min=1).square())[image]
    return DSIGNodes((squares * one).sum(), alpha * (squares * other).sum())


def dsig_mine(teacher_logits: Tensor, background: Tensor, threshold: float = 0.6) -> Tensor:
    """Mine the background regions that the teacher does not recognise as such: [R] bool, without gradient.

    Args:
        teacher_logits: [R, K+1] the teacher's softmax logits, the background last.
        background: [R] bool, the background regions.
        threshold: smallest cross-entropy against the background; 0 keeps all.
    """
    entropy = -teacher_logits.detach().log_softmax(dim=1)[:, -1]
    return background & (entropy >= threshold)


def dsig_edge_loss(student: Tensor, teacher: Tensor, image: Tensor, nodes: Tensor) -> Tensor:
    """Half the mean squared difference of the edges of an image, added over images.

    An edge is the cosine of two nodes' features. The diagonal, which is always 1, is part of the mean, as in the released code.

    Args:
        student: [R, C, S, S] pooled regions; gradient flows.
        teacher: [R, C, S, S], treated as constant.
        image: [R] index of each region's image.
        nodes: [R] bool, the regions that are nodes of the graph.

    Returns:
        [] the loss; 0, connected to the student, without nodes.
    """
    total = student[:0].sum()
    for index in torch.unique(image[nodes]).tolist():
        mine = torch.nonzero(nodes & (image == index)).flatten()
        edges, fixed = (cosine_gram(side[mine].flatten(1)) for side in (student, teacher.detach()))
        total = total + 0.5 * F.mse_loss(edges, fixed)
    return total


def dsig_class_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of class scores, ``T^2 * mean of t (log t - log s)`` over all regions AND classes.

    Args:
        student_logits: [R, K+1] with the background, or [R, K] of a one-stage detector; the released code takes the softmax of
            sigmoid logits, too. Gradient flows.
        teacher_logits: the same shape, treated as constant.
        temperature: T of both softmaxes.

    Returns:
        [] the loss; 0, connected to the student, without regions.
    """
    return mean_kl_divergence(student_logits, teacher_logits, temperature).sum() / divisor_over_ranks(
        len(student_logits), student_logits
    )


def dsig_box_loss(student: Tensor, teacher: Tensor, count: int, beta: float = 0.0) -> Tensor:
    """Smooth L1 distance of box deltas, summed and divided by ``count``.

    Args:
        student: [M, 4] deltas of foreground regions, for the class of their ground truth; gradient flows.
        teacher: [M, 4], treated as constant.
        count: number of ALL regions (two-stage), or of positives (one-stage).
        beta: distance at which the loss becomes linear; 0: L1.

    Returns:
        [] the loss; 0, connected to the student, if M is 0.
    """
    return F.smooth_l1_loss(student, teacher.detach(), beta=beta, reduction="sum") / divisor_over_ranks(count, student)
