"""Cost of ``--balance`` in a training step: measurements beside plain steps, in one process, as a ratio.

    OMP_NUM_THREADS=1 uv run python benchmarks/balance.py --out benchmarks/results/balance_cpu.json

For each method string, a step from a cache (what is taught is ready, so the step is as short as it can be) and a measurement of
the gradient norms on the same losses alternate. ``cost`` is the measurement divided by the step and by the number of steps
between measurements; ``cost_of_1000_steps`` counts the extra measurements of the first steps too. Processor time with one
thread, otherwise wall time; medians.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from detdistill.data.discover import load_data
from detdistill.data.loader import DetectionLoader
from detdistill.data.transforms import ViewSettings
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.methods.shared.compose import build_method
from detdistill.settings import TrainSettings
from detdistill.structures import Clock
from detdistill.training.balance import FIRST_STEPS, STEPS_PER_NORM, Balance
from detdistill.training.machine import hardware, versions
from detdistill.training.optimizers import build_optimizer

METHODS = ("pkd", "fgd,profile=anchor_free", "pkd+mgd", "pkd+mgd+cwd")


def cost(names: tuple[str, str], methods: str, size: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step and of a measurement, alternating, and the cost for each step."""
    splits = load_data(f"digits:train={batch_size},val={batch_size},size={size},seed=0")
    batch = next(iter(DetectionLoader(splits.train, ViewSettings(size=size), batch_size, train=True)))
    teacher = Teacher(build_detector(names[0], splits.classes))
    student = build_detector(names[1], splits.classes).train()
    method = build_method(methods, teacher, student)
    stage, taught = method.stages(student)[-1], method.teach(batch)
    optimizer = build_optimizer([student, method], TrainSettings(lr=1e-5))
    weights = [p for p in student.parameters() if p.requires_grad]
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    balance = Balance(0.3, method.members)
    seconds: dict[str, list[float]] = {"step": [], "measurement": []}
    for index in range(rounds + 2):
        started = now()
        losses = stage.step(batch, taught, Clock(1, 10))
        half = now()
        balance.measure(losses, weights)
        measured = now()
        losses.total().backward()
        torch.nn.utils.clip_grad_norm_(weights, 5.0)
        optimizer.step()
        optimizer.zero_grad()
        if index > 1:  # the first measurement also looks for terms without the student; both warm up
            seconds["measurement"].append(measured - half)
            seconds["step"].append(now() - measured + half - started)
    step, measurement = (statistics.median(seconds[name]) for name in ("step", "measurement"))
    interval = STEPS_PER_NORM * (1 + len(balance.members))
    often = sum(balance.due(number) for number in range(1000))
    return {
        "method": methods,
        "cost": round(measurement / step / interval, 5),
        "cost_of_1000_steps": round(often * measurement / step / 1000, 5),
        "interval": interval,
        "first_steps": FIRST_STEPS,
        "step": round(step, 4),
        "measurement": round(measurement, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--teacher", default="fcos:resnet18,convs=2", help="model string")
    parser.add_argument("--student", default="fcos:resnet18,convs=2", help="model string")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="method strings")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--batch", type=int, default=4)
    chosen = parser.parse_args()
    rows = []
    for methods in chosen.methods:
        rows.append(cost((chosen.teacher, chosen.student), methods, chosen.size, chosen.batch, chosen.rounds))
        print(rows[-1], flush=True)
    content = {
        "what": f"{chosen.student} from a cache of {chosen.teacher}, {chosen.size} pixels, batch {chosen.batch}, float32",
        "command": "OMP_NUM_THREADS=1 uv run python benchmarks/balance.py " + shlex.join(sys.argv[1:]),
        "rows": rows,
        "hardware": hardware(),
        "versions": versions(),
    }
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
