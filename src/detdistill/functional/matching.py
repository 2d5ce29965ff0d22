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
from torch import Tensor

from detdistill.functional.boxes import paired_giou
from detdistill.structures import NEGATIVE

LARGEST_COST = 1e6
"""Cost that replaces infinite and undefined costs."""


def focal_class_cost(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """[..., N, G] classification cost: focal loss of the ground truth's class as a positive minus that as a negative.

    With p the sigmoid of the class's logit: ``-alpha (1-p)^gamma log(p) + (1-alpha) p^gamma log(1-p)``. A high score gives a
    low cost.

    Args:
        logits: [..., N, K].
        labels: [G] classes of the ground truth, 0 .. K-1.
        alpha: weight of the positive part.
        gamma: exponent of the focal factors.
    """
    probability = logits.sigmoid()[..., labels]
    positive = -alpha * (1 - probability) ** gamma * (probability + 1e-12).log()
    negative = -(1 - alpha) * probability**gamma * (1 - probability + 1e-12).log()
    return positive - negative


def l1_cost(boxes: Tensor, targets: Tensor) -> Tensor:
    """[..., N, G] sum of the absolute differences of four coordinates.

    DETR compares cxcywh, Sparse R-CNN and AdaMixer xyxy, all as fractions of the image.

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
    """[..., N] int64 index of each query's ground truth in the one-to-one matching of lowest cost; -1 for unmatched queries.

    With fewer queries than boxes, some boxes are unmatched. Without boxes, all queries are unmatched. Undefined costs (NaN) are
    replaced by ``LARGEST_COST``, so that a diverged training shows in its loss and does not fail here.

    Args:
        cost: [..., N, G].

    Example:
        >>> hungarian(torch.tensor([[1.0, 2.0], [0.0, 9.0], [5.0, 5.0]])).tolist()
        [1, 0, -1]
    """
    matched = np.full((math.prod(cost.shape[:-2]), cost.shape[-2]), NEGATIVE, dtype=np.int64)
    if cost.numel():
        from scipy.optimize import linear_sum_assignment  # late: SciPy takes half a second to load

        # All matrices in one copy, there and back: one wait for the device, not one for each.
        numbers = cost.detach().cpu().double().nan_to_num(LARGEST_COST, LARGEST_COST, -LARGEST_COST).numpy()
        for rows, one in zip(matched, numbers.reshape(-1, *cost.shape[-2:]), strict=True):
            queries, boxes = linear_sum_assignment(one)
            rows[queries] = boxes
    return torch.from_numpy(matched).view(cost.shape[:-1]).to(cost.device)
