"""RepPoints: nine points for each cell, moved twice; boxes by their mean and deviation.

Yang et al., "RepPoints: Point Set Representation for Object Detection", ICCV 2019, with the numbers of the released code
(mmdet 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.detectors.dense.shared.heads import OwnDenseDetector, supervision
from detdistill.detectors.options import ModelOptions
from detdistill.detectors.student_files.load_student import build as build_model
from detdistill.detectors.student_files.models.reppoints import RepPoints
from detdistill.detectors.torchvision.backbones import image_statistics, load_pretrained, pyramid_description
from detdistill.detectors.torchvision.dense_outputs import own_outputs
from detdistill.detectors.torchvision.targets import trainable, whole_indices
from detdistill.functional.assign import max_iou_assign, point_assign
from detdistill.functional.counting import number_of_positives
from detdistill.structures import IGNORED, Assignment, Batch, Dense, Prediction

MODEL_CLASS = RepPoints


def build(backbone: str, classes: Sequence[str], options: ModelOptions) -> RepPointsDetector:
    """A fresh RepPoints on a timm backbone; levels 3-7, three head convolutions with GroupNorm.

    P6 reads the backbone's deepest map, P7 reads P6, as in the released code. GroupNorm in the towers is the released
    variant that is better (with it in the neck too, 38.1 AP against 37.0) and that trains from scratch.

    Raises:
        ModelError: the options do not fit the backbone or the head.
    """
    options.refuse("reppoints", "weights", "proposals", "rois", "mlp")
    pyramid = pyramid_description(backbone, options, levels=(3, 7), top="input")
    first, last = options.levels or (3, 7)
    mean, std = image_statistics(backbone, options)
    description = {
        "call": "models.reppoints.RepPoints",
        "backbone": pyramid,
        "num_classes": len(classes),
        "strides": [2**level for level in range(first, last + 1)],
        "channels": options.neck,
        "convs": 3 if options.convs is None else options.convs,
        "norm": options.headnorm == "gn",
        "image_mean": mean,
        "image_std": std,
        "score_thresh": 0.05 if options.score is None else options.score,
        "topk_candidates": options.topk or 1000,
        "detections_per_img": options.dets or 100,
    }
    model = build_model(description)
    if options.pretrained:
        load_pretrained(model.backbone, pyramid)
    return wrap_model(model, classes, options.name or f"reppoints:{backbone}", description=description)


def wrap_model(
    model: Any,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> RepPointsDetector:
    """A ``RepPoints`` of ours."""
    return RepPointsDetector(model, classes, name, family="dense", columns=columns, description=description)


class RepPointsDetector(OwnDenseDetector):
    """RepPoints with towers, copies and backbone features. One prediction for each cell.

    ``deltas`` are the nine refined points, pairs (y, x) in strides from the cell's corner; ``priors_xyxy`` are squares of
    one stride around that corner. The first points are among the prediction's own outputs (``first_points``).

    Two assignments are at work. The first points learn from the cell nearest to the centre of each box, on the level of
    its size (``first_assignment``); classes and refined points from the overlap of the boxes of the first points. ``assign``
    and a foreign assignment speak of the latter; the former always stays the detector's own.
    """

    model: RepPoints

    point_scale = 4.0
    """Side, in strides, of the boxes a level is made for; the losses of its points are in this unit."""
    positive_iou, negative_iou = 0.5, 0.4
    least_iou = 1e-12
    """Of a box with the best prediction it has, for it to become a positive below ``positive_iou``. The released code has 0,
    by which a box that overlaps no prediction at all takes every cell whose overlap is 0."""

    # ----------------------------------------------------------------------------------------------------- assignments

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """By overlap with the boxes of the first points (MaxIoU 0.5 / 0.4; every box takes the cells it overlaps most)."""
        dense = cast(Dense, prediction)
        boxes = self.first_boxes(dense).detach()

        def rule(image: int, index: Tensor, targets: Tensor) -> Tensor:
            return max_iou_assign(boxes[image, index], targets, self.positive_iou, self.negative_iou, self.least_iou)

        return self._matched(rule, dense, batch)

    def first_assignment(self, prediction: Dense, batch: Batch) -> Assignment:
        """By distance and size: each box takes the cell nearest to its centre, on the level of its size."""
        points = (prediction.priors_xyxy[..., :2] + prediction.priors_xyxy[..., 2:]) / 2
        strides = self.strides(prediction.levels, points)

        def rule(image: int, index: Tensor, targets: Tensor) -> Tensor:
            return point_assign(points[image, index], strides[index], targets, self.point_scale)

        return self._matched(rule, prediction, batch)

    def _matched(self, rule: Callable[[int, Tensor, Tensor], Tensor], prediction: Dense, batch: Batch) -> Assignment:
        """A rule (image, predictions, their candidates' boxes -> matches) on all cells and boxes that take part."""
        valid = self.valid(prediction, batch)
        matched = torch.full(valid.shape, IGNORED, device=valid.device)
        for image, target in enumerate(batch.targets):
            index = torch.nonzero(valid[image]).flatten()
            boxes = target.boxes_xyxy[trainable(target)].to(batch.images.dtype)
            matched[image, index] = whole_indices(rule(image, index, boxes), target)
        return Assignment(matched)

    def first_boxes(self, prediction: Dense) -> Tensor:
        """[B, P, 4] the boxes of the first points, in pixels; differentiable."""
        points = own_outputs(prediction, self).outputs["first_points"]
        return self.decode(points, prediction.priors_xyxy, prediction.levels)

    # ---------------------------------------------------------------------------------------------------------- losses

    def loss_values(self, prediction: Dense, batch: Batch, assignment: Assignment) -> dict[str, Tensor]:
        """Focal ``classification``, and smooth L1 (beta 0.11) of the corners: ``first_points`` (0.5), ``refined_points`` (1).

        Corners are in units of ``point_scale`` strides and their four losses are summed. Each term is divided by the
        number of its assignment's positives, where each image counts at least one (mean over processes).
        """
        own = own_outputs(prediction, self)
        first_assignment = self.first_assignment(prediction, batch)
        first = supervision(first_assignment, batch, self.class_outputs)
        refined = supervision(assignment, batch, self.class_outputs)
        unit = self.point_scale * self.strides(prediction.levels, prediction.boxes_xyxy)
        first_count = number_of_positives(first_assignment, unit)
        count = number_of_positives(assignment, unit) if assignment.normalizer is None else assignment.normalizer

        def corners(boxes: Tensor, positive: Tensor, targets: Tensor) -> Tensor:
            """[M] the positives' losses."""
            units = unit.expand_as(positive)[positive][:, None]
            return F.smooth_l1_loss(boxes[positive] / units, targets / units, beta=0.11, reduction="none").sum(dim=-1)

        first_values = corners(self.first_boxes(prediction), first.positive, first.boxes_xyxy)
        refined_values = corners(prediction.boxes_xyxy, refined.positive, refined.boxes_xyxy)
        return {
            "classification": refined.focal(own.outputs["cls_logits"]) / count,
            "first_points": 0.5 * first.spread(first_values) / first_count,
            "refined_points": refined.spread(refined_values) / count,
        }
