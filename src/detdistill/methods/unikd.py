"""UniKD: a fixed number of knowledge embeddings is drawn out of the features, so any detector can teach any other.

Lao, Song, Liu, Liu, Yang, "UniKD: Universal Knowledge Distillation for Mimicking Homogeneous or Heterogeneous Object
Detectors", ICCV 2023. No released code was found. A reconstruction where the paper is silent: no self-attention in the
extractors' layers (the paper's 1.56 M parameters leave no room for it), random boxes, box losses and matching as in
Deformable DETR, means over channels, levels paired by stride.

Two adaptive knowledge extractors (AKE) learn on the frozen teacher to find the objects: one with learned queries
(content), one with queries made from boxes near and far from the objects (positional). Frozen, they then read the same
queries at the same places of the teacher's and of the student's features; the embeddings must agree.

Shape letters: B images, N queries of each kind, C channels, L levels of the teacher, G boxes of an image, K classes.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou, clip_boxes_to_image, sigmoid_focal_loss

from detdistill.detectors.contract import Detector, DetectorSpec, Teacher
from detdistill.functional.boxes import giou_loss, paired_iou
from detdistill.functional.deformable import Cells, DeformableDecoderLayer, DeformableEncoder, num_heads
from detdistill.functional.matching import focal_class_cost, giou_cost, hungarian, l1_cost
from detdistill.functional.modes import frozen
from detdistill.functional.positions import relative_boxes
from detdistill.functional.precision import full_precision
from detdistill.functional.similarity import mean_cosine
from detdistill.methods.shared.contract import Method, Stage
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.structures import Batch, Clock, Features, Losses, Observation, Taught
from detdistill.values import Count, Fraction, Index, Limits, Weight

Kind = Literal["content", "positional"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TRIES = 20
"""Draws of a jittered box before the box itself is taken."""
ROUNDS = 50
"""Draws of background boxes around the objects before they are drawn anywhere."""


# ------------------------------------------------------------------------------------------------------- pure functions


def unikd_loss(student: Tensor, teacher: Tensor, positive: Tensor) -> Tensor:
    """Equation 8: mean squared difference of positive embeddings plus that of negative ones, each over its own number.

    Both means are over all images of the batch (our choice); a kind that does not occur adds nothing.

    Args:
        student: [B, N, C], gradient flows.
        teacher: [B, N, C], treated as constant.
        positive: [B, N] bool.

    Returns:
        [] the loss.

    Example:
        >>> import torch
        >>> one, zero = torch.ones(1, 4, 3), torch.zeros(1, 4, 3)
        >>> float(unikd_loss(one, zero, torch.tensor([[True, False, False, False]])))
        2.0
    """
    squares = (student - teacher.detach()).square().mean(dim=-1)
    return (squares * positive).sum() / positive.sum().clamp(min=1) + (squares * ~positive).sum() / (~positive).sum().clamp(min=1)


def unikd_boxes(
    boxes_xyxy: Tensor, size_hw: tuple[int, int], count: int, generator: torch.Generator, alpha: float = 0.6, beta: float = 0.4
) -> tuple[Tensor, int]:
    """Equation 3: a jittered copy of each object's box, then background boxes near the objects.

    Jitter moves the centre by up to 15 % of the sides and scales them by up to e^0.25. Background boxes are objects' boxes
    moved by up to twice their sides and scaled by up to e; without objects they lie anywhere.

    Args:
        boxes_xyxy: [G, 4] pixels; beyond ``count`` the largest are kept, one place is left for background.
        size_hw: valid height and width of the image.
        count: N, at least 2.
        generator: all randomness; on the CPU.
        alpha: IoU that a jittered box has with its object, strictly more.
        beta: IoU that a background box has with any object, strictly less.

    Returns:
        [N, 4] pixels xyxy inside the image, the jittered boxes first in the order of the objects, and how many those are.
    """
    boxes = boxes_xyxy.detach().cpu().float()
    height, width = size_hw
    limit = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    if len(boxes) >= count:
        largest = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).topk(count - 1).indices
        boxes = boxes[largest.sort().values]
    near = _jittered(boxes, size_hw, alpha, generator)
    far = [near[:0]]
    missing = count - len(near)
    for turn in range(2 * ROUNDS):
        drawn = 4 * missing + 16
        around = len(boxes) > 0 and turn < ROUNDS
        tried = _scattered(boxes, size_hw, drawn, generator) if around else _anywhere(size_hw, drawn, generator)
        if len(boxes):
            tried = tried[box_iou(tried, boxes).amax(dim=1) < beta]
        far.append(tried[:missing])
        missing -= len(far[-1])
        if missing == 0:
            break
    if missing:  # an object that fills the image leaves little else: a tiny box in a corner
        far.append(torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(missing, 4))
    return torch.cat([near, *far]), len(near)


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def _moved(boxes: Tensor, size_hw: tuple[int, int], shift: float, scale: float, generator: torch.Generator) -> Tensor:
    """Boxes [..., 4], centres moved by up to ``shift`` sides, sides scaled by up to ``e^scale``, clipped to the image."""
    center_size = box_convert(boxes, "xyxy", "cxcywh")
    centers = center_size[..., :2] + _uniform(generator, -shift, shift, *boxes.shape[:-1], 2) * center_size[..., 2:]
    sides = center_size[..., 2:] * _uniform(generator, -scale, scale, *boxes.shape[:-1], 2).exp()
    return clip_boxes_to_image(box_convert(torch.cat([centers, sides], dim=-1), "cxcywh", "xyxy"), size_hw)


def _jittered(boxes: Tensor, size_hw: tuple[int, int], alpha: float, generator: torch.Generator) -> Tensor:
    """The first of ``TRIES`` draws that overlaps enough; the box itself where none does."""
    tried = _moved(boxes.expand(TRIES, -1, -1), size_hw, 0.15, 0.25, generator)
    good = paired_iou(tried, boxes.expand_as(tried)) > alpha  # [TRIES, G]
    first = tried.gather(0, good.int().argmax(dim=0)[None, :, None].expand(1, -1, 4))[0]
    return torch.where(good.any(dim=0)[:, None], first, boxes)


def _scattered(boxes: Tensor, size_hw: tuple[int, int], count: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randint(len(boxes), (count,), generator=generator)
    tried = _moved(boxes[chosen], size_hw, 2.0, 1.0, generator)
    return tried[(tried[:, 2:] - tried[:, :2] >= 4).all(dim=1)]


def _anywhere(size_hw: tuple[int, int], count: int, generator: torch.Generator) -> Tensor:
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([size_hw[1], size_hw[0]])
    boxes = corners.flatten(1)
    return boxes[(boxes[:, 2:] - boxes[:, :2] >= min(4, min(size_hw) / 2)).all(dim=1)]


# ------------------------------------------------------------------------------------------------------------- taught


@dataclass(frozen=True)
class UniKDTaught(Taught):
    """Queries and what the frozen extractors read with them in the teacher's features."""

    content_queries: Tensor
    """[B, N, C]."""
    content: Tensor
    """[B, N, C] knowledge embeddings."""
    content_positive: Tensor
    """[B, N] bool: the query found an object."""
    positional_queries: Tensor
    """[B, N, C]."""
    positional: Tensor
    """[B, N, C]."""
    positional_positive: Tensor
    """[B, N] bool: the query's box is a jittered object."""
    boxes_cxcywh01: Tensor
    """[B, N, 4] boxes of the positional queries, in parts of the valid image."""


