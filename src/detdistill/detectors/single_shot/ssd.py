"""SSD: torchvision's model, run stage by stage, on VGG-16 or on any timm backbone.

Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016, as in ``torchvision.models.detection``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torchvision.models import VGG16_Weights
from torchvision.models.detection.ssd import SSD, ssd300_vgg16

from detdistill.detectors.single_shot.shared.detector import SingleShotDetector, wrap_ssd
from detdistill.detectors.student_files.load_student import build as build_model
from detdistill.detectors.torchvision.backbones import image_statistics, load_pretrained, pyramid_description
from detdistill.detectors.torchvision.options import BackboneOptions, CandidateOptions, Levels, PyramidOptions
from detdistill.errors import ModelError
from detdistill.values import Count, Fraction

MODEL_CLASS = SSD


@dataclass(frozen=True, kw_only=True)
class SSDSelectionOptions(CandidateOptions):
    """Options of all SSD models; the defaults are torchvision's."""

    score: Fraction = 0.01
    topk: Count = 400
    dets: Count = 200


@dataclass(frozen=True, kw_only=True)
class SSDOptions(SSDSelectionOptions, BackboneOptions, PyramidOptions):
    """Options of an SSD on a timm backbone, which takes images of any size."""

    levels: Levels = (3, 8)


@dataclass(frozen=True, kw_only=True)
class VGGOptions(SSDSelectionOptions):
    """Options of torchvision's SSD on VGG-16."""

    size: Literal[300, 512] = 300
    """Side of the input images in pixels: 300 (SSD300) or 512 (SSD512)."""
    pretrained: bool = False
    """Start from torchvision's VGG-16 weights."""


OPTIONS = SSDOptions
OPTIONS_OF_BACKBONE = {"vgg16": VGGOptions}


def build(backbone: str, classes: Sequence[str], options: SSDOptions | VGGOptions) -> SingleShotDetector:
    """Build an SSD with random weights.

    Args:
        backbone: ``vgg16`` for torchvision's SSD300 (SSD512 with ``size=512``), or the name of a timm model. Blocks of stride 2
            with ``options.neck`` channels add the levels above the timm model's maps.
        classes: names of the K classes, in label order.
        options: options of the model string: ``VGGOptions`` for ``vgg16``, else ``SSDOptions``.

    Raises:
        ModelError: the options do not fit the backbone, or pretrained weights cannot be downloaded.
    """
    name = options.name or f"ssd:{backbone}"
    if isinstance(options, VGGOptions):
        return _vgg16(classes, options, name)
    pyramid = pyramid_description(backbone, options, options.levels, options.neck)
    pyramid = {key: value for key, value in pyramid.items() if key != "top"} | {"call": "TimmLevels"}
    mean, std = image_statistics(backbone, options)
    count = len(pyramid["indices"]) + len(pyramid["extra"])
    # The boxes of SSD300: side 0.07 of the image on the finest level, then evenly spaced from 0.15 to 1.05. Aspect ratio 2 on
    # the first and the last two levels, 2 and 3 on the levels between.
    rest = [0.15 + 0.9 * level / max(1, count - 1) for level in range(count)]
    description: dict[str, Any] = {
        "call": "single_shot",
        "backbone": pyramid,
        "anchor_generator": {
            "call": "torchvision.models.detection.anchor_utils.DefaultBoxGenerator",
            "aspect_ratios": [[2, 3] if 0 < level < max(2, count - 2) else [2] for level in range(count)],
            "scales": [round(scale, 4) for scale in (0.07, *rest)],
        },
        "num_classes": len(classes) + 1,
        "image_mean": mean,
        "image_std": std,
        **_results(options),
    }
    model: Any = build_model(description)
    if options.pretrained:
        load_pretrained(model.backbone, pyramid, options.pretrained)
    return wrap_ssd(model, classes, name, description=description)


def wrap_model(
    model: nn.Module,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> SingleShotDetector:
    """Wrap a built ``torchvision.models.detection.SSD`` (also an SSDLite, which is the same class with another head).

    Raises:
        ModelError: the model is not an SSD, or its backbone is of an unsupported kind.
    """
    return wrap_ssd(model, classes, name, columns, description)


def _vgg16(classes: Sequence[str], options: VGGOptions, name: str) -> SingleShotDetector:
    description: dict[str, Any] = {"num_classes": len(classes) + 1, **_results(options)}
    if options.size == 512:
        description["call"] = "ssd512_vgg16"
    else:
        description |= {"call": "torchvision.models.detection.ssd300_vgg16", "weights": None, "weights_backbone": None}
    model: Any = build_model(description)
    if options.pretrained:
        try:
            backbone = ssd300_vgg16(weights_backbone=VGG16_Weights.IMAGENET1K_FEATURES, num_classes=2).backbone
        except OSError as error:
            raise ModelError(f"{name}: no pretrained weights: {error}; leave out pretrained=true") from error
        with torch.no_grad():
            model.backbone.features.load_state_dict(backbone.features.state_dict())
            model.backbone.extra[0].load_state_dict(backbone.extra[0].state_dict())
    return wrap_ssd(model, classes, name, description=description)


def _results(options: SSDSelectionOptions) -> dict[str, float]:
    return {"score_thresh": options.score, "topk_candidates": options.topk, "detections_per_img": options.dets}
