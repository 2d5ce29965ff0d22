"""The lock of a run folder: one process at a time trains in it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from detdistill.errors import RunError

LOCK = "run.lock"
"""Name of the lock file; it names the process that holds the lock. The operating system frees the lock when that process ends,
however it ends, so a file that is left behind locks nothing."""

_held: set[Path] = set()
"""Folders that are locked by this process: the operating system does not lock out the process itself."""


@contextlib.contextmanager
def locked(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Context in which no other run can use a run folder.

    Args:
        folder: the run folder.
        wait: seconds for which another process may still hold the lock.

    Raises:
        RunError: another process (or another run of this process) uses the folder, or the lock file cannot be written.
    """
    path = (folder / LOCK).absolute()
    if path in _held:
        raise _taken(folder, "this process")
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; make space, or give another --out") from error
    with file:
        deadline = time.monotonic() + wait
        while not _lock(file):
            if time.monotonic() >= deadline:
                raise _taken(folder, _owner(file))
            time.sleep(0.5)
        _held.add(path)
        try:
            _sign(file)
            yield
        finally:
            _held.discard(path)
            path.unlink(missing_ok=True)  # before the lock is freed, so that nobody waits for a file that is gone


def _lock(file: TextIO) -> bool:
    """Lock an open file; False: another process has locked it. Where files cannot be locked, nothing is."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # some network disks have no locks
        return True
    return True


def _sign(file: TextIO) -> None:
    """Write which process holds the lock. A full disk is no reason to stop here; it is reported where results are written."""
    with contextlib.suppress(OSError):
        file.truncate(0)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        file.write(json.dumps(owner) + "\n")
        file.flush()


def _owner(file: TextIO) -> str:
    """The process that holds the lock, in words."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _taken(folder: Path, owner: str) -> RunError:
    return RunError(f"run folder {folder} is in use by {owner}; wait until it ends, or give another --out")
