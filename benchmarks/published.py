"""Own detectors compared with published sizes: parameters, multiply-adds per image, and seconds of forward and backward.

    uv run python benchmarks/published.py --out benchmarks/results/published.json

No weights are needed: the counts show that the layers are those of the published models. Multiply-adds are those of backbone,
pyramid and head, without selection, sampling, norms and activations; a multiply-add counts once (torch counts it as two).

Published sizes, quoted without reading the sources again: AdaMixer, ResNet-50, 100 queries, 6 stages, 800x1280: 135 M parameters,
103 to 104 GFLOPs (Gao et al., CVPR 2022). RepPoints (moment), ResNet-50, no GroupNorm: 36.62 M parameters by mmdet's counter,
which counts trained parameters only (all except stem and first stage).
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from detdistill.detectors.build import build_detector
from detdistill.structures import Batch, Target, View
from detdistill.training.machine import hardware, versions

SIZE = (800, 1280)
SMALL = ("resnet10t,channels=16-32-64-128,stem=16", 8, 128)
LARGE = ("resnet18", 1, 256)
"""Backbone, number of images and side in pixels, for the timing."""


def reppoints() -> dict[str, Any]:
    """RepPoints (moment) on ResNet-50, no GroupNorm."""
    name = "reppoints:resnet50,headnorm=none"
    detector: Any = build_detector(name, [str(number) for number in range(80)])
    model = detector.model.eval()
    body = model.backbone.body
    frozen = sum(map(parameters, (body.conv1, body.bn1, body.layer1)))
    parts = {"backbone": body, "neck": model.backbone.fpn, "head": model.head}
    return {
        "model": name,
        "parameters": {part: parameters(module) for part, module in parts.items()} | {"all": parameters(model)},
        "millions_without_stem_and_first_stage": round((parameters(model) - frozen) / 1e6, 2),
        "quoted_millions": 36.62,
        "giga_multiply_adds": multiply_adds(lambda batch: model.head(list(model.backbone(batch.images).values()))),
        "steps": [step(f"reppoints:{SMALL[0]},neck=64,levels=3-5", *SMALL[1:]), step(f"reppoints:{LARGE[0]}", *LARGE[1:])],
    }


def adamixer() -> dict[str, Any]:
    """AdaMixer on ResNet-50, 100 queries, 6 stages."""
    name = "adamixer:resnet50"
    detector: Any = build_detector(name, [str(number) for number in range(80)]).eval()
    small = f"adamixer:{SMALL[0]},dim=64,queries=30,decoder=3,ffn=256"
    return {
        "model": name,
        "parameters": {"stages": parameters(detector.model.stages), "all": parameters(detector.model)},
        "quoted_millions": 135,
        "giga_multiply_adds": multiply_adds(lambda batch: detector(batch)),
        "quoted_giga_multiply_adds": [103, 104],
        "steps": [step(small, *SMALL[1:]), step(f"adamixer:{LARGE[0]}", *LARGE[1:])],
    }


def parameters(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def some_batch(images: int, height: int, width: int) -> Batch:
    """A batch of noise with one box per image."""
    generator = torch.Generator().manual_seed(0)
    target = Target(torch.tensor([[10.0, 10.0, 60.0, 50.0]]), torch.tensor([3]), torch.zeros(1, dtype=torch.bool))
    pixels = torch.rand(images, 3, height, width, generator=generator)
    view = View((height, width), (height, width))
    return Batch(pixels, torch.tensor([[height, width]] * images), (target,) * images, tuple(range(images)), (view,) * images)


def multiply_adds(run: Callable[[Batch], object]) -> dict[str, float]:
    """Billions of multiply-adds for one image of ``SIZE``, by kind of operation."""

    def deformable(images: list[int], weight: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
        return 2 * images[0] * out_shape[2] * out_shape[3] * weight[0] * weight[1] * weight[2] * weight[3]

    formula = {torch.ops.torchvision.deform_conv2d: deformable}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formula) as counter:
        run(some_batch(1, *SIZE))
    found = counter.get_flop_counts()["Global"]
    billions = {str(kind).split(".")[-1]: round(count / 2e9, 2) for kind, count in found.items()}
    return billions | {"all": round(counter.get_total_flops() / 2e9, 2)}


def step(name: str, images: int, side: int, rounds: int = 5) -> dict[str, object]:
    """Median seconds of one forward and backward pass with the loss."""
    detector = build_detector(name, [str(number) for number in range(10)]).train()
    batch = some_batch(images, side, side)
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        detector.loss(detector(batch).prediction, batch).total().backward()
        seconds.append(time.perf_counter() - started)
    return {"model": name, "images": images, "side": side, "seconds": round(statistics.median(seconds[1:]), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    result = {
        "command": "uv run python benchmarks/published.py " + shlex.join(sys.argv[1:]),
        "size_hw": SIZE,
        "detectors": [adamixer(), reppoints()],
        "hardware": hardware(),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": versions(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
