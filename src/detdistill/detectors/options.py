"""Model strings: ``detector:backbone[,key=value]...``, read into typed options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from detdistill.errors import ModelError, nearest

DETRS = (
    *("detr", "conditional_detr", "dab_detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine"),
    *("deimv2", "lw_detr", "rf_detr"),
)
"""Adapters of transformers' DETR families."""
DENOISING = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2")
"""Those that train on noisy ground truth beside their queries."""
DEFORMABLE = ("deformable_detr", *DENOISING, "lw_detr", "rf_detr")
"""Those whose queries sample points of the maps."""


@dataclass(frozen=True)
class ModelOptions:
    """What a model string may say after the backbone. None: the detector's own default."""

    neck: int = 256
    """Channels of the feature pyramid."""
    levels: tuple[int, int] | None = None
    """First and last pyramid level; level l has stride 2^l. Levels above the backbone's deepest are added."""
    width: float = 1.0
    """Multiplier of the backbone's channels (timm's resnet family)."""
    channels: tuple[int, ...] | None = None
    """Channels of the backbone's stages (timm's resnet family), written ``16-32-64-128``."""
    stem: int | None = None
    """Channels of the stem (timm's resnet family); of a deep stem, timm's ``stem_width``: it ends in twice as many."""
    convs: int | None = None
    """Convolutions in the head before the output layers."""
    pretrained: bool = False
    """Start from timm's backbone weights."""
    norm: str = "bn"
    """``bn``: BatchNorm trains; ``frozen``: it is constant."""
    score: float | None = None
    """Detections below this score are dropped."""
    topk: int | None = None
    """Candidates of each level (or image) before non-maximum suppression."""
    dets: int | None = None
    """Detections of an image at most."""
    proposals: int | None = None
    """Proposals of an image after non-maximum suppression (two-stage detectors)."""
    rois: int | None = None
    """Regions of an image that the second stage is trained on (two-stage detectors)."""
    mlp: int | None = None
    """Width of the box head's two layers (two-stage detectors)."""
    size: int | None = field(default=None, metadata={"only": ("ssd",)})
    """Side of the images that the detector is made for: 300 or 512 (``ssd:vgg16`` only)."""
    anchors: float | None = field(default=None, metadata={"only": ("retinanet",)})
    """Side of the smallest anchor of a cell, in strides (``retinanet``; 4). Less than 4 for objects smaller than 32 pixels."""
    dim: int | None = field(default=None, metadata={"only": ("adamixer", *DETRS)})
    """Channels of the queries and of the features they read (detectors with queries)."""
    queries: int | None = field(default=None, metadata={"only": ("adamixer", *DETRS)})
    """Queries of an image (detectors with queries)."""
    encoder: int | None = field(default=None, metadata={"only": DETRS})
    """Encoder layers (DETR families)."""
    decoder: int | None = field(default=None, metadata={"only": ("adamixer", *DETRS)})
    """Decoder layers (detectors with queries)."""
    heads: int | None = field(default=None, metadata={"only": ("adamixer", *DETRS)})
    """Heads of the attention (detectors with queries)."""
    ffn: int | None = field(default=None, metadata={"only": ("adamixer", *DETRS)})
    """Inner width of the feed-forward layers (detectors with queries)."""
    groups: int | None = field(default=None, metadata={"only": ("adamixer",)})
    """Groups of channels that are sampled and mixed apart (``adamixer`` only)."""
    points: int | None = field(default=None, metadata={"only": ("adamixer", *DEFORMABLE)})
    """Points that a query samples for each group (``adamixer``), or for each head and level (deformable DETRs)."""
    denoising: int | None = field(default=None, metadata={"only": DENOISING})
    """Denoising queries in training, about; 0: none (RT-DETR and its relatives)."""
    refine: bool = field(default=False, metadata={"only": ("deformable_detr",)})
    """Each decoder layer moves the boxes of the layer before (``deformable_detr`` only)."""
    two_stage: bool = field(default=False, metadata={"only": ("deformable_detr",)})
    """Queries are chosen from the encoder's cells; includes ``refine`` (``deformable_detr`` only)."""
    headnorm: str = field(default="gn", metadata={"only": ("reppoints",)})
    """``gn``: GroupNorm in the towers of the head; ``none``: no norm (``reppoints`` only)."""
    weights: str | None = None
    """Name of torchvision's weights (``torchvision:`` only), e.g. ``COCO_V1``."""
    name: str = ""
    """The whole model string: the name that the detector gets."""

    def refuse_foreign(self, detector: str) -> None:
        """Refuse options of other detectors: fields whose metadata ``only`` names the adapters that have them.

        Raises:
            ModelError: one was given.
        """
        foreign = [f.name for f in dataclasses.fields(self) if detector not in f.metadata.get("only", (detector,))]
        self.refuse(detector, *foreign)

    def refuse(self, detector: str, *names: str) -> None:
        """Say that a detector has no use for some options, if they were given.

        Raises:
            ModelError: one of ``names`` differs from its default.
        """
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        given = [name for name in names if getattr(self, name) != defaults[name]]
        if given:
            raise ModelError(f"{detector} has no option {', '.join(given)}; leave it out of the model string")


