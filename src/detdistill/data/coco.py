"""Reader and writer of COCO JSON: ``instances_*.json`` with image folders, Roboflow's ``_annotations.coco.json``, or one file.

Category ids may be any integers, with gaps. Labels follow the order of the ids, and splits are matched by category name.
Crowd boxes and the areas given in the annotations are kept. Polygons and run lengths stay unchanged.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detdistill.data.records import Defect, DetectionSet, RawBox, RawImage, SplitName, assemble, listed, relative, split_of
from detdistill.errors import DataError

Sets = dict[SplitName, DetectionSet]


def find_coco(path: Path) -> list[Path]:
    """List the COCO detection files of a folder, or the file itself if ``path`` is such a file; nothing is parsed yet.

    The search covers ``annotations``, the folder itself and its subfolders. If some files are called ``instances_...``, all
    others (captions, keypoints) are ignored.
    """
    if path.is_file():
        return [path] if _looks_like_coco(path) else []
    places = [path / "annotations", path, *sorted(place for place in path.iterdir() if place.is_dir())]
    found: list[Path] = []
    for place in places:
        for file in sorted(place.glob("*.json")) if place.is_dir() else ():
            if file not in found and (file.name.startswith("instances") or _looks_like_coco(file)):
                found.append(file)
    instances = [file for file in found if file.name.startswith("instances")]
    return [file for file in instances or found if _looks_like_coco(file)]


def _looks_like_coco(file: Path) -> bool:
    content = file.read_bytes()
    return content[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and all(
        key in content for key in (b'"images"', b'"annotations"')
    )


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
    by_split = _by_split(path, files if path.is_dir() else [*files, *_siblings(path)], notes)
    contents = {name: _load(file) for name, file in by_split.items()}
    classes, maps = _match_classes(by_split, contents, notes)
    sets: Sets = {}
    for name, file in by_split.items():
        images, defects = _raw_images(contents.pop(name), file, root, maps[name], name)
        sets[name] = assemble(name, "coco", root, classes, images, defects)
    return sets, notes


def _data_root(file: Path) -> Path:
    """The parent of ``annotations/`` or of Roboflow's split folder; for any other place, the file's own folder."""
    if file.parent.name == "annotations" or (file.stem == "_annotations.coco" and split_of(file.parent.name)):
        return file.parent.parent
    return file.parent


def _siblings(file: Path) -> list[Path]:
    """Files of the other splits, if the file's name (or its folder's name) marks it as the training split."""
    swaps: list[Path] = []
    for word in ("val", "valid", "validation", "test"):
        if split_of(file.stem) == "train":
            swaps.append(file.with_name(file.name.replace("train", word)))
        elif split_of(file.stem) is None and split_of(file.parent.name) == "train":
            swaps.append(file.parent.with_name(file.parent.name.replace("train", word)) / file.name)
    return [swap for swap in swaps if swap != file and swap.is_file() and _looks_like_coco(swap)]


def _by_split(path: Path, files: list[Path], notes: list[str]) -> dict[SplitName, Path]:
    """Assign each file to its split, in the order train, val, test."""
    if path.is_file() and len(files) > 1:
        notes.append(f"the files beside {path.name} were taken as its other splits: {listed(file.name for file in files[1:])}")
    by_split: dict[SplitName, Path] = {}
    for file in files:
        folder = file.parent.name if file.parent not in (path, path / "annotations") else ""
        name: SplitName | None = split_of(file.stem, folder)
        if path.is_file() and file == path:
            name = "train"
        if name is None and len(files) == 1:
            name = "train"
        if name is None:
            raise DataError(
                f"{path}: cannot tell which split {relative(file, path)} is, beside {len(files) - 1} other COCO files; "
                "put train, val or test into the file names, or pass the training file itself"
            )
        if name in by_split:
            raise DataError(
                f"{path}: both {relative(by_split[name], path)} and {relative(file, path)} look like the {name} split; "
                "pass the training JSON file itself, or move one away"
            )
        by_split[name] = file
    return dict(sorted(by_split.items(), key=lambda item: ("train", "val", "test").index(item[0])))


def _load(file: Path) -> dict[str, Any]:
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}: not valid JSON at line {error.lineno}, column {error.colno} (character {error.pos}): {error.msg}; "
            "the file is probably cut off: copy or export it again"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from error
    assert isinstance(content, dict)  # find_coco accepts only files that begin with a brace
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise DataError(f"{file}: no list {key!r}; a COCO detection file has the lists images, annotations and categories")
    return content


def _match_classes(
    files: dict[SplitName, Path], contents: dict[SplitName, dict[str, Any]], notes: list[str]
) -> tuple[tuple[str, ...], dict[SplitName, dict[int, int]]]:
    """Class names in the order of the first file's category ids, and for each split a map from category id to label."""
    categories = {name: _categories(files[name], content) for name, content in contents.items()}
    used = {
        categories[name][item["category_id"]]["name"]
        for name, content in contents.items()
        for item in content["annotations"]
        if isinstance(item, dict) and _is_id(item.get("category_id")) and item["category_id"] in categories[name]
    }
    first = next(iter(contents))
    parents = {str(category.get("supercategory")) for split in categories.values() for category in split.values()}
    # Roboflow adds a category for the group itself: it is the parent of all others and has no boxes.
    dummies = {
        category["name"]
        for category in categories[first].values()
        if category.get("supercategory") == "none" and category["name"] in parents and category["name"] not in used
    }
    if dummies:
        notes.append(f"category {listed(sorted(dummies))} only groups the others and has no boxes: it is not used as a class")
    classes = tuple(category["name"] for _, category in sorted(categories[first].items()) if category["name"] not in dummies)
    if not classes:
        raise DataError(f"{files[first]}: no categories; give the list 'categories' an id and a name for each class")
    label_of = {name: label for label, name in enumerate(classes)}
    maps: dict[SplitName, dict[int, int]] = {}
    for name, split in categories.items():
        names = {category["name"] for category in split.values()} - dummies
        if names - set(classes):
            raise DataError(
                f"{files[name]}: its classes differ from those of {files[first].name}: {listed(sorted(names))} against "
                f"{listed(sorted(classes))}; give both files the same category names"
            )
        if set(classes) - names:
            notes.append(f"the {name} split does not list these classes: {listed(sorted(set(classes) - names))}")
        maps[name] = {key: label_of[category["name"]] for key, category in split.items() if category["name"] not in dummies}
    return classes, maps


