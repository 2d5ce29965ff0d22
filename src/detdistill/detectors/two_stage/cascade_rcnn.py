"""Cascade R-CNN on a feature pyramid: three stages of torchvision's RoI heads.

This file has the adapter; network and inference are ``models.cascade.CascadeRCNN``. Cai and Vasconcelos, "Cascade R-CNN:
Delving into High Quality Object Detection", CVPR 2018, with the loss weights and standard deviations of the released
configurations. Two details differ from the release and equal torchvision's Faster R-CNN: the first stage also uses anchors
that cross the image border, and each bin of RoIAlign samples 2 x 2 points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from detdistill.detectors.student_files.load_student import TimmPyramid
from detdistill.detectors.student_files.load_student import build as build_model
from detdistill.detectors.student_files.models.cascade import CascadeRCNN
from detdistill.detectors.torchvision.backbones import load_pretrained
from detdistill.detectors.two_stage.shared.cascade import CascadeDetector, cascade_description
from detdistill.detectors.two_stage.shared.detector import TwoStageOptions

MODEL_CLASS = CascadeRCNN
OPTIONS = TwoStageOptions
TINY = "resnet10t,channels=8-16-32-64,stem=8,neck=32,mlp=32,proposals=20,rois=16"
"""The smallest useful model, for ``probe``."""


def build(backbone: str, classes: Sequence[str], options: TwoStageOptions) -> CascadeRCNNDetector:
    """Build a Cascade R-CNN of three stages with random weights on a timm backbone.

    Default levels: P2-P5 and torchvision's ``pool``. See ``two_stage_description`` for options and anchors; ``rois`` and
    ``mlp`` apply to each stage.

    Raises:
        ModelError: the options do not fit the backbone or the detector.
    """
    description = cascade_description("models.cascade.CascadeRCNN", backbone, classes, options)
    model = build_model(description)
    if options.pretrained:
        load_pretrained(cast(TimmPyramid, model.backbone), description["backbone"], options.pretrained)
    return wrap_model(model, classes, options.name or f"cascade_rcnn:{backbone}", description=description)


def wrap_model(
    model: nn.Module,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> CascadeRCNNDetector:
    """Wrap a built ``models.cascade.CascadeRCNN``.

    Raises:
        ModelError: the backbone has no feature pyramid, or the model has outputs without a class.
    """
    return CascadeRCNNDetector(model, classes, name, columns, description)


class CascadeRCNNDetector(CascadeDetector):
    """Adapter of Cascade R-CNN. Loss terms: ``loss_{objectness,rpn_box_reg}`` and ``loss_{classifier,box_reg}_stage{1,2,3}``."""
