"""Key regions of objects from the teacher's predictions, and PGD's losses inside the towers of a dense head.

Yang et al., "Prediction-Guided Distillation for Dense Object Detection", ECCV 2022, arXiv 2203.05469.

Shape letters: B images, C channels, H x W cells of one level, P predictions of an image over all levels, G boxes of an image,
K candidates of a box, M cells of the key regions of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.functional.assign import pairwise_iou
from detdistill.functional.attention import spatial_attention
from detdistill.functional.cells import CHUNK, points_inside
from detdistill.functional.counting import divisor_over_ranks

MARGIN = 1e-10
"""A centre is inside a box if its distances to all sides are larger than this."""

# ------------------------------------------------------------------------------------------------------------ key regions


@torch.no_grad()
def pgd_candidates(
    scores: Tensor,
    predicted_xyxy: Tensor,
    boxes_xyxy: Tensor,
    labels: Tensor,
    exponents: Sequence[float],
    count: int = 30,
) -> list[Tensor]:
    """The predictions of highest quality for each ground-truth box, over all levels.

    The quality of a prediction for a box is ``score^(1 - exponent) * IoU^exponent``, with the score of the box's class and
    the IoU of predicted and ground-truth box. Centerness and IoU heads are not part of it.

    Args:
        scores: [P, classes] probabilities of one image.
        predicted_xyxy: [P, 4] decoded boxes in pixels.
        boxes_xyxy: [G, 4] ground truth in pixels.
        labels: [G] columns of ``scores``.
        exponents: weight of the localisation; one result for each.
        count: K; at most P are taken.

    Returns:
        For each exponent [G, K] indices along P, best first.
    """
    count = min(count, len(scores))
    found: list[list[Tensor]] = [[scores.new_zeros(0, count, dtype=torch.int64)] for _ in exponents]
    step = max(1, CHUNK // max(1, len(scores)))
    for boxes, classes in zip(boxes_xyxy.split(step), labels.split(step), strict=True):
        overlap = pairwise_iou(boxes.to(predicted_xyxy.dtype), predicted_xyxy)  # [g, P]
        score = scores[:, classes].T
        for mine, exponent in zip(found, exponents, strict=True):
            mine.append((score ** (1 - exponent) * overlap**exponent).topk(count, dim=1).indices)
    return [torch.cat(mine) for mine in found]


@torch.no_grad()
def pgd_weights(
    candidates: Tensor,
    centers_xy: Tensor,
    boxes_xyxy: Tensor,
    noise: Tensor,
    jitter: float = 0.1,
    in_box_test: Literal["fixed", "official"] = "fixed",
) -> Tensor:
    """Weight of each prediction of an image: a Gaussian fitted to the candidates of each box.

    Mean and covariance are those of the candidates' centres (maximum likelihood), moved by at most half of ``jitter`` pixels
    so that centres on a line have an invertible covariance. The weight of a candidate is the Gaussian at its own centre, 1 in
    the middle, and 0 if the centre is not strictly inside the box. A prediction gets the largest of its weights. Computed in
    float64: float32 does not resolve the determinant of nearly collinear centres.

    Args:
        candidates: [G, K] indices along P (``pgd_candidates``).
        centers_xy: [P, 2] centres of the anchors, or points, in pixels.
        boxes_xyxy: [G, 4] ground truth in pixels.
        noise: [G, K, 2] or more candidates, uniform in 0..1; the centres move by ``(noise - 0.5) * jitter``.
        jitter: range of the movement in pixels.
        in_box_test: ``official`` reads the centres as (y, x), as the released code for FCOS and AutoAssign does.

    Returns:
        [P] 0..1, at most G * K of them above 0; all 0 without boxes. In the dtype of ``centers_xy``.
    """
    weights = centers_xy.new_zeros(len(centers_xy))
    centers, boxes = centers_xy.double()[candidates], boxes_xyxy.double()[:, None]  # [G, K, 2], [G, 1, 4]
    moved = centers + (noise[:, : candidates.shape[1]].double() - 0.5) * jitter
    mean = moved.mean(dim=1, keepdim=True)
    spread = moved - mean
    covariance = spread.transpose(1, 2) @ spread / max(1, candidates.shape[1])
    (xx, xy), (_, yy) = (row.unbind(dim=-1) for row in covariance.unbind(dim=-2))
    x, y = (centers - mean).unbind(dim=-1)
    distance = yy[:, None] * x.square() - 2 * xy[:, None] * x * y + xx[:, None] * y.square()
    determinant = (xx * yy - xy.square()).clamp(min=0) + 1e-10
    value = torch.exp(-0.5 * distance.clamp(min=0) / determinant[:, None])
    tested = _tested(centers, in_box_test)
    inside = ((tested - boxes[..., :2] > MARGIN) & (boxes[..., 2:] - tested > MARGIN)).all(dim=-1)
    value = (value * inside).to(weights.dtype)
    return weights.scatter_reduce_(0, candidates.flatten(), value.flatten(), "amax")


@torch.no_grad()
def pgd_background(centers_xy: Tensor, boxes_xyxy: Tensor, in_box_test: Literal["fixed", "official"] = "fixed") -> Tensor:
    """The centres that are strictly inside no box; a centre on a side is background.

    Args:
        centers_xy: [P, 2] pixels.
        boxes_xyxy: [G, 4] pixels.
        in_box_test: as in ``pgd_weights``.

    Returns:
        [P] bool, all True without boxes.

    Example:
        >>> pgd_background(torch.tensor([[4.0, 4.0], [8.0, 4.0]]), torch.tensor([[0.0, 0.0, 8.0, 8.0]])).tolist()
        [False, True]
    """
    outside = torch.ones(len(centers_xy), dtype=torch.bool, device=centers_xy.device)
    for boxes in boxes_xyxy.split(max(1, CHUNK // max(1, len(centers_xy)))):
        outside &= ~points_inside(_tested(centers_xy, in_box_test), boxes, MARGIN).any(dim=1)
    return outside


def _tested(centers: Tensor, in_box_test: str) -> Tensor:
    return centers.flip(-1) if in_box_test == "official" else centers


def pgd_normalized(weights: Tensor) -> Tensor:
    """Weights of one level, [B, H, W], divided by the number of each image's cells that are not 0 (0 if there is none).

    Example:
        >>> pgd_normalized(torch.tensor([[[0.5, 1.0, 0.0]], [[0.0, 0.0, 0.0]]])).tolist()
        [[[0.25, 0.5, 0.0]], [[0.0, 0.0, 0.0]]]
    """
    return weights / (weights != 0).sum(dim=(1, 2), keepdim=True).clamp(min=1)


# ------------------------------------------------------------------------------------------------------------------ losses


class PGDClassTerms(NamedTuple):
    """The unweighted losses of one level of the class tower, [] each: means over images of sums over cells and channels."""

    foreground: Tensor
    background: Tensor
    attention: Tensor


class PGDBoxTerms(NamedTuple):
    """The unweighted losses of one level of the box tower, [] each."""

    foreground: Tensor
    attention: Tensor


def pgd_class_terms(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    background: Tensor,
    temperature: float = 0.8,
    per_image: bool = True,
    padding: Tensor | None = None,
) -> PGDClassTerms:
    """The unweighted losses of one level of the class tower.

    Let ``D = sum over channels of (student - teacher)^2 * channel attention, times spatial attention``, with the teacher's
    attentions: the channel attention is C times a softmax over channels at each cell, the spatial attention
    ``functional.attention.spatial_attention``.

    - foreground, background: mean over images of ``sum D * weights``;
    - attention: mean over images of the L1 distance of the channel attentions, divided by the number of cells, plus the L1
      distance of the spatial attentions. Gradient flows through the student's.

    Args:
        student: [B, C, H, W] in the teacher's channels; gradient flows.
        teacher: [B, C, H, W], treated as constant.
        foreground: [B, H, W] weights of the key regions, normalised (``pgd_normalized``).
        background: [B, H, W] weights of the background, normalised.
        temperature: of both attentions.
        per_image: weight each image by its own weights. False: by the sum of all images' weights, as a broadcast in the
            released code does; the published loss weights were tuned with it, at 4 images per GPU.
        padding: [B, H, W] bool, cells that show only padding: their attention is 0, and they are not counted, as if each image
            were alone. None: no such cell. The released code counts them.
    """
    fixed, images = teacher.detach(), len(student)
    channels, own_channels = _channel_shares(fixed, temperature), _channel_shares(student, temperature)
    cells, own_cells = (_spatial(maps, temperature, padding) for maps in (fixed, student))
    weighted = ((student - fixed).square() * channels).sum(dim=1) * cells * student.shape[1]
    if not per_image:
        foreground, background = (weights.sum(dim=0, keepdim=True) for weights in (foreground, background))
    gap = F.l1_loss(own_channels, channels, reduction="none").sum(dim=1)
    count: Tensor | int = gap[0].numel()
    if padding is not None:
        gap, count = gap.masked_fill(padding, 0.0), (~padding).sum(dim=(1, 2)).clamp(min=1)
    attention = student.shape[1] * (gap.sum(dim=(1, 2)) / count).sum() + F.l1_loss(own_cells, cells, reduction="sum")
    return PGDClassTerms((weighted * foreground).sum() / images, (weighted * background).sum() / images, attention / images)


def pgd_box_terms(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float = 0.8) -> PGDBoxTerms:
    """The unweighted losses of one level of the box tower, at the cells of the key regions.

    - foreground: mean over cells of ``weights * mean over channels of (student - teacher)^2 * channel attention``, with the
      teacher's channel attention;
    - attention: L1 distance of the channel attentions, divided by the number of cells.

    Args:
        student: [M, C] in the teacher's channels; gradient flows.
        teacher: [M, C], treated as constant.
        weights: [M] weights of the cells, above 0. With no cell both losses are 0 and connected to the graph.
        temperature: of the channel attention.
    """
    fixed, count = teacher.detach(), divisor_over_ranks(len(student), student)
    channels, own_channels = _channel_shares(fixed, temperature), _channel_shares(student, temperature)
    squared = ((student - fixed).square() * channels).sum(dim=1)  # the mean over C channels, as the attention has a factor C
    attention = F.l1_loss(own_channels, channels, reduction="sum") * student.shape[1]
    return PGDBoxTerms((weights * squared).sum() / count, attention / count)


def pgd_loss(
    class_terms: PGDClassTerms,
    box_terms: PGDBoxTerms,
    foreground: float = 0.04,
    background: float = 0.02,
    box: float = 0.064,
    attention: float = 8e-4,
    level: float = 1.0,
) -> Tensor:
    """Weighted sum of the losses of one level, [].

    Args:
        class_terms: of the class tower.
        box_terms: of the box tower.
        foreground: factor of the class tower's foreground (alpha).
        background: factor of its background (beta).
        box: factor of the box tower's foreground (gamma).
        attention: factor of both attention losses (delta).
        level: further factor of the class tower's foreground and background on this level; 1, 1.25, 1.5, 1.75, 2 from the
            finest level on.
    """
    classes = level * (foreground * class_terms.foreground + background * class_terms.background)
    return classes + box * box_terms.foreground + attention * (class_terms.attention + box_terms.attention)


def _channel_shares(maps: Tensor, temperature: float) -> Tensor:
    """Softmax over channels (dimension 1) of |maps| / temperature, at each cell: the channel attention without its factor C."""
    return (maps.abs() / temperature).softmax(dim=1)


def _spatial(maps: Tensor, temperature: float, padding: Tensor | None) -> Tensor:
    """Spatial attention [B, H, W] with mean 1 over the cells that are not padding; 0 in padding."""
    if padding is None:
        return spatial_attention(maps, temperature)
    strength = (torch.linalg.vector_norm(maps, ord=1, dim=1) / maps.shape[1] / temperature).masked_fill(padding, -torch.inf)
    counts = (~padding).sum(dim=(1, 2), keepdim=True)
    return counts * strength.flatten(1).softmax(dim=1).view_as(strength)
