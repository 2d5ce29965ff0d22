"""Plan for loading a checkpoint: the description of the detector that it becomes, and the names of its tensors there."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from detdistill.detectors.mmdet.shared.checkpoint import Checkpoint
from detdistill.detectors.mmdet.shared.config import Section
from detdistill.detectors.mmdet.shared.options import MMDetOptions
from detdistill.errors import DetdistillWarning, ModelError

Names = tuple[tuple[str, str], ...]
"""Pairs of a pattern of the checkpoint's names and our name; an empty name leaves the tensor out."""
State = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """How a checkpoint is loaded."""

    adapter: str
    """Name of our adapter."""
    classes: int
    """Number of classes of the checkpoint."""
    names: Names
    build: Callable[[Sequence[str]], Any]
    """Builds our model with random weights for class names: the model, or for transformers' the detector."""
    description: Callable[[int], dict[str, Any]] | None = None
    """The description of the model for a number of classes; None: transformers' models have none."""
    repeats: Mapping[str, int] = field(default_factory=dict)
    """Patterns of our names of tensors with rows for each class, and how many times these rows are repeated (anchors)."""
    convert: Callable[[State], State] = dict
    """Changes tensors under our names, all classes in the checkpoint's order."""
    background: bool = False
    """Our model has all outputs of the checkpoint and one of the background first; wanted classes are picked as ``columns``."""
    from_zero: bool = False
    """The first class has output 0 of a model of torchvision, whose first output is the background otherwise."""

    def columns(self, classes: int) -> list[int] | None:
        """``columns`` of a detector for as many classes as its model has; None: the usual ones."""
        return list(range(classes)) if self.from_zero else None


def renamed(checkpoint: Checkpoint, names: Names) -> tuple[State, list[str]]:
    """The tensors of a checkpoint under our names, and those names for which there is none of ours."""
    rules = [(re.compile(pattern), ours) for pattern, ours in names]
    found: State = {}
    unknown = []
    for name, tensor in checkpoint.state.items():
        for pattern, ours in rules:
            if match := pattern.fullmatch(name):
                if ours:
                    found[match.expand(ours)] = tensor
                break
        else:
            unknown.append(name)
    return found, unknown


def picked(state: State, plan: Plan, rows: Sequence[int]) -> State:
    """The state with the outputs of some classes only, in this order."""
    found = dict(state)
    for name, tensor in state.items():
        for pattern, anchors in plan.repeats.items():
            if re.fullmatch(pattern, name):
                found[name] = tensor.unflatten(0, (anchors, plan.classes))[:, list(rows)].flatten(0, 1)
    return found


def load_state(model: nn.Module, state: State, checkpoint: Checkpoint, what: str, fresh: Sequence[str] = ()) -> None:
    """Load a state completely, or raise and change nothing.

    Args:
        model: ours.
        state: tensors under our names.
        checkpoint: where they are from.
        what: name of the detector, for messages.
        fresh: patterns of names of our tensors that keep their random values.

    Raises:
        ModelError: tensors of the model are missing or have other shapes.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".num_batches_tracked")}
    own = {name: tensor for name, tensor in own.items() if not any(re.fullmatch(pattern, name) for pattern in fresh)}
    missing = [name for name in own if name not in state]
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or wrong:
        first = (
            f"{wrong[0]} is {list(state[wrong[0]].shape)}, not {list(own[wrong[0]].shape)}"
            if wrong
            else f"{missing[0]} is missing"
        )
        raise ModelError(
            f"{checkpoint.path}: fits {len(own) - len(missing) - len(wrong)} of {len(own)} tensors of {what} ({first}); it holds "
            "another architecture"
        )
    model.load_state_dict({name: state[name] for name in own}, strict=False)


def check_all_used(checkpoint: Checkpoint, unknown: Sequence[str], what: str) -> None:
    """Refuse a checkpoint with tensors that have no place.

    Raises:
        ModelError: there are some; the message counts them and names the first.
    """
    if unknown:
        total = len(checkpoint.state)
        raise ModelError(
            f"{checkpoint.path}: {total - len(unknown)} of its {total} tensors have a place in {what}; the first that has none "
            f"is {unknown[0]}"
        )


def selection(checkpoint: Checkpoint, options: MMDetOptions, *usual: Any, inside: Sequence[str] = ()) -> dict[str, Any]:
    """How detections are selected: by the options, else by ``test_cfg`` of the configuration.

    Args:
        checkpoint: the checkpoint.
        options: of the model string.
        usual: IoU of NMS, and candidates of each level, where the configuration says nothing.
        inside: names of the section inside ``test_cfg``.

    Returns:
        ``score``, ``nms``, ``topk``, ``dets``.
    """
    said = checkpoint.model.at("test_cfg", *inside)
    said = said or checkpoint.config.at("test_cfg", *inside)
    nms = said.at("nms")
    kind = nms.get("type", "nms")
    if kind != "nms":
        message = f"{checkpoint.path}: its configuration selects detections by {kind}; here by NMS"
        warnings.warn(message, DetdistillWarning, stacklevel=2)
    score = said.get("score_thr", 0.05) if options.score is None else options.score
    return {
        "score": float(score),
        "nms": float(nms.get("iou_threshold", nms.get("iou_thr", usual[0]))),
        "topk": int(said.get("nms_pre", usual[1])),
        "dets": int(said.get("max_per_img", 100) if options.dets is None else options.dets),
    }


def expect(checkpoint: Checkpoint, section: Section, **usual: Any) -> None:
    """Refuse a configuration that says something else than our detector does; what it leaves out is as usual.

    Raises:
        ModelError: a value differs.
    """
    for name, value in usual.items():
        found = section.get(name, value)
        if found != value:
            raise ModelError(f"{checkpoint.path}: {section.place}.{name} is {found}; only {value} can be loaded")


def bgr_folded(state: State, name: str) -> State:
    """The state with the first convolution reading red first instead of blue."""
    return {**state, name: state[name].flip(1)}


def zeros(count: int, like: Tensor) -> Tensor:
    """[count, ...] rows of zeros in the shape of the rows of ``like``."""
    return torch.zeros(count, *like.shape[1:], dtype=like.dtype)
