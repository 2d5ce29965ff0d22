"""Experiments: runs of distilled students and baselines with the same seeds, one after the other or at the same time."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from detdistill.errors import RunError
from detdistill.evaluation import Scores
from detdistill.evaluation.scores import points
from detdistill.jobs.contract import Job, Runner
from detdistill.jobs.together import run_together
from detdistill.jobs.where import LOCAL, runner_on
from detdistill.processes import number_of_processes
from detdistill.progress import Progress
from detdistill.settings import DistillSettings
from detdistill.training.folder import INPUTS, new_folder, resume_folder
from detdistill.training.metrics_table import read_rows
from detdistill.training.plan import Plan
from detdistill.training.run import run
from detdistill.training.session import Session, open_session
from detdistill.training.teacher_scores import note_teachers, scores_of_all

SEEN = 60.0
"""Seconds after which this machine sees what another one has written. NFS looks for new files at least once a minute."""


@dataclass(frozen=True)
class Experiment:
    """The folders of a finished experiment, and the scores of the teacher."""

    folder: Path
    runs: tuple[Path, ...]
    teacher_scores: Scores | None
    """Of the only teacher, if it knows all classes; None: there is no such teacher, or it was not scored."""


def plans_of(plan: Plan, parent: Path) -> list[Plan]:
    """One plan for each seed, and with ``baseline`` also one for its baseline; run folders are in ``parent``."""
    settings = plan.settings
    assert isinstance(settings, DistillSettings)
    plans = []
    for seed in settings.seeds or (settings.seed,):
        alone = replace(settings, seed=seed, seeds=(), baseline=False, jobs=1, on=LOCAL, score_teacher=False, report=False)
        roles = ("baseline", "distilled") if settings.baseline else ("distilled",)
        for role in roles:
            folder = parent / f"{role}-seed{seed}"
            mine = replace(alone, out=folder, resume=settings.resume and (folder / "config.yaml").exists())
            teacher = plan.teacher if role == "distilled" else None
            if role == "baseline":
                mine = replace(mine, cache=None, served=None)
            plans.append(replace(plan, settings=mine, role=role, teacher=teacher, title=f"{role}, seed {seed}"))
    return plans


@dataclass(frozen=True)
class Planned:
    """An experiment whose runs have not started."""

    folder: Path
    plans: tuple[Plan, ...]
    teacher_scores: Mapping[str, Scores]
    classes: tuple[str, ...]
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the data as this machine reads them, by their names in the ``inputs.json`` of a run."""

    @property
    def waiting(self) -> tuple[Plan, ...]:
        """The plans whose runs are not finished."""
        return tuple(p for p in self.plans if p.settings.out is None or not (p.settings.out / "summary.json").exists())

    def finished(self) -> Experiment:
        """The experiment after its last run; the teachers' scores are added to the summaries."""
        folders = tuple(p.settings.out for p in self.plans if p.settings.out is not None)
        if self.teacher_scores:
            for folder in folders:
                note_teachers(folder, self.teacher_scores)
        return Experiment(self.folder, folders, scores_of_all(self.teacher_scores, self.classes))


def run_experiment(session: Session, teacher_scores: Mapping[str, Scores], progress: Progress) -> Experiment:
    """Run a plan once for each seed, and with ``baseline`` also train a baseline for each seed.

    Args:
        session: session of the plan. Its student and method are used by the distilled run with the same seed, if there is one.
        teacher_scores: scores of the teachers by name, added to the summary of every run.
        progress: display of the progress.

    Raises:
        RunError: a run failed; finished runs are kept, and ``resume`` continues the experiment.
    """
    settings = session.plan.settings
    assert isinstance(settings, DistillSettings)
    with planned(session, teacher_scores) as experiment:
        if apart(settings):
            run_side_by_side(experiment.waiting, settings, progress, inputs=experiment.inputs)
        else:
            for single in experiment.waiting:
                if single.distilling is not None and single.settings.seed == settings.seed:
                    run(replace(session, plan=single), progress)
                else:
                    run(open_session(single, session.splits, session.teachers, session.cache, progress), progress)
        return experiment.finished()


def apart(settings: DistillSettings) -> bool:
    """Whether every run of an experiment has a process of its own.

    Distributed runs start further processes with the same command, so it must be the command of a single run.
    """
    return settings.on != LOCAL or settings.jobs > 1 or settings.devices * settings.nodes > 1


@contextlib.contextmanager
def planned(session: Session, teacher_scores: Mapping[str, Scores]) -> Iterator[Planned]:
    """Plan an experiment and make its folder; after an error, the folder is removed if it is empty.

    Raises:
        RunError: the folder is taken or cannot be made, or a run to be resumed has other settings.
    """
    plan, settings = session.plan, session.plan.settings
    assert isinstance(settings, DistillSettings)
    _check_launcher()
    if settings.resume:
        if settings.out is None:
            raise RunError("--resume true needs --out with the folder of the experiment")
        parent = settings.out
    else:
        parent = new_folder(settings.out, f"distill-{re.sub('[@>]', '-', settings.method.split(',')[0])}")
    with _made(parent):
        plans = tuple(plans_of(plan, parent))
        for single in plans:
            if single.settings.resume:  # checked for finished runs too: all runs must have the same settings
                resume_folder(single.settings.out, single.config())
        yield Planned(parent, plans, teacher_scores, session.splits.classes, _inputs(session))


