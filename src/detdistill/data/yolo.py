"""Reader of YOLO data: a ``data.yaml``, and for each image a text file of rows ``class cx cy width height``.

Coordinates are fractions of the image size. Rows with more than five values are polygons: their tight box is the object's
box, and the polygon is kept as its mask. An image without a label file, or with an empty one, has no objects. This is not a
defect.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from detdistill.data.records import (
    IMAGE_SUFFIXES,
    Defect,
    DetectionSet,
    RawBox,
    RawImage,
    SplitName,
    assemble,
    image_ids,
    listed,
    relative,
)
from detdistill.errors import DataError

KEYS: dict[SplitName, tuple[str, ...]] = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def find_yolo(path: Path) -> Path | None:
    """Find the YOLO YAML file of a folder, or return ``path`` if it is such a file; None if there is none.

    A YOLO file has the key ``train`` or ``val`` and the key ``names`` or ``nc``.

    Raises:
        DataError: the folder has several such files.
    """
    if path.is_file():
        return path if _looks_like_yolo(path) else None
    found = [file for file in sorted(path.iterdir()) if file.suffix in (".yaml", ".yml") and _looks_like_yolo(file)]
    if len(found) > 1:
        raise DataError(f"{path}: several YOLO files, {listed(file.name for file in found)}; pass the path of one of them")
    return found[0] if found else None


def _looks_like_yolo(file: Path) -> bool:
    """Look for the keys at the beginnings of lines, without parsing, so that a broken YAML file is recognised too."""
    if file.stat().st_size > 10_000_000:
        return False
    keys = {line.split(":")[0].strip("'\" ") for line in file.read_text("utf-8", "replace").splitlines() if ":" in line}
    return bool(keys & {"train", "val"}) and bool(keys & {"names", "nc"})


def read_yolo(file: Path) -> tuple[dict[SplitName, DetectionSet], list[str]]:
    """Read the splits that a ``data.yaml`` names.

    Args:
        file: the YAML file. Keys: ``train``, ``val`` and optionally ``test`` (each a folder, a text file that lists images,
            or a list of these); ``names`` (list or mapping) or ``nc``; optionally ``path``, the base folder of the others.

    Returns:
        The sets by split, and notes for the user.

    Raises:
        DataError: broken YAML, different numbers of classes in names and nc, or a folder that does not exist, has no images
            or has no labels.
    """
    config = _load(file)
    classes = _classes(file, config)
    root = file.parent
    bases = [root / str(config["path"])] if config.get("path") else []
    bases = [Path(os.path.abspath(base)) for base in dict.fromkeys((*bases, root)) if base.is_dir()]
    notes: list[str] = []
    keypoints = bool(config.get("kpt_shape"))
    paths: dict[SplitName, list[Path]] = {}
    for name, keys in KEYS.items():
        entry = next((config[key] for key in keys if config.get(key)), None)
        if entry is None:
            continue
        paths[name] = sorted(_image_paths(file, name, entry, bases))
        if not paths[name]:
            raise DataError(f"{file}: {name}: no images in {entry!r}; looked for {listed(sorted(IMAGE_SUFFIXES))}")
    ids = image_ids(paths.values())
    sets: dict[SplitName, DetectionSet] = {}
    for name, each in paths.items():
        unlabelled = [path for path in each if not label_path(path).is_file()]
        if len(unlabelled) == len(each) and name == "test":
            notes.append(f"none of the {len(each)} test images has a label file: there is no test split")
            continue
        if len(unlabelled) == len(each):
            raise DataError(f"{file}: {name}: no image has a label file; looked for files such as {label_path(each[0])}")
        if unlabelled:
            notes.append(
                f"{len(unlabelled)} of {len(each)} {name} images have no label file: they count as images without objects"
            )
        defects = _orphans(each, root)
        images = [_raw_image(ids[path], path, root, len(classes), keypoints, defects) for path in each]
        sets[name] = assemble(name, "yolo", root, classes, images, defects)
    return sets, notes


def _load(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise DataError(f"{file}: not valid YAML{place}: {error.problem}; fix that line") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not valid YAML: {' '.join(str(error).split())}; save it as UTF-8 text") from error
    if not isinstance(config, dict):
        raise DataError(f"{file}: not a mapping; a data.yaml has the keys train, val and names")
    return config


def _classes(file: Path, config: dict[str, Any]) -> tuple[str, ...]:
    names, count = config.get("names"), config.get("nc")
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise DataError(
                f"{file}: names must be numbered 0 to {len(names) - 1} without gaps; they are {listed(map(str, names))}"
            )
        names = [names[index] for index in range(len(names))]
    elif names is None and isinstance(count, int):
        names = [f"class{index}" for index in range(count)]
    if not isinstance(names, list) or not names:
        raise DataError(f"{file}: names is {names!r}; it must be a list of class names or a mapping from 0, 1, ... to them")
    if count is not None and count != len(names):
        raise DataError(f"{file}: nc says {count} classes but names has {len(names)}; correct one of them")
    classes = tuple(map(str, names))
    if len(set(classes)) < len(classes):
        twice = sorted({name for name in classes if classes.count(name) > 1})
        raise DataError(f"{file}: class names occur twice: {listed(twice)}; make them unique")
    return classes


def _image_paths(file: Path, split: SplitName, entry: Any, bases: list[Path]) -> Iterator[Path]:
    """All images of a split's entry."""
    for part in entry if isinstance(entry, list) else [entry]:
        place = _resolve(file, split, str(part), bases)
        if place.is_dir():
            for folder, _, names in os.walk(place, followlinks=True):
                yield from (Path(folder, name) for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES)
            continue
        for line in place.read_text(encoding="utf-8-sig").splitlines():
            if line.strip():
                # A line that begins with a dot is relative to the list's folder, any other to the data set's folder.
                listed_path = Path(line.strip().replace("\\", "/"))
                choices = [place.parent / listed_path, *(base / listed_path for base in bases)]
                yield next((choice for choice in choices if choice.is_file()), choices[0 if line.startswith(".") else -1])


