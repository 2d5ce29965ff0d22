"""Report on a data set: its contents and its defects, as tables for people or JSON for programs."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from detdistill import printing
from detdistill.data.discover import read_sets, usable
from detdistill.data.findings import findings, glance, picture_defects, same_pictures
from detdistill.data.pixels import FAULTS, Range, look
from detdistill.data.records import Defect, DetectionSet, Record, relative
from detdistill.errors import DataError, counted

SMALL_AREA, LARGE_AREA = 32.0**2, 96.0**2
"""COCO's area limits of small and large objects, in square pixels of the original image."""
SHOWN_DEFECTS = 20
SHOWN_SIZES = 5


@dataclass(frozen=True)
class SplitReport:
    """Counts of one split; all sizes are in pixels of the original images."""

    name: str
    images: int
    boxes: int
    """Crowd boxes included."""
    crowd: int
    without_boxes: int
    """Number of images without boxes."""
    image_sizes: dict[str, int]
    """Number of images by size (``<width>x<height>``), most frequent first."""
    shorter_side: tuple[int, int, int]
    """Smallest, median and largest, in pixels."""
    longer_side: tuple[int, int, int]
    box_sizes: dict[str, int]
    """Number of small (area below 32x32), medium and large (above 96x96) boxes, as COCO defines them."""
    boxes_per_image: tuple[int, float, int]
    """Smallest, mean and largest number."""
    per_class: dict[str, int]
    """Number of boxes by class, in the order of the labels."""
    skipped_images: int
    skipped_boxes: int
    skipped_masks: int = 0
    """Masks left out of boxes that are kept."""


@dataclass(frozen=True)
class DataReport:
    """Result of ``inspect_data``."""

    path: str
    form: str
    classes: tuple[str, ...]
    splits: tuple[SplitReport, ...]
    defects: tuple[tuple[str, Defect], ...]
    """Pairs of split name and defect."""
    notes: tuple[str, ...]
    fingerprints: dict[str, str]
    """Fingerprint of each split."""
    deep: bool
    """True if every image was decoded."""

    def to_json(self) -> str:
        """The whole report as JSON text, with the defects grouped by kind."""
        content: dict[str, Any] = asdict(replace(self, defects=()))
        content["defects"] = {
            kind: [{"split": split, **asdict(defect)} for split, defect in found] for kind, found in self.by_kind().items()
        }
        return json.dumps(content, indent=2)

    def by_kind(self) -> dict[str, list[tuple[str, Defect]]]:
        """Defects grouped by kind, the most frequent kind first."""
        groups: dict[str, list[tuple[str, Defect]]] = defaultdict(list)
        for split, defect in self.defects:
            groups[defect.kind].append((split, defect))
        return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))

    def render(self, console: Console) -> None:
        """Print the splits, the classes, and the first defects of each kind."""
        printing.line(console, self.path)
        printing.line(console, f"{self.form.upper()}, {len(self.classes)} classes")
        printing.line(console)
        splits = [split.name for split in self.splits]
        printing.table(console, ("", *splits), self._counts())
        printing.line(console, "ranges are smallest / middle / largest")
        printing.line(console)
        printing.table(console, ("class", "label", *splits), self._class_counts())
        printing.line(console)
        for note in self.notes:
            printing.paragraph(console, f"note: {note}", indent=2)
        self._show_defects(console)

    def _counts(self) -> list[tuple[str, ...]]:
        def row(title: str, value: Callable[[SplitReport], Any]) -> tuple[str, ...]:
            return title, *(str(value(split)) for split in self.splits)

        def size(name: str) -> tuple[str, ...]:
            return row(f"{name} boxes", lambda split: _share(split.box_sizes[name], split.boxes))

        return [
            row("images", lambda split: split.images),
            row("images without boxes", lambda split: split.without_boxes),
            row("images skipped", lambda split: split.skipped_images),
            row("boxes", lambda split: split.boxes),
            row("crowd boxes", lambda split: split.crowd),
            row("boxes skipped", lambda split: split.skipped_boxes),
            *map(size, ("small", "medium", "large")),
            row("boxes per image", lambda split: "{} / {:.1f} / {}".format(*split.boxes_per_image)),
            row("shorter side", lambda split: "{} / {} / {}".format(*split.shorter_side)),
            row("longer side", lambda split: "{} / {} / {}".format(*split.longer_side)),
            *self._image_sizes(),
        ]

    def _image_sizes(self) -> list[tuple[str, ...]]:
        """Table rows of the most frequent image sizes."""
        columns = [_most(split.image_sizes) for split in self.splits]
        rows = list(itertools.zip_longest(*columns, fillvalue=""))
        return [("" if index else "image sizes", *row) for index, row in enumerate(rows)]

    def _class_counts(self) -> list[tuple[str, ...]]:
        return [
            (name, str(label), *(_share(split.per_class[name], split.boxes) for split in self.splits))
            for label, name in enumerate(self.classes)
        ]

    def _show_defects(self, console: Console) -> None:
        checked = "every image decoded" if self.deep else "headers checked, images not decoded"
        for kind, found in self.by_kind().items():
            printing.line(console, Text(f"{kind}: {len(found)}", "bold"))
            for split, defect in found[:SHOWN_DEFECTS]:
                what = f"{defect.record}: {defect.message} (skipped: {defect.skipped})"
                if cell_len(whole := f"  {split}  {defect.file}  {what}") <= console.width:
                    printing.line(console, whole)
                else:
                    printing.labelled(console, f"  {split} ", defect.file)
                    printing.paragraph(console, what, first=" " * 6)
            if len(found) > SHOWN_DEFECTS:
                printing.line(console, f"  ... and {len(found) - SHOWN_DEFECTS} more")
        printing.line(console, f"{counted(len(self.defects), 'defect')} ({checked})")


