"""torchvision's matchers of anchors and boxes, without the matrix of all overlaps where that is large."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher, SSDMatcher
from torchvision.ops import box_iou

from detdistill.functional.grid_matching import best_anchors, grids, large_overlaps, match_by_overlap
from detdistill.structures import Dense

FEW_PAIRS = 250_000
"""Up to this many pairs of an anchor and a box, the whole matrix is computed quicker."""


def match_anchors(matcher: Any, boxes_xyxy: Tensor, dense: Dense, image: int) -> Tensor:
    """Match the anchors of an image as ``matcher(box_iou(boxes, anchors))`` does, with equal results.

    Args:
        matcher: torchvision's ``Matcher`` or ``SSDMatcher``, or any other function of the matrix of overlaps [G, P].
        boxes_xyxy: [G, 4] boxes with an area, at least one.
        dense: the prediction with the anchors.
        image: index of the image.

    Returns:
        [P] index of the box, -1 negative, -2 ignored.
    """
    priors = dense.priors_xyxy[image]
    boxes = boxes_xyxy.to(priors.dtype)
    if len(boxes) * len(priors) > FEW_PAIRS and type(matcher) in (Matcher, SSDMatcher) and matcher.low_threshold > 0:
        levels = grids(priors, dense.levels, dense.cells, dense.anchors)
        found = None if levels is None else large_overlaps(boxes, levels, matcher.low_threshold)
        if found is not None:
            low, high, keep_best = matcher.low_threshold, matcher.high_threshold, matcher.allow_low_quality_matches
            matched = match_by_overlap(boxes, priors, found, low, high, keep_best)
            if type(matcher) is SSDMatcher:
                matched[best_anchors(found, len(priors))] = torch.arange(len(boxes), device=matched.device)
            return matched
    return cast(Tensor, matcher(box_iou(boxes, priors)))
