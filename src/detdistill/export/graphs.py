"""The network of each family as one function of tensors, from pixels to boxes and scores: what an exported file computes.

Inputs of every graph:

    images  [B, 3, H, W] float32 RGB in 0..1, zero-padded on the right and at the bottom, NOT normalised
    sizes   [B, 2] int64, valid height and width of each image inside the padding

The results equal those of the detector's own stages (``features``, ``predict``, ``detect``) on the same batch: the padding is
zero after normalisation, and cells and queries outside an image count as there.

Shape letters: B images, L levels, P predictions of an image, K classes, N queries, D detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from detdistill.detectors.contract import Detector
from detdistill.detectors.dense.shared.heads import DenseDetector, OwnDenseDetector
from detdistill.detectors.student_files.models.dense import places, valid_cells
from detdistill.detectors.torchvision.dense_outputs import layout
from detdistill.detectors.torchvision.detector import TorchvisionDetector
from detdistill.structures import Batch, Features, map_tensors

INPUTS = ("images", "sizes")
LEARNED_QUERIES = ("detr", "conditional_detr", "dab-detr", "deformable_detr")
"""transformers' ``model_type`` of detectors whose initial queries are learned, the same for all images; AdaMixer's are, too."""


class Graph(nn.Module):
    """A detector as a function of tensors, in eval mode."""

    outputs: tuple[str, ...]
    """Names of the results of ``forward``, in order."""

    def __init__(self, detector: Detector) -> None:
        """Use a detector's modules without a copy."""
        super().__init__()
        self.detector: Any = detector
        self.register_buffer("mean", torch.tensor(detector.spec.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(detector.spec.std)[:, None, None], persistent=False)
        self.eval()

    def normalized(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise; the padding is zero afterwards. Also return the mask [B, H, W] of valid pixels."""
        rows = torch.arange(images.shape[-2], device=images.device)
        columns = torch.arange(images.shape[-1], device=images.device)
        valid = (rows[None, :] < sizes[:, :1])[:, :, None] & (columns[None, :] < sizes[:, 1:])[:, None, :]
        return (images - self.mean) / self.std * valid[:, None].to(images.dtype), valid


class DenseGraph(Graph):
    """A dense detector with towers: FCOS, RetinaNet, ATSS, GFL, RepPoints.

    Results: ``boxes`` [B, P, 4] in pixels of ``images``, clipped to the valid part; ``scores`` [B, P, K], the score by which
    candidates are chosen, 0 in the padding of an own detector; ``quality`` [B, P], a factor on the scores after that choice, if
    the head has one that its own selection uses so; ``levels`` [P], the pyramid level of each prediction.
    """

    detector: DenseDetector

    def __init__(self, detector: DenseDetector) -> None:
        """Use a detector's modules without a copy."""
        super().__init__(detector)
        self.own = isinstance(detector, OwnDenseDetector)
        has_quality = self.own and getattr(detector.model.head.regression_head, "bbox_ctrness", None) is not None
        self.outputs = ("boxes", "scores", *(("quality",) if has_quality else ()), "levels")

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Run the network, decode and clip."""
        detector, model = self.detector, self.detector.model
        normal, _ = self.normalized(images, sizes)
        maps = list(model.backbone(normal).values())
        classification, regression = detector.towers
        raw = detector.outputs([classification(level) for level in maps], [regression(level) for level in maps])
        shapes = [(level.shape[-2], level.shape[-1]) for level in maps]
        anchors = self.anchors(images, shapes)
        levels, cells, _ = layout(shapes, detector.spec.anchors, images.device)
        priors = anchors[None].expand(images.shape[0], -1, -1)
        boxes = clipped(detector.decode(raw["bbox_regression"], priors, levels), sizes)
        if not self.own:
            return boxes, detector.final_scores(raw)[..., detector.class_outputs], levels
        valid = valid_cells(levels, cells, model.strides, sizes)
        scores = raw["cls_logits"].sigmoid()[..., detector.class_outputs] * valid[..., None].to(images.dtype)
        quality = (raw["bbox_ctrness"][..., 0].sigmoid(),) if "quality" in self.outputs else ()
        return boxes, scores, *quality, levels

    def anchors(self, images: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Anchors or points [P, 4] of every image."""
        model = self.detector.model
        if self.own:
            return cast(Tensor, model.anchors(shapes, images))
        generator = model.anchor_generator
        generator.set_cell_anchors(images.dtype, images.device)
        height, width = images.shape[-2:]
        strides = [(height // rows, width // columns) for rows, columns in shapes]  # as torchvision, also for one cell
        return torch.cat(generator.grid_anchors(shapes, strides))


def clipped(boxes_xyxy: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes [B, P, 4] to the valid part of each image; ``sizes`` [B, 2] are heights and widths."""
    limits = sizes[:, [1, 0, 1, 0]].to(boxes_xyxy.dtype)[:, None]
    return torch.minimum(boxes_xyxy.clamp(min=0), limits)


class QueryGraph(Graph):
    """A detector with queries: the DETR families and AdaMixer.

    Results: ``boxes`` [B, N, 4] in pixels of ``images``, clipped to the valid part, and ``scores`` [B, N, K], both of the last
    decoder layer.
    """

    outputs = ("boxes", "scores")

    def __init__(self, detector: Detector) -> None:
        """Use a detector's modules without a copy."""
        super().__init__(detector)
        config = getattr(detector, "config", None)
        self.learned = config is None or (config.model_type in LEARNED_QUERIES and not getattr(config, "two_stage", False))

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Run the detector's stages, always with padding masks."""
        detector = self.detector
        normal, valid = self.normalized(images, sizes)
        batch = Batch(images, sizes, (), (), ())
        features = self.features(normal, valid, batch)
        if self.learned:
            # Made for one image and spread by a sum: an expanded constant would keep the batch size of the tracing.
            zeros = images[:, :1, :1, 0] * 0
            first = detector.seed(replace(features, maps=tuple(level[:1] for level in features.maps)), Batch(images[:1], sizes[:1], (), (), ()))
            prediction = detector.decode(features, map_tensors(first, lambda part: part + zeros), batch)
        else:
            prediction = detector.predict(features, batch)
        logits, boxes = prediction.logits[-1], prediction.boxes_cxcywh01[-1]
        scores = logits.softmax(dim=-1)[..., :-1] if detector.spec.softmax else logits.sigmoid()
        half = boxes[..., 2:] / 2
        corners = torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], dim=-1)
        return clipped(corners * sizes[:, None, [1, 0, 1, 0]].to(corners.dtype), sizes), scores

    def features(self, normal: Tensor, valid: Tensor, batch: Batch) -> Features:
        """The encoder's maps; for AdaMixer, which has no masks, those of its channel mapper."""
        detector = self.detector
        if not isinstance(detector, TorchvisionDetector):
            maps = detector.backbone_maps(normal, valid.long())
            below = Features(tuple(level for level, _ in maps), detector.backbone_strides, tuple(~mask for _, mask in maps))
            return cast(Features, detector.neck(below, batch))
        model = cast(Any, detector.model)
        return Features(tuple(model.neck(model.backbone(normal)).values()), detector.spec.strides)
