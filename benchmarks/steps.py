"""Cost of distillation in a training step, and of this library compared with a plain loop: ratios, measured in one run.

    uv run python benchmarks/steps.py --out benchmarks/results/steps_cpu.json

For each method, one online step (teacher forward, student forward and backward, losses, optimizer) is divided by two sums.
``ratio``: the student's own step and the teacher's forward, up to the parts that the method reads. ``ratio_to_parts``: all
parts, each measured alone: the student's step, the method's ``teach``, and the method's own terms with their backward pass. For
detectors with queries, the results also have the share of one-to-one matching in the step, and the share of scipy's solver. For
the framework, the loop of ``detdistill.train`` is compared with a bare PyTorch loop over the same batches. All cases are measured
alternately in one process, so that noise affects them alike; ratios are of medians. With OMP_NUM_THREADS=1 the methods are
measured in processor time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch

from detdistill.data.discover import load_data
from detdistill.data.loader import DetectionLoader
from detdistill.data.transforms import ViewSettings
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import FEATURES, PREDICTION, Detector, Teacher
from detdistill.methods.shared.compose import build_method
from detdistill.methods.shared.contract import Method
from detdistill.settings import TrainSettings
from detdistill.structures import Batch, Clock, map_tensors
from detdistill.training.machine import hardware, versions
from detdistill.training.module import StageModule
from detdistill.training.optimizers import build_optimizer, build_schedule
from detdistill.training.run import plain_stage

METHODS = ("fitnet", "pkd", "cwd", "fkd", "fgd", "mgd")


def clock(device: str) -> Callable[[], float]:
    """Processor seconds if one thread does all the work, because other processes disturb them least; otherwise wall time."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def turns(contenders: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each case; each round calls every case once."""
    now = clock(device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds + 1):
        for name, call in contenders.items():
            if device == "cuda":
                torch.cuda.synchronize()
            started = now()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if index:  # the first round warms up
                seconds[name].append(now() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


MATCHING = (
    ("detdistill.detectors.queries.shared.transformers_detector", "TransformersDetector.assign"),
    ("detdistill.detectors.queries.shared.deformable", "hungarian"),
    ("detdistill.detectors.queries.adamixer", "AdaMixerDetector.assign"),
    ("detdistill.methods.detrdistill.method", "detrdistill_match"),
    ("detdistill.methods.d3etr.method", "d3etr_match"),
)
"""Functions of one-to-one matching, including the computation of costs."""
SOLVER = tuple(
    (module, "linear_sum_assignment")
    for module in (
        "detdistill.functional.matching",
        "transformers.loss.loss_for_object_detection",
        "transformers.loss.loss_deformable_detr",
        "transformers.loss.loss_rt_detr",
        "transformers.loss.loss_lw_detr",
    )
)


class Watch:
    """Counts the seconds inside some functions; a call inside another counted call is not counted twice."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds = 0.0
        self.depth = 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its seconds are counted."""

        def call(*arguments: Any, **named: Any) -> Any:
            started = self.now()
            self.depth += 1
            try:
                return function(*arguments, **named)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += self.now() - started

        return call


@contextlib.contextmanager
def watching(places: Sequence[tuple[str, str]], now: Callable[[], float]) -> Iterator[Watch]:
    """Count the seconds inside the given functions, named by module and qualified name."""
    watch = Watch(now)
    with contextlib.ExitStack() as stack:
        for module, place in places:
            *path, name = place.split(".")
            owner: Any = importlib.import_module(module)
            for part in path:
                owner = getattr(owner, part)
            stack.enter_context(mock.patch.object(owner, name, watch.timed(getattr(owner, name))))
        yield watch


def matching_shares(step: Callable[[], None], rounds: int, device: str) -> dict[str, float]:
    """Shares of matching, and of the solver alone, in the seconds of a step; medians over steps."""
    now = clock(device)
    shares: dict[str, list[float]] = {"matching": [], "solver": []}
    for _ in range(rounds):
        with watching(MATCHING, now) as matching, watching(SOLVER, now) as solver:
            started = now()
            step()
            whole = now() - started
        shares["matching"].append(matching.seconds / whole)
        shares["solver"].append(solver.seconds / whole)
    return {f"{name}_share": round(statistics.median(values), 4) for name, values in shares.items()}


def method_ratios(
    teacher_name: str, student_name: str, methods: Sequence[str], size: int, batch_size: int, rounds: int, device: str
) -> list[dict[str, float | str]]:
    """For each method, the online step divided by student step plus teacher forward, and by the sum of all its parts."""
    splits = load_data(f"digits:train={batch_size},val={batch_size},size=128,seed=0")
    loader = DetectionLoader(splits.train, ViewSettings(size=size), batch_size, train=True)
    batch: Batch = next(iter(loader)).to(device)
    detector = build_detector(teacher_name, splits.classes)
    teacher, kept = Teacher(detector).to(device), Teacher(detector).to(device)
    settings = TrainSettings(lr=1e-5)

    def stepper(student: Detector, method: Method | None) -> Callable[[], None]:
        modules = [student] if method is None else [student, method]
        optimizer = build_optimizer(modules, settings)
        stage = plain_stage(student) if method is None else method.stages(student)[-1]

        def step() -> None:
            taught = None if stage.learns_from is None else stage.learns_from.teach(batch)
            stage.step(batch, taught, Clock(1, 10)).total().backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
            teacher.forget()

        return step

    def terms(student: Detector, slug: str) -> Callable[[], None]:
        """The method's own terms on features and knowledge computed before, with their backward pass down to the features."""
        method = build_method(slug, kept, student).to(device)  # of a teacher that remembers the batch
        taught = method.teach(batch)
        whole = student(batch, PREDICTION | method.requirements.student).float()
        seen = map_tensors(whole, lambda t: t.detach().requires_grad_(t.is_floating_point()))

        def learn() -> None:
            method.learn(student, seen, taught, batch, Clock(1, 10)).total().backward()
            student.zero_grad()

        return learn

    rows: list[dict[str, float | str]] = []
    for slug in methods:
        alone = build_detector(student_name, splits.classes).to(device).train()
        learner = build_detector(student_name, splits.classes).to(device).train()
        method = build_method(slug, teacher, learner).to(device)

        def teach(method: Method = method) -> None:
            method.teach(batch)
            teacher.forget()

        def look(method: Method = method) -> None:
            teacher.observe(batch, method.requirements.teacher or FEATURES)
            teacher.forget()

        online = stepper(learner, method)
        contenders = {"student": stepper(alone, None), "teacher": look, "teach": teach, "terms": terms(alone, slug)}
        found = turns({**contenders, "online": online}, rounds, device)
        row: dict[str, float | str] = {"method": slug}
        row["ratio"] = round(found["online"] / (found["student"] + found["teacher"]), 3)
        row["ratio_to_parts"] = round(found["online"] / (found["student"] + found["teach"] + found["terms"]), 3)
        row |= {name: round(value, 4) for name, value in found.items()}
        if learner.spec.family == "queries":
            row |= matching_shares(online, rounds, device)
        rows.append(row)
        print(row, flush=True)
        kept.forget()
    return rows


def framework_ratio(rounds: int, device: str) -> dict[str, float]:
    """Seconds of our training loop divided by those of a bare loop, for the small FCOS of the demo; alternating epochs."""
    splits = load_data("digits:train=400,val=8,size=128,seed=0")
    name = "fcos:resnet10t,channels=16-32-64-128,stem=16,neck=64,levels=3-5,convs=2"
    settings = TrainSettings(batch=8, size=128, lr=3e-3, in_memory=True, flip=0.0, epochs=1, device="cpu", monitor_every=0)
    steps = 50
    loader = DetectionLoader(splits.train, ViewSettings(size=128, flip=0.0), 8, train=True, in_memory=True)
    list(loader)

    def plain() -> None:
        student = build_detector(name, splits.classes).to(device).train()
        optimizer = build_optimizer([student], settings)
        schedule = build_schedule(optimizer, settings, steps)
        for batch in loader:
            moved = batch.to(device)
            total = student.loss(student(moved).prediction, moved).total()
            total.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), settings.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    for index in range(rounds + 1):
        for contender in ("plain", "ours"):
            if contender == "plain":
                started = time.perf_counter()
                plain()
                spent = time.perf_counter() - started
            else:
                student = build_detector(name, splits.classes).train()
                module: Any = StageModule(student, None, plain_stage(student), settings, steps)
                module.train_dataloader = lambda: loader
                trainer = L.Trainer(
                    accelerator="gpu" if device == "cuda" else "cpu",
                    devices=1,
                    max_epochs=1,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    gradient_clip_val=settings.clip,
                    use_distributed_sampler=False,
                )
                started = time.perf_counter()
                trainer.fit(module)
                spent = time.perf_counter() - started
            if index:
                seconds[contender].append(spent)
    found = {contender: statistics.median(values) for contender, values in seconds.items()}
    return {"ratio": round(found["ours"] / found["plain"], 3), **{key: round(value, 3) for key, value in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--teacher", default="retinanet:resnet50", help="model string")
    parser.add_argument("--student", default="retinanet:resnet18", help="model string")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="method strings")
    parser.add_argument("--no-framework", action="store_true", help="leave out the comparison of training loops")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    chosen = parser.parse_args()
    framework = None if chosen.no_framework else framework_ratio(chosen.rounds, chosen.device)
    print("framework", framework, flush=True)
    rows = method_ratios(chosen.teacher, chosen.student, chosen.methods, chosen.size, chosen.batch, chosen.rounds, chosen.device)
    content = {
        "what": f"{chosen.student} under {chosen.teacher}, {chosen.size} pixels, batch {chosen.batch}, float32"
        + ("" if framework is None else "; framework: demo's student"),
        "command": "uv run python benchmarks/steps.py " + shlex.join(sys.argv[1:]),
        "clock": clock(chosen.device).__name__,
        "online_over_parts": rows,
        **({} if framework is None else {"loop_over_plain_pytorch": framework}),
        "hardware": hardware(),
        "versions": versions(),
    }
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
