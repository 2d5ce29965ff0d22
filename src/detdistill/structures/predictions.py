"""Predictions by family (dense, on regions, of queries); every box keeps its origin.

Shape letters: B images, L levels (or decoder layers), P dense predictions of an image, R regions of the whole batch,
N queries of an image, K classes, D embedding width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor

from detdistill.structures.base import SECOND, SHARED, Movable, PerImage, map_tensors
from detdistill.structures.targets import Assignment

D = TypeVar("D", bound="Dense")


NO_OBJECT = -20.0
"""Sigmoid logit of what cannot be there: a probability of 2e-9, and still a number to calculate with."""


@dataclass(frozen=True)
class Dense(PerImage):
    """One prediction for each anchor or point of each level: one-stage detectors, and the first stage of two-stage ones."""

    logits: Tensor
    """[B, P, K] sigmoid logits, or [B, P, K+1] softmax logits with the background last."""
    deltas: Tensor
    """[B, P, R] the regression as the detector encodes it (4, or bins of a distribution)."""
    boxes_xyxy: Tensor
    """[B, P, 4] decoded, in pixels, not clipped; differentiable with respect to ``deltas``."""
    priors_xyxy: Tensor
    """[B, P, 4] anchors, or the square of one stride around each point."""
    levels: Tensor = field(metadata=SHARED)
    """[P] level of each prediction."""
    cells: Tensor = field(metadata=SHARED)
    """[P, 2] row and column on its level."""
    anchors: Tensor = field(metadata=SHARED)
    """[P] which anchor of the cell."""
    quality: Tensor | None = None
    """[B, P] logits of centerness or IoU, where the detector has them."""
    softmax: bool = field(default=False, metadata=SHARED)
    own: Any = field(default=None, metadata=SHARED)
    """The adapter's own outputs, for its own loss and decoding. Nobody else reads them; they are not saved."""
    padding: Tensor | None = None
    """[B, P] bool, True where ``stack`` added a cell beyond an image's own maps: no object, an empty box; None: nowhere."""

    def split(self, count: int) -> list[Self]:
        """One value for each image, without the adapter's own outputs."""
        return super(Dense, replace(self, own=None)).split(count)

    @classmethod
    def stack(cls, pieces: Sequence[Self]) -> Self:
        """The inverse of ``split``; predictions on maps of different sizes are laid on the smallest maps that hold them all."""
        first = pieces[0]
        if all(torch.equal(piece.cells, first.cells) and torch.equal(piece.levels, first.levels) for piece in pieces):
            return super().stack([_with_padding(piece) for piece in pieces] if _any_padding(pieces) else pieces)
        return super().stack(_on_common_cells(pieces))


def _any_padding(pieces: Sequence[Dense]) -> bool:
    return any(piece.padding is not None for piece in pieces)


def _with_padding(piece: D) -> D:
    if piece.padding is not None:
        return piece
    return replace(piece, padding=torch.zeros_like(piece.boxes_xyxy[..., 0], dtype=torch.bool))


def _on_common_cells(pieces: Sequence[D]) -> list[D]:
    """The same predictions on maps of one size, in the order level, row, column, anchor."""
    places = [torch.stack([p.levels, *p.cells.unbind(1), p.anchors], dim=1) for p in pieces]
    depth = max(int(place[:, 0].max()) for place in places) + 1
    wanted = []
    for level in range(depth):
        here = torch.cat([place[place[:, 0] == level] for place in places])
        if len(here):
            rows, columns, anchors = (torch.arange(int(size) + 1, device=here.device) for size in here[:, 1:].amax(dim=0))
            wanted.append(torch.cartesian_prod(torch.full_like(rows[:1], level), rows, columns, anchors))
    grid = torch.cat(wanted)
    spread = grid.amax(dim=0) + 1

    def number(place: Tensor) -> Tensor:
        """Of each place, rising in the order of ``grid``."""
        return ((place[:, 0] * spread[1] + place[:, 1]) * spread[2] + place[:, 2]) * spread[3] + place[:, 3]

    numbers = number(grid)
    laid = []
    for piece, place in zip(pieces, places, strict=True):
        index = torch.searchsorted(numbers, number(place))

        def lay(tensor: Tensor, empty: float, index: Tensor = index) -> Tensor:
            whole = tensor.new_full((tensor.shape[0], len(grid), *tensor.shape[2:]), empty)
            whole[:, index] = tensor
            return whole

        logits = lay(piece.logits, NO_OBJECT)
        masked = lay(
            torch.zeros_like(piece.boxes_xyxy[..., 0], dtype=torch.bool) if piece.padding is None else piece.padding, True
        )
        if piece.softmax:
            logits[..., -1] = logits[..., -1].masked_fill(masked, 0.0)
        laid.append(
            replace(
                piece,
                logits=logits,
                deltas=lay(piece.deltas, 0.0),
                boxes_xyxy=lay(piece.boxes_xyxy, 0.0),
                priors_xyxy=lay(piece.priors_xyxy, 0.0),
                levels=grid[:, 0],
                cells=grid[:, 1:3],
                anchors=grid[:, 3],
                quality=None if piece.quality is None else lay(piece.quality, NO_OBJECT),
                padding=masked,
            )
        )
    return laid


