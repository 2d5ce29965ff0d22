"""A run: run folder, stages, exported student and summary."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from detdistill.detectors.contract import Detector, Teacher
from detdistill.detectors.load import load_detector
from detdistill.detectors.save import save_student
from detdistill.errors import DetdistillError, RunError, StoppedError
from detdistill.evaluation import Scores, evaluate
from detdistill.evaluation.scores import METRICS
from detdistill.functional.synced_norm import synchronized
from detdistill.methods.shared.contract import Stage
from detdistill.printing import html_table
from detdistill.processes import attempt, is_main_process, number_of_processes, restarts
from detdistill.progress import Progress
from detdistill.settings import DistillSettings, names_where
from detdistill.structures import Resizing
from detdistill.training.agreement import Facts
from detdistill.training.folder import (
    INPUTS,
    LAUNCH,
    RunFolder,
    check_inputs,
    new_folder,
    note_launch,
    resume_folder,
    start_folder,
)
from detdistill.training.lock import locked
from detdistill.training.machine import hardware, seed_everything, versions
from detdistill.training.origin import origin_of
from detdistill.training.own_models import load_own
from detdistill.training.plan import Plan, view_settings
from detdistill.training.session import Session
from detdistill.training.sharded import check_sharding
from detdistill.training.stage_loop import StageLoop, found_result, plain_stage
from detdistill.training.stage_results import reusable

LOCK_WAIT = 120.0
"""Seconds for which a main process that torchrun or a cluster has started again waits for the lock of the one before. NFS frees
the locks of a machine that is gone after 90 seconds."""


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run."""

    folder: Path
    """The run folder."""
    summary: dict[str, Any]
    """Content of ``summary.json``."""
    scores: Scores
    """Scores of the last weights on the validation images."""
    student: Detector
    """The trained detector; with ``ema``, its moving average."""

    def __repr__(self) -> str:
        """Role, student, AP and folder."""
        return f"Run({self.summary['role']} {self.summary['student']}: AP {self.scores.points('AP')}; {self.folder})"

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        said = [(name, str(self.summary[name])) for name in ("role", "student", "teacher", "method") if self.summary.get(name)]
        scores = [(name, self.scores.points(name)) for name in METRICS[:3]]
        return html_table([*said, *scores, ("folder", str(self.folder))])


def run(session: Session, progress: Progress | None = None, saved: Callable[[], None] | None = None) -> Run:
    """Train and evaluate a student, and write its run folder.

    Args:
        session: plan, data, student and method.
        progress: display of the progress; None: a new one on stderr.
        saved: called in the main process after each checkpoint.

    Raises:
        RunError: the folder exists, there is nothing to resume, the disk is full, or a loss is not finite.
    """
    plan, settings = session.plan, session.plan.settings
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if progress is None:
        progress = Progress(quiet=not is_main_process())
    path = settings.out if settings.resume else _folder_for(plan)
    if settings.resume and (done := _finished(plan)) is not None:
        progress.say(f"{done.folder} is finished; nothing to resume")
        return done
    # Seeded again, so that baseline and distilled run draw the same random numbers although the method has drawn some.
    seed_everything(settings.seed)
    there_before = path is not None and path.exists()
    folder = _open(plan, path)
    try:
        # The main process that this one replaces may have died on a machine whose lock takes a while to be freed.
        with (
            locked(folder.path, wait=LOCK_WAIT if restarts() or attempt() else 0)
            if is_main_process()
            else contextlib.nullcontext()
        ):
            if is_main_process():
                note_launch(folder)
            facts = _note_inputs(session, folder)
            synced = (session.student, session.method) if settings.sync_bn else ()
            with synchronized(*synced):
                return _train(StageLoop(session, folder, progress, facts, saved))
    except DetdistillError as error:
        if not (settings.resume or isinstance(error, StoppedError)) and is_main_process():
            folder.discard(folder_too=not there_before)
        raise


