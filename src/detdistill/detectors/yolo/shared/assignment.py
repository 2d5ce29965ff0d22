"""Task-aligned assignment as a value, by the package's own assigner.

Feng et al., "TOOD: Task-aligned One-stage Object Detection", ICCV 2021; hyper-parameters of the package ultralytics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detdistill.detectors.torchvision.targets import trainable, whole_indices
from detdistill.structures import NEGATIVE, Assignment, Batch


@torch.no_grad()
def task_aligned(
    logits: Tensor,
    boxes_xyxy: Tensor,
    points_xy: Tensor,
    batch: Batch,
    strides: Sequence[int],
    *,
    top: int,
    last: int | None = None,
) -> Assignment:
    """Assign each object to the predictions that score and fit it best.

    Args:
        logits: [B, P, K] sigmoid logits.
        boxes_xyxy: [B, P, 4] predicted boxes in pixels.
        points_xy: [P, 2] centres of the cells in pixels.
        batch: batch with targets; crowd boxes and boxes without area are left out.
        strides: stride of each level.
        top: candidates of each object.
        last: predictions that each object keeps; None: all candidates.

    Returns:
        ``weights`` of the positives are their target scores: the alignment, scaled for each object so that its best prediction
        gets the IoU of its best box. All other weights are 1.
    """
    from ultralytics.utils.tal import TaskAlignedAssigner

    kept = [trainable(target) for target in batch.targets]
    most = max(map(len, kept), default=0)
    if most == 0:
        return Assignment(torch.full(logits.shape[:2], NEGATIVE, device=logits.device))
    labels = torch.zeros(len(batch), most, 1, device=logits.device, dtype=torch.int64)
    boxes = boxes_xyxy.new_zeros(len(batch), most, 4)
    there = torch.zeros(len(batch), most, 1, device=logits.device, dtype=boxes.dtype)
    for image, (target, rows) in enumerate(zip(batch.targets, kept, strict=True)):
        labels[image, : len(rows), 0] = target.labels[rows]
        boxes[image, : len(rows)] = target.boxes_xyxy[rows].to(boxes.dtype)
        there[image, : len(rows)] = 1
    assigner = TaskAlignedAssigner(
        topk=top, num_classes=logits.shape[-1], alpha=0.5, beta=6.0, stride=[float(stride) for stride in strides], topk2=last
    )
    _, _, scores, positive, index = assigner(logits.detach().sigmoid(), boxes_xyxy.detach(), points_xy, labels, boxes, there)
    matched = torch.where(positive.bool(), index.long(), NEGATIVE)
    whole = torch.stack([whole_indices(row, target) for row, target in zip(matched, batch.targets, strict=True)])
    return Assignment(whole, torch.where(whole >= 0, scores.sum(dim=-1), torch.ones_like(scores[..., 0])))
