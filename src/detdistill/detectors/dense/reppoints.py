"""RepPoints: nine points per cell, refined once; boxes from the mean and standard deviation of the points.

Yang et al., "RepPoints: Point Set Representation for Object Detection", ICCV 2019; hyper-parameters of the released
code (mmdet 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.detectors.contract import DenseCoding
from detdistill.detectors.dense.shared.heads import DenseOptions, OwnDenseDetector, supervision
from detdistill.detectors.student_files.load_student import build as build_model
from detdistill.detectors.student_files.models.reppoints import NUM_POINTS, RepPoints
from detdistill.detectors.torchvision.backbones import image_statistics, load_pretrained, pyramid_description
from detdistill.detectors.torchvision.dense_outputs import own_outputs
from detdistill.detectors.torchvision.targets import trainable, whole_indices
from detdistill.functional.assign import max_iou_assign, point_assign
from detdistill.functional.counting import number_of_positives
from detdistill.structures import IGNORED, Assignment, Batch, Dense, Prediction
from detdistill.values import Index

MODEL_CLASS = RepPoints


@dataclass(frozen=True, kw_only=True)
class RepPointsOptions(DenseOptions):
    """Options of RepPoints."""

    convs: Index = 3
    headnorm: Literal["gn", "none"] = "gn"
    """``gn``: GroupNorm in the towers of the head; ``none``: no norm."""


OPTIONS = RepPointsOptions


def build(backbone: str, classes: Sequence[str], options: RepPointsOptions) -> RepPointsDetector:
    """Build a RepPoints with random weights on a timm backbone. Defaults: levels 3-7, three head convolutions with GroupNorm.

    P6 is computed from the backbone's deepest map and P7 from P6, as in the released code. The towers have GroupNorm, because
    the released variant with GroupNorm (in the neck too) has the higher AP (38.1, else 37.0) and trains from scratch.

    Raises:
        ModelError: the options do not fit the backbone or the head.
    """
    pyramid = pyramid_description(backbone, options, options.levels, options.neck, top="input")
    first, last = options.levels
    mean, std = image_statistics(backbone, options)
    description = {
        "call": "models.reppoints.RepPoints",
        "backbone": pyramid,
        "num_classes": len(classes),
        "strides": [2**level for level in range(first, last + 1)],
        "channels": options.neck,
        "convs": options.convs,
        "norm": options.headnorm == "gn",
        "image_mean": mean,
        "image_std": std,
        "score_thresh": options.score,
        "topk_candidates": options.topk,
        "detections_per_img": options.dets,
    }
    model = build_model(description)
    if options.pretrained:
        load_pretrained(model.backbone, pyramid, options.pretrained)
    return wrap_model(model, classes, options.name or f"reppoints:{backbone}", description=description)


def wrap_model(
    model: Any,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> RepPointsDetector:
    """Wrap a built ``models.reppoints.RepPoints``; ``columns`` and ``description`` as in ``TorchvisionDetector``."""
    return RepPointsDetector(model, classes, name, family="dense", columns=columns, description=description)


class RepPointsDetector(OwnDenseDetector):
    """Adapter of RepPoints. One prediction per cell.

    ``deltas`` are the nine refined points as pairs (y, x), in strides from the cell's corner. ``priors_xyxy`` are squares with
    a side of one stride around that corner. The first points are the raw output ``first_points``.

    Training uses two assignments. The first points are trained by ``first_assignment``: for each box the cell nearest to its
    centre, on the level of its size. Classes and refined points are trained by ``assign``, the IoU with the boxes of the
    first points. An assignment given to ``loss`` replaces the second only.
    """

    model: RepPoints

    point_scale = 4.0
    """Side, in strides, of the boxes of a level; also the unit of length of the box losses."""
    positive_iou, negative_iou = 0.5, 0.4
    least_iou = 1e-12
    """Least IoU at which the best prediction of a box becomes positive although its IoU is below ``positive_iou``. In the
    released code this is 0, so that a box without any overlap matches all cells with IoU 0."""

    def dense_coding(self) -> DenseCoding:
        """Return the nine points of a box."""
        return DenseCoding(points=NUM_POINTS)

    # ----------------------------------------------------------------------------------------------------- assignments

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign by IoU with the boxes of the first points: from 0.5 positive, below 0.4 negative; a box keeps its best cells."""
        dense = cast(Dense, prediction)
        boxes = self.first_boxes(dense).detach()

        def rule(image: int, index: Tensor, targets: Tensor) -> Tensor:
            return max_iou_assign(boxes[image, index], targets, self.positive_iou, self.negative_iou, self.least_iou)

        return self._matched(rule, dense, batch)

    def first_assignment(self, prediction: Dense, batch: Batch) -> Assignment:
        """Assign to each box the cell nearest to its centre, on the level of its size."""
        points = (prediction.priors_xyxy[..., :2] + prediction.priors_xyxy[..., 2:]) / 2
        strides = self.strides(prediction.levels, points)

        def rule(image: int, index: Tensor, targets: Tensor) -> Tensor:
            return point_assign(points[image, index], strides[index], targets, self.point_scale)

        return self._matched(rule, prediction, batch)

    def _matched(self, rule: Callable[[int, Tensor, Tensor], Tensor], prediction: Dense, batch: Batch) -> Assignment:
        """Apply ``rule`` (image, valid predictions, trainable boxes -> matches) to each image; other cells are ignored."""
        valid = self.valid(prediction, batch)
        matched = torch.full(valid.shape, IGNORED, device=valid.device)
        for image, target in enumerate(batch.targets):
            index = torch.nonzero(valid[image]).flatten()
            boxes = target.boxes_xyxy[trainable(target)].to(batch.images.dtype)
            matched[image, index] = whole_indices(rule(image, index, boxes), target)
        return Assignment(matched)

    def first_boxes(self, prediction: Dense) -> Tensor:
        """Compute the boxes [B, P, 4] of the first points, in pixels; differentiable."""
        points = own_outputs(prediction, self).outputs["first_points"]
        return self.decode(points, prediction.priors_xyxy, prediction.levels)

    # ---------------------------------------------------------------------------------------------------------- losses

    def loss_values(self, prediction: Dense, batch: Batch, assignment: Assignment) -> dict[str, Tensor]:
        """Compute ``classification`` (focal), ``first_points`` (weight 0.5) and ``refined_points`` (weight 1), each [B, P].

        The last two are the smooth L1 loss (beta 0.11) of the box corners in units of ``point_scale`` strides, summed over the
        four coordinates. Each term is divided by the number of positives of its assignment, at least one per image (mean
        over processes).
        """
        own = own_outputs(prediction, self)
        first_assignment = self.first_assignment(prediction, batch)
        first = supervision(first_assignment, batch, self.class_outputs)
        refined = supervision(assignment, batch, self.class_outputs)
        unit = self.point_scale * self.strides(prediction.levels, prediction.boxes_xyxy)
        first_count = number_of_positives(first_assignment, unit)
        count = number_of_positives(assignment, unit) if assignment.normalizer is None else assignment.normalizer

        def corners(boxes: Tensor, positive: Tensor, targets: Tensor) -> Tensor:
            """Compute the losses [M] of the positives."""
            units = unit.expand_as(positive)[positive][:, None]
            return F.smooth_l1_loss(boxes[positive] / units, targets / units, beta=0.11, reduction="none").sum(dim=-1)

        first_values = corners(self.first_boxes(prediction), first.positive, first.boxes_xyxy)
        refined_values = corners(prediction.boxes_xyxy, refined.positive, refined.boxes_xyxy)
        return {
            "classification": refined.focal(own.outputs["cls_logits"]) / count,
            "first_points": 0.5 * first.spread(first_values) / first_count,
            "refined_points": refined.spread(refined_values) / count,
        }
