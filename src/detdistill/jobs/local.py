"""Jobs as processes of this machine."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from detdistill.jobs.contract import Job, Started
from detdistill.processes import with_parent


class Local:
    """Starts jobs as processes of this machine; use ``local_runner``."""

    def __init__(self, scratch: Path) -> None:
        """Nothing is started yet.

        Args:
            scratch: folder for settings and outputs of the processes.
        """
        self.scratch, self._count = scratch, 0

    def check(self, job: Job) -> None:
        """There is always room."""

    def start(self, job: Job) -> Started:
        """Start a process, which ends with this one."""
        self._count += 1
        config = yaml.safe_dump(dict(job.config), sort_keys=False) if job.config else ""
        return Child(job.verb, config, job.words, job.environment, self.scratch / str(self._count))

    def at_once(self, jobs: int) -> int | None:
        """As many as asked for."""
        return jobs

    def gpus(self, device: str, devices: int) -> int:
        """Zero: nobody counts them here."""
        return 0


@contextlib.contextmanager
def local_runner() -> Iterator[Local]:
    """A runner whose folder of scratch files is removed at the end."""
    with tempfile.TemporaryDirectory() as scratch:
        yield Local(Path(scratch))


class Child:
    """A command of this package in a process of its own, which ends when this process ends."""

    def __init__(
        self,
        verb: str,
        config: str,
        words: Sequence[str],
        environment: Mapping[str, str],
        scratch: Path,
        cwd: str | None = None,
    ) -> None:
        """Start the process.

        Args:
            verb: the command, e.g. ``distill``.
            config: content of its settings file; empty: it has none.
            words: further words of the command.
            environment: variables besides those of this process.
            scratch: folder for the settings and the output; it is created.
            cwd: the working folder; None: that of this process.
        """
        scratch.mkdir()
        self.log = scratch / "log.txt"
        settings: list[str] = []
        if config:
            file = scratch / "config.yaml"
            file.touch(mode=0o600)  # it holds the passwords of URLs
            file.write_text(config, encoding="utf-8")
            settings = ["--config", str(file)]
        options: dict[str, Any] = {} if cwd is None else {"cwd": cwd}
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "detdistill", verb, *settings, *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**with_parent(), **environment},
                **options,
            )

    def poll(self) -> int | None:
        """The exit code, negative if a signal ended the process; None: it has not ended."""
        return self.process.poll()

    def last_line(self) -> str:
        """The last line of its output."""
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def kill(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
