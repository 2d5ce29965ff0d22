"""Reader and writer of COCO JSON: ``instances_*.json`` with image folders, Roboflow's ``_annotations.coco.json``, or one file.

Category ids may be any integers, with gaps. Labels follow the order of the ids, and splits are matched by category name.
Crowd boxes and the areas given in the annotations are kept. Polygons and run lengths stay unchanged.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detdistill.data.coco_files import files_by_split, load_coco
from detdistill.data.flags import is_id, truth, whole
from detdistill.data.outlines import Box, outline_box
from detdistill.data.paths import folders_below, match_listed, split_parts
from detdistill.data.records import (
    NO_OBJECT,
    SPLIT_WORDS,
    Defect,
    DetectionSet,
    RawBox,
    RawImage,
    SplitName,
    assemble,
    listed,
    relative,
    split_of,
)
from detdistill.errors import DataError, subject

Sets = dict[SplitName, DetectionSet]

CROWD_KEYS = ("iscrowd", "is_crowd", "ignore", "ignored", "is_group_of")
"""Flags of an annotation that mark a region without single objects: it is neither trained on nor counted as a mistake."""
LARGEST_AREA = 1e15
"""Square pixels; no image has as many, and sums of larger numbers are not exact."""
DEPTH = 4
"""Folders are searched this many levels below the annotations' folder."""


def read_coco(path: Path, files: list[Path]) -> tuple[Sets, list[str]]:
    """Read the splits.

    Args:
        path: the user's folder or JSON file. If the file's name contains ``train``, neighbouring files whose names differ
            only in that word are read as the other splits.
        files: result of ``find_coco(path)``.

    Returns:
        The sets by split, and notes for the user. A single file without a split word in its name is ``train``.

    Raises:
        DataError: a file is not valid JSON or not COCO, two files claim the same split, or the class names of the splits
            differ.
    """
    notes: list[str] = []
    root = path if path.is_dir() else _data_root(path)
    by_split = files_by_split(path, files, notes)
    contents = {name: load_coco(file) for name, file in by_split.items()}
    classes, maps = _match_classes(by_split, contents, notes)
    sets: Sets = {}
    for name, file in by_split.items():
        reading = _Reading(relative(file, root), maps[name])
        images = _raw_images(contents.pop(name), file, root, reading, name)
        notes += [f"{name}: {note}" for note in reading.notes()]
        sets[name] = assemble(name, "coco", root, classes, images, reading.defects)
    return sets, notes


def _data_root(file: Path) -> Path:
    """The parent of ``annotations/`` or of Roboflow's split folder; for any other place, the file's own folder."""
    if file.parent.name == "annotations" or (file.stem == "_annotations.coco" and split_of(file.parent.name)):
        return file.parent.parent
    return file.parent


# ------------------------------------------------------------------------------------------------------------ classes


def _match_classes(
    files: dict[SplitName, Path], contents: dict[SplitName, dict[str, Any]], notes: list[str]
) -> tuple[tuple[str, ...], dict[SplitName, dict[Any, int]]]:
    """Class names in the order of the first file's category ids, and for each split a map from category id to label."""
    categories = {name: _drop_groups(_categories(files[name], content), content) for name, content in contents.items()}
    used_groups = {name for _, groups in categories.values() for name, used in groups.items() if used}
    dropped = {name for _, groups in categories.values() for name in groups} - used_groups
    if dropped:
        notes.append(
            f"category {listed(sorted(dropped))} groups the others or is the background and has no boxes: "
            "it is not used as a class"
        )
    named = {name: _named(files[name], split, dropped) for name, (split, _) in categories.items()}
    first = next(iter(contents))
    classes = tuple(text for _, text in sorted(named[first].items(), key=lambda item: _order(item[0])))
    if not classes:
        raise DataError(f"{files[first]}: no categories; give the list 'categories' an id and a name for each class")
    label_of = {name: label for label, name in enumerate(classes)}
    maps: dict[SplitName, dict[Any, int]] = {}
    for name, split in named.items():
        names = set(split.values())
        if names - set(classes):
            raise DataError(
                f"{files[name]}: its classes differ from those of {files[first].name}: {listed(sorted(names))} against "
                f"{listed(sorted(classes))}; give both files the same category names"
            )
        if set(classes) - names:
            notes.append(f"the {name} split does not list these classes: {listed(sorted(set(classes) - names))}")
        maps[name] = {key: label_of[text] for key, text in split.items()}
    return classes, maps


