"""Losses of LD as pure functions, and the choice of the predictions that they compare.

Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022. Numbers of equations are not given, because the
formulas are those of the released code.

Shape letters: B images, P predictions of an image, M chosen predictions, G ground-truth boxes, K classes, S and T steps of a
distribution, C channels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms

from detdistill.functional.assign import pairwise_iou
from detdistill.functional.atss import atss_thresholds
from detdistill.functional.counting import share_over_ranks
from detdistill.functional.distributions import project_distribution
from detdistill.functional.soft_targets import mean_kl_divergence

Quality = Literal["iof", "iou"]


def ld_box_loss(
    student_logits: Tensor, teacher_logits: Tensor, weights: Tensor, temperature: float = 10.0, divisor: float = 4.0
) -> Tensor:
    """Divergence of the distributions of box sides: ``sum w * KL_T / divisor`` over predictions and sides.

    ``KL_T`` is ``T^2`` times the mean over steps of ``p (log p - log q)``, so it is S times smaller than the usual divergence.
    The sum is not divided by the number of predictions: it grows with the batch and the number of objects, as released.

    Args:
        student_logits: [M, 4, S]; gradient flows.
        teacher_logits: [M, 4, S] on the same steps (else see ``ld_rebinned``), treated as constant.
        weights: [M], treated as constant: the best class score of each prediction (main region), or its IoU (valuable region).
        temperature: T.
        divisor: 4 in the main region, 16 in the valuable region.

    Returns:
        [] the loss, 0 for equal logits and for M = 0.

    Example:
        >>> logits = torch.tensor([[[0.0, 2.0]] * 4])
        >>> [round(float(ld_box_loss(logits * scale, logits, torch.ones(1), 1.0)), 4) for scale in (1, 0)]
        [0.0, 0.1639]
    """
    losses = mean_kl_divergence(student_logits, teacher_logits, temperature)
    return (losses * weights.detach()[:, None]).sum() / divisor


def ld_class_loss(student_logits: Tensor, teacher_logits: Tensor, weights: Tensor, temperature: float = 2.0) -> Tensor:
    """Divergence of the softmaxes over classes, ``sum w * KL_T`` over predictions, with ``KL_T`` as in ``ld_box_loss``.

    Args:
        student_logits: [M, K]; gradient flows.
        teacher_logits: [M, K], treated as constant.
        weights: [M], as released one over the number of positives on the level of each prediction.
        temperature: T.

    Returns:
        [] the loss, 0 for equal logits and for M = 0.
    """
    return (mean_kl_divergence(student_logits, teacher_logits, temperature) * weights).sum()


def ld_rebinned(teacher_logits: Tensor, positions: Tensor, steps: Tensor, temperature: float = 10.0) -> Tensor:
    """Logits on the student's steps whose softmax at the temperature is the teacher's, moved to these steps.

    For detectors whose steps differ; not in the paper. See ``project_distribution`` for when this is exact.

    Args:
        teacher_logits: [M, 4, S].
        positions: [M, 4, S] position of each of the teacher's steps on the student's scale.
        steps: [T] the student's steps.
        temperature: the temperature of the loss that follows.

    Returns:
        [M, 4, T], without gradient.
    """
    moved = project_distribution((teacher_logits.detach() / temperature).softmax(dim=-1), positions, steps)
    return temperature * moved.clamp(min=torch.finfo(moved.dtype).tiny).log()


class LDRegion(NamedTuple):
    """Valuable region of one image."""

    weights: Tensor
    """[P] weight of each anchor, above 0 in the region and 0 elsewhere."""
    ground_truth: Tensor
    """[P] index of the box that gives an anchor its weight; any index outside of the region."""


@torch.no_grad()
def ld_valuable_region(
    anchors_xyxy: Tensor,
    levels: Tensor,
    ground_truth_xyxy: Tensor,
    gamma: float = 0.25,
    quality: Quality = "iof",
    candidates: int = 9,
) -> LDRegion:
    """The valuable localization region of one image: anchors near a box that are not good enough to be positive.

    With the ATSS threshold t of a box, an anchor belongs to the region if ``gamma * t <= quality < t`` and its IoU with the box
    is above 0. Its weight is the largest such IoU. Positive anchors may belong to it, too.

    Args:
        anchors_xyxy: [P, 4] anchors of all levels.
        levels: [P] level of each anchor.
        ground_truth_xyxy: [G, 4].
        gamma: lower bound as a fraction of the threshold.
        quality: ``iou``: the distance IoU of the paper, IoU - rho^2 / c^2 with the distance rho of the centres and the diagonal c
            of the enclosing box. ``iof``: the same with intersection / area of the anchor instead of the IoU, as released (its
            union is the anchor's area).
        candidates: anchors of each level and box from which the threshold is computed.

    Example:
        >>> anchors = torch.tensor([[0.0, 0.0, 8.0, 8.0], [5.0, 0.0, 13.0, 8.0], [20.0, 0.0, 28.0, 8.0]])
        >>> region = ld_valuable_region(anchors, torch.zeros(3, dtype=torch.int64), anchors[:1] + 0.5)
        >>> [round(weight, 3) for weight in region.weights.tolist()]
        [0.0, 0.258, 0.0]
    """
    count = len(anchors_xyxy)
    if count == 0 or len(ground_truth_xyxy) == 0:
        return LDRegion(anchors_xyxy.new_zeros(count), levels.new_zeros(count))
    overlaps = pairwise_iou(anchors_xyxy, ground_truth_xyxy)
    thresholds = atss_thresholds(anchors_xyxy, levels, ground_truth_xyxy, candidates)
    value = _distance_quality(anchors_xyxy, ground_truth_xyxy, overlaps, quality)
    inside = (value >= gamma * thresholds) & (value < thresholds)
    weights, index = torch.where(inside, overlaps, 0.0).max(dim=1)
    return LDRegion(weights, index)


def _distance_quality(anchors: Tensor, boxes: Tensor, overlaps: Tensor, quality: Quality) -> Tensor:
    """[P, G] IoU, or intersection over anchor, less the squared distance of the centres over the enclosing diagonal's."""
    if quality == "iof":
        areas = (anchors[:, 2:] - anchors[:, :2]).prod(dim=1)[:, None]
        other = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)[None]
        shared = overlaps / (1 + overlaps) * (areas + other)
        overlaps = shared / areas.clamp(min=1e-6)
    distance = (anchors[:, None, :2] + anchors[:, None, 2:] - boxes[:, :2] - boxes[:, 2:]).square().sum(dim=-1) / 4
    corner = torch.minimum(anchors[:, None, :2], boxes[:, :2])
    opposite = torch.maximum(anchors[:, None, 2:], boxes[:, 2:])
    diagonal = (opposite - corner).square().sum(dim=-1) + 1e-6
    return overlaps - distance / diagonal


