"""Output of commands: lines, notes, errors, and results as text or JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from jsonargparse import Namespace

from detdistill.errors import DetdistillWarning
from detdistill.processes import is_main_process

if TYPE_CHECKING:
    pass


FRACTIONS = "; in it, AP and the other scores are fractions 0..1, and -1 where undefined"


T = TypeVar("T")


def say(text: str) -> None:
    """Write a line to stdout."""
    if is_main_process():  # only the first process of a distributed run prints
        print(text, flush=True)  # flushed here, where ``main`` still catches a closed pipe


def tell(text: str) -> None:
    """Write to stderr: wrapped between words on a terminal, else as one line, which logs and scripts can search."""
    if sys.stderr.isatty():
        from rich.console import Console

        from detdistill.printing import wrap

        text = "\n".join(str(line) for line in wrap(text, Console(stderr=True).width))
    sys.stderr.write(f"{text}\n")


def fail(text: str) -> NoReturn:
    """Write an error to stderr, and exit with code 2."""
    tell(f"detdistill: {' '.join(text.split())}")
    sys.exit(2)


def notes_on(show: Callable[..., None]) -> Callable[..., None]:
    """How warnings are shown: this project's as one line, all others by ``show``."""

    def shown(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, DetdistillWarning):
            tell(f"note: {message}")
        else:
            show(message, category, *where)

    return shown


def show(
    chosen: Namespace,
    make: Callable[[], T],
    show: Callable[[T], None],
    document: Callable[[T], dict[str, Any]],
    out: Path | None = None,
) -> None:
    """Compute a result and print it: as text, or with ``--json`` as one JSON document. ``out`` always gets the JSON document."""
    if chosen.json:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print there too, e.g. when they download weights
            made = make()
        say(json.dumps(document(made), indent=2))
    else:
        made = make()
        show(made)
    if out is not None:
        from detdistill import api

        api.write(out, json.dumps(document(made), indent=2) + "\n")
