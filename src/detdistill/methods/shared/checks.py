"""Hyper-parameters as values: refused when a method is built, with the name, the value and what would do."""

from __future__ import annotations

import math
from collections.abc import Iterable

from detdistill.errors import DetdistillError, nearest


def check_weights(slug: str, **weights: float) -> None:
    """Loss weights are finite and 0 or more.

    Raises:
        DetdistillError: naming the first that is not.
    """
    for name, value in weights.items():
        if not (math.isfinite(value) and value >= 0):
            raise DetdistillError(f"{slug}: {name}={value} must be a finite number, 0 or more")


def check_some(slug: str, **weights: float) -> None:
    """Weights of a method's terms: finite, 0 or more, and not all 0.

    Raises:
        DetdistillError: naming them.
    """
    check_weights(slug, **weights)
    if not any(weights.values()):
        raise DetdistillError(f"{slug}: {', '.join(weights)} are all 0; nothing would be distilled")


def check_temperatures(slug: str, **temperatures: float) -> None:
    """Temperatures are finite and above 0.

    Raises:
        DetdistillError: naming the first that is not.
    """
    for name, value in temperatures.items():
        if not (math.isfinite(value) and value > 0):
            raise DetdistillError(f"{slug}: {name}={value} must be a finite number above 0")


def check_fractions(slug: str, **fractions: float) -> None:
    """Parts of a whole lie in 0..1, ends included.

    Raises:
        DetdistillError: naming the first that does not.
    """
    for name, value in fractions.items():
        if not 0 <= value <= 1:
            raise DetdistillError(f"{slug}: {name}={value} must lie between 0 and 1")


def check_choice(slug: str, name: str, value: str, choices: Iterable[str]) -> None:
    """One of a few words.

    Raises:
        DetdistillError: listing the words.
    """
    known = list(choices)
    if value not in known:
        raise DetdistillError(f"{slug}: {name}={value!r} is not one of {', '.join(known)}{nearest(str(value), known)}")