def _order(key: Any) -> tuple[bool, Any]:
    """Numbers in their order, then texts in theirs; texts that are integers count as these."""
    number = whole(key)
    return (False, number) if number is not None else (isinstance(key, str), key)


def _categories(file: Path, content: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    by_id: dict[Any, dict[str, Any]] = {}
    for category in content["categories"]:
        name = category.get("name") if isinstance(category, dict) else None
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)
        if not isinstance(category, dict) or not is_id(category.get("id")) or not isinstance(name, str):
            raise DataError(f"{file}: category {category!r:.200} needs an integer id and a name")
        if not _is_text(name):
            raise DataError(f"{file}: category {category['id']}: its name {name!r:.60} is empty or no valid text; give it a name")
        if category["id"] in by_id:
            raise DataError(f"{file}: category id {category['id']} occurs twice; make the ids unique")
        by_id[category["id"]] = {**category, "name": name}
    return by_id


def _is_text(name: str) -> bool:
    """True for a name that is not empty and can be written as UTF-8 (half of a surrogate pair cannot)."""
    try:
        return bool(name.encode().strip())
    except UnicodeEncodeError:
        return False


def _drop_groups(
    categories: dict[Any, dict[str, Any]], content: dict[str, Any]
) -> tuple[dict[Any, dict[str, Any]], dict[str, bool]]:
    """The categories, and which of them may be no class, by name, with True if it has a box.

    Those are Roboflow's parent of the others, and a background.
    """
    groups: dict[str, bool] = {}
    marked = {}
    for key, category in categories.items():
        parents = {str(other.get("supercategory")) for other in categories.values() if other is not category}
        group = (category.get("supercategory") == "none" and category["name"] in parents) or category["name"] in NO_OBJECT
        marked[key] = {**category, "group": group}
        if group:
            groups[category["name"]] = groups.get(category["name"], False)
    if groups:
        find = _Ids(marked)
        for item in content["annotations"]:
            key = find(item.get("category_id")) if isinstance(item, dict) else None
            if key is not None and marked[key]["group"]:
                groups[marked[key]["name"]] = True
    return marked, groups


def _named(file: Path, categories: dict[Any, dict[str, Any]], dropped: set[str]) -> dict[Any, str]:
    """Class names by category id, without the dropped groups."""
    named: dict[Any, str] = {}
    taken: set[str] = set()
    for key, category in categories.items():
        if category["group"] and category["name"] in dropped:
            continue
        if category["name"] in taken:
            raise DataError(f"{file}: two categories are called {category['name']!r}; make the names unique")
        taken.add(category["name"])
        named[key] = category["name"]
    return named


class _Ids:
    """Looks up ids; if an id is not there, the number that it spells as a text (or the text of the number) is tried."""

    def __init__(self, ids: Iterable[Any]) -> None:
        self.ids = {key: key for key in ids}
        self.numbers: dict[int, Any] = {}
        for key in self.ids:
            if (number := whole(key)) is not None:
                self.numbers[number] = None if number in self.numbers else key

    def __call__(self, value: Any) -> Any | None:
        """The id as the list of records has it, or None."""
        if type(value) is int and value in self.ids:
            return self.ids[value]
        if not is_id(value):
            return None
        if value in self.ids:
            return self.ids[value]
        number = whole(value)
        return None if number is None else self.numbers.get(number)


