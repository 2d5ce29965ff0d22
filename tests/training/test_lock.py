"""One process at a time trains in a run folder."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from detdistill.errors import RunError
from detdistill.training.lock import LOCK, locked
from tests.training import small


def _hold(folder: Path, ready, done) -> None:
    with locked(folder):
        ready.set()
        done.wait(60)


def test_a_folder_in_use_is_refused_with_its_owner(teacher: Path, tmp_path: Path):
    small.train(tmp_path / "run", epochs=1)
    (tmp_path / "run" / "summary.json").unlink()  # not finished
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    fork = multiprocessing.get_context("fork")
    ready, done = fork.Event(), fork.Event()
    other = fork.Process(target=_hold, args=(tmp_path / "run", ready, done))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(RunError, match=rf"run folder .*run is in use by process {other.pid} on .* since .*; wait until"):
            small.train(tmp_path / "run", epochs=1, resume=True)
        assert (tmp_path / "run" / "metrics.csv").read_bytes() == before
    finally:
        done.set()
        other.join(60)
    small.train(tmp_path / "run", epochs=1, resume=True)
    assert not (tmp_path / "run" / LOCK).exists()


def test_the_lock_of_a_killed_process_locks_nothing(tmp_path: Path):
    def hold_and_die() -> None:
        with locked(tmp_path):
            small.die()

    assert small.killed(hold_and_die) == -9
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


def test_two_runs_of_one_process_share_no_folder(tmp_path: Path):
    def both() -> None:
        with locked(tmp_path), locked(tmp_path):
            pass

    with pytest.raises(RunError, match=r"is in use by this process"):
        both()
