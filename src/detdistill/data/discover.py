"""Load a data set from a path; its form (COCO, YOLO, VOC) is recognised from the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detdistill.data.coco import find_coco, read_coco
from detdistill.data.records import DataSplits, DetectionSet, SplitName, listed, split_off
from detdistill.data.voc import find_voc, read_voc
from detdistill.data.yolo import find_yolo, read_yolo
from detdistill.errors import DataError, nearest

FORMS = (
    "COCO JSON (annotations/*.json, a subfolder's *.json, or the file itself), a YOLO data.yaml with names and train, "
    "VOC XML (Annotations/*.xml, or beside the images)"
)


def load_data(path: str | Path, *, strict: bool = False) -> DataSplits:
    """Read a data set of any known form.

    Args:
        path: a folder, a COCO JSON file, or a YOLO ``data.yaml``. The text ``digits`` (``digits:train=2000,val=400``) stands
            for the built-in data set.
        strict: raise an error on any defect instead of listing it.

    Returns:
        The splits. If there is no val split, a tenth of train becomes val: always the same images, and ``notes`` say so.

    Raises:
        DataError: the path does not exist, has no known form, holds broken files, or has no usable box to train on; with
            ``strict``, also any defect.
    """
    if isinstance(path, str) and (path == "digits" or path.startswith("digits:")):
        path = _digits(path)
    folder = Path(path).expanduser()
    if not folder.exists():
        there = [item.name for item in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise DataError(f"{folder}: there is no such file or folder{nearest(folder.name, there)}")
    sets, notes = _read(folder.absolute())
    splits = _complete(folder, sets, notes)
    if not any((~record.crowd).any() for record in splits.train.records):
        raise DataError(
            f"{folder}: no usable box in the {len(splits.train)} training images ({len(splits.train.defects)} defects); "
            "there is nothing to learn from"
        )
    if strict and splits.defects:
        first = "; ".join(f"{d.file}, {d.record}: {d.kind}: {d.message}" for d in splits.defects[:3])
        raise DataError(f"{folder}: {len(splits.defects)} defects; the first: {first}")
    return splits


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
        inside = (
            [item for item in path.iterdir() if item.is_dir() and not item.name.startswith((".", "__"))] if path.is_dir() else []
        )
        if len(inside) != 1:
            break
        path = inside[0]
    if start.is_file():
        raise DataError(f"{start}: neither a COCO JSON file nor a YOLO data.yaml; looked for {FORMS}")
    found = listed(sorted(item.name + ("/" if item.is_dir() else "") for item in start.iterdir())) or "nothing"
    raise DataError(f"{start}: no data set of a known form; looked for {FORMS}; found {found}")


def _complete(folder: Path, sets: dict[SplitName, DetectionSet], notes: list[str]) -> DataSplits:
    """The splits with train and val; if there is no val, it is split off train."""
    if "train" not in sets:
        raise DataError(f"{folder}: no train split, only {listed(sets)}; add a train split")
    train, val, test = sets["train"], sets.get("val"), sets.get("test")
    if val is None:
        train, val = split_off(train, "val")
        share = f"{len(val)} of {len(train) + len(val)} training images"
        notes.append(f"no val split: {share}, chosen by the hash of their names, are used as val")
    both = {record.path for record in train.records} & {record.path for record in val.records}
    if both:
        notes.append(f"{len(both)} images are in both train and val, so scores on val do not show performance on new images")
    return DataSplits(train, val, test, tuple(notes))


def _digits(text: str) -> Path:
    """Folder of the built-in data set, generated on first use."""
    from detdistill.data.digits import digits_folder

    known = ("train", "val", "size", "seed")
    options: dict[str, Any] = {}
    for part in filter(None, text.partition(":")[2].split(",")):
        name, _, value = part.partition("=")
        if name not in known or not value.isascii() or not value.isdigit():
            raise DataError(
                f"{text}: {part!r} is not a setting{nearest(name, known)}; write digits:train=2000,val=400,size=128,seed=0"
            )
        options[name] = int(value)
    return digits_folder(**options)
