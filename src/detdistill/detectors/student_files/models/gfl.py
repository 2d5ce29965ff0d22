"""GFL: classes that carry the box's quality, and each box side as a distribution of distances.

Li et al., "Generalized Focal Loss", NeurIPS 2020 (version 1); the numbers are the released code's (distances 0 to 16
strides in 17 bins, NMS at 0.6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .dense import DenseHead, OneStage


class GFL(OneStage):
    """Network and inference; the class score is the final score."""

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        num_classes: int,
        strides: Sequence[int],
        convs: int = 4,
        reg_max: int = 16,
        **settings: Any,
    ) -> None:
        """Build a head on a backbone.

        Args:
            backbone: maps images to the pyramid's levels.
            channels: of the pyramid.
            num_classes: K, no background.
            strides: of the levels.
            convs: blocks of each tower.
            reg_max: largest distance in strides; a side has ``reg_max + 1`` bins.
            settings: of ``OneStage``.
        """
        head = DenseHead(channels, num_classes, outputs=4 * (reg_max + 1), convs=convs, levels=len(strides))
        super().__init__(backbone, head, strides, **settings)
        self.reg_max = reg_max

    def decode(self, regression: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
        """Boxes [..., P, 4] of distributions [..., P, 4 * (reg_max + 1)]: left, top, right, bottom from the anchor's centre.

        A side's distance is the mean of its distribution, in strides [P].
        """
        bins = torch.arange(self.reg_max + 1, dtype=regression.dtype, device=regression.device)
        # not a matrix product: autocast would make that half precision
        distances = (regression.unflatten(-1, (4, -1)).softmax(dim=-1) * bins).sum(dim=-1) * strides[:, None]
        centers = (anchors[..., :2] + anchors[..., 2:]) * 0.5
        return torch.cat([centers - distances[..., :2], centers + distances[..., 2:]], dim=-1)