@dataclass(frozen=True)
class Origin(Movable):
    """Where boxes came from, through ranking, NMS, sampling and the insertion of ground truth."""

    image: Tensor
    """[R] index of the image in the batch."""
    level: Tensor
    """[R] level, -1 for an inserted ground-truth box or a box given by the caller."""
    cell: Tensor
    """[R, 2] row and column, -1 likewise."""
    anchor: Tensor
    """[R] anchor of the cell, -1 likewise."""
    ground_truth: Tensor
    """[R] index of the ground-truth box this box IS, -1 for all others."""

    @staticmethod
    def given(counts: Sequence[int], device: torch.device | str = "cpu") -> Origin:
        """The origin of boxes that came from the caller: only their image is known."""
        image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
        nowhere = torch.full_like(image, -1)
        return Origin(image, nowhere, nowhere[:, None].repeat(1, 2), nowhere, nowhere)

    def __getitem__(self, index: Tensor) -> Origin:
        return map_tensors(self, lambda tensor: tensor[index])

    @staticmethod
    def cat(origins: Sequence[Origin]) -> Origin:
        """Several origins in a row."""
        names = [f.name for f in dataclasses.fields(Origin)]
        return Origin(*(torch.cat([getattr(origin, name) for origin in origins]) for name in names))


@dataclass(frozen=True)
class Regions(PerImage):
    """Predictions on boxes: the second stage of two-stage detectors, or any box somebody asks about. Flat over the batch."""

    boxes_xyxy: Tensor
    """[R, 4] the boxes the region features were pooled from, no gradient."""
    origin: Origin
    logits: Tensor
    """[R, K+1] softmax logits, background last."""
    deltas: Tensor
    """[R, K, 4] or class-agnostic [R, 1, 4], as the detector encodes them."""
    refined_xyxy: Tensor
    """[R, K, 4] or [R, 1, 4] decoded boxes in pixels, not clipped; differentiable with respect to ``deltas``."""
    pooled: Tensor | None = None
    """[R, C, h, w] region features."""
    hidden: tuple[Tensor, ...] = ()
    """[R, D] outputs of the head's fully connected layers, in their order; the predictor reads the last."""
    first: Dense | None = None
    """The first stage's prediction (objectness: K = 1), when there was one."""
    first_assignment: Assignment | None = None
    """Which anchors the first stage's loss is taken over: those that ``predict`` sampled in training mode, others ignored."""
    previous: Regions | None = None
    """The stage before, for cascades."""
    own: Any = field(default=None, metadata=SHARED)
    """As in ``Dense``."""

    @property
    def embedding(self) -> Tensor | None:
        """[R, D] the features that the predictor's output layers read."""
        return self.hidden[-1] if self.hidden else None

    def split(self, count: int) -> list[Self]:
        """One value for each image; ``origin.image`` is 0 in each of them. The first stage's samples stay behind."""
        first = [None] * count if self.first is None else self.first.split(count)
        previous = [None] * count if self.previous is None else self.previous.split(count)
        alone = replace(self, first=None, first_assignment=None, previous=None, own=None)
        pieces = []
        for index in range(count):
            mine = self.origin.image == index
            flat = map_tensors(alone, lambda tensor, mine=mine: tensor[mine])  # type: ignore[misc]
            origin = replace(flat.origin, image=torch.zeros_like(flat.origin.image))
            pieces.append(replace(flat, origin=origin, first=first[index], previous=previous[index]))
        return pieces

    @classmethod
    def stack(cls, pieces: Sequence[Self]) -> Self:
        """The inverse of ``split``; image indices count through the pieces."""
        leading = pieces[0]
        joined: dict[str, Any] = {}
        for name in ("boxes_xyxy", "logits", "deltas", "refined_xyxy", "pooled"):
            joined[name] = None if getattr(leading, name) is None else torch.cat([getattr(piece, name) for piece in pieces])
        joined["hidden"] = tuple(torch.cat(layers) for layers in zip(*(piece.hidden for piece in pieces), strict=True))
        counted = [replace(piece.origin, image=piece.origin.image + index) for index, piece in enumerate(pieces)]
        joined["origin"] = Origin.cat(counted)
        joined["first"] = None if leading.first is None else Dense.stack([cast(Dense, piece.first) for piece in pieces])
        joined["previous"] = None if leading.previous is None else Regions.stack([cast(Regions, p.previous) for p in pieces])
        return replace(leading, **joined)


@dataclass(frozen=True)
class QuerySeed(PerImage):
    """Where a query decoder starts: enough for another detector of the family to decode somebody else's queries."""

    content: Tensor
    """[B, N, D] initial query embedding."""
    position: Tensor | None = None
    """[B, N, D] positional embedding, where the family adds one."""
    reference: Tensor | None = None
    """[B, N, 2] or [B, N, 4] reference points or boxes (cxcywh, 0..1 of the valid image)."""


@dataclass(frozen=True)
class Queries(PerImage):
    """Predictions of a query decoder, one set for each decoder layer."""

    logits: Tensor = field(metadata=SECOND)
    """[L, B, N, K] sigmoid logits, or [L, B, N, K+1] softmax logits with the background last."""
    boxes_cxcywh01: Tensor = field(metadata=SECOND)
    """[L, B, N, 4] in parts of the valid image."""
    embedding: Tensor = field(metadata=SECOND)
    """[L, B, N, D]."""
    seed: QuerySeed
    attention: Tensor | None = field(default=None, metadata=SECOND)
    """[L, B, heads, N, S] cross-attention, on request."""
    softmax: bool = field(default=False, metadata=SHARED)
    own: Any = field(default=None, metadata=SHARED)
    self_attention: Tensor | None = field(default=None, metadata=SECOND)
    """[L, B, heads, N, N] of the queries among themselves, with ``attention``."""

    def split(self, count: int) -> list[Self]:
        """One value for each image, without the adapter's own outputs."""
        return super(Queries, replace(self, own=None)).split(count)


Prediction = Dense | Regions | Queries
