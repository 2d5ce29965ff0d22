"""Inputs of the comparisons: maps, predictions and boxes of a COCO-size batch, the same in every process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRIDES = (8, 16, 32, 64, 128)
SIZE = (800, 1088)
"""Height and width of the padded images in pixels."""
CHANNELS = 256
IMAGES = 2
CLASSES = 80


@dataclass(frozen=True)
class Maps:
    """A batch with maps of student and teacher."""

    student: list[Tensor]
    """[2, 256, H, W] of each level, with gradient."""
    teacher: list[Tensor]
    boxes: list[Tensor]
    """[10, 4] pixels, for each image."""
    labels: list[Tensor]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of each level."""
        return [(level.shape[2], level.shape[3]) for level in self.teacher]

    @property
    def metas(self) -> list[dict[str, tuple[int, int, int]]]:
        """What mmdet calls ``img_metas``."""
        return [{"img_shape": (*SIZE, 3), "pad_shape": (*SIZE, 3), "ori_shape": (*SIZE, 3)}] * IMAGES


def maps(channels: int = CHANNELS) -> Maps:
    """Draw maps and boxes; sides of the boxes are 20 to 400 pixels."""
    torch.manual_seed(0)
    shapes = [(IMAGES, channels, -(-SIZE[0] // stride), -(-SIZE[1] // stride)) for stride in STRIDES]
    student = [torch.randn(shape, requires_grad=True) for shape in shapes]
    teacher = [torch.randn(shape) for shape in shapes]
    boxes = []
    for _ in range(IMAGES):
        sides = 20 * 20 ** torch.rand(10, 2)
        corner = torch.rand(10, 2) * (torch.tensor([SIZE[1], SIZE[0]]) - sides)
        boxes.append(torch.cat([corner, corner + sides], dim=1))
    return Maps(student, teacher, boxes, [torch.randint(0, CLASSES, (10,)) for _ in boxes])


def level_logits(channels: int, scale: float = 1.0, shift: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of two dense heads: [2, channels, H, W] of each level, the student's with gradient."""
    torch.manual_seed(1)
    shapes = [(IMAGES, channels, -(-SIZE[0] // stride), -(-SIZE[1] // stride)) for stride in STRIDES]
    student = [(torch.randn(shape) * scale + shift).requires_grad_() for shape in shapes]
    return student, [torch.randn(shape) * scale + shift for shape in shapes]


def flat(levels: list[Tensor], numbers: int) -> Tensor:
    """Maps [B, A * R, H, W] of all levels -> [B, P, R], as our detectors order predictions."""
    return torch.cat([level.permute(0, 2, 3, 1).reshape(len(level), -1, numbers) for level in levels], dim=1)
