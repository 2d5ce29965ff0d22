"""The nouns every room shares: frozen dataclasses of tensors, torch only, units in the names.

Shape letters: B images, L levels (or decoder layers), P dense predictions of an image, R regions of the whole batch,
N queries of an image, M positives of the whole batch, K classes, D embedding width, G ground-truth boxes of an image.

Class labels are ``0 .. K-1``; the background is never a label. Softmax detectors have K+1 logits, **background last**.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")
D = TypeVar("D", bound="Dense")


def map_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """Return a copy of a (nested) structure with ``change`` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return cast(T, change(value))
    if isinstance(value, tuple):
        return cast(T, tuple(map_tensors(item, change) for item in value))
    if isinstance(value, list):
        return cast(T, [map_tensors(item, change) for item in value])
    if isinstance(value, Mapping):
        return cast(T, {key: map_tensors(item, change) for key, item in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: map_tensors(getattr(value, f.name), change) for f in dataclasses.fields(value) if f.init}
        return cast(T, replace(cast(Any, value), **changed))
    return value


class Movable:
    """A structure whose tensors move, detach and cast together."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy to a device; tensors already there are shared."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def detach(self) -> Self:
        """The same values without a graph."""
        return map_tensors(self, torch.Tensor.detach)

    def float(self) -> Self:
        """Floating-point tensors as float32 (float64 stays); integers and masks as they are."""
        return map_tensors(self, lambda t: t.float() if t.is_floating_point() and t.dtype != torch.float64 else t)


# ---------------------------------------------------------------------------------------------------------- the input


@dataclass(frozen=True)
class View:
    """Which version of an image a tensor shows: enough to undo its geometry, and half of the cache's key.

    A pixel ``(x, y)`` of the original lies at ``(x * scale_xy[0] + offset_xy[0], y * scale_xy[1] + offset_xy[1])``;
    after that, if ``flip``, ``x`` becomes ``size_hw[1] - x``.
    """

    original_hw: tuple[int, int]
    size_hw: tuple[int, int]
    scale_xy: tuple[float, float] = (1.0, 1.0)
    offset_xy: tuple[float, float] = (0.0, 0.0)
    flip: bool = False
    photometric: tuple[float, ...] = ()
    """Factors of brightness, contrast, saturation and hue; empty when the colours are the file's."""
    mosaic: tuple[int, ...] = ()
    """Ids of the images that make up a mosaic; empty for a single image. A mosaic has no way back."""

    @property
    def key(self) -> str:
        """A short text, equal for equal views of one image."""
        parts = [f"{self.size_hw[0]}x{self.size_hw[1]}"]
        if self.scale_xy != (1.0, 1.0) or self.offset_xy != (0.0, 0.0):
            parts.append(",".join(f"{number:.6g}" for number in (*self.scale_xy, *self.offset_xy)))
        if self.flip:
            parts.append("flip")
        if self.photometric:
            parts.append("photo" + ",".join(f"{number:.4g}" for number in self.photometric))
        if self.mosaic:
            parts.append("mosaic" + ",".join(map(str, self.mosaic)))
        return "-".join(parts)

    def to_original(self, boxes_xyxy: Tensor) -> Tensor:
        """Boxes ``[N, 4]`` in pixels of this view, in pixels of the original image (not clipped).

        Raises:
            ValueError: the view is a mosaic, which has no single original.
        """
        if self.mosaic:
            raise ValueError("a mosaic has no single original image; evaluate on plain views")
        x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
        if self.flip:
            x1, x2 = self.size_hw[1] - x2, self.size_hw[1] - x1
        (scale_x, scale_y), (offset_x, offset_y) = self.scale_xy, self.offset_xy
        columns = ((x1 - offset_x) / scale_x, (y1 - offset_y) / scale_y, (x2 - offset_x) / scale_x, (y2 - offset_y) / scale_y)
        return torch.stack(columns, dim=-1)


@dataclass(frozen=True)
class Target(Movable):
    """Ground truth of one image."""

    boxes_xyxy: Tensor
    """[G, 4] float, pixels of the batch's image tensor."""
    labels: Tensor
    """[G] int64, 0 .. K-1."""
    crowd: Tensor
    """[G] bool; crowd boxes are ignored by training and handled by COCO's rule in evaluation."""
    masks: Tensor | None = None
    """[G, H, W] bool, when the data has masks and the detector wants them."""

    def __len__(self) -> int:
        return self.boxes_xyxy.shape[0]

    def without_crowd(self) -> Target:
        """The boxes that training may use."""
        if not bool(self.crowd.any()):
            return self
        return map_tensors(self, lambda tensor: tensor[~self.crowd])


@dataclass(frozen=True)
class Batch(Movable):
    """What detectors and methods are given: images and all that belongs to them."""

    images: Tensor
    """[B, 3, H, W] RGB in 0..1, zero-padded on the right and at the bottom, NOT normalised."""
    sizes: Tensor
    """[B, 2] int64: valid height and width of each image inside the padding."""
    targets: tuple[Target, ...]
    ids: tuple[int, ...]
    """Image ids as in the data set's annotations."""
    views: tuple[View, ...]
    canvases_hw: tuple[tuple[int, int], ...] | None = None
    """Height and width that each image would be padded to in a batch of its own; None: those of ``images`` for all."""

    def __len__(self) -> int:
        return self.images.shape[0]

    def by_canvas(self) -> list[tuple[list[int], Batch]]:
        """The images (their indices) and a batch for each canvas, on which nothing shows what else was in this batch."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, canvas in enumerate(self.canvases_hw or [self.padding_hw] * len(self)):
            groups.setdefault(canvas, []).append(index)
        if list(groups) == [self.padding_hw]:
            return [(groups[self.padding_hw], self)]
        return [(chosen, self._on_canvas(chosen, canvas)) for canvas, chosen in groups.items()]

    def _on_canvas(self, chosen: Sequence[int], canvas_hw: tuple[int, int]) -> Batch:
        height, width = canvas_hw
        targets = [self.targets[index] for index in chosen]
        masks = [None if target.masks is None else target.masks[:, :height, :width] for target in targets]
        return Batch(
            self.images[list(chosen), :, :height, :width],
            self.sizes[list(chosen)],
            tuple(replace(target, masks=mask) for target, mask in zip(targets, masks, strict=True)),
            tuple(self.ids[index] for index in chosen),
            tuple(self.views[index] for index in chosen),
        )

    def with_targets(self, targets: Sequence[Target]) -> Batch:
        """The same images with other boxes (SSD-Det refines them inside the step).

        Raises:
            ValueError: not one target for each image.
        """
        if len(targets) != len(self):
            raise ValueError(f"with_targets: {len(self)} images need {len(self)} targets, got {len(targets)}")
        return replace(self, targets=tuple(targets))

    @property
    def padding_hw(self) -> tuple[int, int]:
        """Height and width of the padded tensor."""
        return self.images.shape[-2], self.images.shape[-1]

    def padding_mask(self) -> Tensor:
        """[B, H, W] bool, True where the pixel is padding."""
        height, width = self.padding_hw
        rows = torch.arange(height, device=self.images.device)[None, :, None] >= self.sizes[:, 0, None, None]
        columns = torch.arange(width, device=self.images.device)[None, None, :] >= self.sizes[:, 1, None, None]
        return rows | columns


# --------------------------------------------------------------------------------- knowledge that is split and stacked


SHARED = {"axis": None}
"""Metadata of a field that is the same for all images of the batch."""
SECOND = {"axis": 1}
"""Metadata of a field whose images lie along its second dimension."""


@dataclass(frozen=True)
class PerImage(Movable):
    """Anything a batch yields that can be split by image, stacked again, cast and saved.

    Fields are tensors with the images first, tuples of such tensors (one for each level), other ``PerImage`` values,
    or None. A field marked ``SECOND`` has its images second; one marked ``SHARED`` belongs to the batch.
    """

    def split(self, count: int) -> list[Self]:
        """One value for each of the ``count`` images; images keep a leading dimension of 1."""
        pieces: list[Self] = []
        for index in range(count):
            cut: dict[str, Any] = {}
            for f in dataclasses.fields(self):
                value = getattr(self, f.name)
                axis = f.metadata.get("axis", 0)
                cut[f.name] = value if axis is None else _cut(value, index, count, axis)
            pieces.append(replace(self, **cut))
        return pieces

    @classmethod
    def stack(cls, pieces: Sequence[Self]) -> Self:
        """The inverse of ``split``; what differs in size is zero-padded at its end: maps on the right and at the bottom."""
        first = pieces[0]
        joined: dict[str, Any] = {}
        for f in dataclasses.fields(first):
            axis = f.metadata.get("axis", 0)
            values = [getattr(piece, f.name) for piece in pieces]
            joined[f.name] = values[0] if axis is None else _join(values, axis)
        return replace(first, **joined)


def _cut(value: Any, index: int, count: int, axis: int) -> Any:
    if isinstance(value, Tensor):
        return value.narrow(axis, index, 1)
    if isinstance(value, PerImage):
        return value.split(count)[index]
    if isinstance(value, tuple):
        return tuple(_cut(item, index, count, axis) for item in value)
    if value is None:
        return None
    raise TypeError(
        f"a {type(value).__name__} cannot be split by image; use tensors, tuples or PerImage, or mark the field SHARED"
    )


def _join(values: Sequence[Any], axis: int) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        if axis == 0 and len({tuple(value.shape[1:]) for value in values}) > 1:
            largest = [max(value.shape[dim] for value in values) for dim in range(first.ndim)]
            values = [_padded(value, largest) for value in values]
        return torch.cat(list(values), dim=axis)
    if isinstance(first, PerImage):
        return type(first).stack(values)
    if isinstance(first, tuple):
        return tuple(_join([value[i] for value in values], axis) for i in range(len(first)))
    return first


def _padded(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros (False) at the end of every dimension but the first."""
    missing = [(0, wanted - has) for has, wanted in zip(value.shape[1:], shape[1:], strict=True)]
    return torch.nn.functional.pad(value, [number for pair in reversed(missing) for number in pair])


@dataclass(frozen=True)
class Features(PerImage):
    """A pyramid: the neck's maps (DETR families: the encoder's), or the backbone's."""

    maps: tuple[Tensor, ...]
    """L tensors [B, C_l, H_l, W_l], finest first."""
    strides: tuple[int, ...] = field(metadata=SHARED)
    """Pixels of the image tensor for one step on each map."""
    padding: tuple[Tensor, ...] | None = None
    """L masks [B, H_l, W_l] bool, True where a cell shows padding only; None when nothing is padded."""

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each map."""
        return tuple(level.shape[1] for level in self.maps)

    def take(self, levels: Sequence[int]) -> Features:
        """The pyramid of some levels (indices), in the order given."""
        padding = None if self.padding is None else tuple(self.padding[level] for level in levels)
        return Features(tuple(self.maps[level] for level in levels), tuple(self.strides[level] for level in levels), padding)

    def split(self, count: int) -> list[Self]:
        """One pyramid for each image; without masks where the image fills its maps, whatever the others do."""
        pieces = super().split(count)
        return [piece if _masks_something(piece) else replace(piece, padding=None) for piece in pieces]

    @classmethod
    def stack(cls, pieces: Sequence[Self]) -> Self:
        """The inverse of ``split``; where maps of different sizes are zero-padded, the mask says so."""
        joined = super().stack([replace(piece, padding=None) for piece in pieces])
        sizes = {tuple(level.shape[-2:] for level in piece.maps) for piece in pieces}
        if len(sizes) == 1 and all(piece.padding is None for piece in pieces):
            return joined
        padding = []
        for index, level in enumerate(joined.maps):
            mask = torch.ones_like(level[:, 0], dtype=torch.bool)
            first = 0
            for piece in pieces:
                count, _, height, width = piece.maps[index].shape
                mask[first : first + count, :height, :width] = False if piece.padding is None else piece.padding[index]
                first += count
            padding.append(mask)
        return replace(joined, padding=tuple(padding))


def _masks_something(features: Features) -> bool:
    return features.padding is not None and any(bool(mask.any()) for mask in features.padding)


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
    embedding: Tensor | None = None
    """[R, D] what the predictor's last layer reads."""
    rpn: Dense | None = None
    """The first stage's predictions (objectness: K = 1), when there was one."""
    previous: Regions | None = None
    """The stage before, for cascades."""
    own: Any = field(default=None, metadata=SHARED)
    """As in ``Dense``."""

    def split(self, count: int) -> list[Self]:
        """One value for each image; ``origin.image`` is 0 in each of them."""
        rpn = [None] * count if self.rpn is None else self.rpn.split(count)
        previous = [None] * count if self.previous is None else self.previous.split(count)
        pieces = []
        for index in range(count):
            mine = self.origin.image == index
            flat = map_tensors(replace(self, rpn=None, previous=None, own=None), lambda tensor, mine=mine: tensor[mine])  # type: ignore[misc]
            origin = replace(flat.origin, image=torch.zeros_like(flat.origin.image))
            pieces.append(replace(flat, origin=origin, rpn=rpn[index], previous=previous[index]))
        return pieces

    @classmethod
    def stack(cls, pieces: Sequence[Self]) -> Self:
        """The inverse of ``split``; image indices count through the pieces."""
        first = pieces[0]
        joined: dict[str, Any] = {}
        for name in ("boxes_xyxy", "logits", "deltas", "refined_xyxy", "pooled", "embedding"):
            joined[name] = None if getattr(first, name) is None else torch.cat([getattr(piece, name) for piece in pieces])
        counted = [replace(piece.origin, image=piece.origin.image + index) for index, piece in enumerate(pieces)]
        joined["origin"] = Origin.cat(counted)
        joined["rpn"] = None if first.rpn is None else Dense.stack([cast(Dense, piece.rpn) for piece in pieces])
        joined["previous"] = None if first.previous is None else Regions.stack([cast(Regions, p.previous) for p in pieces])
        return replace(first, **joined)


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


@dataclass(frozen=True)
class Taught(PerImage):
    """What the teacher says about a batch. A method with more to say than ``Observation`` derives its own dataclass."""


@dataclass(frozen=True)
class Observation(Taught):
    """What one forward pass of a detector showed: the student's as ``seen``, the teacher's as the default ``taught``."""

    features: Features
    backbone_features: Features | None = None
    prediction: Prediction | None = None


@dataclass(frozen=True)
class TaughtTogether(Taught):
    """What the methods of a composition were taught, in their order."""

    parts: tuple[Taught | None, ...]


# --------------------------------------------------------------------------------------------- targets of predictions

NEGATIVE = -1
IGNORED = -2


@dataclass(frozen=True)
class Assignment(Movable):
    """Which prediction answers for which ground-truth box. A value, so that it can come from anyone."""

    matched: Tensor
    """int64; index of the ground-truth box within its image's ``Target`` (crowd boxes counted), -1 negative, -2 ignored.
    [B, P] for ``Dense``, [R] for ``Regions``, [L, B, N] for ``Queries``."""
    weights: Tensor | None = None
    """Same shape, or None for all ones."""
    normalizer: Tensor | None = None
    """[] what the losses are divided by, or None for the detector's own rule."""

    def as_ignored(self, where: Tensor) -> Assignment:
        """The same with the predictions of a bool mask taken out of every loss."""
        return replace(self, matched=self.matched.masked_fill(where, IGNORED))


@dataclass(frozen=True)
class Positives(Movable):
    """The predictions that an assignment made responsible for a box, flat over the batch (and over decoder layers)."""

    image: Tensor
    """[M] index of the image."""
    ground_truth: Tensor
    """[M] index of the box within its image."""
    index: Tensor
    """[M] index of the prediction: along P, R or N."""
    layer: Tensor
    """[M] decoder layer; 0 for other families."""
    labels: Tensor
    """[M] class of the box."""
    targets_xyxy: Tensor
    """[M, 4] the box itself, pixels."""
    logits: Tensor
    """[M, K] (sigmoid) or [M, K+1] (softmax, background last)."""
    boxes_xyxy: Tensor
    """[M, 4] predicted box in pixels, differentiable."""
    softmax: bool = False

    def __len__(self) -> int:
        return self.image.shape[0]


@dataclass(frozen=True)
class Detections(Movable):
    """Final boxes of one image, best first."""

    boxes_xyxy: Tensor
    """[D, 4] pixels of the batch's image tensor."""
    scores: Tensor
    """[D] 0..1."""
    labels: Tensor
    """[D] 0 .. K-1."""
    origin: Origin | None = None

    def __len__(self) -> int:
        return self.boxes_xyxy.shape[0]


# ----------------------------------------------------------------------------------------------------------- the step


@dataclass(frozen=True)
class Losses:
    """Loss terms, already weighted: ALL of ``terms`` are summed. ``monitors`` are shown and never trained on."""

    terms: Mapping[str, Tensor]
    monitors: Mapping[str, Tensor] = field(default_factory=dict)

    def total(self) -> Tensor:
        """[] the sum of all terms."""
        return torch.stack([term.float() if term.dtype != torch.float64 else term for term in self.terms.values()]).sum()

    def prefixed(self, prefix: str) -> Losses:
        """The same with ``prefix/`` before every name."""
        return Losses(
            {f"{prefix}/{name}": value for name, value in self.terms.items()},
            {f"{prefix}/{name}": value for name, value in self.monitors.items()},
        )

    @staticmethod
    def merge(losses: Sequence[Losses]) -> Losses:
        """All terms and monitors side by side.

        Raises:
            ValueError: two of them use the same name.
        """
        terms: dict[str, Tensor] = {}
        monitors: dict[str, Tensor] = {}
        for loss in losses:
            for mine, new in ((terms, loss.terms), (monitors, loss.monitors)):
                twice = mine.keys() & new.keys()
                if twice:
                    raise ValueError(f"two losses are called {sorted(twice)[0]!r}; give one of them another prefix")
                mine.update(new)
        return Losses(terms, monitors)


@dataclass(frozen=True)
class Clock:
    """Where training stands. Warm-up, decay and phases are functions of this, never state in the loop."""

    step: int
    """Optimizer steps done, from 0."""
    total: int
    """Optimizer steps of the whole stage."""
    epoch: int = 0

    @property
    def progress(self) -> float:
        """0 at the first step, 1 at the end."""
        return self.step / max(1, self.total)

    def warm_up(self, steps: int) -> float:
        """Linear factor: 0 at step 0, 1 from ``steps`` on (1 at once when ``steps`` is 0)."""
        return 1.0 if steps <= 0 else min(1.0, self.step / steps)
