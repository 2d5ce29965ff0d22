"""DICOD's image classifier, its output for the objects, and the boxes that it gets.

Shape letters: B images, G objects of an image, M positives of the batch, K classes, S side of a crop, C channels.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from detdistill.errors import ModelError, nearest
from detdistill.files import damage, replace_with_checksum
from detdistill.functional.crops import crop_boxes
from detdistill.functional.modes import evaluating, frozen
from detdistill.structures import Batch, Taught

CHUNK = 256
"""Number of crops in one pass of the classifier without gradients, and the maximum number of crops it is trained on per batch."""
LEAST_SIDE = 1.0
"""Smallest side of a usable box, in pixels."""


class Classifier(nn.Module):
    """Any timm model over crops, with the names of its classes."""

    def __init__(self, network: Any, classes: Sequence[str], name: str = "") -> None:
        """Wrap a network that has timm's ``forward_intermediates``, ``forward_head`` and ``pretrained_cfg``."""
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.network, self.classes, self.name = network, tuple(classes), name
        for statistic in ("mean", "std"):
            values = torch.tensor(network.pretrained_cfg[statistic])[:, None, None]
            self.register_buffer(statistic, values, persistent=False)

    @classmethod
    def build(cls, name: str, classes: Sequence[str], pretrained: bool = False) -> Self:
        """Build a classifier by its timm name.

        Raises:
            ModelError: timm has no such model, or no weights for it.
        """
        import timm

        if not timm.is_model(name):
            known = timm.list_models()
            raise ModelError(f"unknown classifier {name!r}{nearest(name, known)}; name one of timm's {len(known)} models")
        try:
            network = timm.create_model(name, num_classes=len(classes), pretrained=pretrained)
        except Exception as error:  # the hub's errors have no common base
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"classifier {name}: timm cannot build it: {reason}") from error
        if not hasattr(network, "forward_intermediates"):
            raise ModelError(f"classifier {name} does not show its inner maps in timm; take a resnet, a convnext, ...")
        return cls(network, classes, name)

    @classmethod
    def load(cls, path: str | Path, name: str) -> Self:
        """Load a classifier from a safetensors file, whose metadata may hold the class names (see ``save``).

        Raises:
            ModelError: the file is missing, is not a safetensors file, or holds weights of another model.
        """
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file

        if Path(path).suffix != ".safetensors":
            raise ModelError(f"classifier weights {path}: only .safetensors files are read")
        try:
            if wrong := damage(Path(path)):
                raise ModelError(f"classifier weights {path} are damaged: {wrong}; copy or save them again")
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"classifier weights {path} cannot be read: {error}") from error
        known = metadata.get("classifier", name)
        if known != name:
            raise ModelError(f"classifier weights {path} are of {known}, not of {name}; write classifier={known}")
        blank = cls.build(name, ())
        last = blank.network.pretrained_cfg["classifier"]
        rows = [len(tensor) for key, tensor in state.items() if key == f"{last}.weight"]
        try:
            names = json.loads(metadata.get("classes", "[]")) or [f"class {row}" for row in range(sum(rows))]
            loaded = cls.build(name, names)
            loaded.network.load_state_dict(state)
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"classifier weights {path} do not fit {name}: {reason}") from error
        if "classes" not in metadata:
            loaded.classes = ()
        return loaded

    def save(self, path: str | Path) -> None:
        """Write a file that ``weights=`` reads: timm's state dict, with names as metadata; and the checksum beside it."""
        from safetensors.torch import save_file

        state = {key: tensor.detach().cpu().contiguous() for key, tensor in self.network.state_dict().items()}
        temporary = Path(path).with_suffix(".tmp")
        try:
            save_file(state, temporary, metadata={"classifier": self.name, "classes": json.dumps(self.classes)})
            replace_with_checksum(temporary, Path(path))
        finally:
            temporary.unlink(missing_ok=True)

    def crops(self, batch: Batch, boxes_xyxy: Tensor, image: Tensor, size: int) -> Tensor:
        """[M, 3, S, S] crops of boxes [M, 4], normalised by the classifier's statistics; zeros outside the image."""
        images = (batch.images.to(boxes_xyxy.dtype) - self.mean) / self.std
        return crop_boxes(images, boxes_xyxy, image, size, [view.size_hw for view in batch.views])

    def forward(self, crops: Tensor) -> Tensor:
        """[M, K] logits of crops [M, 3, S, S]."""
        logits: Tensor = self.network(crops)
        return logits

    def maps(self, crops: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Feature maps [M, C, h, w] of some layers; later layers are not computed."""
        found = self.network.forward_intermediates(crops, indices=list(layers), intermediates_only=True, stop_early=True)
        return self._after_stem(found, layers)

    def describe(self, crops: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Logits and feature maps of some layers, in one pass."""
        last, found = self.network.forward_intermediates(crops, indices=list(layers))
        return self.network.forward_head(last), self._after_stem(found, layers)

    def _after_stem(self, maps: list[Tensor], layers: Sequence[int]) -> list[Tensor]:
        """Apply the max-pool to layer 0: the paper's layer 0 is a ResNet's stem with its max-pool, timm's is without."""
        pool = getattr(self.network, "maxpool", None)
        return [pool(level) if layer == 0 and pool is not None else level for layer, level in zip(layers, maps, strict=True)]


@contextlib.contextmanager
def as_teacher(module: nn.Module) -> Iterator[None]:
    """Context with the module in eval mode and its parameters frozen; gradients flow through it to its input."""
    with frozen(module), evaluating(module):
        yield


@dataclass(frozen=True)
class DICODTaught(Taught):
    """The classifier's output for the true boxes, padded with zeros after the last object of each image."""

    logits: Tensor
    """[B, G, K] for the classifier's classes."""
    pixels: Tensor
    """[B, G, 3, g, g] pooled crops, normalised by the classifier's statistics."""
    features: tuple[Tensor, ...]
    """Pooled feature maps of the classifier's layers: [B, G, C, 2g, 2g], [B, G, C, 4g, 4g], ..."""
    usable: Tensor
    """[B, G] bool: the object is not a crowd and has sides of at least a pixel."""
    counts: Tensor
    """[B] number of objects of each image."""

    def split(self, count: int) -> list[Self]:
        """Split into single images, each without padding."""
        pieces = []
        for piece, objects in zip(super().split(count), self.counts.tolist(), strict=True):
            features = tuple(level[:, :objects] for level in piece.features)
            own = {name: getattr(piece, name)[:, :objects] for name in ("logits", "pixels", "usable")}
            pieces.append(replace(piece, features=features, **own))
        return pieces


def large_enough(boxes_xyxy: Tensor) -> Tensor:
    """[M] bool: both sides of a box [M, 4] are at least a pixel long (False for NaN)."""
    return (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] >= LEAST_SIDE).all(dim=1)


def jittered(boxes_xyxy: Tensor, amount: float) -> Tensor:
    """Move the centres of boxes [M, 4] by up to ``amount`` of their sides, and scale the sides by up to ``e^amount``."""
    center_size = box_convert(boxes_xyxy, "xyxy", "cxcywh")
    move, scale = (2 * torch.rand_like(center_size) - 1).mul(amount).split(2, dim=1)
    sides = center_size[:, 2:]
    return box_convert(torch.cat([center_size[:, :2] + move * sides, sides * scale.exp()], dim=1), "cxcywh", "xyxy")