def _share(count: int, total: int) -> str:
    return f"{count} ({100 * count / total:.1f} %)" if total else str(count)


def _most(sizes: dict[str, int]) -> list[str]:
    lines = [f"{size}: {count}" for size, count in list(sizes.items())[:SHOWN_SIZES]]
    return lines + ([f"... and {len(sizes) - SHOWN_SIZES} more"] if len(sizes) > SHOWN_SIZES else [])


def inspect_data(path: str | Path, *, strict: bool = False, deep: bool = False) -> DataReport:
    """Read a data set and count its images, boxes and defects.

    Args:
        path: as for ``load_data``.
        strict: raise an error on any defect.
        deep: also decode every image. This finds truncated files, images of one colour or of few levels, pictures that
            occur twice in a split, and those that are in both train and val under different names (listed as a note).
            Without it, some images of each split are decoded to judge the range of their values.

    Returns:
        The report. Data that training refuses are reported too, if their images, boxes and classes can be told; the last note
        says why training refuses them.

    Raises:
        DataError: as ``read_sets``; with ``strict``, as ``load_data``, and with ``deep`` also if an image cannot be decoded.
    """
    found, notes = read_sets(path, rescan=True)
    refusal = ""
    try:
        splits = usable(path, found, notes, strict=strict)
        sets, notes = splits.sets, list(splits.notes)
    except DataError as error:
        if strict:
            raise
        sets, refusal = tuple(found.values()), str(error)
    notes += findings(sets)
    defects: list[tuple[str, Defect]] = [(split.name, defect) for split in sets for defect in split.defects]
    if deep:
        seen = {split.name: _decode_all(split) for split in sets}
        broken = [(name, defect) for name, each in seen.items() for defect in each.broken]
        defects += broken + [(name, defect) for name, each in seen.items() for defect in each.odd]
        if strict and broken:
            split, defect = broken[0]
            raise DataError(
                f"{path}: {len(broken)} images cannot be decoded; the first: {split}: {defect.file}: {defect.message}"
            )
        copies = len(seen["train"].digests & seen["val"].digests) if {"train", "val"} <= set(seen) else 0
        if copies:
            notes.append(f"{copies} pictures of train are also in val, with identical bytes")
    else:
        notes += [note for split in sets for note in glance(split)]
    if refusal:
        notes.append(f"training refuses these data: {refusal}")
    return DataReport(
        path=str(path),
        form=sets[0].form,
        classes=sets[0].classes,
        splits=tuple(_count(split, [defect for name, defect in defects if name == split.name]) for split in sets),
        defects=tuple(defects),
        notes=tuple(notes),
        fingerprints={split.name: split.fingerprint for split in sets},
        deep=deep,
    )


