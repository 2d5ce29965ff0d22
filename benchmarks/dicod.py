"""DICOD's main table at small scale: five students under an image classifier, alone and with FKD; and the cost of its crops.

    uv run python benchmarks/dicod.py --work runs/dicod --out benchmarks/results/dicod.json [--bccd PATH/TO/bccd]
    uv run python benchmarks/dicod.py --parts speed --work runs/dicod --out benchmarks/results/dicod.json

SSD, Faster R-CNN on three backbones and RetinaNet, each alone, under FKD (the teacher is a larger detector of the same family),
under DICOD (the teacher is a classifier of the objects) and under both, on the built-in digits. The two cheapest students have
three seeds; one student is also trained on blood cells, with three seeds. ``--parts`` chooses from ``digits``, ``seeds``,
``bccd`` and ``speed``. All models start from random weights, classifiers too. The paper has two classifiers (one trained with
cross-entropy, for SSDs; one also with focal loss, for all others); the first run that needs a classifier trains it. Finished runs
in ``--work`` are not repeated.

``speed`` is not a default part, because it needs a machine without other load. It writes ``dicod_steps_cpu.json`` beside
``--out``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from _runs import GAIN_COLUMNS, Task, ap, gain_cells, machine, markdown, read, run, write
from detdistill.compare import compare_runs
from detdistill.data.discover import load_data
from detdistill.data.loader import DetectionLoader
from detdistill.data.transforms import ViewSettings
from detdistill.detectors.build import build_detector
from detdistill.methods.dicod import DICOD as DICODMethod
from detdistill.methods.shared.compose import build_method
from detdistill.structures import Clock
from detdistill.training.machine import hardware, versions
from detdistill.training.metrics_table import read_rows
from detdistill.training.run import plain_stage

PARTS = ("digits", "seeds", "bccd", "speed")
DIGITS = ["--data", "digits:train=2000,val=300,size=96,seed=0", "--size", "96", "--flip", "0", "--weight_decay", "0.01"]
CELLS = ["--size", "192", "--resize", "short_side", "--max_size", "256", "--precision", "bf16", "--channels_last", "true"]
COMMON = ["--batch", "8", "--in_memory", "true", "--report", "false", "--evaluate_every", "99", "--monitor_every", "100"]
COMMON += ["--schedule", "one_cycle", "--device", "cpu", "--threads", "1"]
LARGE = "resnet10t,channels=32-64-128-256,neck=64"
SMALL = "resnet10t,channels=16-32-64-128,stem=16,neck=64"
TWO_STAGES = "neck=64,levels=3-5,proposals=50,rois=32,mlp=128"
EPOCHS, CELL_EPOCHS = 2, 6
"""Epochs of the students on the digits and on blood cells: the same for all students, so that they share the classifiers."""


@dataclass(frozen=True)
class Kind:
    """A kind of detector: its teacher under FKD, and its training settings."""

    teacher: str
    lr: float
    epochs: int
    """Epochs of the teacher."""
    fkd: str = "fkd,profile=one_stage"


KINDS = {
    "ssd": Kind(f"ssd:{LARGE},levels=3-7", 3e-3, 4),
    "retinanet": Kind(f"retinanet:{LARGE},levels=3-5,convs=1,anchors=2", 3e-3, 3),
    "faster_rcnn": Kind(f"faster_rcnn:resnet10t,channels=32-64-128-256,{TWO_STAGES}", 1e-3, 3, "fkd,profile=two_stage"),
}
STUDENTS = {
    "SSD": f"ssd:{SMALL},levels=3-7",
    "RetinaNet": f"retinanet:{SMALL},levels=3-5,convs=1,anchors=2",
    "Faster R-CNN QR50": f"faster_rcnn:resnet50,width=0.25,{TWO_STAGES}",
    "Faster R-CNN MV2": f"faster_rcnn:mobilenetv2_050,{TWO_STAGES}",
    "Faster R-CNN R50/2": f"faster_rcnn:resnet50,width=0.5,{TWO_STAGES}",
}
"""The digits are 10 to 28 pixels wide, RetinaNet's anchors on P3 from 16 pixels on. QR50 is the paper's quarter-width
ResNet-50; MobileNetV2 and ResNet-50 have half their widths here."""
SEVERAL_SEEDS = ("SSD", "RetinaNet")
ON_CELLS = "SSD"
DICOD = "dicod,classifier=test_resnet,size=32,max_crops=64,classifier_epochs=2,classifier_lr=0.1"
"""DICOD with the published loss weights. Crops and classifier (a ResNet of 0.37 M parameters) are as small as the objects; the
classifier learns faster than one pretrained on ImageNet. If a step has more than 64 positives, it takes a random sample."""
TIMED = {"RetinaNet": "retinanet:resnet18,neck=64", "Faster R-CNN": "faster_rcnn:resnet18,neck=64"}
BOUNDS = (256, 128, 64, 32, 16)


def kind_of(student: str) -> Kind:
    return KINDS[STUDENTS[student].partition(":")[0]]


def methods(student: str) -> dict[str, str]:
    """The methods of the table, by column after the baseline."""
    return {"fkd": kind_of(student).fkd, "dicod": DICOD, "dicod+fkd": f"{DICOD}+{kind_of(student).fkd}"}


def folder(work: Path, data: str, student: str, method: str, seed: int) -> Path:
    name = student.lower().replace(" ", "-").replace("/", "-")
    return work / f"{data}-{name}-{method.replace('+', '-')}-seed{seed}"


def cell(
    work: Path, data: str, where: Sequence[str], student: str, seed: int, epochs: int, before: Path | None
) -> Iterator[Task]:
    """Tasks of a student, alone and under each method; ``before``: the run that trains the classifier, if it is another one."""
    kind = kind_of(student)
    teacher = work / f"{data}-teacher-{kind.teacher.partition(':')[0]}"
    settings = [*where, *COMMON, "--lr", kind.lr, "--epochs", epochs, "--seed", seed]
    yield Task.of(
        folder(work, data, student, "baseline", seed), "train", "--model", STUDENTS[student], "--role", "baseline", *settings
    )
    first = before or folder(work, data, student, "dicod", seed)
    for name, method in methods(student).items():
        out = folder(work, data, student, name, seed)
        taught = ["--teacher", teacher, "--score_teacher", "false"] if "fkd" in name else []
        after = [*([teacher] if taught else []), *([first] if "dicod" in name and out != first else [])]
        words = ["--student", STUDENTS[student], *taught, "--method", method, "--stages", work / "stages"]
        yield Task.of(out, "distill", *words, *settings, after=after)


def teacher_of(work: Path, data: str, where: Sequence[str], kind: Kind, epochs: int) -> Task:
    out = work / f"{data}-teacher-{kind.teacher.partition(':')[0]}"
    words = ["train", "--model", kind.teacher, "--role", "teacher", *where, *COMMON, "--lr", kind.lr, "--epochs", epochs]
    return Task.of(out, *words)


def classifier_run(work: Path, student: str, seed: int) -> Path:
    """The run that trains the student's classifier on the digits: one for SSD, one for all others."""
    return folder(work, "digits", "SSD" if student == "SSD" else "RetinaNet", "dicod", seed)