# -------------------------------------------------------------------------------------------------- images and boxes


@dataclass
class _Reading:
    """What is collected while a file is read."""

    where: str
    """The file, relative to the data's folder."""
    labels: dict[Any, int]
    """Label by category id."""
    defects: list[Defect] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    """Number of boxes by the flag, other than ``iscrowd``, that marks them."""
    outlined: int = 0
    """Number of boxes that are the tight box of a segmentation."""
    scored: int = 0
    """Number of boxes with a score below 1."""
    used: set[int] = field(default_factory=set)
    """Category ids of the annotations that are integers, listed or not."""

    def report(self, kind: str, record: str, message: str, skipped: str = "box") -> None:
        self.defects.append(Defect(kind, self.where, record, message, skipped))

    def notes(self) -> Iterable[str]:
        for key, count in self.ignored.items():
            yield f"{subject(count, 'box', 'are')} marked '{key}': like crowds, neither trained on nor counted as mistakes"
        if self.outlined:
            yield f"{subject(self.outlined, 'annotation', 'have')} no bbox: the tight box of the segmentation is used"
        listed_ids = {whole(key) for key in self.labels}
        count = len(listed_ids)
        if listed_ids == set(range(1, count + 1)) and 0 in self.used and count not in self.used:
            yield (
                "the category ids of the annotations count from 0, those of the list from 1: id 0 is used and not listed, "
                f"id {count} listed and never used; most boxes have a wrong class until 1 is added to every category_id"
            )
        if self.scored:
            yield f"{subject(self.scored, 'box', 'have')} a score below 1: each counts as much as its score in the training"


def _raw_images(content: dict[str, Any], file: Path, root: Path, reading: _Reading, split: SplitName) -> list[RawImage]:
    """The file's images with their boxes; defects of the two lists (malformed entries, repeated or unknown ids) are added."""
    entries: dict[Any, tuple[str, dict[str, Any]]] = {}
    for position, entry in enumerate(content["images"]):
        record = f"images[{position}]"
        name = _file_name(entry) if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not is_id(entry.get("id")) or name is None:
            keys = f"; it has {listed(map(repr, entry))}" if isinstance(entry, dict) else ""
            reading.report("malformed record", record, f"an image needs an id and a file_name{keys}", "image")
        elif entry["id"] in entries:
            message = f"{entries[entry['id']][0]} and {name} have the same id; the first is kept"
            reading.report("duplicate image id", f"image {entry['id']}", message, "image")
        else:
            entries[entry["id"]] = name, entry
    if content["images"] and not any(isinstance(entry, dict) and _file_name(entry) for entry in content["images"]):
        count = len(content["images"])
        message = f"{count} of {count} images have no file_name; add it, or the address coco_url, to each image"
        reading.defects.insert(0, Defect("missing file names", reading.where, "images", message, "nothing"))
    boxes = _raw_boxes(content["annotations"], _Ids(entries), reading)
    # COCO's ids are integers, but some files have text: then images are numbered by their position.
    fit = all(not isinstance(key, str) and abs(key) < 2**53 and int(key) == key for key in entries)
    numbers = {key: int(key) if fit else position for position, key in enumerate(entries, start=1)}
    paths = _locate([name for name, _ in entries.values()], file, root, split, reading)
    images = []
    for (key, (_, entry)), image_path in zip(entries.items(), paths, strict=True):
        height, width = whole(entry.get("height")), whole(entry.get("width"))
        size_hw = (height, width) if height is not None and width is not None else None
        images.append(RawImage(numbers[key], image_path, boxes.get(key, ()), reading.where, size_hw))
    return images


def _file_name(entry: dict[str, Any]) -> str | None:
    """The image's path as listed; LVIS has only an address."""
    name = entry.get("file_name") or entry.get("coco_url")
    return name if isinstance(name, str) and name.strip() else None


