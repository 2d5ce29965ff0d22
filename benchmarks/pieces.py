"""Small choices and what they are worth: processor time of each against what it replaced, in turns, medians of the ratios.

    OMP_NUM_THREADS=1 uv run python benchmarks/pieces.py --data ../coco128 --out benchmarks/results/pieces_cpu.json

- ``decoding``: ``read_image`` against PIL alone, on the images of a data set; the pixels must be equal.
- ``pkd``: value and gradient of ``pkd_loss`` against the same formula left to autograd, on maps of a COCO image.
- ``bf16``: forward and backward pass of a convolution under autocast, against float32.
- ``hue``: a turn of the hue in YIQ against one in HSV (another colour), on an image of 640 pixels.
- ``colours``: a view of 640 pixels with colour jitter, with ``hue=yiq`` against ``hue=hsv``.
- ``predict``: an untrained FCOS on images of 640 pixels, eight at a time against one at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from detdistill.data.discover import load_data
from detdistill.data.loader import read_image
from detdistill.data.records import Record
from detdistill.data.transforms import ViewSettings, make_view, turn_hue
from detdistill.detectors.build import build_detector
from detdistill.evaluation.predict import detect_all
from detdistill.losses import pkd_loss
from detdistill.training.machine import hardware, versions


def by_pil(path: Path) -> Tensor:
    """Decode with PIL alone."""
    with Image.open(path) as file:
        return torch.from_numpy(np.array(ImageOps.exif_transpose(file).convert("RGB"))).permute(2, 0, 1).contiguous()


def plain_pkd(student: Tensor, teacher: Tensor) -> Tensor:
    """The formula of ``pkd_loss`` with weight 1, as autograd differentiates it."""
    both = []
    for maps in (student, teacher):
        mean, std = (statistic(dim=(0, 2, 3), keepdim=True) for statistic in (maps.mean, maps.std))
        both.append((maps - mean) / (std + 1e-6))
    return 0.5 * (both[0] - both[1]).square().mean()


def seconds(action: Callable[[], Any]) -> float:
    """Processor time of one call."""
    before = time.process_time()
    action()
    return time.process_time() - before


def compare(new: Callable[[], Any], old: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Median of new / old over alternating rounds, and both medians in seconds."""
    new(), old()
    pairs = [(seconds(new), seconds(old)) for _ in range(rounds)]
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"ratio": round(statistics.median(a / b for a, b in pairs), 3), "new": round(mine, 4), "old": round(theirs, 4)}


def convolution(half: bool) -> Callable[[], None]:
    """A step of a 3x3 convolution with 64 channels on 8 maps of 32 x 32, channels last."""
    layer = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    maps = torch.randn(8, 64, 32, 32).to(memory_format=torch.channels_last).requires_grad_()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = layer(maps)
        out.float().square().mean().backward()

    return step


def coloured(pixels: Tensor, record: Record, hue: Literal["yiq", "hsv"]) -> None:
    """Make a view with colour jitter."""
    settings = ViewSettings(size=640, colour=0.5, hue=hue)
    shown = replace(record, size_hw=(pixels.shape[1], pixels.shape[2]))
    make_view(pixels, shown, settings, torch.Generator().manual_seed(0), train=True)


def main() -> None:
    """Measure all pieces, print them and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", nargs="*", help="names of the pieces to measure; the file keeps the others")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    records = load_data(chosen.data).train.records
    paths = [record.path for record in records[:60]]
    assert all(torch.equal(read_image(path), by_pil(path)) for path in paths)
    student, teacher = torch.randn(2, 256, 100, 136, requires_grad=True), torch.randn(2, 256, 100, 136)
    detector = build_detector("fcos:resnet18,width=0.5,neck=64", ("object",)).eval()
    pixels = torch.randint(256, (3, 480, 640), dtype=torch.uint8)
    views, images = ViewSettings(size=640), paths[:16]
    cases = {
        "decoding": (lambda: [read_image(path) for path in paths], lambda: [by_pil(path) for path in paths]),
        "pkd": (lambda: pkd_loss([student], [teacher], 1.0).backward(), lambda: plain_pkd(student, teacher).backward()),
        "bf16": (convolution(True), convolution(False)),
        "hue": (lambda: turn_hue(pixels, 0.04), lambda: F.adjust_hue(pixels, 0.04)),
        "colours": tuple((lambda hue=hue: coloured(pixels, records[0], hue)) for hue in ("yiq", "hsv")),
        "predict": tuple((lambda count=count: list(detect_all(detector, images, views, batch=count))) for count in (8, 1)),
    }
    found = {}
    if chosen.out and chosen.out.exists():
        found = json.loads(chosen.out.read_text())["pieces"]
    for name, (new, old) in cases.items():
        if name not in (chosen.cases or cases):
            continue
        found[name] = compare(new, old, chosen.rounds if name != "predict" else 3)
        print(name, found[name], flush=True)
        if chosen.out:
            command = f"OMP_NUM_THREADS=1 uv run python benchmarks/pieces.py --data {Path(chosen.data).name} --out {chosen.out}"
            content = {"command": command, "pieces": found, "hardware": hardware(), "versions": versions()}
            chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
