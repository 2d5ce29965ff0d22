"""The contract of a detector: its stages, and the capabilities that some methods need in addition.

    features   = detector.features(batch)
    prediction = detector.predict(features, batch)
    assignment = detector.assign(prediction, batch)
    losses     = detector.loss(prediction, batch, assignment=None)
    detections = detector.detect(prediction, batch)
    positives  = detector.positives(prediction, assignment, batch)

``observe`` runs the stages that a ``Look`` selects. Each further capability is a small protocol below. A method names the
protocols it needs. When the method is built on a detector that lacks some of them, an error lists the missing ones.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from detdistill.errors import ModelError
from detdistill.functional.folding import FoldedNorms, contiguous
from detdistill.functional.query_seeds import QuerySpec, query_spec
from detdistill.structures import (
    WHOLE_TOWER,
    Assignment,
    Batch,
    BoxDistributions,
    Clock,
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
    Resizing,
    Tower,
)

Family = Literal["dense", "regions", "queries", "features"]
FEATURES = Look()
PREDICTION = Look(prediction=True)


@dataclass(frozen=True)
class Pyramid:
    """Channels and strides of a feature pyramid."""

    channels: tuple[int, ...]
    """Channels of each level, finest first."""
    strides: tuple[int, ...]
    """Stride of each level in pixels of the image tensor, finest first."""


@dataclass(frozen=True)
class DenseCoding:
    """Form of the dense predictions of a detector, or of the first stage of a two-stage one: boxes, quality, anchors."""

    points: int = 0
    """Points that encode a box, two numbers each (RepPoints 9); 0: a box is encoded by its four sides."""
    quality: bool = False
    """Predictions have a ``quality``: centerness, predicted IoU or objectness."""
    anchors_wh: tuple[tuple[tuple[float, float], ...], ...] = ()
    """Width and height in pixels of each anchor of a cell, for each level, in the order of ``Dense.anchors``. Empty: cells have
    one anchor or point, or the sides depend on the size of the images (SSD)."""

    @staticmethod
    def from_plain(content: Mapping[str, Any]) -> DenseCoding:
        """The inverse of ``dataclasses.asdict``, also after JSON."""
        levels = tuple(tuple((width, height) for width, height in level) for level in content["anchors_wh"])
        return DenseCoding(**{**content, "anchors_wh": levels})


@dataclass(frozen=True)
class DetectorSpec:
    """Fixed properties of a detector: name, classes, outputs, image normalisation."""

    name: str
    """Model string as written on the command line, e.g. ``fcos:resnet18``."""
    family: Family
    """Kind of prediction; ``features`` for a wrapped model, which exposes feature maps only."""
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
    """The fixed input size (SSD); None: any size."""
    backbone: Pyramid | None = None
    """Channels and strides of ``backbone_features``; None: the detector has no ``backbone_features``."""
    anchors: tuple[int, ...] = ()
    """Dense predictions of one cell, for each level (of the first stage in two-stage detectors); empty: no dense predictions."""
    box_bins: int = 0
    """Bins of the distribution predicted for each side of a box (GFL 17, D-FINE 33); 0: each side is a single number."""
    coding: DenseCoding | None = None
    """Form of the dense predictions; None: there are none, or it is not known (caches of earlier versions)."""
    queries: QuerySpec | None = None
    """Format of the decoder's queries, as a cache stores it (from ``Teacher.queries``); None: not determined."""

    @property
    def box_numbers(self) -> int | None:
        """Numbers that encode the box of a dense prediction (the width of ``Dense.deltas``); None: not known."""
        if self.coding is None:
            return None
        return 2 * self.coding.points or 4 * max(self.box_bins, 1)

    @staticmethod
    def from_plain(content: Mapping[str, Any]) -> DetectorSpec:
        """Rebuild a spec from the JSON form of ``dataclasses.asdict``; fields missing from ``content`` take their defaults."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
        if values.get("backbone") is not None:
            values["backbone"] = Pyramid(**{name: tuple(value) for name, value in content["backbone"].items()})
        if values.get("coding") is not None:
            values["coding"] = DenseCoding.from_plain(content["coding"])
        if values.get("queries") is not None:
            values["queries"] = QuerySpec.from_plain(content["queries"])
        return DetectorSpec(**values)


_NOT_IDENTITY = ("backbone", "anchors", "box_bins", "coding", "queries")
"""Fields left out of a teacher's fingerprint: they follow from the weights and the other fields."""


