"""SSD: torchvision's model in stages, on VGG-16 or on any timm backbone.

Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016, as in ``torchvision.models.detection``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchvision.models import VGG16_Weights
from torchvision.models.detection.ssd import SSD, ssd300_vgg16

from detdistill.detectors.options import ModelOptions
from detdistill.detectors.single_shot.shared.detector import SingleShotDetector, wrap_ssd
from detdistill.detectors.student_files.load_student import build as build_model
from detdistill.detectors.torchvision.backbones import image_statistics, load_pretrained, pyramid_description
from detdistill.errors import ModelError

MODEL_CLASS = SSD


def build(backbone: str, classes: Sequence[str], options: ModelOptions) -> SingleShotDetector:
    """A fresh SSD.

    Args:
        backbone: ``vgg16`` for torchvision's SSD300, with ``size=512`` for SSD512; or a timm model, whose maps are followed by
            stride-2 blocks of ``options.neck`` channels up to the last level (levels 3-8).
        classes: names of the labels.
        options: of the model string.

    Raises:
        ModelError: the options do not fit.
    """
    options.refuse("ssd", "weights", "convs", "proposals", "rois", "mlp")
    name = options.name or f"ssd:{backbone}"
    if backbone == "vgg16":
        return _vgg16(classes, options, name)
    options.refuse(f"ssd:{backbone}", "size")  # it takes images as they come
    pyramid = pyramid_description(backbone, options, levels=(3, 8))
    pyramid = {key: value for key, value in pyramid.items() if key != "top"} | {"call": "TimmLevels"}
    mean, std = image_statistics(backbone, options)
    count = len(pyramid["indices"]) + len(pyramid["extra"])
    # SSD300's boxes: 0.07 of the image on the finest level, then evenly from 0.15 to 1.05; three shapes of ratio 2 at the
    # ends, five of ratios 2 and 3 between.
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
        load_pretrained(model.backbone, pyramid)
    return wrap_ssd(model, classes, name, description=description)


def wrap_model(
    model: nn.Module,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> SingleShotDetector:
    """Somebody's ``torchvision.models.detection.SSD``, SSDLite included: it is the same class with another head.

    Raises:
        ModelError: its backbone is of an unknown kind.
    """
    return wrap_ssd(model, classes, name, columns, description)


def _vgg16(classes: Sequence[str], options: ModelOptions, name: str) -> SingleShotDetector:
    options.refuse("ssd:vgg16", "neck", "levels", "width", "channels", "stem", "norm")
    if options.size not in (None, 300, 512):
        raise ModelError(f"{name}: size={options.size}: SSD with VGG-16 is made for 300 or 512 pixels")
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


def _results(options: ModelOptions) -> dict[str, float]:
    return {
        "score_thresh": 0.01 if options.score is None else options.score,
        "topk_candidates": options.topk or 400,
        "detections_per_img": options.dets or 200,
    }