# --------------------------------------------------------------------------------------------------------- the networks


class KnowledgeExtractor(nn.Module):
    """AKE: makes queries, refines them by the teacher's features, reads embeddings with them, and predicts from those."""

    def __init__(
        self,
        kind: Kind,
        channels: int,
        levels: int,
        classes: int,
        queries: int,
        points: int = 4,
        layers: int = 1,
        self_attention: bool = False,
    ) -> None:
        """Build it.

        Args:
            kind: learned queries, or queries made of boxes.
            channels: C.
            levels: L.
            classes: K.
            queries: N.
            points: sampled by each of 8 heads (or as many as divide C) on each level.
            layers: of the part that reads embeddings; the generator of queries has one.
            self_attention: the textbook decoder layer.
        """
        super().__init__()
        self.kind = kind
        if kind == "content":
            self.embedding = nn.Embedding(queries, channels)
            self.position = nn.Embedding(queries, channels)
            self.reference = nn.Linear(channels, 2)
        else:
            self.from_box = nn.Linear(4, channels)

        def layer() -> DeformableDecoderLayer:
            heads = num_heads(channels)
            return DeformableDecoderLayer(channels, levels, heads, points, self_attention=self_attention)

        self.generator = layer()
        self.extractor = nn.ModuleList(layer() for _ in range(layers))
        self.classes = nn.Linear(channels, classes)
        self.boxes = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, 4)
        )
        nn.init.constant_(self.classes.bias, -math.log(99))  # a prior of 1 % for every class
        last = cast(nn.Linear, self.boxes[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def references(self, boxes_cxcywh01: Tensor) -> Tensor:
        """[B, N, 2] learned points, or the given boxes [B, N, 4]: where the queries look."""
        if self.kind == "positional":
            return boxes_cxcywh01
        points: Tensor = self.reference(self.position.weight).sigmoid()
        return points.expand(len(boxes_cxcywh01), -1, -1)

    def generate(self, boxes_cxcywh01: Tensor, pyramid: Cells) -> Tensor:
        """Equations 2 and 4: [B, N, C] queries, from the teacher's pyramid."""
        if self.kind == "positional":
            queries = self.from_box(boxes_cxcywh01)
        else:
            queries = self.embedding.weight.expand(len(boxes_cxcywh01), -1, -1)
        refined: Tensor = self.generator(
            queries,
            self.references(boxes_cxcywh01),
            pyramid.cells,
            pyramid.spatial_shapes,
            pyramid.ratios,
            pyramid.padding,
        )
        return refined

    def extract(self, queries: Tensor, boxes_cxcywh01: Tensor, pyramid: Cells) -> Tensor:
        """Equation 5: [B, N, C] embeddings that these queries read in any pyramid."""
        references = self.references(boxes_cxcywh01)
        for layer in self.extractor:
            queries = layer(queries, references, pyramid.cells, pyramid.spatial_shapes, pyramid.ratios, pyramid.padding)
        return queries

    def predict(self, embeddings: Tensor, boxes_cxcywh01: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, N, K], and boxes [B, N, 4] as corrections of the references, in parts of the valid image."""
        references = self.references(boxes_cxcywh01)
        start = torch.logit(references, eps=1e-5)
        if references.shape[-1] == 2:
            start = torch.cat([start, torch.zeros_like(start)], dim=-1)
        return self.classes(embeddings), (self.boxes(embeddings) + start).sigmoid()


@dataclass(frozen=True)
class LevelSource:
    """How one level of the teacher is made from the student's pyramid."""

    student: int
    """Index of the level of nearest stride."""
    pools: int
    """2x2 max-pools after it, for levels coarser than the student has."""
    factor: float
    """Resize by this afterwards; 1 when the strides agree."""


def level_sources(student: DetectorSpec, teacher: DetectorSpec) -> tuple[LevelSource, ...]:
    """For each level of the teacher the student's level of nearest stride, pooled where the student's pyramid ends."""
    sources = []
    for stride in teacher.strides:
        nearest = min(range(len(student.strides)), key=lambda i: abs(math.log(student.strides[i] / stride)))
        own = student.strides[nearest]
        pools = max(0, round(math.log2(stride / own))) if own == max(student.strides) else 0
        sources.append(LevelSource(nearest, pools, own * 2**pools / stride))
    return tuple(sources)


class Adaptor(nn.Module):
    """phi: the student's pyramid in the teacher's levels and channels, a linear layer each, then deformable self-attention."""

    def __init__(self, student: DetectorSpec, teacher: DetectorSpec, channels: int, layers: int, points: int) -> None:
        """Build it for two pyramids; ``layers`` of attention (0: linear layers alone)."""
        super().__init__()
        self.sources = level_sources(student, teacher)
        self.linear = nn.ModuleList(nn.Conv2d(student.channels[source.student], channels, 1) for source in self.sources)
        self.attention = DeformableEncoder(channels, len(self.sources), layers, points=points)

    def forward(self, features: Features, strides: Sequence[int], batch: Batch) -> Cells:
        """The adapted pyramid, on the teacher's strides."""
        maps = []
        for source, linear in zip(self.sources, self.linear, strict=True):
            level = features.maps[source.student]
            for _ in range(source.pools):
                level = F.max_pool2d(level, 2, ceil_mode=True)
            if abs(source.factor - 1) > 1e-6:
                size = [max(1, round(side * source.factor)) for side in level.shape[-2:]]
                level = F.interpolate(level, size=size, mode="bilinear", align_corners=False)
            maps.append(linear(level))
        adapted: Cells = self.attention(pyramid_of(maps, strides, batch))
        return adapted


def pyramid_of(maps: Sequence[Tensor], strides: Sequence[int], batch: Batch) -> Cells:
    """Maps with the exact part of each that shows the image: valid pixels over the pixels that the map covers.

    So places do not depend on what else is in the batch; a cell is hidden when its first pixel is padding.
    """
    height, width = (batch.sizes[:, axis].to(maps[0].dtype) for axis in (0, 1))
    ratios, padding = [], []
    for level, stride in zip(maps, strides, strict=True):
        rows, columns = level.shape[-2:]
        ratios.append(torch.stack([width / (stride * columns), height / (stride * rows)], dim=-1))
        below = torch.arange(rows, device=level.device)[None, :, None] * stride >= height[:, None, None]
        right = torch.arange(columns, device=level.device)[None, None, :] * stride >= width[:, None, None]
        padding.append(below | right)
    return Cells.of(maps, padding, torch.stack(ratios, dim=1))


# ------------------------------------------------------------------------------------------------------------ the method


class UniKD(Method[UniKDTaught]):
    """UniKD between any two detectors."""

    slug = "unikd"
    title = "UniKD: Universal Knowledge Distillation for Mimicking Homogeneous or Heterogeneous Object Detectors (ICCV 2023)"
    bibtex = """@inproceedings{lao2023unikd,
  title={UniKD: Universal Knowledge Distillation for Mimicking Homogeneous or Heterogeneous Object Detectors},
  author={Lao, Shanshan and Song, Guanglu and Liu, Boxiao and Liu, Yu and Yang, Yujiu},
  booktitle={IEEE/CVF International Conference on Computer Vision},
  year={2023}
}"""
    teach_settings = (
        *("queries", "extractor_layers", "points", "alpha", "beta", "self_attention", "cls_norm"),
        *("extractor_epochs", "extractor_lr"),
    )

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        queries: Annotated[int, Limits(2)] = 200,
        content_weight: Weight = 10.0,
        positional_weight: Weight = 10.0,
        extractor_layers: Count = 1,
        adaptor_layers: Index = 2,
        points: Count = 4,
        alpha: Fraction = 0.6,
        beta: Fraction = 0.4,
        self_attention: bool = False,
        cls_norm: Literal["num_gt", "num_queries"] = "num_gt",
        extractor_epochs: Weight = 1.25,
        extractor_lr: Weight = 2e-4,
    ) -> None:
        """Build extractors and adaptor.

        Args:
            teacher: any detector.
            student: any detector.
            queries: N, number of queries of each kind, content and positional.
            content_weight: of the content embeddings' loss; 0 leaves them out (table 6a).
            positional_weight: of the positional embeddings' loss; 0 leaves them out.
            extractor_layers: decoder layers of an extractor that read embeddings (table 6e).
            adaptor_layers: layers of deformable self-attention on the student's side (table 6g).
            points: places that each attention head samples on each level.
            alpha: least IoU of a jittered box with its object.
            beta: largest IoU of a background box with any object.
            self_attention: use the textbook decoder layer, which the paper's parameter count excludes.
            cls_norm: divide the extractors' class loss by the objects (Deformable DETR) or by the queries (equation 6).
            extractor_epochs: length of the extractors' training as a multiple of the run's epochs (the paper's 15 of 12).
            extractor_lr: its learning rate (AdamW).

        Raises:
            MethodError: a hyper-parameter is out of range, or both weights are 0.
        """
        super().__init__(teacher, student)
        check_some(self.slug, content_weight=content_weight, positional_weight=positional_weight)
        self.weights = {"content": content_weight, "positional": positional_weight}
        self.queries, self.alpha, self.beta, self.cls_norm = queries, alpha, beta, cls_norm
        self.extractor_epochs, self.extractor_lr = extractor_epochs, extractor_lr
        spec = teacher.spec
        self.channels = max(spec.channels)
        self.extractors = nn.ModuleDict()
        # A teacher whose levels differ in width (SSD) is read through one linear layer for each that is narrower.
        self.extractors["project"] = nn.ModuleList(
            nn.Identity() if width == self.channels else nn.Conv2d(width, self.channels, 1) for width in spec.channels
        )
        for kind in KINDS:
            self.extractors[kind] = KnowledgeExtractor(
                kind,
                self.channels,
                len(spec.strides),
                len(student.spec.classes),
                queries,
                points,
                extractor_layers,
                self_attention,
            )
        self.adaptor = Adaptor(student.spec, spec, self.channels, adaptor_layers, points)
        settings = (queries, extractor_layers, points, alpha, beta, self_attention, cls_norm, extractor_epochs, extractor_lr)
        self._settings = repr((settings, student.spec.classes))

    # ---------------------------------------------------------------------------------------------------------- teach

    @torch.no_grad()
    def teach(self, batch: Batch) -> UniKDTaught:
        """Queries, embeddings and which of them are positive; random boxes are seeded by image and view."""
        features = self.teacher.observe(batch).features
        with full_precision(batch.images.device):
            pyramid = self._pyramid(features, batch)
            boxes, near = self._boxes(batch)
            content, positional = self._extractor("content"), self._extractor("positional")
            content_queries, positional_queries = content.generate(boxes, pyramid), positional.generate(boxes, pyramid)
            knowledge = content.extract(content_queries, boxes, pyramid)
            return UniKDTaught(
                content_queries,
                knowledge,
                self._match(*content.predict(knowledge, boxes), batch) >= 0,
                positional_queries,
                positional.extract(positional_queries, boxes, pyramid),
                near,
                boxes,
            )

    def _extractor(self, kind: str) -> KnowledgeExtractor:
        return cast(KnowledgeExtractor, self.extractors[kind])

    def _pyramid(self, features: Features, batch: Batch) -> Cells:
        """The teacher's maps in one width."""
        layers = cast(nn.ModuleList, self.extractors["project"])
        maps = [layer(level.float()) for layer, level in zip(layers, features.maps, strict=True)]
        return pyramid_of(maps, self.teacher.spec.strides, batch)

    def _boxes(self, batch: Batch, draw: str = "") -> tuple[Tensor, Tensor]:
        """Boxes [B, N, 4] of the positional queries, and which are objects' [B, N]; ``draw`` names a further drawing."""
        boxes, near = [], []
        places = zip(batch.ids, batch.views, batch.sizes.tolist(), batch.targets, strict=True)
        for number, view, (height, width), target in places:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{number}/{view.key}/{draw}".encode()))
            objects = target.without_crowd().boxes_xyxy
            drawn, count = unikd_boxes(objects, (height, width), self.queries, generator, self.alpha, self.beta)
            boxes.append(relative_boxes(drawn, (height, width)))
            near.append(torch.arange(self.queries) < count)
        device = batch.images.device
        return torch.stack(boxes).to(device), torch.stack(near).to(device)

    # --------------------------------------------------------------------------------------------- the extractors' stage

    def pretrain(self, batch: Batch, taught: None, clock: Clock) -> Losses:
        """Equation 6: the extractors learn to detect with what they read in the frozen teacher's features."""
        features = self.teacher.observe(batch).features
        with full_precision(batch.images.device):
            pyramid = self._pyramid(features, batch)
            boxes, near = self._boxes(batch, draw=str(clock.epoch))
            losses: dict[str, Tensor] = {}
            for kind in KINDS:
                extractor = self._extractor(kind)
                embeddings = extractor.extract(extractor.generate(boxes, pyramid), boxes, pyramid)
                logits, found = extractor.predict(embeddings, boxes)
                matched = self._match(logits, found, batch) if kind == "content" else self._known(boxes, near, batch)
                losses |= {f"{kind}_{name}": value for name, value in self._detection(logits, found, matched, batch).items()}
        return Losses(losses)

    @staticmethod
    def _objects(batch: Batch, image: int) -> tuple[Tensor, Tensor]:
        """Boxes [G, 4] (cxcywh in parts of the valid image) and labels [G]."""
        target = batch.targets[image].without_crowd()
        return relative_boxes(target.boxes_xyxy.float(), batch.sizes[image]), target.labels

    def _match(self, logits: Tensor, boxes: Tensor, batch: Batch) -> Tensor:
        """[B, N] the object of each query by bipartite matching (costs 2 class, 5 L1, 2 GIoU), -1 for none."""
        rows = []
        for image in range(len(batch)):
            wanted, labels = self._objects(batch, image)
            cost = 2 * focal_class_cost(logits[image], labels) + 5 * l1_cost(boxes[image], wanted)
            cost = cost + 2 * giou_cost(box_convert(boxes[image], "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy"))
            rows.append(hungarian(cost))
        return torch.stack(rows)

    def _known(self, boxes: Tensor, near: Tensor, batch: Batch) -> Tensor:
        """[B, N] the object that each jittered box was made of: that of highest IoU, since alpha is above one half."""
        rows = []
        for image in range(len(batch)):
            wanted, _ = self._objects(batch, image)
            row = torch.full_like(near[image], -1, dtype=torch.int64)
            count = int(near[image].sum())
            if count == len(wanted):
                row[:count] = torch.arange(count, device=row.device)
            elif count:  # more objects than queries: the largest were kept, in their order
                corners = [box_convert(part, "cxcywh", "xyxy") for part in (boxes[image, :count], wanted)]
                row[:count] = box_iou(corners[0], corners[1]).argmax(dim=1)
            rows.append(row)
        return torch.stack(rows)

    def _detection(self, logits: Tensor, boxes: Tensor, matched: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Focal loss over all queries (x2), L1 (x5) and GIoU (x2) over the positive ones."""
        wanted_logits = torch.zeros_like(logits)
        found, wanted = [boxes[:0, 0]], [boxes[:0, 0]]
        for image in range(len(batch)):
            objects, labels = self._objects(batch, image)
            mine = torch.nonzero(matched[image] >= 0).flatten()
            wanted_logits[image, mine, labels[matched[image, mine]]] = 1
            found.append(boxes[image, mine])
            wanted.append(objects[matched[image, mine]].to(boxes.dtype))
        predicted, target = torch.cat(found), torch.cat(wanted)
        objects_of_batch = max(1, sum(int((~target.crowd).sum()) for target in batch.targets))
        by = objects_of_batch if self.cls_norm == "num_gt" else len(batch) * self.queries
        apart = giou_loss(box_convert(predicted, "cxcywh", "xyxy"), box_convert(target, "cxcywh", "xyxy"))
        return {
            "cls": 2 * sigmoid_focal_loss(logits, wanted_logits, alpha=0.25, gamma=2, reduction="sum") / by,
            "l1": 5 * (predicted - target).abs().sum() / objects_of_batch,
            "giou": 2 * apart.sum() / objects_of_batch,
        }

    # ---------------------------------------------------------------------------------------------------------- learn

    def learn(self, student: Detector, seen: Observation, taught: UniKDTaught, batch: Batch, clock: Clock) -> Losses:
        """Equation 7: terms ``content`` and ``positional``; monitors the cosine of the embeddings."""
        strides = self.teacher.spec.strides
        with full_precision(batch.images.device):
            pyramid = self.adaptor(seen.features, strides, batch)
            queries = {"content": taught.content_queries, "positional": taught.positional_queries}
            wanted = {"content": taught.content, "positional": taught.positional}
            positive = {"content": taught.content_positive, "positional": taught.positional_positive}
            terms: dict[str, Tensor] = {}
            monitors: dict[str, Tensor] = {}
            for kind in (kind for kind in KINDS if self.weights[kind] > 0):
                extractor = self._extractor(kind)
                with frozen(extractor):
                    read = extractor.extract(queries[kind], taught.boxes_cxcywh01, pyramid)
                theirs = wanted[kind]
                terms[kind] = self.weights[kind] * unikd_loss(read, theirs, positive[kind])
                monitors[f"{kind}_cosine"] = mean_cosine([read.transpose(1, 2)], [theirs.transpose(1, 2)])
        return Losses(terms, monitors)

    def stages(self, student: Detector) -> tuple[Stage, ...]:
        """The extractors on the frozen teacher; then the student and its adaptor, with frozen extractors."""
        return (
            Stage(
                "extractors",
                step=self.pretrain,
                trains=lambda clock: (self.extractors,),
                evaluates=None,
                share=self.extractor_epochs,
                depends_on=hashlib.sha256(f"{self.slug} {self.teacher.fingerprint} {self._settings}".encode()).hexdigest()[:16],
                overrides={"optimizer": "adamw", "lr": self.extractor_lr, "weight_decay": 1e-4, "clip": 0.1, "schedule": "step"},
            ),
            self.distill_stage(student, (student, self.adaptor)),
        )
