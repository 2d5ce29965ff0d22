"""ATSS: one square anchor for each cell, classes, box deltas and centerness.

Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample Selection",
CVPR 2020; the numbers are the released code's (anchors of 8 strides, deltas in tenths and fifths, NMS at 0.6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .dense import DenseHead, OneStage

DELTA_SCALES = (0.1, 0.1, 0.2, 0.2)
"""What the deltas dx, dy, dw, dh are multiplied by (their standard deviations in the released code)."""
LARGEST_LOG_FACTOR = math.log(1000 / 16)
"""Boxes are at most this much (in logarithms) wider, higher, narrower or lower than their anchor."""


class ATSS(OneStage):
    """Network and inference; score = class score times centerness."""

    def __init__(
        self, backbone: nn.Module, channels: int, num_classes: int, strides: Sequence[int], convs: int = 4, **settings: Any
    ) -> None:
        """Build a head on a backbone.

        Args:
            backbone: maps images to the pyramid's levels.
            channels: of the pyramid.
            num_classes: K, no background.
            strides: of the levels.
            convs: blocks of each tower.
            settings: of ``OneStage``.
        """
        head = DenseHead(channels, num_classes, outputs=4, convs=convs, levels=len(strides), centerness=True)
        super().__init__(backbone, head, strides, **settings)

    def decode(self, regression: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
        """Boxes [..., 4] of deltas dx, dy, dw, dh [..., 4] on anchors [..., 4]."""
        return decode_deltas(regression, anchors)


def decode_deltas(regression: Tensor, anchors: Tensor) -> Tensor:
    """Boxes [..., 4] of deltas dx, dy, dw, dh [..., 4], in ``DELTA_SCALES``, on anchors [..., 4]."""
    deltas = regression * regression.new_tensor(DELTA_SCALES)
    center, size = (anchors[..., :2] + anchors[..., 2:]) * 0.5, anchors[..., 2:] - anchors[..., :2]
    middle = center + size * deltas[..., :2]
    half = size * deltas[..., 2:].clamp(-LARGEST_LOG_FACTOR, LARGEST_LOG_FACTOR).exp() * 0.5
    return torch.cat([middle - half, middle + half], dim=-1)
