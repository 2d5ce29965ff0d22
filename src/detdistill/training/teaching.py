"""Building the methods that teach without a run around them: for caches, and for served teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from detdistill.cache.fill import Lecture
from detdistill.cache.forecast import stranger
from detdistill.cache.knowledge import About
from detdistill.cache.storage import CacheError
from detdistill.data.records import DataSplits
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Detector, DetectorSpec, HasQueries, Teacher
from detdistill.jobs.where import LOCAL
from detdistill.methods.shared.compose import build_method
from detdistill.methods.shared.contract import Method, Stage, teach_by_canvas
from detdistill.methods.shared.needs import PairError
from detdistill.settings import DistillSettings, TrainSettings
from detdistill.training.plan import Plan
from detdistill.training.session import Session


def learner_of(frozen: Teacher, student: str | None, classes: tuple[str, ...], method: str) -> tuple[Detector, Method[Any]]:
    """A student for methods that need one to be built, and the methods.

    Args:
        frozen: the teacher.
        student: model string; None: an untrained detector of the teacher's architecture.
        classes: names of the student's classes.
        method: the methods, as text.

    Raises:
        CacheError: the teacher has other classes than the student, whose model string is missing.
        PairError: the methods cannot be used with this teacher (and student).
    """
    if student is not None:
        learner = build_detector(student, classes)
        return learner, build_method(method, frozen, learner)
    if frozen.spec.classes != classes:
        has = "has other classes than the students" if frozen.spec.classes else "has no classes"
        raise CacheError(f"teacher {frozen.spec.name} {has}; give the student of the runs (--student)")
    learner = stranger(frozen.detector)
    try:
        return learner, build_method(method, frozen, learner)
    except PairError as error:
        raise PairError(f"{error} (tried with a student of the teacher's architecture; give --student)") from error


def stages_session(
    name: str,
    teacher: Teacher,
    data: tuple[str, DataSplits],
    student: str | None,
    settings: TrainSettings,
    learner: Detector,
    method: Method[Any],
) -> Session:
    """The session that trains the earlier stages of the method, on which its knowledge depends."""
    common = {field.name: getattr(settings, field.name) for field in fields(settings) if hasattr(DistillSettings, field.name)}
    alone = {"out": None, "resume": False, "report": False, "track": (), "devices": 1, "nodes": 1, "on": LOCAL}
    if common.get("on", LOCAL) != LOCAL:
        alone["device"] = "auto"  # it is trained on this machine, which may have no GPU
    run_settings = DistillSettings(**{**common, **alone})
    plan = Plan(student or name, data[0], run_settings, role="stage", teacher=name, title="earlier stage")
    return Session(plan, data[1], learner, method, {"": teacher}, None, teach_by_canvas, None)


def about_teacher(
    name: str, teacher: Teacher, student: str | None, method: str, lecture: Lecture, stages: Sequence[Stage]
) -> About:
    """A description of a teacher and its knowledge in float32, as yet of no data, no views and no records.

    Args:
        name: model string or path of the teacher.
        teacher: the teacher.
        student: model string, as for ``learner_of``.
        method: the methods, as text.
        lecture: the methods.
        stages: their earlier stages, on which the knowledge depends.
    """
    return About(
        teacher=name,
        teacher_fingerprint=teacher.fingerprint,
        teacher_parameters=teacher.detector.count_parameters(),
        spec=_described(teacher),
        method=method,
        student=student,
        knowledge=tuple(lecture.knowledge),
        stages=tuple(stage.depends_on for stage in stages),
        data="",
        data_fingerprint="",
        views={},
        store="float32",
        precision=lecture.precision,
        records=0,
    )


def _described(teacher: Teacher) -> DetectorSpec:
    """The teacher's spec with the format of its queries, which runs without the teacher need."""
    if not isinstance(teacher.detector, HasQueries):
        return teacher.spec
    return replace(teacher.spec, queries=teacher.queries)
