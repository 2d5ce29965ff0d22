"""Mutation tests of the shared modules: change one line at a time and check that the module's tests fail.

    uv run python tools/mutations.py                      # four changes in each shared module
    uv run python tools/mutations.py --each 10 align boxes

A change affects one place in a line: ``+`` becomes ``-``, ``<`` becomes ``<=``, a number becomes another number, ``min`` becomes
``max``. The tests of ``functional/boxes.py`` are ``tests/functional/test_boxes*.py``, and so on. If no test fails after a
change, its line is printed and the script fails, unless ``HARMLESS`` gives a reason why no test can fail.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED = ("functional", "methods/shared")
"""Folders of ``src/detdistill`` whose modules many methods use."""
TIME_LIMIT_S = 300
"""A change that makes the tests run longer than this counts as noticed."""

OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.And: "or",
    ast.Or: "and",
}
WRITTEN: dict[type[ast.AST], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.And: "and",
    ast.Or: "or",
}
NAMES = {"min": "max", "amin": "amax", "argmin": "argmax", "sum": "mean", "floor": "ceil", "zeros": "ones", "any": "all"}
NAMES |= {other: name for name, other in NAMES.items()}

_FROZEN = "immutability protects callers; nothing in the library changes or hashes such a value"
_CHUNK = "how many numbers are computed at a time changes no result"
_EQUAL = "where the two numbers are equal, both ways give the same"
_PAIRS = "more pairs are computed, and left out because their IoU is too small"
_LENGTHS = "the lists are made together, so their lengths are equal"
_SLACK = "the slack keeps the two numbers apart"
_FROM_THE_END = "column -2 or -1 of the four is column 2 or 3"
_FLOAT32 = "float() returns a float32 tensor as it is"
HARMLESS: dict[str, dict[str, str]] = {
    "functional/attention.py": {"LARGE_CHUNK = 2**27": _CHUNK},
    "functional/atss.py": {
        "inside = torch.cat([from_start, to_end], dim=-1).amin(dim=-1) >= 0.01": "no centre is just a hundredth inside",
    },
    "functional/dense_maps.py": {"renamed = torch.full_like(theirs, -2)": "any number that is no level serves as well"},
    "functional/distributions.py": {
        "length = torch.where(onto_units.abs() <= least_unit, sign * least_unit, onto_units)": _EQUAL,
    },
    "functional/grid_matching.py": {
        "@dataclass(frozen=False)": _FROZEN,
        "SLACK = 2e-05": _PAIRS,
        "possible.append(inside / (smallest - inside) * (2 + SLACK))": _PAIRS,
        "pairs = [_pairs(boxes_xyxy, areas, wanted, *each) for each in zip(levels, possible, shared, strict=False)]": _LENGTHS,
        "box, anchor, iou = (torch.cat(column) for column in zip(*pairs, strict=False))": _LENGTHS,
        "box, number = torch.nonzero(possible > wanted[:, None], as_tuple=True)": _SLACK,
        "least = wanted[box] / (2 + wanted[box]) * smallest[box, number] * (1 - SLACK)  # of the intersection": _PAIRS,
        "first_x, count_x = _window(across[box, number] * best_y[box, number, None] > least[:, None])": _SLACK,
        "first_y, count_y = _window(down[box, number] * best_x[box, number, None] > least[:, None])": _SLACK,
        "known = best[chosen] > low": _EQUAL,
        "return (inside / ((right - left) * (bottom - top) + areas + inside)).argmax(dim=0)": "the order of the boxes stays",
    },
    "functional/masks.py": {
        "start, count = span[:, axis, None], (span[:, axis - 2, None] - span[:, axis, None])": _FROM_THE_END,
        "start, end = boxes[:, axis, None], boxes[:, axis - 2, None]": _FROM_THE_END,
        "found = found.float() if found.dtype.itemsize <= 4 else found": _FLOAT32,
        "found = found.float() if found.dtype.itemsize < 5 else found": _FLOAT32,
        "fixed = fixed.float() if fixed.dtype.itemsize <= 4 else fixed": _FLOAT32,
        "fixed = fixed.float() if fixed.dtype.itemsize < 5 else fixed": _FLOAT32,
    },
    "functional/relations.py": {"if pool >= 1:": "pooling by one cell changes nothing"},
    "functional/sparse_focal.py": {"for part, wanted, by, out in zip(*parts, strict=False):": _LENGTHS},
    "functional/paa.py": {"if abs(bound - before) <= TOLERANCE:": "the difference of two means is never just the tolerance"},
    "functional/precision.py": {
        "return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize <= 4 else tensor": _FLOAT32,
        "return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 5 else tensor": _FLOAT32,
    },
    "functional/query_seeds.py": {"@dataclass(frozen=False)": _FROZEN},
    "functional/soft_targets.py": {
        "LARGE_CHUNK = 2**27": _CHUNK,
        "size = max(1, ROWS_CHUNK.get(rows.device.type, LARGE_CHUNK) // max(2, rows.shape[-1]))": _CHUNK,
    },
    "methods/shared/catalogue.py": {"@dataclass(frozen=False)": _FROZEN},
    "methods/shared/compose.py": {
        "for (kind, values), name in zip(parse_methods(text), named_teachers(text), strict=False):": _LENGTHS,
    },
    "methods/shared/contract.py": {"pieces += zip(chosen, taught.split(len(part)), strict=False)": _LENGTHS},
    "methods/shared/hyper_parameters.py": {"@dataclass(frozen=False)": _FROZEN},
    "methods/shared/needs.py": {
        "if any(abs(a - b) / 2 > ANCHOR_ATOL + ANCHOR_RTOL * b / 2 for a, b in zip(own, other, strict=False)):": _LENGTHS,
        "@dataclass(frozen=False)": _FROZEN,
    },
}
"""Module -> changed line without its indentation -> reason why no test can fail after the change."""


@dataclass(frozen=True)
class Mutation:
    """One change of one line."""

    module: Path
    line: int
    start: int
    end: int
    text: str

    def source(self) -> str:
        """The module's text with the change."""
        lines = self.module.read_text().splitlines(keepends=True)
        old = lines[self.line - 1]
        lines[self.line - 1] = old[: self.start] + self.text + old[self.end :]
        return "".join(lines)

    @property
    def changed(self) -> str:
        """The changed line."""
        return self.source().splitlines()[self.line - 1].strip()

    @property
    def before(self) -> str:
        """The original line."""
        return self.module.read_text().splitlines()[self.line - 1].strip()


