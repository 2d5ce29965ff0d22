"""Specialists for one student, new classes without forgetting, and a sequence of teachers: digits at 96 pixels, paired seeds.

    uv run python benchmarks/several_teachers.py --work runs/several --out benchmarks/results/several_teachers.json

``new_classes``: a detector of the digits 0 to 4 is the teacher; the training images are labelled for 5 to 9 only, the student
starts from the teacher and has all ten classes. The baseline is plain fine-tuning. ``specialists``: two teachers of five digits
each; half of the training images are labelled for each. ``sequence``: under a small and then a large teacher, under the large one
alone, or under the student's own average, with an equal number of steps. The methods of a part share its baselines. Finished runs
in ``--work`` are not repeated, so an interrupted benchmark can be continued.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import detdistill
from detdistill.compare import compare_runs, read_run

STUDENT = "fcos:resnet10t,channels=16-32-64-128,stem=16,neck=64,levels=3-5,convs=2"
SMALL = "fcos:resnet10t,channels=24-48-96-192,neck=64,levels=3-5,convs=2"
LARGE = "fcos:resnet10t,channels=32-64-128-256,neck=64,levels=3-5,convs=2"
LOW, HIGH = "0/1/2/3/4", "5/6/7/8/9"
TRAINING = {"size": 96, "batch": 8, "lr": 3e-3, "in_memory": True, "threads": 1, "evaluate_every": 10, "monitor_every": 0}
PARTS = ("new_classes", "specialists", "sequence")


def digits(chosen: argparse.Namespace, seed: int, classes: str = "") -> str:
    """A data set; other seeds have other images, the val images of seed 0 are those of every part."""
    text = f"digits:train={chosen.images},val={chosen.val_images},size=96,seed={seed}"
    return f"{text},classes={classes}" if classes else text


def trained(chosen: argparse.Namespace, name: str, model: str, data: str, steps: int) -> Path:
    """The folder of a detector that was trained alone."""
    folder = chosen.work / name
    if not (folder / "summary.json").exists():
        resume = (folder / "config.yaml").exists()
        detdistill.train(
            model, data, role="teacher", out=folder, steps=steps, seed=100, report=False, resume=resume, **settings(chosen)
        )
    return folder


def settings(chosen: argparse.Namespace) -> dict[str, Any]:
    return {**TRAINING, "device": chosen.device}


def distilled(chosen: argparse.Namespace, name: str, teacher: str, data: str, method: str, **further: Any) -> list[Path]:
    """The folders of distilled runs, with ``baseline`` also of their baselines."""
    folder = chosen.work / name
    own = {"seeds": tuple(chosen.seeds), "steps": chosen.steps, "stages": str(chosen.work / "stages"), **further}
    done = detdistill.distill(
        teacher, STUDENT, data, method, out=folder, report=True, resume=folder.exists(), **settings(chosen), **own
    )
    return list(done.runs)


def new_classes(chosen: argparse.Namespace) -> dict[str, list[Path]]:
    """Old detector as teacher and start, labels for new classes only."""
    old = digits(chosen, 0, LOW)
    teacher = trained(chosen, "old", STUDENT, old, chosen.teacher_steps)
    data = f"{digits(chosen, 1, HIGH)}+val={old}"
    found = {}
    for mode in ("label", "ignore", "background"):
        further = {"unlabelled": mode, "init": str(teacher), "baseline": mode == "label"}
        found[f"pkd, {mode}"] = distilled(chosen, f"new-{mode}", str(teacher), data, "pkd", **further)
    return found


def specialists(chosen: argparse.Namespace) -> dict[str, list[Path]]:
    """Two teachers of five classes each for a student of ten."""
    low, high = digits(chosen, 0, LOW), digits(chosen, 1, HIGH)
    first = trained(chosen, "low", LARGE, low, chosen.teacher_steps)
    second = trained(chosen, "high", LARGE, high, chosen.teacher_steps)
    found = {}
    for mode in ("label", "ignore", "background"):
        teachers = f"low={first},high={second}"
        name = f"pkd@low+pkd@high, {mode}"
        further = {"unlabelled": mode, "baseline": mode == "label"}
        found[name] = distilled(chosen, f"union-{mode}", teachers, f"{low}+{high}", "pkd@low+pkd@high", **further)
    return found


def sequence(chosen: argparse.Namespace) -> dict[str, list[Path]]:
    """A small and then a large teacher, and the large one alone."""
    data = digits(chosen, 0)
    small = trained(chosen, "small", SMALL, data, chosen.teacher_steps)
    large = trained(chosen, "large", LARGE, data, chosen.teacher_steps)
    return {
        "pkd@small>pkd@large": distilled(
            chosen, "sequence", f"small={small},large={large}", data, "pkd@small>pkd@large", baseline=True
        ),
        "pkd": distilled(chosen, "large-alone", str(large), data, "pkd"),
        "pkd, self:ema": distilled(chosen, "self", "self:ema", data, "pkd"),
    }


def numbers(runs: Sequence[Path]) -> dict[str, Any]:
    """AP of each seed of baselines and distilled runs, on all classes, 0 to 4 and 5 to 9; and the gain with its interval."""
    found: dict[str, Any] = {}
    for role in ("baseline", "distilled"):
        summaries = [one for one in map(read_run, runs) if one["role"] == role]
        found[role] = {"all": [one["metrics"]["AP"] for one in summaries]}
        for name, classes in (("0-4", LOW), ("5-9", HIGH)):
            found[role][name] = [statistics.fmean(one["per_class"][digit] for digit in classes.split("/")) for one in summaries]
    (gain,) = compare_runs(list(runs))
    return {**found, "gain": gain.mean, "low": gain.low, "high": gain.high, "verdict": gain.verdict}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--val-images", type=int, default=200)
    parser.add_argument("--teacher-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    results: dict[str, Any] = {}
    for part in chosen.parts:
        runs = {"new_classes": new_classes, "specialists": specialists, "sequence": sequence}[part](chosen)
        baselines = [folder for folders in runs.values() for folder in folders if read_run(folder)["role"] == "baseline"]
        results[part] = {name: numbers(list(dict.fromkeys([*baselines, *folders]))) for name, folders in runs.items()}
        for name, found in results[part].items():
            for role in ("baseline", "distilled"):
                shown = ", ".join(f"{key} {100 * statistics.fmean(found[role][key]):.1f}" for key in ("all", "0-4", "5-9"))
                print(f"{part}: {name}: {role}: {shown}")
    command = f"python benchmarks/several_teachers.py {shlex.join(sys.argv[1:])}"
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps({"command": command, "training": TRAINING, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
