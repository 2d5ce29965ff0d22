"""ATSS: one square anchor per cell, assignment by the statistics of the IoU, centerness.

This file has the assignment and the losses; network and inference are in ``models/atss.py``.
Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample Selection",
CVPR 2020; hyper-parameters of mmdet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from detdistill.detectors.dense.shared.heads import (
    DenseOptions,
    OwnDenseDetector,
    adaptive_assignment,
    one_stage_model,
)
from detdistill.detectors.student_files.models.atss import ATSS
from detdistill.functional.boxes import centerness_target, giou_loss
from detdistill.functional.counting import EPSILON, mean_over_ranks, number_of_positives
from detdistill.structures import Assignment, Batch, Dense, Prediction

MODEL_CLASS = ATSS
OPTIONS = DenseOptions
BOX_WEIGHT = 2.0


def build(backbone: str, classes: Sequence[str], options: DenseOptions) -> ATSSDetector:
    """Build an ATSS with random weights on a timm backbone. Defaults: levels 3-7, four head convolutions.

    By default, detections have a score of at least 0.05; each level gives 1000 candidates; an image has at most 100 detections.

    Raises:
        ModelError: the options do not fit the backbone or the head.
    """
    model, description = one_stage_model("models.atss.ATSS", backbone, classes, options)
    return wrap_model(model, classes, options.name or f"atss:{backbone}", description=description)


def wrap_model(
    model: Any,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> ATSSDetector:
    """Wrap a built model; ``columns`` and ``description`` as in ``TorchvisionDetector``."""
    return ATSSDetector(model, classes, name, family="dense", columns=columns, description=description)


class ATSSDetector(OwnDenseDetector):
    """Adapter of ATSS. ``deltas`` are dx, dy, dw, dh relative to the anchor; ``quality`` is the centerness logit."""

    candidates = 9
    """Number of candidate anchors of each level for a ground-truth box."""

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign by adaptive training sample selection with ``candidates`` anchors of each level."""
        dense = cast(Dense, prediction)
        return adaptive_assignment(dense, self.valid(dense, batch), batch, self.candidates)

    def loss_values(self, prediction: Dense, batch: Batch, assignment: Assignment) -> dict[str, Tensor]:
        """Compute ``classification`` (focal), ``bbox_regression`` (GIoU, weight 2) and ``centerness``, each [B, P].

        ``classification`` and ``centerness`` are divided by the number of positives. The GIoU loss is weighted by the
        centerness targets and divided by their sum, at least 1.
        """
        asked = self.supervision(assignment, batch)
        positive, boxes = asked.positive, asked.boxes_xyxy
        priors, quality = prediction.priors_xyxy[positive], cast(Tensor, prediction.quality)
        central = centerness_target((priors[:, :2] + priors[:, 2:]) / 2, boxes)
        count, total = assignment.normalizer, assignment.normalizer
        if count is None or total is None:
            count = number_of_positives(assignment, batch.images)
            total = mean_over_ranks(central.sum(), least=1) * (1 + EPSILON)
        overlap = giou_loss(prediction.boxes_xyxy[positive], boxes) * central
        centerness = F.binary_cross_entropy_with_logits(quality[positive], central, reduction="none")
        return {
            "classification": asked.focal(prediction.logits) / count,
            "bbox_regression": BOX_WEIGHT * asked.spread(overlap) / total,
            "centerness": asked.spread(centerness) / count,
        }
