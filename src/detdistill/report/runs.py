"""Read finished run folders and group the runs for the report."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detdistill.compare import read_run
from detdistill.errors import RunError

ROLES = ("teacher", "train", "baseline", "distilled")
"""Roles of runs, in the order of the page."""

Curve = tuple[list[float], list[float]]
"""x and y values of the rows in which y was logged."""


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: its summary, and ``metrics.csv`` as numbers."""

    folder: Path
    summary: dict[str, Any]
    rows: tuple[dict[str, float], ...]
    """Logged numbers by column; ``steps``, ``epochs`` and ``seconds`` are cumulative over all stages."""

    @property
    def role(self) -> str:
        """Role of the run: ``teacher``, ``train``, ``baseline`` or ``distilled``."""
        return str(self.summary["role"])

    @property
    def seed(self) -> int:
        """Seed of weights, order and augmentation."""
        return int(self.summary["seed"])

    @property
    def config(self) -> dict[str, Any]:
        """All settings of the run."""
        return dict(self.summary["config"])

    @property
    def columns(self) -> list[str]:
        """Names of the columns with at least one value, in the file's order."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def curve(self, column: str, against: str = "steps") -> Curve:
        """Values of ``against`` (x) and ``column`` (y) in the rows that have both."""
        points = [(row[against], row[column]) for row in self.rows if column in row and against in row]
        return [x for x, _ in points], [y for _, y in points]


@dataclass(frozen=True)
class Group:
    """Runs that differ only by their seed."""

    label: str
    """Name on the page: ``teacher``, ``baseline``, or the method."""
    role: str
    runs: tuple[Run, ...]

    def mean(self, value: Callable[[Run], float | None]) -> float | None:
        """Mean over the seeds that have the value."""
        known = [number for run in self.runs if (number := value(run)) is not None]
        return statistics.fmean(known) if known else None

    def metric(self, name: str) -> float | None:
        """Mean over the seeds of one of the 12 COCO metrics; None if it is undefined."""
        return self.mean(lambda run: defined(run.summary["metrics"].get(name)))

    def errors(self) -> dict[str, float]:
        """Mean AP50 lost to each kind of error, over the seeds that recorded it; empty if none did."""
        names = dict.fromkeys(name for run in self.runs for name in run.summary.get("errors") or {})
        means = {name: self.mean(lambda run, name=name: (run.summary.get("errors") or {}).get(name)) for name in names}  # type: ignore[misc]
        return {name: value for name, value in means.items() if value is not None}

    def per_class(self) -> dict[str, float]:
        """Mean AP over the seeds of each class with ground truth."""
        names = dict.fromkeys(name for run in self.runs for name in run.summary.get("per_class") or {})
        means = {name: self.mean(lambda run, name=name: defined(run.summary["per_class"].get(name))) for name in names}  # type: ignore[misc]
        return {name: value for name, value in means.items() if value is not None}


def defined(value: float | None) -> float | None:
    """Replace COCO's -1 (undefined, no such ground truth) by None."""
    return None if value is None or value < 0 else float(value)


def read(folder: Path) -> Run:
    """Read a run folder. A run without ``metrics.csv`` has no rows.

    Raises:
        RunError: ``summary.json`` or ``config.yaml`` is missing or broken, or lacks required keys.
    """
    summary = read_run(folder)
    missing = [key for key in ("role", "student", "seed", "metrics", "data") if key not in summary]
    if missing or not isinstance(summary["config"], dict):
        raise RunError(f"{folder} is not a complete run: summary.json lacks {', '.join(missing) or 'its config'}")
    return Run(folder, summary, tuple(_rows(folder / "metrics.csv")))


