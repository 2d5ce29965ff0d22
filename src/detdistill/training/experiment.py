"""Experiments: runs of distilled students and baselines with the same seeds, one after the other or at the same time."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from detdistill.errors import RunError
from detdistill.evaluation import Scores
from detdistill.evaluation.scores import points
from detdistill.processes import number_of_processes, stopped_by_signals, with_parent
from detdistill.progress import Progress
from detdistill.settings import DistillSettings
from detdistill.training.folder import new_folder, resume_folder
from detdistill.training.metrics_table import read_rows
from detdistill.training.plan import Plan
from detdistill.training.run import run
from detdistill.training.session import Session, open_session
from detdistill.training.teacher_scores import note_teachers, scores_of_all


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
        alone = replace(settings, seed=seed, seeds=(), baseline=False, jobs=1, score_teacher=False, report=False)
        roles = ("baseline", "distilled") if settings.baseline else ("distilled",)
        for role in roles:
            folder = parent / f"{role}-seed{seed}"
            mine = replace(alone, out=folder, resume=settings.resume and (folder / "config.yaml").exists())
            teacher = plan.teacher if role == "distilled" else None
            if role == "baseline":
                mine = replace(mine, cache=None, served=None)
            plans.append(replace(plan, settings=mine, role=role, teacher=teacher, title=f"{role}, seed {seed}"))
    return plans


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
    if number_of_processes() > 1:
        raise RunError(
            "several runs cannot be started by torchrun or srun; use --devices without them, or start each seed by itself"
        )
    if settings.resume:
        if settings.out is None:
            raise RunError("--resume true needs --out with the folder of the experiment")
        parent = settings.out
    else:
        parent = new_folder(settings.out, f"distill-{re.sub('[@>]', '-', settings.method.split(',')[0])}")
    with _made(parent):
        return _run_all(session, parent, teacher_scores, progress)


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


def _run_all(session: Session, parent: Path, teacher_scores: Mapping[str, Scores], progress: Progress) -> Experiment:
    """Run all plans of an experiment in the folder ``parent``."""
    plan, settings = session.plan, session.plan.settings
    assert isinstance(settings, DistillSettings)
    plans = plans_of(plan, parent)
    for single in plans:
        if single.settings.resume:  # checked for finished runs too: all runs must have the same settings
            resume_folder(single.settings.out, single.config())
    waiting = [p for p in plans if not (p.settings.out is not None and (p.settings.out / "summary.json").exists())]
    # Distributed runs start further processes with the same command, so it must be the command of a single run.
    if settings.jobs > 1 or settings.devices * settings.nodes > 1:
        _run_side_by_side(waiting, settings.jobs, progress)
    else:
        for single in waiting:
            if single.distilling is not None and single.settings.seed == settings.seed:
                run(replace(session, plan=single), progress)
            else:
                run(open_session(single, session.splits, session.teachers, session.cache, progress), progress)
    folders = tuple(p.settings.out for p in plans if p.settings.out is not None)
    if teacher_scores:
        for folder in folders:
            note_teachers(folder, teacher_scores)
    return Experiment(parent, folders, scores_of_all(teacher_scores, session.splits.classes))


def _run_side_by_side(plans: Sequence[Plan], jobs: int, progress: Progress) -> None:
    """Run each plan in its own process with one torch thread, ``jobs`` at a time; progress is read from metrics.csv."""
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        waiting, running = list(enumerate(plans)), list[_Child]()
        stack.callback(_stop, running)
        stack.enter_context(stopped_by_signals())
        while waiting or running:
            while waiting and len(running) < jobs:
                index, plan = waiting.pop(0)
                running.append(_Child(plan, scratch / str(index), progress))
            for child in list(running):
                if not child.follow():
                    running.remove(child)
            time.sleep(0.25)


def _stop(children: list[_Child]) -> None:
    for child in children:
        if child.process.poll() is None:
            child.process.kill()


class _Child:
    """A run in its own process."""

    def __init__(self, plan: Plan, scratch: Path, progress: Progress) -> None:
        assert plan.settings.out is not None
        self.plan, self.folder = plan, plan.settings.out
        scratch.mkdir()
        config = scratch / "config.yaml"
        config.touch(mode=0o600)  # it holds the passwords of URLs
        config.write_text(yaml.safe_dump(plan.arguments(), sort_keys=False))
        verb = "distill" if plan.distilling else "train"
        self.log = scratch / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "detdistill", verb, "--config", str(config)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**with_parent(), "OMP_NUM_THREADS": "1"},
            )
        self.bar = progress.bar(plan.title, total=1)
        self.progress, self._position, self._columns = progress, 0, list[str]()

    def follow(self) -> bool:
        """Show new progress; return False when the run has ended.

        Raises:
            RunError: the run failed; with the last line of its output.
        """
        self._read()
        code = self.process.poll()
        if code is None:
            return True
        if code != 0:
            lines = [line for line in self.log.read_text().splitlines() if line.strip()]
            raise RunError(f"{self.plan.title} failed: {lines[-1] if lines else f'exit code {code}'}")
        summary = json.loads((self.folder / "summary.json").read_text())
        ap, ap50 = points(summary["metrics"]["AP"]), points(summary["metrics"]["AP50"])
        self.bar.update(self.bar.total, f"AP {ap}")
        self.bar.say(f"AP {ap}  AP50 {ap50}")
        return False

    def _read(self) -> None:
        path = self.folder / "metrics.csv"
        rows = read_rows(path) if path.exists() else []
        if not rows:
            self.bar.update(0, "starting")
            return
        steps = [row for row in rows if row.get("loss")]
        scored = [row for row in rows if row.get("val/AP")]
        text = f"AP {points(float(scored[-1]['val/AP']))}  " if scored else ""
        if steps:
            text += f"loss {float(steps[-1]['loss']):.2f}"
        total = int(rows[0]["total"])
        self.bar.resize(total)
        self.bar.update(int(rows[-1]["step"]), text)