def tasks(work: Path, seeds: Sequence[int], parts: Sequence[str], bccd: Path | None) -> Iterator[Task]:
    """All tasks."""
    if {"digits", "seeds"} & set(parts):
        for kind in KINDS.values():
            yield teacher_of(work, "digits", DIGITS, kind, kind.epochs)
        for seed in seeds if "seeds" in parts else seeds[:1]:
            for student in STUDENTS if seed == seeds[0] and "digits" in parts else SEVERAL_SEEDS:
                yield from cell(work, "digits", DIGITS, student, seed, EPOCHS, classifier_run(work, student, seeds[0]))
    if "bccd" in parts and bccd is not None:
        where = ["--data", str(bccd), *CELLS]
        yield teacher_of(work, "bccd", where, kind_of(ON_CELLS), 2 * CELL_EPOCHS)
        for seed in seeds:
            before = folder(work, "bccd", ON_CELLS, "dicod", seeds[0])
            yield from cell(work, "bccd", where, ON_CELLS, seed, CELL_EPOCHS, before)


# ----------------------------------------------------------------------------------------------------------- what came out


def one_run(path: Path) -> dict[str, Any] | None:
    """AP, AP50 and AP75 in percent, seconds, loss of AP50 by kind of error, shares in the gradient and DICOD's monitors."""
    summary = read(path)
    if summary is None:
        return None
    found: dict[str, Any] = {name: round(100 * summary["metrics"][name], 1) for name in ("AP", "AP50", "AP75")}
    found["seconds"] = round(summary["seconds"])
    if summary.get("errors"):
        found["errors"] = {name: round(100 * lost, 1) for name, lost in summary["errors"].items()}
    return {**found, **monitored(path / "metrics.csv")}