def _categories(file: Path, content: dict[str, Any]) -> dict[int, dict[str, Any]]:
    by_id: dict[int, dict[str, Any]] = {}
    for category in content["categories"]:
        if not isinstance(category, dict) or not _is_id(category.get("id")) or not isinstance(category.get("name"), str):
            raise DataError(f"{file}: category {category!r} needs an integer id and a name")
        if category["id"] in by_id:
            raise DataError(f"{file}: category id {category['id']} occurs twice; make the ids unique")
        if category["name"] in {other["name"] for other in by_id.values()}:
            raise DataError(f"{file}: two categories are called {category['name']!r}; make the names unique")
        by_id[category["id"]] = category
    return by_id


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _raw_images(
    content: dict[str, Any], file: Path, root: Path, labels: dict[int, int], split: SplitName
) -> tuple[list[RawImage], list[Defect]]:
    """The file's images with their boxes, and the defects of the two lists (malformed entries, repeated or unknown ids)."""
    where = relative(file, root)
    defects: list[Defect] = []
    entries: dict[Any, dict[str, Any]] = {}
    for position, entry in enumerate(content["images"]):
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("id"), int | str)
            or not isinstance(entry.get("file_name"), str)
        ):
            message = "an image needs an id and a file_name"
            defects.append(Defect("malformed record", where, f"images[{position}]", message, "image"))
        elif entry["id"] in entries:
            message = f"{entries[entry['id']]['file_name']} and {entry['file_name']} have the same id; the first is kept"
            defects.append(Defect("duplicate image id", where, f"image {entry['id']}", message, "image"))
        else:
            entries[entry["id"]] = entry
    boxes = _raw_boxes(content["annotations"], set(entries), labels, where, defects)
    # COCO's ids are integers, but some files have text: then images are numbered by their position.
    whole = all(map(_is_id, entries))
    numbers = {key: key if whole else position for position, key in enumerate(entries, start=1)}
    paths = _locate([entry["file_name"] for entry in entries.values()], file, root, split)
    images = []
    for (key, entry), image_path in zip(entries.items(), paths, strict=True):
        height, width = entry.get("height"), entry.get("width")
        size_hw = (height, width) if isinstance(height, int) and isinstance(width, int) else None
        images.append(RawImage(numbers[key], image_path, boxes.get(key, ()), where, size_hw))
    return images, defects


