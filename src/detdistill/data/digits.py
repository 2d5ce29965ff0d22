"""The built-in data set: real handwritten digits on real photographs, generated locally without a download.

The digits are scikit-learn's ``load_digits`` (UCI, 1797 scans of 8 x 8 pixels); the photographs come with the packages
scikit-learn and scikit-image. Training and validation share neither scans nor photographs. There are ten classes and up to
six objects per image. A small detector learns the task within minutes on a CPU, yet compact detectors stay far from a
perfect score. The data set serves demonstrations and tests; scores on it say little about photographs.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detdistill.errors import DataError
from detdistill.kept import cache_directory

FORMAT = 1
"""Version of the generator; incremented whenever the same settings give other images."""

TRAIN_DIGITS = 1300
"""Number of scans for training (the first ones); the remaining 497 are for validation."""
TRAIN_PHOTOS = (
    "sklearn/datasets/images/china.jpg",
    "skimage/data/astronaut.png",
    "skimage/data/chelsea.png",
    "skimage/data/rocket.jpg",
    "skimage/data/motorcycle_left.png",
    "skimage/data/grass.png",
    "skimage/data/brick.png",
    "skimage/data/coins.png",
    "skimage/data/ihc.png",
)
VAL_PHOTOS = (
    "sklearn/datasets/images/flower.jpg",
    "skimage/data/coffee.png",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/camera.png",
    "skimage/data/gravel.png",
)

# Difficulty of the task: smaller, fainter or more digits lower the AP of every detector.
SMALLEST, LARGEST = 0.18, 0.42
"""Limits of the side of a (padded) digit, as a fraction of the image's side."""
MOST_OBJECTS = 6
CONTRAST = 90
"""Smallest difference in grey value between a digit's colour and the mean of the background under it, on a scale of 0..255."""
ROTATION = 12.0
"""Largest rotation in degrees, in either direction."""
LARGEST_OVERLAP = 0.1
"""Largest overlap of two boxes: area of the intersection divided by the area of the smaller box."""
JPEG_QUALITY = 90


