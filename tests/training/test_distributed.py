"""Two CPU processes (gloo): one run folder, weights in step, and exactly the scores of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detdistill.data.discover import load_data
from detdistill.data.transforms import ViewSettings
from detdistill.detectors.load import load_detector
from detdistill.evaluation import evaluate
from tests.training import small

pytestmark = pytest.mark.slow


def command(verb: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    values = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in settings.items()}
    flags = [f"--{key}={value}" for key, value in values.items()]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "LOCAL_RANK", "WORLD"))}
    return subprocess.run(
        [sys.executable, "-m", "detdistill", verb, *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env={**clean, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_from_the_command_line(teacher: Path, tmp_path: Path, request: pytest.FixtureRequest):
    common = {**small.SETTINGS, "batch": 2, "devices": 2, "student": small.MODEL, "data": small.DATA, "teacher": teacher}
    common |= {"method": "mgd,weight=0.001", "score_teacher": False, "out": tmp_path / "run", "epochs": 1, "balance": 0.3}
    done = command("distill", **common)
    assert done.returncode == 0, done.stderr
    assert "exists" not in done.stderr
    assert "summary.json" not in done.stderr, "the second process looks for what the first has not written yet"
    assert (done.stdout + done.stderr).count("run folder") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["images_seen"] == 24
    # The losses of the table are those of the first process, for its half of each batch: the same order of magnitude.
    rows = small.rows(tmp_path / "run")
    assert [int(row["step"]) for row in rows if row["loss"]] == list(range(1, 7))
    assert sum(bool(row["val/AP"]) for row in rows) == 1
    assert [float(row["balance/mgd/factor"]) > 1 for row in rows if row["balance/mgd/factor"]] == [True, True, True], (
        "steps 0, 1, 4"
    )
    # One process scores the student to exactly the same numbers.
    splits = load_data(small.DATA)
    alone = evaluate(load_detector(tmp_path / "run"), splits.val, ViewSettings(size=64), batch_size=4, errors=True)
    assert alone.metrics == summary["metrics"]
    assert alone.per_class == summary["per_class"]
    assert alone.errors == summary["errors"] != {}
    request.getfixturevalue("forked_python")
    again = command("distill", **common)
    assert again.returncode == 2
    assert [line for line in again.stderr.splitlines() if line.startswith("detdistill: ")] == [again.stderr.splitlines()[-1]]
    assert "exists" in again.stderr


def _score(rank: int, world: int, store: str, student: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    splits = load_data(small.DATA)
    scores = evaluate(load_detector(student), splits.val, ViewSettings(size=64), batch_size=3)
    Path(out, f"{rank}.json").write_text(json.dumps([scores.metrics, scores.per_class, scores.images]))
    dist.destroy_process_group()


def test_evaluation_in_several_processes_gives_the_numbers_of_one(teacher: Path, tmp_path: Path):
    longer = tmp_path / "trained"
    small.train(longer, epochs=30, lr=0.01, evaluate_every=100)
    splits = load_data(small.DATA)
    alone = evaluate(load_detector(longer), splits.val, ViewSettings(size=64), batch_size=3)
    assert max(alone.metrics.values()) > 0, "zeros would be equal anyhow"
    for world in (2, 4):
        arguments = (world, str(tmp_path / f"store{world}"), str(longer), str(tmp_path))
        mp.start_processes(_score, arguments, nprocs=world, start_method="fork")
        for rank in range(world):
            metrics, per_class, images = json.loads((tmp_path / f"{rank}.json").read_text())
            assert metrics == pytest.approx(alone.metrics, abs=1e-9)
            assert per_class == pytest.approx(alone.per_class, abs=1e-9)
            assert images == alone.images == 8
