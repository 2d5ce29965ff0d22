"""Transfer of initial queries between decoders: their format, missing parts, and learned layers that add these.

An initial query has a content, in some families a position embedding, and in some a reference (a point or a box). Two DETRs
with the same width and parts can decode each other's queries unchanged. Otherwise ``QueryBridge`` computes the missing parts
with learned layers, which no paper on DETRs describes; ``query_gaps`` lists the missing parts.

Shape letters: B images, N queries, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from detdistill.errors import DetdistillError
from detdistill.functional.modes import evaluating
from detdistill.functional.positions import sine_positions
from detdistill.structures import Batch, Features, Queries, QuerySeed, Target, View

CANVASES = (128, 256, 512, 1024, 2048)
"""Sides in pixels of the empty images that ``query_spec`` tries in turn, until there are enough cells for the queries."""
SMALL_SIDE = -2.0
"""Initial bias of learned box sizes: sigmoid(-2), about 0.12 of the image."""


class QueryDecoder(Protocol):
    """A detector with queries (``detectors.contract.HasQueries``)."""

    spec: Any

    def seed(self, features: Features, batch: Batch) -> QuerySeed:
        """The decoder's own initial queries."""
        ...

    def decode(self, features: Features, seed: QuerySeed, batch: Batch, attention: bool = False) -> Queries:
        """Decode the given initial queries."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """As ``torch.nn.Module``."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """As ``torch.nn.Module``."""
        ...


@dataclass(frozen=True)
class QueryFormat:
    """Parts of a decoder's initial queries, and their width."""

    width: int
    """D of content and position."""
    empty: bool
    """All contents are zeros; queries differ only in their other parts."""
    position: bool
    """There is a position embedding."""
    reference: int
    """Length of a reference: 0 (none), 2 (a point) or 4 (a box)."""

    @staticmethod
    def of(seed: QuerySeed) -> QueryFormat:
        """The format of given queries."""
        reference = 0 if seed.reference is None else seed.reference.shape[-1]
        return QueryFormat(seed.content.shape[-1], not bool(seed.content.any()), seed.position is not None, reference)


@dataclass(frozen=True)
class QuerySpec:
    """Formats of the queries that a decoder produces and reads, its size, and the attention maps it returns."""

    gives: QueryFormat
    """Format of the decoder's own initial queries."""
    reads: QueryFormat
    """Format that the decoder reads: as ``gives``, without a reference that does not change the result (Conditional DETR
    computes its own references from the positions)."""
    layers: int
    """Number of decoder layers."""
    width: int
    """Channels of the queries' embeddings."""
    heads: int
    """Number of heads of the attention maps; 0 if no maps are returned."""
    self_attention: bool
    """Self-attention maps of the queries are returned."""
    cross_attention: bool
    """Cross-attention maps over the cells of the detector's features are returned."""
    no_attention: str = ""
    """Reason, in words, if self-attention or cross-attention maps are missing; else empty."""

    @staticmethod
    def from_plain(content: Mapping[str, Any]) -> QuerySpec:
        """The inverse of ``dataclasses.asdict``."""
        formats = {name: QueryFormat(**content[name]) for name in ("gives", "reads")}
        return QuerySpec(**{**content, **formats})


@torch.no_grad()
def query_spec(decoder: QueryDecoder) -> QuerySpec:
    """Find the ``QuerySpec`` of a decoder by running it on maps of noise, without its backbone.

    Args:
        decoder: its mode, its statistics and the global random state are unchanged afterwards.

    Raises:
        DetdistillError: the decoder fails on all image sizes of ``CANVASES``.
    """
    refusal: DetdistillError | None = None
    with evaluating(decoder):
        for canvas in CANVASES:
            features, batch = _noise(decoder, canvas)
            try:
                own = decoder.seed(features, batch)
            except DetdistillError as error:  # choosing more queries than there are cells
                refusal = error
                continue
            pair = _first(own, 2)
            decoded = decoder.decode(features, pair, batch)
            gives = reads = QueryFormat.of(own)
            if pair.reference is not None:
                moved = QuerySeed(pair.content, pair.position, pair.reference * 0.5 + 0.2)
                if torch.equal(decoder.decode(features, moved, batch).boxes_cxcywh01, decoded.boxes_cxcywh01):
                    reads = QueryFormat(gives.width, gives.empty, gives.position, 0)
            layers, width = decoded.logits.shape[0], decoded.embedding.shape[-1]
            return QuerySpec(gives, reads, layers, width, *_attention(decoder, features, pair, batch))
    assert refusal is not None
    raise refusal