def monitored(path: Path) -> dict[str, Any]:
    """Means over the student's training: shares of the loss terms in the gradient, and DICOD's monitors."""
    rows = [row for row in read_rows(path) if row["stage"] != "classifier"] if path.exists() else []
    names = [name for name in (rows[0] if rows else ()) if name.startswith("share/") or name.endswith(("_accuracy", "cropped"))]
    values = {name: [float(row[name]) for row in rows if row[name]] for name in names}
    means = {name: round(statistics.fmean(column), 4) for name, column in values.items() if column}
    return {"monitors": means} if means else {}


def row(work: Path, data: str, student: str, seeds: Sequence[int]) -> dict[str, Any]:
    """All runs of a student by method and seed, and the gains of methods with several seeds."""
    runs: dict[str, dict[str, Any]] = {}
    gains: dict[str, Any] = {}
    for method in ("baseline", *methods(student)):
        folders = {seed: folder(work, data, student, method, seed) for seed in seeds}
        done = {str(seed): found for seed, path in folders.items() if (found := one_run(path)) is not None}
        if done:
            runs[method] = done
        pairs = [(folder(work, data, student, "baseline", seed), path) for seed, path in folders.items()]
        pairs = [pair for pair in pairs if all((run / "summary.json").exists() for run in pair)]
        if method != "baseline" and len(pairs) > 1:
            for metric in ("AP", "AP50", "AP75"):
                gain = asdict(compare_runs([run for pair in pairs for run in pair], metric=metric)[0])
                gains.setdefault(method, {})[metric] = {**gain, "teacher": Path(gain["teacher"]).name}
    return {"model": STUDENTS[student], "runs": runs, "gains": gains}


def held_out_accuracy(path: Path, student: str, data: str, views: Mapping[str, Any]) -> float | None:
    """Top-1 accuracy in percent, on the validation objects, of the classifier of a finished run."""
    if not (path / "summary.json").exists():
        return None
    splits = load_data(data)
    method = build_method(DICOD, None, build_detector(STUDENTS[student], splits.classes))
    assert isinstance(method, DICODMethod)
    prefix = "method.classifier."
    state = torch.load(path / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    method.classifier.load_state_dict({key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)})
    right = total = 0
    for batch in DetectionLoader(splits.val, ViewSettings(**views), 8, train=False):
        taught = method.teach(batch)
        for image, target in enumerate(batch.targets):
            usable = taught.usable[image, : len(target)]
            right += int(((taught.logits[image, : len(target)].argmax(dim=1) == target.labels) & usable).sum())
            total += int(usable.sum())
    return round(100 * right / total, 1)


