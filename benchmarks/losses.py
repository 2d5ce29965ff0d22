"""Time and peak memory of each method's loss, value and gradient, on feature maps of COCO size.

    uv run python benchmarks/losses.py --out benchmarks/results/losses_cpu.json

Five levels (strides 8..128), 256 channels, 800x1088 pixels, batch 2, float32. Time is the median of the repetitions. Peak memory
is that of the process (CPU) or of the device (CUDA), less the memory of maps, modules and their gradients. Each method is
measured in a process of its own.

    uv run python benchmarks/losses.py --released FOLDER --out benchmarks/results/losses_released_cpu.json

Each loss side by side with released code, see ``released/compare.py``. FOLDER holds the repositories, each in ``owner+name`` at
the commit that ``released/*.py`` name, and in ``site`` the packages that these need (mmcv-lite 2.2.0, mmengine 0.10.7, einops and
opencv-python-headless, installed with ``uv pip install --no-deps --target FOLDER/site``).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from detdistill.detectors.contract import Detector, DetectorSpec, Teacher
from detdistill.methods.shared.catalogue import method_slugs
from detdistill.methods.shared.compose import build_method, method_class
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.needs import Needs
from detdistill.structures import Batch, Clock, Features, Observation, Target, View
from detdistill.training.machine import hardware, versions
from released.compare import compare_all, markdown

STRIDES = (8, 16, 32, 64, 128)
SIZE = (800, 1088)
CHANNELS = 256
METHODS = ("fitnet", "fitnet,variant=normalized", "fitnet,variant=modified", "pkd", "cwd", "fkd", "fgd", "mgd", "skd")


class Pyramid(Detector):
    """A detector with only a spec, because the losses need nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = DetectorSpec("pyramid:maps", "dense", ("object",), (CHANNELS,) * len(STRIDES), STRIDES)

    features = predict = assign = loss = detect = positives = export = None  # type: ignore[assignment]


def measure(method: str, device: str, repeat: int) -> dict[str, Any]:
    """Median seconds and peak memory in bytes of one method."""
    torch.manual_seed(0)
    shapes = [(2, CHANNELS, -(-SIZE[0] // stride), -(-SIZE[1] // stride)) for stride in STRIDES]
    student_maps = tuple(torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    teacher_maps = tuple(torch.randn(shape, device=device) for shape in shapes)
    student, teacher = Pyramid(), Teacher(Pyramid())
    built = build_method(method, teacher, student).to(device)
    boxes = torch.rand(2, 10, 4, device=device).sort(dim=-1).values[..., [0, 1, 2, 3]]
    boxes = boxes[..., [0, 1, 2, 3]] * torch.tensor([SIZE[1], SIZE[0], SIZE[1], SIZE[0]], device=device)
    labels, crowd = torch.zeros(10, dtype=torch.int64, device=device), torch.zeros(10, dtype=torch.bool, device=device)
    targets = tuple(Target(image, labels, crowd) for image in boxes)
    sizes = torch.tensor([SIZE, SIZE], device=device)
    batch = Batch(torch.zeros(2, 3, *SIZE, device=device), sizes, targets, (0, 1), (View(SIZE, SIZE), View(SIZE, SIZE)))
    seen, taught = Observation(Features(student_maps, STRIDES)), Observation(Features(teacher_maps, STRIDES))

    def once() -> None:
        for parameter in (*student_maps, *built.parameters()):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
        built.learn(student, seen, taught, batch, Clock(1, 10)).total().backward()

    for parameter in (*student_maps, *built.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    if device == "cuda":
        once()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        once()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        once()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    maps_bytes = sum(level.numel() * 4 for level in student_maps)
    return {
        "method": method,
        "seconds": round(statistics.median(seconds), 4),
        "peak_mb": round(peak / 2**20, 1),
        "peak_over_maps": round(peak / maps_bytes, 2),
        "trainable_parameters": sum(p.numel() for p in built.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--released", type=Path, help="folder of released repositories: compare with these")
    parser.add_argument("--table", type=Path, help="print results of --released as a table and end")
    parser.add_argument("--only", nargs="+", help="with --released: only these comparisons, the others stay as they are in --out")
    parser.add_argument("--method", help="measure this method in this process and print the result as JSON")
    chosen = parser.parse_args()
    if chosen.table:
        print(markdown(json.loads(chosen.table.read_text())["rows"]))
        return
    if chosen.released:
        compare_all(chosen.released, chosen.out, chosen.only)
        return
    if chosen.method:
        print(json.dumps(measure(chosen.method, chosen.device, chosen.repeat)))
        return
    kinds = {slug: method_class(slug) for slug in method_slugs()}
    on_maps = {slug for slug, kind in kinds.items() if kind.teach is Method.teach and kind.needs == Needs()}
    missing = on_maps - {method.split(",")[0] for method in METHODS}
    assert not missing, f"not benchmarked: {missing}"
    rows = []
    for method in METHODS:
        command = [sys.executable, __file__, "--method", method, "--device", chosen.device, "--repeat", str(chosen.repeat)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    shapes = [[-(-SIZE[0] // stride), -(-SIZE[1] // stride)] for stride in STRIDES]
    content = {
        "what": f"value and gradient of each loss, batch 2, {CHANNELS} channels, maps {shapes}, float32",
        "command": f"uv run python benchmarks/losses.py --device {chosen.device} --out {chosen.out}",
        "maps_mb_of_one_side": round(sum(2 * CHANNELS * h * w * 4 for h, w in shapes) / 2**20, 1),
        "rows": rows,
        "hardware": hardware(),
        "versions": versions(),
    }
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