def _raw_boxes(annotations: list[Any], images: _Ids, reading: _Reading) -> dict[Any, list[RawBox]]:
    """Boxes by image id."""
    boxes: dict[Any, list[RawBox]] = {}
    categories = _Ids(reading.labels)
    seen: set[Any] = set()
    for position, item in enumerate(annotations):
        if not isinstance(item, dict):
            message = "an annotation is an object with image_id, category_id and bbox"
            reading.report("malformed record", f"annotations[{position}]", message)
            continue
        key, listed_image = item.get("id"), item.get("image_id")
        record = f"annotation {key}" if key is not None else f"annotations[{position}]"
        if listed_image is not None:
            record += f" of image {listed_image}"
        xyxy = _box(item, record, reading)
        if xyxy is None:
            continue
        if is_id(key):
            if key in seen:
                reading.report("duplicate annotation id", record, "the id occurs twice; both boxes are kept", "nothing")
            seen.add(key)
        image_id = images(listed_image)
        if image_id is None:
            reading.report("unknown image", record, f"image_id {listed_image!r:.60} is not in the list of images")
            continue
        if item.get("category_id") is None:
            reading.report("missing category", record, "no category_id")
            continue
        if (number := whole(item["category_id"])) is not None:
            reading.used.add(number)
        category = categories(item["category_id"])
        if category is None:
            message = f"category_id {item['category_id']!r:.60} is not in the list of categories"
            reading.report("unknown class", record, message)
            continue
        crowd = _crowd(item, record, reading)
        if crowd is None:
            continue
        boxes.setdefault(image_id, []).append(
            RawBox(
                xyxy,
                reading.labels[category],
                record,
                crowd=crowd,
                area=_area(item.get("area"), record, reading),
                segmentation=item.get("segmentation") or None,
                score=_score(item, record, reading),
            )
        )
    return boxes


def _box(item: dict[str, Any], record: str, reading: _Reading) -> Box | None:
    """Corners of an annotation's box, or of its segmentation if it has no box; None (and a defect) if it has neither."""
    box = item.get("bbox")
    if isinstance(box, list) and len(box) == 4:
        x, y, width, height = box
        kinds = {type(x), type(y), type(width), type(height)}
        if kinds == {float}:
            return x, y, x + width, y + height
        if kinds <= {int, float}:
            x, y, width, height = map(_float, box)
            return x, y, x + width, y + height
    if (box is None or box == []) and item.get("segmentation"):
        outline = outline_box(item["segmentation"])
        if outline is not None:
            reading.outlined += 1
            return outline
        message = f"no bbox, and the segmentation {item['segmentation']!r:.60} has no box"
        reading.report("malformed record", record, message)
        return None
    reading.report("malformed record", record, f"bbox is {box!r:.60}, not four numbers x, y, width, height")
    return None


def _float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer beyond 1e308
        return math.inf if number > 0 else -math.inf


def _crowd(item: dict[str, Any], record: str, reading: _Reading) -> bool | None:
    """True if a flag marks the box as a region to ignore; None (and a defect) if a flag is neither true nor false."""
    crowd = False
    for key in CROWD_KEYS:
        if key not in item or (value := item[key]) is None or value == 0:
            continue
        flag = truth(value)
        if flag is None:
            reading.report("malformed record", record, f"{key} is {value!r:.60}, neither 0 nor 1")
            return None
        if flag and not crowd and key != "iscrowd":
            reading.ignored[key] += 1
        crowd = crowd or flag
    return crowd


def _score(item: dict[str, Any], record: str, reading: _Reading) -> float:
    """The score of a box that a model labelled; 1 (and a defect, if there is something else) without one."""
    score = item.get("score")
    if score is None:
        return 1.0
    if isinstance(score, int | float) and not isinstance(score, bool) and 0 <= score <= 1:
        reading.scored += score < 1
        return float(score)
    reading.report(
        "malformed score", record, f"score is {score!r:.60}, not a number from 0 to 1; the box counts fully", "nothing"
    )
    return 1.0