def _raw_boxes(
    annotations: list[Any], image_ids: set[Any], labels: dict[int, int], where: str, defects: list[Defect]
) -> dict[Any, list[RawBox]]:
    """Boxes by image id."""
    boxes: dict[Any, list[RawBox]] = {}
    seen: set[Any] = set()

    def report(kind: str, record: str, message: str, skipped: str = "box") -> None:
        defects.append(Defect(kind, where, record, message, skipped))

    for position, item in enumerate(annotations):
        if not isinstance(item, dict):
            report(
                "malformed record", f"annotations[{position}]", "an annotation is an object with image_id, category_id and bbox"
            )
            continue
        key = item.get("id")
        record = f"annotation {key}" if key is not None else f"annotations[{position}]"
        if item.get("image_id") is not None:
            record += f" of image {item['image_id']}"
        box = item.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
            report("malformed record", record, f"bbox is {box!r:.60}, not four numbers x, y, width, height")
            continue
        if isinstance(key, int | str):
            if key in seen:
                report("duplicate annotation id", record, "the id occurs twice; both boxes are kept", "nothing")
            seen.add(key)
        image_id = item.get("image_id")
        if not isinstance(image_id, int | str) or image_id not in image_ids:
            report("unknown image", record, f"image_id {image_id!r} is not in the list of images")
            continue
        if item.get("category_id") is None:
            report("missing category", record, "no category_id")
            continue
        if not _is_id(item["category_id"]) or item["category_id"] not in labels:
            report("unknown class", record, f"category_id {item['category_id']!r} is not in the list of categories")
            continue
        x, y, width, height = map(float, box)
        area = item.get("area")
        boxes.setdefault(image_id, []).append(
            RawBox(
                (x, y, x + width, y + height),
                labels[item["category_id"]],
                record,
                crowd=bool(item.get("iscrowd")),
                area=float(area) if isinstance(area, int | float) else None,
                segmentation=item.get("segmentation") or None,
            )
        )
    return boxes


def _locate(file_names: list[str], file: Path, root: Path, split: SplitName) -> list[Path]:
    """Paths of the images, each in the first folder that has a file of that name; folders named after the split go first.

    Folders named after another split are searched only if no image was found elsewhere: a file of the same name in them may
    be another picture.
    """
    places: list[Path] = []
    for base in dict.fromkeys((file.parent, root)):
        for place in (base, base / "images"):
            if place.is_dir():
                places += [place, *sorted(child for child in place.iterdir() if child.is_dir())]
    places = list(dict.fromkeys(places))
    own = [place for place in places if place != root and split_of(place.name) == split]
    neutral = [place for place in places if place == root or split_of(place.name) is None]
    others = [place for place in places if place not in own and place not in neutral]
    names = [name.replace("\\", "/") for name in file_names]
    for candidates in ([*own, *neutral], others):
        found = [_first(candidates, name) for name in names]
        if any(found):
            return [path or candidates[0] / name for path, name in zip(found, names, strict=True)]
    example = f", e.g. {names[0]}" if names else ""
    raise DataError(
        f"{file}: none of its {len(names)} images was found{example}; looked in {listed(map(str, places), 6)}; "
        "put the image folder beside the annotations"
    )


def _first(places: list[Path], name: str) -> Path | None:
    base_name = name.rsplit("/", 1)[-1]
    for index, place in enumerate(places):
        for candidate in dict.fromkeys((place / name, place / base_name)):
            if candidate.is_file():
                # The next image most likely lies in the same folder: look there first.
                places.insert(0, places.pop(index))
                return candidate
    return None


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
