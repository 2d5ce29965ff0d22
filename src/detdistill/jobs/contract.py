"""Interfaces of a command that is run (a job), of its state after the start, and of the runner that starts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Job:
    """One command, ``detdistill VERB --config FILE WORDS``."""

    title: str
    """Name in messages and on progress bars."""
    verb: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """The settings of the command as plain values; passwords of URLs are among them. Empty: no ``--config``."""
    folder: Path | None = None
    """Run folder, from which the job continues if it is started again; None: the same command continues by itself."""
    cpus: int = 1
    """CPUs that it keeps busy, with all its processes; only a cluster counts them."""
    gpus: int = 0
    """GPUs that it needs; only a cluster counts them."""
    words: tuple[str, ...] = ()
    """Further words of the command; they override the settings."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables besides those of the process that starts it."""


class Started(Protocol):
    """A job that was started."""

    def poll(self) -> int | None:
        """The exit code; None: it has not ended.

        Raises:
            RunError: its worker was lost again and again, or the cluster cannot be reached any more.
        """

    def last_line(self) -> str:
        """The last line that it wrote; empty before it has ended, or if it wrote nothing."""

    def kill(self) -> None:
        """End it, with all its processes. Nothing happens if it has ended."""


class Runner(Protocol):
    """Starts jobs."""

    def check(self, job: Job) -> None:
        """Check that there is room for a job when no other job runs.

        Raises:
            RunError: there never is.
        """

    def start(self, job: Job) -> Started:
        """Start a job, or have it wait for room."""

    def at_once(self, jobs: int) -> int | None:
        """How many jobs to start at the same time if ``--jobs`` is ``jobs``; None: all, the runner makes them wait."""

    def gpus(self, device: str, devices: int) -> int:
        """Number of GPUs to ask for, for a run on ``device`` (``auto``, ``cpu`` or ``cuda``) with ``devices`` processes."""
