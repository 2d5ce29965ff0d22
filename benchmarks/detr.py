"""DETRDistill's tables at small scale, on the built-in digits: a DETR under a DETR, by methods for DETRs and for feature maps.

    uv run python benchmarks/detr.py --work runs/detr --out benchmarks/results/detr.json
    uv run python benchmarks/detr.py --work runs/detr --out benchmarks/results/detr_matched.json --parts matched
    uv run python benchmarks/detr.py --work runs/detr --out benchmarks/results/detr_yolo.json --parts yolo
    uv run python benchmarks/detr.py --work runs/detr --out benchmarks/results/detr_yolo26.json --parts yolo26

Three detectors with queries, each under a larger detector of the same family (the paper's table 3). Two of them also with several
seeds, under the other methods for DETRs, and with fewer layers than their teachers (table 4), with DETRDistill's parts alone and
in pairs (table 5), and with its choices of queries and layers (tables 6 and 7). The instability of the matching is measured
during training. The digits are a single class here and the images are small, because from random weights a DETR needs thousands
of steps to distinguish ten digits (a compact RT-DETR had AP 3.4 after 800 steps with ten classes, in a trial, and 23.5 after 500
steps with one class). Each run has one thread, and ``--jobs`` run at a time. Finished runs in ``--work`` are not repeated, and
the results are rewritten after every run, so the benchmark can be stopped at any time.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _runs import GAIN_COLUMNS, Kind, Task, ap, gain_cells, machine, markdown, read, run, write
from detdistill.compare import compare_runs
from detdistill.data.digits import digits_folder

TRAIN, VAL, SIZE = 2000, 300, 64
COMMON: tuple[object, ...] = ("--batch", 8, "--size", SIZE, "--flip", 0, "--device", "cpu", "--threads", 1)
COMMON += ("--in_memory", "true", "--report", "false", "--weight_decay", 0.01, "--schedule", "one_cycle", "--monitor_every", 250)
LARGE = "resnet10t,channels=32-64-128-256,dim=64,queries=30,heads=4"
SMALL = "resnet10t,channels=16-32-64-128,stem=16,dim=64,queries=30,heads=4"
RT_DETR = "ffn=128,denoising=30"
DEFORMABLE = "encoder=1,decoder=3,ffn=256,two_stage=true,refine=true"
ADAMIXER = "decoder=3,groups=4,points=8,ffn=256"


KINDS = {
    "rt_detr": Kind(
        f"rt_detr:{LARGE},encoder=2,decoder=3,{RT_DETR}", f"rt_detr:{SMALL},encoder=2,decoder=3,{RT_DETR}", 1e-3, 1500, 500
    ),
    "deformable_detr": Kind(
        f"deformable_detr:{LARGE},{DEFORMABLE}", f"deformable_detr:{SMALL},{DEFORMABLE}", 2e-3, 1500, 500, 1.0
    ),
    "adamixer": Kind(f"adamixer:{LARGE},{ADAMIXER}", f"adamixer:{SMALL},{ADAMIXER}", 1e-3, 1500, 500),
    "d_fine": Kind(f"d_fine:{LARGE},decoder=3,{RT_DETR}", f"d_fine:{SMALL},decoder=3,{RT_DETR}", 1e-3, 1500, 500),
    "yolo_under_rt_detr": Kind(
        f"rt_detr:{LARGE},encoder=2,decoder=3,{RT_DETR}", "ultralytics:yolo11n,width=0.125", 1e-3, 1500, 500, 10.0
    ),
    "yolo26": Kind("ultralytics:yolo26n", "ultralytics:yolo26n,width=0.125", 1e-3, 1200, 400, 10.0),
    "rt_detr_under_yolo": Kind("ultralytics:yolo11n", f"rt_detr:{SMALL},encoder=2,decoder=3,{RT_DETR}", 1e-3, 1500, 500),
}
FAMILIES = ("rt_detr", "deformable_detr", "adamixer")
"""The detectors of DETRDistill's tables."""
WATCHED = ("adamixer", "rt_detr")
"""Detectors with several seeds, all smaller tables, and a measured instability of the matching. AdaMixer's queries are learned.
RT-DETR's are the encoder's best positions in order of score, so a change of the order counts too."""
DEPTHS = {
    "adamixer": {f"0/{decoder}": f"adamixer:{SMALL},{ADAMIXER.replace('=3', f'={decoder}', 1)}" for decoder in (2, 1)},
    "rt_detr": {
        f"{encoder}/{decoder}": f"rt_detr:{SMALL},encoder={encoder},decoder={decoder},{RT_DETR}"
        for encoder, decoder in ((2, 1), (1, 3), (1, 1))
    },
}
"""Students with fewer layers than the teacher, by numbers of encoder and decoder layers."""
WHOLE = {"adamixer": "0/3", "rt_detr": "2/3"}
"""Layers of the teacher and of the student of table 3."""
SURE = "adamixer"
"""The detector whose results differ least between seeds; its parts, depths and other methods are run with all seeds."""
INSTABILITY = 64
"""Number of validation images for the instability of the matching, which is measured after each epoch."""


