"""Draw a detector's detections on images."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from detdistill.data.loader import collate, read_image
from detdistill.data.records import IMAGE_SUFFIXES, Record
from detdistill.data.transforms import ViewSettings, make_view
from detdistill.detectors.contract import Detector
from detdistill.errors import DataError, RunError
from detdistill.progress import Bar


@torch.no_grad()
def predict_image(detector: Detector, image: Tensor, settings: ViewSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Detect objects in one image; boxes are in pixels of this image.

    Args:
        detector: the detector, in eval mode.
        image: [3, h, w] uint8 RGB.
        settings: image size and resizing for the detector.

    Returns:
        Boxes [D, 4] xyxy clipped to the image, scores [D], labels [D].
    """
    height, width = image.shape[-2:]
    nothing = np.zeros((0,))
    record = Record(
        0, Path("image"), (height, width), np.zeros((0, 4)), nothing.astype(np.int64), nothing.astype(bool), nothing, None
    )
    pixels, target, view = make_view(image, record, settings, torch.Generator(), train=False)
    batch = collate([(pixels, target, view, 0)], settings).to(next(detector.parameters()).device)
    found = detector.detect(detector.predict(detector.features(batch), batch), batch)[0]
    boxes = view.to_original(found.boxes_xyxy.float().cpu())
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
    return boxes, found.scores.float().cpu(), found.labels.cpu()


def predict_folder(detector: Detector, images: Path, out: Path, settings: ViewSettings, *, score: float, bar: Bar) -> Path:
    """Draw the detected boxes of every image into the folder ``out`` and write ``detections.json``.

    ``detections.json`` is a list with an entry for each box: file, class, score, and bbox as x, y, width, height in pixels of
    the image. A drawing has the name and the sub-folder of its image.

    Args:
        detector: the detector, in eval mode.
        images: an image or a folder.
        out: folder for the drawings.
        settings: image size and resizing for the detector.
        score: boxes with a lower score are left out.
        bar: progress bar.

    Returns:
        ``out``.

    Raises:
        DataError: ``images`` does not exist, holds no image, or an image cannot be decoded.
        RunError: ``out`` cannot be written.
    """
    paths = find_images(images, out)
    bar.resize(len(paths))
    written = []
    try:
        for index, (path, drawing) in enumerate(zip(paths, drawing_names(paths, images), strict=True)):
            image = decode(path)
            boxes, scores, labels = predict_image(detector, image, settings)
            keep = scores >= score
            boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
            names = [detector.spec.classes[label] for label in labels.tolist()]
            texts = [f"{name} {value:.2f}" for name, value in zip(names, scores.tolist(), strict=True)]
            drawn = draw_bounding_boxes(image, boxes, texts, width=max(2, min(image.shape[-2:]) // 250)) if len(boxes) else image
            target = out / drawing
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.tmp")
            Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(temporary, format="JPEG", quality=92)
            os.replace(temporary, target)
            for name, value, (x1, y1, x2, y2) in zip(names, scores.tolist(), boxes.tolist(), strict=True):
                written.append({"file": str(path), "class": name, "score": value, "bbox": [x1, y1, x2 - x1, y2 - y1]})
            bar.update(index + 1, path.name)
        temporary = out / ".detections.tmp"
        temporary.write_text(json.dumps(written, indent=1) + "\n")
        os.replace(temporary, out / "detections.json")
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror or error}; make space or give another --out") from error
    return out


def find_images(images: Path, out: Path) -> list[Path]:
    """List an image, or all images of a folder and its sub-folders except earlier drawings in ``out``.

    Raises:
        DataError: ``images`` does not exist or holds no image.
    """
    if images.is_file():
        return [images]
    if not images.is_dir():
        raise DataError(f"{images}: there is no such file or folder")
    drawn = out.resolve()
    paths = sorted(p for p in images.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and drawn not in p.resolve().parents)
    if not paths:
        raise DataError(f"{images}: no images in it; give an image or a folder with {', '.join(sorted(IMAGE_SUFFIXES))} files")
    return paths


def drawing_names(paths: Sequence[Path], images: Path) -> list[Path]:
    """Path of each drawing relative to the output folder; all paths are different."""
    inside = [path.relative_to(images) if images.is_dir() else Path(path.name) for path in paths]
    plain = [path.with_suffix(".jpg") for path in inside]
    return [
        name if plain.count(name) == 1 else path.with_name(f"{path.name}.jpg") for name, path in zip(plain, inside, strict=True)
    ]


def decode(path: Path) -> Tensor:
    """Decode an image file: [3, h, w] uint8 RGB.

    Raises:
        DataError: the file cannot be decoded.
    """
    try:
        return read_image(path)
    except (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: the image cannot be decoded ({error}); remove or replace it") from error
