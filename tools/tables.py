"""Generate the tables of README.md and docs/ from the code and its docstrings, and the list of detectors of the package.

    uv run python tools/tables.py                          write README.md, docs/ and probed.json
    uv run python tools/tables.py docs/methods/pkd.md      write one page; quick if its tables need no detectors
    uv run python tools/tables.py --check                  list files that are out of date; exit code 1 if there are any

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. To find the pairs that a method can be used with, the method
is built for every pair of detectors, on small backbones with random weights. A method's page is ``docs/methods/<slug>.md``.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from detdistill.detectors.adapters import adapter, adapter_names
from detdistill.detectors.contract import Detector, Teacher
from detdistill.detectors.options import ModelOptions, option_types
from detdistill.detectors.probe import CHECKS, probe_all, survey_of, tiny_detector
from detdistill.detectors.probed import SHIPPED, Probed
from detdistill.export.probe import probe_export
from detdistill.files import json_by_entry
from detdistill.methods.shared.catalogue import method_slugs
from detdistill.methods.shared.compose import build_method, parse_methods
from detdistill.methods.shared.needs import PairError
from detdistill.settings import DistillSettings, TeachSettings, TrainSettings
from markdown_text import described_arguments, table
from markdown_text import plain as _plain
from method_tables import methods_table, properties_table, tables_of
from shared_pieces import pieces_table

ROOT = Path(__file__).resolve().parent.parent
METHOD_PAGES = ROOT / "docs/methods"
EXAMPLE = ROOT / "tests/methods/example_method.py"
TABLE = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
VARIANTS = ("cwd,on=logits",)
"""Methods with settings that need more than the method's defaults; they get their own row in the table of pairs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, help="only these; none: README.md and all pages of docs/")
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)  # thousands of small modules: threads only wait for each other
    pages = [page.resolve() for page in given.pages] or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    wrong = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        new = with_tables(text, page)
        if new != text:
            wrong.append(f"{page.relative_to(ROOT)} {'is out of date' if given.check else 'written'}")
            if not given.check:
                page.with_name(page.name + ".tmp").write_text(new, encoding="utf-8")
                os.replace(page.with_name(page.name + ".tmp"), page)
    if not given.pages and (text := survey()) != SHIPPED.read_text(encoding="utf-8"):
        wrong.append(f"{SHIPPED.relative_to(ROOT)} {'is out of date' if given.check else 'written'}")
        if not given.check:
            SHIPPED.write_text(text, encoding="utf-8")
    missing = [f"{METHOD_PAGES / slug}.md" for slug in method_slugs() if not (METHOD_PAGES / f"{slug}.md").exists()]
    wrong += [f"{Path(page).relative_to(ROOT)} is missing: copy that of another method and change its text" for page in missing]
    print(*wrong, sep="\n" if wrong else "")
    raise SystemExit(1 if missing or (given.check and wrong) else 0)


def with_tables(text: str, page: Path) -> str:
    """The text of a page with its tables generated anew."""
    own = tables_of(page.stem) if page.parent == METHOD_PAGES and page.stem in method_slugs() else {}
    return TABLE.sub(lambda found: f"{found[1]}\n{own[found[2]] if found[2] in own else TABLES[found[2]]()}\n{found[3]}", text)


def example() -> str:
    """The worked example of a method, from a file of the tests."""
    return f"```python\n{EXAMPLE.read_text(encoding='utf-8').rstrip()}\n```\n"


@functools.cache
def probed() -> Sequence[Probed]:
    """The results of running every detector."""
    return probe_all(export=probe_export)


def survey() -> str:
    """The results for the file that is shipped with the package."""
    names = ("torch", "torchvision", "transformers", "timm", "ultralytics", "libreyolo", "onnx")
    when = "with " + ", ".join(f"{name} {version(name)}" for name in names)
    return json_by_entry(dataclasses.asdict(survey_of(probed(), when)))


def pairs_table() -> str:
    """The table of pairs of detectors that each method accepts; lists the accepted or the refused pairs, whichever are fewer."""
    # What cannot be built stands in the table of detectors with its reason; it takes part in no pair.
    detectors = {found.name: tiny_detector(found.name) for found in probed() if found.results}
    # Forks, which have the detectors already; building thousands of methods takes minutes on one core.
    row = functools.partial(pairs_row, detectors)
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), _WAITING.append, (row,)) as pool:
        rows = pool.map(_row, [*method_slugs(), *VARIANTS], chunksize=1)
    return table(("method", "pairs served", "which students (from which teachers)"), *rows)


