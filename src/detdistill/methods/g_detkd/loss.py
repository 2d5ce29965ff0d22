"""The losses of G-DetKD: soft matching of levels (SGFI), contrast of regions (CKD), and region predictions.

Shape letters: N regions of the whole batch, L levels of the student, C channels, S side of a pooled region, E and D widths of
embeddings, M rows of the bank, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.functional.counting import divisor_over_ranks
from detdistill.functional.relations import info_nce
from detdistill.functional.soft_targets import kl_divergence

SHORTEST = 1e-6
"""Smallest length that an embedding is divided by: keeps the gradient of an embedding of zeros finite."""


def g_detkd_level_weights(keys: Tensor, query: Tensor, tau: Tensor | float = 1.0) -> Tensor:
    """Weight of each student level for each region: the softmax over levels of ``k_l . q / tau``, without normalisation.

    Later versions of a public re-implementation take the softmax over the regions instead; that is a bug.

    Args:
        keys: [L, N, E] embeddings of the region pooled from each student level; gradient flows.
        query: [N, E] embedding of the teacher's region; gradient flows, because one network computes both.
        tau: temperature, above 0; a tensor of one element may be learned.

    Returns:
        [N, L]; each row sums to 1.

    Example:
        >>> g_detkd_level_weights(torch.tensor([[[1.0]], [[1.0]]]), torch.tensor([[3.0]]))
        tensor([[0.5000, 0.5000]])
    """
    return ((keys * query).sum(dim=2).T / tau).softmax(dim=1)


def g_detkd_blend(regions: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Weighted sum of the regions pooled from each level, ``sum_l weights_l * regions_l``; gradient flows to both.

    Args:
        regions: L tensors [N, C, S, S].
        weights: [N, L].

    Returns:
        [N, C, S, S].
    """
    blended = regions[0] * weights[:, 0, None, None, None]
    for level, pooled in enumerate(regions[1:], start=1):
        blended = torch.addcmul(blended, pooled, weights[:, level, None, None, None])
    return blended


def g_detkd_sgfi_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Semantic-guided feature imitation: the mean over all values of the squared difference of regions.

    Args:
        student: [N, C, S, S] weighted sum over levels, in the teacher's channels; gradient flows.
        teacher: [N, C, S, S] regions pooled from the teacher's own level, treated as constant.

    Returns:
        [] the loss; 0, connected to the student, if there are no regions.

    Example:
        >>> float(g_detkd_sgfi_loss(torch.ones(2, 3, 7, 7), torch.zeros(2, 3, 7, 7)))
        1.0
    """
    return F.mse_loss(student, teacher.detach(), reduction="sum") / divisor_over_ranks(student.numel(), student)


def g_detkd_ckd_loss(
    student: Tensor,
    teacher: Tensor,
    gamma: float = 0.07,
    *,
    bank: Tensor | None = None,
    ignored: Tensor | None = None,
    positive_in_denominator: bool = True,
) -> Tensor:
    """Contrastive knowledge distillation: each student embedding should be nearest to the teacher's of the same region.

    With cosines ``c``, the mean over regions of ``log sum_j exp(c_ij / gamma) - c_ii / gamma``; j runs over the region itself,
    the other regions of the batch, and the bank.

    Args:
        student: [N, D] projected embeddings; gradient flows.
        teacher: [N, D] embeddings of the same regions, treated as constant.
        gamma: temperature, above 0.
        bank: [M, D] teacher embeddings of earlier batches, of length 1; None: none.
        ignored: [N, N] bool, pairs of overlapping regions, which are not contrasted; None: none.
        positive_in_denominator: False: the sum leaves out the region itself, as in a public re-implementation, so that the loss
            can be negative. True: the paper's form, at least 0.

    Returns:
        [] the loss; 0, connected to the student, if there are no regions.

    Example:
        >>> rows = torch.eye(2)
        >>> round(float(g_detkd_ckd_loss(rows, 5 * rows, gamma=1.0)), 4)
        0.3133
    """
    units, fixed = g_detkd_units(student), g_detkd_units(teacher.detach())
    found = info_nce(units, fixed, gamma, bank=bank, ignored=ignored, positive_in_denominator=positive_in_denominator)
    return found.sum() / divisor_over_ranks(len(found), found)


def g_detkd_units(rows: Tensor) -> Tensor:
    """Embeddings [N, D] scaled to length 1, as they are compared and kept in the bank; rows of zeros stay zeros."""
    return F.normalize(rows, dim=1, eps=SHORTEST)


def g_detkd_class_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of the class scores of regions, background included: a sum over classes, a mean over regions.

    The form is our choice, because the published notes name none.

    Args:
        student_logits: [N, K+1] softmax logits; gradient flows.
        teacher_logits: [N, K+1] in the same order of classes, treated as constant.
        temperature: T, above 0; the loss has the factor T^2.

    Returns:
        [] the loss; 0, connected to the student, if there are no regions.
    """
    found = kl_divergence(student_logits, teacher_logits, temperature)
    return found.sum() / divisor_over_ranks(len(found), found)


def g_detkd_box_loss(
    student_deltas: Tensor,
    teacher_deltas: Tensor,
    teacher_logits: Tensor,
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """Class-aware box imitation: the mean over regions of ``| sum_c p_c (t_c - s_c) |`` with the teacher's probabilities p.

    The background has a probability but no box, so it adds nothing.

    Args:
        student_deltas: [N, K, 4], or class-agnostic [N, 1, 4]; gradient flows.
        teacher_deltas: [N, K, 4] or [N, 1, 4], treated as constant.
        teacher_logits: [N, K+1] softmax logits, background last, treated as constant.
        reduction: over the 4 numbers of a box; the published notes leave it open.

    Returns:
        [] the loss; 0, connected to the student, if there are no regions.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])  # the class and the background have probability 1/2
        >>> float(g_detkd_box_loss(torch.ones(1, 1, 4), torch.zeros(1, 1, 4), logits))
        2.0
    """
    probabilities = teacher_logits.detach().softmax(dim=1)[:, :-1, None]
    distance = (probabilities * (teacher_deltas.detach() - student_deltas)).sum(dim=1).abs()
    rows = distance.sum(dim=1) if reduction == "sum" else distance.mean(dim=1)
    return rows.sum() / divisor_over_ranks(len(rows), rows)