@dataclass(frozen=True)
class Parts:
    """Modules of a detector, grouped by function. Every parameter of the detector is in exactly one group."""

    backbone: tuple[nn.Module, ...]
    neck: tuple[nn.Module, ...]
    """In DETR families: projection and encoder."""
    head: tuple[nn.Module, ...]

    @staticmethod
    def parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
        """Parameters of the given modules, each listed once."""
        return list(dict.fromkeys(parameter for module in modules for parameter in module.parameters()))

    @staticmethod
    def names(detector: nn.Module, modules: Iterable[nn.Module]) -> tuple[str, ...]:
        """State-dict names in ``detector`` of the parameters and buffers of the given modules."""
        mine = {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
        return tuple(name for name, tensor in detector.state_dict(keep_vars=True).items() if id(tensor) in mine)


class DetectionHead(nn.Module, ABC):
    """A detection head, which runs on any feature pyramid of matching channels and strides, with the caller's targets.

    A whole detector is a ``DetectionHead``, and so is the result of ``copy_head``. Heads of two-stage detectors also
    implement ``HasRegions``.
    """

    spec: DetectorSpec

    @abstractmethod
    def predict(self, features: Features, batch: Batch) -> Prediction:
        """Compute the raw prediction.

        In training mode, two-stage detectors sample their regions here by ``batch.targets``; each region keeps its
        ``Origin``. DETR families run the decoder on their own initial queries (``seed``).
        """

    @abstractmethod
    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign predictions to ground-truth boxes by the detector's own rule.

        Draws no random numbers, so it may be called with other targets (``batch.with_targets``) on the same prediction.
        Two-stage detectors also accept the prediction of their first stage (``Regions.first``).
        """

    @abstractmethod
    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Compute the detector's own losses under a given assignment, by default its own.

        The terms have the names and weights of the library the detector comes from.

        Two-stage detectors: with a ``Regions`` prediction, ``assignment`` applies to the regions, and the first stage
        uses its own assignment. With the first stage's ``Dense`` prediction, ``assignment`` applies to the anchors, and
        only the losses of the first stage are returned.
        """

    @abstractmethod
    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """Decode the final boxes: one entry for each image, in pixels of the batch, clipped to the image's valid size."""

    @abstractmethod
    def positives(self, prediction: Prediction, assignment: Assignment, batch: Batch) -> Positives:
        """Gather the predictions that ``assignment`` matches to a ground-truth box; their boxes are differentiable."""


class Detector(DetectionHead):
    """A detector with stages that can be called one after the other.

    ``forward(batch)`` runs ``features`` and ``predict`` in one call, as wrappers such as DDP require. Images are passed
    unnormalised, as in ``Batch``; each detector normalises them by the mean and std of its ``spec`` (``normalized``).
    """

    library: ClassVar[str] = "pytorch"
    """Library that loads what ``export`` writes, in the words of the Hugging Face hub."""

    @abstractmethod
    def features(self, batch: Batch) -> Features:
        """Run backbone and neck (in DETR families also the encoder). Channels and strides are those of ``spec``."""

    @abstractmethod
    def export(self, folder: Path, resizing: Resizing | None = None) -> None:
        """Write the detector into an existing folder, in the format of its own library, loadable without this package.

        Args:
            folder: the folder.
            resizing: how images must be resized for the detector, written into the library's files; None: unknown.
        """

    def usage(self, resizing: Resizing | None = None) -> str:
        """Markdown for the README of an exported folder: how to load the detector without this package.

        Args:
            resizing: as for ``export``.
        """
        return "`model.safetensors` is its state dict."

    def training_only(self) -> tuple[nn.Module, ...]:
        """Return the modules that only training uses. They are neither exported nor counted, and no part of a teacher's identity.

        Default: none.
        """
        return ()

    def inference_state(self) -> dict[str, Tensor]:
        """Return the state dict without the modules that only training uses."""
        left_out = set(Parts.names(self, self.training_only()))
        return {name: tensor for name, tensor in self.state_dict().items() if name not in left_out}

    def count_parameters(self) -> int:
        """Return the number of parameters, without the modules that only training uses."""
        return sum(p.numel() for p in self.parameters()) - sum(p.numel() for p in Parts.parameters(self.training_only()))

    def parts(self) -> Parts:
        """Group the modules into backbone, neck and head.

        Raises:
            ModelError: the detector does not define the groups (wrapped models).
        """
        raise ModelError(f"{self.spec.name} does not say which of its modules are backbone, neck and head; define parts()")

    def forward(self, batch: Batch, look: Look = PREDICTION) -> Observation:
        """Call ``observe``."""
        return self.observe(batch, look)

    def observe(self, batch: Batch, look: Look = PREDICTION) -> Observation:
        """Run one forward pass and return the parts that ``look`` selects. All methods of a composition share the result.

        Raises:
            ModelError: ``look`` selects a part that the detector cannot return.
        """
        return self.observe_head(self.observe_features(batch, look), batch, look)

    def observe_features(self, batch: Batch, look: Look) -> Observation:
        """Run the first half of ``observe``: the features, and the backbone's features if ``look`` selects them.

        Raises:
            ModelError: as ``observe``.
        """
        if not look.backbone:
            return Observation(self.features(batch))
        if not isinstance(self, HasBackboneFeatures):
            raise ModelError(f"{self.spec.name} has no backbone features")
        below = self.backbone_features(batch)
        return Observation(self.neck(below, batch), below)

    def observe_head(self, seen: Observation, batch: Batch, look: Look) -> Observation:
        """Run the second half of ``observe``: the towers and the prediction that ``look`` selects and ``seen`` lacks.

        Raises:
            ModelError: as ``observe``.
        """
        towers = {tower.depth: tower for tower in seen.towers}
        if look.towers:
            if not isinstance(self, HasTowers):
                raise ModelError(f"{self.spec.name} has no towers")
            for depth in sorted({self.tower_depth if depth == WHOLE_TOWER else depth for depth in look.towers} - towers.keys()):
                towers[depth] = self.tower(seen.features, depth)
        prediction = seen.prediction
        if look.attention and (not isinstance(prediction, Queries) or prediction.attention is None):
            if not isinstance(self, HasQueries):
                raise ModelError(f"{self.spec.name} has no attention maps")
            prediction = self.predict(seen.features, batch, attention=True)
        elif look.prediction and prediction is None:
            if towers and isinstance(self, HasTowers):
                prediction = self.finish(towers[max(towers)], batch)
            else:
                prediction = self.predict(seen.features, batch)
        return dataclasses.replace(seen, prediction=prediction, towers=tuple(towers[depth] for depth in sorted(towers)))

    def normalized(self, batch: Batch) -> Tensor:
        """[B, 3, H, W] images normalised by ``spec.mean`` and ``spec.std``; padding is zero AFTER that, as in the libraries."""
        mean = torch.tensor(self.spec.mean, device=batch.images.device, dtype=batch.images.dtype)[:, None, None]
        std = torch.tensor(self.spec.std, device=batch.images.device, dtype=batch.images.dtype)[:, None, None]
        images = (batch.images - mean).div_(std)
        for image, view in zip(images, batch.views, strict=True):
            height, width = view.size_hw
            image[:, height:] = 0.0
            image[:, :, width:] = 0.0
        return images


# ------------------------------------------------------------------------------------------------------- capabilities


@runtime_checkable
class HasBackboneFeatures(Protocol):
    """Separate backbone and neck: ``neck(backbone_features(batch), batch)`` equals ``features(batch)``."""

    def backbone_features(self, batch: Batch) -> Features:
        """Compute the backbone's maps, finest first, with the channels and strides of ``spec.backbone``."""
        ...

    def neck(self, features: Features, batch: Batch) -> Features:
        """Run the neck (in DETR families also the encoder) on the backbone's maps, or on others of equal channels and strides."""
        ...


@runtime_checkable
class HasTowers(Protocol):
    """A dense head that can stop at an inner layer and resume there, on its own maps or on those of another detector."""

    @property
    def tower_depth(self) -> int:
        """Number of convolution blocks before the output layers."""
        ...

    def tower(self, features: Features, upto: int | None = None) -> Tower:
        """Compute the inner maps of both branches after ``upto`` blocks (None: all blocks; 0: the features themselves)."""
        ...

    def finish(self, hidden: Tower, batch: Batch) -> Dense:
        """Run the blocks after ``hidden.depth`` and the output layers. ``finish(tower(f))`` equals ``predict(f)`` exactly.

        ``hidden`` may come from another detector with the same channels at that depth (CrossKD).
        """
        ...


class RegionHeadCopy(Protocol):
    """Result of ``HasRegions.copy_region_head``: an ``nn.Module`` with trainable parameters of its own."""

    def regions(self, features: Features, boxes_xyxy: Sequence[Tensor], batch: Batch) -> Regions:
        """As ``HasRegions.regions``."""
        ...

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """As ``DetectionHead.loss``, of a prediction of ``regions``; labels are those of the copied detector."""
        ...


@runtime_checkable
class HasRegions(Protocol):
    """A region head that predicts on any given boxes."""

    def regions(self, features: Features, boxes_xyxy: Sequence[Tensor], batch: Batch) -> Regions:
        """Pool and predict on the given boxes, without sampling.

        Args:
            features: neck features of the batch.
            boxes_xyxy: one [n_i, 4] tensor for each image, in pixels; the order of the boxes is kept.
            batch: the images.
        """
        ...

    def proposals(self, features: Features, batch: Batch) -> tuple[list[Tensor], list[Origin]]:
        """Compute the proposals of the first stage after NMS, [n_i, 4] for each image, and their ``Origin`` for each image."""
        ...

    def copy_region_head(self) -> RegionHeadCopy:
        """Copy the region head with its weights into a module that only runs and trains it on given boxes.

        The copy has no first stage and no mask branch, so ``loss`` of its predictions has box terms only and needs no masks.
        It runs on any pyramid of equal channels; levels that the pyramid lacks are left out.
        """
        ...


@runtime_checkable
class HasQueries(Protocol):
    """A query decoder that can decode any initial queries, the detector's own or others."""

    def predict(self, features: Features, batch: Batch, attention: bool = False) -> Queries:
        """Predict as ``Detector.predict``; with ``attention`` the result holds the attention maps of the detector's queries."""
        ...

    def seed(self, features: Features, batch: Batch) -> QuerySeed:
        """Compute the detector's own initial queries for these features."""
        ...

    def decode(self, features: Features, seed: QuerySeed, batch: Batch, attention: bool = False) -> Queries:
        """Decode the initial queries ``seed`` on ``features`` (the encoder's memory).

        Queries from elsewhere never attend to the detector's own queries. Decoding them leaves the detector's own
        prediction bit-identical.
        """
        ...


@runtime_checkable
class HasMapsBeforeEncoder(Protocol):
    """A DETR whose projection of the backbone's maps can be run without the encoder."""

    def before_encoder(self, features: Features, batch: Batch) -> Features:
        """Compute the maps that the encoder reads, with channels and strides of ``spec``, from the backbone's ``Features``.

        Statistics of normalisation layers stay unchanged. Without an encoder these are the detector's features.
        """
        ...


@runtime_checkable
class HasCopies(Protocol):
    """Head and neck that can be copied into separate modules, with their weights or newly initialised."""

    def copy_head(self, fresh: bool = False) -> DetectionHead:
        """Copy the head into a module with parameters of its own; ``fresh``: newly initialised instead of equal."""
        ...

    def copy_neck(self, fresh: bool = False) -> nn.Module:
        """Copy the neck into a module that maps backbone ``Features`` to neck ``Features``; ``fresh``: newly initialised."""
        ...


@runtime_checkable
class HasBoxDistributions(Protocol):
    """Box sides that are distributions; ``spec.box_bins`` is above 0."""

    def distributions(self, prediction: Prediction, batch: Batch) -> BoxDistributions:
        """Return the distributions of a prediction of this detector; of queries: those of the last decoder layer.

        The means of the sides are the predicted box; gradient flows to the logits only.
        """
        ...


@runtime_checkable
class HasSchedule(Protocol):
    """Losses whose weights change during training."""

    def schedule(self, clock: Clock) -> None:
        """Set the weights; the training loop calls it before every step, also after a run was resumed."""
        ...


CAPABILITIES: dict[type, str] = {
    HasBackboneFeatures: "backbone features",
    HasTowers: "towers (a dense head that can be resumed)",
    HasRegions: "regions (a region head on given boxes)",
    HasQueries: "queries (a decoder that accepts other queries)",
    HasMapsBeforeEncoder: "maps before the encoder",
    HasCopies: "copies of neck and head",
    HasBoxDistributions: "distributions of box sides",
    HasSchedule: "a schedule of its losses",
}
"""The capability protocols and their names in messages."""


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
    """``Detector.positives`` for any ``Queries`` prediction, over all decoder layers."""
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
    """A frozen detector: eval mode, no gradients. It is not an ``nn.Module``, so no state dict contains it."""

    present = True
    """Whether the detector itself can be run; False: only its description from a cache is there."""

    def __init__(self, detector: Detector) -> None:
        """Freeze a detector.

        Raises:
            ModelError: ``detector`` is something else, e.g. the path of one.
        """
        if not isinstance(detector, Detector):
            if isinstance(detector, nn.Module):
                raise ModelError(f"Teacher: a {type(detector).__name__} is no detector yet; wrap it: wrap(model, taps=[...])")
            advice = "load it first: Teacher(detdistill.load_detector(...))"
            raise ModelError(f"Teacher: needs a detector, not a {type(detector).__name__}; {advice}")
        self.detector = detector.eval().requires_grad_(False)
        self._folded: FoldedNorms | None = None
        self._seen: tuple[Tensor, Observation] | None = None
        self._on_regions: tuple[Tensor, Features, Regions] | None = None

    @property
    def spec(self) -> DetectorSpec:
        """Properties of the detector."""
        return self.detector.spec

    @functools.cached_property
    def queries(self) -> QuerySpec:
        """Format of the decoder's queries: from ``spec`` if a cache stored it, else from one trial run of the decoder.

        Raises:
            ModelError: the detector has no query decoder.
        """
        if self.spec.queries is not None:
            return self.spec.queries
        if not isinstance(self.detector, HasQueries):
            raise ModelError(f"{self.spec.name} has no query decoder that accepts other queries")
        return query_spec(self.detector)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all weights and buffers (names, types, shapes and values) and of the ``spec``."""
        spec = {name: value for name, value in dataclasses.asdict(self.spec).items() if name not in _NOT_IDENTITY}
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
        for name, tensor in sorted(self.detector.inference_state().items()):
            digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Self:
        """Move the detector."""
        self.detector.to(device)
        return self

    def fold_norms(self) -> Teacher:
        """Run with norms folded into convolutions from now on (``functional.folding``); values differ in their last digits."""
        self._folded = FoldedNorms(self.detector)
        return self

    @torch.no_grad()
    def observe(self, batch: Batch, look: Look = FEATURES) -> Observation:
        """Run the teacher and return the parts that ``look`` selects. Calls with the same images share one forward pass.

        A batch with ``large`` shows the teacher the larger images; the result is in the view of the batch
        (``Observation.in_view_of``).

        The pass is fully shared if the first call selects all parts: a composition passes the union of its methods' looks.

        Raises:
            ModelError: ``look`` selects a part that the detector cannot return.
        """
        if batch.large is not None:
            return self.observe(batch.large, look).in_view_of(batch)
        seen = self._seen[1] if self._seen is not None and self._seen[0] is batch.images else None
        with nullcontext(batch) if self._folded is None else self._folded.running(batch) as fast:
            if seen is None or (look.backbone and seen.backbone_features is None):
                seen = self.detector.observe_features(fast, look)
            seen = self.detector.observe_head(seen, fast, look)
        seen = seen if fast is batch else contiguous(seen)
        self._seen = (batch.images, seen)
        # Only the selected parts: the knowledge of a method (and its size in a cache) must not depend on the other methods.
        return seen.only(look)

    @torch.no_grad()
    def assign(self, prediction: Prediction, batch: Batch, columns: Sequence[int]) -> Assignment:
        """Assign the teacher's prediction to the batch's boxes by its own rule.

        Args:
            prediction: of the teacher.
            batch: with the student's labels.
            columns: the teacher's label of each of the student's classes.
        """
        labels = torch.tensor(columns, device=batch.images.device)
        named = batch.with_targets([dataclasses.replace(one, labels=labels[one.labels]) for one in batch.targets])
        return self.detector.assign(prediction, named)

    @torch.no_grad()
    def predict_regions(self, like: Regions, features: Features, batch: Batch) -> Regions:
        """Run the teacher's region head on the boxes of another detector's prediction, for all images in one pass.

        Calls with the same boxes and equal features share one pass, so the methods of a composition pool and predict once.

        Args:
            like: prediction of R boxes, such as the student's; only ``boxes_xyxy`` and ``origin.image`` are read.
            features: the teacher's neck features of the batch, computed or from a cache.
            batch: the images.

        Returns:
            The prediction for the boxes, in their order. A cascade returns its first stage, because its later stages move
            the boxes.

        Raises:
            ModelError: the teacher has no region head.
        """
        if self._on_regions is not None:
            boxes, seen, known = self._on_regions
            if boxes is like.boxes_xyxy and _same_maps(seen, features):
                return known
        if not isinstance(self.detector, HasRegions):
            raise ModelError(f"{self.spec.name} has no region head that predicts on given boxes")
        by_image = [torch.nonzero(like.origin.image == image).flatten() for image in range(len(batch))]
        found = self.detector.regions(features, [like.boxes_xyxy[mine] for mine in by_image], batch).before_refinement()
        order = torch.cat(by_image)
        if not torch.equal(order, torch.arange(len(order), device=order.device)):
            found = found.rows(order.argsort())
        found = found.float()
        self._on_regions = (like.boxes_xyxy, features, found)
        return found

    def forget(self) -> None:
        """Release the results for the last batch (the training loop calls this after each step)."""
        self._seen = self._on_regions = None


def _same_maps(first: Features, second: Features) -> bool:
    """Whether two pyramids have equal maps; the parts of a composition's knowledge may be copies of one pyramid."""
    pairs = zip(first.maps, second.maps, strict=False)
    return len(first.maps) == len(second.maps) and all(mine is other or torch.equal(mine, other) for mine, other in pairs)
