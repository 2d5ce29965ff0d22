"""Base class of the adapters of torchvision's detectors: normalisation, features, copies of the neck, export.

Labels: torchvision's class 0 is the background, so a model of K classes has K+1 outputs. Pretrained models have more (91
for COCO, some of them unused). ``columns`` [K] holds the output index of each label 0 .. K-1.

The detector normalises the images and pads them with zeros to the same multiple as the model's own transform. Features,
losses and detections therefore equal those of ``model(images, targets)`` for images that the transform does not resize.

Shape letters: B images, L levels, P predictions of an image, K classes, C = K+1 or more outputs, A anchors of a cell.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from detdistill.detectors.contract import DenseCoding, Detector, DetectorSpec, Family, Parts, Pyramid
from detdistill.detectors.single_cells import accept_single_cells
from detdistill.detectors.student_files import load_student
from detdistill.detectors.torchvision.images import (
    backbone_maps,
    coarser_padding,
    image_sizes,
    padded,
    pyramid_maps,
    pyramids_of,
    with_padding,
)
from detdistill.files import write_atomically
from detdistill.structures import (
    Batch,
    Features,
    Resizing,
)


class TorchvisionDetector(Detector):
    """Base class of torchvision's detectors on a feature pyramid."""

    columns: Tensor
    """[K] index of the model's output for each class."""

    def __init__(
        self,
        model: Any,
        classes: Sequence[str],
        name: str,
        *,
        family: Family,
        softmax: bool = False,
        columns: Sequence[int] | None = None,
        description: Mapping[str, Any] | None = None,
        pyramids: tuple[Pyramid, Pyramid | None] | None = None,
        needs_masks: bool = False,
        fixed_size_hw: tuple[int, int] | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: torchvision's model; its parameters are named ``model.<torchvision's name>``.
            classes: names of the K classes, in label order.
            name: model string.
            family: kind of prediction of the adapter.
            softmax: True: K+1 logits with the background last; False: K sigmoid logits.
            columns: index of the output of each class; None: 1 .. K, as for every model with K+1 outputs.
            description: nested calls from which ``load_student.build`` builds the model; None: the export has no loading script.
            pyramids: channels and strides of the features and of the backbone's maps; None: determined by a trial run of
                ``model.backbone``.
            needs_masks: training needs instance masks.
            fixed_size_hw: the fixed input size; None: any size.
        """
        super().__init__()
        accept_single_cells(model)
        self.model = model
        self.description = description
        wanted = list(columns) if columns is not None else list(range(1, len(classes) + 1))
        self.register_buffer("columns", torch.tensor(wanted, dtype=torch.int64), persistent=False)
        features, below = pyramids or pyramids_of(model.backbone)
        mean, std = model.transform.image_mean, model.transform.image_std
        self.spec = DetectorSpec(
            name=name,
            family=family,
            classes=tuple(classes),
            channels=features.channels,
            strides=features.strides,
            softmax=softmax,
            mean=tuple(mean),
            std=tuple(std),
            needs_masks=needs_masks,
            fixed_size_hw=fixed_size_hw,
            backbone=below,
            anchors=self.anchors_per_cell(),
            coding=self.dense_coding(),
        )

    def anchors_per_cell(self) -> tuple[int, ...]:
        """Number of dense predictions of one cell, for each level; empty: no dense predictions."""
        return ()

    def dense_coding(self) -> DenseCoding | None:
        """Form of the dense predictions; None: no dense predictions."""
        return None

    def parts(self) -> Parts:
        """Group the modules: the backbone's body, its feature pyramid, the head."""
        return Parts((self.model.backbone.body,), (self.model.backbone.fpn,), (self.model.head,))

    def features(self, batch: Batch) -> Features:
        """Compute the levels of the feature pyramid."""
        levels = self.model.backbone(self.image_list(batch).tensors)
        return with_padding(tuple(levels.values()), self.spec.strides, batch)

    def backbone_features(self, batch: Batch) -> Features:
        """Compute the backbone's maps from which the feature pyramid is built."""
        maps = tuple(backbone_maps(self.model.backbone, self.image_list(batch).tensors).values())
        assert self.spec.backbone is not None
        return with_padding(maps, self.spec.backbone.strides, batch)

    def neck(self, features: Features, batch: Batch) -> Features:
        """Run the feature pyramid on the backbone's maps."""
        levels = self.model.backbone.fpn(pyramid_maps(self.model.backbone, features.maps))
        return with_padding(tuple(levels.values()), self.spec.strides, batch)

    def image_list(self, batch: Batch) -> ImageList:
        """Return the normalised and padded images in the form that the model's own transform returns."""
        images = self.normalized(batch)
        return ImageList(padded(images, self.model.transform.size_divisible), image_sizes(batch))

    def image_shapes(self, batch: Batch) -> ImageList:
        """Return an ``ImageList`` with the sizes of the images but without pixels, for anchors and clipping."""
        divisible = self.model.transform.size_divisible
        height, width = (-(-side // divisible) * divisible for side in batch.padding_hw)
        return ImageList(batch.images.new_empty(()).expand(len(batch), 3, height, width), image_sizes(batch))

    def copy_neck(self, fresh: bool = False) -> Neck:
        """Copy the feature pyramid into a module with parameters of its own; ``fresh``: newly initialised."""
        below = getattr(self.model.backbone, "below", 0)
        neck = Neck(copy.deepcopy(self.model.backbone.fpn), self.spec.strides, below).requires_grad_(True).train()
        if fresh:
            neck.reset()
        return neck

    def without_backbone(self) -> TorchvisionDetector:
        """Copy the head as a detector without backbone and neck; its own parameters are trainable. It cannot compute features."""
        nothing: dict[int, Any] = {id(self.model.backbone): nn.Identity()}
        return copy.deepcopy(self, nothing).requires_grad_(True).train()

    def export(self, folder: Path, resizing: Resizing | None = None) -> None:
        """Write ``model.safetensors`` (torchvision's parameter names), ``model.json`` and the script ``load_student.py``.

        The loaded model resizes images itself if ``resizing`` is given.
        """
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        write_atomically(folder / "model.safetensors", lambda path: save_file(state, path))
        if self.description is None:
            return
        labels: list[str | None] = [None] * (int(self.columns.max()) + 1)
        for label, column in enumerate(self.columns.tolist()):
            labels[column] = self.spec.classes[label]
        images = {} if resizing is None else {"images": resizing.plain()}
        text = json.dumps({"model": self.description, "labels": labels, **images}, indent=1)
        write_atomically(folder / "model.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
        script = Path(load_student.__file__)
        write_atomically(folder / "load_student.py", lambda path: shutil.copyfile(script, path))
        if '"models.' in text:  # no library has this detector: copy its source files
            (folder / "models").mkdir(exist_ok=True)
            for source in sorted((script.parent / "models").glob("*.py")):
                copy_of = partial(shutil.copyfile, source)
                write_atomically(folder / "models" / source.name, copy_of)

    def usage(self, resizing: Resizing | None = None) -> str:
        """Explain ``load_student.py``."""
        if self.description is None:
            return super().usage(resizing)
        if resizing is None:
            return f"{USAGE} It takes images as they are: resize them as in training."
        return f"{USAGE} The model resizes images itself; `load(folder, resize=False)` leaves that out."


USAGE = """```python
import sys

import torch
from torchvision.io import ImageReadMode, decode_image

sys.path.insert(0, "path/to/this/folder")
from load_student import load

model = load("path/to/this/folder")                   # a torchvision detector in eval mode
image = decode_image("image.jpg", ImageReadMode.RGB)  # [3, H, W] uint8; floats in 0..1 can be given too
with torch.no_grad():
    found = model([image])[0]                         # "boxes" [D, 4] x1 y1 x2 y2 in pixels of image, "scores", "labels"
names = [model.classes[label] for label in found["labels"]]
```

This needs torch, torchvision, timm and safetensors."""
"""How to load an exported folder with its script."""


class Neck(nn.Module):
    """A feature pyramid that maps backbone ``Features`` to neck ``Features``."""

    def __init__(self, fpn: nn.Module, strides: tuple[int, ...], below: int = 0) -> None:
        """Store the pyramid; ``below``: number of the backbone's finest maps that do not enter it."""
        super().__init__()
        self.fpn = fpn
        self.strides = strides
        self.below = below

    def forward(self, features: Features) -> Features:
        """Compute the pyramid levels from the backbone's maps."""
        levels = tuple(self.fpn(pyramid_maps(self, features.maps)).values())
        return Features(levels, self.strides, coarser_padding(features, self.strides))

    def reset(self) -> None:
        """Initialise the weights randomly, by torchvision's rules."""
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
