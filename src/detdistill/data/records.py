"""What a data set is once it has been read: records, the defects found on the way, and the splits.

Every form (COCO, YOLO, VOC) is read into the same ``RawImage`` values; ``assemble`` alone decides what is a defect and
what becomes of it, so the rules are the same for all of them.

Shape letters: G boxes of an image, K classes.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from detdistill.errors import DataError

SplitName = Literal["train", "val", "test"]
Form = Literal["coco", "yolo", "voc"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".jfif"})
ROUNDING_PX = 0.1
"""Boxes may leave the image by this much without being called a defect: text files round their coordinates."""


@dataclass(frozen=True, eq=False)
class Record:
    """One usable image with its usable boxes. Compared by identity, for arrays have no single truth value."""

    id: int
    path: Path
    size_hw: tuple[int, int]
    """Pixels of the image as seen, that is with the file's EXIF orientation applied."""
    boxes_xyxy: np.ndarray
    """[G, 4] float64, pixels of the original image, inside it."""
    labels: np.ndarray
    """[G] int64, 0 .. K-1."""
    crowd: np.ndarray
    """[G] bool."""
    areas: np.ndarray
    """[G] float64 pixels: the annotation's own area (of the mask, in COCO), else width times height."""
    segmentation: tuple[Any, ...] | None = None
    """For each box its polygons or run lengths as in the annotation, or None; None when no box has any."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Defect:
    """Something wrong in the data, and what was done about it."""

    kind: str
    file: str
    """The file to mend, relative to the data set's folder."""
    record: str
    """Which part of it: ``image 7``, ``annotation 12 of image 7``, ``row 3``, ``object 2``."""
    message: str
    skipped: str
    """``image``, ``box``, or ``nothing`` when it is used all the same."""


@dataclass(frozen=True)
class DetectionSet:
    """The images of one split."""

    name: SplitName
    form: Form
    root: Path
    classes: tuple[str, ...]
    records: tuple[Record, ...]
    defects: tuple[Defect, ...]
    fingerprint: str
    """Of classes, ids, file names and sizes, boxes and labels; independent of where the data lie."""

    @classmethod
    def of(
        cls,
        name: SplitName,
        form: Form,
        root: Path,
        classes: Sequence[str],
        records: Iterable[Record],
        defects: Iterable[Defect] = (),
    ) -> DetectionSet:
        """A set with its fingerprint."""
        kept = tuple(records)
        return cls(name, form, root, tuple(classes), kept, tuple(defects), fingerprint(classes, kept))

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_boxes(self) -> int:
        """Boxes of all images, crowd boxes included."""
        return sum(map(len, self.records))

    def take(self, n: int, seed: int = 0) -> DetectionSet:
        """A random subset in the original order; the whole set when it has no more than ``n`` images.

        Raises:
            DataError: ``n`` is less than 1.
        """
        if n < 1:
            raise DataError(f"cannot take {n} images of {self.name}; ask for at least 1")
        if n >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:n])
        return DetectionSet.of(self.name, self.form, self.root, self.classes, [self.records[index] for index in chosen])

    def coco_ground_truth(self) -> dict[str, Any]:
        """The set as a COCO dictionary: original pixels, category id = label + 1, image id = ``Record.id``."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for record in self.records:
            height, width = record.size_hw
            images.append({"id": record.id, "file_name": record.path.name, "height": height, "width": width})
            for index, (x1, y1, x2, y2) in enumerate(record.boxes_xyxy.tolist()):
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": record.id,
                    "category_id": int(record.labels[index]) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(record.areas[index]),
                    "iscrowd": int(record.crowd[index]),
                }
                if record.segmentation is not None and record.segmentation[index] is not None:
                    annotation["segmentation"] = record.segmentation[index]
                annotations.append(annotation)
        categories = [{"id": label + 1, "name": name, "supercategory": ""} for label, name in enumerate(self.classes)]
        return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}


@dataclass(frozen=True)
class DataSplits:
    """A data set: what to train on, what to evaluate on, and perhaps what to report on."""

    train: DetectionSet
    val: DetectionSet
    test: DetectionSet | None = None
    notes: tuple[str, ...] = ()
    """What was decided while reading and is no defect: a split made here, a class dropped."""

    @property
    def sets(self) -> tuple[DetectionSet, ...]:
        """The splits that exist."""
        return (self.train, self.val) if self.test is None else (self.train, self.val, self.test)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the labels."""
        return self.train.classes

    @property
    def defects(self) -> tuple[Defect, ...]:
        """Those of all splits."""
        return tuple(defect for data in self.sets for defect in data.defects)


