"""Mask R-CNN on a feature pyramid: torchvision's model in stages.

He et al., "Mask R-CNN", ICCV 2017, as in ``torchvision.models.detection``. Detections are boxes; the mask branch trains
(``Target.masks``) and travels with the exported model, whose own call returns masks too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn
from torchvision.models.detection import MaskRCNN

from detdistill.detectors.student_files.load_student import TimmPyramid
from detdistill.detectors.student_files.load_student import build as build_model
from detdistill.detectors.torchvision.backbones import load_pretrained
from detdistill.detectors.two_stage.shared.detector import TwoStageDetector, TwoStageOptions, two_stage_description

MODEL_CLASS = MaskRCNN
OPTIONS = TwoStageOptions
TINY = "resnet10t,channels=8-16-32-64,stem=8,neck=32,mlp=32,proposals=20,rois=16"
"""The smallest useful model, for ``probe``."""


def build(backbone: str, classes: Sequence[str], options: TwoStageOptions) -> MaskRCNNDetector:
    """A fresh Mask R-CNN on a timm backbone: levels P2-P5 and torchvision's ``pool``; the mask branch is as wide as the neck.

    See ``two_stage_description`` for options and anchors.

    Raises:
        ModelError: the options do not fit the backbone or the detector.
    """
    package = "torchvision.models.detection.mask_rcnn"
    description = two_stage_description(f"{package}.MaskRCNN", backbone, classes, options)
    description |= {
        "mask_roi_pool": {**description["box_roi_pool"], "output_size": 14},
        "mask_head": {
            "call": f"{package}.MaskRCNNHeads",
            "in_channels": options.neck,
            "layers": [options.neck] * 4,
            "dilation": 1,
        },
        "mask_predictor": {
            "call": f"{package}.MaskRCNNPredictor",
            "in_channels": options.neck,
            "dim_reduced": options.neck,
            "num_classes": len(classes) + 1,
        },
    }
    model = build_model(description)
    if options.pretrained:
        load_pretrained(cast(TimmPyramid, model.backbone), description["backbone"])
    return wrap_model(model, classes, options.name or f"mask_rcnn:{backbone}", description=description)


def wrap_model(
    model: nn.Module,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> MaskRCNNDetector:
    """Somebody's ``torchvision.models.detection.MaskRCNN``.

    Raises:
        ModelError: its backbone or its box predictor is not of torchvision's kind.
    """
    return MaskRCNNDetector(model, classes, name, columns, description)


class MaskRCNNDetector(TwoStageDetector):
    """As Faster R-CNN, and the term ``loss_mask``."""
