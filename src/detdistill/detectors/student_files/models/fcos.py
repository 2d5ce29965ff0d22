"""FCOS with the head of the authors' code: a learnt factor for each level's distances, and scores without a square root.

Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019. Points lie in the middle of their cells.
Distances are exponentials (the paper, section 3.2), or, in the authors' later version, positive numbers of strides; the
centerness comes from the tower of the classes (the paper) or from that of the boxes (later).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .dense import DenseHead, OneStage, flat


class FCOSHead(DenseHead):
    """Two towers, whose convolutions have biases, and their output layers."""

    def __init__(
        self, channels: int, num_classes: int, convs: int, strides: Sequence[int], exponential: bool, from_classes: bool
    ) -> None:
        """Build with random weights.

        Args:
            channels: of the pyramid.
            num_classes: K, no background.
            convs: blocks of each tower.
            strides: of the levels.
            exponential: distances are ``exp(scale * x)`` pixels; else ``relu(scale * x)`` strides.
            from_classes: the centerness is read from the tower of the classes; else from that of the boxes.
        """
        super().__init__(channels, num_classes, 4, convs, len(strides), centerness=True, bias=True)
        self.strides, self.exponential, self.from_classes = tuple(strides), exponential, from_classes

    def outputs(self, class_maps: Sequence[Tensor], box_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """The output layers on the towers' last maps.

        Returns:
            ``cls_logits`` [B, P, K]; ``bbox_regression`` [B, P, 4], distances left, top, right, bottom in strides, not
            negative; ``bbox_ctrness`` [B, P, 1].
        """
        boxes, sides = self.regression_head, []
        for level, scale, stride in zip(box_maps, boxes.scales, self.strides, strict=True):
            raw = boxes.bbox_reg(level) * scale
            sides.append(raw.exp() / stride if self.exponential else raw.relu())
        centerness: Any = boxes.bbox_ctrness
        return {
            "cls_logits": flat([self.classification_head.cls_logits(level) for level in class_maps]),
            "bbox_regression": flat(sides),
            "bbox_ctrness": flat([centerness(level) for level in (class_maps if self.from_classes else box_maps)]),
        }


class FCOS(OneStage):
    """Network and inference; score = class score times centerness. Anchors are squares of one stride around the points."""

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        num_classes: int,
        strides: Sequence[int],
        convs: int = 4,
        exponential: bool = False,
        from_classes: bool = False,
        **settings: Any,
    ) -> None:
        """Build a head on a backbone.

        Args:
            backbone: maps images to the pyramid's levels.
            channels: of the pyramid.
            num_classes: K, no background.
            strides: of the levels.
            convs: blocks of each tower.
            exponential: see ``FCOSHead``.
            from_classes: see ``FCOSHead``.
            settings: of ``OneStage``.
        """
        head = FCOSHead(channels, num_classes, convs, strides, exponential, from_classes)
        super().__init__(backbone, head, strides, anchor_scale=1, **settings)

    def anchors(self, shapes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
        """[P, 4] squares around the middles of the cells."""
        half = [torch.full((height * width, 1), stride / 2) for (height, width), stride in zip(shapes, self.strides, strict=True)]
        return super().anchors(shapes, like) + torch.cat(half).to(like)

    def decode(self, regression: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
        """Boxes [..., P, 4] of distances [..., P, 4] in strides [P]."""
        centers, distances = (anchors[..., :2] + anchors[..., 2:]) * 0.5, regression * strides[:, None]
        return torch.cat([centers - distances[..., :2], centers + distances[..., 2:]], dim=-1)