def _area(value: Any, record: str, reading: _Reading) -> float | None:
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(area := _float(value)) <= LARGEST_AREA:
        return area
    message = f"area is {value!r:.60}, not a number of square pixels; width times height is used"
    reading.report("malformed area", record, message, "nothing")
    return None


def _locate(file_names: list[str], file: Path, root: Path, split: SplitName, reading: _Reading) -> list[Path]:
    """Paths of the images (see ``paths``); folders named after the split go first.

    Folders named after another split are searched only if no image was found elsewhere: a file of the same name in them may
    be another picture. An image that is missing gets the path where it was first looked for.
    """
    bases = [base for base in dict.fromkeys((file.parent, root)) if base.is_dir()]
    bases += [place for base in bases if (place := base / "images").is_dir()]
    below = list(dict.fromkeys(place for base in bases for place in folders_below(base, 1)))

    def deeper() -> list[Path]:
        return [place for base in bases for place in folders_below(base, DEPTH) if other(place) in (None, split)]

    def other(place: Path) -> SplitName | None:
        """The split that the folder, or one above it in the data, is named after."""
        return split_of(*reversed((place.relative_to(root) if place.is_relative_to(root) else place).parts))

    own = [place for place in below if split_of(place.name) == split and _is_split_name(place.name)]
    neutral = [place for place in below if place not in own and other(place) in (None, split)]
    others = [place for place in below if other(place) not in (None, split)]
    for first, then in (([*own, *bases], neutral), (others, [])):
        found = match_listed(file_names, first, then, deeper if first is not others else list)
        if any(found):
            missing = [*own, *bases][0]
            return [path or missing / "/".join(split_parts(name)) for path, name in zip(found, file_names, strict=True)]
    if file_names:
        message = (
            f"none of its {len(file_names)} images was found, e.g. {file_names[0]}; looked in "
            f"{listed(map(str, dict.fromkeys((*bases, *below))), 6)}; put the image folder beside the annotations"
        )
        reading.defects.insert(0, Defect("missing files", reading.where, "images", message, "nothing"))
    return [(own or bases)[0] / "/".join(split_parts(name)) for name in file_names]


def _is_split_name(name: str) -> bool:
    """True for ``train``, ``train2017`` or ``VAL_1``, but not for ``train_masks``."""
    return name.lower().rstrip("0123456789_- .") in SPLIT_WORDS


def write_coco(data: DetectionSet, folder: str | Path) -> Path:
    """Write a set as ``annotations/instances_<split>.json`` and ``images/<split>/`` into a folder.

    Several splits may share the folder. Each file is written under a temporary name and then renamed, so an interruption
    leaves no partial file. The annotation file is written last.

    Returns:
        Path of the annotation file.
    """
    folder = Path(folder)
    images, annotations = folder / "images" / data.name, folder / "annotations"
    for place in (images, annotations):
        place.mkdir(parents=True, exist_ok=True)
    content = data.coco_ground_truth()
    taken: set[str] = set()
    for record, entry in zip(data.records, content["images"], strict=True):
        # Images from different folders may have the same name.
        name = record.path.name if record.path.name not in taken else f"{record.id}_{record.path.name}"
        taken.add(name)
        entry["file_name"] = name
        if not (images / name).exists() or not (images / name).samefile(record.path):
            _write(images / name, record.path)
    file = annotations / f"instances_{data.name}.json"
    _write(file, json.JSONEncoder().iterencode(content))
    return file


def _write(file: Path, content: Path | Iterable[str]) -> None:
    """Copy a file (``Path``) or write text under a temporary name, then rename it."""
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        if isinstance(content, Path):
            shutil.copyfile(content, temporary)
        else:
            with open(temporary, "w", encoding="utf-8") as stream:
                stream.writelines(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
