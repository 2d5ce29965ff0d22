"""Reader of YOLO data: a ``data.yaml``, and for each image a text file of rows ``class cx cy width height``.

Coordinates are fractions of the image size. What longer rows hold is decided for the whole data set (``yolo_rows``): polygons
give their tight box, and the polygon is kept as the object's mask. An image without a label file, or with an empty one, has no
objects. This is not a defect. An image whose rows cannot be read, or whose label file may be one of another name, is left out:
it would be trained on as an image without objects.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from detdistill.data.records import (
    IMAGE_SUFFIXES,
    MISSING_SPLIT,
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
from detdistill.data.text import read_text, read_yaml
from detdistill.data.yolo_labels import Labels, label_path, spellings
from detdistill.data.yolo_names import read_names, split_folders
from detdistill.data.yolo_rows import TASKS, Row, RowForm, Task, form_of, parse_rows
from detdistill.errors import DataError, counted, nearest, subject

KEYS: dict[SplitName, tuple[str, ...]] = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
YAML = (".yaml", ".yml")
MAX_CLASSES = 50_000
NOTHING = frozenset({"", "~", "null", "Null", "NULL"})
"""Plain YAML texts that say that a key has no value."""


def find_yolo(path: Path) -> Path | None:
    """Find the YOLO YAML file of a folder, or return ``path`` if it is such a file; None if there is none.

    A YOLO file has the key of a split (``train``, ``val``, ``test``) and the key ``names`` or ``nc``.

    Raises:
        DataError: the folder has several such files.
    """
    if path.is_file():
        return path if _looks_like_yolo(path) else None
    found = [file for file in sorted(path.iterdir()) if file.suffix in YAML and _looks_like_yolo(file)]
    if len(found) > 1:
        raise DataError(f"{path}: several YOLO files, {listed(file.name for file in found)}; pass the path of one of them")
    return found[0] if found else None


def _looks_like_yolo(file: Path) -> bool:
    """Look for the keys at the beginnings of lines, without parsing, so that a broken YAML file is recognised too."""
    if not file.is_file() or file.stat().st_size > 10_000_000:
        return False
    try:
        text = read_text(file)
    except DataError:
        text = file.read_bytes().replace(b"\0", b"").decode("utf-8", "replace")
    keys = {line.split(":")[0].strip("'\" {") for line in text.splitlines() if ":" in line}
    return bool(keys & {key for split in KEYS.values() for key in split}) and bool(keys & {"names", "nc"})


def read_yolo(file: Path) -> tuple[dict[SplitName, DetectionSet], list[str]]:
    """Read the splits that a ``data.yaml`` names.

    Args:
        file: the YAML file, or the list of classes that ``find_names`` found. Keys: ``train``, ``val`` and optionally ``test``
            (each a folder, a text file that lists images, or a list of these; without any, folders named after splits);
            ``names`` (list or mapping) or ``nc``; optionally ``path``, the base folder of the others;
            ``kpt_shape`` or ``task`` (detect, segment, pose, obb), which say what rows with more than four values hold.

    Returns:
        The sets by split, and notes for the user.

    Raises:
        DataError: broken YAML, different numbers of classes in names and nc, rows that can be read in two ways, or a folder of
            train or val that does not exist, has no images or has no labels.
    """
    notes: list[str] = []
    config = _load(file) if file.suffix in YAML else read_names(file, notes)
    if not any(key in config for keys in KEYS.values() for key in keys):
        splits = split_folders(file.parent)
        config |= {str(name): folders for name, folders in splits.items()}
        notes.append(f"no data.yaml names the splits: classes from {file.name}, {_shown(splits)}")
    classes = _classes(file, config)
    task, points = _task(file, config), _points(file, config)
    root = file.parent
    bases = [root / str(config["path"])] if config.get("path") else []
    bases = [Path(os.path.abspath(base)) for base in dict.fromkeys((*bases, root)) if os.path.isdir(base)]
    labels = Labels()
    paths, missing = _paths_by_split(file, config, bases, labels, notes)
    ids = image_ids(paths.values())
    defects: dict[SplitName, list[Defect]] = {name: [] for name in paths}
    rows = {name: _rows(each, labels, root, ids, defects[name]) for name, each in paths.items()}
    every = [row for split in rows.values() for image in split.values() for row in image]
    form, note = form_of(str(file), every, task, points)
    notes += [note] if note else []
    shift = _counts_from_one(every, len(classes))
    if shift:
        notes.append(
            f"the classes of the rows count from 1: class 0 is never used, but class {len(classes)} of 0 .. {len(classes) - 1} "
            "is; subtract 1 from the class of every row"
        )
    mixed = sum(len({len(row.values) == 4 for row in image if row.values}) == 2 for s in rows.values() for image in s.values())
    if mixed and form.polygon:
        files = subject(mixed, "label file", "mix")
        notes.append(f"{files} boxes and polygons: all are read here, but Ultralytics leaves out such files")
    sets: dict[SplitName, DetectionSet] = {}
    for name in KEYS:
        if name in missing:
            defect = Defect(MISSING_SPLIT, file.name, name, missing[name], "nothing")
            sets[name] = assemble(name, "yolo", root, classes, [], [defect])
        if name not in paths:
            continue
        found = defects[name]
        images = []
        for path, each in rows.pop(name).items():
            where = relative(labels.of(path) or label_path(path), root)
            boxes = _boxes(each, form, where, len(classes), shift, found)
            if each and not boxes:
                message = f"none of its {len(each)} rows can be read, so it is no image without objects"
                found.append(Defect("unreadable labels", where, f"image {ids[path]}", message, "image"))
            else:
                images.append(RawImage(ids[path], path, boxes, where, fractions=True))
        sets[name] = assemble(name, "yolo", root, classes, images, found)
    return sets, notes


def _shown(splits: dict[SplitName, list[str]]) -> str:
    return "; ".join(f"{name}: {listed(folders)}" for name, folders in splits.items())


# ---------------------------------------------------------------------------------------------------- the YAML file


def _load(file: Path) -> dict[str, Any]:
    config = read_yaml(file)
    if not isinstance(config, dict):
        raise DataError(f"{file}: not a mapping; a data.yaml has the keys train, val and names")
    # Class names stay as written, whatever they look like; everywhere else a null is a null.
    return {
        str(key): None if key != "names" and isinstance(value, str) and value in NOTHING else value
        for key, value in config.items()
    }


def _integer(value: Any) -> int | None:
    """The integer that a value stands for, also one written as text; None: it stands for none."""
    text = str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    return int(text.split(".")[0]) if re.fullmatch(r"[0-9]{1,9}(\.0*)?", text) else None


def _classes(file: Path, config: dict[str, Any]) -> tuple[str, ...]:
    names, stated = config.get("names"), config.get("nc")
    count = _integer(stated)
    if stated is not None and count is None:
        raise DataError(f"{file}: nc is {reprlib.repr(stated)}; it must be the number of classes")
    if max(count or 0, len(names) if isinstance(names, list | dict) else 0) > MAX_CLASSES:
        raise DataError(f"{file}: more than {MAX_CLASSES} classes (nc: {stated}); correct nc and names")
    if isinstance(names, dict):
        by_index = {_integer(key): name for key, name in names.items()}
        if set(by_index) != set(range(len(names))):
            shown = listed(f"{key!s:.40}" for key in names)
            raise DataError(f"{file}: names must be numbered 0 to {len(names) - 1} without gaps; they are {shown}")
        names = [by_index[index] for index in range(len(names))]
    elif names is None and count:
        names = [f"class{index}" for index in range(count)]
    if not isinstance(names, list) or not names:
        raise DataError(
            f"{file}: names is {reprlib.repr(names)}; it must be a list of class names or a mapping from 0, 1, ... to them"
        )
    if count is not None and count != len(names):
        raise DataError(f"{file}: nc says {count} classes but names has {len(names)}; correct one of them")
    for index, name in enumerate(names):
        if isinstance(name, list | dict | set | bytes) or name is None or not str(name).strip() or not _printable(str(name)):
            raise DataError(f"{file}: the name of class {index} is {reprlib.repr(name)}; give it a text")
    classes = tuple(map(str, names))
    twice = sorted(name for name, number in Counter(classes).items() if number > 1)
    if twice:
        raise DataError(f"{file}: class names occur twice: {listed(twice)}; make them unique")
    return classes


def _printable(text: str) -> bool:
    """No half of a surrogate pair, which no file and no terminal can hold."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _task(file: Path, config: dict[str, Any]) -> Task | None:
    said = config.get("task")
    if said is None:
        return None
    known = next((task for task in TASKS if task == said), None)
    if known is None:
        raise DataError(f"{file}: task is {reprlib.repr(said)}{nearest(str(said)[:40], TASKS)}; use one of {listed(TASKS)}")
    return known