def fingerprint(classes: Sequence[str], records: Iterable[Record]) -> str:
    """sha256 of class names, ids, file names and byte counts, boxes (to 1/1000 pixel), labels, crowd flags and areas.

    Folders do not count, so data may be moved.
    """
    digest = hashlib.sha256("\0".join(classes).encode())
    for record in records:
        digest.update(f"\n{record.id}\0{record.path.name}\0{record.path.stat().st_size}\0{record.size_hw}".encode())
        # Adding 0.0 turns -0.0 into 0.0: equal numbers must have equal bytes.
        digest.update((np.round(record.boxes_xyxy, 3) + 0.0).astype("<f8").tobytes())
        digest.update(record.labels.astype("<i8").tobytes() + record.crowd.astype("u1").tobytes())
        digest.update((np.round(record.areas, 2) + 0.0).astype("<f8").tobytes())
    return digest.hexdigest()


def split_off(data: DetectionSet, name: SplitName, fraction: float = 0.1) -> tuple[DetectionSet, DetectionSet]:
    """Cut a fraction (at least one image) off a set: the images whose file names have the lowest hash.

    The same files are chosen again whatever their ids and order, so adding images moves few of them.

    Returns:
        What remains (with all defects) and what was cut off.

    Raises:
        DataError: fewer than two usable images.
    """
    if len(data) < 2:
        raise DataError(f"{data.root}: {len(data)} usable images cannot be split into train and {name}; give a {name} split")
    ranked = sorted(data.records, key=lambda record: hashlib.sha256(record.path.name.encode()).digest() + str(record.id).encode())
    chosen = set(ranked[: max(1, round(fraction * len(data)))])
    keep = [record for record in data.records if record not in chosen]
    cut = [record for record in data.records if record in chosen]
    remaining = DetectionSet.of(data.name, data.form, data.root, data.classes, keep, data.defects)
    return remaining, DetectionSet.of(name, data.form, data.root, data.classes, cut)


# ------------------------------------------------------------------------------------------- from raw values to records


@dataclass(frozen=True)
class RawBox:
    """A box as the annotation has it, not yet believed."""

    xyxy: tuple[float, float, float, float]
    """Pixels, or fractions of the image where the ``RawImage`` says so."""
    label: int
    record: str
    """Its name in defects."""
    crowd: bool = False
    area: float | None = None
    segmentation: Any = None


@dataclass(frozen=True)
class RawImage:
    """An image as the annotation has it."""

    id: int
    path: Path
    boxes: Sequence[RawBox]
    file: str
    """The file that describes it, relative to the root: the one named in defects of its boxes."""
    size_hw: tuple[int, int] | None = None
    """None when the annotation has no size."""
    fractions: bool = False
    """Coordinates (polygons included) are fractions of width and height."""


def assemble(
    name: SplitName, form: Form, root: Path, classes: Sequence[str], images: Sequence[RawImage], defects: Sequence[Defect] = ()
) -> DetectionSet:
    """Check every image and box, and keep the good ones.

    Args:
        name: of the split.
        form: of the files.
        root: folder of the data set; paths in defects are relative to it.
        classes: names in the order of the labels.
        images: as read.
        defects: found while reading.

    Raises:
        DataError: no image is usable.
    """
    found = list(defects)
    records = []
    seen: set[Path] = set()
    for image, header in zip(images, read_headers([image.path for image in images]), strict=True):
        if header.problem:
            kind = "missing file" if header.missing else "unreadable image"
            found.append(Defect(kind, relative(image.path, root), f"image {image.id}", header.problem, "image"))
            continue
        if image.path in seen:
            message = "the same file is listed twice in this split"
            found.append(Defect("duplicate image", relative(image.path, root), f"image {image.id}", message, "image"))
            continue
        seen.add(image.path)
        if image.size_hw is not None and image.size_hw != header.size_hw:
            stated, real = (f"{width}x{height}" for height, width in (image.size_hw, header.size_hw))
            if min(image.size_hw) <= 0:
                message, skipped = f"annotation says {stated}; the file's {real} is used", "nothing"
            else:
                message, skipped = f"annotation says {stated}, the file has {real}: its boxes cannot be trusted", "image"
            found.append(Defect("size differs", image.file, f"image {image.id}", message, skipped))
            if skipped == "image":
                continue
        records.append(_clean(image, header.size_hw, found))
    if not records:
        reason = f": {found[0].file}: {found[0].message}" if found else ""
        raise DataError(f"{root}: none of the {len(images)} images of the {name} split is usable{reason}")
    return DetectionSet.of(name, form, root, classes, records, found)


