"""Load a data set from a path; its form (COCO, YOLO, VOC) is recognised from the files."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from detdistill.data.coco import read_coco
from detdistill.data.coco_files import find_coco
from detdistill.data.joined import VAL_ONLY, join, join_sets, parts_of
from detdistill.data.kept_scan import keep_scan, read_scan
from detdistill.data.other_forms import other_form
from detdistill.data.paths import outside
from detdistill.data.records import (
    BROKEN_FILE,
    MISSING_SPLIT,
    DataSplits,
    Defect,
    DetectionSet,
    SplitName,
    listed,
    split_of,
    split_off,
)
from detdistill.data.voc import find_voc, read_voc
from detdistill.data.yolo import find_yolo, read_yolo
from detdistill.data.yolo_names import find_names
from detdistill.errors import DataError, RunError, counted, nearest, subject

FORMS = (
    "COCO JSON (annotations/*.json, a subfolder's *.json, or the file itself), YOLO labels with a data.yaml or classes.txt, "
    "VOC XML (Annotations/*.xml, or beside the images)"
)


def load_data(path: str | Path, *, strict: bool = False, rescan: bool = False, held_out: float | None = None) -> DataSplits:
    """Read a data set of any known form.

    Args:
        path: a folder, a COCO JSON file, or a YOLO ``data.yaml``. The text ``digits`` (``digits:train=2000,val=400``) stands
            for the built-in data set. Several joined by ``+`` are one data set, see ``data.joined``; ``val=`` before one means
            that it is used for validation only.
        strict: raise an error on any defect instead of listing it.
        rescan: read every file, even if none has changed since the data were last read.
        held_out: share of the training images that become val instead of the val split, 0..1; see ``hold_out``.

    Returns:
        The splits. If there is no val split, a tenth of train becomes val: always the same images, and ``notes`` say so.

    Raises:
        DataError: the path does not exist, has no known form, holds broken files, or has no usable box to train on; with
            ``strict``, also any defect.
    """
    parts = parts_of(path)
    if len(parts) == 1:
        splits = usable(path, *read_sets(path, rescan=rescan), strict=strict)
    else:
        names = [part.removeprefix(VAL_ONLY) for part in parts]
        loaded = [load_data(name, strict=strict, rescan=rescan) for name in names]
        splits = join(str(path), loaded, [part.startswith(VAL_ONLY) for part in parts])
    return splits if held_out is None else hold_out(splits, held_out)


def hold_out(splits: DataSplits, share: float) -> DataSplits:
    """Validate on a part of the training images, which leaves train; the val split is not used, so it stays unseen.

    Args:
        splits: a data set.
        share: share of the training images, 0..1; the same images each time, see ``split_off``.

    Raises:
        DataError: fewer than two training images, or no usable box is left to train on.
    """
    train, val = split_off(splits.train, "val", share)
    if not any((~record.crowd).any() for record in train.records):
        raise DataError(
            f"{train.root}: no usable box in the {len(train)} training images left by held_out={share:g}; hold out fewer"
        )
    note = f"held out: {len(val)} of {len(splits.train)} training images are used as val instead of the val split"
    return DataSplits(train, val, splits.test, (*splits.notes, note))


def load_split(path: str | Path, split: SplitName, *, strict: bool = False) -> tuple[DetectionSet, list[str]]:
    """Read one split for evaluation; the others may be missing.

    A COCO file that is given itself is taken whole, whatever its name says, if no files of other splits lie beside it. The val
    split of a folder that has train only is the tenth of train that training uses as val.

    Args:
        path: as for ``load_data``.
        split: the split to read.
        strict: raise an error on any defect instead of listing it.

    Returns:
        The split, and notes for the user.

    Raises:
        DataError: as ``read_sets``; or no image of the split is usable; with ``strict``, also any defect.
        RunError: there is no such split.
    """
    parts = parts_of(path)
    if len(parts) > 1:
        loaded = [load_split(part.removeprefix(VAL_ONLY), split, strict=strict) for part in parts]
        classes = tuple(dict.fromkeys(name for data, _ in loaded for name in data.classes))
        return join_sets([data for data, _ in loaded], classes), [note for _, some in loaded for note in some]
    sets, notes = read_sets(path)
    if str(path).lower().endswith(".json") and len(sets) == 1:
        data = replace(next(iter(sets.values())), name=split)
        if split_of(Path(path).stem, Path(path).parent.name) not in ("val", "test"):
            notes.append(f"all {len(data)} images of {path} are used; a run that was trained on this file knows most of them")
    elif split == "val" and split not in sets and "train" in sets:
        _check_usable(sets["train"])
        splits = _complete(path, sets, notes)
        data, notes = splits.val, list(splits.notes)
    elif split in sets:
        data = sets[split]
    else:
        why = "".join(f"; {note}" for note in notes if f"no {split} split" in note)
        raise RunError(f"no split {split!r} in {path}; there are {listed(sets)}{why}")
    _check_usable(data)
    if strict and data.defects:
        raise DataError(f"{path}: {counted(len(data.defects), 'defect')}{_first(data.defects)}")
    return data, notes


def usable(path: str | Path, sets: dict[SplitName, DetectionSet], notes: Sequence[str], *, strict: bool = False) -> DataSplits:
    """The splits for training, if the sets that ``read_sets`` found allow it.

    Raises:
        DataError: as ``load_data``.
    """
    for data in sets.values():
        _check_usable(data)
    splits = _complete(path, sets, list(notes))
    if not any((~record.crowd).any() for record in splits.train.records):
        raise DataError(
            f"{path}: no usable box in the {len(splits.train)} training images ({counted(len(splits.train.defects), 'defect')}); "
            f"there is nothing to learn from{_first(splits.train.defects)}"
        )
    if strict and splits.defects:
        raise DataError(f"{path}: {counted(len(splits.defects), 'defect')}{_first(splits.defects)}")
    return splits


def _first(defects: Sequence[Defect]) -> str:
    """The first three defects, for the end of a sentence."""
    shown = "; ".join(f"{defect.file}, {defect.record}: {defect.kind}: {defect.message}" for defect in defects[:3])
    return f"; the first: {shown}" if defects else ""


def _check_usable(data: DetectionSet) -> None:
    """Refuse a split without images, and one with a broken annotation file: nobody knows what it would have held."""
    for defect in data.defects:
        if defect.kind == BROKEN_FILE:
            raise DataError(f"{data.root / defect.file}: {defect.message}; fix the file or remove it and its image")
        if defect.kind == MISSING_SPLIT:
            raise DataError(f"{data.root / defect.file}: {defect.record}: {defect.message}")
    if not data.records:
        count = sum(defect.skipped == "image" for defect in data.defects)
        first = next(iter(data.defects), None)
        reason = f": {first.file}: {first.message}" if first else ""
        raise DataError(f"{data.root}: none of the {count} images of the {data.name} split is usable{reason}")


def read_sets(path: str | Path, *, rescan: bool = False) -> tuple[dict[SplitName, DetectionSet], list[str]]:
    """Read whatever splits there are, also those that cannot be used, e.g. without any box.

    Args:
        path: as for ``load_data``.
        rescan: as for ``load_data``.

    Returns:
        The sets by split, and notes for the user.

    Raises:
        DataError: the path does not exist or has no known form, or the files do not tell what is an image, a box or a class.
    """
    if isinstance(path, str) and (path == "digits" or path.startswith("digits:")):
        path = _digits(path)
    folder = Path(path).expanduser()
    if not folder.exists():
        there = [item.name for item in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise DataError(f"{folder}: there is no such file or folder{nearest(folder.name, there)}")
    folder, began = folder.absolute(), time.time()
    if not rescan and (kept := read_scan(folder)) is not None:
        return kept
    sets, notes = _read(folder)
    for name, data in sets.items():
        if away := outside([record.path for record in data.records], data.root):
            images = subject(len(away), "image", "lie")
            notes.append(f"{name}: {images} outside the data's folder, e.g. {os.path.realpath(away[0])}")
    keep_scan(folder, began, sets, notes)
    return sets, notes


def _read(path: Path) -> tuple[dict[SplitName, DetectionSet], list[str]]:
    """Read with the form that recognises the path; if none does and there is a single subfolder, try that subfolder."""
    start = path
    for _ in range(3):
        yolo, coco, voc = find_yolo(path), find_coco(path), find_voc(path)
        forms = [form for form in (yolo, coco[0] if coco else None, voc) if form is not None]
        if len(forms) > 1:
            raise DataError(f"{path}: the data exist in {len(forms)} forms; pass the path of one: {listed(map(str, forms))}")
        if yolo is not None:
            return read_yolo(yolo)
        if coco:
            return read_coco(path, coco)
        if voc is not None:
            return read_voc(voc)
        if (names := find_names(path)) is not None:
            return read_yolo(names)
        inside = (
            [item for item in path.iterdir() if item.is_dir() and not item.name.startswith((".", "__"))] if path.is_dir() else []
        )
        if len(inside) != 1:
            break
        path = inside[0]
    if other := other_form(start):
        raise DataError(f"{start}: {other}")
    if start.is_file():
        raise DataError(f"{start}: neither a COCO JSON file nor a YOLO data.yaml; looked for {FORMS}")
    found = listed(sorted(item.name + ("/" if item.is_dir() else "") for item in start.iterdir())) or "nothing"
    raise DataError(f"{start}: no data set of a known form; looked for {FORMS}; found {found}")


def _complete(folder: str | Path, sets: dict[SplitName, DetectionSet], notes: list[str]) -> DataSplits:
    """The splits with train and val; if there is no val, it is split off train.

    Raises:
        DataError: there is no train, or it is too small to be split.
    """
    if "train" not in sets:
        raise DataError(f"{folder}: no train split, only {listed(sets)}; add a train split")
    train, val, test = sets["train"], sets.get("val"), sets.get("test")
    if val is None:
        train, val = split_off(train, "val")
        share = f"{len(val)} of {len(train) + len(val)} training images"
        notes.append(f"no val split: {share}, chosen by the hash of their names, are used as val")
    both = {record.path for record in train.records} & {record.path for record in val.records}
    if both:
        images = subject(len(both), "image", "are")
        notes.append(f"{images} in both train and val, so scores on val do not show performance on new images")
    return DataSplits(train, val, test, tuple(notes))


def _digits(text: str) -> Path:
    """Folder of the built-in data set, generated on first use."""
    from detdistill.data.digits import digits_folder

    known = ("train", "val", "size", "seed", "classes")
    options: dict[str, Any] = {}
    for part in filter(None, text.partition(":")[2].split(",")):
        name, _, value = part.partition("=")
        numbers = value.split("/") if name == "classes" else [value]
        if name not in known or not all(number.isascii() and number.isdigit() for number in numbers):
            raise DataError(
                f"{text}: {part!r} is not a setting{nearest(name, known)}; write digits:train=2000,val=400,size=128,seed=0 or "
                "digits:classes=0/1/2"
            )
        options[name] = tuple(map(int, numbers)) if name == "classes" else int(value)
    return digits_folder(**options)