def _points(file: Path, config: dict[str, Any]) -> tuple[int, int] | None:
    shape = config.get("kpt_shape")
    if shape is None:
        return None
    numbers = [_integer(value) for value in shape] if isinstance(shape, list) else []
    if len(numbers) != 2 or not numbers[0] or numbers[1] not in (2, 3):
        raise DataError(f"{file}: kpt_shape is {reprlib.repr(shape)}; it must be [number of points, 2 or 3 values of each]")
    return numbers[0], numbers[1]


# ------------------------------------------------------------------------------------------------------- image files


def _paths_by_split(
    file: Path, config: dict[str, Any], bases: list[Path], labels: Labels, notes: list[str]
) -> tuple[dict[SplitName, list[Path]], dict[SplitName, str]]:
    """Images of each split that can be used, and what is missing of the others; a note if such a split is not needed."""
    paths: dict[SplitName, list[Path]] = {}
    missing: dict[SplitName, str] = {}
    for name, keys in KEYS.items():
        entry = next((config[key] for key in keys if config.get(key)), None)
        if entry is None:
            continue
        each, problem = _images_of(file, name, entry, bases)
        unlabelled = sum(labels.of(path) is None for path in each)
        if problem and not (name == "test" or (name == "val" and problem.empty)):
            missing[name] = problem.text
        elif problem:
            notes.append(f"{file.name}: {name}: {problem.text}: there is no {name} split")
        elif unlabelled == len(each) and name == "test":
            notes.append(f"none of the {len(each)} test images has a label file: there is no test split")
        elif unlabelled == len(each):
            missing[name] = f"no image has a label file; looked for files such as {label_path(each[0])}"
        else:
            paths[name] = each
        if name in paths and unlabelled:
            notes.append(f"{unlabelled} of {len(each)} {name} images have no label file: they count as images without objects")
    return paths, missing