def digits_folder(
    train: int = 2000,
    val: int = 400,
    size: int = 128,
    seed: int = 0,
    classes: Sequence[int] = tuple(range(10)),
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Return the data set's folder in COCO form; generate it first if it does not exist (about 3 ms per image at 128 px).

    The folder holds ``annotations/instances_{train,val}.json``, ``images/{train,val}/*.jpg`` and ``digits.json`` with the
    settings. Image ``i`` depends only on the seed and ``i``, so a smaller set is the beginning of a larger one.

    Args:
        train: number of training images, made with ``seed``.
        val: number of validation images, made with ``seed + 1``.
        size: height and width in pixels.
        seed: seed of all random choices.
        classes: digits that are labelled, in the order of their labels. The images show the others too, without labels.
        cache: folder that holds the generated sets. None: ``DETDISTILL_CACHE``, else the user's cache directory.
        progress: called with (images done, total images) after each image.

    Raises:
        DataError: a count or size is too small, or an installed package lacks one of the photographs.
    """
    if train < 1 or val < 1 or size < 32 or seed < 0:
        raise DataError(
            f"digits: needs train >= 1, val >= 1, size >= 32, seed >= 0; got train={train}, val={val}, size={size}, seed={seed}"
        )
    if not classes or len(set(classes)) < len(classes) or not set(classes) <= set(range(10)):
        raise DataError(f"digits: classes={'/'.join(map(str, classes))} must be different digits, e.g. classes=0/1/2")
    root = cache_directory() if cache is None else Path(cache)
    some = "" if tuple(classes) == tuple(range(10)) else f"-classes{''.join(map(str, classes))}"
    folder = root / f"digits-v{FORMAT}-train{train}-val{val}-size{size}-seed{seed}{some}"
    if (folder / "digits.json").is_file():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".digits-", dir=root))
    try:
        _make(scratch, train, val, size, seed, tuple(classes), progress)
        scratch.chmod(0o755)  # mkdtemp's 0700 would hide a shared cache from colleagues
        try:
            os.replace(scratch, folder)
        except OSError:
            # Another process finished first: a folder that is not empty cannot be replaced. Its content is the same.
            if not (folder / "digits.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _make(
    folder: Path,
    train: int,
    val: int,
    size: int,
    seed: int,
    classes: tuple[int, ...],
    progress: Callable[[int, int], None] | None,
) -> None:
    scans, labels = _scans()
    (folder / "annotations").mkdir()
    done = 0
    for split, count, first_seed, own, photos in (
        ("train", train, seed, slice(None, TRAIN_DIGITS), TRAIN_PHOTOS),
        ("val", val, seed + 1, slice(TRAIN_DIGITS, None), VAL_PHOTOS),
    ):
        (folder / "images" / split).mkdir(parents=True)
        backgrounds = [_photo(name) for name in photos]
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            rng = np.random.default_rng([first_seed, index])
            pixels, boxes, digits = draw_image(rng, backgrounds, scans[own], labels[own], size)
            name = f"{index + 1:06d}.jpg"
            Image.fromarray(pixels).save(folder / "images" / split / name, quality=JPEG_QUALITY)
            images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
            for (left, top, right, bottom), digit in zip(boxes, digits, strict=True):
                if digit not in classes:
                    continue
                width, height = right - left, bottom - top
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": classes.index(digit) + 1,
                        "bbox": [left, top, width, height],
                        "area": width * height,
                        "iscrowd": 0,
                    }
                )
            done += 1
            if progress is not None:
                progress(done, train + val)
        content = {
            "info": {"description": "handwritten digits (UCI, via scikit-learn) on photographs of scikit-learn and scikit-image"},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": label + 1, "name": str(digit)} for label, digit in enumerate(classes)],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    settings: dict[str, Any] = {"format": FORMAT, "train": train, "val": val, "size": size, "seed": seed}
    if len(classes) < 10:
        settings["classes"] = list(classes)
    (folder / "digits.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def draw_image(
    rng: np.random.Generator, photos: Sequence[np.ndarray], scans: np.ndarray, labels: np.ndarray, size: int
) -> tuple[np.ndarray, list[tuple[int, int, int, int]], list[int]]:
    """Draw one image: one to six digits on a photograph.

    Args:
        rng: source of all random choices.
        photos: backgrounds, [h, w, 3] uint8 each, any sizes.
        scans: [N, 8, 8] ink from 0 to 1.
        labels: [N] digit of each scan.
        size: side of the image in pixels.

    Returns:
        [size, size, 3] uint8 pixels, boxes (x1, y1, x2, y2) in whole pixels, and the digit in each box.
    """
    canvas = _background(rng, photos[int(rng.integers(len(photos)))], size)
    boxes: list[tuple[int, int, int, int]] = []
    digits: list[int] = []
    for _ in range(int(rng.integers(1, MOST_OBJECTS + 1))):
        which = int(rng.integers(len(scans)))
        side = round(size * math.exp(rng.uniform(math.log(SMALLEST), math.log(LARGEST))))
        ink = _ink(scans[which], side, float(rng.uniform(-ROTATION, ROTATION)))
        height, width = ink.shape
        box = _place(rng, width, height, size, boxes)
        if box is None:  # the image is full
            continue
        patch = canvas[box[1] : box[3], box[0] : box[2]]
        alpha = (ink * rng.uniform(0.75, 1.0))[..., None]
        patch += alpha * (_colour(rng, float(patch.mean())) - patch)
        boxes.append(box)
        digits.append(int(labels[which]))
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(0, 8))
    return canvas.round().clip(0, 255).astype(np.uint8), boxes, digits


def _background(rng: np.random.Generator, photo: np.ndarray, size: int) -> np.ndarray:
    """[size, size, 3] float32: a square part of a photograph, with random contrast and brightness."""
    height, width = photo.shape[:2]
    side = int(rng.integers(min(height, width) // 3, min(height, width) + 1))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    part = Image.fromarray(photo[top : top + side, left : left + side]).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(part, dtype=np.float32) * np.float32(rng.uniform(0.5, 1)) + np.float32(rng.uniform(0, 40))


def _ink(scan: np.ndarray, side: int, degrees: float) -> np.ndarray:
    """[h, w] ink from 0 to 1, scaled and rotated, cropped to the tight box around ink above 0.35."""
    padded = Image.fromarray((np.pad(scan, 1) * 255).astype(np.uint8))
    turned = padded.resize((side, side), Image.Resampling.BICUBIC).rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    ink = np.asarray(turned, dtype=np.float32) / 255
    rows, columns = (np.flatnonzero((ink > 0.35).any(axis=axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(
    rng: np.random.Generator, width: int, height: int, size: int, taken: Sequence[tuple[int, int, int, int]]
) -> tuple[int, int, int, int] | None:
    """A random box inside the image that overlaps no other by more than ``LARGEST_OVERLAP``; None after 20 failed tries."""
    for _ in range(20):
        left, top = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        box = (left, top, left + width, top + height)
        if all(_overlap(box, other) <= LARGEST_OVERLAP for other in taken):
            return box
    return None


def _overlap(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> float:
    width = max(0, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(0, min(first[3], second[3]) - max(first[1], second[1]))
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return width * height / smaller


def _colour(rng: np.random.Generator, under: float) -> np.ndarray:
    """[3] a random colour; its grey value differs from ``under`` by more than ``CONTRAST``."""
    for _ in range(50):
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        if abs(float(colour.mean()) - under) > CONTRAST:
            return colour
    return np.full(3, 255.0 if under < 128 else 0.0, dtype=np.float32)


def _scans() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # imported here: it takes 2 s, and an existing folder does not need it

    digits = load_digits()
    return digits.images / 16.0, digits.target


def _photo(name: str) -> np.ndarray:
    """[h, w, 3] uint8 pixels of an image file inside an installed package; nothing is downloaded."""
    package, _, inside = name.partition("/")
    spec = importlib.util.find_spec(package)
    file = Path(spec.submodule_search_locations[0], inside) if spec and spec.submodule_search_locations else None
    if file is None or not file.is_file():
        library = {"sklearn": "scikit-learn", "skimage": "scikit-image"}[package]
        raise DataError(f"digits: the installed {library} has no {inside}; install another version of {library}")
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))
