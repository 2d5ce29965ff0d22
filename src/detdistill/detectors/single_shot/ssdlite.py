"""SSDLite, an SSD with depthwise convolutions: torchvision's model, run stage by stage, on MobileNetV3 or on any timm backbone.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, section 6.2, and Howard et al.,
"Searching for MobileNetV3", ICCV 2019, section 6.3, as in ``torchvision.models.detection``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detdistill.detectors.single_shot.shared.detector import SingleShotDetector, wrap_ssd
from detdistill.detectors.student_files.load_student import build as build_model
from detdistill.detectors.torchvision.backbones import image_statistics, load_pretrained, pyramid_description
from detdistill.detectors.torchvision.options import BackboneOptions, CandidateOptions, Levels, PyramidOptions
from detdistill.values import Count, Fraction


@dataclass(frozen=True, kw_only=True)
class SSDLiteSelectionOptions(CandidateOptions):
    """Options of all SSDLite models; torchvision's own SSDLite320 has no others. The defaults are torchvision's."""

    score: Fraction = 0.001
    topk: Count = 300
    dets: Count = 300


@dataclass(frozen=True, kw_only=True)
class SSDLiteOptions(SSDLiteSelectionOptions, BackboneOptions, PyramidOptions):
    """Options of an SSDLite on a timm backbone."""

    levels: Levels = (4, 9)


OPTIONS = SSDLiteOptions
# No pretrained= here: torchvision's pretrained MobileNetV3 lacks the reduced tail, so its weights do not fit.
OPTIONS_OF_BACKBONE = {"mobilenet_v3_large": SSDLiteSelectionOptions}


def build(backbone: str, classes: Sequence[str], options: SSDLiteSelectionOptions) -> SingleShotDetector:
    """Build an SSDLite with random weights.

    Args:
        backbone: ``mobilenet_v3_large`` for torchvision's SSDLite320, or the name of a timm model. Depthwise blocks of stride 2
            with ``options.neck`` channels add the levels above the timm model's maps.
        classes: names of the K classes, in label order.
        options: options of the model string: ``SSDLiteOptions`` for a timm model, else ``SSDLiteSelectionOptions``.

    Raises:
        ModelError: the options do not fit the backbone, or pretrained weights cannot be downloaded.
    """
    name = options.name or f"ssdlite:{backbone}"
    results = {"score_thresh": options.score, "topk_candidates": options.topk, "detections_per_img": options.dets}
    if not isinstance(options, SSDLiteOptions):
        named: dict[str, Any] = {
            "call": "torchvision.models.detection.ssdlite320_mobilenet_v3_large",
            "weights": None,
            "weights_backbone": None,
            "num_classes": len(classes) + 1,
            **results,
        }
        return wrap_ssd(build_model(named), classes, name, description=named)
    pyramid = pyramid_description(backbone, options, options.levels, options.neck)
    pyramid = {key: value for key, value in pyramid.items() if key != "top"} | {"call": "TimmLiteLevels"}
    mean, std = image_statistics(backbone, options)
    description: dict[str, Any] = {
        "call": "single_shot",
        "backbone": pyramid,
        "anchor_generator": {
            "call": "torchvision.models.detection.anchor_utils.DefaultBoxGenerator",
            "aspect_ratios": [[2, 3]] * (len(pyramid["indices"]) + len(pyramid["extra"])),
            "min_ratio": 0.2,
            "max_ratio": 0.95,
        },
        "num_classes": len(classes) + 1,
        "lite": True,
        "image_mean": mean,
        "image_std": std,
        "nms_thresh": 0.55,
        **results,
    }
    model: Any = build_model(description)
    if options.pretrained:
        load_pretrained(model.backbone, pyramid, options.pretrained)
    return wrap_ssd(model, classes, name, description=description)
