"""Find the label files of YOLO images, and the label files without an image.

A label file has the name of its image. Downloads, archives and other systems write the same name differently: URL-encoded
(``my%20pic``), with decomposed accents (macOS), in other case, or with the image's suffix (``a.jpg.txt``).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, unquote_plus

from detdistill.data.records import IMAGE_SUFFIXES
from detdistill.data.text import read_text
from detdistill.data.yolo_rows import parse_rows
from detdistill.errors import DataError

NOT_LABELS = frozenset({"classes.txt"})


def label_path(image: Path) -> Path:
    """Path of an image's label file: the last folder named ``images`` becomes ``labels``; else the file beside the image."""
    labels, beside = _label_folder(image.parent) / f"{image.stem}.txt", image.with_suffix(".txt")
    return beside if os.path.isfile(beside) and not os.path.isfile(labels) else labels


def _label_folder(images: Path) -> Path:
    parts = list(images.parts)
    for index in range(len(parts) - 1, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts)


def spellings(name: str) -> Iterator[str]:
    """The name, and other ways to write the same one: URL-decoded, with composed and with decomposed accents."""
    yield from dict.fromkeys(
        (name, unquote(name), unicodedata.normalize("NFC", unquote(name)), unicodedata.normalize("NFD", unquote(name)))
    )


def _composed(stem: str) -> str:
    return unicodedata.normalize("NFC", unquote(stem))


def _loose(stem: str) -> str:
    name = unicodedata.normalize("NFC", unquote_plus(stem)).casefold()
    bare, suffix = os.path.splitext(name)
    return bare if suffix in IMAGE_SUFFIXES else name


@dataclass
class _Folder:
    """Label files of the images of one folder."""

    labels: Path
    found: dict[str, Path] = field(default_factory=dict)
    """Label file by the stem of the image."""
    orphans: list[Path] = field(default_factory=list)


class Labels:
    """The label files of images; every folder is listed only once."""

    def __init__(self) -> None:
        self.folders: dict[Path, _Folder] = {}

    def of(self, image: Path) -> Path | None:
        """The label file of an image; None: it has none."""
        return self._folder(image.parent).found.get(image.stem)

    def orphans(self, images: Sequence[Path]) -> list[tuple[Path, Path]]:
        """Pairs of image folder and label file without an image, for the folders of the given images."""
        places = sorted({path.parent for path in images})
        return [(place, orphan) for place in places for orphan in self._folder(place).orphans]

    def doubt(self, image: Path) -> Path | None:
        """A label file without an image that may belong to this image without labels; None: the image has no objects."""
        return next((o for o in self._folder(image.parent).orphans if not _other_number(o.stem, image.stem)), None)

    def _folder(self, images: Path) -> _Folder:
        if images not in self.folders:
            self.folders[images] = _match(images, _label_folder(images))
        return self.folders[images]


def _other_number(one: str, two: str) -> bool:
    """The names differ in their numbers only: frame 12 is never another name of frame 34."""
    return re.sub(r"\d+", "#", one) == re.sub(r"\d+", "#", two) and (
        [int(digits) for digits in re.findall(r"\d{1,400}", one)] != [int(digits) for digits in re.findall(r"\d{1,400}", two)]
    )


def _match(images: Path, labels: Path) -> _Folder:
    """Match all images of a folder with the files of its label folder and of the folder itself.

    Equal names go first. Then names that are equal when written in the same way match, if they are the only ones of the kind.
    """
    names = _names(images)
    stems = {os.path.splitext(name)[0] for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES}
    beside = {os.path.splitext(name)[0]: images / name for name in names if name.lower().endswith(".txt")}
    own = (
        {os.path.splitext(name)[0]: labels / name for name in _names(labels) if name.lower().endswith(".txt")}
        if labels != images
        else {}
    )
    folder = _Folder(labels, {**beside, **own})  # also of images that a list names and that do not exist
    free = {stem: path for stem, path in {**beside, **own}.items() if stem not in stems and path.name not in NOT_LABELS}
    for write in (_composed, _loose):
        wanted = _by_writing(stems - folder.found.keys(), write)
        for writing, candidates in _by_writing(free, write).items():
            if len(candidates) == 1 and len(wanted.get(writing, ())) == 1:
                folder.found[wanted[writing][0]] = free.pop(candidates[0])
    folder.orphans = sorted(path for path in free.values() if path.parent != images or has_rows(path))
    return folder


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except PermissionError as error:
        raise DataError(f"{folder}: the folder cannot be read; check its permissions") from error
    except (OSError, ValueError):  # no folder, or a path that none can have
        return []


def _by_writing(stems: Iterable[str], write: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for stem in stems:
        groups[write(stem)].append(stem)
    return groups


def has_rows(file: Path) -> bool:
    """True if the first row of a text file is one of a label file; beside images there may be notes and lists too."""
    try:
        rows = parse_rows(read_text(file))
    except DataError:
        return False
    return bool(rows) and len(rows[0].values) >= 4
