"""Base class of Faster R-CNN, Mask R-CNN and their cascades: torchvision's region proposal network and RoI heads.

Shape letters: B images, L levels, A anchors of a cell, P anchors of an image, R regions of the batch, K classes.

In torchvision, class 0 is the background and the origin of a proposal is lost. Here the background is the last logit and
each box keeps its ``Origin``. Outputs without a class (COCO's unused numbers in pretrained models) count as background.
Random samples are drawn in torchvision's order (anchors of all images, then regions of all images). With the same seed,
``predict`` and ``loss`` therefore give the losses of ``model(images, targets)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import maskrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes
from torchvision.ops.poolers import initLevelMapper

from detdistill.detectors.contract import DenseCoding, Parts, dense_positives, region_positives
from detdistill.detectors.student_files.models.cascade import ClassAgnosticPredictor
from detdistill.detectors.student_files.models.exact import AlignedRoIAlign
from detdistill.detectors.torchvision.backbones import image_statistics, pyramid_description
from detdistill.detectors.torchvision.dense_outputs import anchors_wh, layout
from detdistill.detectors.torchvision.detector import TorchvisionDetector
from detdistill.detectors.torchvision.images import image_sizes
from detdistill.detectors.torchvision.matching import match_anchors
from detdistill.detectors.torchvision.options import BackboneOptions, Levels, PyramidOptions, SelectionOptions
from detdistill.detectors.torchvision.targets import trainable
from detdistill.errors import DataError, ModelError
from detdistill.functional.counting import mean_over_ranks, share_over_ranks
from detdistill.functional.regions import pool_boxes
from detdistill.structures import (
    IGNORED,
    NEGATIVE,
    Assignment,
    Batch,
    Dense,
    Detections,
    Features,
    Losses,
    Movable,
    Origin,
    Positives,
    Prediction,
    Regions,
    Target,
)
from detdistill.values import Count

SMOOTH_L1_BETA = 1 / 9
"""Parameter beta of the smooth L1 loss of both stages, as in torchvision."""


@dataclass(frozen=True)
class SampledFor(Movable):
    """Ground truth for which ``Regions.first_assignment`` was sampled."""

    targets: tuple[Target, ...]


class TwoStageDetector(TorchvisionDetector):
    """A region proposal network and RoI heads on a feature pyramid.

    In training mode (of ``model.roi_heads``), ``predict`` adds the ground truth to the proposals and samples regions. In eval
    mode it uses all proposals and needs no targets.
    """

    unused: Tensor

    without_masks = "faster_rcnn"
    """Name of the same detector without mask branch, for error messages."""

    def __init__(
        self,
        model: Any,
        classes: Sequence[str],
        name: str,
        columns: Sequence[int] | None = None,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap a ``GeneralizedRCNN``.

        Args:
            model: torchvision's model, with the box head and predictor of Fast R-CNN.
            classes: names of the K classes, in label order.
            name: model string.
            columns: index of the output of each class; None: 1 .. K.
            description: description of the model, for its export; see ``TorchvisionDetector``.

        Raises:
            ModelError: the backbone has no feature pyramid, the box predictor is not torchvision's, or the model has keypoints.
        """
        if not hasattr(getattr(model, "backbone", None), "fpn"):
            raise ModelError(f"{name}: a two-stage detector needs a backbone with torchvision's feature pyramid as .fpn")
        predictor = model.roi_heads.box_predictor
        if not isinstance(predictor, FastRCNNPredictor):
            raise ModelError(f"{name}: the box predictor is a {type(predictor).__name__}; only FastRCNNPredictor is supported")
        if model.roi_heads.has_keypoint():
            raise ModelError(f"{name}: keypoints are not supported; use a Faster R-CNN or Mask R-CNN")
        super().__init__(
            model,
            classes,
            name,
            family="regions",
            softmax=True,
            columns=columns,
            description=description,
            needs_masks=model.roi_heads.has_mask(),
        )
        unused = set(range(predictor.cls_score.out_features)) - {0} - set(self.columns.tolist())
        self.register_buffer("unused", torch.tensor(sorted(unused), dtype=torch.int64), persistent=False)
        # torchvision gives numbers to the levels with a backbone map; RoIAlign never reads the levels above
        self._pooled_levels = [
            level
            for level in range(len(model.backbone.fpn.inner_blocks))
            if str(level) in model.roi_heads.box_roi_pool.featmap_names
        ]

    def anchors_per_cell(self) -> tuple[int, ...]:
        """Return the anchors per cell of the first stage."""
        return tuple(self.model.rpn.anchor_generator.num_anchors_per_location())

    def dense_coding(self) -> DenseCoding:
        """Return the form of the first stage's predictions."""
        return DenseCoding(anchors_wh=anchors_wh(self.model.rpn.anchor_generator))

    def parts(self) -> Parts:
        """Group the modules: the backbone's body, its feature pyramid, both stages."""
        backbone = self.model.backbone
        return Parts((backbone.body,), (backbone.fpn,), (self.model.rpn, self.model.roi_heads))

    def copy_head(self, fresh: bool = False) -> TwoStageDetector:
        """Copy both stages into a detector with parameters of its own, without backbone; ``fresh``: newly initialised."""
        head = cast(TwoStageDetector, self.without_backbone())
        if fresh:
            _initialize(head.model)
        return head

    def copy_region_head(self) -> TwoStageDetector:
        """Copy the second stage (of a cascade: all stages of regions) without first stage, mask branches and backbone."""
        head = self.copy_head()
        head.model.rpn = nn.Identity()
        for stage in head._stages():
            stage.mask_roi_pool = stage.mask_head = stage.mask_predictor = None
        head.spec = replace(head.spec, needs_masks=False)
        return head

    def _stages(self) -> Sequence[Any]:
        """The ``RoIHeads`` of each stage of regions."""
        return (self.model.roi_heads,)

    def class_rows(self, name: str) -> Tensor | None:
        """Return each class's rows: one in the class and the mask outputs, four in the box outputs; see ``inherit``."""
        outputs = (".box_predictor.cls_score.", ".mask_predictor.mask_fcn_logits.")
        if name.startswith("model.roi_heads.") and any(output in name for output in outputs):
            return self.columns[:, None]
        if name.startswith("model.roi_heads.box_predictor.bbox_pred."):
            return 4 * self.columns[:, None] + torch.arange(4, device=self.columns.device)
        return None

    # ------------------------------------------------------------------------------------------------ forward

    def predict(self, features: Features, batch: Batch) -> Regions:
        """Run both stages.

        Raises:
            DataError: training mode, and the batch has no targets.
        """
        features = features.float()
        first, sampled = self._first_stage(features, batch), None
        boxes, origins = self._propose(first, batch)
        training = bool(self.model.roi_heads.training)
        if training:
            if len(batch.targets) != len(batch):
                raise DataError(
                    f"a two-stage detector samples its regions by ground truth in training, but the batch has "
                    f"{len(batch.targets)} targets for {len(batch)} images; give targets, or call eval() first"
                )
            first, sampled = replace(first, own=SampledFor(batch.targets)), self._sample_anchors(first, batch)
        regions = self._after_first_stage(features, boxes, origins, batch, sample=training)
        return replace(regions, first=first, first_assignment=sampled)

    def regions(self, features: Features, boxes_xyxy: Sequence[Tensor], batch: Batch) -> Regions:
        """Run the second stage on given boxes."""
        features = features.float()
        boxes = [given.detach().to(features.maps[0]) for given in boxes_xyxy]
        origin = Origin.given([len(given) for given in boxes], features.maps[0].device)
        origins = [origin[origin.image == image] for image in range(len(boxes))]
        return self._after_first_stage(features, boxes, origins, batch, sample=False)

    def proposals(self, features: Features, batch: Batch) -> tuple[list[Tensor], list[Origin]]:
        """Compute the first stage's boxes, best first, and their origins; their number depends on the mode (train or eval)."""
        return self._propose(self._first_stage(features.float(), batch), batch)

    def _first_stage(self, features: Features, batch: Batch) -> Dense:
        maps, count = list(features.maps), len(batch)
        objectness, deltas = self.model.rpn.head(maps)
        shapes = [(level.shape[-2], level.shape[-1]) for level in objectness]
        flat_logits, flat_deltas = concat_box_prediction_layers([_full(x) for x in objectness], [_full(x) for x in deltas])
        anchors = self.model.rpn.anchor_generator(self.image_shapes(batch), maps)
        boxes = self.model.rpn.box_coder.decode(flat_deltas, anchors)
        levels, cells, of_cell = layout(shapes, [level.shape[1] for level in objectness], maps[0].device)
        return Dense(
            logits=flat_logits.view(count, -1, 1),
            deltas=flat_deltas.view(count, -1, 4),
            boxes_xyxy=boxes.view(count, -1, 4),
            priors_xyxy=torch.stack(anchors),
            levels=levels,
            cells=cells,
            anchors=of_cell,
        )

    def _propose(self, first: Dense, batch: Batch) -> tuple[list[Tensor], list[Origin]]:
        """Compute ``RegionProposalNetwork.filter_proposals`` and keep the index of each proposal."""
        objectness, decoded = first.logits.detach().squeeze(-1), first.boxes_xyxy.detach()
        per_level = torch.bincount(first.levels).tolist()
        # top n of each level, before suppression
        ranked = self.model.rpn._get_top_n_idx(objectness, per_level)
        kept_boxes, origins = [], []
        for image, (index, size) in enumerate(zip(ranked, image_sizes(batch), strict=True)):
            boxes = clip_boxes_to_image(decoded[image, index], size)
            scores = torch.sigmoid(objectness[image, index])
            keep = remove_small_boxes(boxes, self.model.rpn.min_size)
            keep = keep[scores[keep] >= self.model.rpn.score_thresh]
            boxes, scores, index = boxes[keep], scores[keep], index[keep]
            keep = batched_nms(boxes, scores, first.levels[index], self.model.rpn.nms_thresh)[: self.model.rpn.post_nms_top_n()]
            kept_boxes.append(boxes[keep])
            index = index[keep]
            nowhere = torch.full_like(index, -1)
            origins.append(
                Origin(torch.full_like(index, image), first.levels[index], first.cells[index], first.anchors[index], nowhere)
            )
        return kept_boxes, origins

    def _after_first_stage(
        self, features: Features, boxes: Sequence[Tensor], origins: Sequence[Origin], batch: Batch, sample: bool
    ) -> Regions:
        """Run the second stage on proposals; ``sample``: first sample regions from proposals and ground truth, as in training."""
        heads = self.model.roi_heads
        if sample:
            boxes, origins = self._sample_regions(boxes, origins, batch, heads)
        return self._region_stage(features, boxes, origins, batch, heads)

    def _region_stage(
        self, features: Features, boxes: Sequence[Tensor], origins: Sequence[Origin], batch: Batch, heads: Any
    ) -> Regions:
        """Run ``heads`` (the ``RoIHeads`` of one stage) on boxes."""
        flat = torch.cat(list(boxes))
        pooled = self._pool(heads.box_roi_pool, features, boxes, batch)
        hidden = hidden_layers(heads.box_head, pooled)
        logits, deltas = (_full(output) for output in heads.box_predictor(hidden[-1]))
        deltas = deltas.unflatten(1, (-1, 4))
        if deltas.shape[1] > 1:  # not class-agnostic
            deltas = deltas[:, self.columns]
        refined = heads.box_coder.decode_single(deltas.flatten(1), flat).reshape(deltas.shape)
        return Regions(
            boxes_xyxy=flat,
            origin=Origin.cat(origins),
            logits=self._background_last(logits),
            deltas=deltas,
            refined_xyxy=refined,
            pooled=pooled,
            hidden=hidden,
            own=features if heads.has_mask() else None,
        )

    def _background_last(self, logits: Tensor) -> Tensor:
        """Convert torchvision's logits [R, C] to [R, K+1]. Unused outputs join the background: class probabilities stay."""
        background = logits[:, :1]
        if len(self.unused) > 0:
            background = torch.cat([background, logits[:, self.unused]], dim=1).logsumexp(dim=1, keepdim=True)
        return torch.cat([logits[:, self.columns], background], dim=1)

    def _pool(self, pool: MultiScaleRoIAlign, features: Features, boxes: Sequence[Tensor], batch: Batch) -> Tensor:
        """Pool [R, C, S, S]. The scales are set from the pyramid's strides; torchvision estimates them from the first batch.

        Training on a CPU pools by ``pool_boxes``: the values are the same, and its backward pass is several times as fast.
        """
        levels = [level for level in self._pooled_levels if level < len(features.maps)]
        strides = [features.strides[level] for level in levels]
        pool.scales = [1 / stride for stride in strides]
        pool.map_levels = initLevelMapper(
            strides[0].bit_length() - 1,
            strides[-1].bit_length() - 1,
            canonical_scale=pool.canonical_scale,
            canonical_level=pool.canonical_level,
        )
        maps = tuple(features.maps[level] for level in levels)
        if type(pool) in (MultiScaleRoIAlign, AlignedRoIAlign) and maps[0].device.type == "cpu" and maps[0].requires_grad:
            aligned, ratio = type(pool) is AlignedRoIAlign, int(pool.sampling_ratio)
            chosen = pool.map_levels(list(boxes)) if len(maps) > 1 else torch.zeros(sum(map(len, boxes)), dtype=torch.int64)
            of_level = Features(maps, tuple(strides))
            pooled = pool_boxes(of_level, boxes, int(pool.output_size[0]), chosen, sampling_ratio=ratio, aligned=aligned)
            return pooled.to(maps[0].dtype)
        return cast(
            Tensor, pool({str(level): one for level, one in zip(levels, maps, strict=True)}, list(boxes), image_sizes(batch))
        )

    # ----------------------------------------------------------------------------------------------- training

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign by IoU with the regions' boxes, by torchvision's matcher and threshold (0.5). Crowd boxes match nothing.

        For a prediction of the first stage: assign all anchors (without sampling) by the first stage's matcher.
        """
        if isinstance(prediction, Dense):
            return self._assign_anchors(prediction, batch)
        return self._assign_regions(cast(Regions, prediction), batch, self.model.roi_heads)

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Compute torchvision's loss terms; those of the first stage only if the prediction contains the first stage.

        A given ``assignment`` applies to the regions: its weights multiply the terms of each region, ignored regions do not
        count, and its normaliser replaces the number of regions. The first stage uses the anchors sampled by ``predict`` if
        the batch still has the same targets, else it samples again.

        For a prediction of the first stage: compute its two terms over the anchors that ``assignment`` does not ignore,
        with its weights, divided by its normaliser or the number of anchors. Without an assignment, anchors are sampled.

        Raises:
            DataError: the model has a mask branch, and a target has no masks.
            ModelError: the model has a mask branch, and the prediction was split or read from a cache.
        """
        if isinstance(prediction, Dense):
            return Losses(self._first_stage_losses(prediction, batch, assignment))
        prediction = cast(Regions, prediction)
        terms = self._losses_of_first(prediction, batch)
        assignment = assignment or self.assign(prediction, batch)
        return Losses(terms | self._region_losses(prediction, batch, assignment, self.model.roi_heads))

    def _assign_regions(self, regions: Regions, batch: Batch, heads: Any) -> Assignment:
        matched = torch.full_like(regions.origin.image, NEGATIVE)
        for image, target in enumerate(batch.targets):
            mine = regions.origin.image == image
            matched[mine] = self._match(regions.boxes_xyxy[mine], target, heads)
        return Assignment(matched)

    def _match(self, boxes: Tensor, target: Target, heads: Any) -> Tensor:
        """Match each box: index [n] into ALL boxes of the target, -1 negative, -2 between the thresholds."""
        usable = trainable(target)
        if len(usable) == 0 or len(boxes) == 0:
            return torch.full((len(boxes),), NEGATIVE, device=boxes.device)
        matched = heads.proposal_matcher(box_iou(target.boxes_xyxy[usable].to(boxes.dtype), boxes))
        return torch.where(matched >= 0, usable[matched.clamp(min=0)], matched)

    def _sample_regions(
        self, boxes: Sequence[Tensor], origins: Sequence[Origin], batch: Batch, heads: Any
    ) -> tuple[list[Tensor], list[Origin]]:
        """Compute ``RoIHeads.select_training_samples`` with origins: add the ground truth to the proposals, then sample."""
        all_boxes, all_origins, labels = [], [], []
        for image, (proposals, origin, target) in enumerate(zip(boxes, origins, batch.targets, strict=True)):
            usable = trainable(target)
            nowhere = torch.full_like(usable, -1)
            inserted = Origin(torch.full_like(usable, image), nowhere, nowhere[:, None].expand(-1, 2), nowhere, usable)
            all_boxes.append(torch.cat([proposals, target.boxes_xyxy[usable].to(proposals.dtype)]))
            all_origins.append(Origin.cat([origin, inserted]))
            matched = self._match(all_boxes[-1], target, heads)
            # the sampler's codes: 1 positive, 0 negative, -1 left out
            labels.append((matched >= 0).long() - (matched == IGNORED).long())
        sampled = heads.subsample(labels)
        chosen = [given[index] for given, index in zip(all_boxes, sampled, strict=True)]
        return chosen, [origin[index] for origin, index in zip(all_origins, sampled, strict=True)]

    def _assign_anchors(self, first: Dense, batch: Batch) -> Assignment:
        """Compute ``RegionProposalNetwork.assign_targets_to_anchors`` as assignment [B, P]; between the thresholds: ignored."""
        matched = torch.full(first.logits.shape[:2], NEGATIVE, device=first.logits.device)
        for image, target in enumerate(batch.targets):
            usable = trainable(target)
            if len(usable):
                boxes = target.boxes_xyxy[usable].to(batch.images.dtype)
                found = match_anchors(self.model.rpn.proposal_matcher, boxes, first, image)
                matched[image] = torch.where(found >= 0, usable[found.clamp(min=0)], found)
        return Assignment(matched)

    def _sample_anchors(self, first: Dense, batch: Batch) -> Assignment:
        """Sample anchors as torchvision does; the assignment ignores all others."""
        matched = self._assign_anchors(first, batch).matched
        labels = (matched >= 0).to(first.logits.dtype) - (matched == IGNORED).to(first.logits.dtype)
        positive, negative = (torch.stack(masks) > 0 for masks in self.model.rpn.fg_bg_sampler(list(labels)))
        return Assignment(matched.masked_fill(~(positive | negative), IGNORED))

    def _losses_of_first(self, prediction: Regions, batch: Batch) -> dict[str, Tensor]:
        """Compute the first stage's losses over the anchors sampled by ``predict``; empty if there is no first stage."""
        if prediction.first is None:
            return {}
        drawn = prediction.first.own
        kept = isinstance(drawn, SampledFor) and _same_boxes(drawn.targets, batch.targets)
        return self._first_stage_losses(prediction.first, batch, prediction.first_assignment if kept else None)

    def _first_stage_losses(self, first: Dense, batch: Batch, assignment: Assignment | None) -> dict[str, Tensor]:
        """Compute ``RegionProposalNetwork.compute_loss`` over the anchors of an assignment; None: sample anchors.

        Both terms are divided by the number of these anchors (mean over processes).
        """
        if assignment is None:
            assignment = self._sample_anchors(first, batch)
        positives = dense_positives(first, assignment, batch)
        positive = (positives.image, positives.index)
        negative = torch.nonzero(assignment.matched == NEGATIVE, as_tuple=True)
        sampled = tuple(torch.cat(both) for both in zip(positive, negative, strict=True))
        objectness, wanted = first.logits[..., 0][sampled], torch.zeros_like(first.logits[..., 0][sampled])
        wanted[: len(positives)] = 1
        boxes = positives.targets_xyxy.to(batch.images.dtype)
        regression = self.model.rpn.box_coder.encode_single(boxes, first.priors_xyxy[positive])
        share = share_over_ranks(objectness.new_tensor(float(len(wanted)))) if assignment.normalizer is None else 1.0
        if assignment.weights is None and assignment.normalizer is None and len(wanted):
            box = F.smooth_l1_loss(first.deltas[positive], regression, beta=SMOOTH_L1_BETA, reduction="sum")
            entropy = F.binary_cross_entropy_with_logits(objectness, wanted)
            return {"loss_objectness": entropy * share, "loss_rpn_box_reg": box / len(wanted) * share}
        weights = torch.ones_like(first.logits[..., 0]) if assignment.weights is None else assignment.weights
        divisor = max(1, len(wanted)) / share if assignment.normalizer is None else assignment.normalizer
        distance = F.smooth_l1_loss(first.deltas[positive], regression, beta=SMOOTH_L1_BETA, reduction="none").sum(dim=1)
        entropy = F.binary_cross_entropy_with_logits(objectness, wanted, reduction="none")
        return {
            "loss_objectness": (entropy * weights[sampled]).sum() / divisor,
            "loss_rpn_box_reg": (distance * weights[positive]).sum() / divisor,
        }

    def _region_losses(
        self, prediction: Regions, batch: Batch, assignment: Assignment, heads: Any, beta: float = SMOOTH_L1_BETA
    ) -> dict[str, Tensor]:
        """Compute ``fastrcnn_loss`` under any assignment.

        Both terms are divided by the number of regions not ignored (mean over processes).
        """
        logits, deltas = prediction.logits, prediction.deltas
        positives = region_positives(prediction, assignment, batch)
        labels = torch.full_like(assignment.matched, logits.shape[1] - 1)  # background, last
        labels[positives.index] = positives.labels
        counts = (assignment.matched != IGNORED).to(logits.dtype)
        weights = counts if assignment.weights is None else counts * assignment.weights
        divisor = mean_over_ranks(counts.sum(), least=1) if assignment.normalizer is None else assignment.normalizer
        classifier = (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
        # an empty box (clipped to zero size between two stages) has no valid regression target
        sized = _sized(prediction.boxes_xyxy[positives.index]) & _sized(positives.targets_xyxy)
        index, labels = positives.index[sized], positives.labels[sized]
        encoded = heads.box_coder.encode_single(positives.targets_xyxy[sized].to(deltas.dtype), prediction.boxes_xyxy[index])
        column = labels if deltas.shape[1] > 1 else torch.zeros_like(labels)
        box = F.smooth_l1_loss(deltas[index, column], encoded, beta=beta, reduction="none").sum(dim=1)
        terms = {"loss_classifier": classifier / divisor, "loss_box_reg": (box * weights[index]).sum() / divisor}
        if heads.has_mask():
            terms["loss_mask"] = self._mask_loss(prediction, batch, assignment, heads)
        return terms

    def _mask_loss(self, prediction: Regions, batch: Batch, assignment: Assignment, heads: Any) -> Tensor:
        """Compute ``maskrcnn_loss``, the mean over the positive regions of all processes, without weights and normaliser."""
        features = prediction.own
        if not isinstance(features, Features):
            raise ModelError(
                "Mask R-CNN's loss needs an unchanged prediction, but it was split or read from a cache; call predict() again"
            )
        masks, labels, boxes, matched = [], [], [], []
        for image, (target, (height, width)) in enumerate(zip(batch.targets, image_sizes(batch), strict=True)):
            if target.masks is None and len(target) > 0:
                raise DataError(
                    f"Mask R-CNN needs instance masks, but image {batch.ids[image]} has none; "
                    f"use data with segmentations, or the detector {self.without_masks}, which trains on boxes"
                )
            given = batch.images.new_zeros(0, height, width) if target.masks is None else target.masks
            mine = torch.nonzero((prediction.origin.image == image) & (assignment.matched >= 0)).flatten()
            masks.append(given[:, :height, :width])
            labels.append(self.columns[target.labels])
            boxes.append(prediction.boxes_xyxy[mine])
            matched.append(assignment.matched[mine])
        pooled = self._pool(heads.mask_roi_pool, features, boxes, batch)
        logits = _full(heads.mask_predictor(heads.mask_head(pooled)))
        share = share_over_ranks(logits.new_tensor(float(sum(len(rows) for rows in matched))))
        return cast(Tensor, maskrcnn_loss(logits, boxes, masks, labels, matched)) * share

    def positives(self, prediction: Prediction, assignment: Assignment, batch: Batch) -> Positives:
        """Gather the regions that ``assignment`` matches to a ground-truth box, with the refined box of the box's class."""
        return region_positives(cast(Regions, prediction), assignment, batch)

    # ---------------------------------------------------------------------------------------------- inference

    @torch.no_grad()
    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """Select the detections like ``RoIHeads.postprocess_detections``, and keep the origin of each region."""
        prediction = cast(Regions, prediction)
        heads, classes = self.model.roi_heads, prediction.logits.shape[1] - 1
        # torchvision's order of logits, so that the softmax sums in the same order and is equal to the last bit
        logits = self._detection_logits(prediction)
        scores = F.softmax(torch.cat([logits[:, -1:], logits[:, :-1]], dim=1), dim=1)[:, 1:]
        found = []
        for image, size in enumerate(image_sizes(batch)):
            region = torch.nonzero(prediction.origin.image == image).flatten().repeat_interleave(classes)
            label = torch.arange(classes, device=region.device).repeat(len(region) // classes)
            score = scores[region, label]
            column = label if prediction.refined_xyxy.shape[1] > 1 else torch.zeros_like(label)
            box = clip_boxes_to_image(prediction.refined_xyxy[region, column], size)
            keep = torch.nonzero(score > heads.score_thresh).flatten()
            keep = keep[remove_small_boxes(box[keep], min_size=1e-2)]
            # + 1: NMS shifts the boxes by their label, and torchvision's labels start at 1
            best = batched_nms(box[keep], score[keep], label[keep] + 1, heads.nms_thresh)[: heads.detections_per_img]
            keep = keep[best]
            found.append(Detections(box[keep], score[keep], label[keep], prediction.origin[region[keep]]))
        return found

    def _detection_logits(self, prediction: Regions) -> Tensor:
        """Return the logits [R, K+1] for the scores of the detections."""
        return prediction.logits


def hidden_layers(head: nn.Module, pooled: Tensor) -> tuple[Tensor, ...]:
    """Compute the outputs [R, D] of each fully connected layer of a box head, after its ReLU; the last is the head's output."""
    if isinstance(head, TwoMLPHead):
        first = F.relu(head.fc6(pooled.flatten(1)))
        return first, F.relu(head.fc7(first))
    if not isinstance(head, nn.Sequential):
        return (cast(Tensor, head(pooled)),)
    found: list[Tensor] = []
    for layer in head:
        pooled = layer(pooled)
        if isinstance(layer, nn.Linear):
            found.append(pooled)
        elif found:  # the activation after the layer, possibly in place
            found[-1] = pooled
    return tuple(found) or (pooled,)


@dataclass(frozen=True, kw_only=True)
class TwoStageOptions(SelectionOptions, BackboneOptions, PyramidOptions):
    """Options of all two-stage detectors. At most one level is added, by subsampling (torchvision's ``pool``)."""

    levels: Levels = (2, 6)
    proposals: Count | None = None
    """Number of proposals of an image after non-maximum suppression; default: 2000 in training, else 1000."""
    rois: Count = 512
    """Number of regions of an image sampled to train the second stage."""
    mlp: Count = 1024
    """Width of the box head's two layers."""


def two_stage_description(call: str, backbone: str, classes: Sequence[str], options: TwoStageOptions) -> dict[str, Any]:
    """Compute the description of a torchvision two-stage model on a timm backbone.

    Anchors have aspect ratios 1/2, 1 and 2 and one size per level. In a pyramid from P2 the size is torchvision's, 8 x stride
    (32 pixels on P2). A pyramid from a higher level is for images of 128 to 256 pixels, with size 3 x stride (24 pixels on
    P3). On the embedded digits at 128 pixels, 83 % of the boxes then have an anchor with IoU >= 0.5; with 8 x stride, none.

    Args:
        call: name of the model class.
        backbone: name of a timm model.
        classes: names of the K classes, in label order.
        options: options of the model string.

    Raises:
        ModelError: the options do not fit the backbone or the detector.
    """
    pyramid = pyramid_description(backbone, options, options.levels, options.neck, top="pool")
    first, last = options.levels
    strides_wide = 8 if first <= 2 else 3
    numbers = len(pyramid["indices"])
    mean, std = image_statistics(backbone, options)
    package = "torchvision.models.detection"
    return {
        "call": call,
        "backbone": pyramid,
        "rpn_anchor_generator": {
            "call": f"{package}.anchor_utils.AnchorGenerator",
            "sizes": [[strides_wide * 2**level] for level in range(first, last + 1)],
            "aspect_ratios": [[0.5, 1.0, 2.0]] * (last - first + 1),
        },
        "box_roi_pool": {
            "call": "torchvision.ops.MultiScaleRoIAlign",
            "featmap_names": [str(level) for level in range(numbers)],
            "output_size": 7,
            "sampling_ratio": 2,
        },
        "box_head": {
            "call": f"{package}.faster_rcnn.TwoMLPHead",
            "in_channels": options.neck * 7**2,
            "representation_size": options.mlp,
        },
        "box_predictor": {
            "call": f"{package}.faster_rcnn.FastRCNNPredictor",
            "in_channels": options.mlp,
            "num_classes": len(classes) + 1,
        },
        "image_mean": mean,
        "image_std": std,
        "box_score_thresh": options.score,
        "box_detections_per_img": options.dets,
        "box_batch_size_per_image": options.rois,
        "rpn_post_nms_top_n_train": options.proposals or 2000,
        "rpn_post_nms_top_n_test": options.proposals or 1000,
    }


def _sized(boxes: Tensor) -> Tensor:
    """Return the mask [n] of boxes with a width and height above zero."""
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def _full(output: Tensor) -> Tensor:
    """Convert to at least single precision: under autocast, boxes decoded in half precision would be wrong by pixels."""
    return output if output.dtype == torch.float64 else output.float()


def _same_boxes(first: Sequence[Target], second: Sequence[Target]) -> bool:
    if len(first) != len(second):
        return False
    for mine, theirs in zip(first, second, strict=True):
        if mine is not theirs and not torch.equal(mine.boxes_xyxy.to(theirs.boxes_xyxy), theirs.boxes_xyxy):
            return False
    return True


def _initialize(model: Any) -> None:
    """Initialise all weights of both stages randomly, by torchvision's rules for these modules."""
    predictors = []
    for module in (*model.rpn.modules(), *model.roi_heads.modules()):
        if isinstance(module, nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ClassAgnosticPredictor):
            predictors.append(module)
    for module in model.rpn.head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
    for predictor in predictors:  # after their linear layers
        predictor.reset_parameters()
