"""Intermediate results of one forward pass: which are requested (``Look``), and their values (``Observation``)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from detdistill.structures.base import ADDED, SHARED, PerImage
from detdistill.structures.batch import Batch
from detdistill.structures.features import Features
from detdistill.structures.predictions import Dense, Prediction, Queries, Regions
from detdistill.structures.targets import Assignment

WHOLE_TOWER = -1
"""Depth of a tower that stands for all of its blocks."""


@dataclass(frozen=True)
class Look:
    """The parts of a forward pass that are returned besides ``features``, which are always returned."""

    backbone: bool = False
    """Maps of the backbone, before the neck (``HasBackboneFeatures``)."""
    towers: tuple[int, ...] = ()
    """Depths at which the maps inside a dense head are returned (``HasTowers``); ``WHOLE_TOWER``: after all blocks."""
    prediction: bool = False
    """The raw prediction."""
    attention: bool = False
    """The raw prediction with the attention maps of the query decoder (``HasQueries``)."""

    def __or__(self, other: Look) -> Look:
        """The union of both."""
        return Look(
            self.backbone or other.backbone,
            tuple(sorted({*self.towers, *other.towers})),
            self.prediction or other.prediction,
            self.attention or other.attention,
        )


@dataclass(frozen=True)
class Tower(PerImage):
    """Maps inside a dense head after its first ``depth`` convolution blocks; all levels share the blocks."""

    classification: tuple[Tensor, ...]
    """L maps [B, C, H_l, W_l]."""
    regression: tuple[Tensor, ...]
    """L maps [B, C, H_l, W_l]."""
    depth: int = field(metadata=SHARED)
    """Number of blocks passed; at 0 both fields hold the neck's maps."""
    strides: tuple[int, ...] = field(metadata=SHARED)


@dataclass(frozen=True)
class Taught(PerImage):
    """Base of what ``Method.teach`` returns for a batch: ``Observation``, or a dataclass of the method's own."""


@dataclass(frozen=True)
class Observation(Taught):
    """Intermediate results of one forward pass: the student's are called ``seen``, the teacher's are the default ``taught``."""

    features: Features
    backbone_features: Features | None = None
    prediction: Prediction | None = None
    towers: tuple[Tower, ...] = field(default=(), metadata=ADDED)
    """The requested towers, in order of depth."""
    assignment: Assignment | None = field(default=None, metadata=SHARED | ADDED)
    """The student's own assignment of its prediction, if a method of the run requests it (``Needs.assignment``)."""

    def in_view_of(self, batch: Batch) -> Observation:
        """Convert what was seen in ``batch.large`` to the view of ``batch``.

        Maps are averaged over the cells of ``batch``; of dense predictions those at the centres of its cells are taken, and
        boxes are in its pixels. Queries stay, because their boxes are parts of the image.
        """

        def shrunk(features: Features) -> Features:
            return features.shrunk(batch.enlarged, batch.padding_hw, batch.sizes)

        def tower(one: Tower) -> Tower:
            classes, boxes = (shrunk(Features(side, one.strides)).maps for side in (one.classification, one.regression))
            return Tower(classes, boxes, one.depth, one.strides)

        prediction = self.prediction
        if isinstance(prediction, (Dense, Regions)):
            prediction = prediction.shrunk(batch.enlarged, batch.padding_hw, self.features.strides)
        return replace(
            self,
            features=shrunk(self.features),
            backbone_features=None if self.backbone_features is None else shrunk(self.backbone_features),
            prediction=prediction,
            towers=tuple(map(tower, self.towers)),
        )

    def tower(self, depth: int = WHOLE_TOWER) -> Tower:
        """The tower of the given depth.

        Raises:
            KeyError: ``Look.towers`` did not contain this depth.
        """
        if depth == WHOLE_TOWER and self.towers:
            return self.towers[-1]
        for tower in self.towers:
            if tower.depth == depth:
                return tower
        raise KeyError(f"no tower of depth {depth} was looked at, only {[tower.depth for tower in self.towers]}")

    def only(self, look: Look) -> Observation:
        """The observation reduced to the parts that ``look`` requests.

        ``Teacher.observe`` uses it so that a method receives the same parts alone and in a composition.
        """
        prediction = self.prediction if look.prediction or look.attention else None
        if isinstance(prediction, Queries) and not look.attention:
            prediction = replace(prediction, attention=None, self_attention=None)
        return replace(
            self,
            backbone_features=self.backbone_features if look.backbone else None,
            prediction=prediction,
            towers=tuple({id(tower): tower for tower in map(self.tower, look.towers)}.values()),
        )


@dataclass(frozen=True)
class TaughtTogether(Taught):
    """The results of ``teach`` of a composition's methods, in the order of the methods."""

    parts: tuple[Taught | None, ...]
