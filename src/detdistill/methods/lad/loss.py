"""Loss functions of LAD: losses under given labels, soft labels (SoLAD), and the costs of two networks (CoLAD).

Nguyen et al., "Improving Object Detection by Label Assignment Distillation", WACV 2022, arXiv 2108.10520. The labels themselves
are computed by ``detdistill.functional.paa``.

Shape letters: B images, P predictions of an image, K classes, G boxes of an image, M positives or candidates, R predictions of
the region.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.functional.assign import pairwise_iou
from detdistill.functional.boxes import giou_loss, paired_iou
from detdistill.functional.counting import EPSILON, mean_over_ranks, number_objects, number_of_ranks
from detdistill.functional.soft_targets import focal_kl_divergence
from detdistill.functional.sparse_focal import focal_rows
from detdistill.structures import IGNORED, Target


class LADLabelTerms(NamedTuple):
    """The losses of LAD under given labels, [] each, weighted by 1, 1.3 and 0.5."""

    classification: Tensor
    bbox_regression: Tensor
    iou: Tensor | None
    """None without an IoU branch."""


def lad_label_terms(
    logits: Tensor,
    boxes_xyxy: Tensor,
    quality: Tensor | None,
    matched: Tensor,
    targets: Sequence[Target],
    box_weight: float = 1.3,
    quality_weight: float = 0.5,
) -> LADLabelTerms:
    """The losses of LAD's released code under given labels.

    - classification: focal loss (alpha 0.25, gamma 2) over all predictions that are not ignored, divided by the number of
      positives N, at least one per image;
    - boxes: GIoU loss of the positives, divided by N. It is not weighted by the IoU, unlike PAA's own loss;
    - IoU branch: cross-entropy with the IoU of the positives' boxes, divided by N.

    N is the mean over processes (released: of one process). Without positives the last two are 0.

    Args:
        logits: [B, P, K] sigmoid logits; gradient flows.
        boxes_xyxy: [B, P, 4] decoded boxes; gradient flows.
        quality: [B, P] logits of the IoU; gradient flows. None: no such branch.
        matched: [B, P] index of the box within the image's ``Target``; -1 negative, -2 ignored.
        targets: ground truth of each image.
        box_weight: factor of the box loss.
        quality_weight: factor of the loss of the IoU branch.
    """
    image, index = torch.nonzero(matched >= 0, as_tuple=True)
    rows = [row[row >= 0] for row in matched]
    labels = torch.cat([target.labels[row] for target, row in zip(targets, rows, strict=True)])
    boxes = torch.cat([target.boxes_xyxy[row] for target, row in zip(targets, rows, strict=True)]).to(boxes_xyxy.dtype)
    number = mean_over_ranks(logits.new_tensor(len(image)))
    wanted = torch.full_like(matched, -1)
    wanted[image, index] = labels
    focal = focal_rows(logits, wanted).masked_fill(matched == IGNORED, 0.0)
    predicted, count = boxes_xyxy[image, index], number.clamp(min=1 / number_of_ranks()) + EPSILON
    branch = None
    if quality is not None:
        iou = paired_iou(predicted.detach(), boxes)
        entropy = F.binary_cross_entropy_with_logits(quality[image, index], iou, reduction="sum")
        branch = quality_weight * entropy / count
    return LADLabelTerms(
        classification=focal.sum() / (number.clamp(min=len(matched)) + EPSILON),
        bbox_regression=box_weight * giou_loss(predicted, boxes).sum() / count,
        iou=branch,
    )


class LADSoftTerms(NamedTuple):
    """The unweighted soft losses of SoLAD, [] each."""

    classification: Tensor
    box: Tensor
    iou: Tensor | None
    """None without an IoU branch on both sides."""


@torch.no_grad()
def lad_region(boxes_xyxy: Tensor, targets: Sequence[Target], sizes: Tensor, min_iou: float = 0.5) -> Tensor:
    """Largest IoU of each of the teacher's boxes with a ground-truth box, 0 unless it is above ``min_iou``.

    Args:
        boxes_xyxy: [B, P, 4] of the teacher; they are clipped to the image.
        targets: ground truth; crowd boxes are left out.
        sizes: [B, 2] valid height and width of each image.
        min_iou: the IoU must be above it.

    Returns:
        [B, P].
    """
    overlaps = torch.zeros_like(boxes_xyxy[..., 0])
    for image, target in enumerate(targets):
        truth = target.without_crowd().boxes_xyxy.to(boxes_xyxy.dtype)
        if len(truth):
            overlaps[image] = pairwise_iou(_clipped(boxes_xyxy[image], sizes[image]), truth).amax(dim=1)
    return overlaps.masked_fill(~(overlaps > min_iou), 0.0)


def lad_soft_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_boxes_xyxy: Tensor,
    teacher_boxes_xyxy: Tensor,
    student_quality: Tensor | None,
    teacher_quality: Tensor | None,
    overlaps: Tensor,
    sizes: Tensor,
    mask: Tensor | None = None,
    power: float = 0.5,
) -> LADSoftTerms:
    """Soft labels: the student's scores, boxes and IoU should be the teacher's.

    With ``U`` the sum of ``overlaps`` (mean over processes; released: of one process), and the region where they are above 0:

    - classification: ``focal_kl_divergence`` summed over all predictions of ``mask`` and all classes, divided by U;
    - box: GIoU loss with the teacher's box, both clipped to the image, weighted by the overlap, summed over the region,
      divided by U;
    - iou: ``focal_kl_divergence`` of the IoU branches, summed over the region, divided by U.

    All are 0 if U is 0 (images without boxes).

    Args:
        student_logits: [B, P, K] sigmoid logits; gradient flows.
        teacher_logits: [B, P, K], treated as constant.
        student_boxes_xyxy: [B, P, 4]; gradient flows.
        teacher_boxes_xyxy: [B, P, 4], treated as constant.
        student_quality: [B, P] logits of the IoU; gradient flows. None: no such branch.
        teacher_quality: [B, P] or None.
        overlaps: [B, P] from ``lad_region``.
        sizes: [B, 2] valid height and width of each image.
        mask: [B, P] bool, predictions whose classes are compared; None: all.
        power: exponent of the difference of the scores (gamma).
    """
    image, index = torch.nonzero(overlaps > 0, as_tuple=True)
    weights = overlaps[image, index]
    total = mean_over_ranks(overlaps.sum())
    scale = torch.where(total > 0, 1 / total.clamp(min=1e-6), 0.0)
    classes = (student_logits, teacher_logits) if mask is None else (student_logits[mask], teacher_logits[mask])
    mine, theirs = (_clipped(boxes[image, index], sizes[image]) for boxes in (student_boxes_xyxy, teacher_boxes_xyxy.detach()))
    iou = None
    if student_quality is not None and teacher_quality is not None:
        iou = focal_kl_divergence(student_quality[image, index], teacher_quality[image, index], power).sum() * scale
    return LADSoftTerms(
        classification=focal_kl_divergence(*classes, power).sum() * scale,
        box=(weights * giou_loss(mine, theirs)).sum() * scale,
        iou=iou,
    )


def _clipped(boxes_xyxy: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [N, 4] clipped to images of ``sizes`` [2] or [N, 2] (height, width)."""
    limit = sizes.to(boxes_xyxy).flip(-1).repeat(*[1] * (sizes.ndim - 1), 2)
    return torch.minimum(boxes_xyxy.clamp(min=0), limit)


