"""AdaMixer: queries sample and mix the backbone's maps, without encoder and feature pyramid; this package's own model.

Gao et al., "AdaMixer: A Fast-Converging Query-Based Object Detector", CVPR 2022. The network is in ``models/adamixer.py``;
matching and losses are here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from detdistill.detectors.contract import Parts, Pyramid, query_positives
from detdistill.detectors.queries.shared.options import QueryOptions
from detdistill.detectors.student_files.load_student import build as build_model
from detdistill.detectors.student_files.models.adamixer import AdaMixer, to_corners
from detdistill.detectors.torchvision.backbones import image_statistics, load_pretrained, pyramid_description
from detdistill.detectors.torchvision.detector import Neck, TorchvisionDetector
from detdistill.detectors.torchvision.images import with_padding
from detdistill.detectors.torchvision.options import BackboneOptions, LevelOptions, Levels, SelectionOptions
from detdistill.detectors.torchvision.targets import trainable, whole_indices
from detdistill.errors import ModelError
from detdistill.functional.boxes import giou_loss
from detdistill.functional.counting import mean_over_ranks
from detdistill.functional.matching import focal_class_cost, giou_cost, hungarian, l1_cost
from detdistill.structures import (
    IGNORED,
    NEGATIVE,
    Assignment,
    Batch,
    Detections,
    Features,
    Losses,
    Origin,
    Positives,
    Prediction,
    Queries,
    QuerySeed,
)
from detdistill.values import Count, Fraction

MODEL_CLASS = AdaMixer
TINY = "resnet10t,channels=8-16-32-64,stem=8,dim=32,heads=4,ffn=64,queries=10,decoder=2,groups=2,points=4"
"""The smallest useful model, for ``probe``."""


@dataclass(frozen=True, kw_only=True)
class AdaMixerOptions(SelectionOptions, QueryOptions, BackboneOptions, LevelOptions):
    """Options of AdaMixer. The last level is at most the backbone's deepest."""

    levels: Levels = (2, 5)
    score: Fraction = 0.0
    queries: Count = 100
    groups: Count = 4
    """Groups of channels; each group is sampled and mixed on its own."""
    points: Count = 32
    """Points that a query samples for each group."""


OPTIONS = AdaMixerOptions

CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 2.0, 5.0, 2.0
"""Weights of both the matching costs and the losses (section 4.1)."""


def build(backbone: str, classes: Sequence[str], options: AdaMixerOptions) -> AdaMixerDetector:
    """A fresh AdaMixer on a timm backbone; maps of strides 4 to 32, 100 queries, 6 stages, 256 channels.

    Raises:
        ModelError: the options do not fit the backbone or each other.
    """
    if options.dim % 32:
        raise ModelError(f"adamixer: dim={options.dim} must be a multiple of 32; the neck has GroupNorm with 32 groups")
    for name, parts in (("heads", options.heads), ("groups", options.groups)):
        if options.dim % parts:
            raise ModelError(f"adamixer: dim={options.dim} cannot be cut into {name}={parts} equal parts")
    # neck: the width of levels above the backbone, which are refused below
    pyramid = pyramid_description(backbone, options, options.levels, neck=256)
    if pyramid["extra"]:
        raise ModelError(f"adamixer: levels must end at {pyramid['extra'][0] - 1} or below, the deepest level of {backbone}")
    pyramid = {key: value for key, value in pyramid.items() if key != "top"} | {"call": "TimmLevels"}
    mean, std = image_statistics(backbone, options)
    description = {
        "call": "models.adamixer.AdaMixer",
        "backbone": pyramid,
        "num_classes": len(classes),
        "channels": options.dim,
        "num_queries": options.queries,
        "num_stages": options.decoder,
        "heads": options.heads,
        "feedforward": options.ffn,
        "groups": options.groups,
        "points": options.points,
        "image_mean": mean,
        "image_std": std,
        "score_thresh": options.score,
        "detections_per_img": options.dets,
    }
    model = build_model(description)
    if options.pretrained:
        load_pretrained(model.backbone, pyramid, options.pretrained)
    return wrap_model(model, classes, options.name or f"adamixer:{backbone}", description=description)