def _attention(decoder: QueryDecoder, features: Features, seed: QuerySeed, batch: Batch) -> tuple[int, bool, bool, str]:
    """Number of heads, whether self-attention and cross-attention maps are returned, and the reason if one is missing."""
    try:
        decoded = decoder.decode(features, seed, batch, attention=True)
    except DetdistillError as error:
        return 0, False, False, str(error)
    among, cross = decoded.self_attention, decoded.attention
    heads = next((maps.shape[2] for maps in (among, cross) if maps is not None), 0)
    cells = sum(level.shape[-2] * level.shape[-1] for level in features.maps)
    if cross is not None and cross.shape[-1] != cells:
        return heads, among is not None, False, f"{decoder.spec.name} looks at other maps than its features"
    why = "" if among is not None and cross is not None else f"{decoder.spec.name} shows no such maps"
    return heads, among is not None, cross is not None, why


def _noise(decoder: QueryDecoder, canvas: int) -> tuple[Features, Batch]:
    parameter = next(iter(decoder.parameters()))
    generator = torch.Generator().manual_seed(0)
    maps = []
    for channels, stride in zip(decoder.spec.channels, decoder.spec.strides, strict=True):
        side = -(-canvas // stride)
        maps.append(torch.randn(1, channels, side, side, generator=generator).to(parameter))
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    images = torch.zeros(1, 3, canvas, canvas)
    batch = Batch(images, torch.tensor([[canvas, canvas]]), (empty,), (0,), (View((canvas, canvas), (canvas, canvas)),))
    return Features(tuple(maps), tuple(decoder.spec.strides)), batch.to(parameter.device)


def _first(seed: QuerySeed, count: int) -> QuerySeed:
    parts = (seed.content, seed.position, seed.reference)
    content, position, reference = (None if part is None else part[:, :count] for part in parts)
    assert content is not None
    return QuerySeed(content, position, reference)


def query_gaps(gives: QueryFormat, reads: QueryFormat) -> list[str]:
    """Parts that a decoder reads but given queries lack, in words; empty if the decoder can decode the queries unchanged."""
    gaps = []
    if not gives.empty and gives.width != reads.width:
        gaps.append(f"contents of {reads.width} channels (these have {gives.width})")
    if reads.position and not gives.position:
        gaps.append("position embeddings")
    elif reads.position and gives.width != reads.width:
        gaps.append(f"position embeddings of {reads.width} channels (these have {gives.width})")
    if reads.reference > gives.reference:
        gaps.append("reference boxes" + (" (these have points)" if gives.reference else "") if reads.reference == 4 else "points")
    return gaps


class QueryBridge(nn.Module):
    """Convert queries to the format that a decoder reads. Parts it does not read are dropped, boxes are reduced to points.

    Learned layers compute the parts that ``query_gaps`` lists: a linear layer between widths; two layers from the sine code of
    the reference (or from the content) to a position; one layer from content and position to a reference or to the size of a
    box. Without gaps there are no parameters. No gradient flows to the queries.
    """

    def __init__(self, gives: QueryFormat, reads: QueryFormat) -> None:
        """Build the layers that are needed.

        Args:
            gives: format of the queries.
            reads: format that the decoder reads.
        """
        super().__init__()
        self.gives, self.reads = gives, reads
        narrow = gives.width != reads.width
        self.content = nn.Linear(gives.width, reads.width) if narrow and not gives.empty else None
        self.position: nn.Module | None = None
        if reads.position and not gives.position:
            size = reads.width
            first = nn.Linear(gives.reference * size // 2 if gives.reference else gives.width, size)
            self.position = nn.Sequential(first, nn.ReLU(), nn.Linear(size, size))
        elif reads.position and narrow:
            self.position = nn.Linear(gives.width, reads.width)
        self.reference: nn.Linear | None = None
        if reads.reference > gives.reference:
            self.reference = nn.Linear(gives.width, reads.reference - gives.reference)
            with torch.no_grad():
                self.reference.bias[-2:] = SMALL_SIDE if reads.reference == 4 else 0.0

    def forward(self, seed: QuerySeed) -> QuerySeed:
        """Convert queries: content [B, N, D], position [B, N, D] or None, reference [B, N, 2 or 4] or None."""
        seed = QuerySeed(seed.content, seed.position, seed.reference).detach()
        if self.gives.empty:
            content = seed.content.new_zeros(*seed.content.shape[:2], self.reads.width)
        else:
            content = seed.content if self.content is None else self.content(seed.content)
        return QuerySeed(content, self._position(seed), self._reference(seed))

    def _position(self, seed: QuerySeed) -> Tensor | None:
        if not self.reads.position:
            return None
        if seed.position is None:
            assert self.position is not None
            read = seed.content if seed.reference is None else _sines(seed.reference, self.reads.width)
            position: Tensor = self.position(read)
            return position
        return seed.position if self.position is None else self.position(seed.position)

    def _reference(self, seed: QuerySeed) -> Tensor | None:
        if self.reads.reference == 0:
            return None
        given = seed.content.new_zeros(*seed.content.shape[:2], 0) if seed.reference is None else seed.reference
        if self.reference is None:
            return given[..., : self.reads.reference]
        hidden = seed.content if seed.position is None else seed.content + seed.position
        return torch.cat([given, self.reference(hidden).sigmoid()], dim=-1)


def _sines(reference: Tensor, width: int) -> Tensor:
    """[B, N, width or 2 * width] sine code of the centre, and of the size, of references [B, N, 2 or 4]."""
    parts = [reference[..., start : start + 2] for start in range(0, reference.shape[-1], 2)]
    return torch.cat([sine_positions(part, width) for part in parts], dim=-1)


def random_queries(wanted: QueryFormat, count: int, like: Tensor) -> QuerySeed:
    """Draw random initial queries, the same for all images: contents (zeros if ``wanted.empty``) and positions are normal.

    References are the sigmoid of normal numbers. torch's global random numbers of the CPU are used, so that equal seeds give
    equal queries on any device.

    Args:
        wanted: parts and width of the queries.
        count: N.
        like: tensor whose device, floating-point type and first dimension (B) the queries get.
    """

    def draw(width: int) -> Tensor:
        return torch.randn(count, width).to(like).expand(len(like), -1, -1)

    content = like.new_zeros(len(like), count, wanted.width) if wanted.empty else draw(wanted.width)
    position = draw(wanted.width) if wanted.position else None
    return QuerySeed(content, position, draw(wanted.reference).sigmoid() if wanted.reference else None)


def giou_with_eps(first_cxcywh: Tensor, second_cxcywh: Tensor, eps: float = 1e-6) -> Tensor:
    """[...] generalised IoU of boxes [..., 4] as in released DETRs: ``eps`` is added to both denominators.

    ``functional.boxes`` clamps the denominators instead; for boxes as fractions of the image the fifth digit differs.
    """
    first, second = _corners(first_cxcywh), _corners(second_cxcywh)
    areas = [(box[..., 2:] - box[..., :2]).prod(dim=-1) for box in (first, second)]
    overlap = (torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])).clamp(min=0)
    around = (torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])).clamp(min=0)
    inside, hull = overlap.prod(dim=-1), around.prod(dim=-1)
    union = areas[0] + areas[1] - inside
    return inside / (union + eps) - (hull - union) / (hull + eps)


def _corners(boxes: Tensor) -> Tensor:
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], dim=-1)