def _resolve(file: Path, split: SplitName, entry: str, bases: list[Path]) -> Path:
    """An entry of the YAML file as an existing path.

    Roboflow writes ``../train/images`` for the folder ``train/images`` beside the file, so leading ``../`` are dropped if
    the path does not exist with them.
    """
    text = entry.replace("\\", "/")
    bare = text
    while bare.startswith(("../", "./")):
        bare = bare.split("/", 1)[1]
    tried = list(dict.fromkeys(base / choice for choice in (text, bare) for base in bases))
    for place in tried:
        if place.exists():
            # Links are not resolved: the labels lie beside the link, not beside its target.
            return Path(os.path.abspath(place))
    raise DataError(
        f"{file}: {split}: {entry} does not exist; looked at {listed(map(str, tried), 4)}; correct 'path' or '{split}'"
    )


def label_path(image: Path) -> Path:
    """Path of an image's label file: the last folder named ``images`` becomes ``labels``; else the file beside the image."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    labels, beside = Path(*parts).with_suffix(".txt"), image.with_suffix(".txt")
    return beside if beside.is_file() and not labels.is_file() else labels


def _orphans(images: list[Path], root: Path) -> list[Defect]:
    """Defects for label files without an image of the same name in the image folder."""
    folders = {label_path(path).parent: path.parent for path in images}
    defects = []
    for labels, folder in sorted(folders.items()):
        stems = {path.stem for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES} if folder.is_dir() else set()
        if labels == folder or not labels.is_dir():
            continue
        for file in sorted(labels.glob("*.txt")):
            if file.stem not in stems and file.name != "classes.txt":
                message = f"there is no image of this name in {relative(folder, root)}"
                defects.append(Defect("missing file", relative(file, root), "image", message, "image"))
    return defects


def _raw_image(number: int, path: Path, root: Path, num_classes: int, keypoints: bool, defects: list[Defect]) -> RawImage:
    """Read an image's label file; malformed rows are added to ``defects``."""
    labels = label_path(path)
    where = relative(labels, root)
    try:
        text = labels.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        text = ""
    except UnicodeDecodeError as error:
        raise DataError(f"{labels}: not UTF-8 text at byte {error.start}; export the labels again") from error
    boxes = []
    for row, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        record = f"row {row}"
        try:
            label, *values = map(float, line.split())
        except ValueError:
            values = []
        if keypoints:
            values = values[:4]
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            message = f"{line.strip()[:40]!r} is neither 'class cx cy width height' nor 'class x1 y1 x2 y2 x3 y3 ...'"
            defects.append(Defect("malformed record", where, record, message, "box"))
            continue
        if not label.is_integer() or not 0 <= label < num_classes:
            message = f"class {label:g} is not in 0 .. {num_classes - 1}"
            defects.append(Defect("unknown class", where, record, message, "box"))
            continue
        if max(values) > 2 and all(map(math.isfinite, values)):
            message = f"values up to {max(values):g}: coordinates must be fractions of width and height, not pixels"
            defects.append(Defect("not normalised", where, record, message, "box"))
            continue
        boxes.append(_raw_box(values, int(label), record))
    return RawImage(number, path, boxes, where, fractions=True)


def _raw_box(values: list[float], label: int, record: str) -> RawBox:
    if len(values) == 4:
        cx, cy, width, height = values
        return RawBox((cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2), label, record)
    xs, ys = values[0::2], values[1::2]
    return RawBox((min(xs), min(ys), max(xs), max(ys)), label, record, segmentation=[values])