@dataclass(frozen=True)
class Way:
    """A method string, the factor on its losses or their share, and the teacher if it is not the larger detector."""

    method: str
    dis: float = 1.0
    teacher: str = ""
    balance: float = 0.0

    @property
    def words(self) -> tuple[object, ...]:
        """The flags of the command line."""
        factor = ("--dis", self.dis) if self.dis != 1 else ("--balance", self.balance) if self.balance else ()
        return ("--method", self.method, *factor)


WAYS = {
    "fgd": Way("fgd"),
    "mgd": Way("mgd"),
    "fitnet": Way("fitnet"),
    "detrdistill": Way("detrdistill"),
}
SEEDED = ("fitnet", "detrdistill")
"""The methods of ``WAYS`` that are run with several seeds."""
POINTS = 30
"""Random queries of KD-DETR: as many as the detectors have queries; so does the paper (300)."""
QUERIES = {
    "kd_detr": Way(f"kd_detr,general_points={POINTS},cls_weight=0"),
    "d3etr": Way("d3etr"),
    "d3etr, maps weighed for 30 queries": Way("d3etr,self_attention_weight=100,cross_attention_weight=20"),
    "mgd, dis 100": Way("mgd", 100.0),
}
"""The other methods for DETRs, and second rows for methods whose published weights do not suit such small maps and so few
queries. KD-DETR's class term is off, because its softmax is constant with a single class. MGD's term is 0.1 % of an untrained
student's gradient. Entries of self-attention are about 1 / queries, entries of the summed cross-attention about queries / cells,
so D3ETR's squares are 100 and 50 times as large as with 300 queries and 13000 cells."""
WITHOUT_MAPS = ("kd_detr", "mgd, dis 100")
"""The methods of ``QUERIES`` for AdaMixer; D3ETR is left out, because AdaMixer samples features and has no attention maps."""
PARTS_OFF = {"logits": "logits_weight=0", "features": "feature_weight=0", "assignment": "assignment_weight=0"}


def only(*kept: str) -> Way:
    """DETRDistill with only the given parts."""
    return Way(",".join(["detrdistill", *(off for name, off in PARTS_OFF.items() if name not in kept)]))


COMPONENTS = {
    "logits": only("logits"),
    "features": only("features"),
    "assignment": only("assignment"),
    "logits + features": only("logits", "features"),
    "logits + assignment": only("logits", "assignment"),
    "features, a fifth of the weight": Way(f"{only('features').method},feature_weight=0.2"),
}
CHOICES = {
    "logits, positives and negatives apart (6)": Way(f"{only('logits').method},split=true"),
    "logits, every layer from the last (7)": Way(f"{only('logits').method},progressive=false"),
    "all as in the paper": Way("detrdistill,split=true,mask=paper"),
}
OTHERS = {
    "matched": Way("matched"),
    "matched, own average": Way("matched", teacher="self:ema"),
    "pkd": Way("pkd"),
    "pkd, balance 0.3": Way("pkd", balance=0.3),
    "unikd": Way("unikd,queries=30,extractor_lr=2e-3"),
}
MATCHED = ("matched", "matched, own average", "pkd")
MORE: dict[str, dict[str, tuple[str, ...]]] = {
    "matched": {"rt_detr": MATCHED, "d_fine": MATCHED},
    "yolo": {"yolo_under_rt_detr": ("pkd", "unikd"), "rt_detr_under_yolo": ("pkd", "unikd")},
    "yolo26": {"yolo26": ("pkd", "pkd, balance 0.3")},
}
"""Further parts, each with its detectors and their methods of ``OTHERS``, with all seeds: this library's method for queries, also
with the student's own moving average as a control; DETRs and YOLO as each other's teachers; YOLO under YOLO, by the published
weight and by a share."""
PARTS = ("families", "queries", "seeds", "depths", "components", "choices", *MORE)


