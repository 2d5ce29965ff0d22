"""A student's folder: the detector in its own library's form, and ``student.json``, which says what it is.

For torchvision's detectors and ours the form is ``model.safetensors``, ``model.json`` and the script ``load_student.py``,
which needs no other file of ours.
"""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from detdistill.detectors.contract import Detector
from detdistill.files import write_atomically

PACKAGES = ("detdistill", "torch", "torchvision", "timm", "transformers", "safetensors")


def save_student(detector: Detector, folder: str | Path) -> Path:
    """Write a detector's folder (made if need be); files are replaced one by one, each whole.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    detector.export(folder)
    content = {
        "name": detector.spec.name,
        "adapter": type(detector).__module__.rsplit(".", 1)[-1],
        "classes": list(detector.spec.classes),
        "spec": dataclasses.asdict(detector.spec),
        "versions": installed_versions(),
    }
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(folder / "student.json", lambda path: path.write_text(text, encoding="utf-8"))
    return folder


def installed_versions() -> dict[str, str]:
    """Versions of the packages that a detector's behaviour hangs on, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