def _train(loop: StageLoop) -> Run:
    """Train all stages and write the result."""
    session = loop.session
    stages = (plain_stage(session.student),) if session.method is None else session.method.stages(session.student)
    if loop.settings.strategy == "fsdp":
        check_sharding(loop.settings, session.method, len(stages))
    for index, stage in enumerate(stages):
        loop.fit(stage, done_before=[earlier.name for earlier in stages[:index]])
    return _finish(loop)


def prepare(session: Session, progress: Progress) -> tuple[Stage, ...]:
    """Before a cache is filled: load or train the earlier stages on which the method's knowledge depends.

    Args:
        session: plan, data, student and method; the results are in the method's modules afterwards. A run folder is created
            only if a stage must be trained.
        progress: display of the progress.

    Returns:
        The stages whose results are in the method.

    Raises:
        RunError: as for ``run``; also if several processes were started, because each would train the stage.
    """
    plan, method = session.plan, session.method
    assert method is not None
    assert isinstance(plan.settings, DistillSettings)
    found = tuple(stage for stage in method.stages(session.student)[:-1] if reusable(stage, method))
    loop = None
    for index, stage in enumerate(found):
        if found_result(stage, dataclasses.replace(plan.settings, **stage.overrides), session.splits, method, progress):
            continue
        if number_of_processes() > 1:
            raise RunError(
                f"stage {stage.name} is not trained yet; first run the same command in one process with --dry_run true"
            )
        if loop is None:
            seed_everything(plan.settings.seed)
            folder = start_folder(new_folder(plan.settings.out, f"{plan.role}-{method.slug}"), plan.config())
            loop = StageLoop(session, folder, progress)
        loop.fit(stage, done_before=[earlier.name for earlier in found[:index]])
    return found


def _finished(plan: Plan) -> Run | None:
    """Load the result of a run that has already finished; None: it has not."""
    folder = resume_folder(plan.settings.out, plan.config())
    if not (folder.path / "summary.json").exists():
        return None
    summary = json.loads((folder.path / "summary.json").read_text())
    scores = Scores(
        summary["metrics"],
        summary["per_class"],
        summary["data"]["val_images"],
        seconds=summary["evaluation_seconds"],
        errors=summary.get("errors") or {},
    )
    student = load_detector(folder.path) if plan.build is None else load_own(plan.build, folder.path)
    return Run(folder.path, summary, scores, student)


def _folder_for(plan: Plan) -> Path:
    name = f"{plan.role}-{plan.student.split(',')[0].replace(':', '-').replace('/', '-')}-seed{plan.settings.seed}"
    if number_of_processes() > 1 and plan.settings.out is None:
        told = os.environ.get("DETDISTILL_OUT")
        if told is None:
            raise RunError("several processes need one folder: give --out")
        return Path(told)
    if not is_main_process():
        assert plan.settings.out is not None
        return plan.settings.out
    path = new_folder(plan.settings.out, name)
    os.environ["DETDISTILL_OUT"] = str(path)
    return path


def _open(plan: Plan, path: Path | None) -> RunFolder:
    config = plan.config()
    if plan.settings.resume:
        return resume_folder(path, config)
    assert path is not None
    if not is_main_process():
        return RunFolder(path)
    return start_folder(path, config)


def _note_inputs(session: Session, folder: RunFolder) -> Facts:
    """Write the fingerprints of data, teacher and initial weights; when a run is resumed, compare them first.

    Returns:
        What all processes of the run must have in common.

    Raises:
        RunError: one of them changed since the run started, and ``allow_changes`` is off.
    """
    settings, splits = session.plan.settings, session.splits
    now = {
        "training data": splits.train.fingerprint,
        "validation data": splits.val.fingerprint,
        "teacher": _joined({name: one.fingerprint for name, one in session.fixed_teachers.items()}),
        "initial weights": None if session.started is None else session.started.fingerprint,
    }
    if settings.resume and not settings.allow_changes:
        check_inputs(folder.path, now)
    if is_main_process():
        try:
            folder.write_json(INPUTS, now)
        except OSError as error:
            raise RunError(f"cannot write {folder.path / INPUTS}: {error.strerror or error}; make space") from error
    config, kind = session.plan.config(), type(settings)
    shared = [name for name in names_where(kind, "run") if name not in ("init", "device") and name in config]
    return {**versions(), **now, "student": session.plan.student, **{name: str(config[name]) for name in shared}}