def modules() -> list[Path]:
    """All modules of the shared folders."""
    found = (path for folder in SHARED for path in sorted((ROOT / "src/detdistill" / folder).rglob("*.py")))
    return [path for path in found if path.name != "__init__.py"]


def tests_of(module: Path) -> list[Path]:
    """The test files of a module: ``test_<module>*.py`` in the corresponding folder of ``tests``."""
    place = module.relative_to(ROOT / "src/detdistill")
    return sorted((ROOT / "tests" / place.parent).glob(f"test_{place.stem}*.py"))


def mutations(module: Path) -> Iterator[Mutation]:
    """All changes of a module, in the order of its lines."""
    text = module.read_text()
    lines = text.splitlines()
    found: set[Mutation] = set()
    for node in _executed(ast.parse(text)):
        found.update(_changes(module, lines, node))
    return iter(sorted(found, key=lambda one: (one.line, one.start)))


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a syntax tree without annotations, docstrings, imports and error messages."""
    skipped: list[ast.AST | None] = []
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, (ast.arg, ast.AnnAssign)):
        skipped.append(node.annotation)
    if isinstance(node, ast.FunctionDef):
        skipped.append(node.returns)
    yield node
    for child in ast.iter_child_nodes(node):
        if child not in skipped:
            yield from _executed(child)


def _changes(module: Path, lines: list[str], node: ast.AST) -> Iterator[Mutation]:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield from _between(module, lines, node.left, node.right, node.op)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield from _between(module, lines, node.left, node.comparators[0], node.ops[0])
    elif isinstance(node, ast.BoolOp):
        yield from _between(module, lines, node.values[0], node.values[1], node.op)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        yield Mutation(module, node.lineno, node.col_offset, node.end_col_offset or 0, _other_value(node.value))
    elif isinstance(node, ast.Attribute) and node.attr in NAMES and node.end_col_offset is not None:
        end = node.end_col_offset
        yield Mutation(module, node.end_lineno or 0, end - len(node.attr), end, NAMES[node.attr])


def _other_value(value: bool | int | float) -> str:
    if isinstance(value, bool):
        return str(not value)
    return str(value + 1) if isinstance(value, int) else str(value * 2 or 1.0)


def _between(module: Path, lines: list[str], left: ast.expr, right: ast.expr, op: ast.AST) -> Iterator[Mutation]:
    """The change of the operator between two operands, if both are on one line."""
    if left.end_lineno != right.lineno or left.end_col_offset is None:
        return
    line = lines[right.lineno - 1]
    at = line.find(WRITTEN[type(op)], left.end_col_offset, right.col_offset)
    if at >= 0:
        yield Mutation(module, right.lineno, at, at + len(WRITTEN[type(op)]), OPERATORS[type(op)])


def noticed(mutation: Mutation | None, tests: list[Path]) -> bool:
    """Run the tests in a child process on a copy of the project with one change; return whether they fail."""
    child = os.fork()
    if child == 0:
        signal.alarm(TIME_LIMIT_S)
        with tempfile.TemporaryDirectory() as folder:
            status = _run(mutation, tests, Path(folder))
        os._exit(status)
    _, status = os.waitpid(child, 0)
    return status != 0


def _run(mutation: Mutation | None, tests: list[Path], folder: Path) -> int:
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    if mutation is not None:
        (folder / mutation.module.relative_to(ROOT)).write_text(mutation.source())
    os.chdir(folder)
    sys.path[:0] = [str(folder / "src"), str(folder)]
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    chosen = [str(folder / path.relative_to(ROOT)) for path in tests]
    return int(importlib.import_module("pytest").main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *chosen]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="names of modules without .py (default: all shared ones)")
    parser.add_argument("--each", type=int, default=4, help="changes in each module")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("torch", "torchvision", "scipy.optimize", "pytest"):
        importlib.import_module(name)  # once here instead of once for every change
    survivors = tried = 0
    for module in modules():
        if options.modules and module.stem not in options.modules:
            continue
        found, tests = list(mutations(module)), tests_of(module)
        name = str(module.relative_to(ROOT / "src/detdistill"))
        if not tests or (found and noticed(None, tests)):
            print(f"{name}: {'its tests fail without any change' if tests else 'has no tests beside it'}", flush=True)
            survivors += 1
            continue
        chosen = random.Random(options.seed).sample(found, min(options.each, len(found)))
        for mutation in sorted(chosen, key=lambda one: (one.line, one.start)):
            tried += 1
            why = HARMLESS.get(name, {}).get(mutation.changed)
            seen = why is None and noticed(mutation, tests)
            survivors += not seen and why is None
            verdict = "noticed" if seen else f"harmless: {why}" if why else "NOT NOTICED"
            print(f"{name}:{mutation.line}  {mutation.before}  ->  {mutation.changed}  {verdict}", flush=True)
    print(f"{tried} changes, {survivors} not noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
