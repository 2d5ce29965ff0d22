"""Students of teachers that know some of the classes each: AP on the classes of each teacher, and on those that none knows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from detdistill.report import words
from detdistill.report.runs import Group, defined, paired


@dataclass(frozen=True)
class Specialty:
    """The classes of one teacher, or those that no teacher knows."""

    title: str
    classes: str
    """Their names, or the first of them."""
    cells: tuple[str, ...]
    """Mean AP over these classes of teacher, baseline and student, and the difference of the last two."""


@dataclass(frozen=True)
class Specialties:
    """A table of one method."""

    label: str
    lines: tuple[Specialty, ...]


def specialties(groups: Sequence[Group]) -> list[Specialties]:
    """A table for each distilled group whose runs note the scores of several teachers, or of one of some classes only."""
    runs = [run for one in groups for run in one.runs]
    tables = []
    for one in (one for one in groups if one.role == "distilled"):
        teachers = next((run.summary["teachers"] for run in one.runs if run.summary.get("teachers")), None)
        if not teachers:
            continue
        pair = paired(one, runs)
        before = pair[0].per_class() if pair else {}
        tables.append(Specialties(one.label, _lines(teachers, before, (pair[1] if pair else one).per_class())))
    return tables


def _lines(
    teachers: Mapping[str, Mapping[str, Mapping[str, float]]], baseline: Mapping[str, float], student: Mapping[str, float]
) -> tuple[Specialty, ...]:
    known = {name for teacher in teachers.values() for name in teacher["per_class"]}
    new = [name for name in student if name not in known]
    named: list[tuple[str, list[str], Mapping[str, float]]] = [
        (name, list(teacher["per_class"]), teacher["per_class"]) for name, teacher in teachers.items()
    ]
    lines = []
    for title, classes, own in (*named, *([("no teacher", new, {})] if new else [])):
        ap, alone, taught = (_mean(scores, classes) for scores in (own, baseline, student))
        gain = None if alone is None or taught is None else taught - alone
        shown = ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
        lines.append(Specialty(title, shown, (*map(words.points, (ap, alone, taught)), words.points(gain, signed=True))))
    return tuple(lines)


def _mean(scores: Mapping[str, float], classes: Sequence[str]) -> float | None:
    """Mean AP over the classes that have one; None if none has."""
    known = [ap for name in classes if (ap := defined(scores.get(name))) is not None]
    return statistics.fmean(known) if known else None
