"""A distillation at several lengths of training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from detdistill.api.reading import report
from detdistill.api.shared import settings_of, write
from detdistill.api.training import distill_each
from detdistill.settings import DistillSettings

if TYPE_CHECKING:
    from detdistill.api.shared import Model
    from detdistill.detectors.contract import Detector
    from detdistill.progress import Progress
    from detdistill.schedules import Schedules


def schedules(
    teacher: Model | None,
    student: str | Detector | Callable[[], Detector],
    data: str = "digits",
    method: str = "pkd",
    *,
    at: Sequence[float] = (1, 3),
    progress: Progress | None = None,
    **settings: Any,
) -> Schedules:
    """Distil at several lengths of training, each with its baselines: is the student better, or only trained faster?

    Args:
        teacher: see ``distill``.
        student: see ``distill``.
        data: see ``train``.
        method: see ``distill``.
        at: the lengths, as multiples of ``epochs`` (or of ``steps``), two or more.
        progress: display of the progress; None: a new one on stderr.
        settings: fields of ``DistillSettings``; ``baseline`` is always on. ``out`` is the folder for all runs, with a folder
            for each length (``1x``, ``3x``); with ``resume``, finished runs are kept. With ``jobs`` or on Ray, the runs of all
            lengths take place together.

    Returns:
        The gain at each length with its interval, and over a baseline of equal time. They are also in ``schedules.json``.

    Raises:
        DetdistillError: one line that says what is wrong and what to do.
    """
    wanted = settings_of(DistillSettings, {"method": method, **settings, "baseline": True})
    from detdistill.progress import Progress
    from detdistill.schedules import Schedules, check_factors, over_schedules, schedules_json
    from detdistill.training.folder import new_folder

    unit, length = ("epochs", wanted.epochs) if wanted.steps is None else ("steps", wanted.steps)
    lengths = check_factors(at, length, unit)
    folder = wanted.out if wanted.resume and wanted.out is not None else new_folder(wanted.out, "schedules")
    with progress or Progress() as shown:
        shown.say(f"lengths: {', '.join(f'{factor:g}x is {count} {unit}' for factor, count in lengths)}")
        variants = {}
        for place, (factor, count) in enumerate(lengths):
            mine = folder / f"{factor:g}x"
            own = {"baseline": True, "report": False, "out": mine, "resume": wanted.resume and mine.exists(), unit: count}
            # The teacher is the same at each length.
            score = wanted.score_teacher and place == 0
            variants[f"{factor:g}x"] = {"method": method, **settings, **own, "score_teacher": score}
        done = distill_each(teacher, student, data, variants, progress=shown)
        runs = {factor: done[f"{factor:g}x"].runs for factor, _ in lengths}
        page = folder / "report.html"
        if wanted.report:
            report([one for some in runs.values() for one in some], out=page)
    result = Schedules(folder, over_schedules(runs), page)
    write(folder / "schedules.json", json.dumps(schedules_json(result), indent=2) + "\n")
    return result
