"""Faster R-CNN on a feature pyramid: torchvision's model, run stage by stage.

Ren et al., "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks", NeurIPS 2015, with Lin et
al., "Feature Pyramid Networks for Object Detection", CVPR 2017, as in ``torchvision.models.detection``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn
from torchvision.models.detection import FasterRCNN

from detdistill.detectors.student_files.load_student import TimmPyramid
from detdistill.detectors.student_files.load_student import build as build_model
from detdistill.detectors.torchvision.backbones import load_pretrained
from detdistill.detectors.two_stage.shared.detector import TwoStageDetector, TwoStageOptions, two_stage_description

MODEL_CLASS = FasterRCNN
OPTIONS = TwoStageOptions
TINY = "resnet10t,channels=8-16-32-64,stem=8,neck=32,mlp=32,proposals=20,rois=16"
"""The smallest useful model, for ``probe``."""


def build(backbone: str, classes: Sequence[str], options: TwoStageOptions) -> FasterRCNNDetector:
    """Build a Faster R-CNN with random weights on a timm backbone.

    Default levels: P2-P5 and torchvision's ``pool``; all other defaults are torchvision's.
    See ``two_stage_description`` for options and anchors.

    Raises:
        ModelError: the options do not fit the backbone or the detector.
    """
    description = two_stage_description("torchvision.models.detection.FasterRCNN", backbone, classes, options)
    model = build_model(description)
    if options.pretrained:
        load_pretrained(cast(TimmPyramid, model.backbone), description["backbone"], options.pretrained)
    return wrap_model(model, classes, options.name or f"faster_rcnn:{backbone}", description=description)


def wrap_model(
    model: nn.Module,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> FasterRCNNDetector:
    """Wrap a built ``torchvision.models.detection.FasterRCNN``.

    Raises:
        ModelError: the backbone has no feature pyramid, the box predictor is not torchvision's, or the model has keypoints.
    """
    return FasterRCNNDetector(model, classes, name, columns, description)


class FasterRCNNDetector(TwoStageDetector):
    """Adapter of Faster R-CNN. Loss terms: ``loss_{objectness,rpn_box_reg,classifier,box_reg}``."""
