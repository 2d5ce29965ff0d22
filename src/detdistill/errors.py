"""Errors in the user's input: one line that says what, where and what to do. The command line prints only this line."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence


class DetdistillError(ValueError):
    """Base of all errors that are caused by the user's input."""


class DataError(DetdistillError):
    """Images or annotations cannot be used."""


class ModelError(DetdistillError):
    """A detector cannot be built or loaded."""


def no_model(name: str) -> ModelError:
    """The error of a name that is neither a path nor a model string."""
    return ModelError(f"{name!r} is no folder, no file and no model string (detector:backbone, e.g. fcos:resnet18)")


class ClassCountError(ModelError):
    """A detector with weights has a different number of classes than required."""


class ClassNameError(ModelError):
    """A detector lacks some of the required classes; classes are compared by name."""


class RunError(DetdistillError):
    """A run cannot start or continue."""


class StoppedError(RunError):
    """A signal stopped a run, which can be continued."""


class DetdistillWarning(UserWarning):
    """Something was assumed about the user's input; the command line prints only the message."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` with the closest choice, or an empty text if none is close."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def name_list(names: Sequence[str], differing: Collection[str] = (), most: int = 12) -> str:
    """Join names for a message; if there are more than ``most``, show the first ones and those in ``differing``.

    Example:
        >>> name_list([str(number) for number in range(80)], differing=["41", "7", "79"], most=6)
        '0, 1, 2, ..., 7, 41, 79'
    """
    if len(names) <= most:
        return ", ".join(names)
    first = list(names[: most // 2])
    others = [name for name in names[most // 2 :] if name in differing]
    shown = others[: most // 2]
    rest = ["..."] if not others or len(others) > len(shown) or shown[-1] != names[-1] else []
    return ", ".join([*first, *(["...", *shown] if shown else []), *rest])


def counted(number: int, noun: str, several: str = "") -> str:
    """``no defects``, ``1 defect``, ``2 boxes``; ``several`` is the plural if it is not the noun with an s or es.

    >>> counted(1, "box"), counted(2, "box"), counted(0, "image"), counted(3, "class")
    ('1 box', '2 boxes', 'no images', '3 classes')
    """
    ending = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{number or 'no'} {noun if number == 1 else several or noun + ending}"


def subject(number: int, noun: str, verb: str) -> str:
    """The beginning of a sentence about a number of things; ``verb`` is in the plural.

    >>> subject(1, "image", "have"), subject(2, "box", "are"), subject(1, "annotation", "lie")
    ('1 image has', '2 boxes are', '1 annotation lies')
    """
    one = {"have": "has", "are": "is", "mix": "mixes"}.get(verb, f"{verb}s")
    return f"{counted(number, noun)} {one if number == 1 else verb}"