def _count(data: DetectionSet, defects: list[Defect]) -> SplitReport:
    sides = np.array([sorted(record.size_hw) for record in data.records]).reshape(-1, 2)
    counts = np.array([len(record) for record in data.records], dtype=np.int64)
    areas = np.concatenate([np.zeros(0), *(record.areas for record in data.records)])
    labels = np.concatenate([np.zeros(0, dtype=np.int64), *(record.labels for record in data.records)])
    per_class = np.bincount(labels, minlength=len(data.classes))
    sizes = Counter("{1}x{0}".format(*record.size_hw) for record in data.records)
    small, large = int((areas < SMALL_AREA).sum()), int((areas > LARGE_AREA).sum())
    return SplitReport(
        name=data.name,
        images=len(data),
        boxes=data.num_boxes,
        crowd=sum(int(record.crowd.sum()) for record in data.records),
        without_boxes=int((counts == 0).sum()),
        image_sizes=dict(sizes.most_common()),
        shorter_side=_range(sides[:, 0]),
        longer_side=_range(sides[:, 1]),
        box_sizes={"small": small, "medium": len(areas) - small - large, "large": large},
        boxes_per_image=(int(counts.min()), float(counts.mean()), int(counts.max())) if len(counts) else (0, 0.0, 0),
        per_class={name: int(count) for name, count in zip(data.classes, per_class, strict=True)},
        skipped_images=sum(defect.skipped == "image" for defect in defects),
        skipped_boxes=sum(defect.skipped == "box" for defect in defects),
        skipped_masks=sum(defect.skipped == "mask" for defect in defects),
    )


def _range(values: np.ndarray) -> tuple[int, int, int]:
    return (int(values.min()), int(np.median(values)), int(values.max())) if len(values) else (0, 0, 0)


@dataclass(frozen=True)
class _Decoded:
    broken: list[Defect]
    """Images that cannot be decoded."""
    odd: list[Defect]
    """Images of one colour or few levels, and those that occur twice."""
    digests: set[str]
    """Hashes of all image files."""


def _decode_all(data: DetectionSet) -> _Decoded:
    broken: list[Defect] = []
    odd: list[Defect] = []
    digests: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        for record, (digest, found) in zip(data.records, pool.map(_decode, data.records), strict=True):
            digests.append(digest)
            if isinstance(found, str):
                file = relative(record.path, data.root)
                broken.append(Defect("unreadable image", file, f"image {record.id}", found, "nothing"))
            else:
                odd += picture_defects(record, data, found)
    return _Decoded(broken, [*odd, *same_pictures(data, digests)], set(digests))


def _decode(record: Record) -> tuple[str, Range | str]:
    """The file's sha256, and the range of its values or the reason why it cannot be decoded."""
    try:
        content = record.path.read_bytes()
    except OSError as error:
        return "", f"cannot be read: {error.strerror or error}"
    digest = hashlib.sha256(content).hexdigest()
    try:
        with Image.open(io.BytesIO(content)) as image:
            return digest, look(image)
    except FAULTS as error:
        return digest, f"cannot be decoded: {error}; training would stop at this image: repair or remove it"
