"""Options that detectors of several families share, in groups that an adapter's ``OPTIONS`` combines by inheritance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from detdistill.detectors.options import ModelOptions
from detdistill.values import Ascending, Count, Fraction, Limits, Positive

Level = Annotated[int, Limits(1, 11)]
"""Level l of a pyramid has stride 2^l."""
Levels = Annotated[tuple[Level, Level], Ascending()]
"""First and last of the levels that a detector uses."""


@dataclass(frozen=True, kw_only=True)
class LevelOptions(ModelOptions):
    """Maps of the backbone, and added ones above them."""

    levels: Levels = (3, 7)
    """First and last pyramid level; level l has stride 2^l. Levels above the backbone's deepest are added."""


@dataclass(frozen=True, kw_only=True)
class PyramidOptions(LevelOptions):
    """A feature pyramid."""

    neck: Count = 256
    """Channels of the feature pyramid."""


@dataclass(frozen=True, kw_only=True)
class BackboneOptions(ModelOptions):
    """A backbone of timm."""

    width: Positive = 1.0
    """Multiplier of the backbone's channels (timm's resnet family)."""
    channels: tuple[Count, ...] | None = None
    """Channels of the backbone's stages (timm's resnet family), written ``16-32-64-128``."""
    stem: Count | None = None
    """Channels of the stem (timm's resnet family); of a deep stem, timm's ``stem_width``: it ends in twice as many."""
    pretrained: bool = False
    """Start from timm's backbone weights."""
    norm: Literal["bn", "frozen"] = "bn"
    """``bn``: BatchNorm trains; ``frozen``: it is constant."""


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(ModelOptions):
    """Which predictions become detections."""

    score: Fraction = 0.05
    """Detections below this score are dropped."""
    dets: Count = 100
    """Detections of an image at most."""


@dataclass(frozen=True, kw_only=True)
class CandidateOptions(SelectionOptions):
    """Which predictions become detections, by way of non-maximum suppression."""

    topk: Count = 1000
    """Candidates of each level (or image) before non-maximum suppression."""