def lad_switched_costs(student: Tensor, teacher: Tensor, candidates: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The costs of the network that separates the candidates of a box better (the switch of CoLAD).

    For each box and level the ratio of the standard deviation (unbiased) to the mean of the candidates' costs is compared. The
    student's costs are used if its ratio is at least the teacher's. A single candidate has no deviation; there the smaller
    cost is used.

    Args:
        student: [M] costs of the student's predictions, as ``paa_costs``.
        teacher: [M] costs of the teacher's predictions.
        candidates: [B, P] from ``paa_candidates``.
        levels: [P] level of each prediction.

    Returns:
        [M] costs, and [] the fraction of pairs of box and level with the teacher's costs: the mean over images that have
        candidates, 0 without any.
    """
    image, index = torch.nonzero(candidates >= 0, as_tuple=True)
    if len(image) == 0:
        return student, student.new_zeros(())
    objects, _ = number_objects(image, candidates[image, index])
    groups, group = torch.unique(objects * (int(levels.max()) + 1) + levels[index], return_inverse=True)
    both = torch.stack([student, teacher], dim=1)
    count = both.new_zeros(len(groups)).index_add(0, group, torch.ones_like(student))[:, None]
    mean = both.new_zeros(len(groups), 2).index_add(0, group, both) / count
    squares = both.new_zeros(len(groups), 2).index_add(0, group, (both - mean[group]).square())
    ratio = (squares / (count - 1).clamp(min=1)).sqrt() / mean
    better = torch.where(count[:, 0] > 1, ratio[:, 0] >= ratio[:, 1], mean[:, 0] <= mean[:, 1])
    where = torch.zeros_like(groups).index_put((group,), image)  # the image of each group
    sums = both.new_zeros(len(candidates), 2).index_add(0, where, torch.stack([~better, better | ~better], dim=1).to(both.dtype))
    used = sums[:, 1] > 0
    return torch.where(better[group], student, teacher), (sums[used, 0] / sums[used, 1]).mean()
