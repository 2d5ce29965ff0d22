"""Find COCO files, assign them to splits and parse them strictly: no file is passed over because it is broken."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from detdistill.data.records import SplitName, listed, relative, split_of
from detdistill.errors import DataError

LISTS = ("images", "annotations", "categories")


def find_coco(path: Path) -> list[Path]:
    """List the COCO detection files of a folder, or the file itself if ``path`` is such a file; nothing is parsed yet.

    The search covers ``annotations``, the folder itself and its subfolders. If some files are called ``instances_...``, all
    others (captions, keypoints) are ignored. A file that is called ``instances_...`` or ``_annotations.coco.json`` counts
    whatever it holds.

    Raises:
        DataError: a file in the place of annotations is not valid JSON.
    """
    if path.is_file():
        return [path] if path.suffix.lower() == ".json" or _looks_like_coco(path) else []
    places = [path / "annotations", path, *sorted(place for place in path.iterdir() if place.is_dir())]
    found: list[Path] = []
    broken: list[Path] = []
    for file in dict.fromkeys(file for place in places if place.is_dir() for file in sorted(place.glob("*.json"))):
        if _is_named(file) or (file.is_file() and _looks_like_coco(file)):
            found.append(file)
        elif file.is_file() and (file.parent == path / "annotations" or split_of(file.stem)):
            broken.append(file)
    instances = [file for file in found if file.name.startswith("instances")]
    if not instances:
        # Other JSON beside the annotations (captions without boxes, settings) is no fault, but a file cut off is.
        for file in broken if found else [file for file in broken if file.parent == path / "annotations"]:
            load_json(file)
    return instances or found


def _is_named(file: Path) -> bool:
    return file.name.startswith("instances") or file.name.endswith("_annotations.coco.json")


def _looks_like_coco(file: Path) -> bool:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from error
    if b"\0" in content[:4]:  # UTF-16 or UTF-32
        content = content.decode(json.detect_encoding(content), "replace").encode()
    return content[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and all(
        key in content for key in (b'"images"', b'"annotations"')
    )


def _unreadable(file: Path, error: OSError) -> DataError:
    return DataError(f"{file}: cannot be read: {error.strerror or error}")


def files_by_split(path: Path, files: list[Path], notes: list[str]) -> dict[SplitName, Path]:
    """Assign each file to its split, in the order train, val, test.

    Args:
        path: the user's folder or file.
        files: result of ``find_coco(path)``. If ``path`` is a training file, the files of the other splits are looked for.
        notes: notes for the user are appended here.

    Raises:
        DataError: the split of a file cannot be told, or two files claim the same one.
    """
    files = files if path.is_dir() else [*files, *_siblings(path)]
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


def _siblings(file: Path) -> list[Path]:
    """Files of the other splits, if the file's name (or its folder's name) marks it as the training split."""
    swaps: list[Path] = []
    for word in ("val", "valid", "validation", "test"):
        if split_of(file.stem) == "train":
            swaps.append(file.with_name(file.name.replace("train", word)))
        elif split_of(file.stem) is None and split_of(file.parent.name) == "train":
            swaps.append(file.parent.with_name(file.parent.name.replace("train", word)) / file.name)
    return [swap for swap in swaps if swap != file and swap.is_file()]


def load_coco(file: Path) -> dict[str, Any]:
    """Parse a file and check that it has the three lists.

    Raises:
        DataError: not valid JSON, a key that occurs twice in an object, or not COCO.
    """
    content = load_json(file)
    for key in LISTS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{file}: no list {key!r}; a COCO detection file has the lists images, annotations and categories")
    return dict(content)


def load_json(file: Path) -> Any:
    """Parse JSON in UTF-8, UTF-16 or UTF-32; integers too long for Python become infinite.

    Raises:
        DataError: the file cannot be read or is not valid JSON, or a key occurs twice in one object.
    """
    try:
        data = file.read_bytes()
        text = data.decode(json.detect_encoding(data))
    except OSError as error:
        raise _unreadable(file, error) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from error
    try:
        try:
            return json.loads(text, object_pairs_hook=_object)
        except (json.JSONDecodeError, _TwiceError):
            raise
        except ValueError:  # an integer of more digits than Python converts
            return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}: not valid JSON at line {error.lineno}, column {error.colno} (character {error.pos}): {error.msg}; "
            "the file is probably cut off: copy or export it again"
        ) from error
    except _TwiceError as error:
        raise DataError(f"{file}: {error}; only one of them can be meant: remove the other") from error
    except RecursionError as error:
        raise DataError(f"{file}: its lists are nested too deeply for COCO; export it again") from error


class _TwiceError(ValueError):
    """A key occurs twice in one JSON object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        place = f" with id {made['id']!r:.40}" if "id" in made else ""
        raise _TwiceError(f"the key {twice!r:.60} occurs twice in one object{place}")
    return made


def _integer(digits: str) -> float:
    return int(digits) if len(digits) < 400 else -math.inf if digits.startswith("-") else math.inf
