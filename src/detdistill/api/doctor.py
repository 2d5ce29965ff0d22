"""The check-up of a planned run, before it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from detdistill.api.shared import device_of, known_image_settings, load_splits, not_these_digits, settings_of
from detdistill.errors import DetdistillError, RunError
from detdistill.settings import DistillSettings

if TYPE_CHECKING:
    from detdistill.api.shared import Model
    from detdistill.data.records import DataSplits
    from detdistill.detectors.contract import Detector
    from detdistill.doctor.findings import Diagnosis
    from detdistill.progress import Progress

IMAGES, STEPS = 100, 15
"""Default numbers of validation images for the teacher's AP, and of steps of each trial."""


def doctor(
    teacher: Model | None,
    student: str | Detector | Callable[[], Detector],
    data: str = "digits",
    method: str = "pkd",
    *,
    images: int = IMAGES,
    probe_steps: int = STEPS,
    progress: Progress | None = None,
    **settings: Any,
) -> Diagnosis:
    """Check data, teacher, pair, method and settings of a distillation before it starts, in minutes on a CPU.

    Nothing is written. The arguments are those of ``distill``; further settings as of the run that is planned.

    Args:
        teacher: see ``distill``.
        student: see ``distill``.
        data: see ``train``.
        method: see ``distill``.
        images: largest number of validation images on which the teacher is scored.
        probe_steps: steps of each of the four short trainings (one batch and different batches, alone and distilled).
        progress: display of the progress; None: a new one on stderr.
        settings: fields of ``DistillSettings``.

    Returns:
        The findings, each with a level, and the numbers behind them; data, teachers and pairs that cannot be used are findings.

    Raises:
        RunError: a setting or argument is wrong.
    """
    wanted = settings_of(DistillSettings, {"method": method, **settings})
    for name, value in (("images", images), ("probe_steps", probe_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RunError(f"{name}: {value!r} is not a whole number, 1 or more")
    from detdistill.api.teachers import one_teacher
    from detdistill.doctor.case import Case
    from detdistill.doctor.examine import examine
    from detdistill.doctor.findings import Diagnosis, Finding
    from detdistill.given import student_of
    from detdistill.methods.shared.compose import parse_methods
    from detdistill.processes import is_main_process
    from detdistill.progress import Progress
    from detdistill.training.plan import Plan

    if wanted.threads:
        import torch

        torch.set_num_threads(wanted.threads)
    parse_methods(wanted.method)  # a misspelt method is a mistake of the call, no finding
    teacher_name, source = one_teacher(teacher, wanted.method, "doctor")
    student_name, build = student_of(student)
    plan = Plan(student_name, data, wanted, role="distilled", teacher=teacher_name, title="doctor", build=build)
    device = device_of(wanted.device)
    with progress or Progress(quiet=not is_main_process()) as shown:
        check = "data"
        try:
            splits = load_splits(data, wanted.strict, shown, wanted.rescan, wanted.held_out)
            check = "teacher"
            with not_these_digits(data):
                live = None if source is None else _loaded(source, splits)
            check = "cache" if wanted.served is None else "served teacher"
            knowledge = _opened(wanted, splits, live, shown)
        except DetdistillError as error:
            finding = Finding("stop", check, str(error).rstrip("."))
            return Diagnosis(f"{wanted.method}: teacher {teacher_name}, student {student_name}, data {data}", (finding,))
        given = {name: getattr(wanted, name) for name in ("size", "resize", "max_size")}
        known = {} if source is None else known_image_settings(source, shown, given)
        return examine(Case(plan, splits, live, knowledge, known, device, images, probe_steps, shown))


def _loaded(source: str | Detector, splits: DataSplits) -> Any:
    """The teacher, also if it lacks classes of the data: that is a finding."""
    from detdistill.api.teachers import load_teacher
    from detdistill.detectors.contract import Teacher

    return Teacher(load_teacher(source, splits, True)).fold_norms()


def _opened(settings: DistillSettings, splits: DataSplits, live: Any, shown: Progress) -> Any:
    from detdistill.training.from_cache import open_knowledge

    return open_knowledge(settings, splits, live, shown.say)
