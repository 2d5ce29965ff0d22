"""Modules of UniKD (knowledge extractors, adaptor) and the output of its ``teach``.

Shape letters: B images, N queries of each kind, C channels, L levels of the teacher, G boxes of an image, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.contract import DetectorSpec
from detdistill.functional.deformable import Cells, DeformableDecoderLayer, DeformableEncoder, num_heads
from detdistill.methods.unikd.loss import Kind
from detdistill.structures import Batch, Features, Taught


@dataclass(frozen=True)
class UniKDTaught(Taught):
    """The queries and the embeddings that the frozen extractors read with them in the teacher's features."""

    content_queries: Tensor
    """[B, N, C]."""
    content: Tensor
    """[B, N, C] knowledge embeddings."""
    content_positive: Tensor
    """[B, N] bool: the query is matched to an object."""
    positional_queries: Tensor
    """[B, N, C]."""
    positional: Tensor
    """[B, N, C] knowledge embeddings."""
    positional_positive: Tensor
    """[B, N] bool: the query's box is a jittered object."""
    boxes_cxcywh01: Tensor
    """[B, N, 4] boxes of the positional queries, relative to the valid image."""


class KnowledgeExtractor(nn.Module):
    """Adaptive knowledge extractor (AKE): generates queries, reads embeddings with them, and predicts objects from these."""

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
        """Build the layers.

        Args:
            kind: ``content``: learned queries; ``positional``: queries made from boxes.
            channels: C, width of the pyramid and of the queries.
            levels: L.
            classes: K.
            queries: N.
            points: points that each attention head samples on each level (8 heads, or fewer where 8 does not divide C).
            layers: number of decoder layers that read embeddings; the generator of queries has a single layer of its own.
            self_attention: use decoder layers with self-attention.
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
        """Reference points [B, N, 2] (content, learned) or boxes [B, N, 4] (positional, as given) of the queries."""
        if self.kind == "positional":
            return boxes_cxcywh01
        points: Tensor = self.reference(self.position.weight).sigmoid()
        return points.expand(len(boxes_cxcywh01), -1, -1)

    def generate(self, boxes_cxcywh01: Tensor, pyramid: Cells) -> Tensor:
        """Generate queries [B, N, C] from the teacher's pyramid (Eq. 2 and 4)."""
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
        """Read embeddings [B, N, C] from a pyramid of the teacher or the student with the given queries (Eq. 5)."""
        references = self.references(boxes_cxcywh01)
        for layer in self.extractor:
            queries = layer(queries, references, pyramid.cells, pyramid.spatial_shapes, pyramid.ratios, pyramid.padding)
        return queries

    def predict(self, embeddings: Tensor, boxes_cxcywh01: Tensor) -> tuple[Tensor, Tensor]:
        """Predict logits [B, N, K] and boxes [B, N, 4] (cxcywh, relative to the valid image; corrections of the references)."""
        references = self.references(boxes_cxcywh01)
        start = torch.logit(references, eps=1e-5)
        if references.shape[-1] == 2:
            start = torch.cat([start, torch.zeros_like(start)], dim=-1)
        return self.classes(embeddings), (self.boxes(embeddings) + start).sigmoid()


@dataclass(frozen=True)
class LevelSource:
    """How to make one level of the teacher's pyramid from the student's."""

    student: int
    """Index of the student level of nearest stride."""
    pools: int
    """Number of 2x2 max-pools of that level, for teacher levels coarser than the student's coarsest."""
    factor: float
    """Factor by which the sides are resized after the pools; 1 if the strides agree."""


def level_sources(student: DetectorSpec, teacher: DetectorSpec) -> tuple[LevelSource, ...]:
    """Choose a student level for each teacher level: the nearest stride, pooled if the teacher's level is coarser than all."""
    sources = []
    for stride in teacher.strides:
        nearest = min(range(len(student.strides)), key=lambda i: abs(math.log(student.strides[i] / stride)))
        own = student.strides[nearest]
        pools = max(0, round(math.log2(stride / own))) if own == max(student.strides) else 0
        sources.append(LevelSource(nearest, pools, own * 2**pools / stride))
    return tuple(sources)


class Adaptor(nn.Module):
    """Maps the student's pyramid to the teacher's levels and channels (phi): 1x1 convolutions, then deformable self-attention."""

    def __init__(self, student: DetectorSpec, teacher: DetectorSpec, channels: int, layers: int, points: int) -> None:
        """Build the convolutions for two pyramids and ``layers`` layers of attention (0: convolutions only)."""
        super().__init__()
        self.sources = level_sources(student, teacher)
        self.linear = nn.ModuleList(nn.Conv2d(student.channels[source.student], channels, 1) for source in self.sources)
        self.attention = DeformableEncoder(channels, len(self.sources), layers, points=points)

    def forward(self, features: Features, strides: Sequence[int], batch: Batch) -> Cells:
        """Compute the adapted pyramid on the teacher's strides."""
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
    """Flatten the maps of a pyramid, with the valid part of each map and its padding mask.

    The valid part is the ratio of the image's pixels to the pixels that the map covers, so reference points do not depend
    on the other images of the batch. A cell is masked if its first pixel is padding.
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
