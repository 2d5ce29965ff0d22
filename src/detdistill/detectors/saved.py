"""Detectors on disk: the student's folder, and everything that detectors are loaded from.

A student's folder holds the detector in its own library's form (for torchvision ``model.safetensors``, ``model.json``
and the script ``load_student.py``, which needs no other file of ours) and ``student.json``, which says what it is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from detdistill.detectors import standalone
from detdistill.detectors._torchvision import write_atomically
from detdistill.detectors.build import adapter, build_detector, wrap_torchvision
from detdistill.detectors.contract import Detector
from detdistill.errors import ClassCountError, ModelError

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


def load_student(folder: Path, classes: Sequence[str] | None = None) -> Detector:
    """The detector of a student's folder.

    Adapters whose library has its own way of loading define ``load_exported(folder, classes, name)``.

    Args:
        folder: with ``student.json``.
        classes: as many as the detector must have; None: any.

    Raises:
        ModelError: files are missing, broken, or belong to another model.
    """
    about = _read_json(folder / "student.json")
    try:
        name, own_classes, kind = str(about["name"]), [str(item) for item in about["classes"]], str(about["adapter"])
    except (KeyError, TypeError) as error:
        raise ModelError(f"{folder / 'student.json'}: no {error} in it; save the student again") from error
    check_class_count(folder, own_classes, classes)
    if (folder / "model.json").is_file():
        about_model = _read_json(folder / "model.json")
        model = standalone.build(about_model["model"])
        columns = [about_model["labels"].index(label) for label in own_classes]
        load_state(model, _read_tensors(folder / "model.safetensors"), folder / "model.safetensors", name)
        return wrap_torchvision(model, own_classes, name, columns, about_model["model"])
    loader = getattr(adapter(kind), "load_exported", None)
    if loader is None:
        raise ModelError(f"{folder}: a {kind} detector that was wrapped in Python cannot be loaded by name; wrap it again")
    detector: Detector = loader(folder, own_classes, name)
    return detector


def load_checkpoint(path: Path, classes: Sequence[str] | None = None) -> Detector:
    """The student of a training checkpoint inside its run folder (``checkpoints/best.ckpt``).

    What the student is comes from the run's ``student/`` if it has finished, else from its ``config.yaml``.

    Raises:
        ModelError: the run folder does not tell, or the checkpoint is not its.
    """
    run = path.parent.parent
    if (run / "student" / "student.json").is_file():
        detector = load_student(run / "student", classes)
    elif (run / "config.yaml").is_file():
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}
        name = config.get("student") or config.get("model")
        if not name or classes is None:
            raise ModelError(f"{path}: the run is not finished, so its student's classes are unknown; resume the run first")
        detector = build_detector(str(name), classes)
    else:
        raise ModelError(f"{path}: a checkpoint is read inside its run folder, with config.yaml and student/ two levels up")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle's, zip's and its own
        raise ModelError(f"{path}: no readable checkpoint: {str(error).splitlines()[0]}") from error
    state = content.get("state_dict", content)
    prefix = "average.module." if any(key.startswith("average.module.") for key in state) else "student."
    mine = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    load_state(detector, mine, path, detector.spec.name)
    return detector


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Load all of a state dict, or nothing.

    Raises:
        ModelError: keys or shapes differ.
    """
    own = module.state_dict()
    same = [key for key in own if key in state]
    if len(same) < len(own) or len(same) < len(state):
        missing, extra = [key for key in own if key not in state], [key for key in state if key not in own]
        example = f"{missing[0]} is missing" if missing else f"{extra[0]} is unknown"
        raise ModelError(f"{path}: matches {len(same)} of {len(own)} keys of {name} ({example}); it belongs to another model")
    wrong = [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        key = wrong[0]
        raise ModelError(
            f"{path}: {key} is {list(state[key].shape)}, {name} needs {list(own[key].shape)} ({len(wrong)} tensors differ); "
            f"it has other classes or another size"
        )
    module.load_state_dict(dict(state))


def check_class_count(where: object, own: Sequence[str], wanted: Sequence[str] | None) -> None:
    """Refuse a detector with another number of classes.

    Raises:
        ClassCountError: naming both.
    """
    if wanted is not None and len(own) != len(wanted):
        raise ClassCountError(f"{where}: has {len(own)} classes ({_few(own)}), but {len(wanted)} are wanted ({_few(wanted)})")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
