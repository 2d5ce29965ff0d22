"""Options that detectors with queries share, in groups that an adapter's ``OPTIONS`` combines by inheritance."""

from __future__ import annotations

from dataclasses import dataclass

from detdistill.detectors.options import ModelOptions
from detdistill.values import Count, Fraction


@dataclass(frozen=True, kw_only=True)
class QueryOptions(ModelOptions):
    """Queries and their decoder."""

    dim: Count = 256
    """Channels of the queries and of the features they read."""
    queries: Count = 300
    """Queries of an image."""
    decoder: Count = 6
    """Decoder layers."""
    heads: Count = 8
    """Heads of the attention."""
    ffn: Count = 2048
    """Inner width of the feed-forward layers."""


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(ModelOptions):
    """An encoder between backbone and decoder."""

    encoder: Count = 6
    """Encoder layers."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(ModelOptions):
    """Deformable attention."""

    points: Count = 4
    """Points that a query samples for each head and level."""


@dataclass(frozen=True, kw_only=True)
class DetrSelectionOptions(ModelOptions):
    """Which queries of one of transformers' models become detections."""

    score: Fraction = 0.0
    """Detections below this score are dropped."""
    dets: Count | None = None
    """Detections of an image at most."""
