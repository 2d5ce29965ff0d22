"""From a name to a detector: model strings, folders and checkpoints.

    fcos:resnet10t,levels=3-5          an adapter of this folder on a timm backbone
    torchvision:fcos_resnet50_fpn      a detector of torchvision by its own name
    runs/a  or  runs/a/student         a finished run, or the student it left

Adapters are found by looking: every file of this folder that defines ``build(backbone, classes, options)`` is one.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from detdistill.detectors.contract import Detector
from detdistill.detectors.options import parse_model
from detdistill.errors import ModelError, nearest


@cache
def adapter_names(function: str = "build") -> tuple[str, ...]:
    """Names of the files of this folder that define a function, found without importing them."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if re.search(rf"^def {function}\(", path.read_text(encoding="utf-8"), flags=re.MULTILINE) and not path.stem.startswith(
            "_"
        ):
            found.append(path.stem)
    return tuple(name for name in found if name != "standalone")


def build_detector(name: str, classes: Sequence[str]) -> Detector:
    """A fresh detector from a model string.

    Raises:
        ModelError: the detector, backbone or an option is unknown, or they do not fit each other.
    """
    model = parse_model(name)
    if not classes:
        raise ModelError(f"model {name!r}: no classes given")
    if model.detector == "torchvision":
        from detdistill.detectors.torchvision_names import build_named

        return build_named(model, classes)
    known = adapter_names()
    if model.detector not in known:
        choices = [*known, "torchvision"]
        raise ModelError(f"unknown detector {model.detector!r}{nearest(model.detector, choices)}; known: {', '.join(choices)}")
    return adapter(model.detector).build(model.backbone, tuple(classes), model.options)


def adapter(name: str) -> ModuleType:
    """An adapter's module."""
    return importlib.import_module(f"detdistill.detectors.{name}")
