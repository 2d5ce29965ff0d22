"""Hyper-parameters of a method: the keyword-only arguments of its constructor, checked by their types."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from detdistill.errors import DetdistillError, nearest
from detdistill.values import check, read


class MethodError(DetdistillError):
    """Unknown method, unknown hyper-parameter, or a value that is not of the hyper-parameter's type."""


@dataclass(frozen=True)
class HyperParameter:
    """Type and default of a hyper-parameter."""

    kind: Any
    """Its type, with limits (``detdistill.values``)."""
    default: Any


@cache
def hyper_parameters(method: type) -> Mapping[str, HyperParameter]:
    """All hyper-parameters of a method, in the order of its constructor."""
    hints = typing.get_type_hints(method.__init__, include_extras=True)  # type: ignore[misc]
    parameters = inspect.signature(method.__init__).parameters.values()  # type: ignore[misc]
    keywords = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    return {parameter.name: HyperParameter(hints[parameter.name], parameter.default) for parameter in keywords}


def hyper_parameter(slug: str, method: type, name: str) -> HyperParameter:
    """The hyper-parameter of a method with a given name.

    Raises:
        MethodError: the method has no such hyper-parameter; the message gives the nearest name.
    """
    known = hyper_parameters(method)
    if name not in known:
        raise MethodError(f"{slug} has no hyper-parameter {name!r}{nearest(name, known)}; it has: {', '.join(known) or 'none'}")
    return known[name]


def checked_settings(slug: str, method: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all hyper-parameters: the given ones, and defaults for the others.

    Raises:
        MethodError: a name is unknown, or a value is not of its type.
    """
    values = {name: parameter.default for name, parameter in hyper_parameters(method).items()}
    for name, value in given.items():
        parameter = hyper_parameter(slug, method, name)
        try:
            values[name] = check(parameter.kind, value)
        except ValueError as error:
            raise MethodError(f"{slug}: {name}={value} {error}") from error
    return values


def read_setting(slug: str, method: type, name: str, text: str) -> Any:
    """Parse the value of a hyper-parameter from the command line.

    Raises:
        MethodError: the name is unknown, the text is empty, or it is not a value of the type.
    """
    parameter = hyper_parameter(slug, method, name)
    if not text:
        raise MethodError(f"{slug}: write {name}=VALUE")
    try:
        return read(parameter.kind, text)
    except ValueError as error:
        raise MethodError(f"{slug}: {name}={text} {error}") from error


def check_some(slug: str, **weights: float) -> None:
    """Check that not all weights of a method's loss terms are 0.

    Raises:
        MethodError: all are 0; the message names them.
    """
    if not any(weights.values()):
        raise MethodError(f"{slug}: {', '.join(weights)} are all 0; nothing would be distilled")
