"""YOLO data without a ``data.yaml`` that names the splits, as annotation tools write them.

The classes are those of ``notes.json`` (Label Studio), of a YAML file with ``names`` but no splits (supervision), of
``classes.txt`` (Label Studio, labelImg) or of ``obj.names`` (Darknet's form: CVAT, Datumaro). The splits are the folders named
after them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from detdistill.data.coco_files import load_json
from detdistill.data.paths import folders_below
from detdistill.data.records import IMAGE_SUFFIXES, SplitName, listed, split_of
from detdistill.data.text import read_text
from detdistill.data.yolo_labels import has_rows
from detdistill.errors import DataError

NOTES = "notes.json"
LISTS = ("classes.txt", "obj.names")
DEPTH = 3
"""Label files are looked for this many levels below the data's folder."""


def find_names(path: Path) -> Path | None:
    """The file that names the classes of a folder's YOLO label files; None: there is no such file, or no label file."""
    if not path.is_dir():
        return None
    yaml = [file for file in sorted(path.iterdir()) if file.suffix in (".yaml", ".yml") and _has_names(file)]
    found = [file for file in (path / NOTES, *yaml[:1], *(path / name for name in LISTS)) if file.is_file()]
    if (path / NOTES) in found and not _is_label_studio(path / NOTES):
        found.remove(path / NOTES)
    folders = (path, *folders_below(path, DEPTH))
    labelled = bool(found) and any(
        has_rows(file) for folder in folders for file in sorted(folder.glob("*.txt"))[:20] if file.name not in LISTS
    )
    return found[0] if labelled else None


def read_names(file: Path, notes: list[str]) -> dict[str, Any]:
    """The names of the classes, as a ``data.yaml`` has them.

    Args:
        file: ``notes.json`` or a list with a name on each line.
        notes: notes for the user are appended here.
    """
    if file.name != NOTES:
        return {"names": _lines(file)}
    names = {category["id"]: category["name"] for category in load_json(file)["categories"]}
    beside = _lines(file.parent / LISTS[0]) if (file.parent / LISTS[0]).is_file() else []
    ordered = [names[number] for number in sorted(names)]
    if beside and beside != ordered:
        notes.append(
            f"{LISTS[0]} lists {listed(beside)}, but the rows have the ids of {NOTES}, in the order {listed(ordered)}: "
            "these are used"
        )
    return {"names": names}


def split_folders(root: Path) -> dict[SplitName, list[str]]:
    """The folders of images of each split: named after splits (in the data's folder or in ``images``), else all as train."""
    for base in (root, root / "images"):
        found: dict[SplitName, list[str]] = {}
        for place in sorted(base.iterdir()) if base.is_dir() else ():
            split = split_of(place.name)
            if split is not None and place.is_dir() and any(map(_has_image, (place, *folders_below(place, DEPTH)))):
                found.setdefault(split, []).append(place.relative_to(root).as_posix())
        if found:
            return found
    return {"train": ["images" if (root / "images").is_dir() else "."]}


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def _has_names(file: Path) -> bool:
    try:
        return any(line.startswith("names:") for line in read_text(file).splitlines())
    except DataError:
        return False


def _is_label_studio(file: Path) -> bool:
    try:
        content = load_json(file)
    except DataError:
        return False
    categories = content.get("categories") if isinstance(content, dict) else None
    return isinstance(categories, list) and all(isinstance(each, dict) and {"id", "name"} <= each.keys() for each in categories)


def _has_image(folder: Path) -> bool:
    return any(os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES for name in os.listdir(folder))
