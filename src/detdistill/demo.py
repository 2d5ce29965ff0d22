"""The embedded example: digits on photographs, a teacher, a student with and without it, the comparison, the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detdistill.errors import RunError
from detdistill.settings import DistillSettings, TrainSettings

if TYPE_CHECKING:
    from detdistill.api import Distilled

TEACHER = "fcos:resnet10t,channels=32-64-128-256,neck=64,levels=3-5,convs=2"
STUDENT = "fcos:resnet10t,channels=16-32-64-128,stem=16,neck=64,levels=3-5,convs=2"
"""A third of the teacher's parameters, less than half of its arithmetic."""

SETTINGS: dict[str, Any] = {
    "batch": 8,
    "size": 128,
    "flip": 0.0,
    "lr": 3e-3,
    "weight_decay": 0.01,
    "schedule": "one_cycle",
    "precision": "bf16",
    "channels_last": True,
    "in_memory": True,
    "device": "cpu",
}
"""Digits are not mirrored; the rest is what learned fastest on two cores."""


def demo(
    out: Path | None = None,
    seeds: Sequence[int] = (0,),
    method: str = "pkd",
    train_images: int = 2000,
    val_images: int = 400,
    teacher_epochs: int = 5,
    epochs: int = 3,
) -> Distilled:
    """Run the example and print its table.

    Args:
        out: a new folder; None: one under ``runs/``.
        seeds: of the students; three make a proof.
        method: what to distil with.
        train_images: size of the generated training set.
        val_images: size of the generated validation set.
        teacher_epochs: length of the teacher's training.
        epochs: length of the students' training, the same for both.

    Raises:
        DetdistillError: one line that says what is wrong and what to do.
    """
    from detdistill import printing
    from detdistill.progress import Progress
    from detdistill.training.folder import new_folder

    # What cannot work is said before anything is trained.
    TrainSettings(epochs=teacher_epochs)
    DistillSettings(epochs=epochs, seeds=tuple(seeds), method=method)
    for name, count in (("train_images", train_images), ("val_images", val_images)):
        if count < 1:
            raise RunError(f"{name}: {count} is too small; it must be 1 or more")
    console = printing.stdout()
    folder = new_folder(out, "demo")
    data = f"digits:train={train_images},val={val_images},size=128,seed=0"
    printing.paragraph(console, "detdistill demo: real handwritten digits on real photographs, 128 pixels, made on this machine")
    with Progress() as progress:
        progress.say("loading torch, torchvision and lightning (some seconds) ...")
        from detdistill import api
        from detdistill.compare import show_gains
        from detdistill.data.digits import digits_folder
        from detdistill.methods.shared.compose import parse_methods

        parse_methods(method)
        bar = progress.bar("make the images", train_images + val_images)
        digits_folder(train=train_images, val=val_images, size=128, seed=0, progress=bar.follow)
        teacher = folder / "teacher"
        length = {"epochs": teacher_epochs, "evaluate_every": 2}
        api.train(TEACHER, data, role="teacher", out=teacher, progress=progress, report=False, **length, **SETTINGS)
        result = api.distill(
            str(teacher),
            STUDENT,
            data,
            method,
            out=folder / "students",
            epochs=epochs,
            baseline=True,
            seeds=tuple(seeds),
            jobs=2,
            report=False,
            progress=progress,
            **SETTINGS,
        )
        bar = progress.bar("write the report", 1)
        page = api.report([teacher, *result.runs], out=folder / "report.html")
        bar.update(1)
    show_gains(result.gains)
    printing.line(console)
    printing.paragraph(
        console,
        f"Much of what so short a training shows is faster convergence: both students had {epochs} epochs from random weights, "
        "and the teacher's maps show the way. With longer training the baseline catches up in part (the report draws both "
        "curves); what remains then is what the teacher knows and the student could not find alone.",
    )
    printing.line(console)
    printing.labelled(console, "report:", str(page))
    printing.labelled(console, "student, which loads without detdistill:", str(result.runs[-1] / "student"))
    return result
