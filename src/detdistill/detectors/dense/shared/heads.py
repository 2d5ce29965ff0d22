"""Base classes of the adapters of dense one-stage heads: towers, raw outputs, assignment, supervision, copies.

``DenseDetector`` is for torchvision's heads (FCOS, RetinaNet): a ``classification_head`` and a ``regression_head``, each a
tower ``conv`` and output layers. ``OwnDenseDetector`` is for the models of the folder ``models`` (see ``models/dense.py``).

Shape letters: B images, L levels, P predictions of an image, K classes, C class outputs, M positives of the batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from detdistill.detectors.contract import DenseCoding, dense_positives
from detdistill.detectors.student_files.load_student import build as build_model
from detdistill.detectors.student_files.models.dense import OneStage, valid_cells
from detdistill.detectors.torchvision.backbones import image_statistics, load_pretrained, pyramid_description
from detdistill.detectors.torchvision.dense_outputs import (
    OwnOutputs,
    anchors_wh,
    layout,
    our_labels,
    own_outputs,
    reset_dense_head,
    to_detections,
)
from detdistill.detectors.torchvision.detector import TorchvisionDetector
from detdistill.detectors.torchvision.images import image_sizes
from detdistill.detectors.torchvision.options import BackboneOptions, CandidateOptions, PyramidOptions
from detdistill.detectors.torchvision.targets import matched_targets, target_dicts, trainable, whole_indices
from detdistill.functional.atss import atss_assign
from detdistill.functional.counting import label_weights
from detdistill.functional.sparse_focal import focal_rows
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
from detdistill.values import Index

LONG_ROW = 128
"""From this number of classes on, rows of logits are long: memory counts more than the last bit."""
Top = Literal["conv", "linear", "input", "pool"]
Built = tuple[OneStage, dict[str, Any]]


class DenseDetector(TorchvisionDetector):
    """A one-stage detector with two towers. A subclass adds output layers, box decoding, assignment and losses."""

    layers_per_block = 1
    """Number of entries of a tower's ``conv`` in one block."""

    # ------------------------------------------------------------------------------------------------- of the subclass

    @abstractmethod
    def outputs(self, class_maps: Sequence[Tensor], box_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Run the output layers on the last maps of the towers.

        Returns:
            ``cls_logits`` [B, P, C], ``bbox_regression`` [B, P, R], ``bbox_ctrness`` [B, P, 1] if the head has one, and
            whatever else the losses need, each [B, P, ...].
        """

    @abstractmethod
    def decode(self, regression: Tensor, priors_xyxy: Tensor, levels: Tensor) -> Tensor:
        """Decode a regression [B, P, R] and its anchors [B, P, 4] on ``levels`` [P] to boxes [B, P, 4] in pixels."""

    @abstractmethod
    def final_scores(self, outputs: dict[str, Tensor]) -> Tensor:
        """Compute the scores [B, P, C] of the detections (for torchvision's models also used to find the origin of boxes)."""

    def anchors_per_cell(self) -> tuple[int, ...]:
        """Return the numbers of the model's anchor generator."""
        return tuple(self.model.anchor_generator.num_anchors_per_location())

    def dense_coding(self) -> DenseCoding:
        """Return whether the head has an output for a quality, and the anchors of the generator."""
        return DenseCoding(quality=self._has_quality(), anchors_wh=anchors_wh(self.model.anchor_generator))

    def _has_quality(self) -> bool:
        return getattr(self.model.head.regression_head, "bbox_ctrness", None) is not None

    # ------------------------------------------------------------------------------------------------------- prediction

    def predict(self, features: Features, batch: Batch) -> Dense:
        """Compute one prediction for each anchor or point; ``quality`` is the centerness logit, None if the head has none."""
        return self.finish(self.tower(features, upto=0), batch)

    @property
    def towers(self) -> tuple[nn.Sequential, nn.Sequential]:
        """Convolutions of the classification and the regression branch before the output layers."""
        return self.model.head.classification_head.conv, self.model.head.regression_head.conv

    @property
    def tower_depth(self) -> int:
        """Number of blocks (convolution, optional norm, ReLU) of each branch."""
        return len(self.towers[0]) // self.layers_per_block

    def tower(self, features: Features, upto: int | None = None) -> Tower:
        """Compute the inner maps of both branches after ``upto`` blocks (None: all blocks)."""
        depth = self.tower_depth if upto is None else upto
        classification, regression = (side[: self.layers_per_block * depth] for side in self.towers)
        return Tower(
            tuple(classification(level) for level in features.maps),
            tuple(regression(level) for level in features.maps),
            depth,
            features.strides,
        )

    def finish(self, hidden: Tower, batch: Batch) -> Dense:
        """Run the remaining blocks and the output layers; outputs and boxes are float32 under mixed precision."""
        class_maps, box_maps = self.last_maps(hidden)
        return self.placed(self.outputs(class_maps, box_maps), map_shapes(class_maps), batch)

    def last_maps(self, hidden: Tower) -> tuple[list[Tensor], list[Tensor]]:
        """Run the remaining blocks: the last maps of both branches, for each level."""
        classification, regression = (side[self.layers_per_block * hidden.depth :] for side in self.towers)
        return [classification(level) for level in hidden.classification], [regression(level) for level in hidden.regression]

    def placed(self, outputs: dict[str, Tensor], shapes: Sequence[tuple[int, int]], batch: Batch) -> Dense:
        """Build the prediction from raw outputs (see ``outputs``); ``shapes`` are rows and columns of each level."""
        outputs = {name: value.to(batch.images.dtype) for name, value in outputs.items()}
        anchors, per_cell = self.priors(shapes, batch)
        levels, cells, numbers = layout(shapes, per_cell, anchors[0].device)
        priors = self.references(outputs, torch.stack(anchors), levels)
        counts = tuple(height * width * count for (height, width), count in zip(shapes, per_cell, strict=True))
        return Dense(
            logits=self.picked_outputs(outputs["cls_logits"]),
            deltas=outputs["bbox_regression"],
            boxes_xyxy=self.decode(outputs["bbox_regression"], priors, levels),
            priors_xyxy=priors,
            levels=levels,
            cells=cells,
            anchors=numbers,
            quality=outputs["bbox_ctrness"][..., 0] if "bbox_ctrness" in outputs else None,
            softmax=self.spec.softmax,
            own=OwnOutputs(outputs, anchors, counts),
        )

    def references(self, outputs: dict[str, Tensor], anchors: Tensor, levels: Tensor) -> Tensor:
        """Boxes [B, P, 4] that the regression refers to, on ``levels`` [P]: the anchors [B, P, 4]."""
        return anchors

    def priors(self, shapes: Sequence[tuple[int, int]], batch: Batch) -> tuple[tuple[Tensor, ...], list[int]]:
        """Compute the anchors [P, 4] of each image, and the number of anchors of one cell for each level."""
        stand_ins = [
            batch.images.new_empty(1, 1, *shape) for shape in shapes
        ]  # so that anchors have full precision under autocast
        generator = self.model.anchor_generator
        return tuple(generator(self.image_shapes(batch), stand_ins)), generator.num_anchors_per_location()

    def picked_outputs(self, outputs: Tensor) -> Tensor:
        """Return the outputs ``logit_outputs`` [B, P, K]: a view if they stand side by side in long rows.

        Short rows are copied, because arithmetic on rows with gaps between them is slower.
        """
        wanted = self.logit_outputs
        if len(wanted) >= LONG_ROW:
            first = int(wanted[0])
            if torch.equal(wanted, torch.arange(first, first + len(wanted), device=wanted.device)):
                return outputs[..., first : first + len(wanted)]
        return outputs[..., wanted]

    # ---------------------------------------------------------------------------------------------------------- results

    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """Select the detections as torchvision does: the best ``topk`` of each level above the score threshold, then NMS."""
        own = own_outputs(prediction, self)
        split = {key: list(value.split(list(own.counts), dim=1)) for key, value in own.outputs.items()}
        anchors = [list(image.split(list(own.counts))) for image in own.anchors]
        sizes = image_sizes(batch)
        results = self.model.postprocess_detections(split, anchors, sizes)
        return to_detections(results, self, cast(Dense, prediction), self.final_scores(own.outputs), sizes)

    def positives(self, prediction: Prediction, assignment: Assignment, batch: Batch) -> Positives:
        """Gather the predictions that ``assignment`` matches to a ground-truth box."""
        return dense_positives(cast(Dense, prediction), assignment, batch)

    # ----------------------------------------------------------------------------------------------------------- copies

    def copy_head(self, fresh: bool = False) -> Self:
        """Copy the head into a detector with parameters of its own; ``fresh``: newly initialised. It cannot compute features."""
        head = cast(Self, self.without_backbone())
        if fresh:
            head.reset_head()
        return head

    def reset_head(self) -> None:
        """Initialise the head's weights randomly."""
        reset_dense_head(self.model.head)

    @property
    def class_outputs(self) -> Tensor:
        """[K] index of the class output of each class."""
        return self.columns

    @property
    def logit_outputs(self) -> Tensor:
        """Index of the class output of each column of ``Dense.logits``."""
        return self.class_outputs

    def class_rows(self, name: str) -> Tensor | None:
        """Return the rows [K, A] of the class outputs of each class and anchor; see ``inherit``."""
        if not name.startswith("model.head.classification_head.cls_logits."):
            return None
        side = self.model.head.classification_head
        anchors = torch.arange(side.num_anchors, device=self.columns.device) * side.num_classes
        return self.class_outputs[:, None] + anchors[None]


class OwnDenseDetector(DenseDetector):
    """A one-stage detector of this package: K class outputs without background, square anchors, one loss per prediction.

    ``assign`` and ``detect`` ignore cells in the padding of an image. Valid cells have a row below ``ceil(height / stride)``
    and a column below ``ceil(width / stride)``. (In mmdet, cells are valid up to the image size padded to a multiple of 32.)
    """

    model: OneStage

    @abstractmethod
    def loss_values(self, prediction: Dense, batch: Batch, assignment: Assignment) -> dict[str, Tensor]:
        """Compute each loss term as [B, P], weighted and normalised, so that ``loss`` returns the sums."""

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Compute the sums of ``loss_values``.

        A given ``assignment`` may contain weights and ignored predictions; its normaliser, if given, replaces the detector's own
        in every term.
        """
        own = self.assign(prediction, batch) if assignment is None else assignment
        values = self.loss_values(cast(Dense, prediction), batch, own)
        return Losses({name: value.sum() for name, value in values.items()})

    def outputs(self, class_maps: Sequence[Tensor], box_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Run the output layers of the model's head."""
        return self.model.head.outputs(class_maps, box_maps)

    def decode(self, regression: Tensor, priors_xyxy: Tensor, levels: Tensor) -> Tensor:
        """Decode as the model does."""
        return self.model.decode(regression, priors_xyxy, self.strides(levels, regression))

    def references(self, outputs: dict[str, Tensor], anchors: Tensor, levels: Tensor) -> Tensor:
        """Compute them as the model does."""
        return self.model.references(outputs, anchors, self.strides(levels, anchors))

    def priors(self, shapes: Sequence[tuple[int, int]], batch: Batch) -> tuple[tuple[Tensor, ...], list[int]]:
        """Compute the square anchors, which are the same for all images."""
        anchors = self.model.anchors(shapes, batch.images.new_empty(()))
        return (anchors,) * len(batch), [1] * len(shapes)

    def anchors_per_cell(self) -> tuple[int, ...]:
        """Return 1 for each level."""
        return (1,) * len(self.model.strides)

    def dense_coding(self) -> DenseCoding:
        """Return whether the head has an output for a quality."""
        return DenseCoding(quality=self._has_quality())

    def strides(self, levels: Tensor, like: Tensor) -> Tensor:
        """Return the stride [P] of each prediction's level, with dtype and device of ``like``."""
        return like.new_tensor(self.model.strides)[levels]

    def valid(self, prediction: Dense, batch: Batch) -> Tensor:
        """Return the mask [B, P] of predictions whose cell is not in the padding."""
        return valid_cells(prediction.levels, prediction.cells, self.model.strides, batch.sizes)

    def supervision(self, assignment: Assignment, batch: Batch) -> Supervision:
        """Compute the training targets of ``prediction.logits`` (columns = labels) under an assignment."""
        return supervision(assignment, batch, torch.arange(len(self.columns), device=self.columns.device))

    def final_scores(self, outputs: dict[str, Tensor]) -> Tensor:
        """Compute the final scores: class score, times the centerness if the head has one."""
        scores = outputs["cls_logits"].sigmoid()
        return scores * outputs["bbox_ctrness"].sigmoid() if "bbox_ctrness" in outputs else scores

    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """Select the detections as the model does, and keep the origin of each box."""
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
        """Initialise the head's weights randomly."""
        self.model.head.reset()

    @property
    def class_outputs(self) -> Tensor:
        """[K] index of the class output of each class: torchvision's label less one, because there is no background output."""
        return self.columns - 1


def map_shapes(maps: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Rows and columns of maps [B, C, H_l, W_l]."""
    return [(level.shape[-2], level.shape[-1]) for level in maps]


@dataclass(frozen=True, kw_only=True)
class DenseOptions(CandidateOptions, BackboneOptions, PyramidOptions):
    """Options of all dense detectors with towers."""

    convs: Index = 4
    """Number of convolutions in the head before the output layers."""


def one_stage_model(
    call: str,
    backbone: str,
    classes: Sequence[str],
    options: DenseOptions,
    top: Top = "linear",
    *,
    below: bool = False,
    **more: Any,
) -> Built:
    """Build a model of the folder ``models`` on a timm backbone (random weights; the backbone optionally pretrained).

    Args:
        call: name of the model class in a description, e.g. ``models.atss.ATSS``.
        backbone: name of a timm model.
        classes: names of the K classes, in label order.
        options: options of the model string.
        top: how the levels above the backbone's deepest map are computed, see ``TimmPyramid``.
        below: also compute the backbone's map below the pyramid, if it has one.
        more: further arguments of the model class.

    Returns:
        The model and its description.

    Raises:
        ModelError: the options do not fit the backbone or the head.
    """
    pyramid = pyramid_description(backbone, options, options.levels, options.neck, top, below=below)
    first, last = options.levels
    mean, std = image_statistics(backbone, options)
    description: dict[str, Any] = {
        "call": call,
        "backbone": pyramid,
        "channels": options.neck,
        "num_classes": len(classes),
        "strides": [2**level for level in range(first, last + 1)],
        "convs": options.convs,
        "image_mean": mean,
        "image_std": std,
        "score_thresh": options.score,
        "topk_candidates": options.topk,
        "detections_per_img": options.dets,
        **more,
    }
    model = build_model(description)
    if options.pretrained:
        load_pretrained(model.backbone, pyramid, options.pretrained)
    return model, description


# ----------------------------------------------------------------------------------------------- assignment, supervision


def adaptive_assignment(prediction: Dense, valid: Tensor, batch: Batch, candidates: int) -> Assignment:
    """Assign by ATSS in each image (see ``atss_assign``); used by ATSS and GFL.

    Args:
        prediction: prediction with anchors.
        valid: [B, P] mask of valid predictions; the others are ignored.
        batch: batch with targets; crowd boxes and boxes without area are left out.
        candidates: number of candidate anchors for each box and level.
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
    """Training targets of the predictions of a batch under an assignment."""

    positive: Tensor
    """[B, P] mask of the positives."""
    boxes_xyxy: Tensor
    """[M, 4] ground-truth boxes of the positives, in the order of ``values[positive]``: image by image, by prediction."""
    outputs: Tensor
    """[M] index of the class output of each positive."""
    weights: Tensor
    """[B, P] weight of each prediction, 0 if ignored."""

    def wanted(self, logits: Tensor, values: Tensor | float = 1.0) -> Tensor:
        """Return class targets [B, P, C]: ``values`` ([M] or a number) at the class output of each positive, else 0."""
        wanted = torch.zeros_like(logits)
        wanted[(*torch.nonzero(self.positive, as_tuple=True), self.outputs)] = values  # type: ignore[assignment]
        return wanted

    def focal(self, logits: Tensor) -> Tensor:
        """Compute the focal loss [B, P] (alpha 0.25, gamma 2), summed over the class outputs, times the weights."""
        outputs = torch.full_like(self.positive, -1, dtype=torch.int64)
        outputs[self.positive] = self.outputs
        return focal_rows(logits, outputs) * self.weights

    def spread(self, values: Tensor) -> Tensor:
        """Scatter the values [M] of the positives, times their weights, to [B, P]; zero elsewhere."""
        return torch.zeros_like(self.weights).masked_scatter(self.positive, values * self.weights[self.positive])


def supervision(assignment: Assignment, batch: Batch, class_outputs: Tensor) -> Supervision:
    """Compute the training targets under an assignment [B, P].

    Args:
        assignment: assignment of the predictions of ``batch``; its indices count all boxes of an image.
        batch: batch with targets.
        class_outputs: [K] index of the class output of each class.
    """
    matched = assignment.matched
    boxes, outputs = matched_targets(matched, target_dicts(batch, class_outputs, only_trainable=False))
    return Supervision(matched >= 0, boxes, outputs, label_weights(assignment, batch.images))
