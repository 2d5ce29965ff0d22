"""Save a student folder: the detector in the format of its own library, and ``student.json``, which describes it.

For torchvision's detectors and the models of this package the format is ``model.safetensors``, ``model.json`` and the script
``load_student.py``, which loads them without this package. ``README.md`` is its card, see ``detdistill.card``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from detdistill.card import Card, Origin, replaced
from detdistill.detectors.contract import Detector
from detdistill.files import seal_folder, unseal_folder, write_atomically
from detdistill.structures import Resizing

PACKAGES = ("detdistill", "torch", "torchvision", "timm", "transformers", "safetensors")


def save_student(detector: Detector, folder: str | Path, resizing: Resizing | None = None, origin: Origin | None = None) -> Path:
    """Write a detector into a student folder. Each file is replaced atomically; the last one holds the checksums of the others.

    Args:
        detector: the detector to save.
        folder: created if it does not exist.
        resizing: how images were resized in the detector's training; None: unknown, and the folder says nothing about it.
        origin: the run that trained the detector; None: unknown.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unseal_folder(folder)
    detector.export(folder, resizing)
    content = {
        "name": detector.spec.name,
        "adapter": type(detector).__module__.rsplit(".", 1)[-1],
        "classes": list(detector.spec.classes),
        "images": None if resizing is None else resizing.plain(),
        "spec": dataclasses.asdict(detector.spec),
        "versions": installed_versions(),
        "origin": None if origin is None else origin.to_plain(),
    }
    _write_text(folder / "student.json", json.dumps(content, indent=2) + "\n")
    _write_text(folder / "README.md", student_card(detector, resizing, origin).text())
    seal_folder(folder)
    return folder


def revise_origin(folder: Path, **changes: Any) -> None:
    """Change fields of the ``Origin`` of a saved student, in ``student.json`` and in its card.

    Folders of earlier versions, which have no origin, stay as they are.

    Raises:
        OSError: a file cannot be written.
    """
    content = json.loads((folder / "student.json").read_text(encoding="utf-8"))
    origin = Origin.from_plain(content.get("origin"))
    if origin is None:
        return
    origin = dataclasses.replace(origin, **changes)
    card = (folder / "README.md").read_text(encoding="utf-8")
    unseal_folder(folder)
    _write_text(folder / "student.json", json.dumps({**content, "origin": origin.to_plain()}, indent=2) + "\n")
    _write_text(folder / "README.md", replaced(card, origin))
    seal_folder(folder)


def student_card(detector: Detector, resizing: Resizing | None, origin: Origin | None) -> Card:
    """The card of a student folder."""
    spec = detector.spec
    parameters = detector.count_parameters()
    if resizing is None:
        size = "Unknown: resize images as in training before the detector sees them."
    else:
        size = f"{in_words(resizing)}; padded sides are multiples of 32."
    statistics = " and ".join(", ".join(f"{value:.4g}" for value in values) for values in (spec.mean, spec.std))
    return Card(
        library=detector.library,
        name=spec.name,
        about=f"{parameters:,} parameters, {len(spec.classes)} classes. `student.json` describes the detector for programs.",
        images=f"{size} Pixels are RGB in 0..1, normalised by the model with mean and standard deviation {statistics}.",
        classes=spec.classes,
        use=(
            f"With detdistill (`detdistill eval` and `predict` take the folder as `--model`, too):\n\n{USE}",
            "Without it:",
            detector.usage(resizing),
        ),
        origin=origin,
    )


USE = """```python
import detdistill

found = detdistill.detect("path/to/this/folder", "image.jpg")
print(found.names, found.scores, found.boxes_xyxy)
```"""
"""How to load a student folder with this package."""


def in_words(resizing: Resizing) -> str:
    """Size and resizing of images, explained."""
    limit = "" if resizing.max_size is None else f", max_size {resizing.max_size}"
    meaning = {
        "letterbox": "the longer side becomes this long; padded right and bottom to a square",
        "stretch": "both sides become this long",
        "short_side": "the shorter side becomes this long",
    }[resizing.resize]
    return f"{resizing.size} pixels, {resizing.resize}{limit} ({meaning})"


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@functools.cache
def installed_versions() -> dict[str, str]:
    """Versions of the installed packages that a detector's behaviour depends on, by name; read once in a process."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
