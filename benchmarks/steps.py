"""What distillation adds to a training step, and what this library adds to a plain loop: ratios, measured in one run.

    uv run python benchmarks/steps.py --out benchmarks/results/steps_cpu.json

For each method: one online step (teacher forward, student forward and backward, losses, optimizer) against the sum of the
student's own step and the teacher's forward, and, for the framework, ``detdistill.train``'s loop against a bare PyTorch
loop over the same batches. All contenders take turns in one process, so that they share the noise; ratios are of medians.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch

from detdistill.data.discover import load_data
from detdistill.data.loader import DetectionLoader
from detdistill.data.transforms import ViewSettings
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Detector, Teacher
from detdistill.methods.compose import build_method
from detdistill.methods.contract import Method
from detdistill.settings import TrainSettings
from detdistill.structures import Batch, Clock
from detdistill.training.module import StageModule
from detdistill.training.optimizers import build_optimizer, build_schedule
from detdistill.training.run import hardware, plain_stage, versions

METHODS = ("fitnet", "pkd", "cwd", "fkd", "fgd", "mgd")


def turns(contenders: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each, one call each per round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds + 1):
        for name, call in contenders.items():
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if index:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def method_ratios(
    teacher_name: str, student_name: str, size: int, batch_size: int, rounds: int, device: str
) -> list[dict[str, float | str]]:
    """Online step over (student step + teacher forward), for each method."""
    splits = load_data(f"digits:train={batch_size},val={batch_size},size=128,seed=0")
    loader = DetectionLoader(splits.train, ViewSettings(size=size), batch_size, train=True)
    batch: Batch = next(iter(loader)).to(device)
    teacher = Teacher(build_detector(teacher_name, splits.classes)).to(device)
    settings = TrainSettings(lr=1e-5)

    def stepper(student: Detector, method: Method | None) -> Callable[[], None]:
        modules = [student] if method is None else [student, method]
        optimizer = build_optimizer(modules, settings)
        stage = plain_stage(student) if method is None else method.stages(student)[-1]

        def step() -> None:
            stage.step(batch, Clock(1, 10)).total().backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
            teacher.forget()

        return step

    def look() -> None:
        teacher.observe(batch)
        teacher.forget()

    rows: list[dict[str, float | str]] = []
    for slug in METHODS:
        alone = build_detector(student_name, splits.classes).to(device).train()
        taught = build_detector(student_name, splits.classes).to(device).train()
        method = build_method(slug, teacher, taught).to(device)
        found = turns({"student": stepper(alone, None), "teacher": look, "online": stepper(taught, method)}, rounds, device)
        ratio = found["online"] / (found["student"] + found["teacher"])
        rows.append({"method": slug, "ratio": round(ratio, 3), **{name: round(value, 4) for name, value in found.items()}})
        print(rows[-1], flush=True)
    return rows


def framework_ratio(rounds: int, device: str) -> dict[str, float]:
    """Seconds of our training loop over those of a bare loop, for the small FCOS of the demo; one epoch each, in turns."""
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
                module = StageModule(student, None, plain_stage(student), settings, steps)
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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    chosen = parser.parse_args()
    framework = framework_ratio(chosen.rounds, chosen.device)
    print("framework", framework, flush=True)
    rows = method_ratios(chosen.teacher, chosen.student, chosen.size, chosen.batch, chosen.rounds, chosen.device)
    content = {
        "what": f"{chosen.student} under {chosen.teacher}, {chosen.size} pixels, batch {chosen.batch}, float32; "
        "framework: demo's student",
        "command": "uv run python benchmarks/steps.py " + shlex.join(sys.argv[1:]),
        "online_over_parts": rows,
        "loop_over_plain_pytorch": framework,
        "hardware": hardware(),
        "versions": versions(),
    }
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
