"""An exported file in place of the run that it was made of: role, method and seed from its metadata, scores of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detdistill.card import Origin
from detdistill.errors import RunError
from detdistill.export.proof import Stage
from detdistill.export.run import NOTES, read_notes
from detdistill.export.runtimes import open_file
from detdistill.files import checksum


@dataclass(frozen=True)
class Measured:
    """Scores of a file."""

    metrics: Mapping[str, float]
    """The 12 COCO numbers."""
    val_fingerprint: str
    """Fingerprint of the images."""


def read_file_run(path: Path, measured: Measured | None = None) -> dict[str, Any]:
    """Read an exported file as ``compare.read_run`` reads a run folder; ``form`` says what it is, ``folder`` is its path.

    Args:
        path: the file.
        measured: its scores; None: those in ``export.json`` beside it.

    Raises:
        RunError: the file does not say of which run it was made, or its scores are not known.
        ModelError: the file cannot be opened.
    """
    about, _ = open_file(path)
    origin = Origin.from_plain(about.origin)
    if origin is None:
        raise RunError(f"{path} does not say of which run it was made; export the run folder again")
    known = measured or _noted(path)
    return {
        **origin.run,
        "metrics": dict(known.metrics),
        "data": {**origin.run["data"], "val_fingerprint": known.val_fingerprint},
        # A file made for other images than those of its run is compared as such.
        "config": {**origin.run["config"], "size": about.size, "resize": about.resize, "max_size": about.max_size},
        "folder": path,
        "form": f"{about.format} int8" if about.int8 else about.format,
    }


def _noted(path: Path) -> Measured:
    """The scores of a file in ``export.json`` beside it.

    Raises:
        RunError: there are none, or they are those of another file.
    """
    measure = "give --data to measure it"
    for entry in read_notes(path.parent / NOTES).values():
        for stage in map(Stage.from_plain, entry["stages"]):
            if stage.file != path.name:
                continue
            if stage.checksum != checksum(path):
                raise RunError(f"{path} is not the file that {NOTES} beside it tells of; {measure}")
            if stage.metrics is None or not entry.get("data"):
                raise RunError(f"{path}: it was exported without --data, so its AP is not known; {measure}")
            return Measured(stage.metrics, entry["data"]["val_fingerprint"])
    raise RunError(f"{path}: no {NOTES} beside it tells its AP; {measure}")
