"""Compare the speed of two checkouts of this project: ratios of processor time, medians over alternating rounds.

    OMP_NUM_THREADS=1 uv run python benchmarks/revisions.py --other ../old --out benchmarks/results/revisions_cpu.json

Measured (this checkout / the other one; below 1 is faster):

- ``import``: a new process that imports ``detdistill.training.run``.
- ``teach NAME``: a teacher's forward pass that returns the maps of backbone and neck, as a composition of two methods needs.
- ``train NAME``: forward and backward pass of a student alone.
- ``d3etr step``: forward and backward pass of one online step of D3ETR.
- ``second pass``: a bf16 autocast step of KD-DETR, in which the student decodes a second time.
- ``assign NAME``: assignment of two images of 640 px with 500 boxes each.
- ``many classes NAME`` and ``memory of many classes NAME``: forward and backward pass with 1203 classes, one image of 320 px; the
  second case gives the memory that the step adds at its peak, in MB.

Each checkout has its own process, with the same random weights and images; both use the packages of this environment. The
processes are measured alternately.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DETR = "deformable_detr:resnet18,dim=64,heads=4,ffn=128,queries=60,encoder=2,decoder=3"
CASES = (
    "import",
    "teach fcos:resnet50",
    "teach faster_rcnn:resnet50",
    "teach fcos:resnet18",
    *(f"train {name}:resnet18" for name in ("deformable_detr", "rt_detr", "d_fine")),
    "d3etr step of conditional_detr:resnet18",
    "d3etr step of deformable_detr:resnet18",
    f"second pass of {DETR}",
    *(f"assign {name}:resnet10t" for name in ("retinanet", "ssd", "atss", "gfl", "fcos")),
    "many classes retinanet:resnet10t",
    "memory of many classes retinanet:resnet10t",
)


# ------------------------------------------------------------------------------------------- in the process of a checkout


def batch_of(detector: Any, size: int = 320, images: int = 2, boxes: int = 4) -> Any:
    """A batch of noise with a few boxes, or with many of sides from 8 to 256 pixels."""
    import torch

    from detdistill.structures import Batch, Target, View

    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(images, 3, size, size, generator=generator)
    sides = torch.full((images, boxes, 2), size * 0.3)
    if boxes > 4:
        sides = 8 * 32 ** torch.rand(images, boxes, 2, generator=generator)
    corners = torch.rand(images, boxes, 2, generator=generator) * (size * 0.5 if boxes <= 4 else size - sides)
    labels = torch.zeros(boxes, dtype=torch.int64)
    targets = tuple(
        Target(some, labels, torch.zeros(boxes, dtype=torch.bool)) for some in torch.cat([corners, corners + sides], dim=-1)
    )
    views = tuple(View((size, size), (size, size)) for _ in range(images))
    return Batch(pixels, torch.full((images, 2), size), targets, ids=tuple(range(images)), views=views)


def prepared(case: str) -> Callable[[], object]:
    """Prepare a case; return the call to measure."""
    import torch

    from detdistill.detectors.build import build_detector
    from detdistill.detectors.contract import Teacher

    torch.manual_seed(0)
    if case.startswith("assign"):
        return assigning(case.split()[-1])
    if "many classes" in case:
        return with_many_classes(case.split()[-1])
    if case.startswith("train"):
        return training(case.split()[-1])
    kind, _, name = case.partition(" ") if case.startswith("teach") else (case.split(" of ")[0], "", case.split(" of ")[-1])
    teacher = Teacher(build_detector(name, ["a", "b"]))
    batch = batch_of(teacher.detector)
    if kind == "teach":
        if hasattr(teacher, "fold_norms"):  # as where a run loads its teacher; not in earlier versions
            teacher.fold_norms()
        return lambda: look_at_backbone_and_neck(teacher, batch)
    student = build_detector(name, ["a", "b"]).train()
    return stepping(teacher, student, batch, half=kind == "second pass")


def assigning(name: str) -> Callable[[], object]:
    """Prepare the assignment of many boxes."""
    import torch

    from detdistill.detectors.build import build_detector

    detector = build_detector(name, ["a", "b"]).train()
    batch = batch_of(detector, size=640, boxes=500)
    with torch.no_grad():
        prediction = detector.predict(detector.features(batch), batch)
    return lambda: detector.assign(prediction, batch)


def with_many_classes(name: str) -> Callable[[], None]:
    """Prepare a training step with 1203 classes."""
    from detdistill.detectors.build import build_detector

    detector = build_detector(name, [str(number) for number in range(1203)]).train()
    batch = batch_of(detector, images=1)

    def step() -> None:
        detector.zero_grad()
        detector.loss(detector.predict(detector.features(batch), batch), batch).total().backward()

    return step


def training(name: str) -> Callable[[], None]:
    """Prepare a training step of a student alone."""
    from detdistill.detectors.build import build_detector

    detector = build_detector(name, ["a", "b"]).train()
    batch = batch_of(detector)

    def step() -> None:
        detector.zero_grad()
        detector.loss(detector(batch).prediction, batch).total().backward()

    return step


def look_at_backbone_and_neck(teacher: Any, batch: Any) -> None:
    """Compute the maps of backbone and neck for one batch."""
    import torch

    teacher.forget()
    with torch.no_grad():
        try:
            from detdistill.structures import Look
        except ImportError:  # commit 4da03f5
            teacher.observe(batch, backbone=True)
        else:
            teacher.observe(batch, Look(backbone=True))


def stepping(teacher: Any, student: Any, batch: Any, half: bool) -> Callable[[], None]:
    """Prepare one online step, forward and backward."""
    import torch

    from detdistill import build_method
    from detdistill.structures import Clock

    method = build_method("kd_detr" if half else "d3etr", teacher, student)
    stage = method.stages(student)[-1]

    def step() -> None:
        teacher.forget()
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            try:
                from detdistill.methods.shared.contract import teach_by_canvas
            except ImportError:  # commit 4da03f5
                losses = stage.step(batch, Clock(5, 10, 1))
            else:
                losses = stage.step(batch, teach_by_canvas(stage.learns_from, batch), Clock(5, 10, 1))
        losses.total().backward()

    return step


def serve() -> None:
    """Read the name of a case from each line of stdin, run it once, and print its seconds."""
    calls: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        case = line.rstrip("\n")
        if case not in calls:
            calls[case] = prepared(case)
            calls[case]()
        if case.startswith("memory"):
            print(megabytes(calls[case]), flush=True)
            continue
        started = time.process_time()
        calls[case]()
        print(time.process_time() - started, flush=True)


def megabytes(call: Callable[[], object]) -> float:
    """Memory that a call adds to the process at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size

    def kilobytes(name: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])

    before = kilobytes("VmRSS")
    call()
    return (kilobytes("VmHWM") - before) / 1024


