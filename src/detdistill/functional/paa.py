"""Probabilistic anchor assignment (PAA): positives are the cheap predictions of a box, separated by a mixture of two Gaussians.

Kim, Lee, "Probabilistic Anchor Assignment with IoU Prediction for Object Detection", ECCV 2020, sections 3.2 and 3.3, with the
numbers of the released code. LAD assigns by the costs of a teacher's predictions.

Shape letters: B images, P predictions of an image, K classes, M candidates of the batch, N candidates of one ground-truth box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from detdistill.functional.assign import max_iou_assign
from detdistill.functional.boxes import giou_loss
from detdistill.functional.counting import number_objects
from detdistill.structures import IGNORED, NEGATIVE, Assignment, Dense, Target

LEAST_IOU = 1e-12
"""Least IoU at which a box keeps its best priors. With 0, as in the released code, a box without overlap would match every
prior of IoU 0."""
BOX_COST = 1.3
"""Weight of the GIoU loss in a cost."""
TOLERANCE, ITERATIONS, LEAST_VARIANCE = 1e-3, 100, 1e-6
"""When the fit of the mixture ends, and what is added to its variances (scikit-learn's defaults, but for the first)."""


@torch.no_grad()
def paa_assign(prediction: Dense, valid: Tensor, targets: Sequence[Target], most: int) -> Assignment:
    """Assign predictions by their costs: ``paa_candidates``, ``paa_costs`` and ``paa_select``, one after the other.

    Args:
        prediction: sigmoid logits whose columns are the labels, boxes, priors and levels.
        valid: [B, P] bool, predictions that may be assigned; the others are ignored.
        targets: ground truth of each image.
        most: largest number of candidates of each level and box.
    """
    candidates = paa_candidates(prediction.priors_xyxy, valid, targets)
    costs = paa_costs(prediction, candidates, targets)
    return Assignment(paa_select(costs, candidates, prediction.levels, most))


@torch.no_grad()
def paa_candidates(priors_xyxy: Tensor, valid: Tensor, targets: Sequence[Target], iou: float = 0.1) -> Tensor:
    """Match each prior to the box of its largest IoU, if that is at least ``iou``; each box also keeps its best priors.

    Crowd boxes and boxes without area have no candidates.

    Args:
        priors_xyxy: [B, P, 4] anchors, or squares around points.
        valid: [B, P] bool, priors that may be matched.
        targets: ground truth of each image.
        iou: smallest IoU of a candidate.

    Returns:
        [B, P] int64: index of the box within the image's ``Target``, -1 no candidate, -2 not valid.
    """
    matched = torch.full(valid.shape, IGNORED, dtype=torch.int64, device=valid.device)
    for image, target in enumerate(targets):
        sides = target.boxes_xyxy[:, 2:] - target.boxes_xyxy[:, :2]
        usable = torch.nonzero(~target.crowd & (sides > 0).all(dim=1)).flatten()
        index = torch.nonzero(valid[image]).flatten()
        priors = priors_xyxy[image, index]
        found = max_iou_assign(priors, target.boxes_xyxy[usable].to(priors.dtype), iou, iou, LEAST_IOU)
        matched[image, index] = torch.where(found >= 0, usable[found.clamp(min=0)], found) if len(usable) else found
    return matched


def paa_costs(prediction: Dense, candidates: Tensor, targets: Sequence[Target]) -> Tensor:
    """Cost of each candidate: focal loss (alpha 0.25, gamma 2) over all classes plus 1.3 times the GIoU loss.

    Args:
        prediction: sigmoid logits [B, P, K] whose columns are the labels, and boxes [B, P, 4].
        candidates: [B, P] from ``paa_candidates``.
        targets: ground truth of each image.

    Returns:
        [M], image by image in the order of the predictions.
    """
    image, index = torch.nonzero(candidates >= 0, as_tuple=True)
    rows = [row[row >= 0] for row in candidates]
    labels = torch.cat([target.labels[row] for target, row in zip(targets, rows, strict=True)])
    boxes = torch.cat([target.boxes_xyxy[row] for target, row in zip(targets, rows, strict=True)])
    logits = prediction.logits[image, index]
    wanted = torch.zeros_like(logits).scatter(1, labels[:, None], 1.0)
    focal: Tensor = sigmoid_focal_loss(logits, wanted, reduction="none").sum(dim=1)
    return focal + BOX_COST * giou_loss(prediction.boxes_xyxy[image, index], boxes.to(logits.dtype))


@torch.no_grad()
def paa_select(costs: Tensor, candidates: Tensor, levels: Tensor, most: int) -> Tensor:
    """Separate the positives of each box from its other candidates by their costs.

    On each level a box keeps its ``most`` cheapest candidates. A mixture of two Gaussians is fitted to the costs of all levels
    together (``cheap_side``). Positive are the candidates of the cheap component, from the cheapest up to the one of highest
    likelihood. A box with fewer than two candidates, or with a cost that is not finite, has no positive.

    Args:
        costs: [M] cost of each candidate, in the order of ``paa_costs``.
        candidates: [B, P] from ``paa_candidates``.
        levels: [P] level of each prediction.
        most: largest number of candidates of each level and box.

    Returns:
        [B, P] int64: ``candidates`` with -1 for candidates that are not positive.

    Example:
        >>> costs, candidates = torch.tensor([0.2, 3.0, 0.1, 2.9, 0.3, 3.1]), torch.zeros(1, 6, dtype=torch.int64)
        >>> paa_select(costs, candidates, levels=torch.zeros(6, dtype=torch.int64), most=9).tolist()
        [[0, -1, 0, -1, -1, -1]]
    """
    matched = candidates.clamp(max=NEGATIVE)
    image, index = torch.nonzero(candidates >= 0, as_tuple=True)
    if len(image) == 0:
        return matched
    objects, count = number_objects(image, candidates[image, index])
    keep = torch.nonzero(_rank(costs, objects * (int(levels.max()) + 1) + levels[index]) < most).flatten()
    keep = keep[costs[keep].argsort(stable=True)]
    keep = keep[objects[keep].argsort(stable=True)]  # box by box, ascending
    counts = torch.bincount(objects[keep], minlength=count).cpu()
    rows = costs[keep].double().cpu().numpy()
    cheap = np.concatenate([cheap_side(row) for row in np.split(rows, counts.cumsum(0)[:-1])])
    chosen = keep[torch.from_numpy(cheap).to(keep.device)]
    matched[image[chosen], index[chosen]] = candidates[image[chosen], index[chosen]]
    return matched


def _rank(values: Tensor, groups: Tensor) -> Tensor:
    """[M] number of values [M] of the same group [M] that are smaller (or equal and earlier); NaN is larger than numbers."""
    order = values.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    ordered = groups[order]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
    return rank


def cheap_side(costs: np.ndarray) -> np.ndarray:
    """Which costs belong to the cheap component of a mixture, up to the one of highest likelihood (PAA, Fig. 3 c).

    The mixture of two Gaussians is fitted by expectation maximisation, as scikit-learn's ``GaussianMixture`` does it with means
    that start at the smallest and the largest cost, weights of one half and variances of 1. The operations are in the order of
    scikit-learn's, because equal likelihoods are common (two costs alone in a component) and rounding decides between them.
    The first component is the cheap one; it may end up without a member.

    Args:
        costs: [N] float64, ascending.

    Returns:
        [N] bool; all False with fewer than two costs or one that is not finite.
    """
    cheap = np.zeros(len(costs), dtype=bool)
    if len(costs) < 2 or not np.isfinite(costs).all():
        return cheap
    joint = _fit_mixture(costs[:, None])
    members = np.flatnonzero(joint[:, 0] >= joint[:, 1])
    if len(members):
        peak = _log_sum(joint)[members, 0].argmax()
        cheap[members[: peak + 1]] = True
    return cheap


def _fit_mixture(values: np.ndarray) -> np.ndarray:
    """[N, 2] logarithm of weight times density of both components fitted to values [N, 1]."""
    squares, bound = values * values, -math.inf
    means, scales, weights = values[[0, -1], 0], np.ones(2), np.full(2, 0.5)

    def joint() -> np.ndarray:
        precisions = scales**2
        distances = means**2 * precisions - 2.0 * (values * (means * precisions)) + squares * precisions
        densities: np.ndarray = -0.5 * (math.log(2 * math.pi) + distances) + np.log(scales) + np.log(weights)
        return densities

    for _ in range(ITERATIONS):
        densities = joint()
        whole = _log_sum(densities)
        shares = np.exp(densities - whole)
        members = shares.sum(axis=0) + 10 * np.finfo(shares.dtype).eps
        means = (shares.T @ values)[:, 0] / members
        variances = (shares.T @ squares)[:, 0] / members - means**2 + LEAST_VARIANCE
        if not (variances > 0).all():  # rounding, with very large costs
            break
        scales, weights = 1 / np.sqrt(variances), members / len(values)
        weights = weights / weights.sum()
        before, bound = bound, float(whole.mean())
        if abs(bound - before) < TOLERANCE:
            break
    return joint()


def _log_sum(joint: np.ndarray) -> np.ndarray:
    """[N, 1] logarithm of the sum of the exponentials of [N, 2]."""
    largest = joint.max(axis=1, keepdims=True)
    is_largest = joint == largest
    count = is_largest.sum(axis=1, keepdims=True, dtype=joint.dtype)
    rest = np.exp(np.where(is_largest, -np.inf, joint) - largest).sum(axis=1, keepdims=True)
    total: np.ndarray = np.log1p(rest) + np.log(count) + largest  # of two equal terms the rest is 0, so it needs no division
    return total
