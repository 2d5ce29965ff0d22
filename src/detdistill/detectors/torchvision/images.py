"""Image sizes, padding and backbone maps in the form that torchvision's detectors use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detdistill.detectors.contract import Pyramid
from detdistill.detectors.student_files.load_student import TimmPyramid
from detdistill.errors import ModelError
from detdistill.functional.modes import evaluating
from detdistill.structures import Batch, Features


def image_sizes(batch: Batch) -> list[tuple[int, int]]:
    """Return the valid height and width of each image, in pixels."""
    return [(int(height), int(width)) for height, width in batch.sizes.tolist()]


def padded(images: Tensor, divisible: int) -> Tensor:
    """Pad images [B, 3, H, W] with zeros on the right and at the bottom to a multiple of ``divisible``."""
    below, right = (-side % divisible for side in images.shape[-2:])
    return nn.functional.pad(images, (0, right, 0, below)) if below or right else images


def with_padding(maps: tuple[Tensor, ...], strides: tuple[int, ...], batch: Batch) -> Features:
    """Build ``Features`` with padding masks: a cell is padding if its first pixel is padding. No masks without padded cells."""
    if all(
        level.shape[-2] * stride <= height and level.shape[-1] * stride <= width
        for level, stride in zip(maps, strides, strict=True)
        for height, width in image_sizes(batch)
    ):
        return Features(maps, strides)
    masks = []
    for level, stride in zip(maps, strides, strict=True):
        rows = torch.arange(level.shape[-2], device=level.device)[None, :, None] * stride
        columns = torch.arange(level.shape[-1], device=level.device)[None, None, :] * stride
        masks.append((rows >= batch.sizes[:, 0, None, None]) | (columns >= batch.sizes[:, 1, None, None]))
    return Features(maps, strides, tuple(masks) if any(bool(mask.any()) for mask in masks) else None)


def coarser_padding(features: Features, strides: tuple[int, ...]) -> tuple[Tensor, ...] | None:
    """Padding masks of levels with other strides: a coarse cell is padding if its first cell on the finest map is padding."""
    if features.padding is None:
        return None
    finest, stride = features.padding[0], features.strides[0]
    return tuple(finest[:, :: own // stride, :: own // stride] for own in strides)


def backbone_maps(backbone: Any, images: Tensor) -> Mapping[str, Tensor]:
    """Compute the maps of the backbone's body, for a ``TimmPyramid`` or torchvision's ``BackboneWithFPN``."""
    return backbone.maps(images) if isinstance(backbone, TimmPyramid) else backbone.body(images)


def pyramid_maps(backbone: Any, maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Those of the backbone's maps that its feature pyramid is built from, by number as text."""
    return {str(index): level for index, level in enumerate(maps[getattr(backbone, "below", 0) :])}


@torch.no_grad()
def pyramids_of(backbone: Any, size: int = 256) -> tuple[Pyramid, Pyramid | None]:
    """Determine channels and strides of the feature pyramid and of the backbone's maps by a run on an empty image.

    Statistics of normalisation layers stay unchanged.

    Args:
        backbone: torchvision's backbone, usually with ``body`` and ``fpn``.
        size: side of the image in pixels.

    Returns:
        The feature pyramid, and the pyramid of the backbone's maps (None if the backbone has no ``body`` and ``fpn``).

    Raises:
        ModelError: the backbone does not return a dictionary of maps.
    """
    parameter = next(backbone.parameters())
    image = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
    with evaluating(backbone):
        apart = hasattr(backbone, "body") and hasattr(backbone, "fpn")
        below = backbone_maps(backbone, image) if apart else None
        levels = backbone(image) if below is None else backbone.fpn(pyramid_maps(backbone, list(below.values())))
    if not isinstance(levels, Mapping):
        raise ModelError("the backbone must return a dictionary of maps, as torchvision's BackboneWithFPN does")
    return _pyramid(levels, size), None if below is None else _pyramid(below, size)


def _pyramid(maps: Mapping[str, Tensor], size: int) -> Pyramid:
    return Pyramid(tuple(level.shape[1] for level in maps.values()), tuple(size // level.shape[-1] for level in maps.values()))
