"""Model strings, ``detector:backbone[,option=value]...``: their grammar, and how an adapter's options are read from them.

Each adapter defines its options as a dataclass ``OPTIONS``, a subclass of ``ModelOptions``. ``detdistill.values`` provides
the types of the fields; the string below a field documents it. Lists are written ``16-32-64-128``, ranges ``3-7``.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from detdistill.errors import ModelError, nearest
from detdistill.values import read

OWN = "own"
"""Stands for the detector in the names of models that were given in Python, ``own:NAME``."""
SEPARATOR = "-"
"""Separates the numbers of a list or of a range."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Base class of all adapters' options; adapters without options use it directly."""

    commas_in_backbone: ClassVar[bool] = False
    """Whether the backbone may contain commas (a path). Only known options at the end of the string then count as options."""

    name: str = ""
    """The whole model string, used as the detector's name; empty: the adapter chooses a name. Not an option itself."""


Options = TypeVar("Options", bound=ModelOptions)


@dataclass(frozen=True)
class ModelName:
    """A model string split into its parts."""

    text: str
    """The whole string as written; it becomes the detector's name."""
    detector: str
    backbone: str
    given: Mapping[str, str]
    """Text of each given option as written, by the option's name."""


def parse_model(text: str, kind: type[ModelOptions] = ModelOptions) -> ModelName:
    """Split a model string into its parts, without checking that its options exist.

    Args:
        text: the model string.
        kind: the adapter's options, used only if ``commas_in_backbone`` is true.

    Raises:
        ModelError: the detector or the backbone is missing, or an option has no value or is given twice.

    Example:
        >>> parse_model("fcos:resnet10t,channels=16-32-64-128,levels=3-5").given
        {'channels': '16-32-64-128', 'levels': '3-5'}
    """
    head, *parts = _pieces(text, kind)
    detector, colon, backbone = head.partition(":")
    if not (detector and colon and backbone):
        raise ModelError(f"model {text!r}: expected detector:backbone[,key=value]..., e.g. retinanet:resnet18")
    given: dict[str, str] = {}
    for part in parts:
        key, _, value = part.partition("=")
        if not key:
            raise ModelError(f"model {text!r}: expected key=value after each comma, got {part!r}")
        if not value:
            raise ModelError(f"model {text!r}: option {key} needs a value, {key}=...")
        if key in given:
            raise ModelError(f"model {text!r}: option {key} is given twice")
        given[key] = value
    return ModelName(text, detector, backbone, given)


def _pieces(text: str, kind: type[ModelOptions]) -> list[str]:
    """Split a model string at the commas between its options."""
    pieces, first = text.split(","), 1
    if kind.commas_in_backbone:
        first, known = len(pieces), option_types(kind)
        while first > 1 and pieces[first - 1].partition("=")[0].strip() in known:
            first -= 1
    return [piece.strip() for piece in (",".join(pieces[:first]), *pieces[first:])]


def option_types(kind: type[ModelOptions]) -> Mapping[str, Any]:
    """Types of the options by name, with their limits (``detdistill.values``), in the order of the fields.

    Example:
        >>> option_types(ModelOptions)
        {}
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.name != "name"}


def read_options(kind: type[Options], model: ModelName, whose: str | None = None) -> Options:
    """Read the options of a model string into an adapter's dataclass; options not given have their defaults.

    Args:
        kind: the adapter's dataclass.
        model: the parsed model string.
        whose: name of the detector in messages; None: ``model.detector``.

    Raises:
        ModelError: an option is unknown, or its value does not have the option's type.
    """
    types, values = option_types(kind), dict[str, Any]()
    for key, text in model.given.items():
        if key not in types:
            own = ", ".join(types) or "none"
            raise ModelError(f"{whose or model.detector} has no option {key!r}{nearest(key, types)}; it has: {own}")
        try:
            values[key] = read(types[key], text, SEPARATOR)
        except ValueError as error:
            raise ModelError(f"model {model.text!r}: {key}={text!r} {error}") from None
    return kind(**values, name=model.text)
