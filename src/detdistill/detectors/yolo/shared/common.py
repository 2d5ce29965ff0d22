"""Parts that the YOLO networks of all packages share: grey padding, cells, objects of positives, detections, output names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detdistill.structures import Batch, Dense, Detections, Origin

GREY = 114 / 255
"""Colour of the padding, as in the packages' letterboxes."""
DESCRIPTION = "network.json"
"""File of a student folder: the description that the package builds the network from, the classes, and the options."""


def grey_padded(batch: Batch, divisible: int) -> Tensor:
    """[B, 3, H, W] images in 0..1 whose padding is grey, padded at the right and bottom to a multiple of ``divisible``."""
    images = batch.images
    below, right = (-side % divisible for side in images.shape[-2:])
    if any(view.size_hw != batch.padding_hw for view in batch.views):
        images = images.masked_fill(batch.padding_mask()[:, None], GREY)
    return nn.functional.pad(images, (0, right, 0, below), value=GREY) if below or right else images


def points_of(levels: Tensor, cells: Tensor, strides: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Centre [P, 2] (x, y, in cells) and stride [P, 1] of each prediction, in the type of ``like``.

    Args:
        levels: [P] level of each prediction.
        cells: [P, 2] row and column of each prediction.
        strides: stride of each level.
        like: a tensor of the wanted type and device.
    """
    return cells.flip(1).to(like.dtype) + 0.5, like.new_tensor(strides)[levels][:, None]


def objects_of(batch: Batch, image: Tensor, matched: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Label [M] and box [M, 4] of the object of each positive, from its image [M] and the object's number there [M]."""
    before = torch.tensor([0, *(len(target) for target in batch.targets)], device=matched.device).cumsum(0)
    rows = before[image] + matched
    labels = torch.cat([target.labels for target in batch.targets])
    return labels[rows], torch.cat([target.boxes_xyxy for target in batch.targets])[rows].to(dtype)


def detections_at(
    boxes: Tensor, scores: Tensor, labels: Tensor, index: Tensor, image: int, dense: Dense, size: tuple[int, int]
) -> Detections:
    """Detections with their origin, clipped to the image.

    Args:
        boxes: [D, 4] in pixels.
        scores: [D].
        labels: [D].
        index: [D] the prediction of each detection.
        image: its number in the batch.
        dense: the predictions.
        size: height and width of the image.
    """
    height, width = size
    limit = boxes.new_tensor([width, height, width, height])
    place = dense.levels[index], dense.cells[index], dense.anchors[index]
    origin = Origin(torch.full_like(index, image), *place, torch.full_like(index, -1))
    return Detections(torch.minimum(boxes.clamp(min=0), limit), scores, labels, origin)


def output_names(count: int, columns: Tensor, classes: Sequence[str]) -> list[str]:
    """Class of each of a network's outputs; a number for outputs that the detector ignores."""
    names = [str(index) for index in range(count)]
    for label, column in enumerate(columns.tolist()):
        names[column] = classes[label]
    return names


def reset(network: nn.Module) -> None:
    """Initialise all layers anew, by torch's rules."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.modules.batchnorm._BatchNorm):
            module.reset_parameters()
