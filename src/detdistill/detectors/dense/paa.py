"""PAA: ATSS with an IoU branch; assignment by the costs of the predictions themselves.

This file has the assignment and the losses; network and inference are in ``models/paa.py``.
Kim, Lee, "Probabilistic Anchor Assignment with IoU Prediction for Object Detection", ECCV 2020; hyper-parameters of mmdet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from detdistill.detectors.dense.shared.heads import DenseOptions, OwnDenseDetector, one_stage_model
from detdistill.detectors.student_files.models.paa import PAA
from detdistill.functional.boxes import giou_loss, paired_iou
from detdistill.functional.counting import EPSILON, mean_over_ranks
from detdistill.functional.paa import BOX_COST, paa_assign
from detdistill.structures import Assignment, Batch, Dense, Prediction

MODEL_CLASS = PAA
OPTIONS = DenseOptions
IOU_WEIGHT = 0.5


def build(backbone: str, classes: Sequence[str], options: DenseOptions) -> PAADetector:
    """Build a PAA with random weights on a timm backbone. Defaults: levels 3-7, four head convolutions.

    By default, detections have a score of at least 0.05; each level gives 1000 candidates; an image has at most 100 detections.

    Raises:
        ModelError: the options do not fit the backbone or the head.
    """
    model, description = one_stage_model("models.paa.PAA", backbone, classes, options)
    return wrap_model(model, classes, options.name or f"paa:{backbone}", description=description)


def wrap_model(
    model: Any,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> PAADetector:
    """Wrap a built model; ``columns`` and ``description`` as in ``TorchvisionDetector``."""
    return PAADetector(model, classes, name, family="dense", columns=columns, description=description)


class PAADetector(OwnDenseDetector):
    """Adapter of PAA. ``deltas`` are dx, dy, dw, dh relative to the anchor; ``quality`` is the logit of the predicted IoU."""

    votes = True
    """Boxes are averaged after NMS (score voting), which an exported file does not do."""
    candidates = 9
    """Largest number of candidate anchors of each level for a ground-truth box."""

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign by the costs of the predictions (``paa_assign``): other predictions give other positives."""
        dense = cast(Dense, prediction)
        return paa_assign(dense, self.valid(dense, batch), batch.targets, self.candidates)

    def final_scores(self, outputs: dict[str, Tensor]) -> Tensor:
        """Compute the final scores: the square root of class score times predicted IoU."""
        return super().final_scores(outputs).sqrt()

    def loss_values(self, prediction: Dense, batch: Batch, assignment: Assignment) -> dict[str, Tensor]:
        """Compute ``classification`` (focal), ``bbox_regression`` (GIoU, weight 1.3) and ``iou`` (weight 0.5), each [B, P].

        ``classification`` is divided by the number of positives, at least one per image, ``iou`` by the number of positives.
        The GIoU loss is weighted by the IoU of each box with its target and divided by the sum of these. The divisors are means
        over processes (the released code's are those of one process).
        """
        asked = self.supervision(assignment, batch)
        positive, boxes = asked.positive, asked.boxes_xyxy
        predicted, quality = prediction.boxes_xyxy[positive], cast(Tensor, prediction.quality)
        iou = paired_iou(predicted.detach(), boxes)
        number, total = assignment.normalizer, assignment.normalizer
        count = assignment.normalizer
        if number is None or total is None or count is None:
            positives = positive.sum().to(batch.images.dtype)
            number = mean_over_ranks(positives).clamp(min=len(batch)) + EPSILON
            count = mean_over_ranks(positives, least=1) + EPSILON
            total = mean_over_ranks(iou.sum()) + EPSILON
        overlap = giou_loss(predicted, boxes) * iou.clamp(min=1e-12)
        quality_loss = F.binary_cross_entropy_with_logits(quality[positive], iou, reduction="none")
        return {
            "classification": asked.focal(prediction.logits) / number,
            "bbox_regression": BOX_COST * asked.spread(overlap) / total,
            "iou": IOU_WEIGHT * asked.spread(quality_loss) / count,
        }
