"""The doctor's forecast of a run's seconds against the run itself, one after the other in one process.

    OMP_NUM_THREADS=1 uv run python benchmarks/doctor.py --out benchmarks/results/doctor_cpu.json

The teacher has random weights: its speed is that of a trained one. The run is distilled online, then from a cache. ``ratio`` is
the forecast divided by the measured seconds of a run (its training and evaluations).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from detdistill import api
from detdistill.data.discover import load_data
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.doctor.case import Case
from detdistill.doctor.cost import estimate
from detdistill.progress import Progress
from detdistill.settings import DistillSettings
from detdistill.training.machine import hardware, versions
from detdistill.training.plan import Plan

TEACHER = "fcos:resnet10t,channels=32-64-128-256,neck=64,levels=3-5,convs=2"
STUDENT = "fcos:resnet10t,channels=16-32-64-128,stem=16,neck=64,levels=3-5,convs=2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--teacher", default=TEACHER, help="model string")
    parser.add_argument("--student", default=STUDENT, help="model string")
    parser.add_argument("--method", default="pkd")
    parser.add_argument("--data", default="digits:train=400,val=80,size=128,seed=0")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    chosen = parser.parse_args()
    common: dict[str, Any] = {"size": chosen.size, "batch": chosen.batch, "epochs": 1, "device": "cpu", "monitor_every": 0}
    splits = load_data(chosen.data)
    teacher = build_detector(chosen.teacher, splits.classes)
    settings = DistillSettings(method=chosen.method, **common)
    plan = Plan(chosen.student, chosen.data, settings, role="distilled", teacher="own:teacher")
    with Progress(quiet=True) as progress, tempfile.TemporaryDirectory() as scratch:
        case = Case(plan, splits, Teacher(teacher), None, {}, "cpu", 100, 15, progress)
        found = estimate(case)
        measured = {}
        for name, cache in (("online", None), ("cached", f"{scratch}/cache")):
            if cache is not None:
                views = {key: common[key] for key in ("size", "batch", "device")}
                api.cache(teacher, cache, chosen.data, chosen.method, progress=progress, **views)
            result = api.distill(
                teacher, chosen.student, chosen.data, chosen.method, cache=cache, out=Path(scratch) / name, report=False,
                score_teacher=False, progress=progress, **common,
            )  # fmt: skip
            measured[name] = json.loads((result.folder / "summary.json").read_text())["seconds"]
    forecast = {"online": found.online_seconds, "cached": found.cached_seconds}
    content = {
        "what": f"{chosen.method}: {chosen.student} under {chosen.teacher}, {chosen.data}, {found.steps} steps",
        "command": "uv run python benchmarks/doctor.py " + shlex.join(sys.argv[1:]),
        "forecast_seconds": {name: round(value, 1) for name, value in forecast.items()},
        "measured_seconds": measured,
        "ratio": {name: round(forecast[name] / measured[name], 3) for name in forecast},
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": versions(),
    }
    print(json.dumps(content, indent=2))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