def digits_as_one_class(work: Path) -> Path:
    """The built-in digits with a single class, in COCO form; created if it is not yet in ``work``."""
    source, folder = digits_folder(TRAIN, VAL, SIZE, seed=0), work / "one_class"
    if not folder.exists():
        scratch = work / "one_class.part"
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(source, scratch)
        for path in (scratch / "annotations").glob("*.json"):
            content = json.loads(path.read_text())
            content["categories"] = [{"id": 1, "name": "digit"}]
            content["annotations"] = [{**one, "category_id": 1} for one in content["annotations"]]
            path.write_text(json.dumps(content))
        scratch.rename(folder)
    return folder


def slug(name: str) -> str:
    return "_".join("".join(letter if letter.isalnum() else " " for letter in name).split())


def teacher_run(work: Path, kind: str) -> Path:
    return work / f"teacher-{kind}"


def student_run(work: Path, kind: str, name: str, seed: int, depth: str = "") -> Path:
    return work / "-".join([slug(name), kind, *([slug(depth)] if depth else []), f"seed{seed}"])


def settings(work: Path, kind: str, steps: int) -> tuple[object, ...]:
    """Settings that teacher and students of a kind have in common."""
    one = KINDS[kind]
    looks = ("--evaluate_every", 1, "--instability", INSTABILITY) if kind in WATCHED else ("--evaluate_every", 99)
    return ("--data", work / "one_class", *COMMON, "--lr", one.lr, "--clip", one.clip, "--epochs", 99, "--steps", steps, *looks)


def teach(work: Path, kind: str) -> Task:
    one = KINDS[kind]
    return Task.of(
        teacher_run(work, kind), "train", "--model", one.teacher, "--role", "teacher", *settings(work, kind, one.teacher_steps)
    )


def learn(work: Path, kind: str, ways: dict[str, Way], seed: int, depth: str = "") -> list[Task]:
    """Tasks of a student: its baseline and its distilled runs."""
    model, teacher = DEPTHS[kind][depth] if depth else KINDS[kind].student, teacher_run(work, kind)
    common = (*settings(work, kind, KINDS[kind].steps), "--seed", seed)
    out = student_run(work, kind, "baseline", seed, depth)
    found = [Task.of(out, "train", "--model", model, "--role", "baseline", *common)]
    for name, way in ways.items():
        out = student_run(work, kind, name, seed, depth)
        words = ("--teacher", way.teacher or teacher, "--student", model, *way.words, "--score_teacher", "false")
        found.append(Task.of(out, "distill", *words, *common, after=[] if way.teacher else [teacher]))
    return found


def tasks(work: Path, seeds: Sequence[int], parts: Sequence[str]) -> list[Task]:
    """All tasks, the most important first."""
    first, *others = seeds
    found: list[Task] = []
    for kind in FAMILIES if "families" in parts else WATCHED if set(parts) - MORE.keys() else ():
        found.append(teach(work, kind))
        found += learn(work, kind, WAYS, first) if "families" in parts else []
    for kind, names in ((kind, names) for part in MORE if part in parts for kind, names in MORE[part].items()):
        found.append(teach(work, kind))
        for seed in seeds:
            found += learn(work, kind, {name: OTHERS[name] for name in names}, seed)
    for seed in others if "seeds" in parts else ():
        for kind in WATCHED:
            found += learn(work, kind, {name: WAYS[name] for name in SEEDED}, seed)
    for kind in WATCHED:
        if "queries" in parts:
            found += learn(work, kind, queries_of(kind), first)
        for depth in DEPTHS[kind] if "depths" in parts else ():
            found += learn(work, kind, {"detrdistill": WAYS["detrdistill"]}, first, depth)
        for name, ways in (("components", COMPONENTS), ("choices", CHOICES)):
            found += learn(work, kind, ways, first) if name in parts else []
    for seed in others if "seeds" in parts else ():
        for depth in DEPTHS[SURE] if "depths" in parts else ():
            found += learn(work, SURE, {"detrdistill": WAYS["detrdistill"]}, seed, depth)
        found += learn(work, SURE, COMPONENTS, seed) if "components" in parts else []
        found += learn(work, SURE, queries_of(SURE), seed) if "queries" in parts else []
    return found


