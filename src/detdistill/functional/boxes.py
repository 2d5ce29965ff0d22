"""IoU and generalised IoU of boxes, the GIoU loss, and boxes from distances to their sides.

Unions and enclosing areas are clamped to at least 1e-6, as in mmdet; torchvision adds 1e-7 instead. The results are equal for
boxes of at least a pixel but differ for very small boxes, which occur here because boxes may also be given in strides or as
fractions of the image. Boxes of half precision give float32.

Shape letters: N, M boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detdistill.functional.assign import pairwise_iou
from detdistill.functional.precision import at_least_float32

LEAST_AREA = 1e-6


def paired_iou(first_xyxy: Tensor, second_xyxy: Tensor) -> Tensor:
    """[N] intersection over union of box i of one set [N, 4] with box i of another set [N, 4].

    Example:
        >>> paired_iou(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0]]))
        tensor([0.3333])
    """
    overlap, union = _overlap_union(first_xyxy, second_xyxy)
    return overlap / union


def paired_giou(first_xyxy: Tensor, second_xyxy: Tensor) -> Tensor:
    """[N] generalised IoU of box i of one set [N, 4] with box i of another: IoU - (enclosing area - union) / enclosing area.

    Between -1 and 1. Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019, algorithm 1.
    """
    first_xyxy, second_xyxy = at_least_float32(first_xyxy), at_least_float32(second_xyxy)
    overlap, union = _overlap_union(first_xyxy, second_xyxy)
    corner = torch.minimum(first_xyxy[..., :2], second_xyxy[..., :2])
    opposite = torch.maximum(first_xyxy[..., 2:], second_xyxy[..., 2:])
    enclosing = (opposite - corner).clamp(min=0).prod(dim=-1).clamp(min=LEAST_AREA)
    return overlap / union - (enclosing - union) / enclosing


def pairwise_giou(first_xyxy: Tensor, second_xyxy: Tensor) -> Tensor:
    """[N, M] generalised IoU of every box of one set [N, 4] with every box of another [M, 4]."""
    return paired_giou(first_xyxy[:, None], second_xyxy[None])


def giou_loss(boxes_xyxy: Tensor, targets_xyxy: Tensor) -> Tensor:
    """[N] GIoU loss, 1 - generalised IoU, of boxes [N, 4] and their targets [N, 4]; not reduced.

    Example:
        >>> giou_loss(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[1.0, 0.0, 2.0, 1.0]])).tolist()
        [1.0]
    """
    return 1 - paired_giou(boxes_xyxy, targets_xyxy)


def boxes_from_distances(points_xy: Tensor, distances: Tensor) -> Tensor:
    """Boxes [..., 4] from points [..., 2] and distances [..., 4] to the left, top, right and bottom side, in the same unit."""
    return torch.cat([points_xy - distances[..., :2], points_xy + distances[..., 2:]], dim=-1)


def distances_to_sides(points_xy: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """Distances [..., 4] of points [..., 2] to the left, top, right and bottom side of boxes; negative beyond a side."""
    return torch.cat([points_xy - boxes_xyxy[..., :2], boxes_xyxy[..., 2:] - points_xy], dim=-1)


def centerness_target(points_xy: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """Centerness of points in their boxes: sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)).

    Tian et al., "FCOS", ICCV 2019, equation 3.

    Args:
        points_xy: [N, 2].
        boxes_xyxy: [N, 4].

    Returns:
        [N] 0..1; 0 for points outside of their box.

    Example:
        >>> centerness_target(torch.tensor([[1.0, 2.0], [9.0, 2.0]]), torch.tensor([[0.0, 0.0, 5.0, 4.0]] * 2)).tolist()
        [0.5, 0.0]
    """
    left, top, right, bottom = distances_to_sides(points_xy, boxes_xyxy).clamp(min=0).unbind(dim=-1)
    across = torch.minimum(left, right) / torch.maximum(left, right).clamp(min=1e-9)
    down = torch.minimum(top, bottom) / torch.maximum(top, bottom).clamp(min=1e-9)
    return (across * down).sqrt()


def _overlap_union(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    first, second = at_least_float32(first), at_least_float32(second)
    corner = torch.maximum(first[..., :2], second[..., :2])
    opposite = torch.minimum(first[..., 2:], second[..., 2:])
    overlap = (opposite - corner).clamp(min=0).prod(dim=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(dim=-1) for boxes in (first, second)]
    return overlap, (areas[0] + areas[1] - overlap).clamp(min=LEAST_AREA)


__all__ = [
    "boxes_from_distances",
    "centerness_target",
    "distances_to_sides",
    "giou_loss",
    "paired_giou",
    "paired_iou",
    "pairwise_giou",
    "pairwise_iou",
]
