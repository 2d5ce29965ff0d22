"""Model strings, ``detector:backbone[,option=value]...``: their grammar, and how an adapter's options are read from them.

Which options there are is said by the adapters: each has a dataclass ``OPTIONS``, a ``ModelOptions`` whose fields are typed by
``detdistill.values`` and documented by the strings below them. Lists are written ``16-32-64-128``, ranges ``3-7``.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from detdistill.errors import ModelError, nearest
from detdistill.values import read

SEPARATOR = "-"
"""Between the numbers of a list or of a range."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Base of the options of all adapters; by itself the options of an adapter that has none."""

    commas_in_backbone: ClassVar[bool] = False
    """Whether the backbone is a path or a name that may contain commas: options are then those known ones that end the string."""

    name: str = ""
    """The whole model string, which becomes the detector's name; empty: the adapter makes one. It is no option."""


Options = TypeVar("Options", bound=ModelOptions)


@dataclass(frozen=True)
class ModelName:
    """A model string in parts."""

    text: str
    """As it was written: the detector's name everywhere."""
    detector: str
    backbone: str
    given: Mapping[str, str]
    """Text of each option that was given, by name, as it was written."""


def parse_model(text: str, kind: type[ModelOptions] = ModelOptions) -> ModelName:
    """Cut a model string into its parts; whether its options exist is not looked at.

    Args:
        text: the model string.
        kind: the adapter's options. They matter only where ``commas_in_backbone`` is true.

    Raises:
        ModelError: there is no detector or no backbone, or an option has no value or is given twice.

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
    """A model string cut at the commas between its options."""
    pieces, first = text.split(","), 1
    if kind.commas_in_backbone:
        first, known = len(pieces), option_types(kind)
        while first > 1 and pieces[first - 1].partition("=")[0].strip() in known:
            first -= 1
    return [piece.strip() for piece in (",".join(pieces[:first]), *pieces[first:])]


def option_types(kind: type[ModelOptions]) -> Mapping[str, Any]:
    """Type of each option (with limits, ``detdistill.values``) by its name, in the order of the fields.

    Example:
        >>> option_types(ModelOptions)
        {}
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.name != "name"}


def read_options(kind: type[Options], model: ModelName, whose: str | None = None) -> Options:
    """The options that a model string gives, as an adapter's dataclass; those that it does not give have their defaults.

    Args:
        kind: the dataclass.
        model: the model string in parts.
        whose: the detector as messages name it; None: ``model.detector``.

    Raises:
        ModelError: an option is unknown, or its value is not of its type.
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