def wrap_model(
    model: AdaMixer,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> AdaMixerDetector:
    """Wrap a model of ``models/adamixer.py`` as a detector; arguments as in ``TorchvisionDetector``."""
    channels = model.generator.content.shape[1]
    below = Pyramid(tuple(model.backbone.out_channels), model.strides)
    pyramids = (Pyramid((channels,) * len(model.strides), model.strides), below)
    return AdaMixerDetector(model, classes, name, family="queries", columns=columns, description=description, pyramids=pyramids)


class AdaMixerDetector(TorchvisionDetector):
    """AdaMixer as a detector with queries, copies and backbone features. Its features are the channel mapper's maps.

    A seed's ``position`` is not used: AdaMixer computes the positional embedding from the reference boxes. It has no
    attention maps over the features.
    """

    model: AdaMixer

    def parts(self) -> Parts:
        """Backbone: the backbone. Neck: the channel mapper. Head: the initial queries and the stages."""
        return Parts((self.model.backbone,), (self.model.neck,), (self.model.generator, self.model.stages))

    # ------------------------------------------------------------------------------------------------------- prediction

    def features(self, batch: Batch) -> Features:
        """The channel mapper's maps."""
        return self.neck(self.backbone_features(batch), batch)

    def backbone_features(self, batch: Batch) -> Features:
        """The backbone's maps."""
        maps = self.model.backbone(self.image_list(batch).tensors)
        return with_padding(tuple(maps.values()), self.spec.strides, batch)

    def neck(self, features: Features, batch: Batch) -> Features:
        """The channel mapper on the backbone's maps."""
        maps = self.model.neck({str(index): level for index, level in enumerate(features.maps)})
        return with_padding(tuple(maps.values()), self.spec.strides, batch)

    def before_encoder(self, features: Features, batch: Batch) -> Features:
        """The channel mapper's maps; there is no encoder."""
        return self.neck(features, batch)

    def predict(self, features: Features, batch: Batch, attention: bool = False) -> Queries:
        """Run all stages on the detector's own queries."""
        return self.decode(features, self.seed(features, batch), batch, attention)

    def seed(self, features: Features, batch: Batch) -> QuerySeed:
        """The learned contents; the reference box of every query is the whole image."""
        content, reference = self.model.generator(batch.images.shape[0], batch.images.dtype)
        return QuerySeed(content, None, reference)

    def decode(self, features: Features, seed: QuerySeed, batch: Batch, attention: bool = False) -> Queries:
        """Decode from any seed; its queries attend only to each other.

        Args:
            features: the channel mapper's maps.
            seed: content [B, N, D]. References [B, N, 4] are boxes; [B, N, 2] are centres of boxes as large as the image;
                None: the whole image.
            batch: gives the image sizes.
            attention: must be False.

        Raises:
            ModelError: ``attention`` is True, or the content has another width than the decoder.
        """
        if attention:
            raise ModelError(f"{self.spec.name}: AdaMixer samples points and has no attention maps; take a DETR for this method")
        width = self.model.generator.content.shape[1]
        if seed.content.shape[-1] != width:
            raise ModelError(
                f"{self.spec.name}: the queries given have {seed.content.shape[-1]} channels, the decoder {width}; project them"
            )
        dtype = batch.images.dtype
        content = seed.content.to(dtype)
        reference = content.new_tensor([0.5, 0.5, 1.0, 1.0]).expand(*content.shape[:2], 4)
        if seed.reference is not None:
            given = seed.reference.shape[-1]
            reference = torch.cat([seed.reference.to(dtype), reference[..., given:]], dim=-1)
        outputs = self.model.decode(features.maps, features.strides, content, reference, batch.sizes)
        logits, boxes, contents = (torch.stack(values) for values in zip(*outputs, strict=True))
        return Queries(logits[..., self.columns - 1], boxes, contents.to(dtype), seed)

    # ------------------------------------------------------------------------------------------------ training, results

    @torch.no_grad()
    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Hungarian matching in each stage. Costs: class (focal), L1 on xyxy as fractions of the image, and GIoU."""
        queries = cast(Queries, prediction)
        logits, boxes = queries.logits, to_corners(queries.boxes_cxcywh01)
        matched = torch.full(logits.shape[:3], NEGATIVE, device=logits.device)
        for image, (target, size) in enumerate(zip(batch.targets, _sizes_xyxy(batch, boxes.dtype), strict=True)):
            usable = trainable(target)
            wanted = target.boxes_xyxy[usable].to(boxes.dtype)
            cost = (
                CLASS_WEIGHT * focal_class_cost(logits[:, image], target.labels[usable])
                + L1_WEIGHT * l1_cost(boxes[:, image], wanted / size)
                + GIOU_WEIGHT * giou_cost(boxes[:, image] * size, wanted)
            )  # [S, N, G]
            matched[:, image] = whole_indices(hungarian(cost), target)
        return Assignment(matched)

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """``classification`` (focal), ``bbox_regression`` (L1) and ``giou``: sums over all stages and queries.

        Each stage is divided by the number of its positives (mean over processes), at least 1 (the paper's code divides by
        zero without boxes), or by a foreign assignment's normaliser.
        """
        queries = cast(Queries, prediction)
        assignment = self.assign(queries, batch) if assignment is None else assignment
        matched, positive = assignment.matched, assignment.matched >= 0
        positives = query_positives(queries, assignment, batch)
        where = (positives.layer, positives.image, positives.index)
        weights = torch.ones_like(queries.logits[..., 0]) if assignment.weights is None else assignment.weights
        if assignment.normalizer is None:
            normalizer = mean_over_ranks(positive.flatten(1).sum(dim=1), least=1).to(weights.dtype)  # [S]
        else:
            normalizer = assignment.normalizer.to(weights.dtype).expand(len(matched))
        share = weights / normalizer[:, None, None]

        wanted = torch.zeros_like(queries.logits)
        wanted[(*where, positives.labels)] = 1.0
        focal = sigmoid_focal_loss(queries.logits, wanted, alpha=0.25, gamma=2.0, reduction="none").sum(dim=-1)
        size = _sizes_xyxy(batch, queries.logits.dtype)[positives.image]
        targets = nn.utils.rnn.pad_sequence([target.boxes_xyxy.to(size.dtype) for target in batch.targets], batch_first=True)
        targets = targets[positives.image, positives.ground_truth]
        l1 = (to_corners(queries.boxes_cxcywh01[where]) - targets / size).abs().sum(dim=-1)
        giou = giou_loss(positives.boxes_xyxy, targets)
        return Losses(
            {
                "classification": CLASS_WEIGHT * (focal * share.masked_fill(matched == IGNORED, 0.0)).sum(),
                "bbox_regression": L1_WEIGHT * (l1 * share[where]).sum(),
                "giou": GIOU_WEIGHT * (giou * share[where]).sum(),
            }
        )

    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """The best pairs of query and class of the last stage, without NMS; ``origin.anchor`` is the query's index."""
        queries = cast(Queries, prediction)
        found = []
        results = self.model.select(queries.logits[-1], queries.boxes_cxcywh01[-1], batch.sizes)
        for image, (boxes, scores, labels, index) in enumerate(results):
            nowhere = torch.full_like(index, -1)
            origin = Origin(torch.full_like(index, image), nowhere, nowhere[:, None].repeat(1, 2), index, nowhere)
            found.append(Detections(boxes, scores, labels, origin))
        return found

    def positives(self, prediction: Prediction, assignment: Assignment, batch: Batch) -> Positives:
        """The positives of the assignment in all stages."""
        return query_positives(cast(Queries, prediction), assignment, batch)

    # ----------------------------------------------------------------------------------------------------------- copies

    def copy_neck(self, fresh: bool = False) -> Neck:
        """A copy of the channel mapper with its own parameters; ``fresh``: newly initialised."""
        mapper = copy.deepcopy(self.model.neck)
        if fresh:
            mapper.reset_parameters()
        return Neck(mapper, self.spec.strides).requires_grad_(True).train()

    def copy_head(self, fresh: bool = False) -> AdaMixerDetector:
        """A copy of the detector without backbone and channel mapper; ``fresh``: newly initialised."""
        nothing: dict[int, Any] = {id(part): nn.Identity() for part in (self.model.backbone, self.model.neck)}
        head = copy.deepcopy(self, nothing).requires_grad_(True).train()
        if fresh:
            head.model.reset_head()
        return head

    def class_rows(self, name: str) -> Tensor | None:
        """Rows of a class output by class; None for other parameters. See ``inherit``."""
        return self.columns[:, None] - 1 if ".classifier." in name else None


def _sizes_xyxy(batch: Batch, dtype: torch.dtype) -> Tensor:
    """[B, 4] valid width, height, width, height of each image."""
    return batch.sizes[:, [1, 0, 1, 0]].to(dtype)
