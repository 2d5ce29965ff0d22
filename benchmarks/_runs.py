"""Runs many commands for one benchmark: several at a time, finished ones are skipped, and each has a log file.

Each worker process runs one task after the other, so that it loads the libraries only once. Beside the log of a task is the
peak of its memory in megabytes, where the system tells (Linux).
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from detdistill.jobs.contract import Job, Runner, Started
from detdistill.jobs.where import runner_on
from detdistill.processes import stopped_by_signals, with_parent


@dataclass(frozen=True)
class Kind:
    """Model strings of a teacher and its student, and their training settings."""

    teacher: str
    student: str
    lr: float
    teacher_steps: int
    steps: int
    clip: float = 5.0


@dataclass(frozen=True)
class Task:
    """One command of ``detdistill``; ``out`` is the folder that it creates."""

    out: Path
    words: tuple[str, ...]
    after: tuple[Path, ...] = ()
    """Folders of the tasks that must be finished before this one."""

    @staticmethod
    def of(out: Path, *words: object, after: Sequence[Path] = ()) -> Task:
        return Task(out, (*map(str, words), "--out", str(out)), tuple(after))

    @property
    def done(self) -> bool:
        return (self.out / ("finished" if self.words[0] == "cache" else "summary.json")).exists()

    @property
    def command(self) -> list[str]:
        started = any((self.out / name).exists() for name in ("config.yaml", "cache.json"))
        return [*self.words, *(["--resume", "true"] if started and self.words[0] != "cache" else [])]


def run(tasks: Sequence[Task], jobs: int, work: Path, note: Callable[[], None], on: str = "local") -> None:
    """Run all tasks in their order, ``jobs`` at a time; a task waits for the tasks in its ``after``.

    ``note`` is called after each task. A failed task is printed, and tasks that depend on it are skipped. ``on`` is ``local``,
    ``ray`` or ``ray://HOST:PORT``; on a cluster, all tasks that need no other one are submitted if ``jobs`` is 1.
    """
    if on != "local":
        _run_on(on, tasks, jobs, note)
        return
    todo = list({task.out: task for task in tasks}.values())
    (work / "logs").mkdir(parents=True, exist_ok=True)
    waiting = [task for task in todo if not task.done]
    done = {task.out for task in todo if task.done}
    failed: set[Path] = set()
    os.environ.update(with_parent(), OMP_NUM_THREADS="1")
    spawning = multiprocessing.get_context("spawn")
    idle: list[tuple[Connection, Any]] = []
    for _ in range(min(jobs, len(waiting))):
        ours, theirs = spawning.Pipe()
        process = spawning.Process(target=_worker, args=(theirs,), daemon=False)
        process.start()
        idle.append((ours, process))
    running: dict[Connection, tuple[Task, Any, float]] = {}
    while waiting or running:
        for task in list(waiting):
            if failed.intersection(task.after):
                failed.add(task.out)
                waiting.remove(task)
            elif idle and done.issuperset(task.after):
                pipe, process = idle.pop()
                pipe.send((task.command, str(work / "logs" / f"{task.out.name}.txt")))
                running[pipe] = (task, process, time.monotonic())
                waiting.remove(task)
        if waiting and not running:
            raise RuntimeError(f"{waiting[0].out} waits for {waiting[0].after}, which no task makes")
        for ready in multiprocessing.connection.wait(list(running), timeout=1):
            assert isinstance(ready, Connection)
            task, process, started = running.pop(ready)
            try:
                good = bool(ready.recv())
                idle.append((ready, process))
            except EOFError:
                good = False
            if good and task.words[0] == "cache":
                (task.out / "finished").write_text(f"{time.monotonic() - started:.1f}\n")
            (done if good else failed).add(task.out)
            state = "done" if good else "FAILED, see logs"
            print(f"{time.strftime('%H:%M:%S')} {task.out.name}: {state}, {time.monotonic() - started:.0f} s", flush=True)
            note()
    for pipe, process in idle:
        pipe.send(None)
        process.join()


def _kill(running: Sequence[tuple[Task, Started, float]]) -> None:
    for _, started, _ in running:
        started.kill()


def _run_on(on: str, tasks: Sequence[Task], jobs: int, note: Callable[[], None]) -> None:
    """Run all tasks on a Ray cluster."""
    todo = list({task.out: task for task in tasks}.values())
    waiting = [task for task in todo if not task.done]
    done, failed = {task.out for task in todo if task.done}, set[Path]()
    running: list[tuple[Task, Started, float]] = []
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(runner_on(on, print))
        stack.callback(_kill, running)
        stack.enter_context(stopped_by_signals())
        while waiting or running:
            for task in list(waiting):
                if failed.intersection(task.after):
                    failed.add(task.out)
                    waiting.remove(task)
                elif done.issuperset(task.after) and len(running) < (runner.at_once(jobs) or len(todo)):
                    running.append((task, runner.start(_job(task, runner)), time.monotonic()))
                    waiting.remove(task)
            if waiting and not running:
                raise RuntimeError(f"{waiting[0].out} waits for {waiting[0].after}, which no task makes")
            for entry in list(running):
                task, started, since = entry
                if (code := started.poll()) is None:
                    continue
                running.remove(entry)
                seconds = time.monotonic() - since
                if code == 0 and task.words[0] == "cache":
                    (task.out / "finished").write_text(f"{seconds:.1f}\n")
                (done if code == 0 else failed).add(task.out)
                state = "done" if code == 0 else f"FAILED: {started.last_line()}"
                print(f"{time.strftime('%H:%M:%S')} {task.out.name}: {state}, {seconds:.0f} s", flush=True)
                note()
            time.sleep(0.5)


def _job(task: Task, runner: Runner) -> Job:
    verb, *words = task.command
    device = words[words.index("--device") + 1] if "--device" in words else "auto"
    folder = None if verb == "cache" else task.out
    return Job(
        task.out.name,
        verb,
        folder=folder,
        gpus=runner.gpus(device, 1),
        words=tuple(words),
        environment={"OMP_NUM_THREADS": "1"},
    )


def _worker(pipe: Connection) -> None:
    from detdistill.cli import main

    while (order := pipe.recv()) is not None:
        words, log = order
        good = True
        peak = Path("/proc/self/clear_refs")
        if peak.exists():
            peak.write_text("5")  # the peak of memory is the present size
        with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                main(words)
            except SystemExit as end:
                good = end.code in (None, 0)
            except Exception:
                traceback.print_exc()
                good = False
        if peak.exists():
            kilobytes = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
            Path(log).with_suffix(".megabytes").write_text(f"{kilobytes // 1000}\n")
        pipe.send(good)
    sys.exit(0)


def read(folder: Path) -> dict[str, Any] | None:
    """Read ``summary.json`` of a finished run."""
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def ap(folder: Path) -> float | None:
    """AP of a finished run in percent, one decimal."""
    summary = read(folder)
    return None if summary is None else round(100 * summary["metrics"]["AP"], 1)


def filling(cache: Path) -> dict[str, float] | None:
    """Seconds for filling a cache (training of methods' earlier stages included), and its size in megabytes."""
    if not (cache / "finished").exists():
        return None
    count = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return {"seconds": float((cache / "finished").read_text()), "megabytes": round(count / 1e6, 1)}


def machine(folders: Sequence[Path]) -> dict[str, Any]:
    """Hardware and versions from the summary of the first finished run."""
    for folder in folders:
        if (summary := read(folder)) is not None:
            return {"hardware": summary["hardware"], "versions": summary["versions"]}
    return {}


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(content, indent=2) + "\n")
    scratch.replace(path)


GAIN_COLUMNS = ("seeds", "alone", "distilled", "gain", "95 % interval", "verdict")


def gain_cells(gain: dict[str, Any]) -> list[object]:
    """Cells for ``GAIN_COLUMNS``, from a ``detdistill.compare.Gain`` as a dictionary; in percent."""
    alone, distilled = (statistics.fmean(100 * pair[side] for pair in gain["pairs"]) for side in ("baseline", "distilled"))
    interval = "" if gain["low"] is None else f"{100 * gain['low']:+.1f} .. {100 * gain['high']:+.1f}"
    return [len(gain["pairs"]), f"{alone:.1f}", f"{distilled:.1f}", f"{100 * gain['mean']:+.1f}", interval, gain["verdict"]]


def markdown(rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table; the first row is the header."""
    lines = ["| " + " | ".join("" if value is None else str(value) for value in row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]
