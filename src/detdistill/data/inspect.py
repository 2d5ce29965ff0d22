"""What is in a data set and what is wrong with it, for people (tables) and programs (JSON)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from detdistill.data.discover import load_data
from detdistill.data.records import DataSplits, Defect, DetectionSet, Record, relative
from detdistill.errors import DataError

SMALL_AREA, LARGE_AREA = 32.0**2, 96.0**2
"""COCO's limits of small and large objects, square pixels of the original image."""
SHOWN_DEFECTS = 20
SHOWN_SIZES = 5


@dataclass(frozen=True)
class SplitReport:
    """Counts of one split; sizes in pixels of the originals."""

    name: str
    images: int
    boxes: int
    """Crowd boxes included."""
    crowd: int
    without_boxes: int
    """Images that have none."""
    image_sizes: dict[str, int]
    """``width x height`` -> images, most frequent first."""
    shorter_side: tuple[int, int, int]
    """Smallest, median, largest."""
    longer_side: tuple[int, int, int]
    box_sizes: dict[str, int]
    """COCO's small (area below 32x32), medium, large (above 96x96)."""
    boxes_per_image: tuple[int, float, int]
    """Smallest, mean, largest."""
    per_class: dict[str, int]
    """Boxes of each class, in the order of the labels."""
    skipped_images: int
    skipped_boxes: int


@dataclass(frozen=True)
class DataReport:
    """A data set as ``inspect_data`` saw it."""

    path: str
    form: str
    classes: tuple[str, ...]
    splits: tuple[SplitReport, ...]
    defects: tuple[tuple[str, Defect], ...]
    """Name of the split, and the defect."""
    notes: tuple[str, ...]
    fingerprints: dict[str, str]
    """By split."""
    deep: bool
    """Every image was decoded."""

    def to_json(self) -> str:
        """All of it, with every defect under its kind."""
        content: dict[str, Any] = asdict(replace(self, defects=()))
        content["defects"] = {
            kind: [{"split": split, **asdict(defect)} for split, defect in found] for kind, found in self.by_kind().items()
        }
        return json.dumps(content, indent=2)

    def by_kind(self) -> dict[str, list[tuple[str, Defect]]]:
        """Defects grouped, the most frequent kind first."""
        groups: dict[str, list[tuple[str, Defect]]] = defaultdict(list)
        for split, defect in self.defects:
            groups[defect.kind].append((split, defect))
        return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))

    def render(self, console: Console) -> None:
        """Print tables: the splits, the classes, the first defects of each kind."""
        console.print(f"{escape(self.path)}: {self.form.upper()}, {len(self.classes)} classes")
        console.print(self._split_table())
        console.print(self._class_table())
        for note in self.notes:
            console.print(f"note: {escape(note)}")
        checked = "every image decoded" if self.deep else "headers checked, images not decoded"
        if not self.defects:
            console.print(f"no defects ({checked})")
        for kind, found in self.by_kind().items():
            console.print(f"[bold]{escape(kind)}: {len(found)}[/bold]")
            for split, defect in found[:SHOWN_DEFECTS]:  # whole lines: a file's name must never be cut short
                line = f"  {split}  {defect.file}  {defect.record}: {defect.message} (skipped: {defect.skipped})"
                console.print(escape(line), soft_wrap=True, highlight=False)
            if len(found) > SHOWN_DEFECTS:
                console.print(f"... and {len(found) - SHOWN_DEFECTS} more")
        if self.defects:
            console.print(f"{len(self.defects)} defects ({checked})")

    def _split_table(self) -> Table:
        table = Table("", *(split.name for split in self.splits))

        def row(title: str, values: Sequence[Any]) -> None:
            table.add_row(title, *map(str, values))

        row("images", [split.images for split in self.splits])
        row("images without boxes", [split.without_boxes for split in self.splits])
        row("images skipped", [split.skipped_images for split in self.splits])
        row("boxes", [split.boxes for split in self.splits])
        row("crowd boxes", [split.crowd for split in self.splits])
        row("boxes skipped", [split.skipped_boxes for split in self.splits])
        for size in ("small", "medium", "large"):
            row(f"{size} boxes", [_share(split.box_sizes[size], split.boxes) for split in self.splits])
        row("boxes per image", ["{} / {:.1f} / {}".format(*split.boxes_per_image) for split in self.splits])
        row("shorter side", ["{} / {} / {}".format(*split.shorter_side) for split in self.splits])
        row("longer side", ["{} / {} / {}".format(*split.longer_side) for split in self.splits])
        row("image sizes", [_most(split.image_sizes) for split in self.splits])
        table.caption = "ranges are smallest / middle / largest"
        return table

    def _class_table(self) -> Table:
        table = Table("label", "class", *(split.name for split in self.splits))
        for label, name in enumerate(self.classes):
            table.add_row(str(label), escape(name), *(_share(split.per_class[name], split.boxes) for split in self.splits))
        return table


