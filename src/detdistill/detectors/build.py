"""From a name to a detector: model strings, folders and checkpoints.

    fcos:resnet10t,levels=3-5          an adapter of this folder on a timm backbone
    torchvision:fcos_resnet50_fpn      a detector of torchvision by its own name
    runs/a  or  runs/a/student         a finished run, or the student it left

Adapters are found by looking: every file of this folder that defines ``build(backbone, classes, options)`` is one.
It may also define

    MODEL_CLASS, wrap_model(model, classes, name, columns, description)    for torchvision's models of that class
    load(backbone, classes, options)                   a model string that brings weights and classes (classes: or None)
    load_exported(folder, classes, name)               a student's folder without ``model.json``
    TINY = "resnet10t,queries=10"                      its smallest useful model, after ``NAME:``; see ``probe``.
                                                       None: it only loads models, with their weights
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

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
    model.options.refuse_foreign(model.detector)
    detector: Detector = adapter(model.detector).build(model.backbone, tuple(classes), model.options)
    return detector


def load_detector(name: str | Path, classes: Sequence[str] | None = None) -> Detector:
    """A detector with its weights: a student's folder, a run folder, a checkpoint, or a model string.

    Args:
        name: path or model string.
        classes: for a model string without classes of its own; else checked against the detector's.

    Raises:
        ModelError: there is no such thing, or it does not hold what it should.
    """
    from detdistill.detectors import saved

    path = Path(name)
    if path.is_file():
        if path.suffix != ".ckpt":
            raise ModelError(f"{path}: not a checkpoint (.ckpt); give a run folder or its student/ folder")
        return saved.load_checkpoint(path, classes)
    if path.is_dir():
        for folder in (path, path / "student"):
            if (folder / "student.json").is_file():
                return saved.load_student(folder, classes)
        inside = sorted(str(found.parent.parent) for found in path.glob("*/student/student.json"))
        hint = f"; did you mean {', '.join(inside[:3])}?" if inside else "; is the run finished?"
        raise ModelError(f"{path}: no student in it (student/student.json is missing){hint}")
    text = str(name)
    if ":" not in text:
        raise ModelError(f"{text!r} is no folder, no file and no model string (detector:backbone, e.g. fcos:resnet18)")
    model = parse_model(text)
    if model.detector == "torchvision":
        from detdistill.detectors.torchvision_names import build_named

        return build_named(model, classes)
    loader = getattr(adapter(model.detector), "load", None) if model.detector in adapter_names() else None
    if loader is not None:
        loaded: Detector = loader(model.backbone, classes, model.options)
        return loaded
    if classes is None:
        raise ModelError(f"model {text!r} has no weights, so no classes of its own; name a run folder or a checkpoint")
    return build_detector(text, classes)


def wrap_torchvision(
    model: nn.Module,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> Detector:
    """A torchvision detector in the adapter made for its class (``MODEL_CLASS`` and ``wrap_model`` in its file).

    Raises:
        ModelError: no adapter is.
    """
    modules = [adapter(found) for found in adapter_names("wrap_model")]
    exact = [module for module in modules if type(model) is module.MODEL_CLASS]
    fitting = exact or [module for module in modules if isinstance(model, module.MODEL_CLASS)]
    if not fitting:
        known = ", ".join(module.MODEL_CLASS.__name__ for module in modules)
        raise ModelError(f"{name}: no adapter for a {type(model).__name__}; there are some for {known}")
    detector: Detector = fitting[0].wrap_model(model, classes, name, columns, description)
    return detector


def adapter(name: str) -> ModuleType:
    """An adapter's module.

    Raises:
        ModelError: it needs transformers, which is not installed.
    """
    try:
        return importlib.import_module(f"detdistill.detectors.{name}")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ModelError(f"{name} needs the package transformers: pip install 'detdistill[hf]'") from error
