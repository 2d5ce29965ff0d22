"""DETRDistill's losses, matching and masks; the method and its source are in ``method.py``.

Shape letters: B images, L decoder layers, N student's queries, M teacher's queries, K classes, D width, G boxes of an image.
Boxes of queries are cxcywh in parts of the valid image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from detdistill.functional.boxes import giou_loss, paired_iou, pairwise_iou
from detdistill.functional.counting import EPSILON, mean_over_ranks
from detdistill.functional.level_maps import check_maps
from detdistill.functional.matching import giou_cost, hungarian, l1_cost
from detdistill.structures import (
    NEGATIVE,
)

FORBIDDEN = 1e6
"""Cost of pairs that must not be matched."""


class LogitsWeights(NamedTuple):
    """Weights of class and box terms, in the losses or in the matching cost."""

    cls: float = 1.0
    """Weight of the binary cross-entropy with the teacher's scores, summed over classes."""
    l1: float = 5.0
    """Weight of the L1 distance of boxes cxcywh as fractions of the image."""
    giou: float = 2.0
    """Weight of the GIoU in pixels."""


RELEASED = LogitsWeights()
"""The weights of the released code."""


class LogitsTerms(NamedTuple):
    """Weighted losses of the predictions, [L] each."""

    cls: Tensor
    l1: Tensor
    giou: Tensor


