"""Feature pyramid of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.structures.base import SHARED, PerImage


@dataclass(frozen=True)
class Features(PerImage):
    """Feature pyramid: maps of the neck (of the encoder in DETR families), or of the backbone."""

    maps: tuple[Tensor, ...]
    """L tensors [B, C_l, H_l, W_l], finest first."""
    strides: tuple[int, ...] = field(metadata=SHARED)
    """Stride of each level in pixels of the image tensor."""
    padding: tuple[Tensor, ...] | None = None
    """L masks [B, H_l, W_l] bool, True where a cell shows padding only; None when nothing is padded."""

    @property
    def channels(self) -> tuple[int, ...]:
        """Number of channels of each level."""
        return tuple(level.shape[1] for level in self.maps)

    def take(self, levels: Sequence[int]) -> Features:
        """The pyramid of the given levels (indices), in the given order."""
        padding = None if self.padding is None else tuple(self.padding[level] for level in levels)
        return Features(tuple(self.maps[level] for level in levels), tuple(self.strides[level] for level in levels), padding)

    def shrunk(self, factor: float, padding_hw: tuple[int, int], sizes: Tensor) -> Self:
        """The pyramid of images that are ``factor`` times larger, on the cells of the smaller images: mean values of the cells.

        A cell of stride s covers s pixels of the larger images, so ``factor`` x ``factor`` of them lie in one of the result
        (antialiased bilinear resampling in between). Cells beyond the maps are 0.

        Args:
            factor: size of the larger images divided by that of the smaller ones, 1 or more.
            padding_hw: padded height and width of the smaller images.
            sizes: [B, 2] valid height and width of the smaller images, from which the padding masks are made.
        """
        maps, masks = [], []
        for level, stride in zip(self.maps, self.strides, strict=True):
            rows, columns = (-(-side // stride) for side in padding_hw)
            small = _shrunk(level, factor)[..., :rows, :columns]
            maps.append(F.pad(small, (0, columns - small.shape[-1], 0, rows - small.shape[-2])))
            row, column = (torch.arange(count, device=level.device) * stride for count in (rows, columns))
            valid = sizes.to(level.device)
            masks.append((row[None, :, None] >= valid[:, 0, None, None]) | (column[None, None, :] >= valid[:, 1, None, None]))
        padded = any(bool(mask.any()) for mask in masks)
        return replace(self, maps=tuple(maps), padding=tuple(masks) if padded else None)

    def split(self, count: int) -> list[Self]:
        """Split into one pyramid for each image; ``padding`` is None for an image that fills its maps."""
        pieces = super().split(count)
        return [piece if _masks_something(piece) else replace(piece, padding=None) for piece in pieces]

    @classmethod
    def stack(cls, pieces: Sequence[Self]) -> Self:
        """Join the pieces of ``split`` again; cells that zero-padding adds to smaller maps are True in ``padding``."""
        joined = super().stack([replace(piece, padding=None) for piece in pieces])
        sizes = {tuple(level.shape[-2:] for level in piece.maps) for piece in pieces}
        if len(sizes) == 1 and all(piece.padding is None for piece in pieces):
            return joined
        padding = []
        for index, level in enumerate(joined.maps):
            mask = torch.ones_like(level[:, 0], dtype=torch.bool)
            first = 0
            for piece in pieces:
                count, _, height, width = piece.maps[index].shape
                mask[first : first + count, :height, :width] = False if piece.padding is None else piece.padding[index]
                first += count
            padding.append(mask)
        return replace(joined, padding=tuple(padding))


def _shrunk(level: Tensor, factor: float) -> Tensor:
    """A map [B, C, H, W] with cells ``factor`` times as large."""
    if factor == int(factor):
        return F.avg_pool2d(level, int(factor), ceil_mode=True, count_include_pad=False)
    return F.interpolate(level, scale_factor=1 / factor, mode="bilinear", align_corners=False, antialias=True)


def _masks_something(features: Features) -> bool:
    return features.padding is not None and any(bool(mask.any()) for mask in features.padding)
