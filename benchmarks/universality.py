"""UniKD's claims at small scale, on the built-in digits: any teacher to any student, offline and online, ablations.

    uv run python benchmarks/universality.py --work runs/universality --out benchmarks/results/universality.json

Six students under six teachers (the paper's table 2): alone, under FitNet as modified in the paper, and under UniKD, both from a
cache of each teacher's knowledge. Then a larger teacher online and offline (tables 3 and 4), and UniKD without some of its parts
(tables 6a, 6c, 6g). Each run has one thread, and ``--jobs`` run at a time. Finished runs in ``--work`` are not repeated, and the
results are rewritten after every run, so the benchmark can be stopped at any time.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _runs import GAIN_COLUMNS, Kind, Task, ap, filling, gain_cells, machine, markdown, read, run, write
from detdistill.compare import compare_runs

DATA = "digits:train=2000,val=300,size=96,seed=0"
VIEWS = ("--data", DATA, "--batch", 8, "--size", 96, "--flip", 0, "--device", "cpu", "--threads", 1)
COMMON: tuple[object, ...] = (*VIEWS, "--in_memory", "true", "--report", "false", "--evaluate_every", 99)
COMMON += ("--weight_decay", 0.01, "--schedule", "one_cycle")
ANCHORS = "anchors=2"
"""The digits are 10 to 28 pixels wide; by default, the smallest anchors of stride 8 have 32 pixels."""
LEARNT = ("--epochs", 3)
"""Epochs for making a cache; UniKD's extractors are trained for 1.25 times as many."""
LARGE = "resnet10t,channels=32-64-128-256,neck=64,levels=3-5"
SMALL = "resnet10t,channels=16-32-64-128,stem=16,neck=64,levels=3-5"
TWO_STAGES = "proposals=100,rois=48,mlp=256"
DETR = "dim=64,queries=30,encoder=1,decoder=3,heads=4,ffn=256,two_stage=true,refine=true"


KINDS = {
    "retinanet": Kind(f"retinanet:{LARGE},convs=2,{ANCHORS}", f"retinanet:{SMALL},convs=2,{ANCHORS}", 3e-3, 1500, 400),
    "atss": Kind(f"atss:{LARGE},convs=2", f"atss:{SMALL},convs=2", 3e-3, 1250, 400),
    "faster_rcnn": Kind(f"faster_rcnn:{LARGE},{TWO_STAGES}", f"faster_rcnn:{SMALL},{TWO_STAGES}", 1e-3, 1250, 400),
    "fcos": Kind(f"fcos:{LARGE},convs=2", f"fcos:{SMALL},convs=2", 3e-3, 1250, 400),
    "reppoints": Kind(f"reppoints:{LARGE},convs=2", f"reppoints:{SMALL},convs=2", 3e-3, 2500, 400),
    "deformable_detr": Kind(
        f"deformable_detr:resnet10t,channels=32-64-128-256,{DETR}",
        f"deformable_detr:resnet10t,channels=16-32-64-128,{DETR}",
        *(2e-3, 2500, 500, 1.0),
    ),
}
PAIRED = (  # three of them have the DETR on one side
    ("fcos", "fcos"),
    ("faster_rcnn", "fcos"),
    ("retinanet", "atss"),
    ("deformable_detr", "fcos"),
    ("deformable_detr", "atss"),
    ("fcos", "deformable_detr"),
)
"""Pairs of teacher and student that are run with three seeds."""
UNIKD = "unikd,queries=100,extractor_lr=2e-3"
"""Images with six objects need few queries. With the published rate of 2e-4, extractors learn little in a thousand steps."""
METHODS = {"fitnet": "fitnet,variant=modified", "unikd": UNIKD}
ABLATIONS = {
    "content only (6a)": f"{UNIKD},positional_weight=0",
    "positional only (6a)": f"{UNIKD},content_weight=0",
    "weights 5, 5 (6c)": f"{UNIKD},content_weight=5,positional_weight=5",
    "weights 20, 20 (6c)": f"{UNIKD},content_weight=20,positional_weight=20",
    "adaptor 0 (6g)": f"{UNIKD},adaptor_layers=0",
    "adaptor 1 (6g)": f"{UNIKD},adaptor_layers=1",
    "adaptor 3 (6g)": f"{UNIKD},adaptor_layers=3",
}
"""Variants for FCOS under FCOS. The unchanged method (both kinds of embeddings, weights 10, two layers) is in the grid."""
BIG = Kind("fcos:resnet18,neck=128,levels=3-5", KINDS["atss"].student, 2e-3, 1250, 400)
"""The large teacher of tables 3 and 4, and its student."""
FLAT = f"{UNIKD},adaptor_layers=0"
"""UniKD without attention layers in the adaptor, for FCOS under every teacher; they are hard to train in a short run."""
PARTS = ("grid", "paired", "stores", "ablations", "offline", "adaptor")


