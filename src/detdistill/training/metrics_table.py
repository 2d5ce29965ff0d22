"""metrics.csv: one row for each logged step or evaluation, written immediately. A resumed run continues the file."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from detdistill.errors import RunError

FIRST = ("stage", "step", "total", "epoch", "lr", "seconds", "loss")


class MetricsTable:
    """A CSV file to which new names add columns."""

    def __init__(self, path: Path, keep: Callable[[str, int], bool] | None = None) -> None:
        """Open for appending.

        Args:
            path: the file; created if missing.
            keep: for a resumed run: whether to keep the row of a given stage and step. Other rows, and columns that only they
                fill, are removed, because the resumed run logs them again. None: start an empty table.

        Raises:
            RunError: the file cannot be written.
        """
        self.path = path
        self.columns: list[str] = list(FIRST)
        rows: list[dict[str, str]] = []
        if path.exists() and keep is not None:
            rows = [row for row in read_rows(path) if keep(row["stage"], int(row["step"]))]
            used = {name for row in rows for name, value in row.items() if value}
            self.columns += [name for name in (rows[0] if rows else ()) if name in used and name not in FIRST]
            rows = [{name: row[name] for name in self.columns} for row in rows]
        try:
            self._rewrite(rows)
        except OSError as error:
            raise self._failure(error) from error

    def add(self, values: Mapping[str, float | int | str]) -> None:
        """Append a row; unknown columns are added to the file.

        Raises:
            RunError: the disk is full or not writable.
        """
        new = [name for name in values if name not in self.columns]
        try:
            if new:
                rows = read_rows(self.path)
                self.columns += new
                self._rewrite(rows)
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow({name: _short(value) for name, value in values.items()})
        except OSError as error:
            raise self._failure(error) from error

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        temporary = self.path.with_suffix(".tmp")
        try:
            with temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(rows)
            os.replace(temporary, self.path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _failure(self, error: OSError) -> RunError:
        return RunError(f"cannot write {self.path}: {error.strerror}; make space and continue with --resume true")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read all complete rows; a last line that is still being written, or was cut off by a crash, is left out."""
    with path.open(newline="") as file:
        text = file.read()
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def idle_terms(rows: Iterable[Mapping[str, str | float]]) -> tuple[str, ...]:
    """Loss terms with a zero share of the student's gradient in all measurements, of which there must be two or more."""
    measured: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("share/") and value != "":
                measured.setdefault(name.removeprefix("share/"), []).append(float(value))
    return tuple(name for name, shares in measured.items() if len(shares) > 1 and not any(shares))


def _short(value: float | int | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
