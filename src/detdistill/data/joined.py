"""Data sets with classes of their own as one: ``helmets+vests``, ``new+val=old``.

Classes are joined by name. An image of a data set that lacks some of them is labelled for its own classes only
(``Record.labelled``): nobody has looked for objects of the others in it. Training may let a teacher find them (``--unlabelled``),
and evaluation counts no detection of a class in an image that is not labelled for it, as in LVIS's federated evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from detdistill.data.records import DataSplits, DetectionSet, Record
from detdistill.errors import DataError

VAL_ONLY = "val="
"""What a part begins with of which only the val (and test) split is used."""

OFFSET = 10**9
"""Ids that two parts share differ by a multiple of this in the joined set."""


def parts_of(path: str | Path) -> tuple[str, ...]:
    """The parts of a text such as ``helmets+vests``; one part if there is no ``+``, or if a file or folder has this name."""
    text = str(path)
    if "+" not in text or Path(text).expanduser().exists():
        return (text,)
    return tuple(part.strip() for part in text.split("+"))


def join(text: str, parts: Sequence[DataSplits], val_only: Sequence[bool]) -> DataSplits:
    """Join data sets by the names of their classes.

    Args:
        text: the text that names them, for messages.
        parts: the data sets.
        val_only: for each, whether it gives no training images.

    Raises:
        DataError: no part gives training images.
    """
    if all(val_only):
        raise DataError(f"{text}: no part gives training images; write one without {VAL_ONLY}")
    classes = tuple(dict.fromkeys(name for part in parts for name in part.classes))
    train = join_sets([part.train for part, only in zip(parts, val_only, strict=True) if not only], classes)
    val = join_sets([part.val for part in parts], classes)
    tests = [part.test for part in parts if part.test is not None]
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    some = sum(record.labelled is not None for record in train.records)
    if some:
        notes[f"{some} of {len(train)} training images are labelled for some of the {len(classes)} classes only"] = None
    return DataSplits(train, val, join_sets(tests, classes) if tests else None, tuple(notes))


def join_sets(sets: Sequence[DetectionSet], classes: Sequence[str]) -> DetectionSet:
    """Join splits of several data sets: labels of ``classes``, and ids that are unique over all of them.

    Images of a set that lacks some of ``classes`` are marked as labelled for its own.
    """
    records: list[Record] = []
    taken: set[int] = set()
    for data in sets:
        label = np.array([classes.index(name) for name in data.classes], dtype=np.int64)
        for record in data.records:
            own = range(len(data.classes)) if record.labelled is None else record.labelled
            names = tuple(sorted(int(label[one]) for one in own))
            records.append(
                replace(
                    record,
                    id=_free(record.id, taken),
                    labels=label[record.labels],
                    labelled=None if len(names) == len(classes) else names,
                )
            )
    first = sets[0]
    defects = [defect for data in sets for defect in data.defects]
    return DetectionSet.of(first.name, first.form, first.root, classes, records, defects)


def _free(wanted: int, taken: set[int]) -> int:
    """The id, or if another image has it, one that is larger by multiples of ``OFFSET``; noted in ``taken``."""
    free = wanted
    while free in taken:
        free += OFFSET
    taken.add(free)
    return free


def only_classes(data: DetectionSet, names: Sequence[str]) -> DetectionSet:
    """The part of a set that says something of some of its classes: images labelled for one of them, with their boxes only.

    Args:
        data: the set.
        names: class names, all of the set's.
    """
    kept = [data.classes.index(name) for name in names]
    label = np.full(len(data.classes), -1, dtype=np.int64)
    label[kept] = np.arange(len(kept))
    records = []
    for record in data.records:
        labelled = tuple(sorted(int(label[one]) for one in record.labelled or () if label[one] >= 0))
        if record.labelled is not None and not labelled:
            continue
        chosen = label[record.labels] >= 0
        records.append(
            replace(
                record,
                boxes_xyxy=record.boxes_xyxy[chosen],
                labels=label[record.labels[chosen]],
                crowd=record.crowd[chosen],
                areas=record.areas[chosen],
                segmentation=None
                if record.segmentation is None
                else tuple(one for one, keep in zip(record.segmentation, chosen, strict=True) if keep),
                scores=None if record.scores is None else record.scores[chosen],
                labelled=None if record.labelled is None or len(labelled) == len(kept) else labelled,
            )
        )
    return DetectionSet.of(data.name, data.form, data.root, tuple(names), records)
