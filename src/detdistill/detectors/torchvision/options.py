"""Groups of model options for several detector families. The ``OPTIONS`` class of an adapter inherits the groups it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from detdistill.detectors.options import ModelOptions
from detdistill.values import Ascending, Count, Fraction, Limits, Positive

Level = Annotated[int, Limits(1, 11)]
"""Number of a pyramid level; level l has stride 2^l."""
Levels = Annotated[tuple[Level, Level], Ascending()]
"""First and last pyramid level of a detector."""


@dataclass(frozen=True, kw_only=True)
class LevelOptions(ModelOptions):
    """Options of the pyramid levels: maps of the backbone and levels added above them."""

    levels: Levels = (3, 7)
    """First and last pyramid level; level l has stride 2^l. Levels above the backbone's deepest map are added."""


@dataclass(frozen=True, kw_only=True)
class PyramidOptions(LevelOptions):
    """Options of a feature pyramid."""

    neck: Count = 256
    """Channels of the feature pyramid."""


@dataclass(frozen=True, kw_only=True)
class BackboneOptions(ModelOptions):
    """Options of a timm backbone."""

    width: Positive = 1.0
    """Multiplier of the backbone's channels (timm's resnet family)."""
    channels: tuple[Count, ...] | None = None
    """Channels of the backbone's stages (timm's resnet family), written ``16-32-64-128``."""
    stem: Count | None = None
    """Channels of the stem (timm's resnet family). Deep stem: timm's ``stem_width``, half of the stem's output channels."""
    pretrained: bool | str = False
    """Start from backbone weights: `true` for timm's own, or a file of weights for this timm model (.safetensors or .pth)."""
    norm: Literal["bn", "frozen"] = "bn"
    """``bn``: BatchNorm trains; ``frozen``: BatchNorm is constant."""


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(ModelOptions):
    """Options that select the detections."""

    score: Fraction = 0.05
    """Detections below this score are dropped."""
    dets: Count = 100
    """Maximum number of detections of an image."""


@dataclass(frozen=True, kw_only=True)
class CandidateOptions(SelectionOptions):
    """Options that select the detections by non-maximum suppression."""

    topk: Count = 1000
    """Number of candidates of each level (SSD: of each class) before non-maximum suppression."""
