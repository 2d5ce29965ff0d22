"""Read a checkpoint of MMDetection: its tensors by name, and what it says of itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from detdistill.detectors.inert import read_inert
from detdistill.detectors.mmdet.shared.config import Section, parse_config
from detdistill.errors import ModelError

BUFFERS = re.compile(r".*\.num_batches_tracked|.*\.integral\.project|data_preprocessor\..*|ema_.*|loss_.*")
"""Tensors of a checkpoint that hold nothing that was learnt, and copies of the weights that a moving average left behind."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint."""

    path: Path
    state: Mapping[str, Tensor]
    """Parameters and statistics by MMDetection's names, in single precision."""
    config: Section
    """The configuration of its training; empty if the file has none."""
    classes: tuple[str, ...] | None
    """Names of its classes; None if the file has none."""

    @property
    def model(self) -> Section:
        """The configuration of the network."""
        return self.config.at("model")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            ModelError: it is missing.
        """
        if name not in self.state:
            raise ModelError(f"{self.path}: has no tensor {name}, so it is not complete or another network")
        return tuple(self.state[name].shape)

    def count(self, pattern: str) -> int:
        """How many different numbers stand in the place of ``#`` in names that begin with the pattern.

        Example: ``bbox_head.cls_convs.#.conv`` counts the convolutions of a tower.
        """
        return len(numbers(self.state, pattern))


def numbers(names: Iterable[str], pattern: str) -> set[int]:
    """The numbers in the place of ``#`` in names that begin with the pattern."""
    number = re.compile(re.escape(pattern).replace(r"\#", r"(\d+)"))
    return {int(found[1]) for name in names if (found := number.match(name))}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a .pth file; nothing that it names is imported or run.

    Raises:
        ModelError: it cannot be read, or it is no checkpoint of MMDetection.
    """
    content = read_inert(path)
    inside = content.get("state_dict", content) if isinstance(content, Mapping) else None
    state = {str(name).removeprefix("module."): value for name, value in inside.items()} if isinstance(inside, Mapping) else {}
    state = {name: value for name, value in state.items() if isinstance(value, Tensor) and not BUFFERS.fullmatch(name)}
    if not state:
        raise ModelError(f"{path}: holds no state dict of tensors; give a checkpoint of MMDetection (.pth)")
    if not any(name.startswith("backbone.") for name in state):
        held = ", ".join(list(state)[:3])
        raise ModelError(f"{path}: is no detector of MMDetection: none of its names begins with backbone. (it has {held}, ...)")
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    text = next((meta[key] for key in ("cfg", "config") if isinstance(meta.get(key), str)), "")
    single = {name: value.detach().float() if value.is_floating_point() else value for name, value in state.items()}
    return Checkpoint(path, single, Section(parse_config(text)), _classes(meta))


def _classes(meta: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the classes as version 3 (``dataset_meta``) or 2 (``CLASSES``) writes them."""
    about = meta.get("dataset_meta")
    about = about if isinstance(about, Mapping) else {}
    for found in (about.get("classes"), about.get("CLASSES"), meta.get("CLASSES")):
        if isinstance(found, str):
            return (found,)
        if isinstance(found, (list, tuple)) and found and all(isinstance(name, str) for name in found):
            return tuple(found)
    return None
