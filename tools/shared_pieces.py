"""The table of shared functions and classes: what each computes and which methods use it. The files are parsed, not imported."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from markdown_text import first_sentence_of, table

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src/detdistill"


def pieces_table() -> str:
    """For each file, the first sentence of its docstring and a table of its public functions and classes."""
    users = _users()
    parts = []
    for path in [PACKAGE / "methods/shared/align.py", *sorted((PACKAGE / "functional").glob("*.py"))]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module = _module(path)
        rows = []
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not _is_protocol(node):
                about = first_sentence_of(ast.get_docstring(node) or "")
                rows.append((f"`{node.name}`", about, _in_words(users[module, node.name])))
        if rows:
            shown = path.relative_to(PACKAGE)
            story = first_sentence_of(ast.get_docstring(tree) or "")
            parts.append(f"[`{shown}`](../{path.relative_to(ROOT)}): {story}.\n\n{table(('piece', 'does', 'used by'), *rows)}")
    return "\n".join(parts)


def _is_protocol(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)


def _users() -> dict[tuple[str, str], set[str]]:
    """The users (methods by slug, other packages by name) of each (module, name) that is imported anywhere."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        for module, name in _imported(path):
            found[module, name].add(_user(path))
    return found


def _user(path: Path) -> str:
    """Name of a file in the table: the slug of a method, or the package of any other file."""
    room, rest = _room(path), path.relative_to(PACKAGE).parts[1:]
    is_method = room == "methods" and rest[0] not in ("shared", "__init__.py")
    return f"`{rest[0].removesuffix('.py')}`" if is_method else room.removesuffix(".py")


def _in_words(users: set[str]) -> str:
    """Users as text, methods first; the shared packages themselves are listed only if there are no other users."""
    others = users - {"functional", "methods", "losses"}
    return ", ".join(sorted(others, key=lambda user: (not user.startswith("`"), user)) or sorted(users)) or "-"


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def _module(path: Path) -> str:
    return ".".join(["detdistill", *path.relative_to(PACKAGE).with_suffix("").parts])


def _imported(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)
