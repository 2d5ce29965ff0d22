"""FCOS with a learnt factor for each level's distances, as in the authors' code and in MMDetection.

This file has the assignment and the losses; network and inference are in ``models/fcos.py``. Tian et al., "FCOS: Fully
Convolutional One-Stage Object Detection", ICCV 2019. torchvision's FCOS (``fcos``) has no such factors, points in the corners
of the cells, and square roots of the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import FCOS as TorchvisionFCOS

from detdistill.detectors.dense.shared.heads import DenseOptions, OwnDenseDetector, one_stage_model
from detdistill.detectors.student_files.models.fcos import FCOS
from detdistill.detectors.torchvision.dense_outputs import own_outputs
from detdistill.detectors.torchvision.targets import Matches, target_dicts
from detdistill.functional.boxes import centerness_target, giou_loss
from detdistill.functional.counting import EPSILON, mean_over_ranks, number_of_positives
from detdistill.structures import IGNORED, Assignment, Batch, Dense, Prediction

MODEL_CLASS = FCOS
CENTER_RADIUS = 1.5
"""A point matches a box whose centre is nearer than this, in strides, along each axis."""


@dataclass(frozen=True, kw_only=True)
class FCOSScalesOptions(DenseOptions):
    """Options of FCOS with scales."""

    distances: Literal["relu", "exp"] = "relu"
    """``exp``: distances are exponentials, in pixels (the paper); ``relu``: positive, in strides (the authors' later code)."""
    centerness: Literal["boxes", "classes"] = "boxes"
    """Tower from which the centerness is read: ``classes`` in the paper, ``boxes`` in the authors' later code."""


OPTIONS = FCOSScalesOptions


def build(backbone: str, classes: Sequence[str], options: FCOSScalesOptions) -> FCOSScalesDetector:
    """Build an FCOS with scales, with random weights on a timm backbone. Defaults: levels 3-7, four head convolutions.

    By default, detections have a score of at least 0.05; each level gives 1000 candidates; an image has at most 100 detections.

    Raises:
        ModelError: the options do not fit the backbone or the head.
    """
    head = {"exponential": options.distances == "exp", "from_classes": options.centerness == "classes"}
    model, description = one_stage_model("models.fcos.FCOS", backbone, classes, options, "conv", **head)
    return wrap_model(model, classes, options.name or f"fcos_scales:{backbone}", description=description)


def wrap_model(
    model: Any,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> FCOSScalesDetector:
    """Wrap a built model; ``columns`` and ``description`` as in ``TorchvisionDetector``."""
    return FCOSScalesDetector(model, classes, name, family="dense", columns=columns, description=description)


class FCOSScalesDetector(OwnDenseDetector):
    """Adapter of FCOS with scales. One point per cell; ``deltas`` are the distances left, top, right, bottom in strides."""

    model: FCOS

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign by torchvision's rule: a point near the centre of a box of its level's size range matches the smallest such box.

        Cells in the padding are ignored.
        """
        own, matches = own_outputs(prediction, self), Matches()
        stand_in = SimpleNamespace(head=matches, center_sampling_radius=CENTER_RADIUS)
        targets = target_dicts(batch, self.columns)
        TorchvisionFCOS.compute_loss(cast(Any, stand_in), targets, own.outputs, list(own.anchors), list(own.counts))
        return Assignment(matches.assignment(batch).matched.masked_fill(~self.valid(cast(Dense, prediction), batch), IGNORED))

    def loss_values(self, prediction: Dense, batch: Batch, assignment: Assignment) -> dict[str, Tensor]:
        """Compute ``classification`` (focal), ``bbox_regression`` (GIoU) and ``centerness``, each [B, P].

        ``classification`` and ``centerness`` are divided by the number of positives. The GIoU loss is weighted by the
        centerness targets and divided by their sum, at least 1.
        """
        asked = self.supervision(assignment, batch)
        positive, boxes = asked.positive, asked.boxes_xyxy
        points, quality = prediction.priors_xyxy[positive], cast(Tensor, prediction.quality)
        central = centerness_target((points[:, :2] + points[:, 2:]) / 2, boxes)
        count, total = assignment.normalizer, assignment.normalizer
        if count is None or total is None:
            count = number_of_positives(assignment, batch.images)
            total = mean_over_ranks(central.sum(), least=1) * (1 + EPSILON)
        overlap = giou_loss(prediction.boxes_xyxy[positive], boxes) * central
        entropy = F.binary_cross_entropy_with_logits(quality[positive], central, reduction="none")
        return {
            "classification": asked.focal(prediction.logits) / count,
            "bbox_regression": asked.spread(overlap) / total,
            "centerness": asked.spread(entropy) / count,
        }
