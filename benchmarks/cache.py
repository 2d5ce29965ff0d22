"""Costs of a cache of knowledge: writing, random reading, and an offline step compared with the student alone.

    uv run python benchmarks/cache.py --out benchmarks/results/cache_cpu.json

Writing and reading are measured with the records of one teacher and one method (FitNet: the whole pyramid), in every store. A
step is forward and backward of the student, losses and optimizer: alone, online (with the teacher's forward) and offline (records
are read, checked and decoded). Two parts are also measured alone: ``teach`` (the teacher's forward, and the method's knowledge
from it) and ``learn`` (the method's own networks and losses, forward and backward, on given features). All are measured
alternately in one process, so that noise affects them alike; ratios are of medians. Multiply-adds are those of matrix products
and convolutions, forward only. Extractors are untrained, because speed does not depend on their weights. Peak memory is that of
one step, measured in a separate process for each case: on a GPU by torch, on a CPU as the process's peak.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from detdistill.cache.encoding import STORES, Store, encode
from detdistill.cache.identity import knowledge_of, views_of
from detdistill.cache.knowledge import About, KnowledgeCache
from detdistill.cache.shards import ShardWriter
from detdistill.data.discover import load_data
from detdistill.data.loader import DetectionLoader
from detdistill.data.records import DataSplits
from detdistill.data.transforms import ViewSettings
from detdistill.data.views import batches_of, sights
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.methods.shared.compose import build_method
from detdistill.methods.shared.contract import Source, teach_by_canvas
from detdistill.settings import TrainSettings
from detdistill.structures import Batch, Clock
from detdistill.training.machine import hardware, versions
from detdistill.training.optimizers import build_optimizer
from detdistill.training.run import plain_stage
from steps import clock, turns


def filled(
    folder: Path, teacher: Teacher, splits: DataSplits, views: ViewSettings, chosen: argparse.Namespace, store: Store
) -> dict[str, Any]:
    """Write a cache; return MB/s of encoding and writing (to the disk, including fsync), without the teacher's time."""
    wanted = sights(splits.train, views)
    method = build_method(chosen.method, teacher, build_detector(chosen.student, splits.classes)).to(chosen.device)
    about = About(
        teacher="benchmark",
        teacher_fingerprint=teacher.fingerprint,
        teacher_parameters=0,
        spec=teacher.spec,
        method=chosen.method,
        student=None,
        knowledge=tuple(knowledge_of(chosen.method)),
        stages=(),
        data="digits",
        data_fingerprint=splits.train.fingerprint,
        views=views_of(views),
        store=store,
        precision="32",
        records=len(wanted),
    )
    cache = KnowledgeCache.create(str(folder), about)
    writer = ShardWriter(cache.folder, about.fingerprint)
    seconds, count = 0.0, 0
    for group, batch in batches_of(splits.train, views, wanted, 4):
        pieces = method.teach(batch.to(chosen.device)).split(len(group))
        teacher.forget()
        started = time.perf_counter()
        for sight, piece in zip(group, pieces, strict=True):
            record = encode((piece,), store)
            count += len(record.data)
            writer.add(sight.key, record)
        seconds += time.perf_counter() - started
    started = time.perf_counter()
    writer.flush()
    seconds += time.perf_counter() - started
    cache.index.refresh()
    keys = [sight.key for sight in wanted]
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0)).tolist()
    now = clock(chosen.device)
    started = now()
    for index in order:
        cache.read(keys[index])
    reading = now() - started
    return {
        "store": store,
        "records": len(keys),
        "kilobytes_per_record": round(count / len(keys) / 1e3, 1),
        "write_megabytes_per_second": round(count / seconds / 1e6, 1),
        "random_reads_per_second": round(len(keys) / reading, 1),
        "random_read_megabytes_per_second": round(count / reading / 1e6, 1),
    }


def contender(name: str, chosen: argparse.Namespace, splits: DataSplits, batch: Batch, folder: Path | None) -> Callable[[], None]:
    """One step of the student alone, online or offline."""
    student = build_detector(chosen.student, splits.classes).to(chosen.device).train()
    stage, teacher = plain_stage(student), None
    modules: list[torch.nn.Module] = [student]
    source: Source = teach_by_canvas
    if name != "alone":
        if name == "online":
            teacher = Teacher(build_detector(chosen.teacher, splits.classes)).to(chosen.device)
            method = build_method(chosen.method, teacher, student)
        else:
            cache = KnowledgeCache.open(str(folder))
            method = build_method(chosen.method, cache.teacher(), student)
            source = cache.source(chosen.method, method)
        stage, modules = method.to(chosen.device).stages(student)[-1], [student, method]
    optimizer = build_optimizer(modules, TrainSettings(lr=1e-5))

    def step() -> None:
        taught = None if stage.learns_from is None else source(stage.learns_from, batch)
        stage.step(batch, taught, Clock(1, 10)).total().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        if teacher is not None:
            teacher.forget()

    return step


