"""One-to-one matching of queries and ground-truth boxes: costs, and the cheapest matching (Hungarian algorithm).

Carion et al., "End-to-End Object Detection with Transformers" (DETR), ECCV 2020, section 3.1; the focal class cost is
Deformable DETR's (Zhu et al., ICLR 2021, appendix A.3). A detector's matching cost is a weighted sum of these costs, all
computed on detached predictions.

Shape letters: N queries, G ground-truth boxes, K classes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detdistill.functional.boxes import paired_giou
from detdistill.structures import NEGATIVE

LARGEST_COST = 1e6
"""What an infinite or undefined cost counts as."""


def focal_class_cost(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """[..., N, G] what the focal loss of a ground truth's class would add if the query took it, less what it costs now.

    With p the sigmoid of the class's logit: ``-alpha (1-p)^gamma log(p) + (1-alpha) p^gamma log(1-p)``. A cheap match
    has a high score.

    Args:
        logits: [..., N, K].
        labels: [G] 0 .. K-1.
        alpha: weight of the positive part.
        gamma: exponent of the focal factors.
    """
    probability = logits.sigmoid()[..., labels]
    positive = -alpha * (1 - probability) ** gamma * (probability + 1e-12).log()
    negative = -(1 - alpha) * probability**gamma * (1 - probability + 1e-12).log()
    return positive - negative


def l1_cost(boxes: Tensor, targets: Tensor) -> Tensor:
    """[..., N, G] sum of the absolute differences of four coordinates.

    DETR compares cxcywh, Sparse R-CNN and AdaMixer xyxy, all as parts of the image; the caller brings both in one form.

    Args:
        boxes: [..., N, 4].
        targets: [G, 4] in the same form and unit.
    """
    return (boxes[..., :, None, :] - targets).abs().sum(dim=-1)


def giou_cost(boxes_xyxy: Tensor, targets_xyxy: Tensor) -> Tensor:
    """[..., N, G] the negative generalized IoU of every pair.

    Args:
        boxes_xyxy: [..., N, 4].
        targets_xyxy: [G, 4].
    """
    return -paired_giou(boxes_xyxy[..., :, None, :], targets_xyxy)


@torch.no_grad()
def hungarian(cost: Tensor) -> Tensor:
    """[..., N] int64, the ground truth of each query in the cheapest one-to-one matching, -1 for queries left over.

    With fewer queries than boxes, boxes are left over. Without boxes all queries are. Costs that are no numbers count as
    very high ones, so that a training that diverged is told by its loss and not by an error from here.

    Args:
        cost: [..., N, G].

    Example:
        >>> hungarian(torch.tensor([[1.0, 2.0], [0.0, 9.0], [5.0, 5.0]])).tolist()
        [1, 0, -1]
    """
    matched = np.full((math.prod(cost.shape[:-2]), cost.shape[-2]), NEGATIVE, dtype=np.int64)
    if cost.numel():
        # All matrices in one copy, there and back: one wait for the device, not one for each.
        numbers = cost.detach().cpu().double().nan_to_num(LARGEST_COST, LARGEST_COST, -LARGEST_COST).numpy()
        for rows, one in zip(matched, numbers.reshape(-1, *cost.shape[-2:]), strict=True):
            queries, boxes = linear_sum_assignment(one)
            rows[queries] = boxes
    return torch.from_numpy(matched).view(cost.shape[:-1]).to(cost.device)