def _share(count: int, total: int) -> str:
    return f"{count} ({100 * count / total:.1f} %)" if total else str(count)


def _most(sizes: dict[str, int]) -> str:
    lines = [f"{size}: {count}" for size, count in list(sizes.items())[:SHOWN_SIZES]]
    return "\n".join(lines + ([f"... and {len(sizes) - SHOWN_SIZES} more"] if len(sizes) > SHOWN_SIZES else []))


def inspect_data(path: str | Path, *, strict: bool = False, deep: bool = False) -> DataReport:
    """Read a data set and count what is in it.

    Args:
        path: as for ``load_data``.
        strict: raise on any defect.
        deep: also decode every image, which finds files that are cut off, and pictures that are in train and val under
            two names (a note).

    Raises:
        DataError: as ``load_data``.
    """
    data = load_data(path, strict=strict)
    defects: list[tuple[str, Defect]] = [(split.name, defect) for split in data.sets for defect in split.defects]
    notes = list(data.notes)
    if deep:
        broken, hashes = _decode_all(data)
        defects += broken
        if strict and broken:
            split, defect = broken[0]
            raise DataError(
                f"{path}: {len(broken)} images cannot be decoded; the first: {split}: {defect.file}: {defect.message}"
            )
        copies = len(hashes["train"] & hashes["val"])
        if copies:
            notes.append(f"{copies} pictures of train are, byte by byte, in val too")
    return DataReport(
        path=str(path),
        form=data.train.form,
        classes=data.classes,
        splits=tuple(_count(split, [defect for name, defect in defects if name == split.name]) for split in data.sets),
        defects=tuple(defects),
        notes=tuple(notes),
        fingerprints={split.name: split.fingerprint for split in data.sets},
        deep=deep,
    )


def _count(data: DetectionSet, defects: list[Defect]) -> SplitReport:
    sides = np.array([sorted(record.size_hw) for record in data.records])
    counts = np.array([len(record) for record in data.records])
    areas = np.concatenate([record.areas for record in data.records])
    labels = np.concatenate([record.labels for record in data.records])
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
        boxes_per_image=(int(counts.min()), float(counts.mean()), int(counts.max())),
        per_class={name: int(count) for name, count in zip(data.classes, per_class, strict=True)},
        skipped_images=sum(defect.skipped == "image" for defect in defects),
        skipped_boxes=sum(defect.skipped == "box" for defect in defects),
    )


def _range(values: np.ndarray) -> tuple[int, int, int]:
    return int(values.min()), int(np.median(values)), int(values.max())


def _decode_all(data: DataSplits) -> tuple[list[tuple[str, Defect]], dict[str, set[str]]]:
    """Defects of images that do not decode, and the hashes of all files by split."""
    broken: list[tuple[str, Defect]] = []
    hashes: dict[str, set[str]] = {}
    with ThreadPoolExecutor(4) as pool:
        for split in data.sets:
            hashes[split.name] = set()
            for record, (digest, problem) in zip(split.records, pool.map(_decode, split.records), strict=True):
                hashes[split.name].add(digest)
                if problem:
                    file = relative(record.path, split.root)
                    broken.append((split.name, Defect("unreadable image", file, f"image {record.id}", problem, "nothing")))
    return broken, hashes


def _decode(record: Record) -> tuple[str, str]:
    """The file's hash, and why it does not decode."""
    digest = hashlib.sha256(record.path.read_bytes()).hexdigest()
    try:
        with Image.open(record.path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return digest, f"does not decode: {error}; training would stop at it: mend or remove it"
    return digest, ""
