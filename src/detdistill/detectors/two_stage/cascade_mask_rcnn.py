"""Cascade Mask R-CNN on a feature pyramid: three stages, a mask branch in each.

This file has the adapter; network and inference are ``models.cascade.CascadeMaskRCNN``. Cai and Vasconcelos, "Cascade R-CNN:
High Quality Object Detection and Instance Segmentation", TPAMI 2019: the mask branch of each stage is trained on that
stage's positive regions, with that stage's weight. Training needs ``Target.masks``. Detections are boxes only. The exported
model contains the mask branches and returns the mean of their masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from detdistill.detectors.student_files.load_student import TimmPyramid
from detdistill.detectors.student_files.load_student import build as build_model
from detdistill.detectors.student_files.models.cascade import CascadeMaskRCNN
from detdistill.detectors.torchvision.backbones import load_pretrained
from detdistill.detectors.two_stage.shared.cascade import CascadeDetector, cascade_description
from detdistill.detectors.two_stage.shared.detector import TwoStageOptions

MODEL_CLASS = CascadeMaskRCNN
OPTIONS = TwoStageOptions
TINY = "resnet10t,channels=8-16-32-64,stem=8,neck=32,mlp=32,proposals=20,rois=16"
"""The smallest useful model, for ``probe``."""


def build(backbone: str, classes: Sequence[str], options: TwoStageOptions) -> CascadeMaskRCNNDetector:
    """Build a Cascade Mask R-CNN of three stages with random weights on a timm backbone.

    The mask branches have as many channels as the neck. See ``two_stage_description`` for options and anchors; ``rois`` and
    ``mlp`` apply to each stage.

    Raises:
        ModelError: the options do not fit the backbone or the detector.
    """
    description = cascade_description("models.cascade.CascadeMaskRCNN", backbone, classes, options)
    description["mask_roi_pool"] = {**description["box_roi_pool"], "output_size": 14}
    model = build_model(description)
    if options.pretrained:
        load_pretrained(cast(TimmPyramid, model.backbone), description["backbone"], options.pretrained)
    return wrap_model(model, classes, options.name or f"cascade_mask_rcnn:{backbone}", description=description)


def wrap_model(
    model: nn.Module,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> CascadeMaskRCNNDetector:
    """Wrap a built ``models.cascade.CascadeMaskRCNN``.

    Raises:
        ModelError: the backbone has no feature pyramid, or the model has outputs without a class.
    """
    return CascadeMaskRCNNDetector(model, classes, name, columns, description)


class CascadeMaskRCNNDetector(CascadeDetector):
    """Adapter of Cascade Mask R-CNN: Cascade R-CNN with the additional loss terms ``loss_mask_stage{1,2,3}``."""