def parts(chosen: argparse.Namespace, splits: DataSplits, batch: Batch) -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
    """``teach`` and ``learn`` alone, and millions of multiply-adds of the student's forward and of ``learn``."""
    student = build_detector(chosen.student, splits.classes).to(chosen.device).train()
    teacher = Teacher(build_detector(chosen.teacher, splits.classes)).to(chosen.device)
    method = build_method(chosen.method, teacher, student).to(chosen.device)
    taught = method.teach(batch)
    teacher.forget()
    with torch.no_grad():
        seen = student(batch)
    features = replace(seen.features, maps=tuple(level.detach().requires_grad_() for level in seen.features.maps))

    def forward() -> torch.Tensor:
        return method.learn(student, replace(seen, features=features), taught, batch, Clock(1, 10)).total()

    def teach() -> None:
        method.teach(batch)
        teacher.forget()

    def learn() -> None:
        forward().backward()
        method.zero_grad()
        for level in features.maps:
            level.grad = None

    calls = {"student": lambda: student(batch), "learn": forward}
    counts = {}
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        counts[name] = round(counter.get_total_flops() / 2e6, 1)
    return {"teach": teach, "learn": learn}, counts


def peak(name: str, chosen: argparse.Namespace, splits: DataSplits, batch: Batch, folder: Path | None) -> float:
    """Peak memory after three steps, in megabytes."""
    if chosen.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = contender(name, chosen, splits, batch, folder)
    for _ in range(3):
        step()
    if chosen.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    # Not ru_maxrss, because a process inherits it from its parent.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--teacher", default="retinanet:resnet50", help="model string")
    parser.add_argument("--student", default="retinanet:resnet18", help="model string")
    parser.add_argument("--method", default="fitnet")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--stores", nargs="+", default=list(STORES), choices=STORES)
    parser.add_argument("--folder", type=Path, default=None, help="folder for the caches; none: a temporary one")
    parser.add_argument("--peak", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    splits = load_data(f"digits:train={chosen.images},val={chosen.batch},size=128,seed=0")
    views = ViewSettings(size=chosen.size)
    batch: Batch = next(iter(DetectionLoader(splits.train, views, chosen.batch, train=True))).to(chosen.device)
    if chosen.peak:
        print(peak(chosen.peak, chosen, splits, batch, chosen.folder))
        return
    with tempfile.TemporaryDirectory() as scratch:
        home = chosen.folder or Path(scratch)
        teacher = Teacher(build_detector(chosen.teacher, splits.classes)).to(chosen.device)
        stores = [filled(home / store, teacher, splits, views, chosen, store) for store in chosen.stores]
        print(*stores, sep="\n", flush=True)
        del teacher
        rows = []
        alone_parts, counts = parts(chosen, splits, batch)
        for written in stores:
            store = written["store"]
            names = {"alone": "alone", "online": "online", store: "offline"}
            steps = {name: contender(kind, chosen, splits, batch, home / store) for name, kind in names.items()}
            found = turns(steps | alone_parts, chosen.rounds, chosen.device)
            ratios = {
                "offline_over_alone": found[store] / found["alone"],
                "offline_over_online": found[store] / found["online"],
                "offline_over_alone_and_learn": found[store] / (found["alone"] + found["learn"]),
                "online_over_alone_and_teach": found["online"] / (found["alone"] + found["teach"]),
                "online_over_alone_teach_and_learn": found["online"] / (found["alone"] + found["teach"] + found["learn"]),
                "reads_over_images_of_alone": written["random_reads_per_second"] * found["alone"] / len(batch),
            }
            rows.append({"store": store, **{name: round(value, 3) for name, value in ratios.items()}})
            rows[-1] |= {"seconds": {kind: round(found[name], 4) for name, kind in names.items()}}
            rows[-1]["seconds"] |= {name: round(found[name], 4) for name in alone_parts}
            print(rows[-1], flush=True)
        peaks = {}
        store = "float16" if "float16" in chosen.stores else chosen.stores[0]
        for name in ("alone", "online", "offline"):
            again = [
                sys.executable,
                *sys.argv,
                "--peak",
                name,
                "--folder",
                str(home / store),
            ]
            peaks[name] = round(float(subprocess.run(again, check=True, capture_output=True, text=True).stdout.split()[-1]))
        print(peaks)
    content = {
        "what": f"{chosen.student} under {chosen.teacher}, {chosen.method}, {chosen.size} pixels, batch {len(batch)}, float32",
        "command": "uv run python benchmarks/cache.py " + shlex.join(sys.argv[1:]),
        "stores": stores,
        "clock": clock(chosen.device).__name__,
        "threads": torch.get_num_threads(),
        "steps": rows,
        "million_multiply_adds_forward": counts,
        "peak_megabytes": peaks,
        "note": "written and read through the page cache of a shared machine; first reads from a cold disk are slower",
        "hardware": hardware(),
        "versions": versions(),
    }
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
