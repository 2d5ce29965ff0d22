"""Cost of an adapter's stages relative to the library's own training forward: ratios, measured alternately in one process.

    uv run python benchmarks/adapters.py --out benchmarks/results/adapters_cpu.json

For each detector that wraps a library's model: ``features``, ``predict`` and ``loss`` (no backward) against the library's
``model(images, targets)``, ``model(pixel_values, pixel_mask, labels=...)`` or ``model.loss(batch)`` on the same model and batch.
Each round measures both, in alternating order; ratios are of medians. Detectors that no library has are skipped, and their names
are printed. YOLO, whose model strings name no backbone:

    uv run python benchmarks/adapters.py --models ultralytics:yolo11n ultralytics:yolo26n libreyolo:yolox-n libreyolo:yolo9-t
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from detdistill.detectors.adapters import adapter_names
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Detector
from detdistill.detectors.probe import has_tiny, tiny_name
from detdistill.structures import Batch, Target, View
from detdistill.training.machine import hardware, versions

CLASSES = tuple(f"class {number}" for number in range(20))


def make_batch(images: int, size: int, boxes: int = 6) -> Batch:
    """A batch of noise with boxes (and masks) of every scale; without padding, so that neither side has an advantage."""
    generator = torch.Generator().manual_seed(0)
    targets = []
    for _ in range(images):
        sides = size * (0.05 + 0.6 * torch.rand(boxes, 2, generator=generator) ** 2)
        corners = torch.rand(boxes, 2, generator=generator) * (size - sides)
        rows = torch.cat([corners, corners + sides], dim=1)
        masks = torch.zeros(boxes, size, size, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, rows.long().tolist(), strict=True):
            mask[top : bottom + 1, left : right + 1] = True
        labels = torch.randint(0, len(CLASSES), (boxes,), generator=generator)
        targets.append(Target(rows, labels, torch.zeros(boxes, dtype=torch.bool), masks))
    pixels = torch.rand(images, 3, size, size, generator=generator)
    views = tuple(View((size, size), (size, size)) for _ in range(images))
    return Batch(pixels, torch.tensor([[size, size]] * images), tuple(targets), tuple(range(images)), views)


def library_forward(detector: Any, batch: Batch) -> Callable[[], Tensor] | None:
    """The library's own training forward of an adapter's model, up to the sum of the losses; None: no library has it."""
    model = detector.model
    package = type(model).__module__.partition(".")[0]
    if package == "torchvision":

        def torchvision_forward() -> Tensor:
            targets = []
            for target in batch.targets:
                entry = {"boxes": target.boxes_xyxy, "labels": target.labels + 1}
                if target.masks is not None and detector.spec.needs_masks:
                    entry["masks"] = target.masks.to(torch.uint8)
                targets.append(entry)
            return torch.stack(list(model(list(batch.images), targets).values())).sum()

        return torchvision_forward
    if package == "transformers":

        def transformers_forward() -> Tensor:
            # The library leaves normalised pixels and labels to its image processor; here they are part of both sides.
            pixels, mask = detector.normalized(batch), (~batch.padding_mask()).long()
            loss: Tensor = model(pixel_values=pixels, pixel_mask=mask, labels=detector.labels(batch)).loss
            return loss

        return transformers_forward
    if package in ("ultralytics", "libreyolo"):
        return _yolo_forward(package, detector, batch)
    return None


def _yolo_forward(package: str, detector: Any, batch: Batch) -> Callable[[], Tensor]:
    """The training forward of a YOLO's package; as its loader does it, targets are rows before the measurement begins."""
    height, width = batch.padding_hw
    size = batch.images.new_tensor([width, height, width, height])
    corners = [target.boxes_xyxy / size for target in batch.targets]
    centred = [torch.cat([(one[:, :2] + one[:, 2:]) / 2, one[:, 2:] - one[:, :2]], dim=1) for one in corners]
    labels = [target.labels for target in batch.targets]
    model = detector.model
    if package == "ultralytics":
        from ultralytics.cfg import get_cfg

        model.args = get_cfg(overrides={"epochs": 1})
        model.criterion = model.init_criterion()
        images = torch.cat([torch.full_like(one, index) for index, one in enumerate(labels)])
        rows = {"img": batch.images, "batch_idx": images, "cls": torch.cat(labels), "bboxes": torch.cat(centred)}

        def ultralytics_forward() -> Tensor:
            total: Tensor = model.loss(rows)[0].sum()
            return total

        return ultralytics_forward
    boxes = [one * size for one in centred] if "yolox" in detector.spec.name else corners
    found = batch.images.new_zeros(len(batch), max(map(len, labels)), 5)
    for image, (kinds, places) in enumerate(zip(labels, boxes, strict=True)):
        found[image, : len(kinds)] = torch.cat([kinds[:, None].to(places.dtype), places], dim=1)

    def libreyolo_forward() -> Tensor:
        total: Tensor = model(detector.normalized(batch), found)["total_loss"]
        return total

    return libreyolo_forward


