"""A pyramid of maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from detdistill.structures.base import SHARED, PerImage


@dataclass(frozen=True)
class Features(PerImage):
    """A pyramid: the neck's maps (DETR families: the encoder's), or the backbone's."""

    maps: tuple[Tensor, ...]
    """L tensors [B, C_l, H_l, W_l], finest first."""
    strides: tuple[int, ...] = field(metadata=SHARED)
    """Pixels of the image tensor for one step on each map."""
    padding: tuple[Tensor, ...] | None = None
    """L masks [B, H_l, W_l] bool, True where a cell shows padding only; None when nothing is padded."""

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each map."""
        return tuple(level.shape[1] for level in self.maps)

    def take(self, levels: Sequence[int]) -> Features:
        """The pyramid of some levels (indices), in the order given."""
        padding = None if self.padding is None else tuple(self.padding[level] for level in levels)
        return Features(tuple(self.maps[level] for level in levels), tuple(self.strides[level] for level in levels), padding)

    def split(self, count: int) -> list[Self]:
        """One pyramid for each image; without masks where the image fills its maps, whatever the others do."""
        pieces = super().split(count)
        return [piece if _masks_something(piece) else replace(piece, padding=None) for piece in pieces]

    @classmethod
    def stack(cls, pieces: Sequence[Self]) -> Self:
        """The inverse of ``split``; where maps of different sizes are zero-padded, the mask says so."""
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


def _masks_something(features: Features) -> bool:
    return features.padding is not None and any(bool(mask.any()) for mask in features.padding)
