"""Losses of CrossKD as pure functions, and the alignment of the student's inner maps.

Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024.

Shape letters: B images, K classes, C channels, M positives, S steps of a distribution, H x W cells.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.functional.boxes import giou_loss, paired_iou
from detdistill.functional.counting import EPSILON, mean_over_ranks
from detdistill.functional.soft_targets import kl_divergence, soft_binary_rows


class CrossKDMoments(NamedTuple):
    """Mean and standard deviation of each channel over a batch, [C] each."""

    mean: Tensor
    std: Tensor


def crosskd_moments(counts: Tensor, means: Tensor, squares: Tensor) -> CrossKDMoments:
    """Moments over a batch from those of its images (their sizes may differ).

    Args:
        counts: [B] number of cells.
        means: [B, C] mean over the cells.
        squares: [B, C] sum over the cells of the squared difference from the image's mean.

    Returns:
        Mean and standard deviation (unbiased; 0 for a single cell) over all cells of all images.

    Example:
        >>> maps = torch.tensor([[1.0, 3.0], [5.0, 7.0]])  # two images of two cells, one channel
        >>> means = maps.mean(dim=1, keepdim=True)
        >>> squares = (maps - means).square().sum(dim=1, keepdim=True)
        >>> moments = crosskd_moments(torch.tensor([2.0, 2.0]), means, squares)
        >>> moments.mean.tolist(), bool((moments.std - maps.std()).abs() < 1e-6)
        ([4.0], True)
    """
    weights = counts.to(means.dtype)[:, None]
    total = weights.sum()
    mean = (weights * means).sum(dim=0) / total
    spread = squares.sum(dim=0) + (weights * (means - mean).square()).sum(dim=0)
    return CrossKDMoments(mean, (spread / (total - 1).clamp(min=1)).sqrt())


def crosskd_align(maps: Tensor, moments: CrossKDMoments, rectify: bool = True) -> Tensor:
    """Give each channel of the student's map the teacher's mean and standard deviation over the batch.

    Standard deviations are unbiased; 1e-6 is added to the student's. The student's moments carry gradient. A positive affine
    map of a channel changes nothing.

    Args:
        maps: [B, C, H, W] of the student; gradient flows.
        moments: the teacher's, treated as constant.
        rectify: apply a ReLU to the result, because the teacher's next layer reads the output of a ReLU; False for the neck's
            maps.

    Returns:
        [B, C, H, W].
    """
    dims = (0, 2, 3)
    cells = maps.numel() // maps.shape[1]
    std, mean = torch.std_mean(maps, dim=dims, keepdim=True, correction=1 if cells > 1 else 0)
    wanted_mean, wanted_std = (value.detach()[:, None, None] for value in moments)
    aligned = (maps - mean) * (wanted_std / (std + 1e-6)) + wanted_mean
    return aligned.relu() if rectify else aligned


def crosskd_class_loss(
    cross_logits: Tensor, teacher_logits: Tensor, weights: Tensor, normalizer: Tensor | float, beta: float = 1.0
) -> Tensor:
    """``sum u * |s - t|^beta * BCE(s, t) / N`` with sigmoids; the gradient also flows through the factor, as released.

    Args:
        cross_logits: [..., K] of the teacher's head on the student's maps; gradient flows.
        teacher_logits: [..., K] of the teacher itself, treated as constant.
        weights: u [...].
        normalizer: N.
        beta: exponent of the difference, at least 1.

    Returns:
        [] the loss.
    """
    return (soft_binary_rows(cross_logits, teacher_logits, beta) * weights).sum() / normalizer


def crosskd_scores(teacher_logits: Tensor, weights: Tensor) -> Tensor:
    """Weight of each location in the box loss, [...]: the teacher's best class score; 0 where ``weights`` [...] are 0.

    Args:
        teacher_logits: [..., K] of the teacher itself.
        weights: [...] label weights of the student's assignment.
    """
    return teacher_logits.detach().amax(dim=-1).sigmoid() * (weights > 0)


def crosskd_distribution_loss(cross_sides: Tensor, teacher_sides: Tensor, scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Divergence of the distributions of box sides (GFL): ``sum r * KL_T / 4 / sum r`` over locations and sides.

    Args:
        cross_sides: [..., 4, S] logits; gradient flows.
        teacher_sides: [..., 4, S], treated as constant.
        scores: r [...] (``crosskd_scores``). The divisor is averaged over processes.
        temperature: T of the softmax over steps.

    Returns:
        [] the loss, 0 if all r are 0.
    """
    losses = kl_divergence(cross_sides, teacher_sides, temperature).sum(dim=-1)
    total = mean_over_ranks(scores.sum())
    return (losses * scores).sum() / torch.where(total > 0, total, 1) / (4 + EPSILON)


def crosskd_box_loss(
    cross_boxes_xyxy: Tensor,
    teacher_boxes_xyxy: Tensor,
    scores: Tensor,
    normalizer: Tensor | float,
    box_loss: Literal["giou", "log_iou"] = "giou",
) -> Tensor:
    """Distance of decoded boxes: ``sum r * (1 - GIoU) / N`` (RetinaNet, ATSS) or ``sum r * -log max(IoU, 1e-6) / N`` (FCOS).

    Args:
        cross_boxes_xyxy: [..., 4] of the teacher's head on the student's maps; gradient flows.
        teacher_boxes_xyxy: [..., 4] of the teacher itself, treated as constant.
        scores: r [...] (``crosskd_scores``).
        normalizer: N.
        box_loss: which of both.

    Returns:
        [] the loss.
    """
    fixed = teacher_boxes_xyxy.detach()
    if box_loss == "giou":
        losses = giou_loss(cross_boxes_xyxy, fixed)
    else:
        losses = -paired_iou(cross_boxes_xyxy, fixed).clamp(min=1e-6).log()
    return (losses * scores).sum() / normalizer


def crosskd_centerness_loss(cross_quality: Tensor, teacher_quality: Tensor, normalizer: Tensor | float) -> Tensor:
    """``sum BCE(c, sigmoid(c_t)) / N`` over the student's positives (ATSS).

    Args:
        cross_quality: [M] centerness logits of the teacher's head on the student's maps; gradient flows.
        teacher_quality: [M] of the teacher itself, treated as constant.
        normalizer: N.

    Returns:
        [] the loss; for equal logits it is the entropy of the teacher's centerness, not 0.
    """
    wanted = teacher_quality.detach().sigmoid()
    return F.binary_cross_entropy_with_logits(cross_quality, wanted, reduction="sum") / normalizer
