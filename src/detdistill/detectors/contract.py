"""A detector in stages, and the further capabilities that some methods ask for.

    features   = detector.features(batch)
    prediction = detector.predict(features, batch)
    assignment = detector.assign(prediction, batch)
    losses     = detector.loss(prediction, batch, assignment=None)
    detections = detector.detect(prediction, batch)
    positives  = detector.positives(prediction, assignment, batch)

``observe`` runs the stages as far as a ``Look`` asks. Everything else is a small protocol below; a method names the
protocols it needs and is refused, when it is built, by a sentence that says which are missing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from detdistill.errors import ModelError
from detdistill.functional.query_seeds import QuerySpec, query_spec
from detdistill.structures import (
    WHOLE_TOWER,
    Assignment,
    Batch,
    Dense,
    Detections,
    Features,
    Look,
    Losses,
    Observation,
    Origin,
    Positives,
    Prediction,
    Queries,
    QuerySeed,
    Regions,
    Tower,
)

Family = Literal["dense", "regions", "queries", "features"]
FEATURES = Look()
PREDICTION = Look(prediction=True)


@dataclass(frozen=True)
class Pyramid:
    """What a pyramid's maps look like."""

    channels: tuple[int, ...]
    """Of each level, finest first."""
    strides: tuple[int, ...]
    """Of each level."""


@dataclass(frozen=True)
class DetectorSpec:
    """What a detector says of itself. Consumers ask; nobody guesses."""

    name: str
    """As the command line writes it, e.g. ``fcos:resnet18``."""
    family: Family
    """Which prediction it makes; ``features`` for a wrapped model that shows features only."""
    classes: tuple[str, ...]
    """Names of the K classes, in label order."""
    channels: tuple[int, ...]
    """Channels of each level of ``features``."""
    strides: tuple[int, ...]
    """Stride of each level of ``features``."""
    softmax: bool = False
    """True: K+1 logits with the background last; False: K sigmoid logits."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    needs_masks: bool = False
    """Training needs instance masks (Mask R-CNN)."""
    fixed_size_hw: tuple[int, int] | None = None
    """The only input size the detector was made for (SSD), or None."""
    backbone: Pyramid | None = None
    """Of ``backbone_features``, or None where the detector does not show them."""
    anchors: tuple[int, ...] = ()
    """Dense predictions of a cell on each level (of the first stage in two-stage detectors); empty: there are none."""
    box_bins: int = 0
    """Bins of the distribution that each side of a box is predicted as (GFL 17, D-FINE 33); 0: sides are single numbers."""
    queries: QuerySpec | None = None
    """Of the query decoder, where it was asked for (``Teacher.queries``): a cache keeps it beside the knowledge."""

    @staticmethod
    def from_plain(content: Mapping[str, Any]) -> DetectorSpec:
        """The inverse of ``dataclasses.asdict`` after JSON; fields that an older version did not have keep their defaults."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
        if values.get("backbone") is not None:
            values["backbone"] = Pyramid(**{name: tuple(value) for name, value in content["backbone"].items()})
        if values.get("queries") is not None:
            values["queries"] = QuerySpec.from_plain(content["queries"])
        return DetectorSpec(**values)


_NOT_IDENTITY = ("backbone", "anchors", "box_bins", "queries")
"""Fields that follow from the weights and the other fields."""


