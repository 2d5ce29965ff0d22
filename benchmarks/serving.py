"""Throughput of students with a teacher in their own process, and with a served one: images per second, on one machine.

    OMP_NUM_THREADS=1 uv run python benchmarks/serving.py --out benchmarks/results/serving_cpu.json

Every process has one thread and one core (``sched_setaffinity``; ``--cores`` names them). A student's step is forward and
backward, the method's losses and the optimizer; its batches are prepared in its own process, and the question about the next
batch is on its way meanwhile. Cases:

* ``local 1``, ``local 2``: one or two students, each with a teacher of its own, on cores 0 and 1;
* ``served 1``, ``served 2``: the teacher on core 1; one student, or two that share core 0 and the teacher;
* ``alone 1``: one student without a teacher on core 0, the most that a served student could reach;
* ``read 1``: as ``served 1``, but the server has written all views into a cache before, and reads them.

Images per second are those of all students of a case together: the median of the rounds, the best, and each. Processor time is
that of a student's process, for an image; it is hardly disturbed by other work on the machine. Memory is what a student's process
takes besides the libraries, at its peak. The processes of all cases are started first and warmed up; then the cases take turns,
so that noise affects them alike, and the others wait idle.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import detdistill
from detdistill.data.discover import load_data
from detdistill.data.loader import DetectionLoader
from detdistill.data.transforms import ViewSettings
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.methods.shared.compose import build_method
from detdistill.methods.shared.contract import Method, Source, teach_by_canvas
from detdistill.serving.client import ServedTeacher
from detdistill.settings import TrainSettings
from detdistill.structures import Batch, Clock
from detdistill.training.machine import hardware, versions
from detdistill.training.optimizers import build_optimizer
from detdistill.training.run import plain_stage

WARM_UP = 3
FORK = multiprocessing.get_context("fork")


def data_of(chosen: argparse.Namespace) -> str:
    return f"digits:train={chosen.images},val=4,size={chosen.size},seed=0"


def teacher_of(chosen: argparse.Namespace) -> Any:
    """The same random weights in every process, because the rate does not depend on them."""
    torch.manual_seed(0)
    return build_detector(chosen.teacher, load_data(data_of(chosen)).classes)


def serve(chosen: argparse.Namespace, line: Connection, folder: str) -> None:
    """Serve until a word comes."""
    settings: dict[str, Any] = {"size": chosen.size, "flip": 0.0, "batch": chosen.batch, "device": "cpu", "threads": 1}
    place = folder or None
    server = detdistill.teach(teacher_of(chosen), chosen.method, "127.0.0.1:0", data=data_of(chosen), out=place, **settings)
    line.send(server.url)
    line.recv()
    server.stop()


def endless(loader: DetectionLoader) -> Iterator[Batch]:
    while True:
        yield from loader


def learn(chosen: argparse.Namespace, line: Connection, seed: int = 0, url: str = "", alone: bool = False) -> None:
    """Warm up, with a server for an epoch; then, for every number that comes, learn for so many steps and send their seconds."""
    before = peak_mb()
    splits = load_data(data_of(chosen))
    torch.manual_seed(0)
    student = build_detector(chosen.student, splits.classes).train()
    served = ServedTeacher(url, 120.0) if url else None
    views = ViewSettings(size=chosen.size, flip=0.0)
    ahead = None if served is None else served.ahead
    loader = DetectionLoader(splits.train, views, chosen.batch, train=True, seed=seed, in_memory=True, ahead=ahead)
    source: Source = teach_by_canvas
    method: Method[Any] | None = None
    if not alone:
        live = Teacher(teacher_of(chosen)).fold_norms() if served is None else served.teacher()
        method = build_method(chosen.method, live, student)
        if served is not None:
            served.check(chosen.method, splits.train, views, None)
            source = served.source(chosen.method, method)
    stage = plain_stage(student) if method is None else method.stages(student)[-1]
    optimizer = build_optimizer([student] if method is None else [student, method], TrainSettings())
    batches = endless(loader)

    def steps(count: int) -> dict[str, float]:
        started, own = time.perf_counter(), time.process_time()
        for batch in itertools.islice(batches, count):
            taught = None if stage.learns_from is None else source(stage.learns_from, batch)
            losses = stage.step(batch, taught, Clock(500, 1000, 5))
            optimizer.zero_grad(set_to_none=True)
            losses.total().backward()
            optimizer.step()
            for teacher in () if method is None else method.teachers():
                teacher.forget()
        own = time.process_time() - own
        return {"seconds": time.perf_counter() - started, "own_seconds": own, "images": count * chosen.batch}

    steps(len(loader) if served is not None and served.description.recorded else WARM_UP)
    line.send("ready")
    while count := line.recv():
        line.send({**steps(count), "memory_mb": peak_mb() - before})


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Child:
    """A fork of this process, which has imported everything, on a core of its own."""

    def __init__(self, core: int, act: Callable[..., None], *given: Any, **options: Any) -> None:
        self.line, theirs = FORK.Pipe()

        def run() -> None:
            os.sched_setaffinity(0, {core})
            act(*given[:1], theirs, *given[1:], **options)

        self.process = FORK.Process(target=run, daemon=True)
        self.process.start()


def started(chosen: argparse.Namespace, folder: str) -> tuple[dict[str, list[Child]], list[Child]]:
    """The students of each case, warmed up, and the servers."""
    first, second = chosen.cores
    servers = [Child(second, serve, chosen, place) for place in ("", f"{folder}/cache")]
    plain, recording = (server.line.recv() for server in servers)
    own = [Child(core, learn, chosen, core) for core in (first, second)]
    asking = [Child(first, learn, chosen, seed, plain) for seed in (0, 1)]
    reading, alone = Child(first, learn, chosen, 0, recording), Child(first, learn, chosen, alone=True)
    for student in (*own, *asking, reading, alone):
        student.line.recv()
    cases = {
        "local 1": own[:1],
        "served 1": asking[:1],
        "local 2": own,
        "served 2": asking,
        "alone 1": [alone],
        "read 1": [reading],
    }
    return cases, servers


def measure(students: list[Child], steps: int) -> dict[str, float]:
    """Let the students of a case learn at the same time: their rate, processor time for an image and largest memory."""
    for student in students:
        student.line.send(steps)
    found = [student.line.recv() for student in students]
    images = sum(one["images"] for one in found)
    return {
        "images_per_second": images / max(one["seconds"] for one in found),
        "own_ms_per_image": 1000 * sum(one["own_seconds"] for one in found) / images,
        "memory_mb": max(one["memory_mb"] for one in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="fcos:resnet50,neck=128")
    parser.add_argument("--student", default="fcos:resnet18,width=0.5,neck=128")
    parser.add_argument("--method", default="pkd")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, nargs=2, default=[0, 1])
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    load_data(data_of(chosen))  # made once, before the processes start
    with tempfile.TemporaryDirectory() as folder:
        cases, servers = started(chosen, folder)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
        for _ in range(chosen.rounds):
            for name, students in cases.items():
                rounds[name].append(measure(students, chosen.steps))
        for child in {*itertools.chain(*cases.values()), *servers}:
            child.line.send(0)
            child.process.join()
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "hardware": hardware(),
        "versions": versions(),
        "note": chosen.note,
        **{
            name: getattr(chosen, name) for name in ("teacher", "student", "method", "size", "batch", "images", "steps", "rounds")
        },
        "cases": {
            name: {
                "images_per_second": round(statistics.median(one["images_per_second"] for one in found), 2),
                "best": round(max(one["images_per_second"] for one in found), 2),
                "each": [round(one["images_per_second"], 2) for one in found],
                "own_ms_per_image": round(statistics.median(one["own_ms_per_image"] for one in found), 2),
                "memory_mb": round(max(one["memory_mb"] for one in found)),
            }
            for name, found in rounds.items()
        },
    }
    print(json.dumps(result, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
