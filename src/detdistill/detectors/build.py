"""From a model string to a fresh detector.

fcos:resnet10t,levels=3-5          an adapter on a timm backbone
torchvision:fcos_resnet50_fpn      a detector of torchvision by its own name
"""

from __future__ import annotations

from collections.abc import Sequence

from detdistill.detectors.adapters import adapter, adapter_names
from detdistill.detectors.contract import Detector
from detdistill.detectors.options import parse_model
from detdistill.errors import ModelError, nearest


def build_detector(name: str, classes: Sequence[str]) -> Detector:
    """A fresh detector from a model string.

    Raises:
        ModelError: the detector, backbone or an option is unknown, or they do not fit each other.
    """
    model = parse_model(name)
    if not classes:
        raise ModelError(f"model {name!r}: no classes given")
    known = adapter_names()
    if model.detector not in known:
        raise ModelError(f"unknown detector {model.detector!r}{nearest(model.detector, known)}; known: {', '.join(known)}")
    model.options.refuse_foreign(model.detector)
    detector: Detector = adapter(model.detector).build(model.backbone, tuple(classes), model.options)
    return detector
