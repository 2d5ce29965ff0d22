"""Check and parse typed values: settings of runs, hyper-parameters of methods and options of models.

Types are written as annotations: ``Literal["a", "b"]``, ``int | None``, ``tuple[float, ...]``, or a number with limits such as
``Weight`` below. Numbers must be finite.
"""

from __future__ import annotations

import collections.abc
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from detdistill.errors import nearest


@dataclass(frozen=True)
class Limits:
    """Smallest and largest allowed number, both included unless ``above`` or ``below`` is set."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    """Numbers must be larger than ``low``."""
    below: bool = False
    """Numbers must be smaller than ``high``."""

    def __contains__(self, number: float) -> bool:
        large_enough = self.low < number if self.above else self.low <= number
        return large_enough and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        """The limits as text that continues "a number", e.g. ", 0 or more"."""
        if self.below:
            low = f" above {self.low:g}" if self.above else f", {self.low:g} or more"
            return f"{low} and below {self.high:g}"
        if self.high < math.inf:
            return f" from {self.low:g} to {self.high:g}"
        if self.low == -math.inf:
            return ""
        return f" above {self.low:g}" if self.above else f", {self.low:g} or more"


@dataclass(frozen=True)
class Ascending:
    """Annotation of a list of numbers in ascending order: ``Annotated[tuple[Count, Count], Ascending()]`` is a range."""


Weight = Annotated[float, Limits(0)]
"""A number, 0 or more, such as the factor of a loss."""
Positive = Annotated[float, Limits(0, above=True)]
"""A number above 0, such as a temperature or a learning rate."""
Fraction = Annotated[float, Limits(0, 1)]
"""A number from 0 to 1."""
Share = Annotated[float, Limits(0, 1, above=True, below=True)]
"""A number between 0 and 1, such as the part of a whole that has other parts too."""
Count = Annotated[int, Limits(1)]
"""A whole number, 1 or more."""
Index = Annotated[int, Limits(0)]
"""A whole number, 0 or more."""


def check(kind: Any, value: Any) -> Any:
    """Check a value and convert it to its type: lists become tuples, and whole numbers become floats if the type is float.

    Raises:
        ValueError: the value is not of the type. The message continues a sentence that begins with the value, for example
            ``is not a number, 0 or more``.

    Example:
        >>> check(tuple[int, ...] | None, [1, 2]), check(Weight, 2)
        ((1, 2), 2.0)
    """
    for member in _members(kind):
        found = _fitted(member, value)
        if found is not _UNFIT:
            return found
    raise ValueError(f"is not {in_words(kind)}{nearest(str(value), choices(kind))}")


def read(kind: Any, text: str, separator: str = "/") -> Any:
    """Parse a value from text: ``0.5``, ``true`` (or ``True``), ``none``, ``sum``, lists as ``0/1/2``.

    Raises:
        ValueError: the text is not a value of the type; the message is as in ``check``.

    Example:
        >>> read(tuple[int, ...], "0/1/2"), read(Weight | None, "none"), read(bool, "true")
        ((0, 1, 2), None, True)
    """
    for member in sorted(_members(kind), key=lambda one: one is not type(None)):  # None first: "none" is not read as a text
        found = _fitted(member, _parsed(member, text, separator))
        if found is not _UNFIT:
            return found
    listed = any(_item(_stripped(member)[0]) is not None for member in _members(kind))
    parts = f"; its parts have {separator!r} between them" if listed and separator not in text else ""
    raise ValueError(f"is not {in_words(kind)}{nearest(text, choices(kind))}{parts}")


_UNFIT = object()


def _parsed(member: Any, text: str, separator: str) -> Any:
    """Parse a text as a type that is no union; return the text itself if it cannot be parsed."""
    plain, _ = _stripped(member)
    if (item := _item(plain)) is not None:
        return [_parsed(item, part, separator) for part in text.split(separator)]
    if typing.get_origin(plain) is Literal:
        return next((choice for choice in typing.get_args(plain) if str(choice) == text), text)
    if plain is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if plain is type(None):
        return None if text in ("none", "null") else text
    if plain in (int, float):
        try:
            return plain(text)
        except ValueError:
            return text
    if plain is Path:
        return Path(text)
    return text


def _fitted(member: Any, value: Any) -> Any:
    """Convert a value to a type that is no union; return ``_UNFIT`` if it does not fit."""
    plain, limits = _stripped(member)
    if typing.get_origin(plain) is Literal:
        return value if value in typing.get_args(plain) else _UNFIT
    if (item := _item(plain)) is not None:
        if not isinstance(value, list | tuple) or _length(plain) not in (None, len(value)):
            return _UNFIT
        found = tuple(_fitted_any(item, one) for one in value)
        if _UNFIT in found or (_is_ascending(member) and found != tuple(sorted(found))):
            return _UNFIT
        return found
    if plain is Any:
        return value
    if plain in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | plain) or not math.isfinite(value):
            return _UNFIT
        return plain(value) if limits is None or value in limits else _UNFIT
    return value if isinstance(value, plain) else _UNFIT


def _fitted_any(kind: Any, value: Any) -> Any:
    return next((found for member in _members(kind) if (found := _fitted(member, value)) is not _UNFIT), _UNFIT)


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union (each with the union's limits), or the type itself if it is no union."""
    plain, limits = _stripped(kind)
    if typing.get_origin(plain) not in (typing.Union, types.UnionType):
        return (kind,)
    members = typing.get_args(plain)
    return tuple(Annotated[one, limits] if limits is not None and one in (int, float) else one for one in members)


