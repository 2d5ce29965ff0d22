"""Reading what is there: comparisons and reports of finished runs, and data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detdistill.api.shared import local_only, write
from detdistill.errors import RunError

if TYPE_CHECKING:
    from detdistill.compare import Gain
    from detdistill.data.inspect import DataReport
    from detdistill.export.as_run import Measured
    from detdistill.results import Distilled
    from detdistill.training.run import Run

    RunLike = Path | str | Run | Distilled


def compare(
    runs: RunLike | Sequence[RunLike],
    *,
    metric: str = "AP",
    allow_unequal: bool = False,
    data: str | None = None,
    out: Path | None = None,
) -> list[Gain]:
    """Pair baselines and distilled runs by seed, and compute mean gain, 95 % interval and verdict.

    Args:
        runs: run folders, folders that contain them (also at URLs), results of ``train`` or ``distill``, or exported files of
            runs (``model.onnx``); one or several.
        metric: one of the 12 COCO numbers.
        allow_unequal: compare runs whose budgets differ.
        data: evaluate exported files on the val split of these data; None: their scores are those in ``export.json`` beside them.
        out: also write the result to this JSON file.

    Raises:
        RunError: the metric is unknown, no runs can be paired, a file has no partner, or the budgets differ.
    """
    import json

    from detdistill.compare import compare_runs, gains_json
    from detdistill.given import run_folders

    local_only(out)
    folders = run_folders(runs)
    measured = None if data is None else _measured(folders, data)
    gains = compare_runs(folders, metric=metric, allow_unequal=allow_unequal, measured=measured)
    if out is not None:
        write(out, json.dumps(gains_json(gains), indent=2) + "\n")
    return gains


def _measured(runs: Sequence[Path | str], data: str) -> dict[Path, Measured]:
    """Scores of the exported files among ``runs``.

    Raises:
        RunError: there is no file among them.
    """
    from detdistill.api.models import evaluate
    from detdistill.data.discover import load_split
    from detdistill.export.as_run import Measured
    from detdistill.export.formats import is_file

    files = [path for path in dict.fromkeys(map(Path, runs)) if is_file(path)]
    if not files:
        raise RunError("data: only exported files are evaluated, and none is given; leave out --data")
    images, _ = load_split(data, "val")
    return {path: Measured(evaluate(str(path), data).metrics, images.fingerprint) for path in files}


def report(runs: RunLike | Sequence[RunLike], *, out: Path | str | None = None) -> Path:
    """Write one self-contained HTML page about runs.

    Args:
        runs: run folders, folders that contain them (also at URLs), or results of ``train`` or ``distill``; one or several.
        out: path of the page; None: ``report.html`` in the first folder, or in that of the first result.

    Returns:
        Path of the page.

    Raises:
        RunError: the folders contain no finished run.
    """
    from detdistill.compare import expand
    from detdistill.given import run_folders
    from detdistill.report.page import build_report

    first = runs[0] if isinstance(runs, list | tuple) and runs else runs
    if out is None and isinstance(first, str | Path):
        out = Path(first) / "report.html"
    local_only(out, "the page is written to the local disk;")
    folders = run_folders(runs)
    return build_report(expand(folders), Path(out if out is not None else Path(getattr(first, "folder", "")) / "report.html"))


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
