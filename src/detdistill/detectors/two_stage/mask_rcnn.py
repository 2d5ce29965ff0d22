"""Mask R-CNN on a feature pyramid: torchvision's model, run stage by stage.

He et al., "Mask R-CNN", ICCV 2017, as in ``torchvision.models.detection``. Training needs ``Target.masks``.
Detections are boxes only. The exported model contains the mask branch and also returns masks.
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
    """Build a Mask R-CNN with random weights on a timm backbone.

    Default levels: P2-P5 and torchvision's ``pool``. The mask branch has as many channels as the neck. See
    ``two_stage_description`` for options and anchors.

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
        load_pretrained(cast(TimmPyramid, model.backbone), description["backbone"], options.pretrained)
    return wrap_model(model, classes, options.name or f"mask_rcnn:{backbone}", description=description)


def wrap_model(
    model: nn.Module,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> MaskRCNNDetector:
    """Wrap a built ``torchvision.models.detection.MaskRCNN``.

    Raises:
        ModelError: the backbone has no feature pyramid, the box predictor is not torchvision's, or the model has keypoints.
    """
    return MaskRCNNDetector(model, classes, name, columns, description)


class MaskRCNNDetector(TwoStageDetector):
    """Adapter of Mask R-CNN: Faster R-CNN with the additional loss term ``loss_mask``."""