def _finish(loop: StageLoop) -> Run:
    """Export the student and write ``summary.json``."""
    session, settings, folder = loop.session, loop.settings, loop.folder
    assert loop.module is not None
    assert loop.evaluation is not None
    detector = loop.module.detector or session.student
    scores = loop.evaluation.latest
    if scores is None:  # the run was resumed after its last step
        views = view_settings(settings)
        scores = evaluate(detector, session.splits.val, views, batch_size=settings.batch, errors=True)
    summary = _summary(loop, scores)
    if is_main_process():
        try:
            origin = origin_of(summary, session.plan.config())
            save_student(detector.cpu(), folder.student, Resizing.of(settings), origin)
            folder.write_json("summary.json", summary)
            (folder.path / LAUNCH).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise RunError(
                f"cannot write the result into {folder.path}: {reason}; make space and finish the run with --resume true"
            ) from error
    return Run(folder.path, summary, scores, detector)


def _summary(loop: StageLoop, scores: Scores) -> dict[str, Any]:
    """Content of ``summary.json``."""
    session, plan, settings, splits = loop.session, loop.plan, loop.settings, loop.splits
    distilling, cache = plan.distilling, session.cache
    assert loop.evaluation is not None
    known = {"path": cache.folder.url, "fingerprint": cache.about.fingerprint} if cache else None
    free = names_where(DistillSettings, "run", False)
    config = {key: value for key, value in plan.config().items() if key not in free}
    return {
        "name": loop.folder.path.name,
        "role": plan.role,
        "student": plan.student,
        "teacher": plan.teacher or (cache.about.teacher if cache else None),
        "teacher_model": _teacher_model(session),
        "teacher_metrics": None,
        "cache": known if cache is not None and cache.ahead is None else None,
        "served": known if cache is not None and cache.ahead is not None else None,
        "method": distilling.method if distilling else None,
        "inherit": bool(session.inherited and session.inherited.copied),
        "init": None if session.started is None else {"from": settings.init, **dataclasses.asdict(session.started)},
        "seed": settings.seed,
        "epochs": settings.epochs,
        "steps": loop.trained_steps,
        "images_seen": loop.images_seen,
        "stopped_early": loop.evaluation.stopped,
        "batch": settings.batch,
        "metrics": scores.metrics,
        "per_class": scores.per_class,
        "errors": scores.errors,
        "best_ap": max(loop.evaluation.best_ap, scores.metrics["AP"]),
        "seconds": round(loop.seconds, 2),
        "evaluation_seconds": round(scores.seconds, 2),
        "parameters": session.student.count_parameters(),
        "teacher_parameters": cache.about.teacher_parameters if cache else _parameters(session),
        "versions": versions(),
        "hardware": hardware(),
        "data": {
            "path": plan.data,
            "fingerprint": splits.train.fingerprint,
            "val_fingerprint": splits.val.fingerprint,
            "train_images": len(splits.train.records),
            "val_images": len(splits.val.records),
            "classes": list(splits.train.classes),
        },
        "config_fingerprint": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16],
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def _teacher_model(session: Session) -> str | None:
    """Model string of the teacher, also if only its description is there; of several, each with its name."""
    if session.cache is not None:
        return session.cache.about.spec.name
    return _joined(
        {name: (one if isinstance(one, Teacher) else session.student).spec.name for name, one in session.teachers.items()}
    )


def _parameters(session: Session) -> int | None:
    """Number of parameters of all teachers together; None without a teacher."""
    each = [one.detector if isinstance(one, Teacher) else session.student for one in session.teachers.values()]
    return sum(detector.count_parameters() for detector in each) if each else None


def _joined(texts: Mapping[str, str]) -> str | None:
    """``a=first, b=second``; a text without a name as it is; None if there is none."""
    return ", ".join(f"{name}={text}" if name else text for name, text in texts.items()) or None