def queries_of(kind: str) -> dict[str, Way]:
    """The methods of ``QUERIES`` that can be used with this kind."""
    return {name: QUERIES[name] for name in WITHOUT_MAPS} if kind == "adamixer" else QUERIES


# ---------------------------------------------------------------------------------------------------------------- results


def rows_of(folder: Path) -> list[dict[str, str]]:
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def distilled_share(folder: Path) -> float | None:
    """Share of the distillation terms in the student's gradient, at the last measurement.

    The terms that the baseline has as well are the student's own.
    """
    _, kind, *rest = folder.name.split("-")
    own = {name for row in rows_of(folder.with_name("-".join(["baseline", kind, *rest]))) for name in row}
    measured = [{k: float(v) for k, v in row.items() if k.startswith("share/") and v} for row in rows_of(folder)]
    last = next((row for row in reversed(measured) if row), None)
    return None if last is None or not own else round(sum(value for name, value in last.items() if name not in own), 3)


def instabilities(folder: Path) -> list[float]:
    """Instability of the matching after each epoch; the first is relative to the weights before training."""
    return [round(float(row["val/IS"]), 2) for row in rows_of(folder) if row.get("val/IS")]


def result(folder: Path) -> dict[str, Any] | None:
    """Results of one finished run."""
    if (summary := read(folder)) is None:
        return None
    found = {"AP": ap(folder), "AP50": round(100 * summary["metrics"]["AP50"], 1), "seconds": round(summary["seconds"])}
    share = distilled_share(folder) if summary["role"] == "distilled" else None
    return {**found, **({} if share is None else {"share_of_gradient": share})}


def results(work: Path, seeds: Sequence[int], parts: Sequence[str]) -> dict[str, Any]:
    """Results of all runs that are finished so far."""
    seed = seeds[0]

    def some(kind: str, names: Sequence[str], depth: str = "") -> dict[str, Any]:
        return {name: found for name in names if (found := result(student_run(work, kind, name, seed, depth))) is not None}

    paired = []
    for kind in KINDS:
        places = [("", name) for name in (*WAYS, *QUERIES, *COMPONENTS, *CHOICES, *OTHERS)]
        for depth, name in [*places, *((depth, "detrdistill") for depth in DEPTHS.get(kind, ()))]:
            pairs = [
                (student_run(work, kind, "baseline", one, depth), student_run(work, kind, name, one, depth)) for one in seeds
            ]
            runs = [folder for pair in pairs if all(read(folder) for folder in pair) for folder in pair]
            for gain in compare_runs(runs) if len(runs) > 2 else ():
                label = f"{name}, {depth} layers" if depth else name
                paired.append({**asdict(gain), "teacher": Path(gain.teacher).name, "kind": kind, "name": label})
    watched = {f"{kind} teacher": teacher_run(work, kind) for kind in WATCHED}
    watched |= {
        f"{kind} {name}": student_run(work, kind, name, seed) for kind in WATCHED for name in ("baseline", *WAYS, *QUERIES)
    }
    teachers = {kind: teacher_run(work, kind) for kind in KINDS}
    depths = {
        kind: {WHOLE[kind]: some(kind, ["baseline", "detrdistill"])}
        | {depth: some(kind, ["baseline", "detrdistill"], depth) for depth in DEPTHS[kind]}
        for kind in WATCHED
    }
    return {
        "what": "AP of students on the embedded digits as one class (2000 training, 300 validation images of 64 pixels), batch 8",
        "command": "uv run python benchmarks/detr.py --work runs/detr --out benchmarks/results/detr.json --parts "
        + shlex.join(parts),
        "kinds": {name: asdict(kind) for name, kind in KINDS.items()},
        "ways": {name: asdict(way) for name, way in (WAYS | QUERIES | COMPONENTS | CHOICES | OTHERS).items()},
        "seed": seed,
        "teachers": {kind: found for kind, folder in teachers.items() if (found := result(folder)) is not None},
        "families": {kind: some(kind, ["baseline", *WAYS, *QUERIES]) for kind in FAMILIES},
        "paired": paired,
        "depths": depths,
        "components": {kind: some(kind, ["baseline", *COMPONENTS, "detrdistill"]) for kind in WATCHED},
        "choices": {kind: some(kind, list(CHOICES)) for kind in WATCHED},
        "instability": {name: values for name, folder in watched.items() if read(folder) and (values := instabilities(folder))},
        **machine(list(teachers.values())),
    }


