"""RetinaNet: torchvision's model, run stage by stage.

Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, as in ``torchvision.models.detection`` (both versions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetHead
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from detdistill.detectors.dense.shared.heads import LONG_ROW, DenseDetector, DenseOptions, supervision
from detdistill.detectors.student_files.load_student import build as build_model
from detdistill.detectors.torchvision.backbones import image_statistics, load_pretrained, pyramid_description
from detdistill.detectors.torchvision.dense_outputs import OwnOutputs, flat_outputs, own_outputs
from detdistill.detectors.torchvision.matching import match_anchors
from detdistill.detectors.torchvision.targets import target_dicts, trainable, whole_indices
from detdistill.errors import ModelError
from detdistill.structures import NEGATIVE, Assignment, Batch, Dense, Losses, Prediction
from detdistill.values import Count, Positive

MODEL_CLASS = RetinaNet


@dataclass(frozen=True, kw_only=True)
class RetinaNetOptions(DenseOptions):
    """Options of RetinaNet. The defaults of the head and of the detections are torchvision's."""

    dets: Count = 300
    anchors: Positive = 4.0
    """Side of the smallest anchor of a cell, in strides. Use less than 4 for objects smaller than 32 pixels."""


OPTIONS = RetinaNetOptions


def build(backbone: str, classes: Sequence[str], options: RetinaNetOptions) -> RetinaNetDetector:
    """Build a RetinaNet with random weights on a timm backbone.

    Defaults: levels 3-7, four head convolutions, nine anchors per cell with sides from four strides (``anchors``) up. As in
    torchvision, detections have a score of at least 0.05, each level gives 1000 candidates, and an image has at most 300
    detections.

    Raises:
        ModelError: the options do not fit the backbone or the head.
    """
    convs = options.convs
    if convs > 4:
        raise ModelError(f"retinanet: convs={convs} is too many; torchvision's head has 4 convolutions, give 4 or fewer")
    pyramid = pyramid_description(backbone, options, options.levels, options.neck)
    first, last = options.levels
    mean, std = image_statistics(backbone, options)
    bases = [options.anchors * 2**level for level in range(first, last + 1)]
    if bases[0] < 1:
        raise ModelError(
            f"retinanet: anchors={options.anchors} strides of {2**first} pixels are less than a pixel; give a larger value"
        )
    description = {
        "call": "torchvision.models.detection.RetinaNet",
        "backbone": pyramid,
        "num_classes": len(classes) + 1,
        "anchor_generator": {
            "call": "torchvision.models.detection.anchor_utils.AnchorGenerator",
            "sizes": [[int(base * 2 ** (part / 3)) for part in range(3)] for base in bases],
            "aspect_ratios": [[0.5, 1.0, 2.0]] * len(bases),
        },
        "head": {
            "call": "retinanet_head",
            "in_channels": options.neck,
            "num_anchors": 9,
            "num_classes": len(classes) + 1,
            "num_convs": convs,
        },
        "image_mean": mean,
        "image_std": std,
        "score_thresh": options.score,
        "topk_candidates": options.topk,
        "detections_per_img": options.dets,
    }
    model = build_model(description)
    if options.pretrained:
        load_pretrained(model.backbone, pyramid, options.pretrained)
    return wrap_model(model, classes, options.name or f"retinanet:{backbone}", description=description)


