"""Evaluation of the teacher before a student is trained; the scores are added to the summaries of the runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from detdistill.data.records import DataSplits
from detdistill.detectors.contract import Teacher
from detdistill.evaluation import Scores, evaluate
from detdistill.evaluation.scores import points
from detdistill.progress import Progress
from detdistill.settings import TrainSettings
from detdistill.training.folder import RunFolder
from detdistill.training.origin import note_in_card
from detdistill.training.plan import view_settings

NEAR_ZERO_AP = 0.02


def score_teacher(teacher: Teacher, splits: DataSplits, settings: TrainSettings, progress: Progress) -> Scores | None:
    """Evaluate the teacher on the validation images, and warn if its AP is below ``NEAR_ZERO_AP``.

    Returns:
        Its scores; None if it lacks classes of the data.
    """
    unknown = [name for name in splits.val.classes if name not in teacher.spec.classes]
    if unknown:
        progress.say(f"teacher {teacher.spec.name} does not know {', '.join(unknown[:5])}: it is not scored", "yellow")
        return None
    bar = progress.bar("score the teacher", len(splits.val.records))
    device = "cuda" if torch.cuda.is_available() and settings.device != "cpu" else "cpu"
    scores = evaluate(
        teacher.detector,
        splits.val,
        view_settings(settings),
        batch_size=settings.batch,
        device=device,
        progress=bar.follow,
        errors=True,
    )
    ap = scores.metrics["AP"]
    bar.say(f"AP {points(ap)}  AP50 {points(scores.metrics['AP50'])} on {scores.images} images")
    if 0 <= ap < NEAR_ZERO_AP:
        progress.say(
            f"WARNING: the teacher's AP is {100 * ap:.2f} of 100 on {splits.val.root}, so a student can learn next to "
            f"nothing from it; check its weights, its classes and --size",
            "bold red",
        )
    return scores


def note_teacher(folder: Path, scores: Scores) -> None:
    """Add the teacher's scores to ``summary.json`` of a finished run."""
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"teacher_metrics": scores.metrics, "teacher_per_class": scores.per_class, "teacher_errors": scores.errors}
    RunFolder(folder).write_json("summary.json", summary)
    note_in_card(folder, teacher_ap=scores.metrics["AP"])
