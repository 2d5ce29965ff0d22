"""Save a student folder: the detector in the format of its own library, and ``student.json``, which describes it.

For torchvision's detectors and the models of this package the format is ``model.safetensors``, ``model.json`` and the script
``load_student.py``, which loads them without this package. ``README.md`` says what the folder holds and how to load it.
"""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from detdistill.detectors.contract import Detector
from detdistill.files import seal_folder, unseal_folder, write_atomically
from detdistill.structures import Resizing

PACKAGES = ("detdistill", "torch", "torchvision", "timm", "transformers", "safetensors")


def save_student(detector: Detector, folder: str | Path, resizing: Resizing | None = None) -> Path:
    """Write a detector into a student folder. Each file is replaced atomically; the last one holds the checksums of the others.

    Args:
        detector: the detector to save.
        folder: created if it does not exist.
        resizing: how images were resized in the detector's training; None: unknown, and the folder says nothing about it.

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
    }
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(folder / "student.json", lambda path: path.write_text(text, encoding="utf-8"))
    about = readme(detector, resizing)
    write_atomically(folder / "README.md", lambda path: path.write_text(about, encoding="utf-8"))
    seal_folder(folder)
    return folder


def readme(detector: Detector, resizing: Resizing | None) -> str:
    """Text of a student folder's ``README.md``: what it is, image size, classes, and how to load it."""
    spec = detector.spec
    parameters = detector.count_parameters()
    if resizing is None:
        size = "Unknown: resize images as in training before the detector sees them."
    else:
        limit = "" if resizing.max_size is None else f", max_size {resizing.max_size}"
        meaning = {
            "letterbox": "the longer side becomes this long; padded right and bottom to a square",
            "stretch": "both sides become this long",
            "short_side": "the shorter side becomes this long",
        }[resizing.resize]
        size = f"{resizing.size} pixels, {resizing.resize}{limit} ({meaning}); padded sides are multiples of 32."
    statistics = " and ".join(", ".join(f"{value:.4g}" for value in values) for values in (spec.mean, spec.std))
    # Names come from the data: quoted as JSON they stay on their line, and no text in them is read as Markdown.
    names = "\n".join(f"    {index} {json.dumps(name, ensure_ascii=False)}" for index, name in enumerate(spec.classes))
    return "\n\n".join(
        [
            "# A detector trained by detdistill",
            f"    {json.dumps(spec.name, ensure_ascii=False)}",
            f"{parameters:,} parameters, {len(spec.classes)} classes. `student.json` describes it for programs.",
            "## Images",
            f"{size} Pixels are RGB in 0..1, normalised by the model with mean and standard deviation {statistics}.",
            "## Use",
            detector.usage(resizing),
            "`detdistill eval --model FOLDER` and `detdistill predict --model FOLDER` take the folder too.",
            "## Classes",
            names + "\n",
        ]
    )


def installed_versions() -> dict[str, str]:
    """Versions of the installed packages that a detector's behaviour depends on, by name."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
