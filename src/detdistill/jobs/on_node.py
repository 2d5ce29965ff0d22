"""A cluster's task on its node: it checks that the world there is the same, runs the command, and tells how it ended."""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from detdistill.jobs.local import Child
from detdistill.jobs.versions import versions_of_all
from detdistill.processes import ATTEMPT


@dataclass(frozen=True)
class Order:
    """All that a node is told, in plain values."""

    verb: str
    config: str
    """Content of the settings file; it may hold passwords."""
    words: tuple[str, ...]
    environment: dict[str, str]
    cwd: str
    """The working folder, to which relative paths of settings belong."""
    folder: str | None
    """The run folder, from which an earlier attempt is continued."""
    attempt: int
    """How often the job was started before and lost its worker."""
    versions: dict[str, str]
    """Versions on the machine that sends the order."""


def work(order: Order) -> tuple[int, str]:
    """Run a command on this node.

    Args:
        order: the command.

    Returns:
        The exit code (negative if a signal ended the command), and the last line of the output, or why the command was not run.
    """
    if (refused := _refused(order)) is not None:
        return 2, refused
    words = list(order.words)
    with _in(order.cwd):
        if order.attempt and order.folder is not None and (Path(order.folder) / "config.yaml").exists():
            words.append("--resume=true")
    environment = {**order.environment, **({ATTEMPT: str(order.attempt)} if order.attempt else {})}
    with tempfile.TemporaryDirectory() as scratch:
        child = Child(order.verb, order.config, words, environment, Path(scratch) / "job", order.cwd)
        try:
            while (code := child.poll()) is None:
                time.sleep(0.2)
        finally:  # a task that is cancelled, too
            child.kill()
        return code, child.last_line()


def _refused(order: Order) -> str | None:
    """Why this node must not run the command; None: nothing forbids it."""
    here = versions_of_all()
    node = platform.node()
    for name, wanted in order.versions.items():
        if name in here and here[name] != wanted:
            return f"node {node} has {name} {here[name]}, but this machine has {wanted}; install the same versions on all nodes"
    if not os.access(order.cwd, os.R_OK | os.X_OK):
        return (
            f"node {node} has no folder {order.cwd}; with --on ray, the working folder, --data and --out must be on a disk that "
            "all nodes have at the same path"
        )
    return None


@contextlib.contextmanager
def _in(folder: str) -> Iterator[None]:
    """Context with another working folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
