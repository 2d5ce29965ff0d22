"""DICOD's image classifier, what it says of the objects, and the boxes that it is shown.

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
"""Crops that go through the classifier at once where no gradient is kept; and the most of a batch that it is trained on."""
LEAST_SIDE = 1.0
"""Pixels; what is smaller shows nothing."""


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
        """A new one.

        Raises:
            ModelError: timm has no such model, or no weights of it.
        """
        import timm

        if not timm.is_model(name):
            known = timm.list_models()
            raise ModelError(f"unknown classifier {name!r}{nearest(name, known)}; any of timm's {len(known)} models will do")
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
        """One from a safetensors file; its metadata may hold the names of its classes (see ``save``).

        Raises:
            ModelError: no such file, of another form, or not of this model.
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
        """[M, 3, S, S] what boxes [M, 4] show, normalised as this classifier is used to; zeros beyond the image."""
        images = (batch.images.to(boxes_xyxy.dtype) - self.mean) / self.std
        return crop_boxes(images, boxes_xyxy, image, size, [view.size_hw for view in batch.views])

    def forward(self, crops: Tensor) -> Tensor:
        """[M, K] logits of crops [M, 3, S, S]."""
        logits: Tensor = self.network(crops)
        return logits

    def maps(self, crops: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Some feature maps [M, C, h, w]; nothing beyond the last of them is computed."""
        found = self.network.forward_intermediates(crops, indices=list(layers), intermediates_only=True, stop_early=True)
        return self._after_stem(found, layers)

    def describe(self, crops: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Logits and some feature maps of one pass."""
        last, found = self.network.forward_intermediates(crops, indices=list(layers))
        return self.network.forward_head(last), self._after_stem(found, layers)

    def _after_stem(self, maps: list[Tensor], layers: Sequence[int]) -> list[Tensor]:
        """The paper's layer 0 is a ResNet's stem with its max-pool, timm's is without."""
        pool = getattr(self.network, "maxpool", None)
        return [pool(level) if layer == 0 and pool is not None else level for layer, level in zip(layers, maps, strict=True)]


@contextlib.contextmanager
def as_teacher(module: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients of its own; gradients flow through it."""
    with frozen(module), evaluating(module):
        yield


@dataclass(frozen=True)
class DICODTaught(Taught):
    """What the classifier says about the true boxes. Images have zeros after their last object."""

    logits: Tensor
    """[B, G, K] for the classifier's classes."""
    pixels: Tensor
    """[B, G, 3, g, g] pooled crops, as the classifier normalises."""
    features: tuple[Tensor, ...]
    """[B, G, C, 2g, 2g], [B, G, C, 4g, 4g] ... pooled feature maps of its layers."""
    usable: Tensor
    """[B, G] bool: the object is no crowd, and larger than a pixel."""
    counts: Tensor
    """[B] objects of each image."""

    def split(self, count: int) -> list[Self]:
        """One value for each image, with as many places as it has objects, whatever the others have."""
        pieces = []
        for piece, objects in zip(super().split(count), self.counts.tolist(), strict=True):
            features = tuple(level[:, :objects] for level in piece.features)
            own = {name: getattr(piece, name)[:, :objects] for name in ("logits", "pixels", "usable")}
            pieces.append(replace(piece, features=features, **own))
        return pieces


def large_enough(boxes_xyxy: Tensor) -> Tensor:
    """[M] bool of boxes [M, 4]: both sides have a pixel or more (False for sides that are no number)."""
    return (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] >= LEAST_SIDE).all(dim=1)


def jittered(boxes_xyxy: Tensor, amount: float) -> Tensor:
    """Boxes [M, 4] whose centres moved by up to ``amount`` of their sides, which were scaled by up to ``e^amount``."""
    center_size = box_convert(boxes_xyxy, "xyxy", "cxcywh")
    move, scale = (2 * torch.rand_like(center_size) - 1).mul(amount).split(2, dim=1)
    sides = center_size[:, 2:]
    return box_convert(torch.cat([center_size[:, :2] + move * sides, sides * scale.exp()], dim=1), "cxcywh", "xyxy")
