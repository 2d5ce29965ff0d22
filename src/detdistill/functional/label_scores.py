"""Detection losses on boxes that a model labelled: each box counts as much as its score.

Shape letters: B images, P dense predictions of an image, R regions of the batch, L decoder layers, N queries of an image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from detdistill.structures import Assignment, Batch, Losses, Prediction, Regions, Target

if TYPE_CHECKING:
    from detdistill.detectors.contract import Detector


def detection_loss(detector: Detector, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
    """Compute a detector's loss on a batch, in which boxes with scores count less.

    Args:
        detector: the detector.
        prediction: its prediction of the batch.
        batch: the images; without ``Target.scores`` the result is ``detector.loss(prediction, batch, assignment)``.
        assignment: of the prediction; None: the detector's own.

    Returns:
        The detector's losses. Every loss of a prediction that is matched to a box is multiplied by the box's score; negatives
        count fully, and divisors stay, so a box of score 0.5 counts half. In two-stage detectors this holds for both stages.
        Losses that a detector assigns by itself (auxiliary outputs of some DETRs, one-to-one branches) count all boxes fully.
    """
    if all(target.scores is None for target in batch.targets):
        return detector.loss(prediction, batch, assignment)
    if isinstance(prediction, Regions) and prediction.first is not None and prediction.first_assignment is not None:
        first = weighted_by_score(prediction.first_assignment, prediction.first, batch)
        prediction = replace(prediction, first_assignment=first)
    assignment = detector.assign(prediction, batch) if assignment is None else assignment
    return detector.loss(prediction, batch, weighted_by_score(assignment, prediction, batch))


def weighted_by_score(assignment: Assignment, prediction: Prediction, batch: Batch) -> Assignment:
    """Multiply the weights of an assignment by the scores of the boxes.

    Args:
        assignment: for ``prediction``; ``matched`` is [B, P], [R] or [L, B, N].
        prediction: dense, regions or queries.
        batch: the images; targets without scores count fully.

    Returns:
        The assignment, whose weights are 1 (or its own) times the score of the matched box, for each positive.
    """
    matched = assignment.matched
    if isinstance(prediction, Regions):
        image = prediction.origin.image
    else:
        rows = torch.arange(len(batch), device=matched.device)[:, None]
        image = rows.expand(matched.shape)
    scores = scores_of(matched, image, batch.targets)
    return replace(assignment, weights=scores if assignment.weights is None else assignment.weights * scores)


def scores_of(matched: Tensor, image: Tensor, targets: tuple[Target, ...]) -> Tensor:
    """Score of the box that each prediction is matched to; 1 for predictions without a box.

    Args:
        matched: int64 index of the box within its image's target; -1 and -2 are no boxes.
        image: the shape of ``matched``: index of each prediction's image.
        targets: the boxes of each image.

    Returns:
        float32, the shape of ``matched``.

    Example:
        >>> boxes, labels = torch.tensor([[0.0, 0, 8, 8]] * 2), torch.zeros(2, dtype=torch.int64)
        >>> target = Target(boxes, labels, torch.zeros(2, dtype=torch.bool), scores=torch.tensor([0.5, 0.25]))
        >>> scores_of(torch.tensor([[0, 1, -1, -2]]), torch.tensor([[0, 0, 0, 0]]), (target,)).tolist()
        [[0.5, 0.25, 1.0, 1.0]]
    """
    device = matched.device
    counts = torch.tensor([0, *(len(target) for target in targets)], device=device).cumsum(0)
    every = [torch.ones(len(one), device=device) if one.scores is None else one.scores.to(device) for one in targets]
    flat = torch.cat([*every, torch.ones(1, device=device)])
    place = torch.where(matched >= 0, counts[image] + matched, len(flat) - 1)
    return flat[place]