def adapter_forward(detector: Detector, batch: Batch) -> Callable[[], Tensor]:
    """The three stages of an adapter in training, up to the sum of the losses."""

    def stages() -> Tensor:
        features = detector.features(batch)
        return detector.loss(detector.predict(features, batch), batch).total()

    return stages


def ratio(name: str, batch: Batch, rounds: int, device: str) -> dict[str, Any] | None:
    """Median seconds of library and adapter, and their ratio; None: no library has the detector."""
    torch.manual_seed(0)
    detector = build_detector(name, CLASSES).to(device).train()
    library = library_forward(detector, batch)
    if library is None:
        return None
    contenders = {"library": library, "adapter": adapter_forward(detector, batch)}
    seconds: dict[str, list[float]] = {side: [] for side in contenders}
    losses = {}
    for index in range(rounds + 2):
        order = list(contenders) if index % 2 else list(reversed(contenders))
        for side in order:
            torch.manual_seed(index)  # both sides draw the same samples and denoising queries
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            loss = contenders[side]()
            if device == "cuda":
                torch.cuda.synchronize()
            if index > 1:  # the first two rounds warm up
                seconds[side].append(time.perf_counter() - started)
            losses[side] = float(loss.detach())
    median = {side: statistics.median(values) for side, values in seconds.items()}
    fastest = {side: min(values) for side, values in seconds.items()}
    return {
        "model": name,
        "ratio": round(median["adapter"] / median["library"], 3),
        "ratio_of_fastest": round(fastest["adapter"] / fastest["library"], 3),
        **{f"{side}_s": round(value, 4) for side, value in median.items()},
        **{f"{side}_loss": round(value, 5) for side, value in losses.items()},
    }


def model_name(name: str, backbone: str) -> str:
    """Model string of an adapter on a timm backbone, or on its own smallest backbone if it takes none of timm."""
    own = tiny_name(name)
    return f"{name}:{backbone}" if timm.is_model(own.partition(",")[0].partition(":")[2]) else own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", nargs="*", help="model strings; default: every adapter on --backbone")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    chosen = parser.parse_args()
    names = chosen.models or [model_name(name, chosen.backbone) for name in adapter_names() if has_tiny(name)]
    batch = make_batch(chosen.batch, chosen.size).to(chosen.device)
    rows, without = [], []
    for name in names:
        row = ratio(name, batch, chosen.rounds, chosen.device)
        if row is None:
            without.append(name)
            continue
        rows.append(row)
        print(row, flush=True)
    print("no library has:", ", ".join(without) or "-", flush=True)
    content = {
        "what": f"training forward with losses, {chosen.size} pixels, batch {chosen.batch}, float32; adapter over library",
        "command": "uv run python benchmarks/adapters.py " + shlex.join(sys.argv[1:]),
        "adapters": rows,
        "in_no_library": without,
        "hardware": hardware(),
        "versions": versions(),
    }
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
