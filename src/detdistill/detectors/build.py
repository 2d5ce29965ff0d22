"""Build a new detector from a model string.

fcos:resnet10t,levels=3-5          an adapter on a timm backbone
torchvision:fcos_resnet50_fpn      a torchvision detector by torchvision's name
"""

from __future__ import annotations

from collections.abc import Sequence

from detdistill.detectors.adapters import adapter, read_model
from detdistill.detectors.contract import Detector
from detdistill.errors import ModelError


def build_detector(name: str, classes: Sequence[str]) -> Detector:
    """Build a new detector from a model string.

    Args:
        name: model string ``detector:backbone[,option=value]...``.
        classes: names of the classes in label order, at least one.

    Raises:
        ModelError: the detector, the backbone or an option is unknown, they do not fit together, or ``classes`` is empty.
    """
    model, options = read_model(name)
    if not classes:
        raise ModelError(f"model {name!r}: no classes given")
    detector: Detector = adapter(model.detector).build(model.backbone, tuple(classes), options)
    return detector
