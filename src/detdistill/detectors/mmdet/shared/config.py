"""Read the configuration inside a checkpoint: a Python text of assignments, which is parsed and never executed."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any


class Unreadable:
    """Value of an expression that is not a literal, for instance a call of a function."""

    def __repr__(self) -> str:
        return "an expression"


UNREADABLE = Unreadable()


def parse_config(text: str) -> dict[str, Any]:
    r"""Collect the top-level assignments of a configuration by name.

    Literals, ``dict(...)`` with keywords, lists, tuples and names assigned before are read; everything else becomes
    ``UNREADABLE``. The first lines of texts of MMDetection 1.x are paths, which are left out.

    Args:
        text: the text.

    Returns:
        Values by name; empty if the text is not Python.

    Example:
        >>> parse_config("strides = [8, 16]\nmodel = dict(type='GFL', head=dict(strides=strides, size=call()))")
        {'strides': [8, 16], 'model': {'type': 'GFL', 'head': {'strides': [8, 16], 'size': an expression}}}
    """
    tree = _parsed(text)
    names: dict[str, Any] = {}
    for statement in tree.body if tree is not None else ():
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    names[target.id] = _value(statement.value, names)
    return names


def _parsed(text: str) -> ast.Module | None:
    """The text as a tree, without its first lines if only these are no Python; None: it is no Python."""
    for skipped in range(3):
        try:
            return ast.parse(text.split("\n", skipped)[-1])
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return None


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_value(item, names) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {key.value: _value(value, names) for key, value in pairs if isinstance(key, ast.Constant)}
    if isinstance(node, ast.Name):
        return names.get(node.id, UNREADABLE)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _value(node.operand, names)
        return -inner if isinstance(inner, (int, float)) else UNREADABLE
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {word.arg: _value(word.value, names) for word in node.keywords if word.arg is not None}
    return UNREADABLE


class Section:
    """Part of a configuration, which says where it is when a value is not what is needed."""

    def __init__(self, values: Mapping[str, Any], place: str = "") -> None:
        self.values = values
        self.place = place

    def __bool__(self) -> bool:
        return bool(self.values)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def at(self, *names: str) -> Section:
        """The section inside, by names one after another; an empty section if it is not there. Of a list: its last item."""
        values: Any = self.values
        for name in names:
            values = values.get(name) if isinstance(values, Mapping) else None
            values = values[-1] if isinstance(values, list) and values and isinstance(values[-1], Mapping) else values
        inside = ".".join([*([self.place] if self.place else []), *names])
        return Section(values if isinstance(values, Mapping) else {}, inside)

    def get(self, name: str, default: Any = None) -> Any:
        """A value; the default if it is missing, None or unreadable. Tuples become lists."""
        found = self.values.get(name)
        if found is None or found is UNREADABLE:
            return default
        return list(found) if isinstance(found, tuple) else found
