"""RepPoints: a box as nine points, found twice.

Yang et al., "RepPoints: Point Set Representation for Object Detection", ICCV 2019: version 1, with the moment transform. All
numbers are those of the released code.

A cell's first nine points come from its features. Deformable convolutions then look at just these places, for the class and
for a correction of the points. Points are counted in strides from the cell's corner ``(column * stride, row * stride)``.

Shape letters: B images, L levels, P predictions of an image (one for each cell), C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .dense import DeformableConv, OneStage, flat, reset, tower

NUM_POINTS = 9
"""As many as a 3x3 convolution has taps."""


def points_to_boxes(points: Tensor, centers_xy: Tensor, strides: Tensor, moment: Tensor, gradient_share: float = 0.01) -> Tensor:
    """The moment transform: mean and deviation of the points are centre and, up to a factor, half the sides of the box.

    ``half width = std(x) * exp(moment[0])``, ``half height = std(y) * exp(moment[1])`` with the unbiased deviation.

    Args:
        points: [..., P, 18] nine pairs (y, x) in strides from the centre; gradient flows.
        centers_xy: [..., P, 2] pixels.
        strides: [P].
        moment: [2] learned, shared by all boxes.
        gradient_share: part of its gradient that reaches ``moment``.

    Returns:
        [..., P, 4] xyxy in pixels.

    Example:
        >>> square = torch.tensor([[-1.0, -1, -1, 0, -1, 1, 0, -1, 0, 0, 0, 1, 1, -1, 1, 0, 1, 1]])
        >>> points_to_boxes(square, torch.tensor([[16.0, 8.0]]), torch.tensor([8]), torch.zeros(2)).round(decimals=2)
        tensor([[ 9.0700,  1.0700, 22.9300, 14.9300]])
    """
    y, x = points.unflatten(-1, (-1, 2)).unbind(dim=-1)  # [..., P, 9] each
    moment = gradient_share * moment + (1 - gradient_share) * moment.detach()
    center = torch.stack([x.mean(dim=-1), y.mean(dim=-1)], dim=-1)
    half = torch.stack([x.std(dim=-1), y.std(dim=-1)], dim=-1) * moment.exp()
    scale = strides[:, None]
    return torch.cat([centers_xy + (center - half) * scale, centers_xy + (center + half) * scale], dim=-1)


class ClassificationHead(nn.Module):
    """A tower (``conv``), a look at the points (``deformable``), one logit for each class (``cls_logits``); no background."""

    def __init__(self, channels: int, num_classes: int, convs: int, norm: bool) -> None:
        super().__init__()
        self.num_classes, self.num_anchors = num_classes, 1
        self.conv = tower(channels, convs) if norm else plain_tower(channels, convs)
        self.deformable = DeformableConv(channels)
        self.cls_logits = nn.Conv2d(channels, num_classes, 1)


class PointHead(nn.Module):
    """A tower (``conv``), the first points (``first_conv``, ``first_points``), and their correction after a look at them."""

    def __init__(self, channels: int, convs: int, norm: bool) -> None:
        super().__init__()
        self.conv = tower(channels, convs) if norm else plain_tower(channels, convs)
        self.first_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.first_points = nn.Conv2d(channels, 2 * NUM_POINTS, 1)
        self.deformable = DeformableConv(channels)
        self.correction = nn.Conv2d(channels, 2 * NUM_POINTS, 1)


class RepPointsHead(nn.Module):
    """Classes and points of every cell, the same weights for all levels."""

    offset_gradient = 0.1
    """Part of the gradient that passes from the deformable convolutions into the first points."""
    moment_gradient = 0.01
    """Part of the gradient that reaches the moment factors."""

    def __init__(self, channels: int, num_classes: int, convs: int = 3, norm: bool = True) -> None:
        """Build with random weights.

        Args:
            channels: of the pyramid.
            num_classes: K, no background.
            convs: blocks of each tower.
            norm: GroupNorm in the towers.
        """
        super().__init__()
        self.classification_head = ClassificationHead(channels, num_classes, convs, norm)
        self.regression_head = PointHead(channels, convs, norm)
        self.moment = nn.Parameter(torch.zeros(2))
        rows, columns = torch.meshgrid(torch.arange(-1.0, 2), torch.arange(-1.0, 2), indexing="ij")
        taps = torch.stack([rows.flatten(), columns.flatten()], dim=1).flatten()
        self.register_buffer("taps", taps.view(1, -1, 1, 1), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Draw all weights: normal of deviation 0.01; class scores begin at 0.01, moment factors at 0."""
        reset(self)
        nn.init.constant_(cast(Tensor, self.classification_head.cls_logits.bias), -math.log(0.99 / 0.01))
        nn.init.zeros_(self.moment)

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """As ``outputs``, from the pyramid's maps [B, C, H_l, W_l]."""
        classification, regression = self.classification_head.conv, self.regression_head.conv
        return self.outputs([classification(level) for level in maps], [regression(level) for level in maps])

    def outputs(self, class_maps: Sequence[Tensor], box_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """The layers after the towers.

        Returns:
            ``cls_logits`` [B, P, K]; ``bbox_regression`` [B, P, 18] the refined points; ``first_points`` [B, P, 18]. Points are
            pairs (y, x) in strides from the cell's corner.
        """
        logits, refined, first = [], [], []
        classes, points = self.classification_head, self.regression_head
        for class_map, box_map in zip(class_maps, box_maps, strict=True):
            found = points.first_points(points.first_conv(box_map).relu())  # [B, 18, H_l, W_l]
            offset = self.offset_gradient * found + (1 - self.offset_gradient) * found.detach() - self.taps
            logits.append(classes.cls_logits(classes.deformable(class_map, offset).relu()))
            refined.append(points.correction(points.deformable(box_map, offset).relu()) + found.detach())
            first.append(found)
        return {"cls_logits": flat(logits), "bbox_regression": flat(refined), "first_points": flat(first)}


def plain_tower(channels: int, convs: int) -> nn.Sequential:
    """``convs`` blocks of 3x3 convolution and ReLU."""
    blocks = (nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True)) for _ in range(convs))
    return nn.Sequential(*blocks)


class RepPoints(OneStage):
    """The detector. Its anchors are squares of one stride around the cells' corners: only their centres matter."""

    head: RepPointsHead

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        strides: Sequence[int],
        channels: int,
        convs: int = 3,
        norm: bool = True,
        nms_thresh: float = 0.5,
        **settings: object,
    ) -> None:
        """Build with random weights.

        Args:
            backbone: maps images to an ordered dictionary of the pyramid's levels.
            num_classes: K, no background.
            strides: of the levels.
            channels: of the pyramid.
            convs: blocks of each tower.
            norm: GroupNorm in the towers.
            nms_thresh: IoU from which the lower of two boxes of a class falls away.
            settings: of ``OneStage``.
        """
        head = RepPointsHead(channels, num_classes, convs, norm)
        super().__init__(backbone, head, strides, anchor_scale=1, nms_thresh=nms_thresh, **settings)  # type: ignore[arg-type]

    def decode(self, regression: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
        """Boxes [B, P, 4] in pixels of points [B, P, 18]."""
        centers = (anchors[..., :2] + anchors[..., 2:]) / 2
        return points_to_boxes(regression, centers, strides, self.head.moment, self.head.moment_gradient)
