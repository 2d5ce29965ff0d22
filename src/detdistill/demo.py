"""The built-in example: digits on photographs, a teacher, a student trained with and without it, comparison and report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detdistill.errors import RunError
from detdistill.settings import DistillSettings, TrainSettings

if TYPE_CHECKING:
    from detdistill.api import Distilled
    from detdistill.progress import Progress

TEACHER = "fcos:resnet10t,channels=32-64-128-256,neck=64,levels=3-5,convs=2"
STUDENT = "fcos:resnet10t,channels=16-32-64-128,stem=16,neck=64,levels=3-5,convs=2"
"""A third of the teacher's parameters, less than half of its multiply-adds."""

SETTINGS: dict[str, Any] = {
    "batch": 8,
    "size": 128,
    "flip": 0.0,
    "lr": 3e-3,
    "weight_decay": 0.01,
    "schedule": "one_cycle",
    "precision": "bf16",  # 32 where the CPU has no instructions for it; see ``settings``
    "channels_last": True,
    "in_memory": True,
    "device": "cpu",
}
"""Settings of teacher and students: the fastest that were found on two CPU cores. Digits are not flipped."""


def settings() -> dict[str, Any]:
    """``SETTINGS`` for this machine: a CPU without instructions for bf16 takes about ten times as long for it as for float32."""
    from detdistill.training.machine import has_bf16

    return SETTINGS if has_bf16() else {**SETTINGS, "precision": "32"}


def demo(
    out: Path | None = None,
    seeds: Sequence[int] = (0,),
    method: str = "pkd",
    train_images: int = 2000,
    val_images: int = 400,
    teacher_epochs: int = 5,
    epochs: int = 3,
) -> Distilled:
    """Run the example and print its table of gains.

    Args:
        out: folder to create; None: a new one under ``runs/``.
        seeds: seeds of the students; a proof of the gain needs several.
        method: one method or several joined by ``+``.
        train_images: number of generated training images.
        val_images: number of generated validation images.
        teacher_epochs: epochs of the teacher.
        epochs: epochs of the students, baseline and distilled alike.

    Returns:
        Folders, report and gains of the students.

    Raises:
        DetdistillError: one line that says what is wrong and what to do.
    """
    from detdistill import printing
    from detdistill.progress import Progress
    from detdistill.training.folder import new_folder

    _check(seeds, method, train_images, val_images, teacher_epochs, epochs)
    console = printing.stdout()
    folder = new_folder(out, "demo")
    data = f"digits:train={train_images},val={val_images},size=128,seed=0"
    printing.paragraph(console, "detdistill demo: real handwritten digits on real photographs, 128 pixels, made on this machine")
    with Progress() as progress:
        progress.say("loading torch, torchvision and lightning (some seconds) ...")
        from detdistill import api
        from detdistill.compare import show_gains
        from detdistill.methods.shared.compose import parse_methods

        parse_methods(method)
        _make_images(progress, train_images, val_images)
        progress.say("training the teacher, then the student with it and without it")
        teacher, common = folder / "teacher", settings()
        length = {"epochs": teacher_epochs, "evaluate_every": 2}
        api.train(TEACHER, data, role="teacher", out=teacher, progress=progress, report=False, **length, **common)
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
            **common,
        )
        bar = progress.bar("write the report", 1)
        page = api.report([teacher, *result.runs], out=folder / "report.html")
        bar.update(1)
    show_gains(result.gains)
    _show_next_steps(result, page, method, epochs, one_seed=len(seeds) == 1)
    return result


def _check(seeds: Sequence[int], method: str, train_images: int, val_images: int, teacher_epochs: int, epochs: int) -> None:
    """Report wrong settings before anything is trained."""
    TrainSettings(epochs=teacher_epochs)
    DistillSettings(epochs=epochs, seeds=tuple(seeds), method=method)
    for name, count in (("train_images", train_images), ("val_images", val_images)):
        if count < 1:
            raise RunError(f"{name}: {count} is too small; it must be 1 or more")


def _make_images(progress: Progress, train: int, val: int) -> None:
    from detdistill.data.digits import digits_folder

    bar = progress.bar("make the images", train + val)
    digits_folder(train=train, val=val, size=128, seed=0, progress=bar.follow)
    bar.update(bar.total)  # images of an earlier demo are not made again, and nothing was followed


def _show_next_steps(result: Distilled, page: Path, method: str, epochs: int, one_seed: bool) -> None:
    """Print how far the gain can be trusted, where the results are, and the commands for the user's own data."""
    from detdistill import printing

    console = printing.stdout()
    printing.line(console)
    printing.paragraph(
        console,
        f"Both students had only {epochs} epochs from random weights, so a large part of the gain is faster convergence. With "
        "longer training the baseline catches up in part; the report draws both curves.",
    )
    printing.line(console)
    printing.labelled(console, "report:", str(page))
    printing.labelled(console, "student (loads without detdistill):", str(result.runs[-1] / "student"))
    printing.line(console)
    if one_seed:
        printing.labelled(console, "a verdict needs several seeds:", "detdistill demo --seeds 0,1,2")
    printing.line(console, "with your own data (a COCO, YOLO or VOC folder) and your own teacher:")
    printing.line(console, f"  detdistill train --role teacher --model {TEACHER.split(',')[0]} --data DATA --out teacher")
    printing.line(console, f"  detdistill distill --teacher teacher --student {STUDENT.split(',')[0]},width=0.5 \\")
    printing.line(console, f"      --data DATA --method {method} --baseline --seeds 0,1,2")
