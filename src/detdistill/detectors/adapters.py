"""Find the adapters: an adapter is a file in a family's folder that defines ``build(backbone, classes, options)``.

The families' folders are ``dense``, ``single_shot``, ``two_stage``, ``queries``, ``yolo``, ``mmdet`` and ``torchvision``. The
name of the file is the name of the adapter. An adapter also defines

    OPTIONS = RetinaNetOptions                         options after the backbone in a model string, a ``ModelOptions``

and may define

    OPTIONS_OF_BACKBONE = {"vgg16": VGGOptions}        options that replace ``OPTIONS`` for the given backbones
    MODEL_CLASS, wrap_model(model, classes, name, columns, description)    wraps torchvision's models of that class
    load(backbone, classes, options)                   loads a model string that names weights; classes None: the weights' own
    load_exported(folder, classes, name)               loads a student folder without ``model.json``
    MODEL_TYPE = "rt_detr"                             loads transformers' models of that ``model_type``; see ``queries.hf``
    TINY = "resnet10t,queries=10"                      smallest useful model: the model string after ``NAME:``; see ``probe``.
                                                       None: the adapter only loads models with their weights
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
from detdistill.detectors.options import OWN, ModelName, ModelOptions, parse_model, read_options
from detdistill.errors import ModelError, nearest

FAMILIES = Path(__file__).parent


@cache
def _files() -> Mapping[str, tuple[Path, str]]:
    """Path and text of every file in the families' folders, keyed and sorted by name."""
    found = {path.stem: path for path in FAMILIES.glob("*/*.py") if path.stem != "__init__"}
    return {name: (found[name], found[name].read_text(encoding="utf-8")) for name in sorted(found)}


@cache
def adapter_names(function: str = "build") -> tuple[str, ...]:
    """Sorted names of the adapters that define ``function``, found without importing them."""
    texts = {name: text for name, (_, text) in _files().items() if re.search(r"^def build\(backbone", text, flags=re.MULTILINE)}
    return tuple(name for name, text in texts.items() if re.search(rf"^def {function}\(", text, flags=re.MULTILINE))


@cache
def adapters_with(constant: str) -> Mapping[str, str]:
    """Map each value of a string constant (``MODEL_TYPE = "rt_detr"``) to its adapter, found without importing the adapters."""
    found = {}
    for name in adapter_names():
        named = re.search(rf'^{constant} = "(.+)"$', _files()[name][1], flags=re.MULTILINE)
        if named:
            found[named.group(1)] = name
    return found


def adapter(name: str) -> ModuleType:
    """Import an adapter's module.

    Raises:
        KeyError: there is no adapter of this name.
        ModelError: the adapter needs transformers, which is not installed.
    """
    path, _ = _files()[name]
    try:
        return importlib.import_module(f"detdistill.detectors.{path.parent.name}.{name}")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ModelError(f"{name} needs the package transformers: pip install 'detdistill[hf]'") from error


def read_model(text: str) -> tuple[ModelName, ModelOptions]:
    """Parse a model string and read the options for its adapter.

    Raises:
        ModelError: the string is malformed, the adapter or an option is unknown, or an option's value is invalid.

    Example:
        >>> read_model("fcos:resnet10t,levels=3-5")[1].levels
        (3, 5)
    """
    detector, known = text.partition(":")[0].strip(), adapter_names()
    if detector == OWN:
        raise ModelError(f"{text} was given in Python; it cannot be built from its name, so give the model again, in Python")
    if detector not in known:
        detector = parse_model(text).detector
        raise ModelError(f"unknown detector {detector!r}{nearest(detector, known)}; known: {', '.join(known)}")
    module = adapter(detector)
    model = parse_model(text, module.OPTIONS)
    others: Mapping[str, type[ModelOptions]] = getattr(module, "OPTIONS_OF_BACKBONE", {})
    whose = f"{detector}:{model.backbone}" if others else detector
    return model, read_options(others.get(model.backbone, module.OPTIONS), model, whose)


def wrap_torchvision(
    model: nn.Module,
    classes: Sequence[str],
    name: str,
    columns: Sequence[int] | None = None,
    description: Mapping[str, Any] | None = None,
) -> Detector:
    """Wrap a torchvision detector in the adapter for its class (``MODEL_CLASS`` and ``wrap_model`` in the adapter's file).

    Args:
        model: the torchvision model.
        classes: names of the classes in label order.
        name: name of the detector.
        columns: output column of each class; None: 1 .. K.
        description: description from which the exported loading script rebuilds the model; None: exported without that script.

    Raises:
        ModelError: there is no adapter for the class of ``model``.
    """
    modules = [adapter(found) for found in adapter_names("wrap_model")]
    exact = [module for module in modules if type(model) is module.MODEL_CLASS]
    fitting = exact or [module for module in modules if isinstance(model, module.MODEL_CLASS)]
    if not fitting:
        known = ", ".join(module.MODEL_CLASS.__name__ for module in modules)
        raise ModelError(f"{name}: no adapter for a {type(model).__name__}; there are adapters for {known}")
    detector: Detector = fitting[0].wrap_model(model, classes, name, columns, description)
    return detector
