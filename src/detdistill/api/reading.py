"""Reading what is there: comparisons and reports of finished runs, and data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detdistill.api.shared import write

if TYPE_CHECKING:
    from detdistill.compare import Gain
    from detdistill.data.inspect import DataReport


def compare(
    runs: Sequence[Path | str], *, metric: str = "AP", allow_unequal: bool = False, out: Path | None = None
) -> list[Gain]:
    """Pair baselines and distilled runs by seed, and compute mean gain, 95 % interval and verdict.

    Args:
        runs: run folders, or folders that contain them.
        metric: one of the 12 COCO numbers.
        allow_unequal: compare runs whose budgets differ.
        out: also write the result to this JSON file.

    Raises:
        RunError: the metric is unknown, no runs can be paired, or the budgets differ.
    """
    import json

    from detdistill.compare import compare_runs, gains_json

    gains = compare_runs(runs, metric=metric, allow_unequal=allow_unequal)
    if out is not None:
        write(out, json.dumps(gains_json(gains), indent=2) + "\n")
    return gains


def report(runs: Sequence[Path | str], *, out: Path | None = None) -> Path:
    """Write one self-contained HTML page about runs.

    Args:
        runs: run folders, or folders that contain them.
        out: path of the page; None: ``report.html`` in the first folder.

    Returns:
        Path of the page.

    Raises:
        RunError: the folders contain no finished run.
    """
    from detdistill.compare import expand
    from detdistill.report.page import build_report

    page = out if out is not None else Path(runs[0]) / "report.html"
    return build_report(expand(runs), page)


def inspect_data(data: str, *, strict: bool = False, deep: bool = False) -> DataReport:
    """Report counts, sizes, class balance and every defect of a data set.

    Args:
        data: see ``train``.
        strict: raise an error at the first defect instead of reporting it.
        deep: decode every image.

    Raises:
        DataError: the data cannot be read, or have a defect and ``strict`` is given.
    """
    from detdistill.data.inspect import inspect_data as inspect

    return inspect(data, strict=strict, deep=deep)