class _Problem:
    """Why a split has no images."""

    def __init__(self, text: str, empty: bool) -> None:
        self.text = text
        self.empty = empty
        """The folder or list is there and has nothing in it."""


def _images_of(file: Path, split: SplitName, entry: Any, bases: list[Path]) -> tuple[list[Path], _Problem | None]:
    """All images of a split's entry, sorted."""
    found: list[Path] = []
    empty = True
    for part in entry if isinstance(entry, list) else [entry]:
        if not isinstance(part, str):
            raise DataError(f"{file}: {split} is {reprlib.repr(entry)}; it must be a folder, a text file, or a list of these")
        place = _resolve(part, bases)
        if isinstance(place, list):
            tried = listed((f"{each!s:.200}" for each in place), 4)
            return [], _Problem(f"{part:.200} does not exist; looked at {tried}; correct 'path' or '{split}'", False)
        if os.path.isdir(place):
            found += _walk(place)
            empty &= not any(not item.name.startswith(".") for item in place.iterdir())
        elif place.suffix.lower() in IMAGE_SUFFIXES:
            found.append(place)
        else:
            lines = [line.strip() for line in read_text(place).splitlines() if line.strip()]
            found += [_listed_image(line, place, bases) for line in lines]
            empty &= not lines
    if found:
        return sorted(found), None
    parts = entry if isinstance(entry, list) else [entry]
    looked = "it is empty" if empty else f"looked for {listed(sorted(IMAGE_SUFFIXES))}"
    without = _labels_without_images([_resolve(part, bases) for part in parts])
    return [], _Problem(f"no images in {listed(map(reprlib.repr, parts), 4)}; {looked}{without}", empty)


def _labels_without_images(places: Iterable[Path | list[Path]]) -> str:
    """What to do about folders without images beside which there are label files, as an export of labels alone writes them."""
    folders = {place: label_path(place / "image.jpg").parent for place in places if isinstance(place, Path) and place.is_dir()}
    for place, labels in folders.items():
        count = len(list(labels.glob("*.txt"))) if labels != place and labels.is_dir() else 0
        if count:
            beside = f"{labels.name} has {counted(count, 'label file')}"
            return f", but {beside}: export the data with their images, or copy the images into {place.name}"
    return ""


def _walk(folder: Path) -> Iterator[Path]:
    """Images in a folder and its subfolders; links are followed, but each real folder and file is found once."""
    folders = [folder]
    linked: list[Path] = []
    seen: set[str] = set()
    while folders or linked:
        place = folders.pop() if folders else linked.pop()
        real = os.path.realpath(place)
        if real in seen:
            continue
        seen.add(real)
        try:
            items = sorted(os.scandir(place), key=lambda item: item.name, reverse=True)
        except OSError as error:
            raise DataError(f"{place}: the folder cannot be read: {error.strerror}; check its permissions") from error
        for item in items:
            if item.is_dir():
                (linked if item.is_symlink() else folders).append(Path(item.path))
            elif os.path.splitext(item.name)[1].lower() in IMAGE_SUFFIXES and (item.is_file() or item.is_symlink()):
                yield Path(item.path)


