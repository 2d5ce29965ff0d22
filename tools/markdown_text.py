"""Markdown tables, and conversion of docstrings and values to their cells."""

from __future__ import annotations

import inspect
import re

ARGUMENT = re.compile(r"^    (\w+): (.*?)(?=^    \w+:|\Z)", re.MULTILINE | re.DOTALL)
ARGUMENTS = re.compile(r"^Args:\n(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)


def table(*rows: tuple[str, ...]) -> str:
    """Format rows of cells as a Markdown table; the first row is the head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"


def plain(value: object, separator: str = "/") -> str:
    """A value as written on the command line; items of a list are joined by ``separator``."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple):
        return separator.join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def line(text: str) -> str:
    """Text of a docstring on one line, with Markdown's backquotes."""
    return " ".join(text.split()).replace("``", "`")


def first_sentence_of(docstring: str) -> str:
    """The first sentence of a docstring, without its full stop."""
    return re.split(r"(?<=[^.]{2})\.(?= [A-Z]|$)", line(docstring.partition("\n\n")[0]))[0].rstrip(".:")


def first_sentence(documented: object) -> str:
    """The first sentence of the docstring of a function or class, without its full stop."""
    return first_sentence_of(inspect.getdoc(documented) or "")


def described_arguments(documented: object) -> dict[str, str]:
    """Meaning of each argument, from the section ``Args:`` of a docstring."""
    section = ARGUMENTS.search(inspect.getdoc(documented) or "")
    return {name: line(text) for name, text in ARGUMENT.findall(section[1] if section else "")}