def _rows(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        raw = list(csv.DictReader(file))
    rows: list[dict[str, float]] = []
    stage, before = None, {"steps": 0.0, "epochs": 0.0, "seconds": 0.0}
    for cells in raw:
        row = {name: number for name, text in cells.items() if name != "stage" and (number := _number(text)) is not None}
        if "step" not in row:
            continue
        if stage is not None and cells.get("stage") != stage and rows:
            before = {name: rows[-1].get(name, 0.0) for name in before}
        stage = cells.get("stage")
        row["steps"] = row["step"] + before["steps"]
        row["epochs"] = row.get("epoch", 0.0) + 1 + before["epochs"]
        row["seconds"] = row.get("seconds", 0.0) + before["seconds"]
        rows.append(row)
    return rows


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def group(runs: Sequence[Run]) -> list[Group]:
    """Group runs by role, student, method, teacher, data and budget; the runs of a group are sorted by seed."""
    students = {run.summary["student"] for run in runs if run.role in ("baseline", "distilled")}
    teachers = {run.summary.get("teacher") for run in runs if run.role == "distilled"}
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        label = run.role
        if run.role == "distilled":
            label = str(run.summary.get("method")) + (" + inherited head" if run.summary.get("inherit") else "")
            label += "" if run.config.get("balance") is None else f", balance {run.config['balance']:g}"
            label += f" (teacher {run.summary.get('teacher')})" if len(teachers) > 1 else ""
        elif run.role == "train":
            label = str(run.summary["student"])
        if len(students) > 1 and run.role in ("baseline", "distilled"):
            label += f" of {run.summary['student']}"
        label += _circumstances(run, runs)
        groups.setdefault((run.role, label), []).append(run)
    ordered = sorted(groups.items(), key=lambda item: ROLES.index(item[0][0]) if item[0][0] in ROLES else 1)
    return [Group(label, role, tuple(sorted(found, key=lambda run: run.seed))) for (role, label), found in ordered]


def _circumstances(run: Run, runs: Sequence[Run]) -> str:
    """Data and length of a run, in words, as far as runs of the same role differ in them; a mean over both means nothing."""
    others = [other for other in runs if other.role == run.role]
    words = ""
    if len({_fingerprint(other) for other in others}) > 1:
        words += f", data {data_name(run, others)}"
    if len({other.summary.get("steps") for other in others if _fingerprint(other) == _fingerprint(run)}) > 1:
        words += f", {run.summary.get('steps')} steps"
    return words


def _fingerprint(run: Run) -> object:
    return run.summary["data"].get("fingerprint")


def data_name(run: Run, others: Sequence[Run]) -> str:
    """The last parts of the path of a run's data that tell it from the data of the other runs."""
    mine = Path(str(run.summary["data"].get("path", "")))
    paths = {Path(str(other.summary["data"].get("path", ""))) for other in others}
    for count in range(1, len(mine.parts) + 1):
        name = Path(*mine.parts[-count:])
        if sum(path.parts[-count:] == mine.parts[-count:] for path in paths) == 1:
            return str(name)
    return f"{mine} ({str(_fingerprint(run))[:8]})"  # the same path with another content


def baselines_for(group: Group, runs: Sequence[Run]) -> list[Run]:
    """Find a baseline with the same student and data for each seed of a distilled group, if possible in the same folder."""
    chosen = []
    for run in group.runs:
        same = [
            other
            for other in runs
            if other.role == "baseline"
            and other.seed == run.seed
            and other.summary["student"] == run.summary["student"]
            and other.summary["data"].get("fingerprint") == run.summary["data"].get("fingerprint")
        ]
        chosen += sorted(same, key=lambda other: other.folder.parent != run.folder.parent)[:1]
    return list(dict.fromkeys(chosen))


def paired(group: Group, runs: Sequence[Run]) -> tuple[Group, Group] | None:
    """The baselines of a distilled group, and the runs of the group that have a baseline; None if there is no baseline."""
    baselines = baselines_for(group, runs)
    seeds = {run.seed for run in baselines}
    if not baselines:
        return None
    mine = tuple(run for run in group.runs if run.seed in seeds)
    return Group("baseline", "baseline", tuple(baselines)), Group(group.label, group.role, mine)


def distillation_terms(run: Run, baselines: Sequence[Run]) -> list[str]:
    """Loss terms added by distillation: those that the baselines lack; without baselines, those named after the method."""
    terms = [name.removeprefix("train/") for name in run.columns if name.startswith("train/")]
    plain = {name.removeprefix("train/") for other in baselines for name in other.columns}
    if plain:
        return [name for name in terms if name not in plain]
    slugs = [part.split(",")[0].strip() for part in str(run.summary.get("method") or "").split("+")]
    return [name for name in terms if any(slug and name.split("/")[0].startswith(slug) for slug in slugs)]
