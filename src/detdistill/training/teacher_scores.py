"""Evaluation of the teacher before a student is trained; the scores are added to the summaries of the runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from detdistill.data.records import DataSplits
from detdistill.detectors.contract import Teacher
from detdistill.evaluation import Scores, evaluate
from detdistill.evaluation.scores import points
from detdistill.kept import keep, read_kept, software
from detdistill.progress import Progress
from detdistill.settings import TrainSettings
from detdistill.training.folder import RunFolder
from detdistill.training.origin import note_in_card
from detdistill.training.plan import view_settings

NEAR_ZERO_AP = 0.02


def score_teacher(
    teacher: Teacher, splits: DataSplits, settings: TrainSettings, progress: Progress, source: str | None = None
) -> Scores | None:
    """Evaluate the teacher on the validation images, and warn if its AP is below ``NEAR_ZERO_AP``.

    The scores of a teacher with a ``source`` are kept in the user's cache folder for later runs with the same teacher, images,
    image settings and software (``_key``).

    Args:
        teacher: the teacher.
        splits: the data.
        settings: settings of the run.
        progress: display.
        source: path or model string of the teacher; None: it was given in Python, where its code may change without its weights.

    Returns:
        Its scores; None if it lacks classes of the data, or has none.
    """
    if not teacher.spec.classes:
        progress.say(f"teacher {teacher.spec.name} has no classes: it teaches by its feature maps and is not scored")
        return None
    unknown = [name for name in splits.val.classes if name not in teacher.spec.classes]
    if unknown:
        progress.say(f"teacher {teacher.spec.name} does not know {', '.join(unknown[:5])}: it is not scored", "yellow")
        return None
    device = "cuda" if torch.cuda.is_available() and settings.device != "cpu" else "cpu"
    key = "" if source is None else _key(teacher, splits, settings, device)
    scores = None if source is None else _kept(key)
    bar = progress.bar("score the teacher", len(splits.val.records))
    if scores is not None:
        bar.follow(scores.images, scores.images)
        return _told(scores, splits, bar, progress, ", known from an earlier run")
    scores = evaluate(
        teacher.detector,
        splits.val,
        view_settings(settings).of_teacher,
        batch_size=settings.batch,
        device=device,
        progress=bar.follow,
        errors=True,
    )
    if source is not None:
        keep(_name(key), key, asdict(scores))
    return _told(scores, splits, bar, progress)


def _key(teacher: Teacher, splits: DataSplits, settings: TrainSettings, device: str) -> str:
    """Everything the scores depend on: weights, options and code of the teacher, images and boxes, image settings, device."""
    views = asdict(view_settings(settings).of_teacher)
    about = {
        "teacher": teacher.fingerprint,
        "model": [teacher.spec.name, getattr(teacher.detector, "description", None)],
        "data": splits.val.fingerprint,
        "views": views,
        "batch": settings.batch,
        "device": device,
        "software": software(),
    }
    return json.dumps(about, sort_keys=True, default=str)


def _name(key: str) -> str:
    return f"teacher-scores/{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def _kept(key: str) -> Scores | None:
    kept: Any = read_kept(_name(key), key)
    try:
        return None if kept is None else Scores(**kept)
    except TypeError:  # of another form
        return None


def _told(scores: Scores, splits: DataSplits, bar: Any, progress: Progress, how: str = "") -> Scores:
    """Print the scores, and a warning if they are near zero."""
    ap = scores.metrics["AP"]
    bar.say(f"AP {points(ap)}  AP50 {points(scores.metrics['AP50'])} on {scores.images} images{how}")
    if 0 <= ap < NEAR_ZERO_AP:
        progress.say(
            f"WARNING: the teacher's AP is {100 * ap:.2f} of 100 on {splits.val.root}, so a student can learn next to "
            f"nothing from it; check its weights, its classes and --size",
            "bold red",
        )
    return scores


def scores_of_all(scores: Mapping[str, Scores], classes: Sequence[str]) -> Scores | None:
    """The scores of the only teacher, if it knows all classes; None of several teachers, and of one that knows some."""
    (only,) = scores.values() if len(scores) == 1 else (None,)
    return only if only is not None and set(classes) <= only.per_class.keys() else None


def note_teachers(folder: Path, scores: Mapping[str, Scores]) -> None:
    """Add the teachers' scores to ``summary.json`` of a finished run.

    ``teacher_metrics`` and ``teacher_errors`` are those of a teacher of all classes. ``teacher_per_class`` has for each class the
    AP of the best teacher. ``teachers`` has the scores of each, if there are several or if a teacher knows some classes only.
    """
    summary = json.loads((folder / "summary.json").read_text())
    only = scores_of_all(scores, summary["data"]["classes"])
    best: dict[str, float] = {}
    for one in scores.values():
        best |= {name: max(ap, best.get(name, -1.0)) for name, ap in one.per_class.items()}
    summary |= {"teacher_per_class": best}
    if only is None:
        summary["teachers"] = {
            name or "teacher": {"metrics": one.metrics, "per_class": one.per_class} for name, one in scores.items()
        }
    else:
        summary |= {"teacher_metrics": only.metrics, "teacher_errors": only.errors}
    RunFolder(folder).write_json("summary.json", summary)
    if only is not None:
        note_in_card(folder, teacher_ap=only.metrics["AP"])
