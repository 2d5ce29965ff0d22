"""Oddities of data in which no record is wrong: classes, names and pictures that make training fail silently."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from detdistill.data.pixels import Range, look_at, some
from detdistill.data.records import Defect, DetectionSet, Record, listed, relative

IGNORE_WORDS = frozenset(
    ("dontcare", "donotcare", "void", "unlabeled", "unlabelled", "crowd", "group", "groupof", "isgroupof", "background")
)
"""Names, in lower case and letters only, of regions that converters turn into objects (KITTI, VisDrone, Open Images)."""


def findings(sets: Sequence[DetectionSet]) -> Iterator[str]:
    """Notes about all splits that need no image.

    Args:
        sets: the splits, train first.
    """
    counts = {data.name: _per_class(data) for data in sets}
    classes = sets[0].classes
    train = counts.get("train")
    if train is not None and train.sum():
        for name, own in counts.items():
            unseen = [f"{classes[label]} ({own[label]})" for label in np.flatnonzero((train == 0) & (own > 0))]
            if unseen:
                yield f"{name} has boxes of classes that train has none of: {listed(unseen)}"
    marks = [name for name in classes if means_ignore(name)]
    if marks:
        yield (
            f"classes whose names mean regions to ignore, not objects: {listed(marks)}; in COCO mark their boxes with "
            "iscrowd or ignore: 1, else they are learnt like objects"
        )


def means_ignore(name: str) -> bool:
    """True if a class is called like a region without single objects: ``DontCare``, ``ignored regions``, ``group``."""
    letters = re.sub("[^a-z]", "", name.lower())
    return letters.startswith("ignore") or letters in IGNORE_WORDS


def _per_class(data: DetectionSet) -> np.ndarray:
    labels = [record.labels for record in data.records]
    return np.bincount(np.concatenate(labels) if labels else np.zeros(0, dtype=np.int64), minlength=len(data.classes))


def glance(data: DetectionSet) -> Iterator[str]:
    """Notes about the pictures of a split, judged by some of them."""
    seen = [(record, found) for record in some(data.records) if (found := look_at(record.path)) is not None]
    flat = [record for record, found in seen if found.colour is not None]
    narrow = [record for record, found in seen if found.narrow and found.colour is None and found.deep is None]
    for kind, records in (("are of one colour", flat), ("use few of the 256 levels", narrow)):
        if records:
            example = relative(records[0].path, data.root)
            yield f"{data.name}: {len(records)} of {len(seen)} images looked at {kind}, e.g. {example}; --deep true lists all"


def picture_defects(record: Record, data: DetectionSet, found: Range) -> Iterator[Defect]:
    """Defects of a decoded picture: one colour, or few levels."""
    file, name = relative(record.path, data.root), f"image {record.id}"
    if found.colour is not None:
        yield Defect("one colour", file, name, f"every pixel is red, green, blue = {found.colour}", "nothing")
    elif found.narrow:
        message = f"its values go from {found.low} to {found.high}: {found.high - found.low + 1} of 256 levels"
        yield Defect("few levels", file, name, message, "nothing")


def same_pictures(data: DetectionSet, digests: Iterable[str]) -> Iterator[Defect]:
    """Defects of images of a split that have the same bytes under two names."""
    first: dict[str, Record] = {}
    for record, digest in zip(data.records, digests, strict=True):
        other = first.setdefault(digest, record)
        if other is not record:
            message = f"the same bytes as {relative(other.path, data.root)} (image {other.id})"
            yield Defect("same picture", relative(record.path, data.root), f"image {record.id}", message, "nothing")
