"""UniKD's claims in miniature, on the embedded digits: any teacher to any student, offline against online, ablations.

    uv run python benchmarks/universality.py --work runs/universality --out benchmarks/results/universality.json

Six detectors teach six students (the paper's table 2): alone, under FitNet as the paper improved it, and under UniKD, both from a
cache of each teacher's knowledge. Then a larger teacher online and offline (tables 3 and 4), and parts of UniKD taken away
(tables 6a, 6c, 6g). Everything runs as single-threaded processes, ``--jobs`` at a time; what is finished in ``--work`` is
not done again, and the results file is rewritten after every run, so the benchmark can be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from detdistill.compare import compare_runs

DATA = "digits:train=2000,val=400,size=128,seed=0"
VIEWS = ["--data", DATA, "--batch", "8", "--size", "128", "--flip", "0", "--device", "cpu", "--threads", "1"]
COMMON = [*VIEWS, "--in_memory", "true", "--report", "false", "--evaluate_every", "99"]
COMMON += ["--weight_decay", "0.01", "--schedule", "one_cycle"]
LARGE = "resnet10t,channels=32-64-128-256,neck=64,levels=3-5"
SMALL = "resnet10t,channels=16-32-64-128,stem=16,neck=64,levels=3-5"
TWO_STAGES = "proposals=100,rois=48,mlp=256"
DETR = "dim=64,queries=30,encoder=1,decoder=3,heads=4,ffn=256,two_stage=true,refine=true"


@dataclass(frozen=True)
class Kind:
    """One of the six detectors."""

    teacher: str
    student: str
    lr: float
    teacher_epochs: int
    epochs: int
    extra: tuple[str, ...] = ()


KINDS = {
    "retinanet": Kind(f"retinanet:{LARGE},convs=2", f"retinanet:{SMALL},convs=2", 3e-3, 8, 3),
    "atss": Kind(f"atss:{LARGE},convs=2", f"atss:{SMALL},convs=2", 3e-3, 5, 2),
    "faster_rcnn": Kind(f"faster_rcnn:{LARGE},{TWO_STAGES}", f"faster_rcnn:{SMALL},{TWO_STAGES}", 1e-3, 4, 2),
    "fcos": Kind(f"fcos:{LARGE},convs=2", f"fcos:{SMALL},convs=2", 3e-3, 5, 2),
    "reppoints": Kind(f"reppoints:{LARGE},convs=2", f"reppoints:{SMALL},convs=2", 3e-3, 5, 2),
    "deformable_detr": Kind(
        f"deformable_detr:resnet10t,channels=32-64-128-256,{DETR}",
        f"deformable_detr:resnet10t,channels=16-32-64-128,{DETR}",
        1e-3,
        20,
        8,
        ("--clip", "0.1"),
    ),
}
PAIRED = (  # three of them with the DETR on one side
    ("fcos", "fcos"),
    ("faster_rcnn", "fcos"),
    ("atss", "reppoints"),
    ("deformable_detr", "fcos"),
    ("deformable_detr", "atss"),
    ("fcos", "deformable_detr"),
)
"""Teacher and student of the cells with three seeds."""
METHODS = {"fitnet": "fitnet,variant=modified", "unikd": "unikd"}
ABLATIONS = {
    "content only (6a)": "unikd,positional_weight=0",
    "positional only (6a)": "unikd,content_weight=0",
    "weights 5, 5 (6c)": "unikd,content_weight=5,positional_weight=5",
    "weights 20, 20 (6c)": "unikd,content_weight=20,positional_weight=20",
    "adaptor 0 (6g)": "unikd,adaptor_layers=0",
    "adaptor 1 (6g)": "unikd,adaptor_layers=1",
    "adaptor 3 (6g)": "unikd,adaptor_layers=3",
}
"""Of FCOS under FCOS; with both kinds, weights 10 and two layers it is the cell of the grid."""


@dataclass
class Task:
    """One command, and the folder that shows it is done."""

    name: str
    command: list[str]
    done: Path
    after: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)


def detdistill(*words: object) -> list[str]:
    return [sys.executable, "-m", "detdistill", *map(str, words)]


def tasks(work: Path, seeds: Sequence[int], wanted: Sequence[str], ablations: bool) -> Iterator[Task]:
    """All of them, in the order of their worth."""
    stages = ["--stages", work / "stages"]
    for name in wanted:
        kind, out = KINDS[name], work / f"teacher-{name}"
        settings = [*COMMON, "--lr", kind.lr, "--epochs", kind.teacher_epochs, *kind.extra]
        yield Task(
            f"teacher-{name}", detdistill("train", "--model", kind.teacher, "--role", "teacher", *settings, "--out", out), out
        )
        cache = work / f"cache-{name}"
        settings = [*VIEWS, "--epochs", 3, "--store", "float16", *stages]
        method = "+".join(METHODS.values())
        yield Task(
            f"cache-{name}",
            detdistill("cache", "--teacher", out, "--method", method, *settings, "--out", cache),
            cache,
            (f"teacher-{name}",),
        )
    cells = [(teacher, student) for teacher in wanted for student in wanted]
    ordered = sorted(cells, key=lambda cell: (cell not in PAIRED, cell[1] == "deformable_detr"))
    for seed in seeds:
        for teacher, student in ordered:
            if seed != seeds[0] and (teacher, student) not in PAIRED:
                continue
            yield from cell(work, teacher, student, seed, METHODS)
    if ablations:
        for number, (_, method) in enumerate(ABLATIONS.items()):
            yield from cell(work, "fcos", "fcos", seeds[0], {f"ablation{number}": method})


def cell(work: Path, teacher: str, student: str, seed: int, methods: dict[str, str]) -> Iterator[Task]:
    """The baseline of a student, and its distilled runs under a teacher."""
    kind = KINDS[student]
    settings = [*COMMON, "--lr", kind.lr, "--epochs", kind.epochs, "--seed", seed, *kind.extra]
    out = work / f"baseline-{student}-seed{seed}"
    yield Task(out.name, detdistill("train", "--model", kind.student, "--role", "baseline", *settings, "--out", out), out)
    for name, method in methods.items():
        out = work / f"{name}-{teacher}-{student}-seed{seed}"
        source = ["--cache", work / f"cache-{teacher}", "--method", method, "--stages", work / "stages"]
        yield Task(
            out.name,
            detdistill("distill", "--student", kind.student, *source, *settings, "--out", out),
            out,
            (f"cache-{teacher}",),
        )


def finished(task: Task) -> bool:
    if task.name.startswith("cache-"):
        return (task.done / "finished").exists()
    return (task.done / "summary.json").exists()


def run(todo: list[Task], jobs: int, work: Path, note: Any) -> None:
    """``jobs`` at a time; a task waits for those it builds on. A failed one is told, and what needs it is left out."""
    done = {task.name for task in todo if finished(task)}
    waiting, running, failed = [task for task in todo if task.name not in done], [], set()
    (work / "logs").mkdir(parents=True, exist_ok=True)
    while waiting or running:
        for task in list(waiting):
            if failed.intersection(task.after):
                failed.add(task.name)
                waiting.remove(task)
            elif len(running) < jobs and done.issuperset(task.after):
                resume = ["--resume", "true"] if (task.done / "config.yaml").exists() else []
                with (work / "logs" / f"{task.name}.txt").open("wb") as log:
                    task.process = subprocess.Popen(
                        [*task.command, *resume], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
                    )
                waiting.remove(task)
                running.append(task)
        for task in list(running):
            assert task.process is not None
            code = task.process.poll()
            if code is None:
                continue
            running.remove(task)
            if code == 0 and task.name.startswith("cache-"):
                (task.done / "finished").touch()
            (done if code == 0 else failed).add(task.name)
            print(f"{time.strftime('%H:%M')} {task.name}: {'done' if code == 0 else 'FAILED, see logs'}", flush=True)
            note()
        time.sleep(0.5)


def ap(folder: Path) -> float | None:
    path = folder / "summary.json"
    return round(100 * json.loads(path.read_text())["metrics"]["AP"], 1) if path.exists() else None


def results(work: Path, seeds: Sequence[int], wanted: Sequence[str]) -> dict[str, Any]:
    """What there is so far."""
    grid = {
        student: {
            "baseline": ap(work / f"baseline-{student}-seed{seeds[0]}"),
            **{t: {m: ap(work / f"{m}-{t}-{student}-seed{seeds[0]}") for m in METHODS} for t in wanted},
        }
        for student in wanted
    }
    paired = []
    for teacher, student in PAIRED:
        for method in METHODS:
            pairs = [
                (work / f"baseline-{student}-seed{seed}", work / f"{method}-{teacher}-{student}-seed{seed}") for seed in seeds
            ]
            runs = [run for pair in pairs if all((run / "summary.json").exists() for run in pair) for run in pair]
            if runs:
                for gain in compare_runs(runs):
                    paired.append({"teacher": teacher, "student": student, "method": method, **asdict(gain)})
    ablation = {name: ap(work / f"ablation{i}-fcos-fcos-seed{seeds[0]}") for i, name in enumerate(ABLATIONS)}
    return {
        "what": "AP of students on the embedded digits (2000 training, 400 validation images of 128 pixels)",
        "command": "uv run python benchmarks/universality.py --work runs/universality --out benchmarks/results/universality.json",
        "kinds": {name: asdict(KINDS[name]) for name in wanted},
        "teachers": {name: ap(work / f"teacher-{name}") for name in wanted},
        "seed": seeds[0],
        "grid": grid,
        "paired": paired,
        "ablations": ablation,
    }


def table(found: dict[str, Any]) -> str:
    """The paper's table 2 in Markdown."""
    names = list(found["teachers"])
    lines = ["| student (alone) | method | " + " | ".join(f"{name} {found['teachers'][name]}" for name in names) + " |"]
    lines.append("|" + " --- |" * (len(names) + 2))
    for student, row in found["grid"].items():
        for index, method in enumerate(METHODS):
            first = f"{student} ({row['baseline']})" if index == 0 else ""
            lines.append(f"| {first} | {method} | " + " | ".join(str(row[name][method]) for name in names) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--no-ablations", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="only print the commands")
    chosen = parser.parse_args()
    todo = list({task.name: task for task in tasks(chosen.work, chosen.seeds, chosen.kinds, not chosen.no_ablations)}.values())
    if chosen.list:
        print(*(shlex.join(task.command) for task in todo), sep="\n")
        return

    def note() -> None:
        found = results(chosen.work, chosen.seeds, chosen.kinds)
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(found, indent=2) + "\n")
        chosen.out.with_suffix(".md").write_text(table(found))

    run(todo, chosen.jobs, chosen.work, note)
    note()
    print(table(results(chosen.work, chosen.seeds, chosen.kinds)))


if __name__ == "__main__":
    main()
