"""Throughput of students with a teacher in their own process, and with a served one: images per second, on one machine.

    OMP_NUM_THREADS=1 uv run python benchmarks/serving.py --out benchmarks/results/serving_cpu.json

Every process has one thread and one core (``sched_setaffinity``; ``--cores`` names them). A student's step is forward and
backward, the method's losses and the optimizer; its batches are prepared in its own process, and the question about the next
batch is on its way meanwhile. Cases:

* ``local 1``, ``local 2``: one or two students, each with a teacher of its own, on cores 0 and 1;
* ``served 1``, ``served 2``: the teacher on core 1; one student, or two that share core 0 and the teacher;
* ``alone 1``: one student without a teacher on core 0, the most that a served student could reach;
* ``read 1``: as ``served 1``, but the server has written all views into a cache before, and reads them.

Images per second are those of all students of a case together. Peak memory is that of a student's process. The processes of all
cases are started first and warmed up; then the cases take turns, so that noise affects them alike, and the others wait idle.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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
from detdistill.methods.shared.contract import teach_by_canvas
from detdistill.serving.client import ServedTeacher
from detdistill.settings import TrainSettings
from detdistill.structures import Batch, Clock
from detdistill.training.machine import hardware, versions
from detdistill.training.optimizers import build_optimizer
from detdistill.training.run import plain_stage

WARM_UP = 3


def data_of(chosen: argparse.Namespace) -> str:
    return f"digits:train={chosen.images},val=4,size={chosen.size},seed=0"


def teacher_of(chosen: argparse.Namespace) -> Any:
    """The same random weights in every process, because the rate does not depend on them."""
    torch.manual_seed(0)
    return build_detector(chosen.teacher, load_data(data_of(chosen)).classes)


def serve(chosen: argparse.Namespace) -> None:
    """Serve until standard input ends."""
    settings: dict[str, Any] = {"size": chosen.size, "flip": 0.0, "batch": chosen.batch, "device": "cpu", "threads": 1}
    place = chosen.folder or None
    server = detdistill.teach(teacher_of(chosen), chosen.method, "127.0.0.1:0", data=data_of(chosen), out=place, **settings)
    print(server.url, flush=True)
    sys.stdin.read()
    server.stop()


def endless(loader: DetectionLoader) -> Iterator[Batch]:
    while True:
        yield from loader


def learn(chosen: argparse.Namespace) -> None:
    """Warm up; then, for every line that comes, learn for some steps and print their seconds."""
    splits = load_data(data_of(chosen))
    torch.manual_seed(0)
    student = build_detector(chosen.student, splits.classes).train()
    served = ServedTeacher(chosen.url, 120.0) if chosen.url else None
    views = ViewSettings(size=chosen.size, flip=0.0)
    ahead = None if served is None else served.ahead
    loader = DetectionLoader(splits.train, views, chosen.batch, train=True, seed=chosen.seed, in_memory=True, ahead=ahead)
    if chosen.alone:
        stage, method, source = plain_stage(student), None, teach_by_canvas
    else:
        live = Teacher(teacher_of(chosen)).fold_norms() if served is None else served.teacher()
        method = build_method(chosen.method, live, student)
        stage = method.stages(student)[-1]
        if served is not None:
            served.check(chosen.method, splits.train, views, None)
        source = teach_by_canvas if served is None else served.source(chosen.method, method)
    modules = [student] if method is None else [student, method]
    optimizer = build_optimizer(modules, TrainSettings())
    batches = endless(loader)

    def steps(count: int) -> None:
        for batch in itertools.islice(batches, count):
            taught = None if stage.learns_from is None else source(stage.learns_from, batch)
            losses = stage.step(batch, taught, Clock(500, 1000, 5))
            optimizer.zero_grad(set_to_none=True)
            losses.total().backward()
            optimizer.step()
            if method is not None:
                for teacher in method.teachers():
                    teacher.forget()

    steps(-(-chosen.images // chosen.batch) if chosen.whole else WARM_UP)
    print("ready", flush=True)
    while sys.stdin.readline():
        started = time.perf_counter()
        steps(chosen.steps)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"images": chosen.steps * chosen.batch, "seconds": seconds, "peak_mb": peak}), flush=True)


class Child:
    """A process of this script on a core of its own."""

    def __init__(self, chosen: argparse.Namespace, core: int, **options: Any) -> None:
        own = ("teacher", "student", "method", "size", "batch", "images", "steps")
        words = [f"--{name}={value}" for name, value in {**{name: getattr(chosen, name) for name in own}, **options}.items()]
        command = [sys.executable, __file__, *words]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment, preexec_fn=lambda: os.sched_setaffinity(0, {core}), **pipes)

    def line(self) -> str:
        """The next line of its output."""
        assert self.process.stdout is not None
        text = self.process.stdout.readline().strip()
        if not text:
            raise SystemExit("a process ended early")
        return text

    def go(self) -> None:
        """Let it learn for some steps."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def started(chosen: argparse.Namespace, folder: str) -> tuple[dict[str, list[Child]], list[Child]]:
    """The students of each case, warmed up, and the servers."""
    first, second = chosen.cores
    servers = [Child(chosen, second, role="server", folder=place) for place in ("", f"{folder}/cache")]
    served, read = ({"role": "student", "url": server.line()} for server in servers)
    own = [Child(chosen, core, role="student", seed=core) for core in (first, second)]
    asking = [Child(chosen, first, seed=seed, **served) for seed in (0, 1)]
    reading = Child(chosen, first, whole=1, **read)
    alone = Child(chosen, first, role="student", alone=1)
    for student in (*own, *asking, reading, alone):
        student.line()
    cases = {
        "local 1": own[:1],
        "served 1": asking[:1],
        "local 2": own,
        "served 2": asking,
        "alone 1": [alone],
        "read 1": [reading],
    }
    return cases, servers


def measure(students: list[Child]) -> dict[str, float]:
    """Let the students of a case learn at the same time: their images per second, and the largest peak memory of one."""
    for student in students:
        student.go()
    found = [json.loads(student.line()) for student in students]
    rate = sum(one["images"] for one in found) / max(one["seconds"] for one in found)
    return {"images_per_second": rate, "peak_mb": max(one["peak_mb"] for one in found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="fcos:resnet50,width=0.5,neck=128")
    parser.add_argument("--student", default="fcos:resnet18,width=0.5,neck=128")
    parser.add_argument("--method", default="pkd")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, nargs=2, default=[0, 1])
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--out", type=Path)
    for name in ("role", "url", "folder"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    for name in ("seed", "alone", "whole"):
        parser.add_argument(f"--{name}", type=int, default=0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.role:
        {"server": serve, "student": learn}[chosen.role](chosen)
        return
    with tempfile.TemporaryDirectory() as folder:
        cases, servers = started(chosen, folder)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
        for _ in range(chosen.rounds):
            for name, students in cases.items():
                rounds[name].append(measure(students))
        for child in {*itertools.chain(*cases.values()), *servers}:
            child.end()
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
                "each": [round(one["images_per_second"], 2) for one in found],
                "peak_mb": round(max(one["peak_mb"] for one in found)),
            }
            for name, found in rounds.items()
        },
    }
    print(json.dumps(result, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
