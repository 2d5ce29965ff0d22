"""Draw what a detector finds on images."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from detdistill.data.loader import collate
from detdistill.data.records import Record
from detdistill.data.transforms import ViewSettings, make_view
from detdistill.detectors.contract import Detector
from detdistill.errors import DataError
from detdistill.progress import Bar

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


@torch.no_grad()
def predict_image(detector: Detector, image: Tensor, settings: ViewSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Detections of one image in its own pixels.

    Args:
        detector: in eval mode.
        image: [3, h, w] uint8.
        settings: how the detector wants its images.

    Returns:
        boxes [D, 4] xyxy clipped to the image, scores [D], labels [D].
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
    """Draw the boxes of every image into ``out`` and write ``detections.json`` (COCO-like: file, class, box xywh, score).

    Raises:
        DataError: no image there, or one that cannot be decoded.
    """
    paths = [images] if images.is_file() else sorted(p for p in images.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"no images in {images}; give an image or a folder with {', '.join(sorted(SUFFIXES))} files")
    bar.resize(len(paths))
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for index, path in enumerate(paths):
        image = read_image(path)
        boxes, scores, labels = predict_image(detector, image, settings)
        keep = scores >= score
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
        names = [detector.spec.classes[label] for label in labels.tolist()]
        texts = [f"{name} {value:.2f}" for name, value in zip(names, scores.tolist(), strict=True)]
        drawn = draw_bounding_boxes(image, boxes, texts, width=max(2, min(image.shape[-2:]) // 250)) if len(boxes) else image
        target = out / f"{path.stem}.jpg"
        temporary = out / f".{path.stem}.tmp"
        Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(temporary, format="JPEG", quality=92)
        os.replace(temporary, target)
        for name, value, (x1, y1, x2, y2) in zip(names, scores.tolist(), boxes.tolist(), strict=True):
            written.append({"file": str(path), "class": name, "score": value, "bbox": [x1, y1, x2 - x1, y2 - y1]})
        bar.update(index + 1, path.name)
    temporary = out / ".detections.tmp"
    temporary.write_text(json.dumps(written, indent=1) + "\n")
    os.replace(temporary, out / "detections.json")
    return out


def read_image(path: Path) -> Tensor:
    """[3, h, w] uint8 RGB.

    Raises:
        DataError: missing, or not an image.
    """
    try:
        with Image.open(path) as opened:
            return torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1).contiguous()
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"cannot read the image {path}: {error}; remove or replace it") from error