def _clean(image: RawImage, size_hw: tuple[int, int], defects: list[Defect]) -> Record:
    """The image's good boxes, clipped; what is wrong with the others goes to ``defects``."""
    height, width = size_hw
    boxes: list[tuple[float, float, float, float]] = []
    kept: list[RawBox] = []
    areas: list[float] = []
    seen: set[tuple[int, tuple[float, float, float, float]]] = set()

    def report(kind: str, box: RawBox, message: str, skipped: str) -> None:
        defects.append(Defect(kind, image.file, box.record, message, skipped))

    for box in image.boxes:
        x1, y1, x2, y2 = box.xyxy
        if image.fractions:
            x1, y1, x2, y2 = x1 * width, y1 * height, x2 * width, y2 * height
        shown = f"[{x1:g}, {y1:g}, {x2:g}, {y2:g}] (x1, y1, x2, y2) in {width}x{height}"
        if not all(map(math.isfinite, (x1, y1, x2, y2))):
            report("not finite", box, f"box {shown} has a coordinate that is no number", "box")
            continue
        if x2 < x1 or y2 < y1:
            report("inverted box", box, f"box {shown} ends before it begins", "box")
            continue
        if x2 == x1 or y2 == y1:
            report("empty box", box, f"box {shown} has no area", "box")
            continue
        inside = (min(max(x1, 0.0), width), min(max(y1, 0.0), height), min(max(x2, 0.0), width), min(max(y2, 0.0), height))
        overshoot = max(-x1, -y1, x2 - width, y2 - height)
        if overshoot > 0:
            if inside[2] - inside[0] <= ROUNDING_PX or inside[3] - inside[1] <= ROUNDING_PX:
                report("box outside image", box, f"box {shown} shows nothing of the image", "box")
                continue
            if overshoot > ROUNDING_PX:
                report("box crosses border", box, f"box {shown} leaves the image by {overshoot:g} pixels; clipped", "nothing")
        if (box.label, box.xyxy) in seen:
            report("duplicate box", box, f"box {shown} is there twice with the same class; kept", "nothing")
        seen.add((box.label, box.xyxy))
        boxes.append(inside)
        kept.append(box)
        own = box.area is not None and math.isfinite(box.area) and box.area > 0
        areas.append(float(box.area) if own and box.area is not None else (inside[2] - inside[0]) * (inside[3] - inside[1]))
    segmentation = None
    if any(box.segmentation is not None for box in kept):
        scale = np.array([width, height], dtype=np.float64)
        segmentation = tuple(_to_pixels(box.segmentation, scale) if image.fractions else box.segmentation for box in kept)
    return Record(
        image.id,
        image.path,
        size_hw,
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array([box.label for box in kept], dtype=np.int64),
        np.array([box.crowd for box in kept], dtype=bool),
        np.array(areas, dtype=np.float64),
        segmentation,
    )


def _to_pixels(polygons: list[list[float]] | None, scale: np.ndarray) -> list[list[float]] | None:
    if polygons is None:
        return None
    return [(np.array(polygon).reshape(-1, 2) * scale).reshape(-1).tolist() for polygon in polygons]


@dataclass(frozen=True)
class Header:
    """What a file's first bytes say about the image."""

    size_hw: tuple[int, int] = (0, 0)
    problem: str = ""
    missing: bool = False


def read_headers(paths: Sequence[Path]) -> Iterator[Header]:
    """Sizes of images, in order, without decoding them."""
    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(read_header, paths)


def read_header(path: Path) -> Header:
    """The size that the image has after its EXIF orientation is applied, or what is wrong with the file."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            orientation = image.getexif().get(0x0112, 1)
    except FileNotFoundError:
        return Header(problem="the image file does not exist", missing=True)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # PIL's own message repeats the absolute path; only its kind is of interest.
        return Header(problem=f"not an image that can be opened ({type(error).__name__})")
    # Orientations 5 to 8 turn the image by a quarter.
    return Header((width, height) if orientation in (5, 6, 7, 8) else (height, width))


def image_ids(splits: Iterable[Sequence[Path]]) -> dict[Path, int]:
    """Ids for files that have none, unique over all splits.

    Where all files are called by different numbers, these; else 1, 2, 3, ... in the order of the paths.
    """
    paths = sorted({path for split in splits for path in split})
    stems = [path.stem for path in paths]
    if all(stem.isascii() and stem.isdigit() and len(stem) < 16 for stem in stems):
        numbers = {path: int(path.stem) for path in paths}
        if len(set(numbers.values())) == len(paths):
            return numbers
    return {path: position for position, path in enumerate(paths, start=1)}


def relative(path: Path, root: Path) -> str:
    """The path below the root, or as it is."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def listed(names: Iterable[str], most: int = 12) -> str:
    """A readable list for messages."""
    every = list(names)
    return ", ".join(every[:most]) + (f", ... ({len(every)} in all)" if len(every) > most else "")


SPLIT_WORDS: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "trainval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "minival": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def split_of(*texts: str) -> SplitName | None:
    """The split that the first text with such a word names: ``instances_val2017`` is ``val``."""
    for text in texts:
        for word in re.findall("[a-z]+", text.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None
