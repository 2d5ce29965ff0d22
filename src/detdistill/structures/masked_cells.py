"""Feature vectors of the cells of a map that a mask selects, as methods with a sparse mask compare them and caches store them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.structures.base import PerImage


@dataclass(frozen=True)
class MaskedCells(PerImage):
    """Feature vectors of the masked cells of one level, flat over the batch: image by image, row by row.

    Shape letters: B images, N masked cells of the whole batch, C channels, H x W cells of the map.
    """

    values: Tensor
    """[N, C] feature vectors."""
    image: Tensor
    """[N] int64 index of the image in the batch."""
    cells: Tensor
    """[N, 2] int64 row and column."""
    map_hw: Tensor
    """[B, 2] int64 rows and columns of each image's map."""
    weights: Tensor | None = None
    """[N] values of the mask at the cells; None: the mask is binary."""

    @staticmethod
    def of(maps: Tensor, mask: Tensor) -> MaskedCells:
        """Take the cells of maps [B, C, H, W] where ``mask`` [B, H, W] is True or, for a mask of numbers, above 0.

        Example:
            >>> cells = MaskedCells.of(torch.arange(4.0).reshape(1, 1, 2, 2), torch.tensor([[[0.0, 0.5], [0.0, 1.0]]]))
            >>> cells.values.flatten().tolist(), cells.cells.tolist(), cells.weights.tolist()
            ([1.0, 3.0], [[0, 1], [1, 1]], [0.5, 1.0])
        """
        image, row, column = torch.nonzero(mask > 0 if mask.is_floating_point() else mask, as_tuple=True)
        map_hw = torch.tensor(maps.shape[-2:], device=maps.device).repeat(len(maps), 1)
        weights = mask[image, row, column] if mask.is_floating_point() else None
        return MaskedCells(maps[image, :, row, column], image, torch.stack([row, column], dim=1), map_hw, weights)

    def __len__(self) -> int:
        return self.image.shape[0]

    def pick(self, maps: Tensor) -> Tensor:
        """The vectors of other maps at the same cells.

        Args:
            maps: [B, D, h, w] maps of the same images, such as the student's; gradient flows. Maps of another size are resized
                first (bilinear, corners not aligned) to the size of the batch's largest masked map.

        Returns:
            [N, D].
        """
        height, width = self.map_hw.amax(dim=0).tolist()
        if maps.shape[-2:] != (height, width):
            maps = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
        row, column = self.cells.unbind(dim=1)
        return maps[self.image, :, row, column]

    def split(self, count: int) -> list[Self]:
        """Split into the cells of each image, with ``image`` 0."""
        pieces = []
        for index in range(count):
            mine = self.image == index
            pieces.append(
                replace(
                    self,
                    values=self.values[mine],
                    image=torch.zeros_like(self.image[mine]),
                    cells=self.cells[mine],
                    map_hw=self.map_hw[index : index + 1],
                    weights=None if self.weights is None else self.weights[mine],
                )
            )
        return pieces

    @classmethod
    def stack(cls, pieces: Sequence[Self]) -> Self:
        """Join the pieces of ``split`` again; ``image`` becomes the index of the piece."""
        weights = [piece.weights for piece in pieces if piece.weights is not None]
        return replace(
            pieces[0],
            values=torch.cat([piece.values for piece in pieces]),
            image=torch.cat([piece.image + index for index, piece in enumerate(pieces)]),
            cells=torch.cat([piece.cells for piece in pieces]),
            map_hw=torch.cat([piece.map_hw for piece in pieces]),
            weights=torch.cat(weights) if weights else None,
        )
