"""The meaning of values that annotation files write in several ways: flags, ids and whole numbers."""

from __future__ import annotations

import math
from typing import Any

TRUE = frozenset({"1", "true", "yes", "y", "t", "on"})
FALSE = frozenset({"0", "false", "no", "n", "f", "off"})


def truth(value: Any) -> bool | None:
    """Read a flag: 0, 1, true or false as a number, a boolean or a text; an absent flag (None) is false.

    Returns:
        The flag; None if the value is neither true nor false, e.g. ``2`` or ``"maybe"``.

    Example:
        >>> truth("0"), truth("False"), truth(1.0), truth(2)
        (False, False, True, None)
    """
    if value is None or value is False or value is True:
        return bool(value)
    if isinstance(value, int | float):
        return bool(value) if value in (0, 1) else None
    if isinstance(value, str):
        word = value.strip().lower()
        if word in TRUE | FALSE:
            return word in TRUE
        try:
            return truth(float(word))
        except ValueError:
            return None
    return None


def is_id(value: Any) -> bool:
    """Tell if a value can identify a record: an integer, a finite decimal number or a text that is not empty."""
    if isinstance(value, bool):
        return False
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) or (isinstance(value, str) and bool(value.strip()))


def whole(value: Any) -> int | None:
    """Read an integer that is written as 3, 3.0, "3" or "3.0"; None if the value is no integer."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value.is_integer() else None
    return value if isinstance(value, int) else None