def wrap_model(
    model: Any,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> RetinaNetDetector:
    """Wrap a built ``torchvision.models.detection.RetinaNet``.

    Raises:
        ModelError: the head is not torchvision's ``RetinaNetHead``.
    """
    if not isinstance(model.head, RetinaNetHead):
        raise ModelError(f"{name}: the head is a {type(model.head).__name__}; only torchvision's RetinaNetHead is supported")
    return RetinaNetDetector(model, classes, name, family="dense", columns=columns, description=description)


class RetinaNetDetector(DenseDetector):
    """Adapter of RetinaNet. ``deltas`` are dx, dy, dw, dh relative to the anchor."""

    # ------------------------------------------------------------------------------------------------------- prediction

    def outputs(self, class_maps: Sequence[Tensor], box_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Compute the outputs under torchvision's names."""
        classification, regression = self.model.head.classification_head, self.model.head.regression_head
        return {
            "cls_logits": flat_outputs([classification.cls_logits(level) for level in class_maps], classification.num_classes),
            "bbox_regression": flat_outputs([regression.bbox_reg(level) for level in box_maps], 4),
        }

    def decode(self, regression: Tensor, priors_xyxy: Tensor, levels: Tensor) -> Tensor:
        """Decode by the model's box coder."""
        decoded = self.model.box_coder.decode_single(regression.flatten(0, 1), priors_xyxy.flatten(0, 1))
        return cast(Tensor, decoded.view_as(priors_xyxy))

    def final_scores(self, outputs: dict[str, Tensor]) -> Tensor:
        """Compute the final scores: the class scores."""
        return outputs["cls_logits"].sigmoid()

    # --------------------------------------------------------------------------------------------------------- training

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign by torchvision's rule: IoU from 0.5 positive, below 0.4 negative, else ignored; each box keeps its best anchors.

        An image without boxes has negatives only.
        """
        dense = cast(Dense, prediction)
        matched = torch.full(dense.logits.shape[:2], NEGATIVE, dtype=torch.int64, device=dense.logits.device)
        for image, target in enumerate(batch.targets):
            boxes = target.boxes_xyxy[trainable(target)].to(batch.images.dtype)
            if len(boxes):
                matched[image] = whole_indices(match_anchors(self.model.proposal_matcher, boxes, dense, image), target)
        return Assignment(matched)

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Compute ``classification`` (focal) and ``bbox_regression``.

        Each term is divided by the number of positives of the image and averaged over the images. A given ``assignment`` may
        contain weights and ignored predictions; its normaliser, if given, divides the sum over the whole batch instead.
        """
        own = own_outputs(prediction, self)
        assignment = assignment or self.assign(prediction, batch)
        if assignment.weights is None and assignment.normalizer is None:
            return Losses(self._plain_loss(own, batch, assignment))
        asked = supervision(assignment, batch, self.class_outputs)
        normalizer = assignment.normalizer
        if normalizer is None:
            normalizer = asked.positive.sum(dim=1, keepdim=True).clamp(min=1) * len(batch)
        asked = replace(asked, weights=asked.weights / normalizer)
        positive = asked.positive
        deltas, anchors = own.outputs["bbox_regression"][positive], torch.stack(own.anchors)[positive]
        regression = self._box_losses(deltas, anchors, asked.boxes_xyxy)
        return Losses(
            {
                "classification": asked.focal(own.outputs["cls_logits"]).sum(),
                "bbox_regression": (regression * asked.weights[positive]).sum(),
            }
        )

    def _plain_loss(self, own: OwnOutputs, batch: Batch, assignment: Assignment) -> dict[str, Tensor]:
        """Compute the head's two terms: by the head, or for long rows in less memory (equal to about 1e-7)."""
        head, matched = self.model.head, list(assignment.matched)
        targets = target_dicts(batch, self.columns, only_trainable=False)
        anchors = list(own.anchors)
        known = (RetinaNetHead.compute_loss, RetinaNetClassificationHead.compute_loss)
        theirs = (type(head).compute_loss, type(head.classification_head).compute_loss)
        if own.outputs["cls_logits"].shape[-1] < LONG_ROW or theirs != known:
            return dict(head.compute_loss(targets, own.outputs, anchors, matched))
        asked = supervision(assignment, batch, self.class_outputs)
        positives = asked.positive.sum(dim=1).clamp(min=1)
        return {
            "classification": (asked.focal(own.outputs["cls_logits"]).sum(dim=1) / positives).sum() / len(batch),
            "bbox_regression": head.regression_head.compute_loss(targets, own.outputs, anchors, matched),
        }

    def _box_losses(self, deltas: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """Compute the head's regression loss [M] of each positive; the head itself returns their sum only."""
        side = self.model.head.regression_head
        if side._loss_type in ("l1", "smooth_l1"):
            wanted = side.box_coder.encode_single(boxes, anchors)
            loss = F.l1_loss if side._loss_type == "l1" else F.smooth_l1_loss
            return loss(deltas, wanted, reduction="none").sum(dim=-1)
        losses = {"giou": generalized_box_iou_loss, "diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}
        return losses[side._loss_type](side.box_coder.decode_single(deltas, anchors), boxes, reduction="none")
