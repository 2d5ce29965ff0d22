"""Options shared by detectors with queries, in groups that an adapter's ``OPTIONS`` inherits from."""

from __future__ import annotations

from dataclasses import dataclass

from detdistill.detectors.options import ModelOptions
from detdistill.values import Count, Fraction


@dataclass(frozen=True, kw_only=True)
class QueryOptions(ModelOptions):
    """Options of the queries and the decoder."""

    dim: Count = 256
    """Channels of the queries and of the features they read."""
    queries: Count = 300
    """Number of queries per image."""
    decoder: Count = 6
    """Number of decoder layers."""
    heads: Count = 8
    """Number of attention heads."""
    ffn: Count = 2048
    """Inner width of the feed-forward layers."""


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(ModelOptions):
    """Options of an encoder between backbone and decoder."""

    encoder: Count = 6
    """Number of encoder layers."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(ModelOptions):
    """Options of deformable attention."""

    points: Count = 4
    """Points that a query samples for each head and level."""


@dataclass(frozen=True, kw_only=True)
class DetrSelectionOptions(ModelOptions):
    """Options that select which queries of a transformers model become detections."""

    score: Fraction = 0.0
    """Detections below this score are dropped."""
    dets: Count | None = None
    """Detections of an image at most."""