def results(work: Path, seeds: Sequence[int], bccd: Path | None, last: bool = False) -> dict[str, Any]:
    """Results of all runs that are finished so far; classifiers are evaluated at the end only."""
    content: dict[str, Any] = {
        "what": "AP of students taught by an image classifier (DICOD), a larger detector (FKD) or both; all from random weights. "
        "digits: 2000 training and 300 validation images of 96 pixels; bccd: 205 and 87 images of 256x192",
        "command": "uv run python benchmarks/dicod.py --bccd PATH/TO/bccd --work runs/dicod --out benchmarks/results/dicod.json",
        "seeds": list(seeds),
        "epochs": {"digits": EPOCHS, "bccd": CELL_EPOCHS},
        "method": DICOD,
        "teachers": {
            data: {name: {"model": kind.teacher, "AP": ap(work / f"{data}-teacher-{name}")} for name, kind in kinds.items()}
            for data, kinds in (("digits", KINDS), ("bccd", {"ssd": KINDS["ssd"]}))
        },
        "digits": {student: row(work, "digits", student, seeds) for student in STUDENTS},
        "bccd": {ON_CELLS: row(work, "bccd", ON_CELLS, seeds)},
    }
    if last:
        accuracy = {
            f"digits, {name}": held_out_accuracy(
                folder(work, "digits", student, "dicod", seeds[0]), student, DIGITS[1], {"size": 96, "flip": 0.0}
            )
            for name, student in (("of SSD", "SSD"), ("of all others", "RetinaNet"))
        }
        if bccd is not None:
            cells = folder(work, "bccd", ON_CELLS, "dicod", seeds[0])
            views = {"size": 192, "resize": "short_side", "max_size": 256}
            accuracy["bccd"] = held_out_accuracy(cells, ON_CELLS, str(bccd), views)
        content["classifier_top1_on_validation_objects"] = accuracy
    everything = [folder(work, "digits", student, "baseline", seeds[0]) for student in STUDENTS]
    return {**content, **machine([*everything, folder(work, "bccd", ON_CELLS, "baseline", seeds[0])])}


# ------------------------------------------------------------------------------------------------------------------- tables


def tables(found: dict[str, Any]) -> str:
    """Markdown tables: AP as in the paper's table 2, loss of AP50 by kind of error, and gains over several seeds."""
    seed = str(found["seeds"][0])
    names = list(methods("SSD"))
    lines = [f"AP (AP50, AP75) with seed {seed}; gains are over the student alone.", ""]
    lines += ["| data | student | alone | " + " | ".join(names) + " |", "|" + " --- |" * (len(names) + 3)]
    for data, student, cells in _rows(found):
        runs = {method: one.get(seed) for method, one in cells["runs"].items()}
        alone = runs.get("baseline")
        lines.append(
            f"| {data} | {student} | " + " | ".join(_cell(runs.get(name), alone) for name in ("baseline", *names)) + " |"
        )
    lines += ["", "AP50 lost to wrong classes / to imprecise places (TIDE's Cls and Loc), same seed.", ""]
    lines += ["| data | student | alone | " + " | ".join(names) + " |", "|" + " --- |" * (len(names) + 3)]
    for data, student, cells in _rows(found):
        lost = [cells["runs"].get(name, {}).get(seed, {}).get("errors") for name in ("baseline", *names)]
        texts = [f"{one['Cls']:.1f} / {one['Loc']:.1f}" if one else "-" for one in lost]
        lines.append(f"| {data} | {student} | " + " | ".join(texts) + " |")
    rows: list[list[object]] = [["data", "student", "method", "metric", *GAIN_COLUMNS]]
    for data, student, cells in _rows(found):
        for method, metrics in cells["gains"].items():
            rows += [[data, student, method, metric, *gain_cells(gain)] for metric, gain in metrics.items()]
    lines += ["", "Several seeds, paired.", "", *markdown(rows)]
    teachers = [
        f"{data} {name} {one['AP']}" for data, kinds in found["teachers"].items() for name, one in kinds.items() if one["AP"]
    ]
    lines += ["", f"FKD's teachers, AP: {', '.join(teachers)}."]
    for name, value in found.get("classifier_top1_on_validation_objects", {}).items():
        if value is not None:
            lines.append(f"Classifier ({name}), top-1 on the validation objects: {value} %.")
    return "\n".join(lines) + "\n"


