"""Data structures of a loaded data set: records (images with boxes), defects and splits.

Every form (COCO, YOLO, VOC) is read into ``RawImage`` values. Their images and boxes are checked in one place, ``assemble``,
so the rules for defects are the same for all forms.

Shape letters: G boxes of an image, K classes.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from detdistill.data.outlines import usable_outline
from detdistill.data.pixels import is_deep, low_range
from detdistill.errors import DataError

SplitName = Literal["train", "val", "test"]
Form = Literal["coco", "yolo", "voc"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".jfif"})
ROUNDING_PX = 0.1
"""Boxes may exceed the image by this many pixels without being a defect, because text files round coordinates."""


@dataclass(frozen=True, eq=False)
class Record:
    """One usable image with its usable boxes. Records are compared by identity, because comparing arrays gives an array."""

    id: int
    path: Path
    size_hw: tuple[int, int]
    """Height and width in pixels, after the file's EXIF orientation is applied."""
    boxes_xyxy: np.ndarray
    """[G, 4] float64, in pixels of the original image, clipped to it."""
    labels: np.ndarray
    """[G] int64, 0 .. K-1."""
    crowd: np.ndarray
    """[G] bool, True for COCO's crowd boxes (``iscrowd``)."""
    areas: np.ndarray
    """[G] float64, in square pixels: the area given in the annotation (in COCO, that of the mask), else width times height."""
    segmentation: tuple[Any, ...] | None = None
    """For each box the polygons or run lengths of the annotation, or None if it has none. None: no box of the image has any."""
    scores: np.ndarray | None = None
    """[G] float64, 0..1: the score with which a model labelled each box, else 1. None: no box has a score below 1."""
    labelled: tuple[int, ...] | None = None
    """Labels of the classes whose objects are labelled in this image, if it comes from a data set that lacks some classes of the
    data sets it was joined with. Objects of other classes may be in the image. None: it is labelled for all classes."""

    def __len__(self) -> int:
        return len(self.labels)


BROKEN_FILE = "broken annotation file"
"""Kind of the defect of an annotation file that cannot be parsed; training refuses it, ``data inspect`` lists it."""
MISSING_SPLIT = "missing split"
"""Kind of the defect of a split that is named and has no images or no labels; training refuses it, ``data inspect`` lists it."""
SHOWN_CHARACTERS = 500
"""Texts of defects are cut to this length."""


def showable(text: str) -> str:
    """The text in one line that every terminal can show: control characters are escaped, the end of a long text is cut."""
    escaped = "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
    return escaped if len(escaped) <= SHOWN_CHARACTERS else f"{escaped[:SHOWN_CHARACTERS]} ..."


@dataclass(frozen=True)
class Defect:
    """An error in the data, and how it was handled."""

    kind: str
    file: str
    """The file to correct, relative to the data set's folder."""
    record: str
    """Place in the file: ``image 7``, ``annotation 12 of image 7``, ``row 3``, ``object 2``."""
    message: str
    skipped: str
    """What was left out because of the defect: ``image``, ``box``, ``mask`` or ``nothing``."""

    def __post_init__(self) -> None:
        # Names and values come from files: what cannot be shown, or would fill the screen, is escaped or shortened.
        for name in ("file", "record", "message"):
            text = getattr(self, name)
            if len(text) > SHOWN_CHARACTERS or not text.isprintable():
                object.__setattr__(self, name, showable(text))


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
    """Hash of the content, see ``fingerprint``; it does not depend on the folder."""

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
        """Create a set and compute its fingerprint; the arguments are the attributes of the class."""
        kept = tuple(records)
        return cls(name, form, root, tuple(classes), kept, tuple(defects), fingerprint(classes, kept))

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_boxes(self) -> int:
        """Number of boxes of all images, crowd boxes included."""
        return sum(map(len, self.records))

    def take(self, n: int, seed: int = 0) -> DetectionSet:
        """Draw a random subset of ``n`` images, in the original order; the whole set if it has at most ``n`` images.

        The subset has no defects listed.

        Raises:
            DataError: ``n`` is less than 1.
        """
        if n < 1:
            raise DataError(f"cannot take {n} images of {self.name}; take at least 1")
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
    """A data set: the splits for training, for evaluation during training and, optionally, for the final test."""

    train: DetectionSet
    val: DetectionSet
    test: DetectionSet | None = None
    notes: tuple[str, ...] = ()
    """Decisions made while reading that are not defects, e.g. a split that was created or a class that was dropped."""

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
        """Defects of all splits."""
        return tuple(defect for data in self.sets for defect in data.defects)


