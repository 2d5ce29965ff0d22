"""MimicDet: refined anchors, and a one-stage head that learns the features of a region head trained beside it.

This file has the region head, the assignments and the losses; network and inference are in ``models/mimicdet.py``.
Lu, Li, Li, Yan, "MimicDet: Bridging the Gap Between One-Stage and Two-Stage Object Detection", ECCV 2020. No released code was
found: a reconstruction. The method ``mimicdet`` has the same idea for existing dense detectors.

Shape letters: B images, P predictions of an image, K classes, D width of the compared layers, R regions of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.contract import Parts
from detdistill.detectors.dense.shared.heads import DenseOptions, OwnDenseDetector, map_shapes, one_stage_model
from detdistill.detectors.student_files.models.atss import DELTA_SCALES
from detdistill.detectors.student_files.models.mimicdet import Looked, MimicDet
from detdistill.detectors.torchvision.dense_outputs import OwnOutputs, own_outputs
from detdistill.detectors.torchvision.images import pyramid_maps
from detdistill.detectors.torchvision.targets import trainable, whole_indices
from detdistill.functional.assign import max_iou_assign
from detdistill.functional.counting import number_of_positives
from detdistill.functional.precision import full_precision
from detdistill.functional.refinement import refinement_assign
from detdistill.functional.region_heads import RegionHead, region_loss, staggered_levels
from detdistill.functional.regions import encode_boxes, features_at_origin, propose, sample_regions
from detdistill.functional.similarity import cosine_distance
from detdistill.structures import IGNORED, NEGATIVE, Assignment, Batch, Dense, Features, Losses, Origin, Prediction, Tower
from detdistill.values import Count, Index, Weight

MODEL_CLASS = MimicDet
TINY = "resnet10t,channels=8-16-32-64,stem=8,neck=32,mlp=16,rois=64"
BOX_WEIGHTS = (1 / DELTA_SCALES[0], 1 / DELTA_SCALES[1], 1 / DELTA_SCALES[2], 1 / DELTA_SCALES[3])
"""Of the deltas of refinement and boxes."""


@dataclass(frozen=True, kw_only=True)
class MimicDetOptions(DenseOptions):
    """Options of MimicDet."""

    convs: Index = 0
    mlp: Count = 1024
    """Width of the last hidden layers of both heads, which are compared."""
    refined: Count = 1000
    """Number of refined anchors of an image that are kept, by objectness."""
    rois: Count = 512
    """Number of refined anchors of an image sampled to train the region head, and to be compared."""
    mimic: Weight = 1.0
    """Weight of the mimic loss; 0: the region head is trained beside the one-stage head, but does not teach it."""


OPTIONS = MimicDetOptions


def build(backbone: str, classes: Sequence[str], options: MimicDetOptions) -> MimicDetDetector:
    """Build a MimicDet with random weights on a timm backbone. Defaults: levels 3-7, heads of 1024 channels.

    By default, detections have a score of at least 0.05; each level gives 1000 candidates; an image has at most 100 detections.

    Raises:
        ModelError: the options do not fit the backbone or the head.
    """
    heads = {"width": options.mlp, "refined": options.refined, "training_only": {"rois": options.rois, "mimic": options.mimic}}
    model, description = one_stage_model("models.mimicdet.MimicDet", backbone, classes, options, "conv", below=True, **heads)
    return wrap_model(model, classes, options.name or f"mimicdet:{backbone}", description=description)


def wrap_model(
    model: Any,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> MimicDetDetector:
    """Wrap a built ``models.mimicdet.MimicDet``; ``columns`` and ``description`` as in ``TorchvisionDetector``."""
    return MimicDetDetector(model, classes, name, family="dense", softmax=True, columns=columns, description=description)


# ------------------------------------------------------------------------------------------- passed on in training


@dataclass(frozen=True)
class FinerFeatures(Features):
    """The pyramid, and in training one level below it, which only the region head reads."""

    finer: Tensor | None = None
    """[B, C, H, W] of half the first stride."""


@dataclass(frozen=True)
class TowerOnFeatures(Tower):
    """A tower that knows the pyramid it began at, for the region head."""

    features: Features | None = None


@dataclass(frozen=True)
class TrainedOutputs(OwnOutputs):
    """Raw outputs with what the region head and the mimic loss need."""

    features: Features | None = None
    class_hidden: tuple[Tensor, ...] = ()
    """[B, D, H_l, W_l] of each level."""
    box_hidden: tuple[Tensor, ...] = ()
    """[B, D, H_l, W_l] of each level."""
    seed: int = field(default=0)
    """Of the sample of regions, so that equal calls of ``loss`` give equal values."""


class FinerLevel(nn.Module):
    """One more level below a feature pyramid, in its way: a 1x1 convolution, the sum with the level above, a 3x3 convolution."""

    def __init__(self, below: int, channels: int) -> None:
        """Take the channels of the backbone's map and of the pyramid."""
        super().__init__()
        self.lateral = nn.Conv2d(below, channels, 1)
        self.output = nn.Conv2d(channels, channels, 3, padding=1)
        for layer in (self.lateral, self.output):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, fpn: Any, below: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Compute the level from the backbone's map ``below`` and those that enter the pyramid ``fpn``."""
        inner = fpn.inner_blocks[-1](maps[-1])
        for block, level in zip(list(fpn.inner_blocks)[-2::-1], maps[-2::-1], strict=True):
            side = block(level)
            inner = side + F.interpolate(inner, size=side.shape[-2:], mode="nearest")
        side = self.lateral(below)
        return self.output(side + F.interpolate(inner, size=side.shape[-2:], mode="nearest"))