def _rows(found: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    rows = [(data, student, cells) for data in ("digits", "bccd") for student, cells in found[data].items()]
    return [one for one in rows if one[2]["runs"]]


def _cell(run: dict[str, Any] | None, alone: dict[str, Any] | None) -> str:
    if run is None:
        return "-"
    gain = "" if alone is None or run is alone else f", {run['AP'] - alone['AP']:+.1f}"
    return f"{run['AP']:.1f}{gain} ({run['AP50']:.1f}, {run['AP75']:.1f})"


# -------------------------------------------------------------------------------------------------------------------- speed


def speed(rounds: int) -> dict[str, Any]:
    """Cost of cropping and classifying the positives in a step, with several bounds on their number and without one.

    CPU seconds of one thread, medians over rounds that measure every case once: the student's own step, forward and backward;
    with DICOD's class term, which crops only the true boxes; with the pixel term, which also crops the predicted boxes but does
    not classify them; and with all terms. The difference between two successive cases is the cost of the added part.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: _speed_of(model, rounds) for name, model in TIMED.items()}
    finally:
        torch.set_num_threads(threads)


def _speed_of(model: str, rounds: int) -> dict[str, Any]:
    splits = load_data("digits:train=4,val=4,size=256,seed=0")
    batch = next(iter(DetectionLoader(splits.train, ViewSettings(size=256, flip=0.0), 4, train=True)))
    torch.manual_seed(0)
    student = build_detector(model, splits.classes).train()
    method = build_method("dicod", None, student)  # as published: ResNet-50 on 112 pixels, the pixels and its stem
    assert isinstance(method, DICODMethod)
    seen = student(batch)
    assert seen.prediction is not None
    positives = len(student.positives(seen.prediction, student.assign(seen.prediction, batch), batch))
    alone = plain_stage(student)

    def step(pixels: float, features: float, bound: int) -> None:
        method.pixel_weight, method.feature_weight, method.max_crops = pixels, features, bound
        method.step(student, batch, method.teach(batch), Clock(1, 10)).total().backward()

    contenders: dict[str, Callable[[], Any]] = {
        "student": lambda: alone.step(batch, None, Clock(1, 10)).total().backward(),
        "teach": lambda: method.teach(batch),
        "classes": partial(step, 0.0, 0.0, positives),
        "classes and pixels": partial(step, 0.15, 0.0, positives),
        "all": partial(step, 0.15, 0.15, positives),
    }
    bounds = [bound for bound in BOUNDS if bound < positives]
    contenders |= {f"all, at most {bound}": partial(step, 0.15, 0.15, bound) for bound in bounds}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds + 1):
        for name, call in contenders.items():
            student.zero_grad()
            started = time.process_time()
            call()
            if index:  # the first round warms up
                seconds[name].append(time.process_time() - started)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    whole = median["all"]
    return {
        "model": model,
        "objects": sum(map(len, batch.targets)),
        "positives": positives,
        "cpu_seconds": {name: round(value, 3) for name, value in median.items()},
        "share_of_true_boxes": round(median["teach"] / whole, 3),
        "share_of_cropping": round((median["classes and pixels"] - median["classes"]) / whole, 3),
        "share_of_classifying": round((whole - median["classes and pixels"]) / whole, 3),
        "share_with_bound": {str(bound): round(1 - median["classes"] / median[f"all, at most {bound}"], 3) for bound in bounds},
        "step_over_students_own": {
            name: round(value / median["student"], 2) for name, value in median.items() if name.startswith("all")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS[:-1]))
    parser.add_argument("--bccd", type=Path, help="Pascal VOC folder of the blood cells; without it, the part bccd is left out")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--on", default="local", help="local, ray or ray://HOST:PORT")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the part speed")
    parser.add_argument("--list", action="store_true", help="only print the commands")
    chosen = parser.parse_args()
    todo = list({task.out: task for task in tasks(chosen.work, chosen.seeds, chosen.parts, chosen.bccd)}.values())
    if chosen.list:
        print(*(shlex.join(["detdistill", *task.command]) for task in todo), sep="\n")
        return
    if "speed" in chosen.parts:
        content = {
            "what": "DICOD as published (ResNet-50 on crops of 112 pixels) at 256 pixels, batch 4, one thread, float32",
            "command": "uv run python benchmarks/dicod.py " + shlex.join(sys.argv[1:]),
            "steps": speed(chosen.rounds),
            "hardware": hardware(),
            "versions": versions(),
        }
        write(chosen.out.with_name("dicod_steps_cpu.json"), content)
        print(json.dumps(content["steps"], indent=2))
    if not todo:
        return

    def note(last: bool = False) -> None:
        found = results(chosen.work, chosen.seeds, chosen.bccd, last)
        write(chosen.out, found)
        chosen.out.with_suffix(".md").write_text(tables(found))

    run(todo, chosen.jobs, chosen.work, note, chosen.on)
    note(last=True)
    print(chosen.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