def _check_launcher() -> None:
    if number_of_processes() > 1:
        raise RunError(
            "several runs cannot be started by torchrun or srun; use --devices without them, or start each seed by itself"
        )


def _inputs(session: Session) -> dict[str, str]:
    return {"training data": session.splits.train.fingerprint, "validation data": session.splits.val.fingerprint}


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder; after an error, remove it if it is empty."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {folder}: {error.strerror}; give another --out") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def run_elsewhere(session: Session, progress: Progress) -> Path:
    """Run a single plan where its setting ``on`` says.

    Returns:
        The run folder.

    Raises:
        RunError: the run failed.
    """
    plan, settings = session.plan, session.plan.settings
    assert isinstance(settings, DistillSettings)
    _check_launcher()
    folder = settings.out
    if folder is None or not settings.resume:
        folder = new_folder(folder, f"distilled-{re.sub('[^A-Za-z0-9]+', '-', plan.student.split(',')[0])}-seed{settings.seed}")
    alone = replace(settings, on=LOCAL, out=folder, score_teacher=False, report=False)
    with _made(folder.parent):
        run_side_by_side((replace(plan, settings=alone),), settings, progress, inputs=_inputs(session))
    return folder


def run_side_by_side(
    plans: Sequence[Plan],
    settings: DistillSettings,
    progress: Progress,
    *,
    inputs: Mapping[str, str] | None = None,
    failed: Callable[[Plan, RunError], None] | None = None,
) -> None:
    """Run each plan in a process of its own with one torch thread, here or on a cluster; progress is read from the run folders.

    Args:
        plans: the plans; each has its run folder.
        settings: says where the runs take place (``on``) and how many at the same time (``jobs``).
        progress: display of the progress.
        inputs: fingerprints of the data as this machine reads them, see ``Planned.inputs``.
        failed: takes the error of a run that failed, and the other runs go on; None: the error is raised and ends the others.

    Raises:
        RunError: a run failed, or there is no cluster.
    """
    if not plans:
        return
    with runner_on(settings.on, progress.say) as runner:
        jobs = [_job(plan, runner) for plan in plans]
        here = (inputs or {}) if settings.on != LOCAL else {}
        run_together(jobs, runner, runner.at_once(settings.jobs), lambda index: _Followed(plans[index], progress, here, failed))


def _job(plan: Plan, runner: Runner) -> Job:
    """The command that runs a plan."""
    settings = plan.settings
    return Job(
        plan.title,
        "distill" if plan.distilling else "train",
        plan.arguments(),
        settings.out,
        cpus=settings.devices * max(1, settings.threads),
        gpus=runner.gpus(settings.device, settings.devices),
        environment={"OMP_NUM_THREADS": "1"},
    )


class _Followed:
    """A run in its own process, seen by its folder."""

    def __init__(
        self,
        plan: Plan,
        progress: Progress,
        inputs: Mapping[str, str],
        failed: Callable[[Plan, RunError], None] | None,
    ) -> None:
        assert plan.settings.out is not None
        self.plan, self.folder, self.failed = plan, plan.settings.out, failed
        # A resumed run compares its data with those that it began with.
        self.inputs = {} if plan.settings.resume else inputs
        self.bar = progress.bar(plan.title, total=1)

    def look(self) -> None:
        """Show how far the run is.

        Raises:
            RunError: it reads other data than this machine.
        """
        path = self.folder / "metrics.csv"
        rows = read_rows(path) if path.exists() else []
        if not rows:
            self.bar.update(0, "starting")
            return
        self._compare_inputs()
        steps = [row for row in rows if row.get("loss")]
        scored = [row for row in rows if row.get("val/AP")]
        text = f"AP {points(float(scored[-1]['val/AP']))}  " if scored else ""
        if steps:
            text += f"loss {float(steps[-1]['loss']):.2f}"
        self.bar.resize(int(rows[0]["total"]))
        self.bar.update(int(rows[-1]["step"]), text)

    def _compare_inputs(self) -> None:
        """Compare the data that the run has read with those of this machine, once."""
        if not self.inputs or not (self.folder / INPUTS).exists():
            return
        read = json.loads((self.folder / INPUTS).read_text(encoding="utf-8"))
        wanted, self.inputs = self.inputs, {}
        for name, fingerprint in wanted.items():
            if read.get(name, fingerprint) != fingerprint:
                raise RunError(
                    f"{self.plan.title}: the {name} differ between this machine and the run's; "
                    f"{self.plan.data} must be the same folder on all nodes"
                )

    def ended(self, code: int, line: str) -> None:
        """Show the result.

        Raises:
            RunError: the run failed; with the last line of its output.
        """
        if code != 0:
            error = RunError(f"{self.plan.title} failed: {line or f'exit code {code}'}")
            if self.failed is None:
                raise error
            self.failed(self.plan, error)
            return
        summary = _summary(self.folder)
        ap, ap50 = points(summary["metrics"]["AP"]), points(summary["metrics"]["AP50"])
        self.bar.update(self.bar.total, f"AP {ap}")
        self.bar.say(f"AP {ap}  AP50 {ap50}")


def _summary(folder: Path) -> dict[str, Any]:
    """The summary of a run that ended well.

    Raises:
        RunError: this machine does not see it.
    """
    path, deadline = folder / "summary.json", time.monotonic() + SEEN
    while not path.exists():
        if time.monotonic() > deadline:
            raise RunError(f"the run ended well, but {path} is not seen here; --out must be on a disk that all nodes share")
        time.sleep(0.5)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
