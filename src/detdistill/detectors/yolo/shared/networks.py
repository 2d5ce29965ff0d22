"""Networks of the package ultralytics: by name, from a .yaml, from a .pt, and written again.

A .pt file is a pickle of a whole network. It is read without importing anything that it names (``inert``), and the network is
built anew from the description inside. Descriptions from files are checked first, because the package evaluates one of their
entries as code.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from detdistill.detectors.inert import Inert, read_inert, state_of
from detdistill.errors import ModelError, nearest
from detdistill.files import write_atomically

HEADS = ("Detect", "v10Detect")
"""Heads that detect boxes and nothing else."""
TASKS = {
    **dict.fromkeys(("Segment", "Segment26"), "segments"),
    **dict.fromkeys(("Pose", "Pose26"), "finds poses"),
    **dict.fromkeys(("OBB", "OBB26"), "turns its boxes"),
    "Classify": "classifies images",
    "RTDETRDecoder": "is an RT-DETR (use rt_detr:)",
}
"""What other heads do."""
ACTIVATION = re.compile(r"(torch\.)?nn\.\w+\((\w+=)?[\w.]*\)")
"""Activations as descriptions write them, e.g. ``nn.SiLU()`` or ``nn.LeakyReLU(0.1)``."""


@dataclass(frozen=True)
class Saved:
    """Content of a .pt file."""

    description: dict[str, Any]
    """The content of the .yaml that the network was built from."""
    classes: tuple[str, ...]
    state: Mapping[str, Tensor]


def need_library(name: str) -> None:
    """Import the package, and undo what its import changes in other libraries.

    It replaces ``PIL.Image.open`` (a file that is no image then starts an installation), ``torch.save`` and how tensors and
    arrays are printed, for the whole process. Where it was imported before, its changes stay.

    Raises:
        ModelError: it is not installed; the message says how to install it, and its licence.
    """
    if importlib.util.find_spec("ultralytics") is None:
        raise ModelError(f"{name} needs the package ultralytics (AGPL-3.0): pip install 'detdistill[ultralytics]'")
    if "ultralytics" in sys.modules:
        return
    opening, saving, shown = Image.open, torch.save, vars(torch._tensor_str.PRINT_OPTS).copy()
    try:
        with np.printoptions():
            importlib.import_module("ultralytics.nn.tasks")
    finally:
        Image.open, torch.save = opening, saving
        vars(torch._tensor_str.PRINT_OPTS).update(shown)


def describe(name: str, model: str) -> dict[str, Any]:
    """The description of a network.

    Args:
        name: a network of the package with its size (``yolo11n``, ``yolov9t``), or the path of a .yaml.
        model: the model string, for messages.

    Raises:
        ModelError: there is no such network, or it does not detect boxes.
    """
    need_library(model)
    import ultralytics

    folder = Path(ultralytics.__file__).parent / "cfg" / "models"
    files = {path.stem: path for path in sorted(folder.glob("*/*.yaml"))}
    if name.endswith((".yaml", ".yml")):
        path, scale = Path(name), _scale(Path(name).stem)
        if not path.is_file():
            raise ModelError(f"model {model!r}: there is no file {path}")
    elif name in files:
        path, scale = files[name], ""
        if (sizes := _read(path).get("scales")) and len(sizes) > 1:
            raise ModelError(f"model {model!r}: {name} has the sizes {', '.join(sizes)}; write e.g. {name}{next(iter(sizes))}")
    else:
        family = re.sub(r"^(yolo(?:v?\d+))[nslmx](?=$|-)", r"\1", name)
        path, scale = files.get(family, Path()), _scale(name)
        if family not in files or not scale:
            raise ModelError(f"model {model!r}: ultralytics has no {name!r}{nearest(name, _names(files))}")
    return _checked(_read(path), path.name if path.parent.parent == folder else str(path), scale)


def _scale(name: str) -> str:
    found = re.match(r"yolo(?:v?\d+)([nslmx])(?:$|-)", name)
    return found[1] if found else ""


def _names(files: Mapping[str, Path]) -> list[str]:
    """Names that ``describe`` takes, for the nearest one."""
    plain = [name for name in files if re.fullmatch(r"yolov?\d+[a-z]?", name)]
    return [name + size for name in plain for size in ("nslmx" if name[-1].isdigit() else ("",))]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ModelError(f"{path}: cannot be read as YAML: {error}") from error
    return content if isinstance(content, dict) else {}


def _checked(description: dict[str, Any], where: str, scale: str = "") -> dict[str, Any]:
    """The description, if it describes a detector of boxes, and nothing else would be run when it is built.

    Raises:
        ModelError: it does not, or another version of the package is needed.
    """
    from ultralytics.nn import tasks

    rows = [*(description.get("backbone") or []), *(description.get("head") or [])]
    if not rows or not all(isinstance(row, list) and len(row) == 4 and isinstance(row[2], str) for row in rows):
        raise ModelError(f"{where}: does not describe a network of ultralytics (no backbone and head with rows of four entries)")
    head = rows[-1][2]
    if head not in HEADS:
        raise ModelError(f"{where}: its head is {head}, which {TASKS.get(head, 'does something else')}; give a detector of boxes")
    for _, _, kind, _ in rows:
        known = (
            getattr(nn, kind.removeprefix("torch.").removeprefix("nn."), None) if "nn." in kind else getattr(tasks, kind, None)
        )
        if not (isinstance(known, type) and issubclass(known, nn.Module)):
            raise ModelError(
                f"{where}: its layer {kind!r} is unknown to ultralytics {version('ultralytics')}; if the file is of a newer "
                "version, pip install -U ultralytics"
            )
    activation = description.get("activation")
    if activation is not None and not ACTIVATION.fullmatch(str(activation)):
        raise ModelError(f"{where}: activation: {str(activation)[:60]!r} is no layer such as nn.SiLU(); it would be run as code")
    sizes = description.get("scales") or {}
    if sizes and scale and scale not in sizes:
        raise ModelError(f"{where}: has no size {scale!r}{nearest(scale, sizes)}; sizes: {', '.join(sizes)}")
    if sizes and not description.get("scale"):
        return {**description, "scale": scale or next(iter(sizes))}
    return description


def resized(description: Mapping[str, Any], depth: float | None, width: float | None) -> dict[str, Any]:
    """The description with other multipliers of depth and width; None keeps one."""
    if depth is None and width is None:
        return dict(description)
    sizes = description.get("scales")
    if not sizes:
        own = {"depth_multiple": depth, "width_multiple": width}
        return {**description, **{name: value for name, value in own.items() if value is not None}}
    before = list(sizes[description["scale"]])
    chosen = [before[0] if depth is None else depth, before[1] if width is None else width, *before[2:]]
    return {**description, "scales": {"own": chosen}, "scale": "own"}


def build_network(description: Mapping[str, Any], classes: int) -> Any:
    """Build the package's ``DetectionModel`` with random weights.

    Raises:
        ModelError: the package cannot build it.
    """
    from ultralytics.nn.tasks import DetectionModel

    try:
        model = DetectionModel({**copy.deepcopy(dict(description)), "nc": classes}, ch=3, nc=classes, verbose=False)
    except Exception as error:  # whatever a layer raises for arguments that do not fit
        raise ModelError(f"ultralytics {version('ultralytics')} cannot build this network: {error}") from error
    return model.requires_grad_(True)


def read_saved(path: Path) -> Saved:
    """Read a .pt file of the package; its moving average if it has one. Weights of half precision become float32.

    Raises:
        ModelError: it is no such file, or holds a network of another task.
    """
    need_library(str(path))
    content = read_inert(path)
    model = (content.get("ema") or content.get("model")) if isinstance(content, dict) else None
    if not isinstance(model, Inert) or not isinstance(model.__dict__["state"], dict) or "_modules" not in model.__dict__["state"]:
        raise ModelError(
            f"{path}: holds no network of ultralytics (no entry 'model'); weights alone do not say which network they fit"
        )
    about, kind = model.__dict__["state"], model.named.rpartition(".")[2]
    description, names = about.get("yaml"), about.get("names")
    if not kind.endswith("DetectionModel") or not isinstance(description, dict):
        raise ModelError(f"{path}: holds a {kind}, which is no detector of boxes of ultralytics; give a detection model")
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state_of(model).items()}
    ordered = [names[index] for index in sorted(names)] if isinstance(names, dict) else list(names or [])
    return Saved(_checked(description, str(path)), tuple(map(str, ordered)), state)


def save_pt(description: Mapping[str, Any], state: Mapping[str, Tensor], names: Sequence[str], path: Path) -> None:
    """Write a pickled network of the package, in float32.

    Args:
        description: what the network is built from.
        state: its tensors.
        names: class of each output.
        path: the .pt file.
    """
    from ultralytics.cfg import get_cfg

    model = build_network(description, len(names)).eval()
    model.load_state_dict({name: tensor.detach().cpu() for name, tensor in state.items()})
    arguments = {**vars(get_cfg()), "task": "detect"}
    model.names, model.task, model.args = dict(enumerate(names)), "detect", arguments
    content = {"epoch": -1, "model": model, "ema": None, "train_args": arguments, "version": version("ultralytics")}
    write_atomically(path, lambda temporary: torch.save(content, temporary))
