"""Processor time of a whole distillation, from start to report: this checkout against another, in turns, one thread.

    OMP_NUM_THREADS=1 uv run python benchmarks/whole_runs.py --other ../old --out benchmarks/results/whole_runs_cpu.json

The run is like the demo's: ``digits`` at 128 pixels, 300 steps of 8 images, FCOS with a ResNet-18 over a compact FCOS, PKD, one
evaluation at the end, the report. The teacher is trained once by this checkout, for ``--teacher_epochs`` epochs; both distil from
its ``student/`` folder. Each checkout keeps what it scored and read in a cache folder of its own, which one run fills before the
measured ones. The APs of all runs are written too.

``time`` is the processor time of the process and all its children; ``ratio`` the median over rounds of this checkout's / the
other's. ``first`` is the ratio of the two runs that filled the caches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from detdistill.training.machine import hardware, versions

ROOT = Path(__file__).resolve().parents[1]
DATA = "digits:train=800,val=200,size=128,seed=0"
TEACHER = "fcos:resnet18,neck=64,levels=3-5,convs=2"
STUDENT = "fcos:resnet10t,channels=16-32-64-128,stem=16,neck=64,levels=3-5,convs=2"
COMMON = (
    *("--batch", "8", "--size", "128", "--flip", "0", "--lr", "3e-3", "--schedule", "one_cycle", "--channels_last", "true"),
    *("--in_memory", "true", "--device", "cpu", "--workers", "0"),
)


def measured(root: Path, cache: Path, words: list[str]) -> float:
    """Processor seconds of a command of a checkout and of its children.

    Raises:
        SystemExit: the command failed.
    """
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "DETDISTILL_CACHE": str(cache), "PYTHONDONTWRITEBYTECODE": ""}
    before = os.times()
    done = subprocess.run([sys.executable, "-m", "detdistill", *words], env=environment, cwd=root, capture_output=True, text=True)
    after = os.times()
    if done.returncode:
        raise SystemExit(f"{root}: detdistill {' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Measure, print, and write the file after each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="another checkout of the project")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--teacher_epochs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        teacher = ["train", "--role", "teacher", "--model", TEACHER, "--data", DATA, "--out", str(work / "teacher")]
        measured(ROOT, work / "cache this", [*teacher, "--epochs", str(chosen.teacher_epochs), *COMMON])
        found: dict[str, Any] = {"times": {"this": [], "other": []}, "aps": {"this": [], "other": []}}
        for number in range(chosen.rounds + 1):
            for name, root in (("this", ROOT), ("other", chosen.other.resolve())):
                out = work / f"{name} {number}"
                words = ["distill", "--teacher", str(work / "teacher"), "--student", STUDENT, "--data", DATA, "--method", "pkd"]
                seconds = measured(root, work / f"cache {name}", [*words, "--steps", "300", "--out", str(out), *COMMON])
                found["times"][name].append(round(seconds, 2))
                found["aps"][name].append(json.loads((out / "summary.json").read_text())["metrics"]["AP"])
            ratios = [mine / theirs for mine, theirs in zip(found["times"]["this"], found["times"]["other"], strict=True)]
            found |= {"first": round(ratios[0], 3), "ratio": round(statistics.median(ratios[1:] or ratios), 3)}
            print(
                f"{found['ratio']:6.3f}  {found['times']['this'][-1]:7.2f} / {found['times']['other'][-1]:7.2f} seconds",
                flush=True,
            )
            if chosen.out:
                described = {"hardware": hardware(), "versions": versions(), "rounds": number}
                chosen.out.write_text(json.dumps({**described, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
