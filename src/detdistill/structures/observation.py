"""One pass of a detector: which parts are looked at, and what they showed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from detdistill.structures.base import ADDED, SHARED, PerImage
from detdistill.structures.features import Features
from detdistill.structures.predictions import Prediction, Queries

WHOLE_TOWER = -1
"""Depth of a tower: all of its blocks, however many the detector has."""


@dataclass(frozen=True)
class Look:
    """Parts of a detector that one pass shows, beside ``features``, which every pass shows."""

    backbone: bool = False
    """The backbone's maps, before the neck (``HasBackboneFeatures``)."""
    towers: tuple[int, ...] = ()
    """Depths at which the inside of a dense head is shown (``HasTowers``); ``WHOLE_TOWER``: after all blocks."""
    prediction: bool = False
    """The raw prediction."""
    attention: bool = False
    """The prediction, with the attention maps of the query decoder (``HasQueries``)."""

    def __or__(self, other: Look) -> Look:
        """All that either of them shows."""
        return Look(
            self.backbone or other.backbone,
            tuple(sorted({*self.towers, *other.towers})),
            self.prediction or other.prediction,
            self.attention or other.attention,
        )


@dataclass(frozen=True)
class Tower(PerImage):
    """The inside of a dense head after ``depth`` of its convolution blocks, which all levels share."""

    classification: tuple[Tensor, ...]
    """L maps [B, C, H_l, W_l]."""
    regression: tuple[Tensor, ...]
    """L maps [B, C, H_l, W_l]."""
    depth: int = field(metadata=SHARED)
    """0: the neck's maps, on both sides."""
    strides: tuple[int, ...] = field(metadata=SHARED)


@dataclass(frozen=True)
class Taught(PerImage):
    """What the teacher says about a batch. A method with more to say than ``Observation`` derives its own dataclass."""


@dataclass(frozen=True)
class Observation(Taught):
    """What one forward pass of a detector showed: the student's as ``seen``, the teacher's as the default ``taught``."""

    features: Features
    backbone_features: Features | None = None
    prediction: Prediction | None = None
    towers: tuple[Tower, ...] = field(default=(), metadata=ADDED)
    """In order of depth."""

    def tower(self, depth: int = WHOLE_TOWER) -> Tower:
        """The head's inside at a depth that was looked at.

        Raises:
            KeyError: it was not.
        """
        if depth == WHOLE_TOWER and self.towers:
            return self.towers[-1]
        for tower in self.towers:
            if tower.depth == depth:
                return tower
        raise KeyError(f"no tower of depth {depth} was looked at, only {[tower.depth for tower in self.towers]}")

    def only(self, look: Look) -> Observation:
        """The parts that ``look`` names: what a method is taught must not depend on what others looked at."""
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
    """What the methods of a composition were taught, in their order."""

    parts: tuple[Taught | None, ...]
