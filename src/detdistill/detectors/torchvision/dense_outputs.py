"""Raw outputs of dense heads: their order, their places, and the origin of each detection.

Shape letters: B images, L levels, P predictions of an image, C class outputs, A anchors of a cell, D detections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from detdistill.detectors.contract import Detector
from detdistill.detectors.torchvision.detector import TorchvisionDetector
from detdistill.structures import Dense, Detections, Movable, Origin


@dataclass(frozen=True)
class OwnOutputs(Movable):
    """A dense head's raw outputs as the library's own loss and decoding want them; float32 under mixed precision."""

    outputs: dict[str, Tensor]
    """Under the library's names, each [B, P, ...]."""
    anchors: tuple[Tensor, ...]
    """[P, 4] for each image."""
    counts: tuple[int, ...]
    """Predictions of each level."""


def own_outputs(prediction: Any, detector: Detector) -> OwnOutputs:
    """The raw outputs of a prediction.

    Raises:
        ValueError: the prediction was split by image or read from a cache, so it has none.
    """
    if not isinstance(prediction.own, OwnOutputs):
        raise ValueError(f"{detector.spec.name}: this prediction lost its own outputs; predict again from features")
    return prediction.own


def flat_outputs(maps: Sequence[Tensor], width: int) -> Tensor:
    """Output maps [B, A*width, H, W] of all levels as [B, P, width], in torchvision's order: level, row, column, anchor."""
    flat = []
    for level in maps:
        images, _, height, columns = level.shape
        cells = level.view(images, -1, width, height, columns).permute(0, 3, 4, 1, 2)
        flat.append(cells.reshape(images, -1, width))
    return torch.cat(flat, dim=1)


def layout(shapes: Sequence[tuple[int, int]], anchors: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where predictions lie, in torchvision's order.

    Args:
        shapes: height and width of each level.
        anchors: of a cell, for each level.
        device: for the result.

    Returns:
        Level [P], row and column [P, 2], anchor [P].
    """
    levels, cells, numbers = [], [], []
    for level, ((height, width), count) in enumerate(zip(shapes, anchors, strict=True)):
        row, column, anchor = torch.meshgrid(
            torch.arange(height, device=device),
            torch.arange(width, device=device),
            torch.arange(count, device=device),
            indexing="ij",
        )
        levels.append(torch.full((row.numel(),), level, device=device))
        cells.append(torch.stack([row.flatten(), column.flatten()], dim=1))
        numbers.append(anchor.flatten())
    return torch.cat(levels), torch.cat(cells), torch.cat(numbers)


def reset_dense_head(head: Any, prior_probability: float = 0.01) -> None:
    """Random weights for a head of FCOS or RetinaNet, drawn as torchvision draws them."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.GroupNorm, nn.BatchNorm2d)):
            module.reset_parameters()
    nn.init.constant_(head.classification_head.cls_logits.bias, -math.log((1 - prior_probability) / prior_probability))


def to_detections(
    results: Sequence[Mapping[str, Tensor]],
    detector: TorchvisionDetector,
    prediction: Dense,
    scores: Tensor,
    sizes: Sequence[tuple[int, int]],
) -> list[Detections]:
    """Torchvision's results of a dense prediction with our labels and the origin of each box.

    Args:
        results: ``boxes``, ``scores``, ``labels`` of each image.
        detector: whose they are; ``detector.model.score_thresh`` is read.
        prediction: what they were selected from.
        scores: [B, P, C] final scores.
        sizes: valid height and width that boxes were clipped to.
    """
    where = (prediction.levels, prediction.cells, prediction.anchors)
    detections = []
    for image, (result, size) in enumerate(zip(results, sizes, strict=True)):
        keep, labels = our_labels(result["labels"], detector.columns)
        result = {key: value[keep] for key, value in result.items()}
        boxes = clip_boxes_to_image(prediction.boxes_xyxy[image], size)
        origin = find_origin(result, image, scores[image], boxes, where, detector.model.score_thresh)
        detections.append(Detections(result["boxes"], result["scores"], labels, origin))
    return detections


def our_labels(theirs: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the library's labels [D] are classes of ours (indices [M]), and those as our labels [M].

    Outputs that belong to no class (the background of sigmoid heads, COCO's unused numbers) fall away.
    """
    label_of = torch.full((max(int(columns.max()), int(theirs.max()) if len(theirs) else 0) + 1,), -1, device=columns.device)
    label_of[columns] = torch.arange(len(columns), device=columns.device)
    mine = label_of[theirs]
    keep = torch.nonzero(mine >= 0).flatten()
    return keep, mine[keep]


@torch.no_grad()
def find_origin(
    result: Mapping[str, Tensor],
    image: int,
    scores: Tensor,
    boxes_xyxy: Tensor,
    where: tuple[Tensor, Tensor, Tensor],
    threshold: float,
) -> Origin:
    """Which predictions became the final boxes of an image: those of nearest score and box (torchvision does not say).

    Args:
        result: the image's ``boxes``, ``scores`` and ``labels``, from these very predictions.
        image: index in the batch.
        scores: [P, C] final scores of all predictions.
        boxes_xyxy: [P, 4] decoded and clipped as in ``result``.
        where: level [P], cell [P, 2] and anchor [P].
        threshold: predictions whose every score is below cannot be meant.
    """
    candidates = torch.nonzero(scores.amax(dim=1) >= threshold * (1 - 1e-4)).flatten()
    boxes, scores = boxes_xyxy[candidates], scores[candidates]
    found = [candidates[:0]]
    rows = max(1, 4_000_000 // max(1, len(candidates)))  # at most 64 MB of differences at a time
    numbers = torch.arange(len(result["boxes"]), device=boxes.device)
    for part in numbers.split(rows) if len(numbers) else ():
        box, score, label = result["boxes"][part], result["scores"][part], result["labels"][part]
        distance = (boxes[None] - box[:, None]).abs().sum(dim=2) + 1000 * (scores[:, label].T - score[:, None]).abs()
        found.append(candidates[distance.argmin(dim=1)])
    index = torch.cat(found)
    levels, cells, anchors = where
    return Origin(torch.full_like(index, image), levels[index], cells[index], anchors[index], torch.full_like(index, -1))
