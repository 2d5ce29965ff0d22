"""Detectors of a few lines, one for each family, with real losses: what contracts and methods are tested on.

Seeded: two detectors with one seed and one shape are equal. All regression is plain enough to be checked by hand.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from detdistill.detectors.contract import (
    DenseCoding,
    Detector,
    DetectorSpec,
    Parts,
    Pyramid,
    dense_positives,
    query_positives,
    region_positives,
)
from detdistill.functional.counting import divisor_over_ranks
from detdistill.structures import (
    IGNORED,
    NEGATIVE,
    Assignment,
    Batch,
    Dense,
    Detections,
    Features,
    Losses,
    Origin,
    Positives,
    Queries,
    QuerySeed,
    Regions,
    Resizing,
    Target,
    Tower,
    View,
)


def tiny_batch(count: int = 2, size: int = 64, boxes: bool = True, seed: int = 0) -> Batch:
    """Noise with one to three boxes of classes 0 and 1; every second image is a quarter lower than the tensor."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, size, size, generator=generator)
    heights = [size if index % 2 == 0 else size * 3 // 4 for index in range(count)]
    targets = []
    for index, height in enumerate(heights):
        images[index, :, height:] = 0
        number = 1 + (index + 1) % 3 if boxes else 0
        valid = torch.tensor([size, height])
        width_height = (0.15 + 0.35 * torch.rand(number, 2, generator=generator)) * valid
        corner = torch.rand(number, 2, generator=generator) * (valid - width_height)
        labels = torch.randint(0, 2, (number,), generator=generator)
        targets.append(Target(torch.cat([corner, corner + width_height], dim=1), labels, torch.zeros(number, dtype=torch.bool)))
    return Batch(
        images,
        torch.tensor([[height, size] for height in heights]),
        tuple(targets),
        ids=tuple(100 * seed + index for index in range(count)),
        views=tuple(View((height, size), (height, size)) for height in heights),
    )


def seeded(init):
    """Initialise from the argument ``seed``, leaving the global generator as it was."""

    @functools.wraps(init)
    def wrapper(self, *args, seed: int = 0, **kwargs):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            init(self, *args, **kwargs)

    return wrapper


class TinyNeck(nn.Module):
    """A 1x1 convolution on each level."""

    def __init__(self, backbone_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(backbone_channels, width, 1) for width in channels)

    def forward(self, features: Features) -> Features:
        maps = tuple(conv(level) for conv, level in zip(self.convs, features.maps, strict=True))
        return Features(maps, features.strides, features.padding)


class TinyDetector(Detector):
    """Patches of one stride as backbone (6 channels), 1x1 convolutions as neck."""

    backbone_channels = 6

    def build(self, kind: str, classes: Sequence[str], channels: Sequence[int], strides: Sequence[int]) -> None:
        below = Pyramid((self.backbone_channels,) * len(strides), tuple(strides))
        dense = {} if kind == "queries" else {"anchors": (1,) * len(strides), "coding": DenseCoding()}
        self.spec = DetectorSpec(
            f"tiny{kind}:patches", kind, tuple(classes), tuple(channels), tuple(strides), backbone=below, **dense
        )
        self.backbone = nn.ModuleList(nn.Conv2d(3, self.backbone_channels, stride, stride) for stride in strides)
        self.levels = TinyNeck(self.backbone_channels, channels)

    def parts(self) -> Parts:
        head = [module for name, module in self.named_children() if name not in ("backbone", "levels")]
        return Parts((self.backbone,), (self.levels,), (*head, nn.ParameterList(self._parameters.values())))

    def neck(self, features: Features, batch: Batch) -> Features:
        return self.levels(features)

    def backbone_features(self, batch: Batch) -> Features:
        images = self.normalized(batch)
        maps = tuple(conv(images).relu() for conv in self.backbone)
        padding = None
        if any(view.size_hw != batch.padding_hw for view in batch.views):
            mask = batch.padding_mask()
            padding = tuple(mask[:, ::stride, ::stride] for stride in self.spec.strides)
        return Features(maps, self.spec.strides, padding)

    def features(self, batch: Batch) -> Features:
        return self.neck(self.backbone_features(batch), batch)

    def export(self, folder: Path, resizing: Resizing | None = None) -> None:
        save_file(self.state_dict(), folder / "model.safetensors")


# -------------------------------------------------------------------------------------------------------------- dense


class TinyHead(nn.Module):
    """Two blocks for each side, one output layer each; a box is its point and four distances, ``stride * exp(delta)``."""

    tower_depth = 2

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.classification = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(self.tower_depth))
        self.regression = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(self.tower_depth))
        self.logits = nn.Conv2d(channels, num_classes, 1)
        self.deltas = nn.Conv2d(channels, 4, 1)

    def tower(self, features: Features, upto: int | None = None) -> Tower:
        hidden = Tower(features.maps, features.maps, 0, features.strides)
        return self._advance(hidden, self.tower_depth if upto is None else upto)

    def _advance(self, hidden: Tower, upto: int) -> Tower:
        classification, regression = hidden.classification, hidden.regression
        for block in range(hidden.depth, upto):
            classification = tuple(self.classification[block](level).relu() for level in classification)
            regression = tuple(self.regression[block](level).relu() for level in regression)
        return Tower(classification, regression, upto, hidden.strides)

    def finish(self, hidden: Tower, batch: Batch) -> Dense:
        last = self._advance(hidden, self.tower_depth)
        logits = torch.cat([self.logits(level).flatten(2) for level in last.classification], dim=2).transpose(1, 2)
        deltas = torch.cat([self.deltas(level).flatten(2) for level in last.regression], dim=2).transpose(1, 2)
        levels, cells, steps = [], [], []
        for index, (level, stride) in enumerate(zip(last.regression, last.strides, strict=True)):
            rows, columns = torch.meshgrid(*(torch.arange(n, device=level.device) for n in level.shape[-2:]), indexing="ij")
            cells.append(torch.stack([rows.flatten(), columns.flatten()], dim=1))
            levels.append(torch.full((len(cells[-1]),), index, device=level.device))
            steps.append(torch.full((len(cells[-1]), 1), stride, device=level.device))
        cell, step = torch.cat(cells), torch.cat(steps)
        centers = (cell.flip(1) + 0.5) * step
        distances = step * deltas.exp()
        boxes = torch.cat([centers - distances[..., :2], centers + distances[..., 2:]], dim=-1)
        priors = torch.cat([centers - step / 2, centers + step / 2], dim=-1).expand(len(batch), -1, -1)
        level = torch.cat(levels)
        return Dense(logits, deltas, boxes, priors, level, cell, torch.zeros_like(level))

    def predict(self, features: Features, batch: Batch) -> Dense:
        return self.finish(self.tower(features), batch)

    def assign(self, prediction: Dense, batch: Batch) -> Assignment:
        """The cells of every level that contain a box's centre; of two boxes the first."""
        matched = torch.full(prediction.logits.shape[:2], NEGATIVE, device=prediction.logits.device)
        for image, target in enumerate(batch.targets):
            centers = (target.boxes_xyxy[:, :2] + target.boxes_xyxy[:, 2:]) / 2
            priors = prediction.priors_xyxy[image][:, None]
            inside = ((priors[..., :2] <= centers) & (centers < priors[..., 2:])).all(dim=-1) & ~target.crowd
            for box in reversed(range(len(target))):
                matched[image, inside[:, box]] = box
        return Assignment(matched)

    def loss(self, prediction: Dense, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Sigmoid BCE over all that is not ignored, L1 in parts of the image over positives; both by positives."""
        assignment = assignment or self.assign(prediction, batch)
        positives = dense_positives(prediction, assignment, batch)
        wanted = torch.zeros_like(prediction.logits)
        # An objectness head has one class, whatever the box shows.
        wanted[positives.image, positives.index, positives.labels.clamp(max=self.num_classes - 1)] = 1
        weights = torch.ones_like(wanted[..., 0]) if assignment.weights is None else assignment.weights
        weights = weights * (assignment.matched != IGNORED)
        normalizer = divisor_over_ranks(len(positives), weights) if assignment.normalizer is None else assignment.normalizer
        bce = F.binary_cross_entropy_with_logits(prediction.logits, wanted, reduction="none").sum(dim=-1)
        l1 = (positives.boxes_xyxy - positives.targets_xyxy).abs().sum(dim=-1) / max(batch.padding_hw)
        weights_of_positives = weights[positives.image, positives.index]
        return Losses({"cls": (bce * weights).sum() / normalizer, "box": (l1 * weights_of_positives).sum() / normalizer})


class TinyDense(TinyDetector):
    """One prediction for each cell; sigmoid. With towers, copies and backbone features."""

    tower_depth = TinyHead.tower_depth

    @seeded
    def __init__(self, classes: Sequence[str] = ("a", "b"), channels: Sequence[int] = (8, 8), strides: Sequence[int] = (8, 16)):
        super().__init__()
        self.build("dense", classes, channels, strides)
        self.head = TinyHead(channels[0], len(classes))

    def predict(self, features: Features, batch: Batch) -> Dense:
        return self.head.predict(features, batch)

    def assign(self, prediction: Dense, batch: Batch) -> Assignment:
        return self.head.assign(prediction, batch)

    def loss(self, prediction: Dense, batch: Batch, assignment: Assignment | None = None) -> Losses:
        return self.head.loss(prediction, batch, assignment)

    def positives(self, prediction: Dense, assignment: Assignment, batch: Batch) -> Positives:
        return dense_positives(prediction, assignment, batch)

    def detect(self, prediction: Dense, batch: Batch) -> list[Detections]:
        return [
            best(boxes, logits.sigmoid(), size)
            for boxes, logits, size in zip(prediction.boxes_xyxy, prediction.logits, batch.sizes, strict=True)
        ]

    def tower(self, features: Features, upto: int | None = None) -> Tower:
        return self.head.tower(features, upto)

    def finish(self, hidden: Tower, batch: Batch) -> Dense:
        return self.head.finish(hidden, batch)

    def copy_head(self, fresh: bool = False) -> TinyHead:
        return TinyHead(self.spec.channels[0], len(self.spec.classes)) if fresh else copy.deepcopy(self.head)

    def copy_neck(self, fresh: bool = False) -> TinyNeck:
        return TinyNeck(self.backbone_channels, self.spec.channels) if fresh else copy.deepcopy(self.levels)


def best(boxes_xyxy: Tensor, scores: Tensor, size_hw: Tensor, count: int = 10) -> Detections:
    """The ``count`` highest of scores [P, K]; boxes [P, 4] or [P, K, 4], clipped to the valid image."""
    top, index = scores.flatten().topk(min(count, scores.numel()))
    labels = index % scores.shape[1]
    rows = index // scores.shape[1]
    boxes = boxes_xyxy[rows] if boxes_xyxy.ndim == 2 else boxes_xyxy[rows, labels]
    limit = size_hw.flip(0).repeat(2)
    return Detections(torch.minimum(boxes.clamp(min=0), limit), top, labels)


# ------------------------------------------------------------------------------------------------------------ regions


def iou(first: Tensor, second: Tensor) -> Tensor:
    """[N, M] of boxes [N, 4] and [M, 4]."""
    overlap = torch.minimum(first[:, None, 2:], second[:, 2:]) - torch.maximum(first[:, None, :2], second[:, :2])
    shared = overlap.clamp(min=0).prod(dim=-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(dim=-1) for boxes in (first, second)]
    return shared / (areas[0][:, None] + areas[1] - shared)


class TinyRegions(TinyDetector):
    """Two stages: the best cells become regions, in training the boxes too; softmax, background last."""

    num_proposals = 6

    @seeded
    def __init__(self, classes: Sequence[str] = ("a", "b"), channels: Sequence[int] = (8, 8), strides: Sequence[int] = (8, 16)):
        super().__init__()
        self.build("regions", classes, channels, strides)
        self.spec = replace(self.spec, softmax=True)
        self.rpn = TinyHead(channels[0], 1)
        self.embed = nn.Linear(channels[0] * 4, 12)
        self.logits = nn.Linear(12, len(classes) + 1)
        self.deltas = nn.Linear(12, len(classes) * 4)

    def proposals(self, features: Features, batch: Batch) -> tuple[list[Tensor], list[Origin]]:
        return self._proposals(self.rpn.predict(features, batch), batch)

    def _proposals(self, first: Dense, batch: Batch) -> tuple[list[Tensor], list[Origin]]:
        boxes, origins = [], []
        for image in range(len(batch)):
            top = first.logits[image, :, 0].topk(self.num_proposals).indices
            limit = batch.sizes[image].flip(0).repeat(2)
            boxes.append(torch.minimum(first.boxes_xyxy[image, top].detach().clamp(min=0), limit))
            nobody = torch.full_like(top, -1)
            origins.append(Origin(torch.full_like(top, image), first.levels[top], first.cells[top], first.anchors[top], nobody))
        return boxes, origins

    def predict(self, features: Features, batch: Batch) -> Regions:
        first = self.rpn.predict(features, batch)
        boxes, origins = self._proposals(first, batch)
        if self.training:
            for image, target in enumerate(batch.targets):
                usable = torch.nonzero(~target.crowd).flatten()
                boxes[image] = torch.cat([boxes[image], target.boxes_xyxy[usable]])
                inserted = Origin.given([len(usable)], device=usable.device)
                inserted = replace(inserted, image=inserted.image + image, ground_truth=usable)
                origins[image] = Origin.cat([origins[image], inserted])
        return replace(self._second(features, boxes, Origin.cat(origins), batch), first=first)

    def regions(self, features: Features, boxes_xyxy: Sequence[Tensor], batch: Batch) -> Regions:
        origin = Origin.given([len(boxes) for boxes in boxes_xyxy], device=batch.images.device)
        return self._second(features, boxes_xyxy, origin, batch)

    def copy_region_head(self) -> TinyRegions:
        copied = copy.deepcopy(self).requires_grad_(True).train()
        del copied.backbone, copied.levels, copied.rpn
        return copied

    def _second(self, features: Features, boxes_xyxy: Sequence[Tensor], origin: Origin, batch: Batch) -> Regions:
        """Four points of each box on the finest map, a linear layer, class and box."""
        height, width = batch.padding_hw
        pooled = []
        for level, boxes in zip(features.maps[0], boxes_xyxy, strict=True):
            x1, y1, x2, y2 = (boxes / boxes.new_tensor([width, height, width, height]) * 2 - 1).unbind(-1)
            points = torch.stack([x1, y1, x2, y1, x1, y2, x2, y2], dim=-1).reshape(1, len(boxes), 4, 2) * 0.9
            sampled = F.grid_sample(level[None].to(points.dtype), points, align_corners=False)  # [1, C, n, 4]
            pooled.append(sampled[0].transpose(0, 1).reshape(len(boxes), len(level), 2, 2))
        regions, feature = torch.cat(list(boxes_xyxy)), torch.cat(pooled)
        embedding = self.embed(feature.flatten(1)).relu()
        deltas = self.deltas(embedding).unflatten(1, (-1, 4))
        size = (regions[:, 2:] - regions[:, :2]).repeat(1, 2)[:, None]
        refined = regions[:, None] + deltas * size
        return Regions(regions, origin, self.logits(embedding), deltas, refined, feature, (embedding,))

    def assign(self, prediction: Regions | Dense, batch: Batch) -> Assignment:
        """The box of the highest IoU, if that is at least one half; of the first stage: as its head assigns."""
        if isinstance(prediction, Dense):
            return self.rpn.assign(prediction, batch)
        matched = torch.full_like(prediction.origin.image, NEGATIVE)
        for image, target in enumerate(batch.targets):
            if len(target):
                mine = prediction.origin.image == image
                overlaps = iou(prediction.boxes_xyxy[mine], target.boxes_xyxy).masked_fill(target.crowd, 0)
                value, index = overlaps.max(dim=1)
                matched[mine] = torch.where(value >= 0.5, index, NEGATIVE)
        return Assignment(matched)

    def loss(self, prediction: Regions | Dense, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Cross-entropy over regions, L1 in parts of the image over positives; the first stage's loss as ``rpn_*``."""
        if isinstance(prediction, Dense):
            return self.rpn.loss(prediction, batch, assignment)
        assignment = assignment or self.assign(prediction, batch)
        positives = region_positives(prediction, assignment, batch)
        wanted = torch.full_like(prediction.origin.image, len(self.spec.classes))
        wanted[positives.index] = positives.labels
        weights = torch.ones_like(prediction.logits[:, 0]) if assignment.weights is None else assignment.weights
        weights = weights * (assignment.matched != IGNORED)
        normalizer = divisor_over_ranks(len(wanted), weights) if assignment.normalizer is None else assignment.normalizer
        entropy = F.cross_entropy(prediction.logits, wanted, reduction="none")
        l1 = (positives.boxes_xyxy - positives.targets_xyxy).abs().sum(dim=-1) / max(batch.padding_hw)
        terms = {"cls": (entropy * weights).sum() / normalizer, "box": (l1 * weights[positives.index]).sum() / normalizer}
        if prediction.first is not None:
            first = self.rpn.loss(prediction.first, batch).terms
            terms |= {f"rpn_{name}": value for name, value in first.items()}
        return Losses(terms)

    def positives(self, prediction: Regions, assignment: Assignment, batch: Batch) -> Positives:
        return region_positives(prediction, assignment, batch)

    def detect(self, prediction: Regions, batch: Batch) -> list[Detections]:
        scores = prediction.logits.softmax(dim=-1)[:, :-1]
        mine = [prediction.origin.image == image for image in range(len(batch))]
        return [best(prediction.refined_xyxy[m], scores[m], size) for m, size in zip(mine, batch.sizes, strict=True)]


# ------------------------------------------------------------------------------------------------------------ queries


class TinyQueries(TinyDetector):
    """Two decoder layers of self- and cross-attention over all cells; sigmoid; boxes move from their reference."""

    num_queries, num_layers = 5, 2

    @seeded
    def __init__(self, classes: Sequence[str] = ("a", "b"), channels: Sequence[int] = (8, 8), strides: Sequence[int] = (8, 16)):
        super().__init__()
        self.build("queries", classes, channels, strides)
        width = channels[0]
        self.content = nn.Parameter(torch.randn(self.num_queries, width))
        self.position = nn.Parameter(torch.randn(self.num_queries, width))
        self.reference = nn.Parameter(torch.randn(self.num_queries, 4))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(self.num_layers))
        self.logits = nn.Linear(width, len(classes))
        self.deltas = nn.Linear(width, 4)

    def seed(self, features: Features, batch: Batch) -> QuerySeed:
        own = (self.content, self.position, self.reference.sigmoid())
        return QuerySeed(*(value.expand(len(batch), -1, -1) for value in own))

    def decode(self, features: Features, seed: QuerySeed, batch: Batch, attention: bool = False) -> Queries:
        memory = torch.cat([level.flatten(2) for level in features.maps], dim=2).transpose(1, 2)
        hidden, position = seed.content, 0 if seed.position is None else seed.position
        reference = torch.full_like(hidden[..., :4], 0.5) if seed.reference is None else seed.reference
        padding = None if features.padding is None else torch.cat([mask.flatten(1) for mask in features.padding], dim=1)
        logits, boxes, embedding, seen, among = [], [], [], [], []
        for layer in self.layers:
            query = hidden + position
            each_other = (query @ query.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(dim=-1)
            hidden = hidden + each_other @ hidden
            scores = (hidden + position) @ memory.transpose(1, 2) / query.shape[-1] ** 0.5
            if padding is not None:
                scores = scores.masked_fill(padding[:, None], -torch.inf)
            looks = scores.softmax(dim=-1)
            hidden = torch.tanh(hidden + layer(looks @ memory))
            reference = (reference.logit(eps=1e-4) + self.deltas(hidden)).sigmoid()
            logits.append(self.logits(hidden))
            boxes.append(reference)
            embedding.append(hidden)
            seen.append(looks[:, None])
            among.append(each_other[:, None])
        stacked = (torch.stack(values) for values in (logits, boxes, embedding))
        if not attention:
            return Queries(*stacked, seed)
        return Queries(*stacked, seed, torch.stack(seen), self_attention=torch.stack(among))

    def predict(self, features: Features, batch: Batch, attention: bool = False) -> Queries:
        return self.decode(features, self.seed(features, batch), batch, attention)

    def assign(self, prediction: Queries, batch: Batch) -> Assignment:
        """In every layer the cheapest pair of query and box, again and again, until all boxes are taken."""
        matched = torch.full(prediction.logits.shape[:3], NEGATIVE, device=prediction.logits.device)
        for image, target in enumerate(batch.targets):
            scale = batch.sizes[image].flip(0).repeat(2)
            center, size = (
                target.boxes_xyxy[:, :2] + target.boxes_xyxy[:, 2:],
                target.boxes_xyxy[:, 2:] - target.boxes_xyxy[:, :2],
            )
            wanted = torch.cat([center / 2, size], dim=1) / scale
            for layer in range(len(matched)):
                distance = (prediction.boxes_cxcywh01[layer, image].detach()[:, None] - wanted).abs().sum(dim=-1)
                cost = distance - prediction.logits[layer, image].detach().sigmoid()[:, target.labels]
                cost = cost.masked_fill(target.crowd, torch.inf)
                for _ in range(min(cost.shape[0], int((~target.crowd).sum()))):
                    query, box = divmod(int(cost.argmin()), cost.shape[1])
                    matched[layer, image, query] = box
                    cost[query], cost[:, box] = torch.inf, torch.inf
        return Assignment(matched)

    def loss(self, prediction: Queries, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Sigmoid BCE over all queries of all layers, L1 in parts of the image over positives; both by positives."""
        assignment = assignment or self.assign(prediction, batch)
        positives = query_positives(prediction, assignment, batch)
        where = (positives.layer, positives.image, positives.index)
        wanted = torch.zeros_like(prediction.logits)
        wanted[(*where, positives.labels)] = 1
        weights = torch.ones_like(wanted[..., 0]) if assignment.weights is None else assignment.weights
        weights = weights * (assignment.matched != IGNORED)
        normalizer = divisor_over_ranks(len(positives), weights) if assignment.normalizer is None else assignment.normalizer
        bce = F.binary_cross_entropy_with_logits(prediction.logits, wanted, reduction="none").sum(dim=-1)
        l1 = (positives.boxes_xyxy - positives.targets_xyxy).abs().sum(dim=-1) / max(batch.padding_hw)
        return Losses({"cls": (bce * weights).sum() / normalizer, "box": (l1 * weights[where]).sum() / normalizer})

    def positives(self, prediction: Queries, assignment: Assignment, batch: Batch) -> Positives:
        return query_positives(prediction, assignment, batch)

    def detect(self, prediction: Queries, batch: Batch) -> list[Detections]:
        found = []
        for boxes, logits, size in zip(prediction.boxes_cxcywh01[-1], prediction.logits[-1], batch.sizes, strict=True):
            corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)
            found.append(best(corners * size.flip(0).repeat(2), logits.sigmoid(), size))
        return found
