"""FCOS: torchvision's model, run stage by stage.

Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019, as in ``torchvision.models.detection``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import generalized_box_iou_loss

from detdistill.detectors.dense.shared.heads import DenseDetector, DenseOptions, supervision
from detdistill.detectors.student_files.load_student import build as build_model
from detdistill.detectors.torchvision.backbones import image_statistics, load_pretrained, pyramid_description
from detdistill.detectors.torchvision.dense_outputs import OwnOutputs, flat_outputs, own_outputs
from detdistill.detectors.torchvision.targets import Matches, target_dicts
from detdistill.errors import ModelError
from detdistill.functional.counting import mean_over_ranks, share_over_ranks
from detdistill.structures import Assignment, Batch, Losses, Prediction

MODEL_CLASS = FCOS
OPTIONS = DenseOptions


def build(backbone: str, classes: Sequence[str], options: DenseOptions) -> FCOSDetector:
    """Build an FCOS with random weights on a timm backbone. Defaults: levels 3-7, four head convolutions.

    The default score threshold is 0.05 (torchvision: 0.2, which lowers AP); all other defaults are torchvision's.

    Raises:
        ModelError: the options do not fit the backbone or the head.
    """
    if options.neck % 32:
        raise ModelError(f"fcos: neck={options.neck} must be a multiple of 32; the head has GroupNorm with 32 groups")
    pyramid = pyramid_description(backbone, options, options.levels, options.neck)
    first, last = options.levels
    outputs = len(classes) + 1
    mean, std = image_statistics(backbone, options)
    description = {
        "call": "torchvision.models.detection.FCOS",
        "backbone": pyramid,
        "num_classes": outputs,
        "anchor_generator": {
            "call": "torchvision.models.detection.anchor_utils.AnchorGenerator",
            "sizes": [[2**level] for level in range(first, last + 1)],
            "aspect_ratios": [[1.0]] * (last - first + 1),
        },
        "head": {
            "call": "torchvision.models.detection.fcos.FCOSHead",
            "in_channels": options.neck,
            "num_anchors": 1,
            "num_classes": outputs,
            "num_convs": options.convs,
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
    return wrap_model(model, classes, options.name or f"fcos:{backbone}", description=description)


def wrap_model(
    model: Any,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> FCOSDetector:
    """Wrap a built ``torchvision.models.detection.FCOS``.

    Raises:
        ModelError: the head is not torchvision's ``FCOSHead``.
    """
    if not isinstance(model.head, FCOSHead):
        raise ModelError(f"{name}: the head is a {type(model.head).__name__}; only torchvision's FCOSHead is supported")
    return FCOSDetector(model, classes, name, family="dense", columns=columns, description=description)


class FCOSDetector(DenseDetector):
    """Adapter of FCOS. One point per cell; ``deltas`` are the distances left, top, right, bottom in strides."""

    layers_per_block = 3  # convolution, GroupNorm, ReLU

    # ------------------------------------------------------------------------------------------------------- prediction

    def outputs(self, class_maps: Sequence[Tensor], box_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Compute the outputs under torchvision's names."""
        classification, regression = self.model.head.classification_head, self.model.head.regression_head
        return {
            "cls_logits": flat_outputs([classification.cls_logits(level) for level in class_maps], classification.num_classes),
            "bbox_regression": flat_outputs([regression.bbox_reg(level).relu() for level in box_maps], 4),
            "bbox_ctrness": flat_outputs([regression.bbox_ctrness(level) for level in box_maps], 1),
        }

    def decode(self, regression: Tensor, priors_xyxy: Tensor, levels: Tensor) -> Tensor:
        """Decode by the model's box coder."""
        return cast(Tensor, self.model.box_coder.decode(regression, priors_xyxy))

    def final_scores(self, outputs: dict[str, Tensor]) -> Tensor:
        """Compute the final scores: the square root of class score times centerness."""
        return (outputs["cls_logits"].sigmoid() * outputs["bbox_ctrness"].sigmoid()).sqrt()

    # --------------------------------------------------------------------------------------------------------- training

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign by torchvision's rule: a point near the centre of a box of its level's size range matches the smallest such box.

        The rule is part of the model's ``compute_loss``, which runs here with a replacement head that records the matches.
        """
        own = own_outputs(prediction, self)
        matches = Matches()
        self._compute_loss(matches, own, batch)
        return matches.assignment(batch)

    def _compute_loss(self, head: Matches, own: OwnOutputs, batch: Batch) -> dict[str, Tensor]:
        """Run the model's ``compute_loss`` with another head."""
        stand_in = SimpleNamespace(head=head, center_sampling_radius=self.model.center_sampling_radius)
        arguments = target_dicts(batch, self.columns), own.outputs, list(own.anchors), list(own.counts)
        return cast(dict[str, Tensor], type(self.model).compute_loss(stand_in, *arguments))

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Compute ``classification`` (focal), ``bbox_regression`` (GIoU) and ``bbox_ctrness``.

        Each term is divided by the number of positives (mean over processes). A given ``assignment`` may contain weights,
        ignored predictions and a normaliser. A positive point outside its box gets the centerness target 0 (torchvision would
        compute NaN).
        """
        own = own_outputs(prediction, self)
        if assignment is None:
            matches = Matches(self.model.head)
            terms = self._compute_loss(matches, own, batch)
            share = share_over_ranks(matches.number(batch.images))
            return Losses({name: term * share for name, term in terms.items()})
        asked = supervision(assignment, batch, self.class_outputs)
        positive, boxes, weights = asked.positive, asked.boxes_xyxy, asked.weights[asked.positive]
        normalizer = mean_over_ranks(positive.sum(), least=1) if assignment.normalizer is None else assignment.normalizer
        anchors = torch.stack(own.anchors)[positive]

        predicted = self.model.box_coder.decode(own.outputs["bbox_regression"][positive], anchors)
        overlap = generalized_box_iou_loss(predicted, boxes, reduction="none")
        left, top, right, bottom = self.model.box_coder.encode(anchors, boxes).clamp(min=0).unbind(dim=-1)
        across = torch.minimum(left, right) / torch.maximum(left, right).clamp(min=1e-9)
        down = torch.minimum(top, bottom) / torch.maximum(top, bottom).clamp(min=1e-9)
        centerness = F.binary_cross_entropy_with_logits(
            own.outputs["bbox_ctrness"][..., 0][positive], (across * down).sqrt(), reduction="none"
        )
        return Losses(
            {
                "classification": asked.focal(own.outputs["cls_logits"]).sum() / normalizer,
                "bbox_regression": (overlap * weights).sum() / normalizer,
                "bbox_ctrness": (centerness * weights).sum() / normalizer,
            }
        )
