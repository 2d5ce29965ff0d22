"""Load detectors with their weights from a student folder, a run folder, a checkpoint, or a model string that names weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from detdistill.detectors.adapters import adapter, adapter_names, read_model, wrap_torchvision
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Detector
from detdistill.detectors.student_files.load_student import build as build_model
from detdistill.errors import ClassCountError, ModelError, no_model
from detdistill.files import FOLDER_CHECKSUMS, checksum_file, damage, folder_damage
from detdistill.structures import Resizing


def load_detector(name: str | Path, classes: Sequence[str] | None = None) -> Detector:
    """Load a detector with its weights from a student folder, a run folder, a checkpoint, or a model string.

    Args:
        name: path or model string.
        classes: class names for a model string without classes of its own. A saved detector must have as many.

    Raises:
        ModelError: ``name`` is neither a path nor a model string, or files are missing or broken.
        ClassCountError: the detector has another number of classes than ``classes``.
    """
    path = Path(name)
    if path.is_file():
        if path.suffix != ".ckpt":
            raise ModelError(f"{path}: not a checkpoint (.ckpt); give a run folder or its student/ folder")
        return load_checkpoint(path, classes)
    if path.is_dir():
        for folder in (path, path / "student"):
            if (folder / "student.json").is_file():
                return load_student(folder, classes)
        inside = sorted(str(found.parent.parent) for found in path.glob("*/student/student.json"))
        hint = f"; did you mean {', '.join(inside[:3])}?" if inside else "; is the run finished?"
        raise ModelError(f"{path}: no student in it (student/student.json is missing){hint}")
    text = str(name)
    if ":" not in text:
        raise no_model(text)
    model, options = read_model(text)
    loader = getattr(adapter(model.detector), "load", None)
    if loader is not None:
        loaded: Detector = loader(model.backbone, classes, options)
        return loaded
    if classes is None:
        raise ModelError(f"model {text!r} has no weights, so no classes of its own; name a run folder or a checkpoint")
    return build_detector(text, classes)


def load_student(folder: Path, classes: Sequence[str] | None = None) -> Detector:
    """Load the detector of a student folder.

    Folders without ``model.json`` are read by the adapter's ``load_exported(folder, classes, name)``.

    Args:
        folder: folder with ``student.json``.
        classes: class names; the detector must have as many. None: any number.

    Raises:
        ModelError: files are missing, broken, or belong to another model.
        ClassCountError: the detector has another number of classes than ``classes``.
    """
    if wrong := folder_damage(folder):
        raise ModelError(
            f"{folder}: {wrong}: the file is damaged or was changed after it was saved; save it again, or delete "
            f"{FOLDER_CHECKSUMS} to use it as it is"
        )
    about = _read_json(folder / "student.json")
    try:
        name, own_classes, kind = str(about["name"]), [str(item) for item in about["classes"]], str(about["adapter"])
    except (KeyError, TypeError) as error:
        raise ModelError(f"{folder / 'student.json'}: no {error} in it; save the student again") from error
    check_class_count(folder, own_classes, classes)
    if (folder / "model.json").is_file():
        about_model = _read_json(folder / "model.json")
        model = build_model(about_model["model"])
        columns = [about_model["labels"].index(label) for label in own_classes]
        load_state(model, _read_tensors(folder / "model.safetensors"), folder / "model.safetensors", name)
        return wrap_torchvision(model, own_classes, name, columns, about_model["model"])
    loader = getattr(adapter(kind), "load_exported", None) if kind in adapter_names() else None
    if loader is None:
        raise ModelError(f"{folder}: a {kind} detector that was wrapped in Python cannot be loaded by name; wrap it again")
    detector: Detector = loader(folder, own_classes, name)
    return detector


def load_checkpoint(path: Path, classes: Sequence[str] | None = None) -> Detector:
    """Load the student of a training checkpoint inside its run folder (``checkpoints/best.ckpt``).

    The student's model is read from ``student/`` of the run folder if the run has finished, else from ``config.yaml``.

    Args:
        path: the checkpoint.
        classes: class names, required while the run is unfinished; else the student must have as many.

    Raises:
        ModelError: the run folder does not define the student, or the checkpoint is unreadable or of another model.
        ClassCountError: the student has another number of classes than ``classes``.
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
        wrong = damage(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    if wrong:
        raise ModelError(f"{path}: {wrong}: it is damaged, or {checksum_file(path).name} belongs to another file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of pickle, of zip and of its own
        raise ModelError(f"{path}: no readable checkpoint: {str(error).splitlines()[0]}") from error
    state = content.get("state_dict", content)
    prefix = "average.module." if any(key.startswith("average.module.") for key in state) else "student."
    mine = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    load_state(detector, mine, path, detector.spec.name)
    return detector


def trained_resizing(name: str | Path) -> Resizing | None:
    """How images were resized in the training of a saved detector.

    Args:
        name: run folder, student folder (also as ``hf:FOLDER``), checkpoint, or any other model string.

    Returns:
        What ``student.json`` of the folder says, else what ``config.yaml`` of the run folder around it says; None: nothing.

    Raises:
        ModelError: one of these files cannot be read.
    """
    path = Path(str(name).removeprefix("hf:"))
    if not path.exists():
        return None
    inside = path.parent.parent if path.is_file() else path
    for folder in (path, inside / "student"):
        if (folder / "student.json").is_file():
            about = _read_json(folder / "student.json")
            found = Resizing.from_plain(about.get("images") if isinstance(about, dict) else None)
            if found is not None:
                return found
    for folder in (path, path.parent, path.parent.parent):
        file = folder / "config.yaml"
        if file.is_file():
            try:
                return Resizing.from_plain(yaml.safe_load(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise ModelError(f"{file} cannot be read: {error}") from error
    return None


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Load a state dict completely, or raise and change nothing.

    Args:
        module: the module to load into.
        state: tensors by name.
        path: file that ``state`` was read from, for messages.
        name: name of the model, for messages.

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
    """Check that a detector has as many classes as wanted.

    Args:
        where: file or model string, for the message.
        own: class names of the detector.
        wanted: class names that are needed; None: any number.

    Raises:
        ClassCountError: the numbers differ; the message lists both.
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
