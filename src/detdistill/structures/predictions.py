"""Predictions by family of detectors: ``Dense``, ``Regions`` and ``Queries``. ``Origin`` records the cell a box came from.

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
"""Sigmoid logit of a padded prediction: finite, with a probability of 2e-9."""


@dataclass(frozen=True)
class Dense(PerImage):
    """One prediction for each anchor or point of each level: one-stage detectors, and the first stage of two-stage ones."""

    logits: Tensor
    """[B, P, K] sigmoid logits, or [B, P, K+1] softmax logits with the background last."""
    deltas: Tensor
    """[B, P, R] box regression as the detector encodes it: 4 numbers, points, or the bins of all sides."""
    boxes_xyxy: Tensor
    """[B, P, 4] decoded, in pixels, not clipped; differentiable with respect to ``deltas``."""
    priors_xyxy: Tensor
    """[B, P, 4] anchors, or the square of one stride around each point."""
    levels: Tensor = field(metadata=SHARED)
    """[P] level of each prediction."""
    cells: Tensor = field(metadata=SHARED)
    """[P, 2] row and column of each prediction's cell on its level."""
    anchors: Tensor = field(metadata=SHARED)
    """[P] index of each prediction's anchor within its cell."""
    quality: Tensor | None = None
    """[B, P] logits of centerness or IoU; None if the detector predicts neither."""
    softmax: bool = field(default=False, metadata=SHARED)
    own: Any = field(default=None, metadata=SHARED)
    """Further outputs that only the detector's own loss and decoding read. They are not saved."""
    padding: Tensor | None = None
    """[B, P] bool, True where ``stack`` added a cell beyond an image's own maps (no object, empty box). None: no such cell."""

    def split(self, count: int) -> list[Self]:
        """Split into one prediction for each image; ``own`` is dropped."""
        return super(Dense, replace(self, own=None)).split(count)

    @classmethod
    def stack(cls, pieces: Sequence[Self]) -> Self:
        """Join the pieces of ``split`` again. If map sizes differ, all are padded to the smallest maps that contain them."""
        first = pieces[0]
        if all(torch.equal(piece.cells, first.cells) and torch.equal(piece.levels, first.levels) for piece in pieces):
            return super().stack([_with_padding(piece) for piece in pieces] if _any_padding(pieces) else pieces)
        return super().stack(_on_common_cells(pieces))

    def shrunk(self, factor: float, padding_hw: tuple[int, int], strides: Sequence[int]) -> Self:
        """The prediction for images that are ``factor`` times larger, on the cells of the smaller images and in their pixels.

        A cell of the result has the prediction of the larger images' cell at its centre, so scores and boxes stay together, and
        the anchors of a cell of its own size. ``deltas`` are empty, because they belong to the larger images' anchors, and
        ``own`` is dropped.

        Args:
            factor: size of the larger images divided by that of the smaller ones, 1 or more.
            padding_hw: padded height and width of the smaller images.
            strides: stride of each level.
        """
        at_centre, same_place = [], []
        for level, stride in enumerate(strides):
            here = torch.nonzero(self.levels == level).flatten()
            if len(here):
                rows, columns = (-(-side // stride) for side in padding_hw)
                found = _at_centres(self.cells[here], self.anchors[here], (rows, columns), factor)
                at_centre.append(here[found[0]])
                same_place.append(here[found[1]])
        centre, place = torch.cat(at_centre), torch.cat(same_place)
        return replace(
            self,
            logits=self.logits[:, centre],
            deltas=self.deltas[:, centre, :0],
            boxes_xyxy=self.boxes_xyxy[:, centre] / factor,
            priors_xyxy=self.priors_xyxy[:, place],
            levels=self.levels[place],
            cells=self.cells[place],
            anchors=self.anchors[place],
            quality=None if self.quality is None else self.quality[:, centre],
            padding=None if self.padding is None else self.padding[:, centre],
            own=None,
        )


def _at_centres(cells: Tensor, anchors: Tensor, shape_hw: tuple[int, int], factor: float) -> tuple[Tensor, Tensor]:
    """Predictions of a level at the centres of ``factor`` times larger cells, and those with the place of these cells.

    Args:
        cells: [P, 2] row and column of each prediction.
        anchors: [P] anchor of each prediction.
        shape_hw: rows and columns of the larger cells.
        factor: side of the larger cells.

    Returns:
        Two tensors [rows * columns * A] of indices along P, ordered by row, column and anchor.
    """
    size, several = cells.amax(dim=0) + 1, int(anchors.max()) + 1
    number = cells.new_zeros(int(size[0]), int(size[1]), several)
    number[cells[:, 0], cells[:, 1], anchors] = torch.arange(len(cells), device=cells.device)
    found = []
    for centred in (True, False):
        place = [torch.arange(count, device=cells.device) for count in shape_hw]
        if centred:
            place = [((line + 0.5) * factor).long() for line in place]
        row, column = (line.clamp(max=int(most) - 1) for line, most in zip(place, size, strict=True))
        found.append(number[row[:, None], column].flatten())
    return found[0], found[1]


def _any_padding(pieces: Sequence[Dense]) -> bool:
    return any(piece.padding is not None for piece in pieces)


def _with_padding(piece: D) -> D:
    if piece.padding is not None:
        return piece
    return replace(piece, padding=torch.zeros_like(piece.boxes_xyxy[..., 0], dtype=torch.bool))


def _on_common_cells(pieces: Sequence[D]) -> list[D]:
    """Pad predictions to maps of equal sizes; the result is in the order level, row, column, anchor."""
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
        """A number for each place, ascending in the order of ``grid``."""
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
    """Image, level, cell and anchor that each box came from; kept through ranking, NMS, sampling and inserted ground truth."""

    image: Tensor
    """[R] index of the image in the batch."""
    level: Tensor
    """[R] level; -1 for an inserted ground-truth box or a box given by the caller."""
    cell: Tensor
    """[R, 2] row and column; -1 where ``level`` is -1."""
    anchor: Tensor
    """[R] anchor of the cell; -1 where ``level`` is -1."""
    ground_truth: Tensor
    """[R] index of the ground-truth box for an inserted ground-truth box; -1 for all other boxes."""

    @staticmethod
    def given(counts: Sequence[int], device: torch.device | str = "cpu") -> Origin:
        """The origin of ``counts[b]`` boxes of each image b that the caller gives: only their image is known."""
        image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
        nowhere = torch.full_like(image, -1)
        return Origin(image, nowhere, nowhere[:, None].repeat(1, 2), nowhere, nowhere)

    def without_cells(self) -> Origin:
        """The origin with level, cell and anchor unknown."""
        return replace(self, **{name: torch.full_like(getattr(self, name), -1) for name in ("level", "cell", "anchor")})

    def __getitem__(self, index: Tensor) -> Origin:
        return map_tensors(self, lambda tensor: tensor[index])

    @staticmethod
    def cat(origins: Sequence[Origin]) -> Origin:
        """Concatenate origins."""
        names = [f.name for f in dataclasses.fields(Origin)]
        return Origin(*(torch.cat([getattr(origin, name) for origin in origins]) for name in names))


@dataclass(frozen=True)
class Regions(PerImage):
    """Predictions for boxes, flat over the batch: the second stage of two-stage detectors, or boxes that a method gives."""

    boxes_xyxy: Tensor
    """[R, 4] the boxes the region features were pooled from, no gradient."""
    origin: Origin
    logits: Tensor
    """[R, K+1] softmax logits, background last."""
    deltas: Tensor
    """[R, K, 4], or class-agnostic [R, 1, 4]: box regression as the detector encodes it."""
    refined_xyxy: Tensor
    """[R, K, 4] or [R, 1, 4] decoded boxes in pixels, not clipped; differentiable with respect to ``deltas``."""
    pooled: Tensor | None = None
    """[R, C, h, w] region features."""
    hidden: tuple[Tensor, ...] = ()
    """[R, D] outputs of the head's fully connected layers, in order; the output layers read the last one."""
    first: Dense | None = None
    """Prediction of the first stage (objectness: K = 1), or None."""
    first_assignment: Assignment | None = None
    """Assignment for the first stage's loss: anchors that ``predict`` did not sample in training mode are ignored."""
    previous: Regions | None = None
    """Prediction of the previous stage of a cascade."""
    own: Any = field(default=None, metadata=SHARED)
    """Further outputs that only the detector's own loss and decoding read. They are not saved."""

    @property
    def embedding(self) -> Tensor | None:
        """[R, D] the features that the predictor's output layers read."""
        return self.hidden[-1] if self.hidden else None

    def shrunk(self, factor: float, padding_hw: tuple[int, int], strides: Sequence[int]) -> Regions:
        """The prediction for images that are ``factor`` times larger, in the pixels of the smaller ones.

        The arguments are those of ``Dense.shrunk``, by which the first stage is converted. Its assignment, the cells that
        ``origin`` names, and ``own`` belong to the larger images and are dropped.
        """
        return replace(
            self,
            boxes_xyxy=self.boxes_xyxy / factor,
            refined_xyxy=self.refined_xyxy / factor,
            origin=self.origin.without_cells(),
            first=None if self.first is None else self.first.shrunk(factor, padding_hw, strides),
            first_assignment=None,
            previous=None if self.previous is None else self.previous.shrunk(factor, padding_hw, strides),
            own=None,
        )

    def before_refinement(self) -> Regions:
        """The prediction whose boxes no stage has moved: the first stage of a cascade, else this prediction itself."""
        return self if self.previous is None else self.previous.before_refinement()

    def rows(self, index: Tensor) -> Self:
        """The prediction for some of the regions, given by their rows, without first and previous stages and ``own``."""
        alone = replace(self, first=None, first_assignment=None, previous=None, own=None)
        return map_tensors(alone, lambda tensor: tensor[index])

    def split(self, count: int) -> list[Self]:
        """Split into one prediction for each image, with ``origin.image`` 0; ``first_assignment`` and ``own`` are dropped."""
        first = [None] * count if self.first is None else self.first.split(count)
        previous = [None] * count if self.previous is None else self.previous.split(count)
        pieces = []
        for index in range(count):
            flat = self.rows(self.origin.image == index)
            origin = replace(flat.origin, image=torch.zeros_like(flat.origin.image))
            pieces.append(replace(flat, origin=origin, first=first[index], previous=previous[index]))
        return pieces

    @classmethod
    def stack(cls, pieces: Sequence[Self]) -> Self:
        """Join the pieces of ``split`` again; ``origin.image`` becomes the index of the piece."""
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
    """Initial queries of a decoder. Another detector of the family can decode them, too."""

    content: Tensor
    """[B, N, D] initial query embedding."""
    position: Tensor | None = None
    """[B, N, D] positional embedding; None in families without one."""
    reference: Tensor | None = None
    """[B, N, 2] or [B, N, 4] reference points or boxes (cxcywh, 0..1 of the valid image); None in families without them."""


@dataclass(frozen=True)
class Queries(PerImage):
    """Predictions of a query decoder, one set for each decoder layer."""

    logits: Tensor = field(metadata=SECOND)
    """[L, B, N, K] sigmoid logits, or [L, B, N, K+1] softmax logits with the background last."""
    boxes_cxcywh01: Tensor = field(metadata=SECOND)
    """[L, B, N, 4] boxes as fractions of the valid image."""
    embedding: Tensor = field(metadata=SECOND)
    """[L, B, N, D] output of each decoder layer."""
    seed: QuerySeed
    attention: Tensor | None = field(default=None, metadata=SECOND)
    """[L, B, heads, N, S] cross-attention over S cells, if requested (``Look.attention``)."""
    softmax: bool = field(default=False, metadata=SHARED)
    own: Any = field(default=None, metadata=SHARED)
    self_attention: Tensor | None = field(default=None, metadata=SECOND)
    """[L, B, heads, N, N] self-attention of the queries, if requested (``Look.attention``)."""

    def last_layer(self) -> Self:
        """The prediction of the last decoder layer alone, without attention; the detector then assigns no other layer.

        ``own`` is reduced by its own ``last_layer``, if it has one.
        """
        own = self.own.last_layer() if hasattr(self.own, "last_layer") else self.own
        last = {name: getattr(self, name)[-1:] for name in ("logits", "boxes_cxcywh01", "embedding")}
        return replace(self, **last, attention=None, self_attention=None, own=own)

    def split(self, count: int) -> list[Self]:
        """Split into one prediction for each image; ``own`` is dropped."""
        return super(Queries, replace(self, own=None)).split(count)


@dataclass(frozen=True)
class BoxDistributions(PerImage):
    """Distributions of the four sides of boxes over steps: side left, top, right or bottom lies at ``origin + unit * step``."""

    logits: Tensor
    """[B, P, 4, S] logits of the softmax over the S steps of each side."""
    origins: Tensor
    """[B, P, 4] x or y in pixels of each side at step 0."""
    units: Tensor
    """[B, P, 4] pixels of one step; negative for left and top, whose coordinates fall with the distance."""
    steps: Tensor = field(metadata=SHARED)
    """[S] steps in ascending order; they need not be evenly spaced."""


Prediction = Dense | Regions | Queries
