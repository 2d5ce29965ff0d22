"""From text to methods: ``fgd,tau=0.8+pkd``."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from detdistill.detectors.contract import Detector, Teacher
from detdistill.errors import DetdistillError, nearest
from detdistill.methods.contract import Composition, Method

_NOT_METHODS = {"align", "build", "contract"}


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
    for part in text.split("+"):
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
            if not equals:
                raise MethodError(f"{slug}: write {key}=VALUE")
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
    value: Any = tuple(yaml.safe_load(item) for item in raw.split("/")) if _is_sequence(wanted) else yaml.safe_load(raw)
    if isinstance(value, str) and _allows(wanted, float):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-3 as text
            value = float(value)
    if _is_sequence(wanted):
        if value == (None,):
            value = None
        return value
    for kind in (bool, int, float, str, type(None)):
        if type(value) is kind and (_allows(wanted, kind) or (kind is int and _allows(wanted, float))):
            if kind in (int, float) and (not math.isfinite(value) or value < 0):
                raise MethodError(f"{slug}: {key}={raw} must be a finite number, 0 or more")
            return value
    raise MethodError(f"{slug}: {key}={raw} is not {_describe(wanted)}")


def _members(wanted: Any) -> tuple[Any, ...]:
    return typing.get_args(wanted) if typing.get_origin(wanted) in (typing.Union, types.UnionType) else (wanted,)


def _is_sequence(wanted: Any) -> bool:
    return any(inspect.isclass(o) and issubclass(o, typing.Collection) for m in _members(wanted) if (o := typing.get_origin(m)))


def _allows(wanted: Any, kind: type) -> bool:
    return any(m is kind or (typing.get_origin(m) is typing.Literal and kind is str) for m in _members(wanted))


def _describe(wanted: Any) -> str:
    return " or ".join(
        " or ".join(map(repr, typing.get_args(m))) if typing.get_origin(m) is typing.Literal else getattr(m, "__name__", str(m))
        for m in _members(wanted)
    )
