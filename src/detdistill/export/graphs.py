"""The network of each family as one function of tensors, from pixels to boxes and scores: what an exported file computes.

Inputs of every graph:

    images  [B, 3, H, W] float32 RGB in 0..1, zero-padded on the right and at the bottom, NOT normalised
    sizes   [B, 2] int64, valid height and width of each image inside the padding

The results equal those of the detector's own stages (``features``, ``predict``, ``detect``) on the same batch: the padding is
zero after normalisation, and cells and queries outside an image count as there.

Shape letters: B images, L levels, P predictions of an image, K classes, N queries, D detections.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import boxes as boxes_of_torchvision
from torchvision.ops import nms

from detdistill.detectors.contract import Detector
from detdistill.detectors.dense.shared.heads import DenseDetector, OwnDenseDetector
from detdistill.detectors.single_shot.shared.detector import SingleShotDetector
from detdistill.detectors.student_files.models import cascade
from detdistill.detectors.student_files.models.dense import valid_cells
from detdistill.detectors.torchvision.dense_outputs import layout
from detdistill.detectors.torchvision.detector import TorchvisionDetector
from detdistill.detectors.two_stage.shared.detector import TwoStageDetector
from detdistill.detectors.yolo.shared import detector as yolo
from detdistill.detectors.yolo.shared.common import GREY
from detdistill.detectors.yolo.shared.libreyolo_detector import LibreNetwork
from detdistill.errors import ModelError
from detdistill.export.selection import Rule, rule_of
from detdistill.structures import Batch, Dense, Features, map_tensors

INPUTS = ("images", "sizes")
LEARNED_QUERIES = ("detr", "conditional_detr", "dab-detr", "deformable_detr")
"""transformers' ``model_type`` of detectors whose initial queries are learned, the same for all images; AdaMixer's are, too."""


class Graph(nn.Module):
    """A detector as a function of tensors, in eval mode."""

    outputs: tuple[str, ...]
    """Names of the results of ``forward``, in order."""
    free: tuple[str, ...] = ("batch", "size")
    """What may differ from the images that the graph is traced with: the number of images, their height and width."""

    mean: Tensor
    std: Tensor

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
        priors = detector.references(raw, anchors[None].expand(images.shape[0], -1, -1), levels)
        boxes = clipped(detector.decode(raw["bbox_regression"], priors, levels), sizes)
        if not self.own:
            return boxes, detector.final_scores(raw)[..., detector.class_outputs], levels
        valid = valid_cells(levels, cells, model.strides, sizes)
        scores = model.scores(raw, valid)[..., detector.class_outputs]
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


class SingleShotGraph(Graph):
    """SSD and SSDLite. Results: ``boxes`` [B, P, 4] in pixels, clipped, and ``scores`` [B, P, K]. The size is fixed."""

    outputs = ("boxes", "scores")
    free = ("batch",)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Run the network and decode."""
        detector, model = self.detector, self.detector.model
        normal, _ = self.normalized(images, sizes)
        maps = list(model.backbone(normal).values())
        found = model.head(maps)
        height, width = (int(side) for side in images.shape[-2:])
        one = ImageList(images[:1], [(height, width)])
        priors = model.anchor_generator(one, maps)[0][None].expand(images.shape[0], -1, -1)
        boxes = model.box_coder.decode_single(found["bbox_regression"].flatten(0, 1), priors.flatten(0, 1))
        scores = found["cls_logits"].softmax(dim=-1)[..., detector.columns]
        return clipped(boxes.reshape(images.shape[0], -1, 4), sizes), scores


class YOLOGraph(Graph):
    """A network of ultralytics. Results: ``boxes`` [B, P, 4] in pixels and ``scores`` [B, P, K] of all cells.

    Boxes are not clipped, because the package suppresses them before. With the option ``nms=false`` the results are those of the
    one-to-one branch.
    """

    outputs = ("boxes", "scores")
    detector: yolo.Network

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Run the network and decode."""
        detector = self.detector
        _, valid = self.normalized(images, sizes)
        maps = list(detector.pyramid(detector.backbone(torch.where(valid[:, None], images, GREY))))
        found = detector.head.forward_head(maps, **(detector.head.one2many if detector.options.nms else detector.head.one2one))
        shapes = [(level.shape[-2], level.shape[-1]) for level in maps]
        levels, cells, _ = layout(shapes, detector.spec.anchors, images.device)
        return detector.decoded(found["boxes"], levels, cells), found["scores"].sigmoid().transpose(1, 2)[..., detector.columns]


class LibreYOLOGraph(Graph):
    """A network of libreyolo. Results: ``boxes`` [B, P, 4] in pixels, clipped, and ``scores`` [B, P, K] of all cells.

    Where the package takes the best class of each cell only (YOLOX), the scores of the others are 0.
    """

    outputs = ("boxes", "scores")
    detector: LibreNetwork

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Run the network and decode."""
        detector = self.detector
        _, valid = self.normalized(images, sizes)
        maps = detector.pyramid(detector.backbone(detector.network_input(torch.where(valid[:, None], images, GREY))))
        prediction = detector.predict(Features(maps, detector.spec.strides), Batch(images, sizes, (), (), ()))
        boxes, scores = detector.boxes_and_scores(cast(Dense, prediction))
        if detector.single_label:
            labels = torch.arange(scores.shape[-1], device=scores.device)
            scores = scores * (labels == scores.argmax(dim=-1, keepdim=True)).to(scores.dtype)
        return clipped(boxes, sizes), scores