@torch.no_grad()
def ld_general_instances(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_boxes_xyxy: Tensor,
    teacher_boxes_xyxy: Tensor,
    groups: Tensor,
    count: int = 10,
    iou: float = 0.3,
) -> Tensor:
    """General instances of one level: the predictions whose class scores differ most, after non-maximum suppression (NMS).

    The score of a prediction is ``max_c |t - s|`` of the sigmoids. Its box is that of the side with the higher score of this
    class (Dai et al., "General Instance Distillation for Object Detection", CVPR 2021, section 3.1).

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].
        student_boxes_xyxy: [N, 4].
        teacher_boxes_xyxy: [N, 4].
        groups: [N] int64; NMS and ``count`` apply within each group. The image of each prediction; or all 0, as released,
            where boxes of one image suppress those of another.
        count: largest number of instances of a group.
        iou: threshold of NMS.

    Returns:
        Indices into N, for each group by falling score.
    """
    mine, theirs = student_logits.sigmoid(), teacher_logits.sigmoid()
    score, label = (theirs - mine).abs().max(dim=1)
    from_teacher = (theirs >= mine).gather(1, label[:, None])
    boxes = torch.where(from_teacher, teacher_boxes_xyxy, student_boxes_xyxy)
    kept = batched_nms(boxes, score, groups, iou)
    of_group = groups[kept]
    place = torch.zeros_like(kept)
    for group in torch.unique(of_group).tolist():
        member = of_group == group
        place[member] = torch.arange(int(member.sum()), device=kept.device)
    return kept[place < count]


def ld_imitation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of feature vectors [N, C] at the cells of a region (N: mean over processes); 0 if N is 0.

    Args:
        student: [N, C]; gradient flows.
        teacher: [N, C], treated as constant.
    """
    share = share_over_ranks(torch.tensor(float(len(student)), device=student.device))
    if student.numel() == 0:
        return student.sum()
    return F.mse_loss(student, teacher.detach()) * share