def teaching(work: Path, name: str, model: str, kind: Kind) -> list[Task]:
    """Tasks of a teacher: its training, and the cache of its knowledge."""
    out, cache = work / f"teacher-{name}", work / f"cache-{name}"
    learn = ("--lr", kind.lr, "--steps", kind.teacher_steps, "--clip", kind.clip, "--role", "teacher")
    method = ("--method", "+".join(METHODS.values()), "--stages", work / "stages")
    return [
        Task.of(out, "train", "--model", model, *COMMON, *learn),
        Task.of(cache, "cache", "--teacher", out, *method, "--store", "float32", *VIEWS, *LEARNT, after=[out]),
    ]


def settings(kind: Kind, seed: int) -> tuple[object, ...]:
    return (*COMMON, "--lr", kind.lr, "--steps", kind.steps, "--clip", kind.clip, "--seed", seed)


def alone(work: Path, student: str, seed: int) -> Path:
    return work / f"baseline-{student}-seed{seed}"


def taught(work: Path, method: str, teacher: str, student: str, seed: int) -> Path:
    return work / f"{method}-{teacher}-{student}-seed{seed}"


def cell(work: Path, teacher: str, student: str, seed: int, methods: dict[str, str] = METHODS) -> Iterator[Task]:
    """Tasks of a student: its baseline, and its distilled runs under one teacher."""
    kind, cache = KINDS[student], work / f"cache-{teacher}"
    yield Task.of(alone(work, student, seed), "train", "--model", kind.student, "--role", "baseline", *settings(kind, seed))
    for name, method in methods.items():
        source = ("--student", kind.student, "--cache", cache, "--method", method, "--stages", work / "stages")
        yield Task.of(taught(work, name, teacher, student, seed), "distill", *source, *settings(kind, seed), after=[cache])


def tasks(work: Path, seeds: Sequence[int], kinds: Sequence[str], parts: Sequence[str]) -> list[Task]:
    """All tasks, the most important first."""
    found: list[Task] = []
    for name in kinds:
        found += teaching(work, name, KINDS[name].teacher, KINDS[name])
    cells = [(teacher, student) for teacher in kinds for student in kinds]
    cells.sort(key=lambda pair: pair not in PAIRED)
    if "grid" in parts:  # RepPoints is the slowest student, because of its deformable convolutions
        found += [task for pair in cells if pair[1] != "reppoints" for task in cell(work, *pair, seeds[0])]
    if "paired" in parts:
        found += [task for seed in seeds[1:] for pair in cells if pair in PAIRED for task in cell(work, *pair, seed)]
    if "grid" in parts:
        found += [task for pair in cells if pair[1] == "reppoints" for task in cell(work, *pair, seeds[0])]
    if "stores" in parts:
        found += stores(work, seeds)
    if "ablations" in parts:
        numbered = {f"ablation{number}": method for number, method in enumerate(ABLATIONS.values())}
        found += cell(work, "fcos", "fcos", seeds[0], numbered)
    if "adaptor" in parts:
        found += [task for teacher in kinds for task in cell(work, teacher, "fcos", seeds[0], {"flat": FLAT})]
    return found + (offline(work, seeds[0]) if "offline" in parts else [])


