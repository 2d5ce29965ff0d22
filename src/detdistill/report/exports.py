"""The report's table of exported files: AP of torch, of the file, of its int8 form, and what separates them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from detdistill.errors import RunError
from detdistill.export.proof import Stage
from detdistill.export.run import NOTES, read_notes
from detdistill.report.runs import Group

HEAD = (*Stage.HEAD, "")
"""Columns of the table after the first."""


@dataclass(frozen=True)
class Exports:
    """The table, and a line for each ``export.json`` that cannot be read."""

    rows: tuple[tuple[str, tuple[str, ...]], ...]
    """Title and cells of each row; the cells belong to ``HEAD``."""
    notes: tuple[str, ...]


def exports_of(groups: Sequence[Group]) -> Exports | None:
    """The exported files of all runs; None: no run was exported."""
    rows: list[tuple[str, tuple[str, ...]]] = []
    notes = []
    for group in groups:
        for run in group.runs:
            try:
                entries = read_notes(run.folder / NOTES)
            except RunError as error:
                notes.append(str(error))
                continue
            for name, entry in entries.items():
                for stage in map(Stage.from_plain, entry["stages"]):
                    title = f"{group.label}, seed {run.seed}: {stage.name}{'' if stage.file is None else f' ({name})'}"
                    rows.append((title, (*stage.cells, "" if stage.passed else "too much lost")))
    return Exports(tuple(rows), tuple(notes)) if rows or notes else None