def _stripped(kind: Any) -> tuple[Any, Limits | None]:
    """A type without its annotation, and its limits."""
    if typing.get_origin(kind) is not Annotated:
        return kind, None
    plain, *notes = typing.get_args(kind)
    return plain, next((note for note in notes if isinstance(note, Limits)), None)


def _is_ascending(kind: Any) -> bool:
    return any(isinstance(note, Ascending) for note in getattr(kind, "__metadata__", ()))


def _item(kind: Any) -> Any:
    """The type of a list's items; None if the type is no list."""
    origin = typing.get_origin(kind)
    if not isinstance(origin, type) or not issubclass(origin, collections.abc.Collection):
        return None
    return typing.get_args(kind)[0]


def _length(kind: Any) -> int | None:
    """Number of items of a tuple type; None: any number."""
    inner = typing.get_args(kind)
    return len(inner) if typing.get_origin(kind) is tuple and inner[-1] is not Ellipsis else None


def choices(kind: Any) -> list[str]:
    """The words that a type allows: the texts of its ``Literal`` members."""
    found: list[str] = []
    for member in _members(kind):
        plain, _ = _stripped(member)
        if (item := _item(plain)) is not None:
            found += choices(item)
        elif typing.get_origin(plain) is Literal:
            found += [choice for choice in typing.get_args(plain) if isinstance(choice, str)]
    return found


def in_words(kind: Any) -> str:
    """Description of a type for messages, to be read after "is not".

    Example:
        >>> in_words(Weight | None), in_words(tuple[Count, ...])
        ('a number, 0 or more, or none', 'a list, each a whole number, 1 or more')
    """
    named = [_in_words(member) for member in _members(kind)]
    between = ", or " if any("," in name for name in named) else " or "
    return between.join(named)


def _in_words(member: Any) -> str:
    plain, limits = _stripped(member)
    if typing.get_origin(plain) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(plain)))}"
    if (item := _item(plain)) is not None:
        count = _length(plain)
        if _is_ascending(member):
            return f"a range, each end {in_words(item)}"
        of_items = _stripped(item)[1] or ""
        return f"{'two' if count == 2 else count} numbers{of_items}" if count else f"a list, each {in_words(item)}"
    names = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path", type(None): "none", str: "a text"}
    return names.get(plain, str(plain)) + ("" if limits is None else str(limits))