# --------------------------------------------------------------------------------------------------- the detector


class MimicDetDetector(OwnDenseDetector):
    """Adapter of MimicDet. Softmax with the background last. ``priors_xyxy`` are the anchors, and ``deltas`` refer to them.

    The head's own regression refers to the refined anchors (``refined``), which differ between images and detectors.

    In training, ``features`` has one finer level for the region head (``FinerFeatures``), and ``loss`` trains the region head
    on refined anchors and compares its last hidden layers with those of the one-stage head at the cell that the anchor came
    from. ``training_only`` are both, so neither is exported. A prediction that was finished from a tower of other features, and
    one in eval mode, has the losses of refinement and one-stage head only.

    An assignment given to ``loss`` replaces that of the one-stage head; refinement and region head keep their own.
    """

    model: MimicDet

    positive_iou = 0.6
    """Least IoU of a positive refined anchor, in both heads."""
    positive_fraction = 0.25
    """Largest fraction of positives among the regions of the region head."""
    negatives_per_positive = 3
    """Hardest negatives of an image that train the one-stage head's classes, for each positive (at least one counts)."""
    center_share = 0.3
    """Side of the central area of a box, in which anchors are positive for the refinement, as a fraction of its side."""

    def __init__(self, model: Any, *arguments: Any, **options: Any) -> None:
        """Wrap a model; see ``TorchvisionDetector``."""
        super().__init__(model, *arguments, **options)
        channels = self.spec.channels[0]
        below = self.spec.backbone
        assert below is not None
        self.finer = FinerLevel(below.channels[0], channels) if model.backbone.below else None
        self.region_head: RegionHead | None = RegionHead(channels, len(self.spec.classes), model.width, branches=2)

    def parts(self) -> Parts:
        """Group the modules: the finer level belongs to the neck, the region head to the head."""
        found = super().parts()
        finer, regions = ((module,) if module is not None else () for module in (self.finer, self.region_head))
        return Parts(found.backbone, (*found.neck, *finer), (*found.head, *regions))

    def training_only(self) -> tuple[nn.Module, ...]:
        """Return the finer level and the region head."""
        return tuple(module for module in (self.finer, self.region_head) if module is not None)

    def copy_head(self, fresh: bool = False) -> MimicDetDetector:
        """Copy refinement and one-stage head, without the region head."""
        head = super().copy_head(fresh)
        head.finer = head.region_head = None
        return head

    @property
    def logit_outputs(self) -> Tensor:
        """[K+1] the class outputs, then the background."""
        background = self.class_outputs.new_tensor([self.model.head.classification_head.num_classes - 1])
        return torch.cat([self.class_outputs, background])

    def class_rows(self, name: str) -> Tensor | None:
        """Return the rows of the class outputs of both heads; see ``inherit``."""
        return self.class_outputs[:, None] if name.startswith("region_head.logits.") else super().class_rows(name)

    # ---------------------------------------------------------------------------------------------------------- forward

    def features(self, batch: Batch) -> Features:
        """Compute the levels of the feature pyramid, and in training the finer level."""
        return self.neck(self.backbone_features(batch), batch)

    def neck(self, features: Features, batch: Batch) -> Features:
        """Run the feature pyramid on the backbone's maps."""
        found = super().neck(features, batch)
        if self.finer is None or not self.training:
            return found
        backbone: Any = self.model.backbone
        used = list(pyramid_maps(backbone, features.maps).values())
        finer = self.finer(backbone.fpn, features.maps[backbone.below - 1], used)
        return FinerFeatures(found.maps, found.strides, found.padding, finer)

    def tower(self, features: Features, upto: int | None = None) -> Tower:
        """Compute the inner maps of both branches after ``upto`` blocks; without ``convs`` there is none."""
        found = super().tower(features, upto)
        if not self.training:
            return found
        return TowerOnFeatures(found.classification, found.regression, found.depth, found.strides, features)

    def placed(self, outputs: dict[str, Tensor], shapes: Sequence[tuple[int, int]], batch: Batch) -> Dense:
        """Build the prediction; its ``deltas`` lead from the anchors to the final boxes."""
        found = super().placed(outputs, shapes, batch)
        anchors = torch.stack(own_outputs(found, self).anchors)
        return replace(found, priors_xyxy=anchors, deltas=encode_boxes(found.boxes_xyxy, anchors, BOX_WEIGHTS))

    def refined(self, prediction: Dense) -> Tensor:
        """Return the refined anchors [B, P, 4] of a prediction, constant."""
        return self.references(own_outputs(prediction, self).outputs, prediction.priors_xyxy, prediction.levels)

    def finish(self, hidden: Tower, batch: Batch) -> Dense:
        """Run the remaining blocks, the refinement and the looks into the refined boxes."""
        class_maps, box_maps = self.last_maps(hidden)
        looked = self.model.head.look(class_maps, box_maps)
        dense = self.placed(self.model.head.predicted(looked), map_shapes(class_maps), batch)
        features = hidden.features if isinstance(hidden, TowerOnFeatures) else None
        if features is None or not self.training:
            return dense
        return replace(dense, own=_with_hidden(own_outputs(dense, self), features, looked))

    # ------------------------------------------------------------------------------------------------------------ losses

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign by IoU with the refined anchors: from 0.6 positive, else negative."""
        dense = cast(Dense, prediction)
        return self._matched(dense, batch, lambda boxes, _, targets: self._by_iou(boxes, targets), self.refined(dense))

    def first_assignment(self, prediction: Dense, batch: Batch) -> Assignment:
        """Assign the anchors for the refinement: on the level of a box's size, those in its central area."""
        unit = 4.0 * self.spec.strides[0]

        def rule(boxes: Tensor, levels: Tensor, targets: Tensor) -> Tensor:
            return refinement_assign((boxes[:, :2] + boxes[:, 2:]) / 2, levels, targets, unit, self.center_share)

        return self._matched(prediction, batch, rule, prediction.priors_xyxy)

    def _by_iou(self, boxes: Tensor, targets: Tensor) -> Tensor:
        return max_iou_assign(boxes, targets, self.positive_iou, self.positive_iou, low_quality=False)

    def _matched(self, prediction: Dense, batch: Batch, rule: Any, boxes: Tensor) -> Assignment:
        """Apply ``rule`` (boxes, levels, targets) to the valid predictions of each image; the others are ignored."""
        valid = self.valid(prediction, batch)
        matched = torch.full(valid.shape, IGNORED, device=valid.device)
        for image, target in enumerate(batch.targets):
            index = torch.nonzero(valid[image]).flatten()
            truth = target.boxes_xyxy[trainable(target)].to(boxes.dtype)
            matched[image, index] = whole_indices(rule(boxes[image, index], prediction.levels[index], truth), target)
        return Assignment(matched)

    def loss_values(self, prediction: Dense, batch: Batch, assignment: Assignment) -> dict[str, Tensor]:
        """Compute the terms of refinement and one-stage head, each [B, P].

        ``objectness`` (binary cross-entropy over all anchors) and ``refinement`` (L1 of the positives' deltas) are divided by
        the number of anchors in central areas, ``classification`` (cross-entropy) and ``bbox_regression`` (L1) by the number of
        positives of ``assignment``; each image counts at least one. Classes are learned from the positives and from the
        hardest negatives among the kept anchors, three for each positive.
        """
        own = own_outputs(prediction, self)
        first = self.supervision(self.first_assignment(prediction, batch), batch)
        second = self.supervision(assignment, batch)
        anchors = prediction.priors_xyxy
        first_count = number_of_positives(Assignment(torch.where(first.positive, 0, NEGATIVE)), anchors)
        count = number_of_positives(assignment, anchors) if assignment.normalizer is None else assignment.normalizer
        objectness = own.outputs["objectness"][..., 0]
        found = F.binary_cross_entropy_with_logits(objectness, first.positive.to(objectness.dtype), reduction="none")
        wanted = torch.full_like(assignment.matched, prediction.logits.shape[-1] - 1)
        wanted[second.positive] = second.outputs
        entropy = F.cross_entropy(prediction.logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
        used = second.positive | self._hard(
            entropy, assignment, self.model.kept(objectness[..., None], self.valid(prediction, batch))
        )

        def distance(deltas: Tensor, references: Tensor, boxes: Tensor) -> Tensor:
            return (deltas - encode_boxes(boxes, references, BOX_WEIGHTS)).abs().sum(dim=-1)

        one, two = first.positive, second.positive
        refinement = distance(own.outputs["refinement"][one], anchors[one], first.boxes_xyxy)
        regression = distance(own.outputs["bbox_regression"][two], self.refined(prediction)[two], second.boxes_xyxy)
        return {
            "objectness": found * first.weights / first_count,
            "refinement": first.spread(refinement) / first_count,
            "classification": entropy * second.weights * used / count,
            "bbox_regression": second.spread(regression) / count,
        }

    def _hard(self, entropy: Tensor, assignment: Assignment, kept: Tensor) -> Tensor:
        """[B, P] the negatives of the highest loss among the kept anchors, in each image a multiple of its positives."""
        negative = (assignment.matched == NEGATIVE) & kept
        rank = entropy.detach().masked_fill(~negative, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
        positives = (assignment.matched >= 0).sum(dim=1, keepdim=True).clamp(min=1)
        return negative & (rank < self.negatives_per_positive * positives)

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Compute the sums of ``loss_values``, and in training ``region_head`` and ``mimic`` (see ``region_terms``)."""
        dense = cast(Dense, prediction)
        losses = super().loss(dense, batch, assignment)
        own = own_outputs(dense, self)
        if self.region_head is None or not isinstance(own, TrainedOutputs):
            return losses
        with full_precision(batch.images.device):
            return Losses({**losses.terms, **self.region_terms(dense, own, batch)})

    def region_terms(self, prediction: Dense, own: TrainedOutputs, batch: Batch) -> dict[str, Tensor]:
        """Train the region head on sampled refined anchors, and compare it with the one-stage head.

        Returns:
            ``region_head``: its losses of classes and boxes. ``mimic``: for the anchors among its regions the mean of
            ``1 - cos`` between the last hidden layers of both heads, for classes plus for boxes, times the weight; the region
            head's are constant. Inserted ground truth has no cell and is not compared. Not there with weight 0.
        """
        assert self.region_head is not None
        assert own.features is not None
        settings = self.model.training_only
        generator = torch.Generator().manual_seed(own.seed)
        kept = self.model.kept(own.outputs["objectness"], self.valid(prediction, batch))
        ranked = own.outputs["objectness"][..., 0].masked_fill(~kept, -torch.inf)
        boxes = replace(prediction, boxes_xyxy=self.refined(prediction))
        found = propose(boxes, batch.sizes, scores=ranked, before=self.model.refined, nms=1.0, after=self.model.refined)
        regions = sample_regions(
            found.boxes_xyxy,
            found.origins,
            batch.targets,
            count=int(settings["rois"]),
            positive_fraction=self.positive_fraction,
            iou=self.positive_iou,
            generator=generator,
        )
        origin = Origin.cat(regions.origins)
        output = self.region_head.predict(*_pooled_from(own.features.float(), regions.boxes_xyxy, origin))
        terms = {"region_head": region_loss(output, regions, batch)}
        if settings["mimic"]:
            known = origin.level >= 0
            pairs = ((own.class_hidden, output.class_hidden), (own.box_hidden, output.box_hidden))
            mimic = [
                cosine_distance(features_at_origin(maps, origin).to(theirs.dtype), theirs[known].detach())
                for maps, theirs in pairs
            ]
            terms["mimic"] = settings["mimic"] * (mimic[0] + mimic[1])
        return terms


def _with_hidden(own: OwnOutputs, features: Features, looked: Looked) -> TrainedOutputs:
    """Add what the region head needs, and draw the seed of its sample."""
    seed = int(torch.randint(2**31, ()))
    return TrainedOutputs(
        own.outputs, own.anchors, own.counts, features, tuple(looked.class_hidden), tuple(looked.box_hidden), seed
    )


def _pooled_from(features: Features, boxes_xyxy: list[Tensor], origin: Origin) -> tuple[Features, list[Tensor], Tensor]:
    """The pyramid that the region head pools from, the boxes, and the level [R] of each of them: the finer one."""
    finer = features.finer if isinstance(features, FinerFeatures) else None
    if finer is not None:
        features = Features((finer, *features.maps), (features.strides[0] // 2, *features.strides))
        origin = replace(origin, level=torch.where(origin.level >= 0, origin.level + 1, origin.level))
    return features, boxes_xyxy, staggered_levels(torch.cat(boxes_xyxy), origin, len(features.maps))
