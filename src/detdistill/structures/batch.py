"""The input: images, the views they are, and the ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detdistill.structures.base import Movable, map_tensors


@dataclass(frozen=True)
class View:
    """Which version of an image a tensor shows: enough to undo its geometry, and half of the cache's key.

    A pixel ``(x, y)`` of the original lies at ``(x * scale_xy[0] + offset_xy[0], y * scale_xy[1] + offset_xy[1])``;
    after that, if ``flip``, ``x`` becomes ``size_hw[1] - x``.
    """

    original_hw: tuple[int, int]
    size_hw: tuple[int, int]
    scale_xy: tuple[float, float] = (1.0, 1.0)
    offset_xy: tuple[float, float] = (0.0, 0.0)
    flip: bool = False
    photometric: tuple[float, ...] = ()
    """Factors of brightness, contrast, saturation and hue; empty when the colours are the file's."""
    mosaic: tuple[int, ...] = ()
    """Ids of the images that make up a mosaic; empty for a single image. A mosaic has no way back."""

    @property
    def key(self) -> str:
        """A short text, equal for equal views of one image."""
        parts = [f"{self.size_hw[0]}x{self.size_hw[1]}"]
        if self.scale_xy != (1.0, 1.0) or self.offset_xy != (0.0, 0.0):
            parts.append(",".join(f"{number:.6g}" for number in (*self.scale_xy, *self.offset_xy)))
        if self.flip:
            parts.append("flip")
        if self.photometric:
            parts.append("photo" + ",".join(f"{number:.4g}" for number in self.photometric))
        if self.mosaic:
            parts.append("mosaic" + ",".join(map(str, self.mosaic)))
        return "-".join(parts)

    def to_original(self, boxes_xyxy: Tensor) -> Tensor:
        """Boxes ``[N, 4]`` in pixels of this view, in pixels of the original image (not clipped).

        Raises:
            ValueError: the view is a mosaic, which has no single original.
        """
        if self.mosaic:
            raise ValueError("a mosaic has no single original image; evaluate on plain views")
        x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
        if self.flip:
            x1, x2 = self.size_hw[1] - x2, self.size_hw[1] - x1
        (scale_x, scale_y), (offset_x, offset_y) = self.scale_xy, self.offset_xy
        columns = ((x1 - offset_x) / scale_x, (y1 - offset_y) / scale_y, (x2 - offset_x) / scale_x, (y2 - offset_y) / scale_y)
        return torch.stack(columns, dim=-1)


@dataclass(frozen=True)
class Target(Movable):
    """Ground truth of one image."""

    boxes_xyxy: Tensor
    """[G, 4] float, pixels of the batch's image tensor."""
    labels: Tensor
    """[G] int64, 0 .. K-1."""
    crowd: Tensor
    """[G] bool; crowd boxes are ignored by training and handled by COCO's rule in evaluation."""
    masks: Tensor | None = None
    """[G, H, W] bool, when the data has masks and the detector wants them."""

    def __len__(self) -> int:
        return self.boxes_xyxy.shape[0]

    def without_crowd(self) -> Target:
        """The boxes that training may use."""
        if not bool(self.crowd.any()):
            return self
        return map_tensors(self, lambda tensor: tensor[~self.crowd])


@dataclass(frozen=True)
class Batch(Movable):
    """What detectors and methods are given: images and all that belongs to them."""

    images: Tensor
    """[B, 3, H, W] RGB in 0..1, zero-padded on the right and at the bottom, NOT normalised."""
    sizes: Tensor
    """[B, 2] int64: valid height and width of each image inside the padding."""
    targets: tuple[Target, ...]
    ids: tuple[int, ...]
    """Image ids as in the data set's annotations."""
    views: tuple[View, ...]
    canvases_hw: tuple[tuple[int, int], ...] | None = None
    """Height and width that each image would be padded to in a batch of its own; None: those of ``images`` for all."""

    def __len__(self) -> int:
        return self.images.shape[0]

    def by_canvas(self) -> list[tuple[list[int], Batch]]:
        """The images (their indices) and a batch for each canvas, on which nothing shows what else was in this batch."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, canvas in enumerate(self.canvases_hw or [self.padding_hw] * len(self)):
            groups.setdefault(canvas, []).append(index)
        if list(groups) == [self.padding_hw]:
            return [(groups[self.padding_hw], self)]
        return [(chosen, self._on_canvas(chosen, canvas)) for canvas, chosen in groups.items()]

    def _on_canvas(self, chosen: Sequence[int], canvas_hw: tuple[int, int]) -> Batch:
        height, width = canvas_hw
        targets = [self.targets[index] for index in chosen]
        masks = [None if target.masks is None else target.masks[:, :height, :width] for target in targets]
        return Batch(
            self.images[list(chosen), :, :height, :width],
            self.sizes[list(chosen)],
            tuple(replace(target, masks=mask) for target, mask in zip(targets, masks, strict=True)),
            tuple(self.ids[index] for index in chosen),
            tuple(self.views[index] for index in chosen),
        )

    def with_targets(self, targets: Sequence[Target]) -> Batch:
        """The same images with other boxes (SSD-Det refines them inside the step).

        Raises:
            ValueError: not one target for each image.
        """
        if len(targets) != len(self):
            raise ValueError(f"with_targets: {len(self)} images need {len(self)} targets, got {len(targets)}")
        return replace(self, targets=tuple(targets))

    @property
    def padding_hw(self) -> tuple[int, int]:
        """Height and width of the padded tensor."""
        return self.images.shape[-2], self.images.shape[-1]

    def padding_mask(self) -> Tensor:
        """[B, H, W] bool, True where the pixel is padding."""
        height, width = self.padding_hw
        rows = torch.arange(height, device=self.images.device)[None, :, None] >= self.sizes[:, 0, None, None]
        columns = torch.arange(width, device=self.images.device)[None, None, :] >= self.sizes[:, 1, None, None]
        return rows | columns