def detrdistill_layers(student: int, teacher: int) -> list[int]:
    """Teacher layer that each student layer follows: the last layer of its group, with the teacher's layers in equal groups.

    Student layer k of S (from 1) follows teacher layer ceil(k * T / S); a deeper student follows some layers several times.

    Args:
        student: S, number of decoder layers of the student.
        teacher: T, number of decoder layers of the teacher.

    Returns:
        Indices from 0, one for each student layer.

    Raises:
        ValueError: S or T is below 1.

    Example:
        >>> detrdistill_layers(3, 6)
        [1, 3, 5]
    """
    if min(student, teacher) < 1:
        raise ValueError(f"decoders need one layer or more; the student has {student}, the teacher {teacher}")
    return [-(-layer * teacher // student) - 1 for layer in range(1, student + 1)]


def detrdistill_targets(boxes: Tensor) -> Tensor:
    """The teacher's boxes [..., 4] clipped to the image, as targets; they may differ from equal, unclipped student boxes."""
    return box_convert(box_convert(boxes, "cxcywh", "xyxy").clamp(0, 1), "xyxy", "cxcywh")


def _pixels(boxes: Tensor, sizes_hw: Tensor) -> Tensor:
    """Boxes [B, ..., 4] as xyxy in pixels of images of [B, 2] height and width."""
    scale = sizes_hw.flip(-1).repeat(1, 2).to(boxes)
    return box_convert(boxes, "cxcywh", "xyxy") * scale.view(len(scale), *[1] * (boxes.ndim - 2), 4)


@torch.no_grad()
def detrdistill_match(
    student_logits: Tensor,
    student_boxes: Tensor,
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    sizes_hw: Tensor,
    allowed: Tensor | None = None,
    costs: LogitsWeights = RELEASED,
) -> Tensor:
    """Index of the teacher's query that each student query should follow (Hungarian matching, section 3.2).

    The cost of a pair is the cross-entropy with the teacher's scores, plus the L1 distance, minus the GIoU. The teacher's
    boxes are clipped to the image.

    Args:
        student_logits: [L, B, N, K].
        student_boxes: [L, B, N, 4].
        teacher_logits: [L, B, M, K], of the layers to follow.
        teacher_boxes: [L, B, M, 4].
        sizes_hw: [B, 2] valid height and width.
        allowed: [L, B, M] bool, the teacher's queries that may be matched; None: all.
        costs: weights of the cost's parts.

    Returns:
        [L, B, N] index of the teacher's query, -1 for unmatched student queries (if M < N).
    """
    targets, costed = detrdistill_targets(teacher_boxes), []
    for logits, said, mine, theirs in zip(student_logits, teacher_logits, student_boxes, targets, strict=True):
        # p softplus(-x) + (1-p) softplus(x) = softplus(x) - p x
        entropy = F.softplus(logits).sum(dim=-1, keepdim=True) - logits @ said.sigmoid().transpose(1, 2)
        apart = giou_cost(_pixels(mine, sizes_hw), _pixels(theirs, sizes_hw)[:, None])
        costed.append(costs.cls * entropy + costs.l1 * l1_cost(mine, theirs[:, None]) + costs.giou * apart)
    cost = torch.stack(costed)  # [L, B, N, M], matched at once: the device is waited for once, not layer by layer
    if allowed is None:
        return hungarian(cost)
    # A constant cost for the others: as many allowed queries as possible are matched, as cheaply as possible.
    matched = hungarian(cost.masked_fill(~allowed[:, :, None], FORBIDDEN))
    return matched.masked_fill(~allowed.gather(2, matched.clamp(min=0)), NEGATIVE)


def detrdistill_logits_loss(
    student_logits: Tensor,
    student_boxes: Tensor,
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    sizes_hw: Tensor,
    matched: Tensor,
    weights: LogitsWeights = RELEASED,
) -> LogitsTerms:
    """Losses between each student query and the teacher's query matched to it, for each layer.

    Binary cross-entropy with the teacher's scores (not zero at equality: the teacher's entropy remains), L1 distance in parts
    of the image, and 1 - GIoU in pixels, each summed and divided by the matched student queries of the batch. Queries that
    are not matched are left out. (The released code gives them a class target above 1.)

    Args:
        student_logits: [L, B, N, K]; gradient flows.
        student_boxes: [L, B, N, 4]; gradient flows.
        teacher_logits: [L, B, M, K], treated as constant.
        teacher_boxes: [L, B, M, 4], treated as constant; clipped to the image.
        sizes_hw: [B, 2] valid height and width.
        matched: [L, B, N], see ``detrdistill_match``.
        weights: weights of the three losses.
    """
    good = (matched >= 0).to(student_logits.dtype)
    number = mean_over_ranks(good.sum(dim=(1, 2))) + EPSILON
    index = matched.clamp(min=0)[..., None]
    scores = teacher_logits.detach().sigmoid()
    scores = scores.gather(2, index.expand(*index.shape[:3], scores.shape[-1]))
    targets = detrdistill_targets(teacher_boxes.detach()).gather(2, index.expand(*index.shape[:3], 4))
    entropy = F.binary_cross_entropy_with_logits(student_logits, scores, reduction="none").sum(dim=-1)
    distance = (student_boxes - targets).abs().sum(dim=-1)
    mine, theirs = (_pixels(boxes.transpose(0, 1), sizes_hw).transpose(0, 1) for boxes in (student_boxes, targets))
    apart = giou_loss(mine, theirs)
    parts = (entropy, distance, apart)
    return LogitsTerms(*(w * (part * good).sum(dim=(1, 2)) / number for w, part in zip(weights, parts, strict=True)))


def detrdistill_split_loss(
    student_logits: Tensor,
    student_boxes: Tensor,
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    sizes_hw: Tensor,
    positive: Tensor,
    costs: LogitsWeights = RELEASED,
    weights: LogitsWeights = RELEASED,
) -> LogitsTerms:
    """The paper's form (Eq. 2 to 4): positive and negative teacher queries are matched separately; negatives teach boxes only.

    Args:
        student_logits: [L, B, N, K]; gradient flows.
        student_boxes: [L, B, N, 4]; gradient flows.
        teacher_logits: [L, B, M, K], treated as constant.
        teacher_boxes: [L, B, M, 4], treated as constant.
        sizes_hw: [B, 2] valid height and width.
        positive: [L, B, M] bool, the teacher's queries that its own matching assigned to a ground-truth box.
        costs: weights of the cost in both matchings.
        weights: weights of the losses; the class loss applies to positives only.
    """
    predictions = (student_logits, student_boxes, teacher_logits, teacher_boxes, sizes_hw)
    terms = []
    for allowed, kept in ((positive, weights), (~positive, weights._replace(cls=0.0))):
        matched = detrdistill_match(*predictions, allowed, costs)
        terms.append(detrdistill_logits_loss(*predictions, matched, kept))
    return LogitsTerms(*(first + second for first, second in zip(*terms, strict=True)))


@torch.no_grad()
def detrdistill_query_weights(
    logits: Tensor, boxes: Tensor, boxes_xyxy: Sequence[Tensor], sizes_hw: Tensor, max_per_img: int = 100
) -> Tensor:
    """Weights [L, B, M] of the teacher's queries in the released masks.

    A query's weight is the sum of its scores among the best ``max_per_img`` pairs of query and class, times the largest IoU
    of its box with any ground-truth box. In an image without ground-truth boxes it is the sum of scores alone.

    Args:
        logits: [L, B, M, K] of the teacher.
        boxes: [L, B, M, 4] of the teacher, not clipped.
        boxes_xyxy: ground truth, B tensors [G, 4] in pixels.
        sizes_hw: [B, 2] valid height and width.
        max_per_img: number of pairs of query and class in each image and layer.
    """
    best, place = logits.sigmoid().flatten(2).topk(min(max_per_img, logits.shape[2] * logits.shape[3]), dim=2)
    weights = torch.zeros_like(boxes[..., 0]).scatter_add(2, place // logits.shape[3], best.to(boxes.dtype))
    for image, ground_truth in enumerate(boxes_xyxy):
        if len(ground_truth):
            mine = _pixels(boxes[:, image].reshape(1, -1, 4), sizes_hw[image : image + 1])[0]
            overlap = pairwise_iou(mine, ground_truth.to(mine.dtype)).amax(dim=1)
            weights[:, image] *= overlap.view_as(weights[:, image])
    return weights


@torch.no_grad()
def detrdistill_masks(weights: Tensor, embedding: Tensor, teacher: Tensor, floor: float = 0.01) -> Tensor:
    """The released masks of one level, large where the teacher's features resemble its highly weighted queries.

    The weighted sum over queries of the cosine between query and cell, clamped from below to ``floor`` and divided by its
    maximum over the map. Values are at most 1, and all 1 if no cell reaches ``floor``.

    Args:
        weights: [L, B, M], see ``detrdistill_query_weights``.
        embedding: [L, B, M, D] of the teacher.
        teacher: [B, D, H, W] the teacher's map.
        floor: smallest value before the division, above 0.

    Returns:
        [L, B, H, W].
    """
    direction = torch.einsum("lbm,lbmd->lbd", weights, F.normalize(embedding, dim=-1))
    mask = torch.einsum("lbd,bdhw->lbhw", direction, F.normalize(teacher, dim=1)).clamp(min=floor)
    return mask / mask.amax(dim=(2, 3), keepdim=True)


@torch.no_grad()
def detrdistill_quality(
    logits: Tensor,
    boxes: Tensor,
    matched: Tensor,
    boxes_xyxy: Sequence[Tensor],
    labels: Sequence[Tensor],
    sizes_hw: Tensor,
    gamma: float = 0.5,
) -> Tensor:
    """Quality of the teacher's queries in the paper's masks (Eq. 8): score^gamma * IoU^(1-gamma), 0 without a box.

    Args:
        logits: [L, B, M, K] of the teacher; the score is that of the box's class.
        boxes: [L, B, M, 4] of the teacher.
        matched: [L, B, M] index of the ground-truth box in the teacher's own matching, negative for none.
        boxes_xyxy: ground truth, B tensors [G, 4] in pixels.
        labels: B tensors [G].
        sizes_hw: [B, 2] valid height and width.
        gamma: exponent of the score; that of the IoU is 1 - gamma.

    Returns:
        [L, B, M].
    """
    quality = torch.zeros_like(boxes[..., 0])
    for image, (ground_truth, classes) in enumerate(zip(boxes_xyxy, labels, strict=True)):
        layer, query = torch.nonzero(matched[:, image] >= 0, as_tuple=True)
        if not len(query):
            continue
        box = matched[layer, image, query]
        score = logits[layer, image, query, classes[box]].sigmoid()
        mine = _pixels(boxes[layer, image, query][None], sizes_hw[image : image + 1])[0]
        overlap = paired_iou(mine, ground_truth[box].to(mine.dtype))
        quality[layer, image, query] = (score**gamma * overlap ** (1 - gamma)).to(quality.dtype)
    return quality


@torch.no_grad()
def detrdistill_quality_weights(quality: Tensor, embedding: Tensor, teacher: Tensor) -> Tensor:
    """The paper's weight of each cell (Eq. 6 and 7): mean over queries of quality times the squared product with the cell.

    Args:
        quality: [L, B, M], see ``detrdistill_quality``.
        embedding: [L, B, M, D] of the teacher.
        teacher: [B, D, H, W] the teacher's map.

    Returns:
        [L, B, H, W].
    """
    weights = []
    for share, queries in zip(quality, embedding, strict=True):
        # sum_i q_i (Q_i . F)^2 is a quadratic form of F; so no map for each query is kept.
        form = torch.einsum("bm,bmd,bme->bde", share, queries, queries)
        value = (torch.einsum("bde,behw->bdhw", form, teacher) * teacher).sum(dim=1)
        weights.append(value.clamp(min=0) / quality.shape[-1])
    return torch.stack(weights)


def detrdistill_feature_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """[L] mean over images, channels and cells of one level of the weighted squared difference (Eq. 7), for each layer.

    Args:
        student: [B, D, H, W] in the teacher's channels; gradient flows.
        teacher: [B, D, H, W], treated as constant.
        weights: [L, B, H, W], the square of ``detrdistill_masks``, or ``detrdistill_quality_weights``.

    Example:
        >>> maps = torch.ones(1, 2, 2, 2)
        >>> detrdistill_feature_loss(3 * maps, maps, torch.tensor([1.0, 0.5]).view(2, 1, 1, 1).expand(2, 1, 2, 2)).tolist()
        [4.0, 2.0]
    """
    check_maps("detrdistill_feature_loss", student, teacher)
    return (weights * (teacher.detach() - student).square().mean(dim=1)).mean(dim=(1, 2, 3))


def detrdistill_contrastive_loss(student: Tensor, teacher: Tensor, temperature: float = 0.07) -> Tensor:
    """[] cross-entropy that makes the student row with the same index the most similar one to each teacher row.

    Args:
        student: [R, C] of length 1; gradient flows.
        teacher: [R, C] of length 1; gradient flows (to the teacher's tower).
        temperature: divides the similarities.
    """
    return F.cross_entropy(teacher @ student.T / temperature, torch.arange(len(student), device=student.device))
