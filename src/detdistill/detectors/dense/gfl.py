"""GFL: class scores trained on the IoU of the box, box sides as distributions of distances.

This file has the assignment and the losses; network and inference are in ``models/gfl.py``.
Li et al., "Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes for Dense Object Detection",
NeurIPS 2020 (version 1); hyper-parameters of mmdet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from detdistill.detectors.dense.shared.heads import (
    DenseOptions,
    OwnDenseDetector,
    adaptive_assignment,
    one_stage_model,
)
from detdistill.detectors.student_files.models.gfl import GFL
from detdistill.functional.boxes import distances_to_sides, giou_loss, paired_iou
from detdistill.functional.counting import EPSILON, mean_over_ranks, number_of_positives
from detdistill.functional.focal import distribution_focal_loss, quality_focal_loss
from detdistill.structures import Assignment, Batch, BoxDistributions, Dense, Prediction

MODEL_CLASS = GFL
OPTIONS = DenseOptions
BOX_WEIGHT = 2.0
DISTRIBUTION_WEIGHT = 0.25


def build(backbone: str, classes: Sequence[str], options: DenseOptions) -> GFLDetector:
    """Build a GFL with random weights on a timm backbone. Defaults: levels 3-7, four head convolutions, 17 bins for each side.

    By default, detections have a score of at least 0.05; each level gives 1000 candidates; an image has at most 100 detections.

    Raises:
        ModelError: the options do not fit the backbone or the head.
    """
    model, description = one_stage_model("models.gfl.GFL", backbone, classes, options)
    return wrap_model(model, classes, options.name or f"gfl:{backbone}", description=description)


def wrap_model(
    model: Any,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> GFLDetector:
    """Wrap a built model; ``columns`` and ``description`` as in ``TorchvisionDetector``."""
    return GFLDetector(model, classes, name, family="dense", columns=columns, description=description)


class GFLDetector(OwnDenseDetector):
    """Adapter of GFL.

    ``deltas`` [B, P, 4 * (reg_max + 1)] are the logits of the distributions of the sides left, top, right, bottom; the
    bins of one side are adjacent. ``boxes_xyxy`` come from the means of the distributions and are differentiable.
    """

    model: GFL
    candidates = 9
    """Number of candidate anchors of each level for a ground-truth box."""
    beta = 2.0
    """Exponent of the quality focal loss."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Wrap a model; see ``TorchvisionDetector``."""
        super().__init__(*arguments, **options)
        self.spec = replace(self.spec, box_bins=self.model.reg_max + 1)

    def distributions(self, prediction: Prediction, batch: Batch) -> BoxDistributions:
        """Return the distributions; a step is one stride, and step 0 lies at the anchor's centre."""
        dense = cast(Dense, prediction)
        centers = (dense.priors_xyxy[..., :2] + dense.priors_xyxy[..., 2:]) / 2
        signs = dense.boxes_xyxy.new_tensor([-1.0, -1.0, 1.0, 1.0])
        units = (self.strides(dense.levels, signs)[:, None] * signs).expand_as(dense.priors_xyxy)
        steps = torch.arange(self.model.reg_max + 1, dtype=signs.dtype, device=signs.device)
        return BoxDistributions(dense.deltas.unflatten(-1, (4, -1)), centers.repeat(1, 1, 2), units, steps)

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign by adaptive training sample selection with ``candidates`` anchors of each level, as in ATSS."""
        dense = cast(Dense, prediction)
        return adaptive_assignment(dense, self.valid(dense, batch), batch, self.candidates)

    def loss_values(self, prediction: Dense, batch: Batch, assignment: Assignment) -> dict[str, Tensor]:
        """Compute ``classification`` (quality focal), ``bbox_regression`` (GIoU, weight 2), ``distribution`` (weight 0.25).

        The quality of a positive is the IoU of its box. ``classification`` is divided by the number of positives. The other
        terms are weighted by the best class score of each positive and divided by the sum of these scores, at least 1;
        ``distribution`` is also divided by 4 (the sides). Boxes and distances are measured in strides.
        """
        asked = self.supervision(assignment, batch)
        positive = asked.positive
        strides = self.strides(prediction.levels, prediction.boxes_xyxy).expand(positive.shape)[positive][:, None]
        predicted, boxes = prediction.boxes_xyxy[positive] / strides, asked.boxes_xyxy / strides
        priors = prediction.priors_xyxy[positive] / strides
        score = prediction.logits[positive].detach().sigmoid().amax(dim=1)
        count, total = assignment.normalizer, assignment.normalizer
        if count is None or total is None:
            count, total = number_of_positives(assignment, batch.images), mean_over_ranks(score.sum(), least=1)

        quality = asked.wanted(prediction.logits, paired_iou(predicted.detach(), boxes))
        focal = quality_focal_loss(prediction.logits, quality, self.beta).sum(dim=-1) * asked.weights
        overlap = giou_loss(predicted, boxes) * score / (1 + EPSILON)
        # at most 0.1 below the last bin, so that a bin lies on each side of the target
        sides = distances_to_sides((priors[:, :2] + priors[:, 2:]) / 2, boxes).clamp(0, self.model.reg_max - 0.1)
        logits = prediction.deltas[positive].view(-1, self.model.reg_max + 1)
        spread = distribution_focal_loss(logits, sides.flatten()).view(-1, 4).sum(dim=1) * score / (4 + EPSILON)
        return {
            "classification": focal / count,
            "bbox_regression": BOX_WEIGHT * asked.spread(overlap) / total,
            "distribution": DISTRIBUTION_WEIGHT * asked.spread(spread) / total,
        }