def fingerprint(classes: Sequence[str], records: Iterable[Record]) -> str:
    """Compute a sha256 over class names, ids, file names, file sizes, image sizes, boxes, labels, crowd flags, areas and scores.

    The classes for which an image is labelled enter, too, if they are not all. Boxes are rounded to 1/1000 pixel, areas to 1/100
    square pixel. Folders do not enter, so the data may be moved.
    """
    digest = hashlib.sha256("\0".join(classes).encode())
    every = list(records)
    if not every:
        return digest.hexdigest()
    # All records at once, because numpy takes longer for a call than for the few boxes of an image.
    # Adding 0.0 turns -0.0 into 0.0: equal numbers must have equal bytes.
    boxes = (np.round(np.concatenate([record.boxes_xyxy for record in every]), 3) + 0.0).astype("<f8").tobytes()
    labels = np.concatenate([record.labels for record in every]).astype("<i8").tobytes()
    crowd = np.concatenate([record.crowd for record in every]).astype("u1").tobytes()
    areas = (np.round(np.concatenate([record.areas for record in every]), 2) + 0.0).astype("<f8").tobytes()
    scored = any(record.scores is not None for record in every)  # so that other data have the fingerprint of earlier versions
    end = 0
    for record in every:
        first, end = end, end + len(record)
        size = os.stat(record.path).st_size
        digest.update(f"\n{record.id}\0{record.path.name}\0{size}\0{record.size_hw}".encode())
        digest.update(boxes[32 * first : 32 * end] + labels[8 * first : 8 * end] + crowd[first:end] + areas[8 * first : 8 * end])
        if scored:
            digest.update(np.round(np.ones(len(record)) if record.scores is None else record.scores, 6).astype("<f8").tobytes())
        if record.labelled is not None:
            digest.update(f"\0labelled {record.labelled}".encode())
    return digest.hexdigest()


def split_off(data: DetectionSet, name: SplitName, fraction: float = 0.1) -> tuple[DetectionSet, DetectionSet]:
    """Split a fraction of the images (at least one) off a set: those with the lowest hashes of their file names.

    The choice depends only on the file names, not on order or ids, so adding images changes the split of only a few.

    Args:
        data: the set to split.
        name: split name of the part that is split off.
        fraction: share of the images to split off, 0..1.

    Returns:
        The remaining set (with all defects), and the part split off.

    Raises:
        DataError: fewer than two usable images.
    """
    if len(data) < 2:
        raise DataError(f"{data.root}: {len(data)} usable images cannot be split into train and {name}; add a {name} split")
    ranked = sorted(data.records, key=lambda record: hashlib.sha256(record.path.name.encode()).digest() + str(record.id).encode())
    chosen = set(ranked[: max(1, round(fraction * len(data)))])
    keep = [record for record in data.records if record not in chosen]
    cut = [record for record in data.records if record in chosen]
    remaining = DetectionSet.of(data.name, data.form, data.root, data.classes, keep, data.defects)
    return remaining, DetectionSet.of(name, data.form, data.root, data.classes, cut)


# ------------------------------------------------------------------------------------------- from raw values to records


@dataclass(frozen=True)
class RawBox:
    """A box as given in the annotation, not yet checked."""

    xyxy: tuple[float, float, float, float]
    """In pixels, or in fractions of the image size if ``RawImage.fractions`` is set."""
    label: int
    record: str
    """Name of the box in defects, e.g. ``row 3``."""
    crowd: bool = False
    area: float | None = None
    segmentation: Any = None
    score: float = 1.0


@dataclass(frozen=True)
class RawImage:
    """An image as given in the annotation, not yet checked."""

    id: int
    path: Path
    boxes: Sequence[RawBox]
    file: str
    """The annotation file of the image, relative to the root; defects of the boxes name it."""
    size_hw: tuple[int, int] | None = None
    """Height and width stated in the annotation; None if it states none."""
    fractions: bool = False
    """True if coordinates (polygons included) are fractions of width and height."""


def assemble(
    name: SplitName, form: Form, root: Path, classes: Sequence[str], images: Sequence[RawImage], defects: Sequence[Defect] = ()
) -> DetectionSet:
    """Check every image and box, and build a set from the usable ones.

    Args:
        name: name of the split.
        form: form of the files.
        root: folder of the data set; paths in defects are relative to it.
        classes: class names in the order of the labels.
        images: the images as read from the annotations.
        defects: defects found while reading; those found here are added.

    Returns:
        The set; it is empty if no image is usable.
    """
    found = list(defects)
    records = []
    deep: list[Path] = []
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
        if header.deep:
            deep.append(image.path)
    if deep and (message := low_range(deep)):
        found.append(Defect("low range", relative(deep[0], root), "image and others like it", message, "nothing"))
    return DetectionSet.of(name, form, root, classes, records, found)


