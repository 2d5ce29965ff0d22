"""metrics.csv: one row for each logged event, written at once, continued by a resumed run."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path

FIRST = ("stage", "step", "total", "epoch", "lr", "seconds", "loss")


class MetricsTable:
    """A CSV file whose columns grow as new names appear."""

    def __init__(self, path: Path, keep_until: int | None = None) -> None:
        """Open for appending.

        Args:
            path: the file; made when missing.
            keep_until: when a run is resumed, rows after this step are dropped: they will be logged again.
        """
        self.path = path
        self.columns: list[str] = list(FIRST)
        rows: list[dict[str, str]] = []
        if path.exists() and keep_until is not None:
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or FIRST)
                rows = [row for row in reader if row["step"].isdigit() and int(row["step"]) <= keep_until]
        self._rewrite(rows)

    def add(self, values: Mapping[str, float | int | str]) -> None:
        """Append a row; unknown columns are added to the file."""
        new = [name for name in values if name not in self.columns]
        if new:
            with self.path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            self.columns += new
            self._rewrite(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({name: _short(value) for name, value in values.items()})

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)


def _short(value: float | int | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