@dataclass(frozen=True)
class ModelName:
    """A model string in parts."""

    text: str
    """As it was written: the detector's name everywhere."""
    detector: str
    backbone: str
    options: ModelOptions


def parse_model(text: str) -> ModelName:
    """Read a model string.

    Raises:
        ModelError: it is malformed, or has an unknown key or an impossible value.

    Example:
        >>> parse_model("fcos:resnet10t,channels=16-32-64-128,levels=3-5").options.levels
        (3, 5)
    """
    head, *parts = _pieces(text)
    detector, colon, backbone = head.partition(":")
    if not (detector and colon and backbone):
        raise ModelError(f"model {text!r}: expected detector:backbone[,key=value]..., e.g. retinanet:resnet18")
    values: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if key not in READERS:
            raise ModelError(f"model {text!r}: unknown option {key!r}{nearest(key, READERS)}; known: {', '.join(READERS)}")
        if not equals or not value:
            raise ModelError(f"model {text!r}: option {key} needs a value, {key}=...")
        if key in values:
            raise ModelError(f"model {text!r}: option {key} is given twice")
        reader, wanted = READERS[key]
        try:
            values[key] = reader(value)
        except ValueError:
            raise ModelError(f"model {text!r}: {key}={value} is no {wanted}") from None
    return ModelName(text, detector, backbone, ModelOptions(**values, name=text))


def _pieces(text: str) -> list[str]:
    """A model string cut at its commas; a name after ``hf:`` may hold commas of its own, so options are read from the end."""
    pieces = text.split(",")
    if text.startswith("hf:"):
        first = len(pieces)
        while first > 1 and pieces[first - 1].partition("=")[0].strip() in READERS:
            first -= 1
        pieces = [",".join(pieces[:first]), *pieces[first:]]
    return [piece.strip() for piece in pieces]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _factor(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError(text)
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise ValueError(text)
    return number


def _levels(text: str) -> tuple[int, int]:
    first, last = map(int, text.split("-"))
    if not 0 < first <= last < 12:
        raise ValueError(text)
    return first, last


def _channels(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split("-"))


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else bool(_fail(text))


def _norm(text: str) -> str:
    return text if text in ("bn", "frozen") else _fail(text)


def _head_norm(text: str) -> str:
    return text if text in ("gn", "none") else _fail(text)


def _convs(text: str) -> int:
    return int(text) if int(text) >= 0 else int(_fail(text))


def _fail(text: str) -> str:
    raise ValueError(text)


READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "neck": (_positive, "positive whole number"),
    "levels": (_levels, "range of levels a-b such as 3-7"),
    "width": (_factor, "positive number"),
    "channels": (_channels, "list of channels such as 16-32-64-128"),
    "stem": (_positive, "positive whole number"),
    "convs": (_convs, "whole number"),
    "pretrained": (_truth, "truth value (true or false)"),
    "norm": (_norm, "known norm (bn or frozen)"),
    "score": (_share, "number from 0 to 1"),
    "topk": (_positive, "positive whole number"),
    "dets": (_positive, "positive whole number"),
    "proposals": (_positive, "positive whole number"),
    "rois": (_positive, "positive whole number"),
    "mlp": (_positive, "positive whole number"),
    "size": (_positive, "positive whole number"),
    "anchors": (_factor, "positive number"),
    "dim": (_positive, "positive whole number"),
    "queries": (_positive, "positive whole number"),
    "encoder": (_positive, "positive whole number"),
    "decoder": (_positive, "positive whole number"),
    "heads": (_positive, "positive whole number"),
    "ffn": (_positive, "positive whole number"),
    "groups": (_positive, "positive whole number"),
    "points": (_positive, "positive whole number"),
    "denoising": (_convs, "whole number"),
    "refine": (_truth, "truth value (true or false)"),
    "two_stage": (_truth, "truth value (true or false)"),
    "headnorm": (_head_norm, "known norm of the head (gn or none)"),
    "weights": (str, "name of weights"),
}
"""Options of the model string: how each is read, and what it should have been."""
