"""Save a student folder: the detector in the format of its own library, and ``student.json``, which describes it.

For torchvision's detectors and the models of this package the format is ``model.safetensors``, ``model.json`` and the script
``load_student.py``, which loads them without this package.
"""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from detdistill.detectors.contract import Detector
from detdistill.files import seal_folder, unseal_folder, write_atomically

PACKAGES = ("detdistill", "torch", "torchvision", "timm", "transformers", "safetensors")


def save_student(detector: Detector, folder: str | Path) -> Path:
    """Write a detector into a student folder. Each file is replaced atomically; the last one holds the checksums of the others.

    Args:
        detector: the detector to save.
        folder: created if it does not exist.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unseal_folder(folder)
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
    seal_folder(folder)
    return folder


def installed_versions() -> dict[str, str]:
    """Versions of the installed packages that a detector's behaviour depends on, by name."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
