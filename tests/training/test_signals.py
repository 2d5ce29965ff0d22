"""Processes that work together end together, with one line that says how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from detdistill.errors import StoppedError
from detdistill.processes import stopped_by_signals
from tests.training import small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_python")]
MANY = int(os.environ.get("DETDISTILL_FAULTS", "6")) > 6
"""Whether all cases are tried; each starts processes that train."""
LONG = {"epochs": 4000, "evaluate_every": 4000}


def started(out: Path, rows: int, verb: str = "train", **settings: Any) -> subprocess.Popen[str]:
    """A command that is training: it has written ``rows`` rows of losses into each run folder below ``out``."""
    wanted = {**small.SETTINGS, **LONG, "data": small.DATA, "out": out, **settings}
    flags = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in wanted.items()]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "LOCAL_RANK", "WORLD"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "detdistill", verb, *flags],
        stderr=subprocess.PIPE,
        text=True,
        env={**clean, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 300
    while sum(len(table.read_text().splitlines()) > 2 for table in out.rglob("metrics.csv")) < rows:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


def children(pid: int) -> list[int]:
    """Processes that a process has started and that still run."""
    found = subprocess.run(["ps", "-o", "pid=,stat=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if not line.split()[1].startswith("Z") and "ps" not in line]


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def all_end(process: subprocess.Popen[str], others: list[int]) -> str:
    """Wait for all processes; what the first one wrote to stderr."""
    said = process.communicate(timeout=30)[1]
    deadline = time.monotonic() + 15
    while not all(map(gone, others)):
        assert time.monotonic() < deadline, "a process goes on alone"
        time.sleep(0.1)
    return said


@pytest.mark.parametrize(("who", "number"), [("first", signal.SIGTERM), ("second", signal.SIGKILL)][: 1 + MANY])
def test_a_signal_to_one_process_of_a_distributed_run_ends_all(tmp_path: Path, who: str, number: signal.Signals):
    process = started(tmp_path / "run", 1, model=small.MODEL, devices=2, batch=2)
    workers = children(process.pid)
    assert len(workers) == 1
    os.kill(process.pid if who == "first" else workers[0], number)
    said = all_end(process, workers)
    ours = [line for line in said.splitlines() if line.startswith("detdistill: ")]
    name = "stopped by SIGTERM" if who == "first" else "process 1 of the run stopped by SIGKILL"
    assert ours == [f"detdistill: {name}; --resume true continues from the last checkpoint"]
    assert "Traceback" not in said
    assert process.returncode == 128 + number


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM][: 1 + MANY])
def test_runs_side_by_side_end_with_the_command(teacher: Path, tmp_path: Path, number: signal.Signals):
    wanted = {"teacher": teacher, "student": small.MODEL, "method": "pkd", "score_teacher": False}
    process = started(tmp_path / "out", 2, "distill", seeds="0,1", jobs=2, **wanted)
    runs = children(process.pid)
    assert len(runs) == 2
    os.kill(process.pid, number)
    said = all_end(process, runs)
    if number == signal.SIGTERM:
        assert said.splitlines()[-1] == "detdistill: stopped by SIGTERM; --resume true continues with the runs that are left"
        assert process.returncode == 2


def test_a_signal_becomes_an_error_and_is_handled_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)

    def wait():
        with stopped_by_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    with pytest.raises(StoppedError, match=r"stopped by SIGTERM; --resume true continues"):
        wait()
    assert signal.getsignal(signal.SIGTERM) is before
