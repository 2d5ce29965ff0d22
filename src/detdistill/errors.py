"""Errors that a user can mend: one line that says what, where and what to do. The command line prints just that line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DetdistillError(ValueError):
    """Base of all errors that are the input's, not ours."""


class DataError(DetdistillError):
    """Images or annotations cannot be used."""


class ModelError(DetdistillError):
    """A detector cannot be built or loaded."""


class ClassCountError(ModelError):
    """A detector with weights knows another number of classes than is wanted."""


class RunError(DetdistillError):
    """A run cannot start or go on."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest choice, or nothing."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
