"""From a model string to a fresh detector.

fcos:resnet10t,levels=3-5          an adapter on a timm backbone
torchvision:fcos_resnet50_fpn      a detector of torchvision by its own name
"""

from __future__ import annotations

from collections.abc import Sequence

from detdistill.detectors.adapters import adapter, read_model
from detdistill.detectors.contract import Detector
from detdistill.errors import ModelError


def build_detector(name: str, classes: Sequence[str]) -> Detector:
    """A fresh detector from a model string.

    Raises:
        ModelError: the detector, backbone or an option is unknown, or they do not fit each other.
    """
    model, options = read_model(name)
    if not classes:
        raise ModelError(f"model {name!r}: no classes given")
    detector: Detector = adapter(model.detector).build(model.backbone, tuple(classes), options)
    return detector
