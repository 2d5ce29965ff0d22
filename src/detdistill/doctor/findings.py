"""Findings of the checks, and the page that shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from detdistill import printing
from detdistill.errors import counted

Level = Literal["stop", "warning", "fine"]
LEVELS: tuple[Level, ...] = ("stop", "warning", "fine")
WORDS: dict[Level, tuple[str, str]] = {"stop": ("STOP", "bold red"), "warning": ("warning", "yellow"), "fine": ("fine", "green")}
CAN_SAY = (
    "What this can say: whether data, teacher and pair fit, whether every loss term is finite and reaches the student, whether "
    "both students learn, and about what the run costs. What it cannot say: whether distillation gains AP. A few steps of one "
    "seed are chance; `--baseline true --seeds 0,1,2` measures the gain."
)


@dataclass(frozen=True)
class Finding:
    """Result of a check."""

    level: Level
    """``stop``: do not start the run; ``warning``: it may disappoint; ``fine``: nothing to do."""
    check: str
    """What was checked, in one word: ``data``, ``classes``, ``teacher``, ..."""
    what: str
    """The finding, as a sentence without a full stop."""
    where: str = ""
    """The place: a file, a class, a tensor, a loss term; empty if ``what`` says it."""
    todo: str = ""
    """What to do about it; empty if nothing."""


def fine(check: str, what: str) -> Finding:
    """A finding that needs nothing."""
    return Finding("fine", check, what)


@dataclass(frozen=True)
class Table:
    """Numbers of a check that belong side by side."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Diagnosis:
    """Result of ``doctor``: all findings, and the numbers behind them."""

    about: str
    """Method, teacher, student and data, in one line."""
    findings: tuple[Finding, ...]
    tables: tuple[Table, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Numbers by check, as in the JSON document."""

    @property
    def level(self) -> Level:
        """The worst level of all findings."""
        return min((finding.level for finding in self.findings), key=LEVELS.index, default="fine")

    @property
    def exit_code(self) -> int:
        """0: nothing to do, 1: warnings, 2: do not start."""
        return {"stop": 2, "warning": 1, "fine": 0}[self.level]

    def of(self, check: str, level: Level | None = None) -> list[Finding]:
        """The findings of one check, of one level or of all."""
        return [finding for finding in self.findings if finding.check == check and level in (None, finding.level)]

    def document(self) -> dict[str, Any]:
        """The diagnosis as plain values for JSON."""
        return {
            "about": self.about,
            "level": self.level,
            "findings": [asdict(finding) for finding in self.findings],
            "numbers": dict(self.numbers),
            "limits": CAN_SAY,
        }

    def render(self, console: Console) -> None:
        """Print one page: the verdict, the findings with the worst first, the tables, and what they cannot say."""
        printing.paragraph(console, self.about)
        printing.line(console)
        printing.paragraph(console, Text(self._verdict(), WORDS[self.level][1]))
        printing.line(console)
        for level in LEVELS:
            for finding in (one for one in self.findings if one.level == level):
                _show(console, finding)
        for table in self.tables:
            printing.line(console)
            printing.line(console, Text(table.title, "bold"))
            printing.table(console, table.head, table.rows, indent=2)
        printing.line(console)
        printing.paragraph(console, CAN_SAY)

    def _verdict(self) -> str:
        counts = {level: sum(finding.level == level for finding in self.findings) for level in LEVELS}
        if counts["stop"]:
            return f"Do not start: {counted(counts['stop'], 'reason')}, {counted(counts['warning'], 'warning')}."
        return f"Nothing forbids the start; {counted(counts['warning'], 'warning')}."


def _show(console: Console, finding: Finding) -> None:
    word, style = WORDS[finding.level]
    first = Text.assemble((f"{word:<9}", style), f"{finding.check:<11}")
    what = f"{finding.where}: {finding.what}" if finding.where else finding.what
    printing.paragraph(console, _sentence(what), first)
    if finding.todo:
        printing.paragraph(console, _sentence(finding.todo), "-> ".rjust(20))


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."


def percent(share: float) -> str:
    """A share as text: ``31 %``, ``0.4 %``."""
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.0f} %"


def some(names: Iterable[object], most: int = 5) -> str:
    """The first names, joined by commas."""
    listed: Sequence[str] = [str(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
