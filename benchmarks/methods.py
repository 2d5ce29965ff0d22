"""Methods on the embedded digits: one teacher, the same student, paired seeds, the demo's settings.

    uv run python benchmarks/methods.py --work runs/methods --out benchmarks/results/methods_digits.json

Finished runs in ``--work`` are not repeated. Loss weights are the published ones for FCOS and similar students.
"""

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import detdistill
from detdistill.compare import compare_runs, read_run, show_gains
from detdistill.demo import SETTINGS, STUDENT, TEACHER
from detdistill.report.runs import distillation_terms, read
from detdistill.report.words import kd_share

METHODS = (
    "pkd",
    "fitnet",
    "cwd",
    "mgd",
    "fkd,profile=one_stage",
    "fgd,profile=anchor_free",
    "skd",
    "glamd",
    "frs,profile=fcos",
    "fgfi,form=fpn,weight=3",
    "defeat",
    "drkd,profile=one_stage",
    "icd",
    "pgd",
    "tbd",
    "rm_pfi",
    "bckd",
    "mimic,two_stage=false",
    "dsig,profile=one_stage",
    "odkd,rcn_weight=0",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--teacher-epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    teacher = chosen.work / "teacher"
    if not (teacher / "summary.json").exists():
        resume = (teacher / "config.yaml").exists()
        detdistill.train(TEACHER, "digits", role="teacher", out=teacher, epochs=chosen.teacher_epochs, resume=resume, **SETTINGS)
    runs: list[Path] = []
    for index, method in enumerate(chosen.methods):
        folder = chosen.work / method.replace(",", "_").replace("=", "-")
        result = detdistill.distill(
            str(teacher),
            STUDENT,
            "digits",
            method,
            out=folder,
            resume=folder.exists(),
            epochs=chosen.epochs,
            seeds=tuple(chosen.seeds),
            baseline=index == 0,  # one baseline per seed, for all methods
            jobs=chosen.jobs,
            report=False,
            **SETTINGS,
        )
        runs += result.runs
        gains = compare_runs(runs)
        write(chosen, runs, gains)  # after each method, so that an interrupted benchmark leaves its results
    show_gains(gains)


def share(folder: Path) -> float | None:
    """Share of the distillation terms in the gradient, mean over the second half of the training; None: no such terms."""
    one = read(folder)
    return kd_share(one, distillation_terms(one, []))


def write(chosen: argparse.Namespace, runs: list[Path], gains: list) -> None:
    """Write the results so far."""
    summaries = [read_run(run) for run in runs]
    teacher = read_run(chosen.work / "teacher")
    content = {
        "what": "digits, 2000 training and 400 validation images of 128 pixels; student from random weights",
        "command": "uv run python "
        + shlex.join(sys.argv)
        .replace(str(chosen.work), "runs/methods")
        .replace(str(chosen.out), "benchmarks/results/" + chosen.out.name),
        "seeds": chosen.seeds,
        "teacher": {"model": TEACHER, "AP": teacher["metrics"]["AP"], "epochs": teacher["epochs"]},
        "student": {"model": STUDENT, "epochs": chosen.epochs},
        "gains": [{**asdict(gain), "teacher": "teacher"} for gain in gains],
        "runs": [
            {key: run[key] for key in ("role", "method", "seed", "metrics", "seconds")} | {"share": share(run["folder"])}
            for run in summaries
        ],
        "hardware": summaries[0]["hardware"],
        "versions": summaries[0]["versions"],
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