@dataclass(frozen=True)
class Parts:
    """A detector's modules by what they do. Together they hold all of its parameters, and none twice."""

    backbone: tuple[nn.Module, ...]
    neck: tuple[nn.Module, ...]
    """DETR families: projection and encoder."""
    head: tuple[nn.Module, ...]

    @staticmethod
    def parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
        """Parameters of some of the modules, each once."""
        return list(dict.fromkeys(parameter for module in modules for parameter in module.parameters()))

    def names(self, detector: nn.Module, modules: Iterable[nn.Module]) -> tuple[str, ...]:
        """State-dict names, within ``detector``, of the parameters and buffers of some of the modules."""
        mine = {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
        return tuple(name for name, tensor in detector.state_dict(keep_vars=True).items() if id(tensor) in mine)


class DetectionHead(nn.Module, ABC):
    """A head: it runs on any pyramid of the right channels and strides, with the caller's targets.

    A whole detector is one; so is what ``copy_head`` takes out of it. Heads of two-stage detectors have ``HasRegions`` too.
    """

    spec: DetectorSpec

    @abstractmethod
    def predict(self, features: Features, batch: Batch) -> Prediction:
        """Raw predictions.

        In training mode two-stage detectors sample their regions here, by ``batch.targets``; the regions keep their
        origin. DETR families run the decoder from their own ``seed``.
        """

    @abstractmethod
    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """The detector's own rule, as a value.

        Draws no random numbers: it may be called with other targets (``batch.with_targets``) on the same prediction.
        Two-stage detectors take their first stage's prediction (``Regions.first``) as well.
        """

    @abstractmethod
    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """The detector's own loss, under its own or a foreign assignment. Terms are the library's, weighted as there.

        For two-stage detectors a foreign assignment of ``Regions`` is that of the regions, and the first stage keeps its own;
        with the first stage's ``Dense`` prediction it is that of the anchors, and the losses are the first stage's alone.
        """

    @abstractmethod
    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """Final boxes, clipped to each image's valid size, in pixels of the batch, one entry for each image."""

    @abstractmethod
    def positives(self, prediction: Prediction, assignment: Assignment, batch: Batch) -> Positives:
        """The predictions responsible for a box; their boxes are differentiable."""


class Detector(DetectionHead):
    """A detector whose parts can be called one after the other.

    ``forward(batch)`` runs features and prediction, so that a wrapper such as DDP sees one call. Images come as in
    ``Batch``; each detector normalises by its own ``spec`` (``normalized``).
    """

    @abstractmethod
    def features(self, batch: Batch) -> Features:
        """Backbone and neck (DETR families: and encoder). Channels and strides are those of ``spec``."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the detector into an existing folder in its own library's form, loadable without this package."""

    def parts(self) -> Parts:
        """The modules of backbone, neck and head.

        Raises:
            ModelError: the detector does not know them (a wrapped model).
        """
        raise ModelError(f"{self.spec.name} does not say which of its modules are backbone, neck and head; define parts()")

    def forward(self, batch: Batch, look: Look = PREDICTION) -> Observation:
        """As ``observe``."""
        return self.observe(batch, look)

    def observe(self, batch: Batch, look: Look = PREDICTION) -> Observation:
        """One pass, as far as ``look`` asks; its parts are what every method of a composition shares.

        Raises:
            ModelError: a part is wanted that the detector does not show.
        """
        return self.observe_head(self.observe_features(batch, look), batch, look)

    def observe_features(self, batch: Batch, look: Look) -> Observation:
        """The first half of ``observe``: the features, and the backbone's where they are looked at.

        Raises:
            ModelError: as ``observe``.
        """
        if not look.backbone:
            return Observation(self.features(batch))
        if not isinstance(self, HasBackboneFeatures):
            raise ModelError(f"{self.spec.name} shows no backbone features")
        below = self.backbone_features(batch)
        return Observation(self.neck(below, batch), below)

    def observe_head(self, seen: Observation, batch: Batch, look: Look) -> Observation:
        """The second half of ``observe``: towers and prediction on the features that were seen; those there are kept.

        Raises:
            ModelError: as ``observe``.
        """
        towers = {tower.depth: tower for tower in seen.towers}
        if look.towers:
            if not isinstance(self, HasTowers):
                raise ModelError(f"{self.spec.name} shows no towers")
            for depth in sorted({self.tower_depth if depth == WHOLE_TOWER else depth for depth in look.towers} - towers.keys()):
                towers[depth] = self.tower(seen.features, depth)
        prediction = seen.prediction
        if look.attention and (not isinstance(prediction, Queries) or prediction.attention is None):
            if not isinstance(self, HasQueries):
                raise ModelError(f"{self.spec.name} shows no attention maps")
            prediction = self.predict(seen.features, batch, attention=True)
        elif look.prediction and prediction is None:
            if towers and isinstance(self, HasTowers):
                prediction = self.finish(towers[max(towers)], batch)
            else:
                prediction = self.predict(seen.features, batch)
        return dataclasses.replace(seen, prediction=prediction, towers=tuple(towers[depth] for depth in sorted(towers)))

    def normalized(self, batch: Batch) -> Tensor:
        """[B, 3, H, W] images by this detector's mean and std; padding is zero AFTER normalising, as the libraries do."""
        mean = torch.tensor(self.spec.mean, device=batch.images.device, dtype=batch.images.dtype)[:, None, None]
        std = torch.tensor(self.spec.std, device=batch.images.device, dtype=batch.images.dtype)[:, None, None]
        images = (batch.images - mean) / std
        height, width = batch.padding_hw
        if all(view.size_hw == (height, width) for view in batch.views):
            return images
        return images.masked_fill(batch.padding_mask()[:, None], 0.0)


# ------------------------------------------------------------------------------------------------------- capabilities


@runtime_checkable
class HasBackboneFeatures(Protocol):
    """Shows the backbone's maps, before the neck. ``neck(backbone_features(batch), batch)`` equals ``features(batch)``."""

    def backbone_features(self, batch: Batch) -> Features:
        """Maps of the backbone, finest first, with the channels and strides of ``spec.backbone``."""
        ...

    def neck(self, features: Features, batch: Batch) -> Features:
        """The neck (DETR families: and the encoder) on the backbone's maps, or on others of their channels and strides."""
        ...


@runtime_checkable
class HasTowers(Protocol):
    """A dense head that can be left at an inner layer and resumed there, by its owner or by another detector."""

    @property
    def tower_depth(self) -> int:
        """Number of convolution blocks before the output layers."""
        ...

    def tower(self, features: Features, upto: int | None = None) -> Tower:
        """The inner maps after ``upto`` blocks (all when None; 0: the features themselves, on both sides)."""
        ...

    def finish(self, hidden: Tower, batch: Batch) -> Dense:
        """Resume after ``hidden.depth`` blocks. ``finish(tower(f))`` equals ``predict(f)`` exactly.

        ``hidden`` may come from another detector with the same channels at that depth (CrossKD).
        """
        ...


@runtime_checkable
class HasRegions(Protocol):
    """A region head that answers about anybody's boxes."""

    def regions(self, features: Features, boxes_xyxy: Sequence[Tensor], batch: Batch) -> Regions:
        """Pool and predict on given boxes, one [n_i, 4] tensor of pixels for each image, in that order; no sampling."""
        ...

    def proposals(self, features: Features, batch: Batch) -> tuple[list[Tensor], list[Origin]]:
        """The first stage's boxes, [n_i, 4] for each image after NMS, and the ``Origin`` of each image's boxes."""
        ...


@runtime_checkable
class HasQueries(Protocol):
    """A query decoder that can be entered again."""

    def predict(self, features: Features, batch: Batch, attention: bool = False) -> Queries:
        """As ``Detector.predict``; with ``attention`` the maps of the detector's own queries are in the result."""
        ...

    def seed(self, features: Features, batch: Batch) -> QuerySeed:
        """The detector's own initial queries for these features."""
        ...

    def decode(self, features: Features, seed: QuerySeed, batch: Batch, attention: bool = False) -> Queries:
        """Decode from any seed.

        Reuses ``features`` (the encoder's memory); a foreign group never attends to the detector's own queries, and
        decoding it leaves the own result bit-identical.
        """
        ...


@runtime_checkable
class HasCopies(Protocol):
    """Heads and necks as modules that can be taken out, with their weights or made anew."""

    def copy_head(self, fresh: bool = False) -> DetectionHead:
        """A new head of this kind, on its own parameters: equal to this one's, or freshly initialised."""
        ...

    def copy_neck(self, fresh: bool = False) -> nn.Module:
        """A new neck of this kind: maps backbone ``Features`` to neck ``Features``."""
        ...


CAPABILITIES: dict[type, str] = {
    HasBackboneFeatures: "backbone features",
    HasTowers: "towers (a dense head that can be resumed)",
    HasRegions: "regions (a region head on given boxes)",
    HasQueries: "queries (a decoder that can be entered again)",
    HasCopies: "copies of neck and head",
}
"""The capability protocols and how messages name them."""


# ------------------------------------------------------------------------------------------------ shared by adapters


def dense_positives(prediction: Dense, assignment: Assignment, batch: Batch) -> Positives:
    """``Detector.positives`` for any ``Dense`` prediction."""
    image, index = torch.nonzero(assignment.matched >= 0, as_tuple=True)
    return _positives(
        prediction.logits[image, index],
        prediction.boxes_xyxy[image, index],
        image,
        index,
        None,
        assignment.matched[image, index],
        batch,
        prediction.softmax,
    )


def region_positives(prediction: Regions, assignment: Assignment, batch: Batch) -> Positives:
    """``Detector.positives`` for any ``Regions`` prediction: the refined box of the ground truth's class."""
    index = torch.nonzero(assignment.matched >= 0).flatten()
    image, matched = prediction.origin.image[index], assignment.matched[index]
    labels = _gather(batch, image, matched)[0]
    refined = prediction.refined_xyxy[index]
    column = labels if refined.shape[1] > 1 else torch.zeros_like(labels)
    boxes = refined[torch.arange(len(index), device=refined.device), column]
    return _positives(prediction.logits[index], boxes, image, index, None, matched, batch, softmax=True)


def query_positives(prediction: Queries, assignment: Assignment, batch: Batch) -> Positives:
    """``Detector.positives`` for any ``Queries`` prediction, all decoder layers."""
    layer, image, index = torch.nonzero(assignment.matched >= 0, as_tuple=True)
    center_x, center_y, width, height = prediction.boxes_cxcywh01[layer, image, index].unbind(-1)
    size = batch.sizes[image].to(center_x.dtype)
    boxes = torch.stack([center_x - width / 2, center_y - height / 2, center_x + width / 2, center_y + height / 2], dim=-1)
    boxes = boxes * size[:, [1, 0, 1, 0]]
    return _positives(
        prediction.logits[layer, image, index],
        boxes,
        image,
        index,
        layer,
        assignment.matched[layer, image, index],
        batch,
        prediction.softmax,
    )


def _positives(
    logits: Tensor,
    boxes: Tensor,
    image: Tensor,
    index: Tensor,
    layer: Tensor | None,
    matched: Tensor,
    batch: Batch,
    softmax: bool,
) -> Positives:
    labels, targets = _gather(batch, image, matched)
    layer = torch.zeros_like(image) if layer is None else layer
    return Positives(image, matched, index, layer, labels, targets, logits, boxes, softmax)


def _gather(batch: Batch, image: Tensor, matched: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [M] and boxes [M, 4] of the matched ground truth."""
    labels = torch.zeros_like(image)
    dtype = torch.promote_types(torch.float32, batch.targets[0].boxes_xyxy.dtype) if batch.targets else torch.float32
    boxes = torch.zeros(len(image), 4, device=batch.images.device, dtype=dtype)
    for i, target in enumerate(batch.targets):
        mine = image == i
        labels[mine] = target.labels[matched[mine]]
        boxes[mine] = target.boxes_xyxy[matched[mine]].to(boxes.dtype)
    return labels, boxes


class Teacher:
    """A frozen detector: eval mode, no gradients, and never in anybody's state dict (it is no ``nn.Module``)."""

    present = True
    """The detector can be run; False: a cache's description stands in for it."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector.eval().requires_grad_(False)
        self._seen: tuple[Batch, Observation] | None = None

    @property
    def spec(self) -> DetectorSpec:
        """The detector's own."""
        return self.detector.spec

    @functools.cached_property
    def queries(self) -> QuerySpec:
        """What the query decoder's queries are made of, tried once; a cache's teacher has it in its ``spec``.

        Raises:
            ModelError: the detector has no query decoder.
        """
        if self.spec.queries is not None:
            return self.spec.queries
        if not isinstance(self.detector, HasQueries):
            raise ModelError(f"{self.spec.name} has no decoder of queries that can be entered again")
        return query_spec(self.detector)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of all weights and buffers (their names, types, shapes and values) and of the ``spec``."""
        spec = {name: value for name, value in dataclasses.asdict(self.spec).items() if name not in _NOT_IDENTITY}
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
        for name, tensor in sorted(self.detector.state_dict().items()):
            digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Self:
        """Move the detector."""
        self.detector.to(device)
        return self

    @torch.no_grad()
    def observe(self, batch: Batch, look: Look = FEATURES) -> Observation:
        """Run the teacher as far as asked. Several methods that ask about the same batch share one run.

        The parts are shared if the first to ask looks at all of them: a composition asks for the union of its members' looks.

        Raises:
            ModelError: a part is wanted that the detector does not show.
        """
        seen = self._seen[1] if self._seen is not None and self._seen[0] is batch else None
        if seen is None or (look.backbone and seen.backbone_features is None):
            seen = self.detector.observe_features(batch, look)
        seen = self.detector.observe_head(seen, batch, look)
        self._seen = (batch, seen)
        # Only what was asked: the knowledge of a method (and its size in a cache) must not depend on the other methods.
        return seen.only(look)

    def forget(self) -> None:
        """Let go of the last batch's observation (the loop calls this after each step)."""
        self._seen = None
