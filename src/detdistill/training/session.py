"""Student, method, teacher and data of a run, built once and checked before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from detdistill.cache.knowledge import KnowledgeSource
from detdistill.data.records import DataSplits
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Detector, Teacher
from detdistill.detectors.inherit import Inherited, inherit_head, start_from
from detdistill.detectors.load import load_detector
from detdistill.errors import RunError
from detdistill.evaluation.instability import check_queries
from detdistill.methods.shared.catalogue import split_turns
from detdistill.methods.shared.compose import build_method
from detdistill.methods.shared.contract import Method, Source, teach_by_canvas
from detdistill.progress import Progress
from detdistill.settings import DistillSettings
from detdistill.training.kept_runs import kept_copy
from detdistill.training.machine import check_machine, seed_everything
from detdistill.training.own_models import check_own_student
from detdistill.training.plan import Plan
from detdistill.training.self_teacher import OwnAverage
from detdistill.training.unlabelled import Unlabelled

Given = Mapping[str, Teacher | OwnAverage]
"""Teachers by name; a single one may have an empty name."""


@dataclass(frozen=True)
class Session:
    """A plan with its data, its student and its method, for one run."""

    plan: Plan
    splits: DataSplits
    student: Detector
    method: Method[Any] | None
    """None: the student trains alone."""
    teachers: Given
    """The loaded teachers, or the teacher's description from the cache or the server; empty: the run has no teacher."""
    cache: KnowledgeSource | None
    """The cache or served teacher from which the run learns; None: it learns from a teacher in its own process."""
    source: Source
    """Gives the method's knowledge about a batch, from the teacher, the cache or the server."""
    inherited: Inherited | None
    """Tensors copied from the teacher's neck and head into the student; None: without ``inherit``."""
    started: Start | None = None
    """Weights that the student started from; None: without ``init``."""
    unlabelled: Unlabelled | None = None
    """Adds what the teachers know and the labels lack to the batches; None: all classes are labelled, or it is left out."""

    @property
    def fixed_teachers(self) -> dict[str, Teacher]:
        """The teachers that do not change during the run."""
        return {name: one for name, one in self.teachers.items() if isinstance(one, Teacher)}


@dataclass(frozen=True)
class Start:
    """The weights that a student started from (``init``)."""

    fingerprint: str
    """Of the detector whose weights they are, as ``Teacher.fingerprint``."""
    taken: int
    """Number of the student's tensors that hold its values."""
    total: int
    """Number of the student's tensors."""


def open_session(
    plan: Plan,
    splits: DataSplits,
    teachers: Teacher | Given | None = None,
    cache: KnowledgeSource | None = None,
    progress: Progress | None = None,
) -> Session:
    """Build student and method of a run from the plan's seed.

    Args:
        plan: plan of the run.
        splits: the loaded data of ``plan.data``.
        teachers: the loaded teacher of a distilled run, or several by name; None for methods without a teacher, and with a
            cache, unless the method or ``inherit`` needs the teacher itself.
        cache: the opened cache or served teacher of ``plan.settings``; without ``teachers``, its description of the teacher is
            used.
        progress: display of the number of inherited tensors; None: not shown.

    Raises:
        RunError: this machine cannot do what the settings require, or no tensor of the teacher (``inherit``) or of ``init`` fits.
        PairError: teacher, student and method cannot be used together.
        ModelError: the student cannot be built.
    """
    settings, distilling = plan.settings, plan.distilling
    check_machine(settings)
    seed_everything(settings.seed)
    student = build_detector(plan.student, splits.train.classes) if plan.build is None else plan.build()
    if plan.build is not None:
        check_own_student(student, splits.train.classes, averaged=settings.ema > 0)
    if settings.instability:
        check_queries(student)
    started = None if settings.init is None else _start(student, settings.init, progress)
    if distilling is None:
        return Session(plan, splits, student, None, {}, None, teach_by_canvas, None, started)
    if not teachers:
        teachers = None if cache is None else cache.teacher()
    given: Given = {} if teachers is None else {"": teachers} if isinstance(teachers, Teacher) else teachers
    inherited = _inherit(student, given, progress) if distilling.inherit else None
    _check_turns(distilling)
    built = {name: one.of(student) if isinstance(one, OwnAverage) else one for name, one in given.items()}
    only = built.get("") if len(built) <= 1 else None  # one without a name
    method = build_method(distilling.method, only or built or None, student)
    source = teach_by_canvas if cache is None else cache.source(distilling.method, method)
    unlabelled = Unlabelled.of(method, student, splits.train, distilling, cache is not None)
    if unlabelled is not None and progress is not None:
        progress.say(f"teachers' boxes of classes that an image is not labelled for: {unlabelled.in_words()}", "dim")
    return Session(plan, splits, student, method, given, cache, source, inherited, started, unlabelled)


def _inherit(student: Detector, teachers: Given, progress: Progress | None) -> Inherited:
    """Copy neck and head of the only teacher into the student.

    Raises:
        RunError: there is no such teacher, or nothing of it fits.
    """
    (teacher,) = teachers.values() if len(teachers) == 1 else (None,)
    if not isinstance(teacher, Teacher):
        why = "it copies from one teacher" if teachers else "it copies weights of the teacher"
        raise RunError(f"inherit: {why}, and there is none to copy from; leave out --inherit, or start from weights by --init")
    inherited = inherit_head(student, teacher.detector)
    if not inherited.copied:
        raise RunError(f"inherit: nothing of {teacher.spec.name} fits {student.spec.name}; leave out --inherit")
    if progress is not None:
        progress.say(str(inherited))
    return inherited


def _check_turns(settings: DistillSettings) -> None:
    """Check that the length of the run can be shared equally by the turns of ``a>b``.

    Raises:
        RunError: it cannot.
    """
    turns = len(split_turns(settings.method))
    name, length = ("epochs", settings.epochs) if settings.steps is None else ("steps", settings.steps)
    if length % turns:
        raise RunError(f"{name}: {length} cannot be shared by the {turns} turns of {settings.method}; give a multiple of {turns}")


LEAST_TAKEN = 0.1
"""Share of the student's values that must be taken from the weights of ``init``; equal counters and biases alone are chance."""


def _start(student: Detector, init: str, progress: Progress | None) -> Start:
    """Copy the weights of ``init`` into the student, and say how many tensors fit.

    Raises:
        RunError: less than ``LEAST_TAKEN`` fits.
        ModelError: ``init`` cannot be loaded.
    """
    with torch.random.fork_rng(devices=[]):  # building the detector must not change the random numbers of the run
        source = load_detector(kept_copy(init))
    found = start_from(student, source)
    total = len(found.copied) + len(found.skipped)
    state = student.state_dict()
    values = sum(tensor.numel() for tensor in state.values())
    taken = sum(state[name].numel() for name in found.copied)
    if not found.copied or taken < LEAST_TAKEN * values:
        reason = f" ({': '.join(found.skipped[0])})" if found.skipped else ""
        raise RunError(
            f"init: {len(found.copied)} of the {total} tensors of {student.spec.name} ({100 * taken / values:.0f} % of its "
            f"values) fit those of {init}{reason}; give weights of the same architecture, or leave out --init"
        )
    if progress is not None:
        skipped = f"; the first that does not fit is {': '.join(found.skipped[0])}" if found.skipped else ""
        progress.say(f"started from {init}: {len(found.copied)} of {total} tensors{skipped}", "yellow" if skipped else "dim")
    return Start(Teacher(source).fingerprint, len(found.copied), total)
