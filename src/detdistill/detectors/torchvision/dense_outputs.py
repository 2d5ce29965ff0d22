"""Raw outputs of dense heads: their order, their level and cell, and the origin of each detection.

Shape letters: B images, L levels, P predictions of an image, C class outputs, A anchors of a cell, D detections, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import clip_boxes_to_image

from detdistill.detectors.contract import Detector
from detdistill.detectors.torchvision.detector import TorchvisionDetector
from detdistill.structures import Dense, Detections, Movable, Origin


@dataclass(frozen=True)
class OwnOutputs(Movable):
    """Raw outputs of a dense head in the form that torchvision's loss and decoding read; float32 under mixed precision."""

    outputs: dict[str, Tensor]
    """Output tensors by torchvision's names, each [B, P, ...]."""
    anchors: tuple[Tensor, ...]
    """Anchors of each image, [P, 4] as x1, y1, x2, y2 in pixels."""
    counts: tuple[int, ...]
    """Number of predictions on each level."""


def own_outputs(prediction: Any, detector: Detector) -> OwnOutputs:
    """Return the raw outputs of a prediction.

    Raises:
        ValueError: the prediction has no raw outputs, because it was split by image or read from a cache.
    """
    if not isinstance(prediction.own, OwnOutputs):
        raise ValueError(f"{detector.spec.name}: this prediction has no raw outputs; call predict again on the features")
    return prediction.own


def flat_outputs(maps: Sequence[Tensor], width: int) -> Tensor:
    """Flatten output maps [B, A*width, H, W] to [B, P, width]; order: level, row, column, anchor, as in torchvision."""
    flat = []
    for level in maps:
        cells = level.unflatten(1, (level.shape[1] // width, width)).permute(0, 3, 4, 1, 2)  # -1 fails in exports
        flat.append(cells.flatten(1, 3))
    return torch.cat(flat, dim=1)


def anchors_wh(generator: AnchorGenerator) -> tuple[tuple[tuple[float, float], ...], ...]:
    """Width and height in pixels of the anchors of a cell, for each level (``DenseCoding.anchors_wh``)."""
    return tuple(tuple((right - left, low - top) for left, top, right, low in level.tolist()) for level in generator.cell_anchors)


def layout(shapes: Sequence[tuple[int, int]], anchors: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Compute level, cell and anchor of each prediction, in torchvision's order.

    Args:
        shapes: height and width of each level, in cells.
        anchors: number of anchors of one cell, for each level.
        device: device of the result.

    Returns:
        Level [P], row and column of the cell [P, 2], anchor [P].
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
    """Initialise the head of FCOS or RetinaNet with random weights, by torchvision's rules."""
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
    """Convert torchvision's results to ``Detections``, with labels 0 .. K-1 and the origin of each box.

    Args:
        results: ``boxes``, ``scores`` and ``labels`` of each image, from torchvision's postprocessing.
        detector: detector of the results; ``columns`` and ``model.score_thresh`` are read.
        prediction: prediction from which the results were selected.
        scores: [B, P, C] final scores of all predictions.
        sizes: valid height and width of each image, to which the boxes were clipped.
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
    """Convert torchvision's labels [D] to labels 0 .. K-1: return the indices [M] of the detections to keep and their labels [M].

    Detections of outputs without a class (the background of sigmoid heads, COCO's unused numbers) are dropped.
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
    """Find the prediction behind each final box of an image: the one with the nearest score and box.

    torchvision's postprocessing does not return these indices.

    Args:
        result: ``boxes``, ``scores`` and ``labels`` of the image, selected from these predictions.
        image: index of the image in the batch.
        scores: [P, C] final scores of all predictions.
        boxes_xyxy: [P, 4] decoded boxes, clipped as in ``result``.
        where: level [P], cell [P, 2] and anchor [P].
        threshold: score threshold of the postprocessing; predictions with all scores below it are no candidates.
    """
    # No final box comes from a prediction that scores less than the last of them, which leaves few candidates of thousands;
    # both sides round, in half precision by up to 0.4 %.
    lowest = max(threshold, float(result["scores"].min())) if len(result["scores"]) else threshold
    candidates = torch.nonzero(scores.amax(dim=1) >= 0.99 * lowest).flatten()
    boxes, by_class = boxes_xyxy[candidates], scores[candidates].T.contiguous()
    found = [candidates[:0]]
    rows = max(1, 4_000_000 // max(1, len(candidates)))  # at most 16 MB of distances at a time
    numbers = torch.arange(len(result["boxes"]), device=boxes.device)
    for part in numbers.split(rows) if len(numbers) else ():
        box, score, label = result["boxes"][part], result["scores"][part], result["labels"][part]
        distance = torch.cdist(box, boxes, p=1).add_((by_class[label] - score[:, None]).abs_(), alpha=1000)
        found.append(candidates[distance.argmin(dim=1)])
    index = torch.cat(found)
    levels, cells, anchors = where
    return Origin(torch.full_like(index, image), levels[index], cells[index], anchors[index], torch.full_like(index, -1))
