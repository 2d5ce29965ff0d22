"""Networks of the package libreyolo: by name, from a .pt, and written again.

A .pt file of the package holds tensors and what describes their network: family, size, task, classes. It is read without
importing anything that it names (``inert``), and the network is built anew.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detdistill.detectors.inert import read_inert
from detdistill.errors import ModelError, nearest
from detdistill.files import write_atomically

FAMILIES = {
    "yolox": ("models.yolox.nn", "LibreYOLOXModel"),
    "yolo9": ("models.yolo9.nn", "LibreYOLO9Model"),
    "yolo9_p2": ("models.yolo9_p2.nn", "LibreYOLO9P2Model"),
}
"""Families of the package that can be built here: module and class of the network."""
SIZES = {"yolox": "CONFIGS", "yolo9": "YOLO9_CONFIGS", "yolo9_p2": "YOLO9_P2_CONFIGS"}
"""Where a family lists its sizes: an attribute of the class (YOLOX) or of the module."""
SCHEMA = "1.0"
"""Version of the form of a .pt file that is read here."""
BINS = 16
"""Bins of each side of a box in YOLO9."""
CLASS_WIDTH = "head.cv3.0.0.conv.weight"
"""Tensor of YOLO9 whose first dimension is the width of the inner layers for the classes; it depends on their number."""
TRAINING_ONLY = ("aux.", "aux_head.")
"""Tensors of YOLO9's auxiliary branch, which the package's own training adds, and which detection does not use."""


@dataclass(frozen=True)
class Saved:
    """Content of a .pt file."""

    description: dict[str, Any]
    """``family`` and ``size``, and for YOLO9 ``class_width``; see ``build_network``."""
    classes: tuple[str, ...]
    state: Mapping[str, Tensor]


def need_library(name: str) -> None:
    """Import the package, which takes some seconds. Its import replaces nothing in other packages.

    Raises:
        ModelError: it is not installed; the message says how to install it, and its licence.
    """
    if importlib.util.find_spec("libreyolo") is None:
        raise ModelError(f"{name} needs the package libreyolo (MIT): pip install 'detdistill[libreyolo]'")
    importlib.import_module("libreyolo.models")


def describe(name: str, model: str, depth: float | None = None, width: float | None = None) -> dict[str, Any]:
    """The description of a network.

    Args:
        name: family and size, such as ``yolox-n``.
        model: the model string, for messages.
        depth: multiplier of YOLOX's repeated blocks; None: the size's own.
        width: multiplier of YOLOX's channels; None: the size's own.

    Raises:
        ModelError: there is no such network, or it cannot be made narrower.
    """
    family, _, size = name.partition("-")
    if family not in FAMILIES:
        known = [f"{one}-{sizes_of(one)[0]}" for one in FAMILIES]
        raise ModelError(
            f"model {model!r}: {name!r} is no network of libreyolo that is built here{nearest(name, known)}; families: "
            f"{', '.join(FAMILIES)}"
        )
    sizes = sizes_of(family)
    if size not in sizes:
        raise ModelError(f"model {model!r}: {family} has the sizes {', '.join(sizes)}; write e.g. {family}-{sizes[0]}")
    description: dict[str, Any] = {"family": family, "size": size}
    if depth is None and width is None:
        return description
    if family != "yolox":
        raise ModelError(f"model {model!r}: depth and width are there for yolox only; {family} has fixed channels")
    own = _class_of(family).CONFIGS[size]
    return {**description, "depth": own["depth"] if depth is None else depth, "width": own["width"] if width is None else width}


def sizes_of(family: str) -> tuple[str, ...]:
    """Sizes of a family in the installed version of the package."""
    kind = _class_of(family)
    table = getattr(kind if family == "yolox" else importlib.import_module(kind.__module__), SIZES[family])
    return tuple(table)


def _class_of(family: str) -> Any:
    module, name = FAMILIES[family]
    return getattr(importlib.import_module(f"libreyolo.{module}"), name)


def build_network(description: Mapping[str, Any], classes: int) -> Any:
    """Build one of the package's networks with random weights, initialised as its own training does.

    Args:
        description: ``family`` and ``size``. YOLOX: also ``depth`` and ``width``, if they are not the size's own. YOLO9: also
            ``class_width``, the width of the inner layers for the classes, if it is not the one for this number of classes.
        classes: number of classes.

    Raises:
        ModelError: the package cannot build it.
    """
    try:
        if description["family"] == "yolox":
            return _yolox(description, classes)
        return _yolo9(description, classes)
    except Exception as error:  # whatever a layer raises for arguments that do not fit
        raise ModelError(f"libreyolo {version('libreyolo')} cannot build this network: {error}") from error


def _yolox(description: Mapping[str, Any], classes: int) -> Any:
    from libreyolo.models.yolox import nn as package

    kind = package.LibreYOLOXModel
    if "width" not in description:
        model = kind(description["size"], nb_classes=classes)
    else:
        # The class builds the sizes of its table only, so backbone and head are replaced by those of other multipliers.
        model, depth, width = kind("n", nb_classes=classes), description["depth"], description["width"]
        depthwise = kind.CONFIGS[description["size"]]["depthwise"]
        model.backbone = package.YOLOPAFPN(depth, width, depthwise=depthwise)
        model.head = package.YOLOXHead(classes, width, depthwise=depthwise)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = 1e-3, 0.03
    model.init_weights()
    return model


def _yolo9(description: Mapping[str, Any], classes: int) -> Any:
    kind, width = _class_of(description["family"]), description.get("class_width")
    model = kind(config=description["size"], reg_max=BINS, nb_classes=classes)
    if width is None or width == _class_width(model):
        return model
    # The inner layers are as wide as the number of classes, within limits: they are those of a network for so many classes.
    model = kind(config=description["size"], reg_max=BINS, nb_classes=width)
    if _class_width(model) != width:
        raise ModelError(f"no number of classes gives class layers of {width} channels")
    model.nc = model.head.nc = classes
    model.head.no = classes + 4 * BINS
    for tower in model.head.cv3:
        tower[-1] = nn.Conv2d(width, classes, 1)
        nn.init.constant_(tower[-1].bias, -10.0)
    return model


def _class_width(model: Any) -> int:
    return int(model.head.cv3[0][0].conv.out_channels)


def read_saved(path: Path) -> Saved:
    """Read a .pt file of the package. Weights of half precision become float32.

    Raises:
        ModelError: it is no such file, or holds a network of another task, family or version.
    """
    need_library(str(path))
    content = read_inert(path)
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ModelError(f"{path}: holds no weights of libreyolo (no entry 'model' with tensors)")
    description = _described(content, path)
    names = content.get("names")
    ordered = [names[index] for index in sorted(names)] if isinstance(names, dict) else list(names or [])
    if len(ordered) != content.get("nc"):
        raise ModelError(f"{path}: names {len(ordered)} classes, but its network has {content.get('nc')}")
    state = {name: tensor.detach() for name, tensor in state.items() if not name.startswith(TRAINING_ONLY)}
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    if description["family"] != "yolox" and CLASS_WIDTH in state:
        description["class_width"] = int(state[CLASS_WIDTH].shape[0])
    return Saved(description, tuple(map(str, ordered)), state)


def _described(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Family and size of the network in a file, if it can be built here."""
    family, size, task, schema = (content.get(name) for name in ("model_family", "size", "task", "schema_version"))
    installed = f"libreyolo {version('libreyolo')}"
    if family is None or schema is None:
        raise ModelError(
            f"{path}: does not say which network its weights fit (no entry 'model_family'), as files of libreyolo do; open it "
            "with libreyolo and save it again: libreyolo.LibreYOLO(FILE).save(NEW)"
        )
    if schema != SCHEMA:
        raise ModelError(f"{path}: is of version {schema} of the form of libreyolo's files; {SCHEMA} is read here ({installed})")
    if task != "detect":
        raise ModelError(f"{path}: is for the task {task!r}; give a detector of boxes (task 'detect')")
    if family not in FAMILIES:
        raise ModelError(f"{path}: holds a {family}, which cannot be built here; families: {', '.join(FAMILIES)}")
    if size not in sizes_of(family):
        raise ModelError(
            f"{path}: holds a {family} of size {size!r}, which {installed} does not have; if the file is of a newer version, "
            "pip install -U libreyolo"
        )
    if "quant" in content:
        raise ModelError(f"{path}: is quantised; give the file from before")
    return {"family": family, "size": size}


def save_pt(description: Mapping[str, Any], state: Mapping[str, Tensor], names: Sequence[str], path: Path) -> None:
    """Write a file that ``libreyolo.LibreYOLO(path)`` opens.

    Args:
        description: see ``build_network``; depth and width are the size's own.
        state: tensors of the network, by the package's names.
        names: class of each output.
        path: the .pt file.
    """
    from libreyolo.utils.serialization import wrap_libreyolo_checkpoint

    content = wrap_libreyolo_checkpoint(
        {name: tensor.detach().cpu() for name, tensor in state.items()},
        model_family=description["family"],
        size=description["size"],
        task="detect",
        nc=len(names),
        names=list(names),
    )
    write_atomically(path, lambda temporary: torch.save(content, temporary))
