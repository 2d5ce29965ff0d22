"""PAA: ATSS with a branch that predicts the IoU of the box, and detections that vote on their boxes.

Kim, Lee, "Probabilistic Anchor Assignment with IoU Prediction for Object Detection", ECCV 2020; the numbers are the released
code's (as ATSS; voting with sigma 0.025 among boxes of an IoU above 0.01).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from .atss import ATSS

VOTING_SIGMA = 0.025
"""Width of the weight ``exp(-(1 - IoU)^2 / sigma)`` of a vote."""
VOTING_IOU = 0.01
"""Boxes vote if their IoU with the detection lies above it."""


class PAA(ATSS):
    """Network and inference; score = square root of class score times predicted IoU."""

    def select(
        self,
        outputs: Mapping[str, Tensor],
        boxes: Tensor,
        counts: Sequence[int],
        valid: Tensor,
        sizes: Sequence[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """The final boxes of each image.

        Of each level the ``topk_candidates`` predictions with the best final score; of these all pairs of prediction and class
        above ``score_thresh``; boxes clipped to the image, those without area dropped; NMS for each class; the
        ``detections_per_img`` best. Each of them then moves to the weighted mean of the candidates of its class around it
        (``vote``) and keeps its score.

        Args:
            outputs: ``cls_logits`` [B, P, K] and ``bbox_ctrness`` [B, P, 1], the logit of the IoU.
            boxes: [B, P, 4] decoded.
            counts: predictions of each level.
            valid: [B, P] bool, predictions that may be chosen.
            sizes: valid height and width of each image.

        Returns:
            For each image ``boxes``, ``scores``, ``labels`` (1 .. K) and ``index`` [D] into P.
        """
        scores = (outputs["cls_logits"].sigmoid() * outputs["bbox_ctrness"].sigmoid()).sqrt()
        scores = scores.masked_fill(~valid[..., None], -1.0)
        found = []
        for image, size in enumerate(sizes):
            best = scores[image].amax(dim=1).split(list(counts))
            starts = [sum(counts[:level]) for level in range(len(counts))]
            pairs = zip(best, starts, strict=True)
            rows = torch.cat([level.topk(min(self.topk_candidates, len(level))).indices + start for level, start in pairs])
            row, label = torch.nonzero(scores[image, rows] > self.score_thresh, as_tuple=True)
            index = rows[row]
            values, mine = scores[image, index, label], clip_boxes_to_image(boxes[image, index], size)
            filled = (mine[:, 2:] > mine[:, :2]).all(dim=1)
            mine, values, index, label = mine[filled], values[filled], index[filled], label[filled]
            keep = batched_nms(mine, values, label, self.nms_thresh)[: self.detections_per_img]
            voted = vote(mine, values, label, keep)
            found.append({"boxes": voted, "scores": values[keep], "labels": label[keep] + 1, "index": index[keep]})
        return found


def vote(boxes: Tensor, scores: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
    """Each kept box as the mean of its class's boxes around it, weighted by score and IoU.

    Args:
        boxes: [N, 4] candidates.
        scores: [N], above 0.
        labels: [N].
        keep: [D] the kept ones.

    Returns:
        [D, 4].
    """
    voted = boxes[keep]
    for label in labels[keep].unique():
        mine, voters = labels[keep] == label, labels == label
        overlaps = box_iou(boxes[keep[mine]], boxes[voters])
        weights = torch.exp(-(1 - overlaps).square() / VOTING_SIGMA) * scores[voters] * (overlaps > VOTING_IOU)
        voted[mine] = (weights[..., None] * boxes[voters]).sum(dim=1) / weights.sum(dim=1, keepdim=True)
    return voted