def stores(work: Path, seeds: Sequence[int]) -> list[Task]:
    """Tasks for FCOS under FCOS from a cache with the number format of ``auto``; the caches of the grid are float32."""
    teacher, cache, kind = work / "teacher-fcos", work / "cache-fcos-auto", KINDS["fcos"]
    shared = ("--stages", work / "stages")
    fill = ("--teacher", teacher, "--method", "+".join(METHODS.values()), "--store", "auto", *shared, *VIEWS, *LEARNT)
    found = [Task.of(cache, "cache", *fill, after=[teacher, work / "cache-fcos"])]
    for seed in seeds:
        for name, method in METHODS.items():
            words = ("--student", kind.student, "--cache", cache, "--method", method, *shared, *settings(kind, seed))
            found.append(Task.of(taught(work, f"auto-{name}", "fcos", "fcos", seed), "distill", *words, after=[cache]))
    return found


def offline(work: Path, seed: int) -> list[Task]:
    """Tasks for tables 3 and 4: one large teacher, online and from a cache for each method."""
    teacher = work / "teacher-big"
    found = [teaching(work, "big", BIG.teacher, BIG)[0]]
    for name, method in METHODS.items():
        cache, stages = work / f"cache-big-{name}", ("--stages", work / f"stages-big-{name}")
        ways = {"online": ("--teacher", teacher, "--score_teacher", "false"), "offline": ("--cache", cache)}
        fill = ("--teacher", teacher, "--method", method, "--store", "float16", *stages, *VIEWS, *LEARNT)
        found.append(Task.of(cache, "cache", *fill, after=[teacher]))
        for way, source in ways.items():
            out = work / f"{way}-{name}-seed{seed}"
            words = ("--student", BIG.student, *source, "--method", method, *stages, *settings(BIG, seed))
            found.append(Task.of(out, "distill", *words, after=[cache]))  # the cache trains the earlier stages of both
    return found


def results(work: Path, seeds: Sequence[int], kinds: Sequence[str]) -> dict[str, Any]:
    """Results of all runs that are finished so far."""
    seed = seeds[0]
    grid = {
        student: {
            "baseline": ap(alone(work, student, seed)),
            **{teacher: {name: ap(taught(work, name, teacher, student, seed)) for name in METHODS} for teacher in kinds},
        }
        for student in kinds
    }
    paired = []
    for teacher, student in PAIRED:
        for method in METHODS:
            pairs = [(alone(work, student, seed), taught(work, method, teacher, student, seed)) for seed in seeds]
            runs = [run for pair in pairs if all(read(run) for run in pair) for run in pair]
            for gain in compare_runs(runs) if runs else ():
                paired.append({**asdict(gain), "teacher": teacher, "student": student, "method": method})
    stored = {}
    for name in METHODS:
        pairs = [(taught(work, name, "fcos", "fcos", seed), taught(work, f"auto-{name}", "fcos", "fcos", seed)) for seed in seeds]
        stored[name] = [{"float32": ap(one), "auto": ap(other)} for one, other in pairs]
    big = {
        way: {
            name: {
                "AP": ap(out),
                "seconds": summary["seconds"],
                **({"cache": filling(work / f"cache-big-{name}")} if way == "offline" else {}),
            }
            for name in METHODS
            if (summary := read(out := work / f"{way}-{name}-seed{seed}")) is not None
        }
        for way in ("online", "offline")
    }
    teachers = {name: work / f"teacher-{name}" for name in kinds}
    return {
        "what": "AP of students on the embedded digits (2000 training, 300 validation images of 96 pixels), batch 8",
        "command": "uv run python benchmarks/universality.py --work runs/universality --out benchmarks/results/universality.json",
        "kinds": {name: asdict(KINDS[name]) for name in kinds},
        "methods": METHODS,
        "teachers": {name: ap(folder) for name, folder in teachers.items()},
        "caches": {name: filling(work / f"cache-{name}") for name in kinds},
        "seed": seed,
        "grid": grid,
        "paired": paired,
        "stores": {"caches": {"float32": filling(work / "cache-fcos"), "auto": filling(work / "cache-fcos-auto")}, "AP": stored},
        "ablations": {name: ap(taught(work, f"ablation{i}", "fcos", "fcos", seed)) for i, name in enumerate(ABLATIONS)},
        "adaptor": {
            teacher: {name: ap(taught(work, name, teacher, "fcos", seed)) for name in (*METHODS, "flat")} for teacher in kinds
        },
        "big_teacher": {"kind": asdict(BIG), "AP": ap(work / "teacher-big"), **big},
        **machine(list(teachers.values())),
    }


