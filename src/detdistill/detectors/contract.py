"""A detector in stages, and the further capabilities that some methods ask for.

    features   = detector.features(batch)
    prediction = detector.predict(features, batch)
    assignment = detector.assign(prediction, batch)
    losses     = detector.loss(prediction, batch, assignment=None)
    detections = detector.detect(prediction, batch)
    positives  = detector.positives(prediction, assignment, batch)

Everything else is a small protocol below; a method names the protocols it needs and is refused, when it is built, by a
sentence that says which are missing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from detdistill.structures import (
    Assignment,
    Batch,
    Dense,
    Detections,
    Features,
    Losses,
    Observation,
    Origin,
    Positives,
    Prediction,
    Queries,
    QuerySeed,
    Regions,
)

Family = Literal["dense", "regions", "queries", "features"]


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


class Detector(nn.Module, ABC):
    """A detector whose parts can be called one after the other.

    ``forward(batch)`` runs features and prediction, so that a wrapper such as DDP sees one call. Images come as in
    ``Batch``; each detector normalises by its own ``spec`` (``normalized``).
    """

    spec: DetectorSpec

    head_prefixes: tuple[str, ...] = ()
    """Beginnings of the state-dict names that belong to neck and head, for head inheritance; all other names are the backbone."""

    @abstractmethod
    def features(self, batch: Batch) -> Features:
        """Backbone and neck (DETR families: and encoder). Channels and strides are those of ``spec``."""

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
        """

    @abstractmethod
    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """The detector's own loss, under its own or a foreign assignment. Terms are the library's, weighted as there.

        For two-stage detectors a foreign assignment is that of the regions; the first stage keeps its own.
        """

    @abstractmethod
    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """Final boxes, clipped to each image's valid size, in pixels of the batch, one entry for each image."""

    @abstractmethod
    def positives(self, prediction: Prediction, assignment: Assignment, batch: Batch) -> Positives:
        """The predictions responsible for a box; their boxes are differentiable."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the detector into an existing folder in its own library's form, loadable without this package."""

    def forward(self, batch: Batch) -> Observation:
        """One pass: what every method of a composition shares."""
        features = self.features(batch)
        return Observation(features=features, prediction=self.predict(features, batch))

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
    """Shows the backbone's maps, before the neck."""

    def backbone_features(self, batch: Batch) -> Features:
        """Maps of the backbone, finest first, with their own channels and strides."""
        ...


@dataclass(frozen=True)
class Tower:
    """The inside of a dense head after ``depth`` of its shared-over-levels convolution blocks."""

    classification: tuple[Tensor, ...]
    """L maps [B, C, H_l, W_l]."""
    regression: tuple[Tensor, ...]
    """L maps [B, C, H_l, W_l]."""
    depth: int
    strides: tuple[int, ...]


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


@runtime_checkable
class DetectionHead(Protocol):
    """A head alone: it runs on any pyramid of the right channels and strides, with the caller's targets."""

    def predict(self, features: Features, batch: Batch) -> Prediction:
        """As ``Detector.predict``."""
        ...

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """As ``Detector.assign``."""
        ...

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """As ``Detector.loss``."""
        ...

    def parameters(self, recurse: bool = True) -> object:
        """As ``torch.nn.Module.parameters``."""
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
    boxes = torch.zeros(len(image), 4, device=batch.images.device)
    for i, target in enumerate(batch.targets):
        mine = image == i
        labels[mine] = target.labels[matched[mine]]
        boxes[mine] = target.boxes_xyxy[matched[mine]].to(boxes.dtype)
    return labels, boxes


class Teacher:
    """A frozen detector: eval mode, no gradients, and never in anybody's state dict (it is no ``nn.Module``)."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector.eval().requires_grad_(False)
        self._seen: tuple[Batch, Observation] | None = None

    @property
    def spec(self) -> DetectorSpec:
        """The detector's own."""
        return self.detector.spec

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of all weights and buffers (their names, types, shapes and values) and of the ``spec``."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.spec), sort_keys=True).encode())
        for name, tensor in sorted(self.detector.state_dict().items()):
            digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Self:
        """Move the detector."""
        self.detector.to(device)
        return self

    @torch.no_grad()
    def observe(self, batch: Batch, *, backbone: bool = False, prediction: bool = False) -> Observation:
        """Run the teacher as far as asked. Several methods asking about the same batch share one run.

        Raises:
            TypeError: backbone features are wanted of a detector that does not show them.
        """
        seen = self._seen[1] if self._seen is not None and self._seen[0] is batch else None
        features = seen.features if seen else self.detector.features(batch)
        backbone_features = seen.backbone_features if seen else None
        predicted = seen.prediction if seen else None
        if backbone and backbone_features is None:
            if not isinstance(self.detector, HasBackboneFeatures):
                raise TypeError(f"teacher {self.spec.name} shows no backbone features")
            backbone_features = self.detector.backbone_features(batch)
        if prediction and predicted is None:
            predicted = self.detector.predict(features, batch)
        self._seen = (batch, Observation(features, backbone_features, predicted))
        # Only what was asked: the knowledge of a method (and its size in a cache) must not depend on the other methods.
        return Observation(features, backbone_features if backbone else None, predicted if prediction else None)

    def forget(self) -> None:
        """Let go of the last batch's observation (the loop calls this after each step)."""
        self._seen = None