def tables(found: dict[str, Any]) -> str:
    """All tables in Markdown."""
    names = [*WAYS, *QUERIES]

    def shown(cell: dict[str, Any] | None) -> object:
        return "" if cell is None else cell["AP"]

    seed = found["seed"]
    text = ["# DETRs taught by DETRs", "", f"{found['what']}. Where nothing else is said, seed {seed}.", ""]
    rows: list[list[object]] = [["student", "teacher", "alone", *names]]
    for kind, row in found["families"].items():
        rows.append([kind, shown(found["teachers"].get(kind)), *(shown(row.get(name)) for name in ("baseline", *names))])
    text += ["## AP of three students under larger teachers of their kinds", "", *markdown(rows), ""]
    rows = [["share of the gradient", *names]]
    for kind, row in found["families"].items():
        rows.append([kind, *(row.get(name, {}).get("share_of_gradient", "") for name in names)])
    text += ["What distillation had of the student's gradient when it was last measured:", "", *markdown(rows), ""]
    rows = [["student", "method", *GAIN_COLUMNS]]
    rows += [[gain["kind"], gain["name"], *gain_cells(gain)] for gain in found["paired"]]
    text += ["## Several seeds", "", *markdown(rows), ""]
    rows = [["student", "encoder/decoder layers", "alone", "detrdistill"]]
    for kind in WATCHED:
        for depth, row in found["depths"][kind].items():
            rows.append([kind, depth, shown(row.get("baseline")), shown(row.get("detrdistill"))])
    text += ["## Fewer layers than the teacher", "", *markdown(rows), ""]
    rows = [["part", *WATCHED]]
    rows.append(["none", *(shown(found["components"][kind].get("baseline")) for kind in WATCHED)])
    for name in (*COMPONENTS, "detrdistill"):
        rows.append(["all" if name == "detrdistill" else name, *(shown(found["components"][kind].get(name)) for kind in WATCHED)])
    rows += [[name, *(shown(found["choices"][kind].get(name)) for kind in WATCHED)] for name in CHOICES]
    text += ["## Parts and choices of DETRDistill", "", *markdown(rows), ""]
    rows = [["run", "after each epoch"], *([name, ", ".join(map(str, found))] for name, found in found["instability"].items())]
    text += ["## How many of a query's matches changed since the epoch before, summed over an image", ""]
    return "\n".join([*text, *markdown(rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--on", default="local", help="local, ray or ray://HOST:PORT")
    parser.add_argument("--list", action="store_true", help="only print the commands")
    chosen = parser.parse_args()
    todo = tasks(chosen.work, chosen.seeds, chosen.parts)
    if chosen.list:
        print(*dict.fromkeys(shlex.join(task.words) for task in todo), sep="\n")
        return

    digits_as_one_class(chosen.work)

    def note() -> None:
        found = results(chosen.work, chosen.seeds, chosen.parts)
        write(chosen.out, found)
        chosen.out.with_suffix(".md").write_text(tables(found))

    run(todo, chosen.jobs, chosen.work, note, chosen.on)
    note()
    print(tables(results(chosen.work, chosen.seeds, chosen.parts)))


if __name__ == "__main__":
    main()