def tables(found: dict[str, Any]) -> str:
    """Table 2, the paired cells, tables 3 and 4, and table 6 in Markdown."""
    names, seed = list(found["teachers"]), found["seed"]
    rows: list[list[object]] = [["student (alone)", "method", *(f"{name} {found['teachers'][name]}" for name in names)]]
    for student, row in found["grid"].items():
        for index, method in enumerate(METHODS):
            rows.append([f"{student} ({row['baseline']})" if index == 0 else "", method, *(row[name][method] for name in names)])
    text = ["# UniKD between six detectors", "", f"{found['what']}. `fitnet` is `{METHODS['fitnet']}`, `unikd` is `{UNIKD}`.", ""]
    text += [f"## AP of every student under every teacher (in columns, with its AP), seed {seed}", "", *markdown(rows), ""]
    rows = [["teacher", "student", "method", *GAIN_COLUMNS]]
    rows += [[gain["teacher"], gain["student"], gain["method"], *gain_cells(gain)] for gain in found["paired"]]
    text += ["## Pairs with several seeds", "", *markdown(rows), ""]
    rows = [["FCOS under FCOS, seed " + str(seed), "AP"], ["unikd", found["grid"]["fcos"]["fcos"]["unikd"]]]
    text += ["## Parts and settings of UniKD", "", *markdown([*rows, *found["ablations"].items()]), ""]
    rows = [["FCOS under", "fitnet", "unikd", "unikd, no attention in the adaptor"]]
    text += markdown([*rows, *([teacher, *cells.values()] for teacher, cells in found["adaptor"].items())])
    rows = [["method", "seed", "AP from float32", "AP from auto"]]
    for name, pairs in found["stores"]["AP"].items():
        rows += [[name, seed, *pair.values()] for seed, pair in enumerate(pairs)]
    sizes = ", ".join(f"{name} {cache['megabytes']} MB" for name, cache in found["stores"]["caches"].items() if cache)
    text += ["", f"## From a smaller store: FCOS under FCOS ({sizes} for both methods)", "", *markdown(rows), ""]
    rows = [["way", "method", "AP", "run s", "cache filled in s", "cache MB"]]
    for way in ("online", "offline"):
        for name, run_ in found["big_teacher"][way].items():
            cache = run_.get("cache") or {"seconds": "", "megabytes": ""}
            rows.append([way, name, run_["AP"], round(run_["seconds"]), cache["seconds"], cache["megabytes"]])
    big = found["big_teacher"]
    text += [f"## Online and offline: {big['kind']['student']} under {big['kind']['teacher']} (AP {big['AP']})", ""]
    text += ["What UniKD learns beforehand is in the seconds: of the run online, of the cache offline.", "", *markdown(rows)]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--on", default="local", help="local, ray or ray://HOST:PORT")
    parser.add_argument("--list", action="store_true", help="only print the commands")
    chosen = parser.parse_args()
    todo = tasks(chosen.work, chosen.seeds, chosen.kinds, chosen.parts)
    if chosen.list:
        print(*dict.fromkeys(shlex.join(task.words) for task in todo), sep="\n")
        return

    def note() -> None:
        found = results(chosen.work, chosen.seeds, chosen.kinds)
        write(chosen.out, found)
        chosen.out.with_suffix(".md").write_text(tables(found))

    run(todo, chosen.jobs, chosen.work, note, chosen.on)
    note()
    print(tables(results(chosen.work, chosen.seeds, chosen.kinds)))


if __name__ == "__main__":
    main()
