"""What the adapters of dense one-stage heads share: towers, raw outputs and their places, supervision, copies.

``DenseDetector`` fits torchvision's heads (FCOS, RetinaNet): a ``classification_head`` and a ``regression_head``, each a
tower ``conv`` and output layers. ``OwnDenseDetector`` fits the models of the folder ``models`` (see ``models/dense.py``).

Shape letters: B images, L levels, P predictions of an image, K classes, C class outputs, M positives of the batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from detdistill.detectors.contract import dense_positives
from detdistill.detectors.options import ModelOptions
from detdistill.detectors.student_files.load_student import build as build_model
from detdistill.detectors.student_files.models.dense import OneStage, valid_cells
from detdistill.detectors.torchvision.backbones import image_statistics, load_pretrained, pyramid_description
from detdistill.detectors.torchvision.dense_outputs import (
    OwnOutputs,
    layout,
    our_labels,
    own_outputs,
    reset_dense_head,
    to_detections,
)
from detdistill.detectors.torchvision.detector import TorchvisionDetector
from detdistill.detectors.torchvision.images import image_sizes
from detdistill.detectors.torchvision.targets import matched_targets, target_dicts, trainable, whole_indices
from detdistill.functional.atss import atss_assign
from detdistill.functional.counting import label_weights
from detdistill.structures import (
    IGNORED,
    Assignment,
    Batch,
    Dense,
    Detections,
    Features,
    Losses,
    Origin,
    Positives,
    Prediction,
    Tower,
)

Top = Literal["conv", "linear", "input", "pool"]
Built = tuple[OneStage, dict[str, Any]]


class DenseDetector(TorchvisionDetector):
    """A one-stage detector with two towers. A subclass adds the output layers, the decoding, the rule and the losses."""

    layers_per_block = 1
    """Entries of a tower's ``conv`` that make one block."""

    # ------------------------------------------------------------------------------------------------- of the subclass

    @abstractmethod
    def outputs(self, class_maps: Sequence[Tensor], box_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """The output layers on the towers' last maps.

        Returns:
            ``cls_logits`` [B, P, C], ``bbox_regression`` [B, P, R], ``bbox_ctrness`` [B, P, 1] if the head has one, and
            whatever else the losses need, each [B, P, ...].
        """

    @abstractmethod
    def decode(self, regression: Tensor, priors_xyxy: Tensor, levels: Tensor) -> Tensor:
        """Boxes [B, P, 4] in pixels of a regression [B, P, R] and its anchors [B, P, 4] on ``levels`` [P]."""

    @abstractmethod
    def final_scores(self, outputs: dict[str, Tensor]) -> Tensor:
        """[B, P, C] the scores that detections are given (torchvision's models: needed to find where boxes came from)."""

    def anchors_per_cell(self) -> tuple[int, ...]:
        """As the model's anchor generator has them."""
        return tuple(self.model.anchor_generator.num_anchors_per_location())

    # ------------------------------------------------------------------------------------------------------- prediction

    def predict(self, features: Features, batch: Batch) -> Dense:
        """One prediction for each anchor or point; ``quality`` is the centerness where the head has one."""
        return self.finish(self.tower(features, upto=0), batch)

    @property
    def towers(self) -> tuple[nn.Sequential, nn.Sequential]:
        """The convolutions of classification and regression before the output layers."""
        return self.model.head.classification_head.conv, self.model.head.regression_head.conv

    @property
    def tower_depth(self) -> int:
        """Blocks of convolution, norm (where there is one) and ReLU on each side."""
        return len(self.towers[0]) // self.layers_per_block

    def tower(self, features: Features, upto: int | None = None) -> Tower:
        """Both sides after ``upto`` blocks."""
        depth = self.tower_depth if upto is None else upto
        classification, regression = (side[: self.layers_per_block * depth] for side in self.towers)
        return Tower(
            tuple(classification(level) for level in features.maps),
            tuple(regression(level) for level in features.maps),
            depth,
            features.strides,
        )

    def finish(self, hidden: Tower, batch: Batch) -> Dense:
        """The remaining blocks and the output layers; outputs and boxes are float32 under mixed precision."""
        classification, regression = (side[self.layers_per_block * hidden.depth :] for side in self.towers)
        class_maps = [classification(level) for level in hidden.classification]
        box_maps = [regression(level) for level in hidden.regression]
        shapes = [(level.shape[-2], level.shape[-1]) for level in class_maps]
        return self.placed(self.outputs(class_maps, box_maps), shapes, batch)

    def placed(self, outputs: dict[str, Tensor], shapes: Sequence[tuple[int, int]], batch: Batch) -> Dense:
        """Raw outputs (see ``outputs``) with their anchors, places and boxes; ``shapes`` are the levels' rows, columns."""
        outputs = {name: value.to(batch.images.dtype) for name, value in outputs.items()}
        anchors, per_cell = self.priors(shapes, batch)
        priors = torch.stack(anchors)
        levels, cells, numbers = layout(shapes, per_cell, priors.device)
        counts = tuple(height * width * count for (height, width), count in zip(shapes, per_cell, strict=True))
        return Dense(
            logits=outputs["cls_logits"][..., self.class_outputs],
            deltas=outputs["bbox_regression"],
            boxes_xyxy=self.decode(outputs["bbox_regression"], priors, levels),
            priors_xyxy=priors,
            levels=levels,
            cells=cells,
            anchors=numbers,
            quality=outputs["bbox_ctrness"][..., 0] if "bbox_ctrness" in outputs else None,
            own=OwnOutputs(outputs, anchors, counts),
        )

    def priors(self, shapes: Sequence[tuple[int, int]], batch: Batch) -> tuple[tuple[Tensor, ...], list[int]]:
        """Anchors [P, 4] for each image, and how many a cell has on each level."""
        stand_ins = [batch.images.new_empty(1, 1, *shape) for shape in shapes]  # anchors in full precision under autocast
        generator = self.model.anchor_generator
        return tuple(generator(self.image_shapes(batch), stand_ins)), generator.num_anchors_per_location()

    # ---------------------------------------------------------------------------------------------------------- results

    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """Torchvision's selection: best ``topk`` of each level above the score threshold, NMS."""
        own = own_outputs(prediction, self)
        split = {key: list(value.split(list(own.counts), dim=1)) for key, value in own.outputs.items()}
        anchors = [list(image.split(list(own.counts))) for image in own.anchors]
        sizes = image_sizes(batch)
        results = self.model.postprocess_detections(split, anchors, sizes)
        return to_detections(results, self, cast(Dense, prediction), self.final_scores(own.outputs), sizes)

    def positives(self, prediction: Prediction, assignment: Assignment, batch: Batch) -> Positives:
        """By the assignment."""
        return dense_positives(cast(Dense, prediction), assignment, batch)

    # ----------------------------------------------------------------------------------------------------------- copies

    def copy_head(self, fresh: bool = False) -> Self:
        """A copy that can do all but compute features."""
        head = cast(Self, self.without_backbone())
        if fresh:
            head.reset_head()
        return head

    def reset_head(self) -> None:
        """Draw the head's weights anew."""
        reset_dense_head(self.model.head)

    @property
    def class_outputs(self) -> Tensor:
        """[K] which class output belongs to each class."""
        return self.columns

    def class_rows(self, name: str) -> Tensor | None:
        """Rows of the class outputs, anchor by anchor; see ``inherit``."""
        if not name.startswith("model.head.classification_head.cls_logits."):
            return None
        side = self.model.head.classification_head
        anchors = torch.arange(side.num_anchors, device=self.columns.device) * side.num_classes
        return self.class_outputs[:, None] + anchors[None]


class OwnDenseDetector(DenseDetector):
    """A one-stage detector of ours: K class outputs without a background, square anchors, losses for each prediction.

    The images' padding has no part in anything: predictions of cells whose anchor lies beyond an image's valid size (row
    below ``ceil(height / stride)``, column below ``ceil(width / stride)``) are ignored by ``assign`` and by ``detect``.
    (mmdet counts cells up to the image's size padded to a multiple of 32.)
    """

    model: OneStage

    @abstractmethod
    def loss_values(self, prediction: Dense, batch: Batch, assignment: Assignment) -> dict[str, Tensor]:
        """Each loss term as [B, P], already weighted and divided: the terms of ``loss`` are their sums."""

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """The sums of ``loss_values``.

        A foreign assignment may weight predictions and ignore some; its normaliser divides every term in place of ours.
        """
        own = self.assign(prediction, batch) if assignment is None else assignment
        values = self.loss_values(cast(Dense, prediction), batch, own)
        return Losses({name: value.sum() for name, value in values.items()})

    def outputs(self, class_maps: Sequence[Tensor], box_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """As the model's head makes them."""
        return self.model.head.outputs(class_maps, box_maps)

    def decode(self, regression: Tensor, priors_xyxy: Tensor, levels: Tensor) -> Tensor:
        """As the model does."""
        return self.model.decode(regression, priors_xyxy, self.strides(levels, regression))

    def priors(self, shapes: Sequence[tuple[int, int]], batch: Batch) -> tuple[tuple[Tensor, ...], list[int]]:
        """The same square anchors for all images."""
        anchors = self.model.anchors(shapes, batch.images.new_empty(()))
        return (anchors,) * len(batch), [1] * len(shapes)

    def anchors_per_cell(self) -> tuple[int, ...]:
        """One on each level."""
        return (1,) * len(self.model.strides)

    def strides(self, levels: Tensor, like: Tensor) -> Tensor:
        """[P] stride of each prediction's level, in the type of ``like``."""
        return like.new_tensor(self.model.strides)[levels]

    def valid(self, prediction: Dense, batch: Batch) -> Tensor:
        """[B, P] predictions whose cell belongs to its image."""
        return valid_cells(prediction.levels, prediction.cells, self.model.strides, batch.sizes)

    def supervision(self, assignment: Assignment, batch: Batch) -> Supervision:
        """What an assignment asks of ``prediction.logits``, whose columns are our labels."""
        return supervision(assignment, batch, torch.arange(len(self.columns), device=self.columns.device))

    def final_scores(self, outputs: dict[str, Tensor]) -> Tensor:
        """Class score, times the centerness where there is one."""
        scores = outputs["cls_logits"].sigmoid()
        return scores * outputs["bbox_ctrness"].sigmoid() if "bbox_ctrness" in outputs else scores

    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """The model's selection, with the origin of each box."""
        dense = cast(Dense, prediction)
        own = own_outputs(dense, self)
        found = self.model.select(own.outputs, dense.boxes_xyxy, own.counts, self.valid(dense, batch), image_sizes(batch))
        detections = []
        for image, result in enumerate(found):
            keep, labels = our_labels(result["labels"], self.columns)
            index = result["index"][keep]
            place = dense.levels[index], dense.cells[index], dense.anchors[index]
            origin = Origin(torch.full_like(index, image), *place, torch.full_like(index, -1))
            detections.append(Detections(result["boxes"][keep], result["scores"][keep], labels, origin))
        return detections

    def reset_head(self) -> None:
        """Draw the head's weights anew."""
        self.model.head.reset()

    @property
    def class_outputs(self) -> Tensor:
        """[K] torchvision's labels begin with the background, our outputs do not."""
        return self.columns - 1


def one_stage_model(call: str, backbone: str, classes: Sequence[str], options: ModelOptions, top: Top = "linear") -> Built:
    """A model of the folder ``models`` on a timm backbone, with random weights (or the backbone's pretrained ones).

    Levels 3-7 and four head convolutions unless the options say otherwise.

    Args:
        call: its name in a description, e.g. ``models.atss.ATSS``.
        backbone: name of a timm model.
        classes: names of the classes.
        options: of the model string; what they do not say is the model's own default.
        top: how levels above the backbone's deepest are made, see ``TimmPyramid``.

    Returns:
        The model and its description.

    Raises:
        ModelError: the options do not fit the backbone or the head.
    """
    options.refuse(call.split(".")[1], "weights", "proposals", "rois", "mlp")
    pyramid = pyramid_description(backbone, options, levels=(3, 7), top=top)
    first, last = options.levels or (3, 7)
    mean, std = image_statistics(backbone, options)
    description: dict[str, Any] = {
        "call": call,
        "backbone": pyramid,
        "channels": options.neck,
        "num_classes": len(classes),
        "strides": [2**level for level in range(first, last + 1)],
        "convs": 4 if options.convs is None else options.convs,
        "image_mean": mean,
        "image_std": std,
        "score_thresh": 0.05 if options.score is None else options.score,
        "topk_candidates": options.topk or 1000,
        "detections_per_img": options.dets or 100,
    }
    model = build_model(description)
    if options.pretrained:
        load_pretrained(model.backbone, pyramid)
    return model, description


# ----------------------------------------------------------------------------------------------- assignment, supervision


def adaptive_assignment(prediction: Dense, valid: Tensor, batch: Batch, candidates: int) -> Assignment:
    """ATSS (see ``atss_assign``) for each image: the rule of ATSS and GFL.

    Args:
        prediction: its anchors are read.
        valid: [B, P] bool, predictions that take part; the others are ignored.
        batch: its targets are read; crowd boxes and boxes without area are none.
        candidates: anchors of a level and box.
    """
    matched = torch.full(valid.shape, IGNORED, device=valid.device)
    for image, target in enumerate(batch.targets):
        mine = valid[image]
        anchors, levels = prediction.priors_xyxy[image, mine], prediction.levels[mine]
        boxes = target.boxes_xyxy[trainable(target)].to(anchors.dtype)
        matched[image, mine] = whole_indices(atss_assign(anchors, levels, boxes, candidates)[0], target)
    return Assignment(matched)


@dataclass(frozen=True)
class Supervision:
    """What an assignment asks of the predictions of a batch."""

    positive: Tensor
    """[B, P] bool."""
    boxes_xyxy: Tensor
    """[M, 4] the positives' boxes, image by image, in order of prediction (as ``values[positive]``)."""
    outputs: Tensor
    """[M] the class output of each positive."""
    weights: Tensor
    """[B, P], 0 where ignored."""

    def wanted(self, logits: Tensor, values: Tensor | float = 1.0) -> Tensor:
        """[B, P, C] zeros, with ``values`` ([M] or a number) at each positive's class output."""
        wanted = torch.zeros_like(logits)
        wanted[(*torch.nonzero(self.positive, as_tuple=True), self.outputs)] = values  # type: ignore[assignment]
        return wanted

    def focal(self, logits: Tensor) -> Tensor:
        """[B, P] focal loss (alpha 0.25, gamma 2), summed over the class outputs, times the weights."""
        losses = sigmoid_focal_loss(logits, self.wanted(logits), reduction="none").sum(dim=-1)
        return losses * self.weights

    def spread(self, values: Tensor) -> Tensor:
        """[B, P] the positives' values [M], times the weights, in their places; zeros elsewhere."""
        return torch.zeros_like(self.weights).masked_scatter(self.positive, values * self.weights[self.positive])


def supervision(assignment: Assignment, batch: Batch, class_outputs: Tensor) -> Supervision:
    """The boxes, class outputs and weights of an assignment [B, P].

    Args:
        assignment: of predictions of ``batch``; its indices count all boxes of an image.
        batch: its targets are read.
        class_outputs: [K] the output of each class.
    """
    matched = assignment.matched
    boxes, outputs = matched_targets(matched, target_dicts(batch, class_outputs, only_trainable=False))
    return Supervision(matched >= 0, boxes, outputs, label_weights(assignment, batch.images))
