"""Write the tables of the docs from what the package says of itself: no fact in them is typed by hand.

    uv run python tools/tables.py            write README.md and docs/
    uv run python tools/tables.py --check    only say which files are out of date; exit code 1 if any is

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. Which pairs a method serves is found by building it
for every pair of detectors, on small backbones with random weights.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from detdistill.detectors.adapters import adapter, adapter_names
from detdistill.detectors.contract import Detector, Teacher
from detdistill.detectors.options import ModelOptions, option_types
from detdistill.detectors.probe import CHECKS, Probed, probe_all, tiny_detector
from detdistill.methods.shared.compose import build_method, method_class, method_slugs
from detdistill.methods.shared.needs import PairError
from detdistill.settings import DistillSettings, TrainSettings

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
ARGUMENT = re.compile(r"^    (\w+): (.*?)(?=^    \w+:|\Z)", re.MULTILINE | re.DOTALL)
VARIANTS = ("cwd,on=logits",)
"""Forms of methods that ask for more than the method's default."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    torch.set_num_threads(1)  # thousands of small modules: threads only wait for each other
    old = []
    probed = probe_all()
    # What cannot be built stands in the table of detectors with its reason; it takes part in no pair.
    detectors = {found.name: tiny_detector(found.name) for found in probed if found.results}
    tables = {
        "methods": methods_table(),
        "pairs": pairs_table(detectors),
        "detectors": detectors_table(probed),
        "hyperparameters": hyperparameters_table(),
        "model options": model_options_table(),
        "train settings": settings_table(TrainSettings),
        "distill settings": settings_table(DistillSettings, beside=TrainSettings),
    }
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        new = TABLE.sub(lambda found: f"{found[1]}\n{tables[found[2]]}\n{found[3]}", text)
        if new != text:
            old.append(path.relative_to(ROOT))
            if not check:
                path.with_name(path.name + ".tmp").write_text(new)
                os.replace(path.with_name(path.name + ".tmp"), path)
    print(*(f"{path} {'is out of date' if check else 'written'}" for path in old), sep="\n" if old else "")
    raise SystemExit(1 if check and old else 0)


def table(*rows: tuple[str, ...]) -> str:
    """Markdown, the first row as the head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"


def methods_table() -> str:
    """Slug and paper."""
    return table(("method", "paper"), *((f"`{slug}`", method_class(slug).title) for slug in method_slugs()))


def pairs_table(detectors: dict[str, Detector]) -> str:
    """Which pairs of detectors a method accepts, told by whichever are fewer: those it refuses, or those it serves."""
    rows = []
    for method in [*method_slugs(), *VARIANTS]:
        needs_teacher = method_class(method.partition(",")[0]).needs.teacher
        teachers = {name: Teacher(detector) for name, detector in detectors.items()} if needs_teacher else {"none": None}
        served = [(t, s) for s in detectors for t in teachers if serves(method, teachers[t], detectors[s])]
        every = [(t, s) for s in detectors for t in teachers]
        few = len(served) <= len(every) / 2
        text = by_student(served if few else [pair for pair in every if pair not in served], len(teachers))
        rows.append((f"`{method}`", f"{len(served)} of {len(every)}", ("only " if few else "all but ") + text if text else "all"))
    return table(("method", "pairs served", "which students (from which teachers)"), *rows)


def by_student(pairs: Sequence[tuple[str, str]], teachers: int) -> str:
    """Students with the same teachers together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for student in dict.fromkeys(student for _, student in pairs):
        groups.setdefault(tuple(t for t, s in pairs if s == student), []).append(student)
    return "; ".join(
        f"{', '.join(students)} ({'any' if len(names) == teachers else 'itself' if [*names] == students else ', '.join(names)})"
        for names, students in groups.items()
    )


def serves(method: str, teacher: Teacher | None, student: Detector) -> bool:
    """Whether the method can be built for the pair."""
    try:
        build_method(method, teacher, student)
    except PairError:
        return False
    return True


def detectors_table(probed: Sequence[Probed]) -> str:
    """What each adapter predicts and can do, as found by running it; whatever fails, with its reason below the table."""
    rows = [(f"`{found.name}`", found.about, found.family, *map(found.cell, CHECKS)) for found in probed]
    failures = "".join(f"\n- {line}" for found in probed for line in found.failures)
    return table(("detector", "what it is", "predicts", *CHECKS), *rows) + (failures + "\n" if failures else "")


def model_options_table() -> str:
    """Options of model strings: each with its meaning, its defaults and the detectors that have it."""
    kinds: dict[str, type[ModelOptions]] = {}
    for name in adapter_names():
        module = adapter(name)
        kinds[name] = module.OPTIONS
        kinds |= {f"{name}:{backbone}": kind for backbone, kind in getattr(module, "OPTIONS_OF_BACKBONE", {}).items()}
    found: dict[tuple[str, str], dict[str, list[str]]] = {}  # by option and meaning, then by default
    for label, kind in kinds.items():
        words, defaults = field_words(kind), {field.name: field.default for field in dataclasses.fields(kind)}
        for option in option_types(kind):
            default = _plain(defaults[option], "-")
            found.setdefault((option, words[option]), {}).setdefault(default, []).append(label)
    rows = [
        (f"`{option}`", meaning, "; ".join(f"`{default}`: {_some(labels, kinds)}" for default, labels in by_default.items()))
        for (option, meaning), by_default in sorted(found.items(), key=lambda item: -sum(map(len, item[1].values())))
    ]
    return table(("option", "meaning", "default: detectors that have it"), *rows)


def _some(labels: Sequence[str], every: Iterable[str]) -> str:
    """Names, or those of all others if they are fewer."""
    others = [name for name in every if name not in labels]
    few = len(others) < len(labels)
    return ("all but " if few else "") + ", ".join(others if few else labels)


def field_words(kind: type) -> dict[str, str]:
    """The strings below a dataclass's fields, by the field's name; those of its bases where it has none."""
    words: dict[str, str] = {}
    for part in reversed(kind.__mro__[:-1]):
        body = ast.parse(inspect.getsource(part)).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, after in itertools.pairwise(body.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                words[ast.unparse(statement.target)] = " ".join(str(after.value.value).split()).replace("``", "`")
    return words


def hyperparameters_table() -> str:
    """Of each method, with the defaults."""
    rows = []
    for slug in method_slugs():
        parameters = inspect.signature(method_class(slug).__init__).parameters.values()
        own = [f"`{p.name}={_plain(p.default)}`" for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        rows.append((f"`{slug}`", ", ".join(own)))
    return table(("method", "hyper-parameters and defaults"), *rows)


def settings_table(kind: type, beside: type | None = None) -> str:
    """Settings with their defaults, described by the docstring."""
    known = {field.name for field in dataclasses.fields(beside)} if beside else set()
    words = dict(ARGUMENT.findall(inspect.getdoc(kind) or ""))
    rows = [
        (f"`{field.name}`", f"`{_plain(field.default)}`", " ".join(words[field.name].split()).replace("``", "`"))
        for field in dataclasses.fields(kind)
        if field.name not in known
    ]
    return table(("setting", "default", "meaning"), *rows)


def _plain(value: object, separator: str = "/") -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple):
        return separator.join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


if __name__ == "__main__":
    main()
