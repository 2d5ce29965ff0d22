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
    """No such method, or a hyper-parameter it does not have or cannot take."""


@dataclass(frozen=True)
class HyperParameter:
    """One keyword-only argument."""

    kind: Any
    """Its type, with limits (``detdistill.values``)."""
    default: Any


@cache
def hyper_parameters(method: type) -> Mapping[str, HyperParameter]:
    """All of a method, in the order of its constructor."""
    hints = typing.get_type_hints(method.__init__, include_extras=True)  # type: ignore[misc]
    parameters = inspect.signature(method.__init__).parameters.values()  # type: ignore[misc]
    keywords = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    return {parameter.name: HyperParameter(hints[parameter.name], parameter.default) for parameter in keywords}


def hyper_parameter(slug: str, method: type, name: str) -> HyperParameter:
    """One of a method's, by name.

    Raises:
        MethodError: there is none of that name; with the nearest one.
    """
    known = hyper_parameters(method)
    if name not in known:
        raise MethodError(f"{slug} has no hyper-parameter {name!r}{nearest(name, known)}; it has: {', '.join(known) or 'none'}")
    return known[name]


def checked_settings(slug: str, method: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all hyper-parameters: those given, the defaults of the others.

    Raises:
        MethodError: an unknown name, or a value that is not of its type.
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
    """A hyper-parameter from the command line.

    Raises:
        MethodError: as ``checked_settings``.
    """
    parameter = hyper_parameter(slug, method, name)
    if not text:
        raise MethodError(f"{slug}: write {name}=VALUE")
    try:
        return read(parameter.kind, text)
    except ValueError as error:
        raise MethodError(f"{slug}: {name}={text} {error}") from error


def check_some(slug: str, **weights: float) -> None:
    """Refuse weights of a method's terms that are all 0.

    Raises:
        MethodError: naming them.
    """
    if not any(weights.values()):
        raise MethodError(f"{slug}: {', '.join(weights)} are all 0; nothing would be distilled")
