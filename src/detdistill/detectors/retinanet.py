"""RetinaNet: torchvision's model in stages.

Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, as in ``torchvision.models.detection`` (both versions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss, sigmoid_focal_loss

from detdistill.detectors import _torchvision as shared
from detdistill.detectors import standalone
from detdistill.detectors.backbones import image_statistics, load_pretrained, pyramid_description
from detdistill.detectors.contract import Tower, dense_positives
from detdistill.detectors.options import ModelOptions
from detdistill.errors import ModelError
from detdistill.structures import IGNORED, Assignment, Batch, Dense, Detections, Features, Losses, Positives, Prediction

MODEL_CLASS = RetinaNet


def build(backbone: str, classes: Sequence[str], options: ModelOptions) -> RetinaNetDetector:
    """A fresh RetinaNet on a timm backbone: levels 3-7, nine anchors from four strides up, four head convolutions.

    Detections start at a score of 0.05, 1000 candidates of each level, 300 detections: torchvision's defaults.

    Raises:
        ModelError: the options do not fit the backbone or the head.
    """
    options.refuse("retinanet", "weights", "proposals", "rois", "mlp")
    convs = 4 if options.convs is None else options.convs
    if convs > 4:
        raise ModelError(f"retinanet: convs={convs} is too many; torchvision's head has 4 convolutions, fewer can be kept")
    pyramid = pyramid_description(backbone, options, levels=(3, 7))
    first, last = options.levels or (3, 7)
    mean, std = image_statistics(backbone, options)
    bases = [4 * 2**level for level in range(first, last + 1)]
    description = {
        "call": "torchvision.models.detection.RetinaNet",
        "backbone": pyramid,
        "num_classes": len(classes) + 1,
        "anchor_generator": {
            "call": "torchvision.models.detection.anchor_utils.AnchorGenerator",
            "sizes": [[base, int(base * 2 ** (1 / 3)), int(base * 2 ** (2 / 3))] for base in bases],
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
        "score_thresh": 0.05 if options.score is None else options.score,
        "topk_candidates": options.topk or 1000,
        "detections_per_img": options.dets or 300,
    }
    model = standalone.build(description)
    if options.pretrained:
        load_pretrained(model.backbone, pyramid)
    return wrap_model(model, classes, options.name or f"retinanet:{backbone}", description=description)


def wrap_model(
    model: Any,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> RetinaNetDetector:
    """Somebody's ``torchvision.models.detection.RetinaNet``.

    Raises:
        ModelError: its head is not torchvision's.
    """
    if not isinstance(model.head, RetinaNetHead):
        raise ModelError(f"{name}: the head is a {type(model.head).__name__}; only torchvision's RetinaNetHead is understood")
    return RetinaNetDetector(model, classes, name, family="dense", columns=columns, description=description)


class RetinaNetDetector(shared.TorchvisionDetector):
    """RetinaNet with towers, copies and backbone features; ``deltas`` are dx, dy, dw, dh of the anchor."""

    # ------------------------------------------------------------------------------------------------------- prediction

    def predict(self, features: Features, batch: Batch) -> Dense:
        """One prediction for each anchor."""
        return self.finish(self.tower(features, upto=0), batch)

    @property
    def tower_depth(self) -> int:
        """Blocks of convolution, (in version 2) GroupNorm, and ReLU on each side."""
        return len(self.model.head.classification_head.conv)

    def tower(self, features: Features, upto: int | None = None) -> Tower:
        """Both sides after ``upto`` blocks."""
        depth = self.tower_depth if upto is None else upto
        head = self.model.head
        return Tower(
            tuple(head.classification_head.conv[:depth](level) for level in features.maps),
            tuple(head.regression_head.conv[:depth](level) for level in features.maps),
            depth,
            features.strides,
        )

    def finish(self, hidden: Tower, batch: Batch) -> Dense:
        """The remaining blocks and the output layers."""
        classification, regression = self.model.head.classification_head, self.model.head.regression_head
        class_maps = [classification.conv[hidden.depth :](level) for level in hidden.classification]
        box_maps = [regression.conv[hidden.depth :](level) for level in hidden.regression]
        outputs = {
            "cls_logits": shared.flat_outputs(
                [classification.cls_logits(level) for level in class_maps], classification.num_classes
            ),
            "bbox_regression": shared.flat_outputs([regression.bbox_reg(level) for level in box_maps], 4),
        }
        outputs = {key: value.to(batch.images.dtype) for key, value in outputs.items()}
        shapes = [(level.shape[-2], level.shape[-1]) for level in class_maps]
        stand_ins = [batch.images.new_empty(1, 1, *shape) for shape in shapes]  # anchors in full precision under autocast
        anchors = tuple(self.model.anchor_generator(self.image_shapes(batch), stand_ins))
        priors = torch.stack(anchors)
        per_cell = self.model.anchor_generator.num_anchors_per_location()
        levels, cells, numbers = shared.layout(shapes, per_cell, priors.device)
        decoded = self.model.box_coder.decode_single(outputs["bbox_regression"].flatten(0, 1), priors.flatten(0, 1))
        counts = tuple(height * width * count for (height, width), count in zip(shapes, per_cell, strict=True))
        return Dense(
            logits=outputs["cls_logits"][..., self.columns],
            deltas=outputs["bbox_regression"],
            boxes_xyxy=decoded.view_as(priors),
            priors_xyxy=priors,
            levels=levels,
            cells=cells,
            anchors=numbers,
            own=shared.OwnOutputs(outputs, anchors, counts),
        )

    # ------------------------------------------------------------------------------------------------ training, results

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Torchvision's rule: IoU from 0.5 positive, below 0.4 negative, else ignored; each box keeps its best anchors.

        The rule is inside the model's ``compute_loss``; it is run on a stand-in whose head only notes the matches.
        """
        own = shared.own_outputs(prediction, self)
        matches = shared.Matches()
        stand_in = SimpleNamespace(head=matches, proposal_matcher=self.model.proposal_matcher)
        targets = shared.target_dicts(batch, self.columns)
        type(self.model).compute_loss(stand_in, targets, own.outputs, list(own.anchors))
        return matches.assignment(batch)

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """``classification`` (focal) and ``bbox_regression``, each over an image's positives, then the mean over images.

        A foreign assignment may weight predictions and ignore some; its normaliser, if it has one, divides the sum over
        the whole batch instead.
        """
        own = shared.own_outputs(prediction, self)
        if assignment is None:
            targets = shared.target_dicts(batch, self.columns)
            return Losses(self.model.compute_loss(targets, own.outputs, list(own.anchors)))
        targets = shared.target_dicts(batch, self.columns, only_trainable=False)
        matched, positive = assignment.matched, assignment.matched >= 0
        if assignment.weights is None and assignment.normalizer is None:
            return Losses(self.model.head.compute_loss(targets, own.outputs, list(own.anchors), list(matched)))
        logits, deltas = own.outputs["cls_logits"], own.outputs["bbox_regression"]
        weights = torch.ones_like(logits[..., 0]) if assignment.weights is None else assignment.weights
        if assignment.normalizer is None:
            weights = weights / (positive.sum(dim=1, keepdim=True).clamp(min=1) * len(batch))
        else:
            weights = weights / assignment.normalizer
        boxes, labels = shared.matched_targets(matched, targets)  # [M, 4], [M] of the positives, in their order
        wanted = torch.zeros_like(logits)
        wanted[(*torch.nonzero(positive, as_tuple=True), labels)] = 1.0
        focal = sigmoid_focal_loss(logits, wanted, reduction="none").sum(dim=-1)
        regression = self._box_losses(deltas[positive], torch.stack(own.anchors)[positive], boxes)
        return Losses(
            {
                "classification": (focal * weights.masked_fill(matched == IGNORED, 0.0)).sum(),
                "bbox_regression": (regression * weights[positive]).sum(),
            }
        )

    def _box_losses(self, deltas: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """[M] the head's regression loss of each positive; the head itself only gives their sum."""
        side = self.model.head.regression_head
        if side._loss_type in ("l1", "smooth_l1"):
            wanted = side.box_coder.encode_single(boxes, anchors)
            loss = F.l1_loss if side._loss_type == "l1" else F.smooth_l1_loss
            return loss(deltas, wanted, reduction="none").sum(dim=-1)
        losses = {"giou": generalized_box_iou_loss, "diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}
        return losses[side._loss_type](side.box_coder.decode_single(deltas, anchors), boxes, reduction="none")

    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """Torchvision's selection: best ``topk`` of each level above the score threshold, NMS."""
        own = shared.own_outputs(prediction, self)
        split = {key: list(value.split(list(own.counts), dim=1)) for key, value in own.outputs.items()}
        anchors = [list(image.split(list(own.counts))) for image in own.anchors]
        sizes = shared.image_sizes(batch)
        results = self.model.postprocess_detections(split, anchors, sizes)
        return shared.to_detections(results, self, cast(Dense, prediction), own.outputs["cls_logits"].sigmoid(), sizes)

    def positives(self, prediction: Prediction, assignment: Assignment, batch: Batch) -> Positives:
        """By the assignment."""
        return dense_positives(cast(Dense, prediction), assignment, batch)

    # ----------------------------------------------------------------------------------------------------------- copies

    def copy_head(self, fresh: bool = False) -> RetinaNetDetector:
        """A copy that can do all but compute features."""
        head = cast(RetinaNetDetector, self.without_backbone())
        if fresh:
            shared.reset_dense_head(head.model.head)
        return head

    def class_rows(self, name: str) -> Tensor | None:
        """Rows of the class outputs, anchor by anchor; see ``inherit``."""
        if not name.startswith("model.head.classification_head.cls_logits."):
            return None
        side = self.model.head.classification_head
        anchors = torch.arange(side.num_anchors, device=self.columns.device) * side.num_classes
        return self.columns[:, None] + anchors[None]
