"""From text to methods: ``fgd,temperature=0.8+pkd``."""

from __future__ import annotations

import importlib
import inspect
import math
import re
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from detdistill.detectors.contract import Detector, Teacher
from detdistill.errors import DetdistillError, nearest
from detdistill.methods.shared.contract import Composition, Method

_NOT_METHODS = {"align", "compose", "contract"}


class MethodError(DetdistillError):
    """No such method, or a hyper-parameter it does not have or cannot take."""


def method_slugs() -> list[str]:
    """All methods: the files of this folder."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in _NOT_METHODS and not p.stem.startswith("_"))


def method_class(slug: str) -> type[Method]:
    """The class in the method's file.

    Raises:
        MethodError: no such method.
    """
    if slug not in method_slugs():
        raise MethodError(f"no method {slug!r}{nearest(slug, method_slugs())}; methods: {', '.join(method_slugs())}")
    module = importlib.import_module(f"detdistill.methods.{slug}")
    classes = [
        c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Method) and c.__module__ == module.__name__
    ]
    return next(c for c in classes if getattr(c, "slug", None) == slug)


def parse_methods(text: str) -> list[tuple[type[Method], dict[str, Any]]]:
    """Classes and checked hyper-parameters of each method in ``text``.

    Raises:
        MethodError: unknown method or hyper-parameter (with the nearest name), or a value of the wrong kind.
    """
    parsed = []
    for part in re.split(r"\+(?!\d)", text):  # the + of 1e+2 joins nothing
        slug, *settings = (piece.strip() for piece in part.split(","))
        found = method_class(slug)
        types_ = _hyper_parameters(found)
        values: dict[str, Any] = {}
        for setting in settings:
            key, equals, raw = setting.partition("=")
            if key not in types_:
                raise MethodError(
                    f"{slug} has no hyper-parameter {key!r}{nearest(key, types_)}; it has: {', '.join(types_) or 'none'}"
                )
            if not equals or not raw:
                raise MethodError(f"{slug}: write {key}=VALUE")
            if key in values:
                raise MethodError(f"{slug}: {key} is given twice")
            values[key] = _convert(slug, key, raw, types_[key])
        parsed.append((found, values))
    return parsed


def build_method(text: str, teacher: Teacher | None, student: Detector) -> Method:
    """The method of ``text`` for this pair; several become a ``Composition``.

    Args:
        text: slugs joined by ``+``, each with ``,key=value`` settings; lists as ``levels=0/1/2``.
        teacher: frozen, or None for teacher-free methods.
        student: the detector that learns.

    Raises:
        MethodError: see ``parse_methods``.
        PairError: the pair cannot work with this method.
    """
    methods = []
    for found, values in parse_methods(text):
        build: Any = found  # constructors differ in their keyword arguments, which were checked above
        methods.append(build(teacher, student, **values))
    return methods[0] if len(methods) == 1 else Composition(methods, student)


def _hyper_parameters(found: type[Method]) -> dict[str, Any]:
    """Names and types of the constructor's keyword arguments."""
    hints = typing.get_type_hints(found.__init__)
    signature = inspect.signature(found.__init__)
    return {name: hints[name] for name, p in signature.parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _convert(slug: str, key: str, raw: str, wanted: Any) -> Any:
    """A value of the type the constructor declares; numbers must be finite and not negative."""
    kinds = typing.get_args(wanted) if typing.get_origin(wanted) in (typing.Union, types.UnionType) else (wanted,)
    words = [word for kind in kinds if typing.get_origin(kind) is typing.Literal for word in typing.get_args(kind)]
    if raw in words:
        return raw
    if raw in ("none", "null") and type(None) in kinds:
        return None
    for kind in kinds:
        if _is_sequence(kind):
            inner = next(item for item in typing.get_args(kind) if item is not Ellipsis)
            return tuple(_convert(slug, key, item, inner) for item in raw.split("/"))
        if kind is bool and raw in ("true", "false"):
            return raw == "true"
        if kind in (int, float):
            try:
                value = kind(raw)
            except ValueError:
                continue
            if not math.isfinite(value) or value < 0:
                raise MethodError(f"{slug}: {key}={raw} must be a finite number, 0 or more")
            return value
        if kind is str:
            return raw
    if words:
        raise MethodError(f"{slug}: {key}={raw} is not one of {', '.join(words)}{nearest(raw, words)}")
    raise MethodError(f"{slug}: {key}={raw} is not {' or '.join(_KINDS[kind] for kind in kinds)}")


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", type(None): "none"}


def _is_sequence(kind: Any) -> bool:
    origin = typing.get_origin(kind)
    return inspect.isclass(origin) and issubclass(origin, Collection)