def _clean(image: RawImage, size_hw: tuple[int, int], defects: list[Defect]) -> Record:
    """The record with the image's usable boxes, clipped to the image; problems are appended to ``defects``."""
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
            report("not finite", box, f"box {shown} has a coordinate that is not a finite number", "box")
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
                report("box outside image", box, f"box {shown} lies outside the image", "box")
                continue
            if overshoot > ROUNDING_PX:
                report("box crosses border", box, f"box {shown} leaves the image by {overshoot:g} pixels; clipped", "nothing")
        if (box.label, box.xyxy) in seen:
            report("duplicate box", box, f"box {shown} occurs twice with the same class; kept", "nothing")
        seen.add((box.label, box.xyxy))
        boxes.append(inside)
        if box.segmentation is not None and not image.fractions:
            outline, problem = usable_outline(box.segmentation, size_hw)
            if problem:
                rest = "the others are kept" if outline else "the box is kept"
                report("unusable mask", box, f"{problem}; left out, {rest}", "mask")
            if outline is not box.segmentation:
                box = replace(box, segmentation=outline)
        kept.append(box)
        own = box.area is not None and math.isfinite(box.area) and box.area > 0
        areas.append(float(box.area) if own and box.area is not None else (inside[2] - inside[0]) * (inside[3] - inside[1]))
    scores = np.array([box.score for box in kept], dtype=np.float64) if any(box.score < 1 for box in kept) else None
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
        scores,
    )


def _to_pixels(polygons: list[list[float]] | None, scale: np.ndarray) -> list[list[float]] | None:
    if polygons is None:
        return None
    return [(np.array(polygon).reshape(-1, 2) * scale).reshape(-1).tolist() for polygon in polygons]


@dataclass(frozen=True)
class Header:
    """Size of an image as read from the file's header, or the problem with the file."""

    size_hw: tuple[int, int] = (0, 0)
    problem: str = ""
    missing: bool = False
    deep: bool = False
    """True for greys of more than 8 bits."""


def read_headers(paths: Sequence[Path]) -> Iterator[Header]:
    """Read the headers of image files, in the order given, without decoding the images."""
    # In chunks, because handing over a single file costs as much as reading its header.
    chunks = [paths[first : first + 64] for first in range(0, len(paths), 64)]
    with ThreadPoolExecutor(8) as pool:
        for headers in pool.map(lambda chunk: [read_header(path) for path in chunk], chunks):
            yield from headers


def read_header(path: Path) -> Header:
    """Read the size of an image (after its EXIF orientation is applied), or the problem with the file."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            deep = is_deep(image.mode)
            orientation = image.getexif().get(0x0112, 1)
    except FileNotFoundError:
        return Header(problem="the image file does not exist", missing=True)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # PIL's message repeats the absolute path, so only the type of the error is shown.
        return Header(problem=f"not an image that can be opened ({type(error).__name__})")
    # Orientations 5 to 8 rotate the image by 90 degrees.
    return Header((width, height) if orientation in (5, 6, 7, 8) else (height, width), deep=deep)


def image_ids(splits: Iterable[Sequence[Path]]) -> dict[Path, int]:
    """Assign image ids to files of a form without ids; the ids are unique over all splits.

    If all file names are different numbers, these numbers are the ids; else 1, 2, 3, ... in the order of the paths.
    """
    paths = sorted({path for split in splits for path in split})
    stems = [path.stem for path in paths]
    if all(stem.isascii() and stem.isdigit() and len(stem) < 16 for stem in stems):
        numbers = {path: int(path.stem) for path in paths}
        if len(set(numbers.values())) == len(paths):
            return numbers
    return {path: position for position, path in enumerate(paths, start=1)}


def relative(path: Path, root: Path) -> str:
    """The path relative to the root; unchanged if it lies elsewhere."""
    text, prefix = os.fspath(path), os.path.join(root, "")
    if text.startswith(prefix):  # the usual case, without pathlib's parsing
        return text[len(prefix) :].replace(os.sep, "/")
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else text


def listed(names: Iterable[str], most: int = 12) -> str:
    """Join names with commas for a message; after ``most`` names, only the total number follows."""
    every = list(names)
    return ", ".join(every[:most]) + (f", ... ({len(every)} in all)" if len(every) > most else "")


NO_OBJECT = ("background", "__background__", "_background_", "__ignore__")
"""Names in lists of classes that stand for no object; labelme's lists begin with ``__ignore__`` and ``_background_``."""
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
    """The split named in the first text that contains a split word: ``instances_val2017`` gives ``val``. None: no such word."""
    for text in texts:
        for word in re.findall("[a-z]+", text.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None
