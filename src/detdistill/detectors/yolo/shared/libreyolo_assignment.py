"""SimOTA and task-aligned assignment as values, by the assigners of the package libreyolo.

Ge et al., "YOLOX: Exceeding YOLO Series in 2021", 2021, section 2.1 (SimOTA); Feng et al., "TOOD: Task-aligned One-stage Object
Detection", ICCV 2021, with the hyper-parameters of YOLOv9.

Shape letters: B images, P predictions of an image, K classes, N objects of an image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detdistill.detectors.torchvision.targets import trainable, whole_indices
from detdistill.functional.precision import full_precision
from detdistill.structures import NEGATIVE, Assignment, Batch


@torch.no_grad()
def simota(
    head: Any, logits: Tensor, objectness: Tensor, boxes_cxcywh: Tensor, corners_xy: Tensor, strides: Tensor, batch: Batch
) -> Assignment:
    """Assign each object to the predictions near its centre that cost least, as many as the best ten IoUs sum up to.

    Args:
        head: the package's ``YOLOXHead``.
        logits: [B, P, K] sigmoid logits of the classes.
        objectness: [B, P] sigmoid logits.
        boxes_cxcywh: [B, P, 4] predicted boxes, centre and size in pixels.
        corners_xy: [P, 2] column and row of each prediction's cell.
        strides: [P].
        batch: batch with targets; crowd boxes and boxes without area are left out.

    Returns:
        ``weights`` of the positives are the IoUs of their pairs. All other weights are 1.
    """
    matched = torch.full(logits.shape[:2], NEGATIVE, device=logits.device)
    weights = torch.ones_like(objectness)
    shifts = corners_xy.to(boxes_cxcywh.dtype)
    # Outputs that are no numbers cost as zeros do: the package's cross-entropy raises for them.
    logits, objectness, boxes = (one.detach().nan_to_num(nan=0.0, posinf=None) for one in (logits, objectness, boxes_cxcywh))
    for image, target in enumerate(batch.targets):
        rows = trainable(target)
        if len(rows) == 0:
            continue
        corners = target.boxes_xyxy[rows].to(boxes.dtype)
        truth = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)
        with full_precision(logits.device):
            _, positive, overlaps, index, _ = head.get_assignments(
                0,
                len(rows),
                truth,
                target.labels[rows],
                boxes[image],
                strides[None].to(boxes.dtype),
                shifts[None, :, 0],
                shifts[None, :, 1],
                logits[image, None],
                objectness[image, None, :, None],
            )
        matched[image, positive] = rows[index]
        weights[image, positive] = overlaps.to(weights.dtype)
    return Assignment(matched, weights)


@torch.no_grad()
def task_aligned(logits: Tensor, boxes_xyxy: Tensor, points_xy: Tensor, strides: Tensor, batch: Batch, bins: int) -> Assignment:
    """Assign each object to the ten predictions that score and fit it best.

    Args:
        logits: [B, P, K] sigmoid logits.
        boxes_xyxy: [B, P, 4] predicted boxes in pixels.
        points_xy: [P, 2] centres of the cells in pixels.
        strides: [P].
        batch: batch with targets; crowd boxes and boxes without area are left out.
        bins: bins of each side; cells that are further from a side of an object than the last bin are no candidates.

    Returns:
        ``weights`` of the positives are their target scores: the alignment, scaled for each object so that its best prediction
        gets the IoU of its best box. All other weights are 1.
    """
    from libreyolo.models.yolo9.loss import BoxMatcher

    kept = [trainable(target) for target in batch.targets]
    most = max(map(len, kept), default=0)
    if most == 0:
        return Assignment(torch.full(logits.shape[:2], NEGATIVE, device=logits.device))
    truth = boxes_xyxy.new_zeros(len(batch), most, 5)
    for image, (target, rows) in enumerate(zip(batch.targets, kept, strict=True)):
        truth[image, : len(rows), 0] = target.labels[rows].to(truth.dtype)
        truth[image, : len(rows), 1:] = target.boxes_xyxy[rows].to(truth.dtype)
    classes = logits.shape[-1]
    matcher = BoxMatcher(num_classes=classes, anchor_grid=points_xy, scaler=strides, reg_max=bins)
    with full_precision(logits.device):
        wanted, positive, index = matcher(truth, (logits.detach(), boxes_xyxy.detach()), return_indices=True)
    matched = torch.where(positive, index, NEGATIVE)
    whole = torch.stack([whole_indices(row, target) for row, target in zip(matched, batch.targets, strict=True)])
    scores = wanted[..., :classes].sum(dim=-1)
    return Assignment(whole, torch.where(whole >= 0, scores, torch.ones_like(scores)))
