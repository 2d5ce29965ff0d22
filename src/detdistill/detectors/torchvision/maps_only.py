"""Backbones as teachers of feature maps: no classes, no predictions, no training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.contract import Detector, DetectorSpec
from detdistill.errors import ModelError
from detdistill.functional.modes import evaluating
from detdistill.structures import Assignment, Batch, Detections, Features, Losses, Positives, Prediction, Resizing

POWERS = (8, 16, 32)
"""Strides of the pyramids of detectors; a ViT's default is the one nearest to the side of its patches."""


class MapsOnly(Detector):
    """A backbone that outputs feature maps and predicts nothing, so it can only teach methods on maps.

    A plain ViT has one map. It is shown images at its own resolution: a patch sees ``stride`` x ``stride`` pixels of the batch's
    images, which are resized to that end (bilinear, antialiased). So the sides of images need not be multiples of the patch.
    """

    def __init__(
        self,
        body: nn.Module,
        run: Callable[[nn.Module, Tensor], Sequence[Tensor]],
        name: str,
        *,
        patch: int | None = None,
        stride: int | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        """Measure channels and strides of the maps by a run on an empty image.

        Args:
            body: the backbone.
            run: ``(body, images) -> maps`` [B, C, h, w], finest first.
            name: model string.
            patch: side of a plain ViT's patches in pixels; None: another kind of network, which is shown the images as they are.
            stride: pixels of the batch's images that a patch sees; None: the nearest of ``POWERS``. Only with ``patch``.
            mean: mean of the image normalisation.
            std: standard deviation of the image normalisation.

        Raises:
            ModelError: the body outputs no maps.
        """
        super().__init__()
        self.body, self.run, self.patch = body, run, patch
        self.stride = None if patch is None else stride or min(POWERS, key=lambda power: abs(power - patch))
        (mean_r, mean_g, mean_b), (std_r, std_g, std_b) = mean, std
        self.spec = DetectorSpec(
            name, "features", (), channels=(), strides=(), mean=(mean_r, mean_g, mean_b), std=(std_r, std_g, std_b)
        )
        channels, strides = self._measured()
        self.spec = DetectorSpec(name, "features", (), channels, strides, mean=self.spec.mean, std=self.spec.std)

    @torch.no_grad()
    def _measured(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        side = 128 if self.patch is None else 2 * self.patch
        like = next(self.body.parameters(), torch.empty(0))
        with evaluating(self.body):
            try:
                maps = self.run(self.body, torch.zeros(1, 3, side, side, device=like.device, dtype=like.dtype))
            except Exception as error:  # libraries raise whatever a network does
                raise ModelError(f"{self.spec.name}: outputs no maps: {_first_line(error)}") from error
        if not maps or any(not isinstance(level, Tensor) or level.ndim != 4 for level in maps):
            raise ModelError(f"{self.spec.name}: outputs no maps [B, C, H, W], so it cannot teach")
        strides = (self.stride,) if self.stride is not None else tuple(side // level.shape[-1] for level in maps)
        return tuple(level.shape[1] for level in maps), strides

    def shown(self, images: Tensor) -> Tensor:
        """The images [B, 3, H, W] as the network sees them: those of a ViT are resized to whole patches."""
        if self.patch is None or self.stride is None:
            return images
        size = [max(1, round(side / self.stride)) * self.patch for side in images.shape[-2:]]
        if size == list(images.shape[-2:]):
            return images
        return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)

    def features(self, batch: Batch) -> Features:
        """Run the backbone; a cell is padding if its first pixel is padding."""
        maps = tuple(self.run(self.body, self.shown(self.normalized(batch))))
        return Features(maps, self.spec.strides, _padding(maps, batch))

    def predict(self, features: Features, batch: Batch) -> Prediction:
        """Raise ``ModelError``."""
        self._refuse()

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Raise ``ModelError``."""
        self._refuse()

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Raise ``ModelError``."""
        self._refuse()

    def detect(self, prediction: Prediction, batch: Batch) -> list[Detections]:
        """Raise ``ModelError``."""
        self._refuse()

    def positives(self, prediction: Prediction, assignment: Assignment, batch: Batch) -> Positives:
        """Raise ``ModelError``."""
        self._refuse()

    def export(self, folder: Path, resizing: Resizing | None = None) -> None:
        """Raise ``ModelError``."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ModelError(f"{self.spec.name} is a backbone that outputs feature maps and predicts nothing; it can only teach")


def refuse_student(name: str) -> NoReturn:
    """Refuse to build a student.

    Raises:
        ModelError: always.
    """
    raise ModelError(
        f"{name} is a backbone without a head, which can only teach (--teacher); for a student name a detector on a backbone, "
        f"e.g. fcos:resnet18"
    )


def _padding(maps: Sequence[Tensor], batch: Batch) -> tuple[Tensor, ...] | None:
    """Masks [B, H, W] of the cells whose first pixel is padding; None if there are none. Cells divide the padded image evenly."""
    height, width = batch.padding_hw
    if all(view.size_hw == (height, width) for view in batch.views):
        return None
    masks = []
    for level in maps:
        rows, columns = (torch.arange(count, device=level.device) for count in level.shape[-2:])
        below = rows[None, :, None] * (height / len(rows)) >= batch.sizes[:, 0, None, None]
        right = columns[None, None, :] * (width / len(columns)) >= batch.sizes[:, 1, None, None]
        masks.append(below | right)
    return tuple(masks) if any(bool(mask.any()) for mask in masks) else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
