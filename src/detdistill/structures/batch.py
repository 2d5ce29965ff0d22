"""Input of detectors and methods: ``Batch`` (images), ``View`` (how an image was made) and ``Target`` (ground truth)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detdistill.structures.base import Movable, map_tensors


@dataclass(frozen=True)
class View:
    """Resize, shift, flip and colour change that made a batch's image from the original; with the image id, a cache's key.

    A point ``(x, y)`` of the original lies at ``(x * scale_xy[0] + offset_xy[0], y * scale_xy[1] + offset_xy[1])``.
    If ``flip``, ``x`` then becomes ``size_hw[1] - x``.
    """

    original_hw: tuple[int, int]
    size_hw: tuple[int, int]
    scale_xy: tuple[float, float] = (1.0, 1.0)
    offset_xy: tuple[float, float] = (0.0, 0.0)
    flip: bool = False
    photometric: tuple[float, ...] = ()
    """Factors of brightness, contrast, saturation and hue; empty when the colours are unchanged."""
    mosaic: tuple[int, ...] = ()
    """Ids of the images that make up a mosaic; empty for a single image. ``to_original`` does not support mosaics."""

    @property
    def key(self) -> str:
        """A short text that is equal for equal views of the same image."""
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
        """Map boxes ``[N, 4]`` from pixels of this view to pixels of the original image, without clipping.

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
    """[G] bool; training ignores crowd boxes, and evaluation handles them by COCO's rule."""
    masks: Tensor | None = None
    """[G, H, W] bool if the data has masks and the detector uses them, else None."""
    scores: Tensor | None = None
    """[G] float, 0..1: what each box counts in the detection loss, the score of the model that labelled it; None: 1 for all."""

    def __len__(self) -> int:
        return self.boxes_xyxy.shape[0]

    def without_crowd(self) -> Target:
        """The ground truth without crowd boxes, which training must not use."""
        if not bool(self.crowd.any()):
            return self
        return map_tensors(self, lambda tensor: tensor[~self.crowd])


@dataclass(frozen=True)
class Batch(Movable):
    """A batch of images with their sizes, targets, ids and views: the input of detectors and methods."""

    images: Tensor
    """[B, 3, H, W] RGB in 0..1, zero-padded on the right and at the bottom, NOT normalised."""
    sizes: Tensor
    """[B, 2] int64: valid height and width of each image inside the padding."""
    targets: tuple[Target, ...]
    ids: tuple[int, ...]
    """Image ids as in the data set's annotations."""
    views: tuple[View, ...]
    canvases_hw: tuple[tuple[int, int], ...] | None = None
    """Padded height and width that each image would have in a batch of its own. None: the padded size of ``images`` for all."""
    large: Batch | None = None
    """The same views at the teacher's own size (``--teacher_size``). None: the teacher sees this batch."""
    enlarged: float = 1.0
    """Size of the views in ``large`` divided by that of the views here."""

    def __len__(self) -> int:
        return self.images.shape[0]

    def by_canvas(self) -> list[tuple[list[int], Batch]]:
        """Group the images by canvas: the indices of each group, and a batch of them padded to that canvas only.

        Computed from such a group, a teacher's output for an image does not depend on the other images of this batch. The images
        of a group have the same canvas in ``large``, too.
        """
        mine = self.canvases_hw or (self.padding_hw,) * len(self)
        theirs = mine if self.large is None else self.large.canvases_hw or (self.large.padding_hw,) * len(self)
        groups: dict[tuple[tuple[int, int], tuple[int, int]], list[int]] = {}
        for index, canvases in enumerate(zip(mine, theirs, strict=True)):
            groups.setdefault(canvases, []).append(index)
        if list(groups) == [(self.padding_hw, self.padding_hw if self.large is None else self.large.padding_hw)]:
            return [(list(range(len(self))), self)]
        found = []
        for (canvas, large_canvas), chosen in groups.items():
            part = self._on_canvas(chosen, canvas)
            if self.large is not None:
                part = replace(part, large=self.large._on_canvas(chosen, large_canvas), enlarged=self.enlarged)
            found.append((chosen, part))
        return found

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
        """The same images with other ground truth (SSD-Det refines boxes inside a training step).

        Raises:
            ValueError: the number of targets differs from the number of images.
        """
        if len(targets) != len(self):
            raise ValueError(f"with_targets: {len(self)} images need {len(self)} targets, got {len(targets)}")
        return replace(self, targets=tuple(targets))

    @property
    def padding_hw(self) -> tuple[int, int]:
        """Height and width of the padded image tensor."""
        return self.images.shape[-2], self.images.shape[-1]

    def padding_mask(self) -> Tensor:
        """[B, H, W] bool, True where the pixel is padding."""
        height, width = self.padding_hw
        rows = torch.arange(height, device=self.images.device)[None, :, None] >= self.sizes[:, 0, None, None]
        columns = torch.arange(width, device=self.images.device)[None, None, :] >= self.sizes[:, 1, None, None]
        return rows | columns