# ----------------------------------------------------------------------------------------------------------- the comparison


class Checkout:
    """A checkout and the process that measures in it."""

    def __init__(self, root: Path) -> None:
        """Start the process."""
        self.environment = os.environ | {"PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": ""}
        command = [sys.executable, __file__, "--serve", "--other", "."]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment, cwd=root
        )

    def seconds(self, case: str) -> float:
        """Run a case once; return its processor seconds."""
        if case == "import":
            before = os.times()
            subprocess.run([sys.executable, "-c", "import detdistill.training.run"], env=self.environment, check=True)
            after = os.times()
            return after.children_user + after.children_system - before.children_user - before.children_system
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main() -> None:
    """Measure all cases, print a table, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="another checkout of the project")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Measure each case alternately in both checkouts; the file is written after each case and keeps cases measured before."""
    from detdistill.training.machine import hardware, versions

    mine, other = Checkout(ROOT), Checkout(options.other.resolve())
    described = {"hardware": hardware(), "versions": versions(), "rounds": options.rounds}
    found: dict[str, dict[str, float]] = {}
    if options.out and options.out.exists():
        found = json.loads(options.out.read_text())["cases"]
    for case in options.cases:
        pairs = []
        for index in range(options.rounds):
            first, second = (mine, other) if index % 2 else (other, mine)
            seconds = {first: first.seconds(case), second: second.seconds(case)}
            pairs.append((seconds[mine], seconds[other]))
        ratio = statistics.median(mine / other for mine, other in pairs)
        here, there = (statistics.median(column) for column in zip(*pairs, strict=True))
        unit = "MB" if case.startswith("memory") else "seconds"
        found[case] = {"ratio": round(ratio, 3), unit: round(here, 4), f"other_{unit}": round(there, 4)}
        print(f"{ratio:6.3f}  {here:8.3f} / {there:8.3f} {unit}  {case}", flush=True)
        if options.out:
            options.out.write_text(json.dumps({**described, "cases": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