def _listed_image(line: str, file: Path, bases: list[Path]) -> Path:
    """Path of an image in a list; if the file does not exist, the path where it is expected."""
    # A line that begins with a dot is relative to the list's folder, any other to the data set's folder.
    text = line.replace("\\", "/")
    places = [file.parent, *bases]
    for spelling in spellings(text):
        for place in places:
            if os.path.isfile(place / spelling):
                return place / spelling
    return places[0 if line.startswith(".") else -1] / text


def _resolve(entry: str, bases: list[Path]) -> Path | list[Path]:
    """An entry of the YAML file as an existing path, or the paths that were tried.

    Roboflow writes ``../train/images`` for the folder ``train/images`` beside the file, so leading ``../`` are dropped if
    the path does not exist with them.
    """
    text = entry.replace("\\", "/")
    bare = text
    while bare.startswith(("../", "./")):
        bare = bare.split("/", 1)[1]
    tried = list(dict.fromkeys(base / choice for choice in (text, bare) for base in bases))
    for place in tried:
        if os.path.exists(place):
            # Links are not resolved: the labels lie beside the link, not beside its target.
            return Path(os.path.abspath(place))
    return tried


# ------------------------------------------------------------------------------------------------------- label files


def _rows(images: list[Path], labels: Labels, root: Path, ids: dict[Path, int], defects: list[Defect]) -> dict[Path, list[Row]]:
    """Rows of the images' label files. Images whose file cannot be read, or may have another name, become defects."""
    rows: dict[Path, list[Row]] = {}
    real: set[str] = set()
    for place, orphan in labels.orphans(images):
        message = f"there is no image of this name in {relative(place, root)}"
        defects.append(Defect("missing file", relative(orphan, root), "image", message, "image"))
    for path in images:
        label = labels.of(path)
        target = os.path.realpath(path) if os.path.islink(path) else ""
        if target and (target in real or Path(target) in rows):
            message = f"a link to {relative(Path(target), root)}, which is in this split already"
            defects.append(Defect("duplicate image", relative(path, root), f"image {ids[path]}", message, "image"))
            continue
        real.add(target)
        if label is None:
            doubt = labels.doubt(path)
            if doubt is not None:
                message = f"has no label file of its name; {relative(doubt, root)} has no image and may be it: rename the file"
                defects.append(Defect("missing labels", relative(path, root), f"image {ids[path]}", message, "image"))
                continue
        try:
            rows[path] = [] if label is None else parse_rows(read_text(label))
        except DataError as error:
            message = str(error).removeprefix(f"{label}: ")
            defects.append(Defect("unreadable labels", relative(label or path, root), f"image {ids[path]}", message, "image"))
    return rows


def _counts_from_one(rows: Iterable[Row], num_classes: int) -> bool:
    """True if the classes of the rows count from 1, as some converters write them: 0 is never used, K is."""
    used = {row.label for row in rows}
    return 0 not in used and num_classes in used


def _boxes(rows: list[Row], form: RowForm, where: str, num_classes: int, shift: bool, defects: list[Defect]) -> list[RawBox]:
    """Boxes of one image; malformed rows are added to ``defects``."""
    boxes = []

    def report(kind: str, row: Row, message: str) -> None:
        defects.append(Defect(kind, where, f"row {row.number}", message, "box"))

    for row in rows:
        values = form.shape(row.values)
        if values is None:
            expected = "'class cx cy width height' or 'class x1 y1 x2 y2 x3 y3 ...'"
            expected += f"; the set's rows are {form.name}" if len(row.values) > 4 else ""
            report("malformed record", row, f"{row.text[:40]!r} with {len(row.values)} values after the class is not {expected}")
        elif not row.label.is_integer() or not 0 <= row.label < num_classes:
            more = "; the rows seem to count from 1" if shift and row.label == num_classes else ""
            report("unknown class", row, f"class {row.label:g} is not in 0 .. {num_classes - 1}{more}")
        elif not all(map(math.isfinite, values)):
            report("not finite", row, f"{row.text[:40]!r} has a coordinate that is not a finite number")
        elif max(values) > 2:
            report(
                "not normalised",
                row,
                f"values up to {max(values):g}: coordinates must be fractions of width and height, not pixels",
            )
        else:
            boxes.append(_raw_box(values, int(row.label), f"row {row.number}"))
    return boxes


def _raw_box(values: Any, label: int, record: str) -> RawBox:
    if len(values) == 4:
        cx, cy, width, height = values
        return RawBox((cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2), label, record)
    xs, ys = values[0::2], values[1::2]
    return RawBox((min(xs), min(ys), max(xs), max(ys)), label, record, segmentation=[list(values)])
