"""Adapters, found by looking: every file of a family's folder that defines ``build(backbone, classes, options)`` is one.

The families are the folders ``dense``, ``single_shot``, ``two_stage``, ``queries`` and ``torchvision``; the adapter's name is
the file's. A file may also define

    MODEL_CLASS, wrap_model(model, classes, name, columns, description)    wraps torchvision's models of that class
    load(backbone, classes, options)                   reads a model string that brings weights and classes (classes: or None)
    load_exported(folder, classes, name)               reads a student's folder without ``model.json``
    MODEL_TYPE = "rt_detr"                             reads transformers' models of that ``model_type``; see ``queries.hf``
    TINY = "resnet10t,queries=10"                      is the smallest useful model, after ``NAME:``; see ``probe``.
                                                       None: the adapter only loads models, with their weights
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
from detdistill.errors import ModelError

FAMILIES = Path(__file__).parent


@cache
def _files() -> Mapping[str, tuple[Path, str]]:
    """Path and text of every file of the families' folders, by name, in order of name."""
    found = {path.stem: path for path in FAMILIES.glob("*/*.py") if path.stem != "__init__"}
    return {name: (found[name], found[name].read_text(encoding="utf-8")) for name in sorted(found)}


@cache
def adapter_names(function: str = "build") -> tuple[str, ...]:
    """Names of the adapters that define a function, found without importing them."""
    texts = {name: text for name, (_, text) in _files().items() if re.search(r"^def build\(backbone", text, flags=re.MULTILINE)}
    return tuple(name for name, text in texts.items() if re.search(rf"^def {function}\(", text, flags=re.MULTILINE))


@cache
def adapters_with(constant: str) -> Mapping[str, str]:
    """Adapters by the text that each gives a constant (``MODEL_TYPE = "rt_detr"``), found without importing them."""
    found = {}
    for name in adapter_names():
        named = re.search(rf'^{constant} = "(.+)"$', _files()[name][1], flags=re.MULTILINE)
        if named:
            found[named.group(1)] = name
    return found


def adapter(name: str) -> ModuleType:
    """An adapter's module.

    Raises:
        KeyError: there is no such file.
        ModelError: it needs transformers, which is not installed.
    """
    path, _ = _files()[name]
    try:
        return importlib.import_module(f"detdistill.detectors.{path.parent.name}.{name}")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ModelError(f"{name} needs the package transformers: pip install 'detdistill[hf]'") from error


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
