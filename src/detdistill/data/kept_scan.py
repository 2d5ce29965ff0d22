"""The records that were read of a data set, kept in the user's cache folder for the next start.

Before it is used, every file below the data's folders is listed anew: if a name, a size, a time of change or a version of the
software differs from what was listed when the data were read, the data are read again. Nothing is kept of data that refer to
files outside their folders, and of files that changed within the last seconds, whose times could repeat.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from detdistill.data.records import Defect, DetectionSet, Record, SplitName
from detdistill.files import write_atomically
from detdistill.kept import cache_directory, software

Sets = dict[SplitName, DetectionSet]

QUIET_SECONDS = 2.0
"""Files changed later than this before they were read may change again without another time: such data are not kept."""
SPARE_FILES = 10_000
"""Nothing is kept if the data's folders hold more than this many files besides four for each image."""
FIELDS = ("boxes_xyxy", "labels", "crowd", "areas")


def read_scan(path: Path) -> tuple[Sets, list[str]] | None:
    """The result that was kept for a path, if all files are as they were; None: nothing is kept, or something is different."""
    try:
        with np.load(_file(path), allow_pickle=False) as kept:
            about = json.loads(kept["about"].tobytes())
            if about["software"] != software() or about["state"] != _state(about["folders"], about["files"])[0]:
                return None
            return {name: _set(name, one, kept) for name, one in about["sets"].items()}, list(about["notes"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None


def keep_scan(path: Path, began: float, sets: Sets, notes: Sequence[str]) -> None:
    """Keep what was read.

    Args:
        path: the path that the user gave, absolute.
        began: time at which reading began, as ``time.time()``.
        sets: the splits.
        notes: the notes for the user.
    """
    folders = _folders(path, sets)
    images = sum(map(len, sets.values()))
    if not folders or not images:
        return
    most = 4 * images + SPARE_FILES
    with suppress(OSError, ValueError, TypeError, RuntimeError):
        state, latest = _state(folders, most)
        if latest > began - QUIET_SECONDS:
            return
        about = {
            "software": software(),
            "folders": folders,
            "files": most,
            "state": state,
            "notes": list(notes),
            "sets": {name: _about(data) for name, data in sets.items()},
        }
        arrays: dict[str, Any] = {"about": np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)}
        for name, data in sets.items():
            arrays |= {f"{name}/{key}": value for key, value in _arrays(data.records).items()}
        file = _file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda temporary: _save(temporary, arrays))


def _file(path: Path) -> Path:
    return cache_directory() / "scans" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.npz"


def _save(path: Path, arrays: dict[str, Any]) -> None:
    with path.open("wb") as file:  # given a name, numpy would add a suffix
        np.savez(file, **arrays)


def _folders(path: Path, sets: Sets) -> list[str]:
    """The folders that hold everything the data refer to; empty if they refer to other places."""
    folders = {os.fspath(path if path.is_dir() else path.parent), *(os.fspath(data.root) for data in sets.values())}
    roots = [folder for folder in sorted(folders) if not any(_below(folder, other) for other in folders)]
    for data in sets.values():
        if any(not any(_below(os.fspath(record.path), root) for root in roots) for record in data.records):
            return []
        if data.form == "yolo" and any(_points_elsewhere(file) for root in roots for file in Path(root).glob("*.y*ml")):
            return []
    return roots


def _below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep) and f"{os.sep}..{os.sep}" not in path


def _points_elsewhere(file: Path) -> bool:
    """Whether a ``data.yaml`` may name an absolute path or one that leaves its folder."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return any(mark in text for mark in ("..", ": /", "- /", '"/', "'/", "~", ":\\", ":/"))


def _state(folders: Sequence[str], most: int) -> tuple[str, float]:
    """A hash of the names, sizes and times of all files below folders, and the time of the latest change.

    Raises:
        ValueError: there are more than ``most`` files.
        OSError: a folder cannot be listed.
    """
    digest, latest, count = hashlib.sha256(), 0.0, 0
    todo, seen = list(reversed(folders)), set[tuple[int, int]]()
    while todo:
        folder = todo.pop()
        lines = []
        with os.scandir(folder) as entries:
            for entry in entries:
                count += 1
                try:
                    known = entry.stat()
                except OSError:  # a link to nothing
                    known = entry.stat(follow_symlinks=False)
                changed = max(known.st_mtime_ns, known.st_ctime_ns)
                latest = max(latest, changed / 1e9)
                if entry.is_dir():
                    place = (known.st_dev, known.st_ino)
                    if place not in seen:  # links can make circles
                        seen.add(place)
                        todo.append(entry.path)
                    lines.append(f"{entry.name}/")
                else:
                    lines.append(f"{entry.name}\0{known.st_size}\0{known.st_mtime_ns}\0{known.st_ctime_ns}\0{known.st_ino}")
        if count > most:
            raise ValueError(f"more than {most} files")
        lines.sort()
        digest.update("\n".join([folder, *lines, ""]).encode("utf-8", "surrogateescape"))
        todo.sort(reverse=True)
    return digest.hexdigest(), latest


def _about(data: DetectionSet) -> dict[str, Any]:
    root = os.path.join(data.root, "")
    return {
        "form": data.form,
        "root": os.fspath(data.root),
        "classes": data.classes,
        "defects": [asdict(defect) for defect in data.defects],
        "fingerprint": data.fingerprint,
        "paths": [os.fspath(record.path).removeprefix(root) for record in data.records],
        "segmentation": {
            index: record.segmentation for index, record in enumerate(data.records) if record.segmentation is not None
        },
        "scores": {index: record.scores.tolist() for index, record in enumerate(data.records) if record.scores is not None},
    }


def _arrays(records: Sequence[Record]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {
        "id": np.array([record.id for record in records], dtype=np.int64),
        "size_hw": np.array([record.size_hw for record in records], dtype=np.int64).reshape(-1, 2),
        "count": np.array([len(record) for record in records], dtype=np.int64),
    }
    for name in FIELDS:
        parts = [getattr(record, name) for record in records]
        arrays[name] = np.concatenate(parts) if parts else np.zeros(0)
    return arrays


def _set(name: SplitName, about: dict[str, Any], kept: Any) -> DetectionSet:
    arrays = {key: kept[f"{name}/{key}"] for key in ("id", "size_hw", "count", *FIELDS)}
    root, segmentation, scores = Path(about["root"]), about["segmentation"], about["scores"]
    ends = np.cumsum(arrays["count"]).tolist()
    boxes, labels, crowd, areas = (arrays[key] for key in FIELDS)
    rows = zip(arrays["id"].tolist(), about["paths"], arrays["size_hw"].tolist(), [0, *ends], ends, strict=False)
    records = []
    for index, (key, path, (height, width), first, end) in enumerate(rows):
        outlines, scored = segmentation.get(str(index)), scores.get(str(index))
        place = slice(first, end)
        records.append(
            Record(
                key,
                root / path,
                (height, width),
                boxes[place],
                labels[place],
                crowd[place],
                areas[place],
                None if outlines is None else tuple(outlines),
                None if scored is None else np.array(scored, dtype=np.float64),
            )
        )
    defects = tuple(Defect(**defect) for defect in about["defects"])
    return DetectionSet(name, about["form"], root, tuple(about["classes"]), tuple(records), defects, about["fingerprint"])
