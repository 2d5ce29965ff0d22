"""The ``Taught`` of DeFeat, and the regions that a teacher of two stages would be trained on.

Shape letters: B images, R regions of an image, K classes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detdistill.detectors.contract import HasRegions
from detdistill.functional.regions import sample_regions
from detdistill.structures import Batch, Features, Observation, PerImage, Regions, Taught


@dataclass(frozen=True)
class TaughtRegions(PerImage):
    """Regions of the teacher's first stage, and the teacher's class scores for them."""

    boxes_xyxy: Tensor
    """[B, R, 4] in pixels; images with fewer regions are filled up with zeros."""
    logits: Tensor
    """[B, R, K+1] softmax logits, background last."""
    foreground: Tensor
    """[B, R] bool: the region is matched to an object."""
    count: Tensor
    """[B] int64 number of regions."""

    def boxes(self) -> list[Tensor]:
        """The regions [R_b, 4] of each image, without filling."""
        return [boxes[:count] for boxes, count in zip(self.boxes_xyxy, self.count.tolist(), strict=True)]

    def flat(self) -> tuple[Tensor, Tensor]:
        """Logits and foreground of the regions of all images, without filling."""
        there = torch.arange(self.logits.shape[1], device=self.count.device) < self.count[:, None]
        return self.logits[there], self.foreground[there]


@dataclass(frozen=True)
class DeFeatTaught(Taught):
    """The teacher's maps, and what its head predicts."""

    seen: Observation
    """Maps of the neck; with ``backbone`` those of the backbone; with ``head=cells`` the prediction."""
    regions: TaughtRegions | None = None
    """With ``head=regions``, unless the regions are the student's."""


def teacher_regions(detector: HasRegions, features: Features, batch: Batch, count: int) -> TaughtRegions:
    """Sample regions as for the training of a second stage, and run the teacher's head on them.

    Up to a quarter of the regions overlap an object by at least 0.5; the objects themselves are among the candidates. Random
    numbers are seeded by image id and view.

    Args:
        detector: the teacher.
        features: its neck's maps.
        batch: images with ground truth.
        count: number of regions of an image, if there are so many.
    """
    proposals, origins = detector.proposals(features, batch)
    boxes: list[Tensor] = []
    matched: list[Tensor] = []
    for image, (number, view) in enumerate(zip(batch.ids, batch.views, strict=True)):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{number}/{view.key}".encode()))
        one = slice(image, image + 1)
        sampled = sample_regions(proposals[one], origins[one], batch.targets[one], count=count, generator=generator)
        boxes += sampled.boxes_xyxy
        matched += sampled.matched
    counts = [len(own) for own in boxes]
    logits = detector.regions(features, boxes, batch).logits.split(counts)

    def by_image(flat: Sequence[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(list(flat), batch_first=True)

    number_of = torch.tensor(counts, device=batch.images.device)
    return TaughtRegions(by_image(boxes), by_image(logits), by_image([own >= 0 for own in matched]), number_of)


def by_images(prediction: Regions, images: int) -> tuple[list[Tensor], Tensor]:
    """The boxes [R_b, 4] of each image of a prediction, and the order of its regions in them."""
    order = [torch.nonzero(prediction.origin.image == image).flatten() for image in range(images)]
    return [prediction.boxes_xyxy[own] for own in order], torch.cat(order)


def start_small(convolution: nn.Conv2d) -> None:
    """Initialise an adapter as released: normal numbers, their remainder of a division by 2, times 1e-4."""
    with torch.no_grad():
        convolution.weight.normal_().fmod_(2).mul_(1e-4)