class TwoStageGraph(Graph):
    """A two-stage detector, from pixels to final detections of one image: ``boxes`` [D, 4], ``scores`` [D], ``labels`` [D].

    The size is fixed, and one image is taken at a time. Masks are not computed.
    """

    outputs = ("boxes", "scores", "labels")
    free = ()
    labels: Tensor
    """Label of each of the model's outputs; -1: no class."""

    def __init__(self, detector: Detector) -> None:
        """Use a detector's modules without a copy."""
        super().__init__(detector)
        columns = self.detector.columns
        labels = torch.full((int(columns.max()) + 1,), -1, dtype=torch.int64)
        labels[columns.cpu()] = torch.arange(len(columns))
        self.register_buffer("labels", labels, persistent=False)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Run both stages and the selection of torchvision's model."""
        model = self.detector.model
        normal, _ = self.normalized(images, sizes)
        whole = [(int(images.shape[-2]), int(images.shape[-1]))]
        maps = model.backbone(normal)
        heads = model.roi_heads
        masks, heads.mask_roi_pool = heads.mask_roi_pool, None  # no masks
        try:
            with clipping_to(sizes):
                proposals, _ = model.rpn(ImageList(normal, whole), maps)
                found = heads(maps, proposals, whole)[0][0]
        finally:
            heads.mask_roi_pool = masks
        labels = self.labels[found["labels"]]
        keep = torch.nonzero(labels >= 0)[:, 0]
        return found["boxes"][keep], found["scores"][keep], labels[keep]


@contextmanager
def clipping_to(sizes: Tensor) -> Iterator[None]:
    """Inside, torchvision clips boxes to the given size [1, 2] of the image: a tensor, where its functions take numbers only.

    Numbers would be written into the file as constants, and proposals would reach into the padding.
    """

    def clip(boxes: Tensor, size: object) -> Tensor:
        return clipped(boxes[None], sizes)[0]

    before = boxes_of_torchvision.clip_boxes_to_image
    boxes_of_torchvision.clip_boxes_to_image = cascade.clip_boxes_to_image = clip
    try:
        yield
    finally:
        boxes_of_torchvision.clip_boxes_to_image = cascade.clip_boxes_to_image = before


class SuppressedGraph(Graph):
    """A dense graph with the choice of candidates and NMS inside, for one image.

    Results: ``boxes`` [D, 4], ``scores`` [D], ``labels`` [D], best first.
    """

    outputs = ("boxes", "scores", "labels")
    free = ("size",)

    def __init__(self, inner: DenseGraph, rule: Rule) -> None:
        """Choose from the results of ``inner`` by the rule of its detector."""
        super().__init__(inner.detector)
        self.inner, self.rule = inner, rule

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Run the network, take each level's best pairs of prediction and class, and suppress."""
        found = dict(zip(self.inner.outputs, self.inner(images, sizes), strict=True))
        boxes, scores = found["boxes"][0], found["scores"][0]
        classes = scores.shape[1]
        values, pairs = [], []
        for level in range(len(self.detector.spec.strides)):
            index = torch.nonzero((found["levels"] == level)[:, None] & (scores > self.rule.score))
            chosen = index[:, 0] * classes + index[:, 1]
            # One pair of score 0 more, so that a level is never empty: TopK of nothing fails in some runtimes.
            value = torch.cat([scores.flatten()[chosen], scores.new_zeros(1)])
            best = value.sort(descending=True).indices[: self.rule.topk]
            values.append(value[best])
            pairs.append(torch.cat([chosen, chosen.new_zeros(1)])[best])
        value, pair = torch.cat(values), torch.cat(pairs)
        row, label = torch.div(pair, classes, rounding_mode="floor"), pair % classes
        mine = boxes[row]
        usable = value > self.rule.score
        if self.rule.drop_empty:
            usable = usable & (mine[:, 2:] > mine[:, :2]).all(dim=1)
        if "quality" in found:
            value = value * found["quality"][0][row]
        keep = torch.nonzero(usable)[:, 0]
        mine, value, label = mine[keep], value[keep], label[keep]
        apart = label[:, None].to(mine.dtype) * (boxes.max() + 1)  # boxes of different classes do not touch
        best = nms(mine + apart, value, self.rule.iou)[: self.rule.detections]
        return mine[best], value[best], label[best]


def graph_of(detector: Detector, inside: bool = False) -> Graph:
    """The graph of a detector.

    Args:
        detector: any detector of this package's adapters.
        inside: choose the detections and suppress inside the graph (dense detectors with towers only).

    Raises:
        ModelError: the detector cannot be exported, or ``inside`` does not fit it; the message says what works.
    """
    name = detector.spec.name
    if isinstance(detector, TwoStageDetector):
        return TwoStageGraph(detector)
    if getattr(detector, "votes", False):
        raise ModelError(f"{name}: it averages boxes after NMS (score voting), which no exported file does; export ATSS instead")
    if isinstance(detector, yolo.Network) and not inside:
        return YOLOGraph(detector)
    if isinstance(detector, LibreNetwork) and not inside:
        return LibreYOLOGraph(detector)
    if isinstance(detector, DenseDetector):
        return SuppressedGraph(DenseGraph(detector), rule_of(detector)) if inside else DenseGraph(detector)
    if inside:
        why = "boxes of SSD and YOLO are chosen outside" if detector.spec.family == "dense" else "queries need no NMS"
        raise ModelError(f"{name}: nms inside the file is there for dense heads with towers only ({why}); leave out --nms")
    if isinstance(detector, SingleShotDetector):
        return SingleShotGraph(detector)
    if detector.spec.family == "queries":
        return QueryGraph(detector)
    raise ModelError(
        f"{name}: a {type(detector).__name__} gives features only, so there are no boxes to export; export the model itself "
        f"with torch.onnx"
    )


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
    free = ("batch",)

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
            first = detector.seed(
                replace(features, maps=tuple(level[:1] for level in features.maps)), Batch(images[:1], sizes[:1], (), (), ())
            )
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
