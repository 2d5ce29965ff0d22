"""Several jobs at the same time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from detdistill.jobs.contract import Job, Runner, Started
from detdistill.processes import stopped_by_signals

LOOK = 0.25
"""Seconds between two looks at the jobs."""


class Watch(Protocol):
    """Observer of a job, which shows its progress and takes its result."""

    def look(self) -> None:
        """Show how far it is. It is asked for once more when the job has ended.

        Raises:
            RunError: the job must not go on; all jobs are ended.
        """

    def ended(self, code: int, line: str) -> None:
        """Take the result: the exit code, and the last line of the output.

        Raises:
            RunError: the job failed, and the others must not go on.
        """


def run_together(jobs: Sequence[Job], runner: Runner, at_once: int | None, watch: Callable[[int], Watch]) -> None:
    """Run all jobs, in their order and several at a time; if one raises, or a signal comes, all are ended.

    Args:
        jobs: the jobs.
        runner: where they run.
        at_once: largest number of jobs at the same time; None: no limit.
        watch: makes what follows a job, from its index, when it is started.

    Raises:
        RunError: from a watch, or a job has no room or lost its worker too often.
        StoppedError: a signal came.
    """
    for job in jobs:
        runner.check(job)
    waiting, running = list(enumerate(jobs)), list[tuple[Started, Watch]]()
    with _ended_at_last(running), stopped_by_signals():
        while waiting or running:
            while waiting and (at_once is None or len(running) < at_once):
                index, job = waiting.pop(0)
                running.append((runner.start(job), watch(index)))
            for pair in list(running):
                started, shown = pair
                code = started.poll()
                shown.look()
                if code is not None:
                    running.remove(pair)
                    shown.ended(code, started.last_line())
            if waiting or running:
                time.sleep(LOOK)


@contextlib.contextmanager
def _ended_at_last(running: Sequence[tuple[Started, Watch]]) -> Iterator[None]:
    """Context after which no job is left."""
    try:
        yield
    finally:
        if running:  # together, because a cluster takes a moment for each
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(lambda pair: pair[0].kill(), running))