_WAITING: list[Callable[[str], tuple[str, str, str]]] = []
"""In a fork: what it does with each item. It is inherited, because detectors are not sent between processes."""


def _row(method: str) -> tuple[str, str, str]:
    return _WAITING[0](method)


def pairs_row(detectors: Mapping[str, Detector], method: str) -> tuple[str, str, str]:
    """The row of a method in the table of pairs."""
    ((kind, settings),) = parse_methods(method)
    alone = kind.needs(**settings).teacher is None
    teachers = {"none": None} if alone else {name: Teacher(detector) for name, detector in detectors.items()}
    served = [(t, s) for s in detectors for t in teachers if serves(method, teachers[t], detectors[s])]
    every = [(t, s) for s in detectors for t in teachers]
    few = len(served) <= len(every) / 2
    text = by_student(served if few else [pair for pair in every if pair not in served], len(teachers))
    return f"`{method}`", f"{len(served)} of {len(every)}", ("only " if few else "all but ") + text if text else "all"


def by_student(pairs: Sequence[tuple[str, str]], teachers: int) -> str:
    """Pairs as text, grouped by students that have the same teachers."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for student in dict.fromkeys(student for _, student in pairs):
        groups.setdefault(tuple(t for t, s in pairs if s == student), []).append(student)
    return "; ".join(f"{', '.join(students)} ({_teachers(students, names, teachers)})" for names, students in groups.items())


def _teachers(students: Sequence[str], names: Sequence[str], every: int) -> str:
    if len(names) == every:
        return "any"
    if [*names] == [*students]:
        return "itself" if len(names) == 1 else "one another"
    return ", ".join(names)


def serves(method: str, teacher: Teacher | None, student: Detector) -> bool:
    """Whether the method can be built for the pair."""
    try:
        build_method(method, teacher, student)
    except PairError:
        return False
    return True


def detectors_table() -> str:
    """The table of adapters and their capabilities, found by running them; failures and their reasons follow the table."""
    rows = [(f"`{found.name}`", found.about, found.family, *map(found.cell, CHECKS), found.export) for found in probed()]
    failures = "".join(f"\n- {line}" for found in probed() for line in found.failures)
    return table(("detector", "what it is", "predicts", *CHECKS, "as ONNX"), *rows) + (failures + "\n" if failures else "")


def model_options_table() -> str:
    """The table of options of model strings: meaning, defaults, and the detectors that have the option."""
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
    """The labels as text, or "all but" the other labels if those are fewer."""
    others = [name for name in every if name not in labels]
    few = len(others) < len(labels)
    return ("all but " if few else "") + ", ".join(others if few else labels)


def field_words(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass, by the field's name; inherited fields are included."""
    words: dict[str, str] = {}
    for part in reversed(kind.__mro__[:-1]):
        body = ast.parse(inspect.getsource(part)).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, after in itertools.pairwise(body.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                words[ast.unparse(statement.target)] = " ".join(str(after.value.value).split()).replace("``", "`")
    return words


def settings_table(kind: type, beside: type | None = None) -> str:
    """The table of a class's settings with default and meaning; settings that ``beside`` also has are left out."""
    known = {field.name for field in dataclasses.fields(beside)} if beside else set()
    words = described_arguments(kind)
    rows = [
        (f"`{field.name}`", f"`{_plain(field.default)}`", words[field.name])
        for field in dataclasses.fields(kind)
        if field.name not in known
    ]
    return table(("setting", "default", "meaning"), *rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "methods": lambda: methods_table("docs/methods/"),
    "methods index": lambda: methods_table(""),
    "properties": properties_table,
    "pairs": pairs_table,
    "detectors": detectors_table,
    "model options": model_options_table,
    "train settings": lambda: settings_table(TrainSettings),
    "distill settings": lambda: settings_table(DistillSettings, beside=TrainSettings),
    "teach settings": lambda: settings_table(TeachSettings, beside=TrainSettings),
    "pieces": pieces_table,
    "example": example,
}
"""Functions that generate the tables, except those that only a method's page has."""


if __name__ == "__main__":
    main()
