"""AdaMixer's size and cost against the published numbers, and the seconds of a training step on a CPU.

    uv run python benchmarks/adamixer_published.py --out benchmarks/results/adamixer_published.json

Published: 135 M parameters and 103 to 104 GFLOPs for a ResNet-50, 100 queries and 6 stages on an image of 800x1280 (Gao et
al., CVPR 2022, comparison and ablation tables; quoted from memory, not read again for this file). A FLOP there is one
multiplication with its addition, so torch's count, which holds these for two, is halved. Sampling, norms and activations
are not counted.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from detdistill.detectors.build import build_detector
from detdistill.structures import Batch, Target, View
from detdistill.training.run import hardware, versions

PUBLISHED = {"parameters_m": 135, "gflops": [103, 104]}


def some_batch(images: int, height: int, width: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    target = Target(torch.tensor([[10.0, 10.0, 60.0, 50.0]]), torch.tensor([3]), torch.zeros(1, dtype=torch.bool))
    pixels = torch.rand(images, 3, height, width, generator=generator)
    view = View((height, width), (height, width))
    return Batch(pixels, torch.tensor([[height, width]] * images), (target,) * images, tuple(range(images)), (view,) * images)


def size_and_cost(name: str, height: int, width: int) -> dict[str, object]:
    """Parameters (all, of the stages) in millions and multiply-adds in thousands of millions, by part."""
    detector = build_detector(name, [f"class {index}" for index in range(80)]).eval()
    batch = some_batch(1, height, width)
    parts = {}
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            features = detector.features(batch)
        parts["backbone_and_neck"] = counter.get_total_flops() / 2e9
        with FlopCounterMode(display=False) as counter:
            detector.predict(features, batch)
        parts["stages"] = counter.get_total_flops() / 2e9
    return {
        "model": name,
        "image_hw": [height, width],
        "parameters_m": round(sum(parameter.numel() for parameter in detector.parameters()) / 1e6, 2),
        "parameters_of_stages_m": round(sum(parameter.numel() for parameter in detector.model.stages.parameters()) / 1e6, 2),
        "gflops": round(sum(parts.values()), 2),
        "gflops_by_part": {part: round(value, 2) for part, value in parts.items()},
    }


def step_seconds(name: str, images: int, side: int, rounds: int) -> dict[str, object]:
    """Median seconds of one forward and backward pass with the loss."""
    detector = build_detector(name, [f"class {index}" for index in range(10)]).train()
    batch = some_batch(images, side, side)
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        detector.loss(detector(batch).prediction, batch).total().backward()
        seconds.append(time.perf_counter() - started)
    return {
        "model": name,
        "images": images,
        "side": side,
        "threads": torch.get_num_threads(),
        "seconds": round(statistics.median(seconds[1:]), 4),  # the first round warms up
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    result = {
        "what": "AdaMixer R50, 100 queries, 6 stages: parameters and multiply-adds; forward and backward on a CPU",
        "command": "uv run python " + shlex.join(sys.argv),
        "published": PUBLISHED,
        "measured": size_and_cost("adamixer:resnet50", 800, 1280),
        "steps": [
            step_seconds(
                "adamixer:resnet10t,channels=16-32-64-128,stem=16,dim=64,queries=30,decoder=3,ffn=256", 8, 128, arguments.rounds
            ),
            step_seconds("adamixer:resnet18", 1, 256, arguments.rounds),
        ],
        "hardware": hardware(),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": versions(),
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
