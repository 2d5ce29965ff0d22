"""Print the table of speed and memory: what was measured last, beside the goal; from the files in ``benchmarks/results``.

    uv run python benchmarks/table.py

Each row names the script that measures it. A row without a number was not measured, and says so. Ratios are of medians, measured
alternately in one run; "before" is commit 4da03f5, unless the row names another peer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    what: str
    before: str
    """The number of commit 4da03f5."""
    goal: str
    most: float | None
    """The goal as the largest number that meets it; negative: the smallest one, without its sign. None: it is judged by hand."""
    script: str
    find: Callable[[], float]
    """Reads the number; raises OSError or KeyError if it was not measured."""


def case(file: str, group: str, name: str, key: str = "ratio") -> Callable[[], float]:
    """Read a number of a case from a file of results."""

    def find() -> float:
        return float(json.loads((RESULTS / file).read_text())[group][name][key])

    return find


def value(file: str, *keys: str) -> Callable[[], float]:
    """Read a number by its keys from a file of results."""

    def find() -> float:
        found: Any = json.loads((RESULTS / file).read_text())
        for key in keys:
            found = found[key]
        return float(found)

    return find


def nothing() -> float:
    """Stand for a row that no script has measured here."""
    raise KeyError


REVISIONS, READING = "revisions_cpu.json", "reading_cpu.json"
ROWS = (
    Row("decoding JPEG / PIL", "1.00", "<= 0.75", 0.75, "pieces.py", case("pieces_cpu.json", "pieces", "decoding")),
    Row("a view with colour / hue in HSV", "1.00", "<= 0.40", 0.40, "pieces.py", case("pieces_cpu.json", "pieces", "colours")),
    Row("start of training / before", "7.15 s", "<= 0.70", 0.70, "revisions.py", case(REVISIONS, "cases", "import")),
    Row("`detectors`, kept, seconds", "14.1 s", "<= 1.5", 1.5, "start.py", value("start_cpu.json", "seconds", "detectors")),
    Row("`methods`, seconds", "4.4 s", "<= 1.5", 1.5, "start.py", value("start_cpu.json", "seconds", "methods")),
    Row("`cite`, seconds", "2.1 s", "<= 0.3", 0.3, "start.py", value("start_cpu.json", "seconds", "cite pkd")),
    Row(
        "RetinaNet's assignment, 500 boxes / before",
        "1.00",
        "<= 0.20",
        0.2,
        "revisions.py",
        case(REVISIONS, "cases", "assign retinanet:resnet10t"),
    ),
    Row("SSD's assignment / before", "1.00", "<= 0.20", 0.2, "revisions.py", case(REVISIONS, "cases", "assign ssd:resnet10t")),
    Row("ATSS's assignment / before", "1.00", "<= 0.20", 0.2, "revisions.py", case(REVISIONS, "cases", "assign atss:resnet10t")),
    Row(
        "memory with 1203 classes / before",
        "1.00",
        "<= 0.50",
        0.5,
        "revisions.py",
        case(REVISIONS, "cases", "memory of many classes retinanet:resnet10t"),
    ),
    Row(
        "time with 1203 classes / before",
        "1.00",
        "",
        None,
        "revisions.py",
        case(REVISIONS, "cases", "many classes retinanet:resnet10t"),
    ),
    Row("second scan, 20,500 images, COCO / before", "1.00", "<= 0.20", 0.2, "reading.py", case(READING, "cases", "coco again")),
    Row("second scan, 20,500 images, VOC / before", "1.00", "<= 0.20", 0.2, "reading.py", case(READING, "cases", "voc again")),
    Row("writing a cache, rate / plain files", "0.2 to 0.6", ">= 0.80", -0.8, "writing.py", value("writing_cpu.json", "ratio")),
    Row("evaluation, time and memory / pycocotools", "6.3x, 1.67x", ">= 7.5x, >= 3x", None, "none", nothing),
    Row(
        "a demo-like run, whole process / before",
        "1.00",
        "<= 0.70",
        0.7,
        "whole_runs.py",
        value("whole_runs_cpu.json", "ratio"),
    ),
    Row("loader, images/s / Ultralytics", "0.42 to 1.5", ">= 1.0", -1.0, "none", nothing),
    Row("on a GPU: step, images/s, memory, bf16", "-", "-", None, "steps.py --device cuda", nothing),
)


def judged(row: Row, found: float) -> str:
    """Whether a number meets the goal of its row."""
    if row.most is None:
        return ""
    return "met" if (found <= row.most if row.most > 0 else found >= -row.most) else "MISSED"


def main() -> None:
    """Print the table."""
    lines = [("what", "before", "goal", "today", "", "benchmarks/")]
    for row in ROWS:
        try:
            found = row.find()
            lines.append((row.what, row.before, row.goal, f"{found:.3f}", judged(row, found), row.script))
        except (OSError, KeyError):
            lines.append((row.what, row.before, row.goal, "not run", "", row.script))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
