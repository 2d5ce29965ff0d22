"""The methods by their files: slug, title and BibTeX are read from the source, so that listing them does not import torch."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from detdistill.errors import nearest
from detdistill.methods.shared.hyper_parameters import MethodError

METHODS = Path(__file__).parent.parent


@dataclass(frozen=True)
class Entry:
    """A method, as its class describes it."""

    slug: str
    title: str
    """Title of the paper, with venue and year; of a method without a paper, what it is."""
    bibtex: str
    published: bool
    """The method is that of a paper; False: it is this library's own."""


@cache
def method_slugs() -> tuple[str, ...]:
    """Slugs of all methods: names of the files in the folder ``methods``, and of its folders with a ``method.py``."""
    files = (path.stem for path in METHODS.glob("*.py") if path.stem != "__init__")
    return tuple(sorted((*files, *(path.parent.name for path in METHODS.glob("*/method.py")))))


def check_slug(slug: str) -> None:
    """Check that there is a method.

    Raises:
        MethodError: there is none; with the nearest name and all names.
    """
    if slug not in method_slugs():
        raise MethodError(f"no method {slug!r}{nearest(slug, method_slugs())}; methods: {', '.join(method_slugs())}")


def split_methods(text: str) -> list[list[str]]:
    """Split a text such as ``fgd,temperature=0.8+pkd@a``: for each method its slug and its ``key=value`` settings."""
    return [[slug.partition("@")[0].strip(), *settings] for slug, *settings in _pieces(text)]


def named_teachers(text: str) -> list[str]:
    """For each method in a text such as ``pkd@a>pkd@b+fkd`` the name of its teacher; empty for methods without ``@``.

    Raises:
        MethodError: a name is missing after ``@``, or is no name.
    """
    names = []
    for slug, *_ in _pieces(text):
        _, at, name = slug.partition("@")
        if at and not name.strip().isidentifier():
            raise MethodError(f"method {slug!r}: {name.strip()!r} is no name of a teacher; write e.g. {slug.partition('@')[0]}@a")
        names.append(name.strip())
    return names


def split_turns(text: str) -> list[str]:
    """The parts of a text such as ``pkd@a>pkd@b``, which are trained one after the other; most texts have one."""
    return [part.strip() for part in text.split(">")]


def _pieces(text: str) -> list[list[str]]:
    parts = re.split(r">|\+(?!\d)", text)  # the + of 1e+2 joins nothing
    return [[piece.strip() for piece in part.split(",")] for part in parts]


@cache
def entry(slug: str) -> Entry:
    """Read a method's class attributes ``slug``, ``title`` and ``bibtex``, which are literals, from its file.

    Raises:
        MethodError: there is no such method.
    """
    check_slug(slug)
    folder = METHODS / slug
    file = folder / "method.py" if folder.is_dir() else folder.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found = dict(_literals(node))
            if found.get("slug") == slug:
                return Entry(slug, found["title"], found["bibtex"], found.get("published", True))
    raise MethodError(f"{file} has no class with slug = {slug!r}")


def _literals(node: ast.ClassDef) -> list[tuple[str, Any]]:
    """Names and values of the class attributes that are texts or truth values."""
    return [
        (target.id, statement.value.value)
        for statement in node.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str | bool)
        for target in statement.targets
        if isinstance(target, ast.Name)
    ]
