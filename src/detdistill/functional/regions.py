"""Regions of two-stage detectors: proposals from a dense prediction, sampling, RoI pooling, and coding of box deltas.

Gradients flow to features and not to boxes, except in ``encode_boxes`` and ``decode_boxes``.

Shape letters: B images, P predictions of an image, K classes, R regions of the whole batch, S side of a pooled region.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from detdistill.errors import DetdistillError
from detdistill.functional.assign import max_iou_assign
from detdistill.functional.region_pooling import pool_rois
from detdistill.structures import Dense, Features, Origin, Target

LARGEST_GROWTH = math.log(1000 / 16)
"""Largest logarithm of the ratio of a side to the reference's side in ``decode_boxes``, as in Faster R-CNN's released code."""
LEAST_SIDE = 1e-6
"""Smallest side of a box in ``encode_boxes``; shorter sides are set to it."""


# ------------------------------------------------------------------------------------------------------------- pooling


def canonical_levels(boxes_xyxy: Tensor, strides: Sequence[int]) -> Tensor:
    """The level of a pyramid that each box is pooled from: ``floor(4 + log2(sqrt(width * height) / 224))``.

    Lin et al., "Feature Pyramid Networks for Object Detection", equation 1, rounded as in detectron2. Level k of the formula is
    the map of stride 2^k; boxes that are too small or too large for the pyramid get its first or last level.

    Args:
        boxes_xyxy: [R, 4] pixels.
        strides: strides of the pyramid, each twice the previous one.

    Returns:
        [R] int64 indices of levels.

    Example:
        >>> sides = torch.tensor([[10.0], [111.0], [112.0], [224.0], [4000.0]])
        >>> canonical_levels(torch.cat([0 * sides, 0 * sides, sides, sides], dim=1), strides=(4, 8, 16, 32)).tolist()
        [0, 0, 1, 2, 3]
    """
    sizes = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).clamp(min=0).prod(dim=1).sqrt()
    level = (4 + torch.log2(sizes / 224 + 1e-8)).floor() - round(math.log2(strides[0]))
    return level.nan_to_num(0).clamp(0, len(strides) - 1).long()


def pool_boxes(
    features: Features,
    boxes_xyxy: Sequence[Tensor],
    size: int,
    levels: Tensor | None = None,
    *,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Pool the features of each box from one level of a pyramid (RoIAlign, He et al., "Mask R-CNN", section 3).

    Boxes beyond the map give zeros, and so do boxes without area with the default sampling. Boxes that are not finite are
    treated as boxes without area. Half precision is pooled in float32.

    Args:
        features: maps of equal channels, and their strides; gradient flows.
        boxes_xyxy: B tensors [R_b, 4] in pixels, treated as constant; an image may have none.
        size: S.
        levels: [R] index of each box's level, in the order of the boxes. None: ``canonical_levels``. (The rule of mmdet and
            others, with a base of 56 pixels, is ``cells.level_of_box``.)
        sampling_ratio: samples along each side of a bin; 0: the number of cells along that side.
        aligned: shift by half a cell, so that cell centres lie at half-integers. False: the first released RoIAlign, in which
            boxes are also at least one cell wide and high.

    Returns:
        [R, C, S, S], image by image in the order of the boxes; [0, C, S, S], still part of the graph, if there are no boxes.

    Raises:
        DetdistillError: the levels differ in their channels, or ``levels`` is not one existing level for each box.

    Example:
        >>> maps = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> pool_boxes(Features((maps,), (8,)), [torch.tensor([[0.0, 0.0, 16.0, 16.0]])], size=2)
        tensor([[[[0., 1.],
                  [4., 5.]]]])
    """
    if len(set(features.channels)) > 1:
        raise DetdistillError(f"pool_boxes: levels of {features.channels} channels cannot be pooled into one tensor; adapt them")
    rois = _rois(boxes_xyxy, features.maps[0])
    if levels is None:
        levels = canonical_levels(rois[:, 1:], features.strides)
    pooled, order = [], []
    for level, (maps, stride) in enumerate(zip(features.maps, features.strides, strict=True)):
        mine = torch.nonzero(levels == level).flatten()
        order.append(mine)
        pooled.append(_pool(maps, rois[mine], size, 1 / stride, sampling_ratio, aligned))
    index = torch.cat(order)
    if len(index) != len(rois):
        raise DetdistillError(f"pool_boxes: {len(rois)} boxes need one level each, 0 to {len(features.maps) - 1}")
    return torch.cat(pooled)[index.argsort()]


def pool_boxes_on_all_levels(
    features: Features,
    boxes_xyxy: Sequence[Tensor],
    size: int,
    *,
    sampling_ratio: int = 0,
    aligned: bool = True,
    scales: Sequence[float] | None = None,
) -> tuple[Tensor, ...]:
    """Pool the features of each box from every level of a pyramid; see ``pool_boxes``.

    Args:
        features: maps and strides; gradient flows.
        boxes_xyxy: B tensors [R_b, 4] in pixels, treated as constant.
        size: S.
        sampling_ratio: samples along each side of a bin; 0: the number of cells along that side.
        aligned: shift by half a cell.
        scales: cells per pixel of each level; None: 1 / stride. (DRKD uses the ratio of the maps' widths, which differs if a
            stride does not divide the size of the padded image.)

    Returns:
        For each level [R, C_l, S, S], image by image in the order of the boxes.
    """
    rois = _rois(boxes_xyxy, features.maps[0])
    factors = [1 / stride for stride in features.strides] if scales is None else scales
    return tuple(
        _pool(maps, rois, size, scale, sampling_ratio, aligned) for maps, scale in zip(features.maps, factors, strict=True)
    )


def _rois(boxes_xyxy: Sequence[Tensor], like: Tensor) -> Tensor:
    """[R, 5] image and box. Boxes that are not finite (diverged student) become zeros, because the kernel fails on them."""
    boxes = _wide(torch.cat(list(boxes_xyxy)).detach().to(like.device))
    image = torch.cat([boxes.new_full((len(mine), 1), index) for index, mine in enumerate(boxes_xyxy)])
    finite = boxes.isfinite().all(dim=1, keepdim=True)
    return torch.cat([image, torch.where(finite, boxes, 0.0)], dim=1)


def _pool(maps: Tensor, rois: Tensor, size: int, scale: float, sampling_ratio: int, aligned: bool) -> Tensor:
    maps = _wide(maps)
    return pool_rois(maps, rois.to(maps.dtype), size, scale, sampling_ratio, aligned)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def features_at_origin(maps: Sequence[Tensor], origin: Origin) -> Tensor:
    """Feature vectors at the cells that boxes came from; boxes without an origin cell are left out.

    Args:
        maps: maps [B, C, H_l, W_l] of all levels that ``origin.level`` refers to; gradient flows.
        origin: origin of R boxes; boxes of level -1 (ground truth) have no vector.

    Returns:
        [R', C] of the boxes with ``origin.level >= 0``, in their order.

    Example:
        >>> origin = Origin(*(torch.tensor(part) for part in ([0, 0], [0, -1], [[1, 0], [-1, -1]], [0, -1], [-1, 0])))
        >>> features_at_origin([torch.arange(4.0).reshape(1, 1, 2, 2)], origin)
        tensor([[2.]])
    """
    vectors, order = [], []
    for level, level_maps in enumerate(maps):
        mine = torch.nonzero(origin.level == level).flatten()
        order.append(mine)
        vectors.append(level_maps[origin.image[mine], :, origin.cell[mine, 0], origin.cell[mine, 1]])
    return torch.cat(vectors)[torch.cat(order).argsort()]


# ----------------------------------------------------------------------------------------------------------- proposing


class Proposals(NamedTuple):
    """Boxes of each image, best first; B entries each."""

    boxes_xyxy: list[Tensor]
    """[n_b, 4] clipped to the image."""
    origins: list[Origin]
    """Origin of the n_b boxes."""
    scores: list[Tensor]
    """[n_b] scores that ranked the boxes."""


@torch.no_grad()
def propose(
    dense: Dense,
    sizes_hw: Tensor,
    *,
    scores: Tensor | None = None,
    before: int = 2000,
    nms: float = 0.7,
    after: int = 1000,
    across_levels: bool = False,
    min_side: float = 0.0,
) -> Proposals:
    """Class-agnostic proposals from a dense prediction, by the procedure of a region proposal network.

    The best predictions of each level are clipped to the image, small boxes are dropped, and non-maximum suppression (NMS) is
    applied within each level (Ren et al., "Faster R-CNN", section 3.3). Predictions in ``dense.padding`` are excluded.

    Args:
        dense: prediction of a first stage or of a one-stage detector.
        sizes_hw: [B, 2] valid height and width of each image.
        scores: [B, P] scores that rank the predictions; None: the highest class probability.
        before: largest number of predictions of a level before NMS.
        nms: IoU above which the box of lower score is dropped.
        after: largest number of boxes of an image after NMS.
        across_levels: treat all levels as one (as GID does): ``before`` counts all of them, and NMS works across levels.
        min_side: both sides of a clipped box must be longer than this, in pixels.

    Returns:
        The proposals; an image may have none.

    Example:
        >>> box = torch.tensor([[-4.0, 0.0, 6.0, 8.0], [0.0, 0.0, 6.0, 7.0], [0.0, 0.0, 6.0, 7.0]])
        >>> level, cells = torch.tensor([0, 0, 1]), torch.tensor([[0, 0], [0, 1], [0, 0]])
        >>> logits = torch.tensor([2.0, 1.0, 0.0]).view(1, 3, 1)
        >>> dense = Dense(logits, box[None], box[None], box[None], level, cells, torch.zeros(3, dtype=torch.int64))
        >>> boxes, origins, scores = propose(dense, torch.tensor([[8, 8]]))
        >>> boxes[0].tolist(), origins[0].level.tolist()
        ([[0.0, 0.0, 6.0, 8.0], [0.0, 0.0, 6.0, 7.0]], [0, 1])
    """
    ranked = _objectness(dense) if scores is None else scores.detach()
    if dense.padding is not None:
        ranked = ranked.masked_fill(dense.padding, -torch.inf)
    groups = torch.zeros_like(dense.levels) if across_levels else dense.levels
    found = [
        _suppressed(dense, image, index, ranked[image, index], groups[index], sizes_hw[image], nms, min_side, after)
        for image, index in enumerate(_best_of_each(ranked, groups, before))
    ]
    if scores is None and not dense.softmax:  # logits until here: scores near 1 would tie
        found = [(boxes, origin, logits.sigmoid()) for boxes, origin, logits in found]
    return Proposals(*(list(parts) for parts in zip(*found, strict=True)))


@torch.no_grad()
def propose_by_class(
    dense: Dense, sizes_hw: Tensor, *, before: int = 1000, nms: float = 0.5, after: int = 100, min_score: float = 0.0
) -> Proposals:
    """Class-wise proposals from a dense prediction, by the inference procedure of a one-stage detector.

    The best pairs of prediction and class of each level are clipped to the image, and non-maximum suppression (NMS) is applied
    within each class, across levels. Boxes without area and predictions in ``dense.padding`` are excluded.

    Args:
        dense: prediction of a one-stage detector.
        sizes_hw: [B, 2] valid height and width of each image.
        before: largest number of pairs of a level before NMS.
        nms: IoU above which, of two boxes of a class, the one of lower score is dropped.
        after: largest number of boxes of an image after NMS.
        min_score: class probabilities must be higher than this.

    Returns:
        The proposals; a box may occur once for each class.
    """
    probabilities = dense.logits.softmax(dim=-1)[..., :-1] if dense.softmax else dense.logits.sigmoid()
    probabilities = probabilities.masked_fill(~(probabilities > min_score), -torch.inf)
    if dense.padding is not None:
        probabilities = probabilities.masked_fill(dense.padding[..., None], -torch.inf)
    ranked, classes = probabilities.flatten(1), probabilities.shape[-1]
    found = [
        _suppressed(dense, image, pair // classes, ranked[image, pair], pair % classes, sizes_hw[image], nms, 0.0, after)
        for image, pair in enumerate(_best_of_each(ranked, dense.levels.repeat_interleave(classes), before))
    ]
    return Proposals(*(list(parts) for parts in zip(*found, strict=True)))


def _objectness(dense: Dense) -> Tensor:
    """[B, P] largest logit; for softmax outputs the largest probability, because logits of predictions are not comparable."""
    columns = dense.logits.softmax(dim=-1)[..., :-1] if dense.softmax else dense.logits
    return columns.amax(dim=-1)


def _best_of_each(ranked: Tensor, groups: Tensor, most: int) -> list[Tensor]:
    """For each image, the indices of the highest scores of each group, without scores of -inf or NaN.

    Args:
        ranked: [B, N] scores.
        groups: [N] group of each score.
        most: largest number of indices of each group.
    """
    chosen = []
    for group in torch.unique(groups).tolist():
        mine = torch.nonzero(groups == group).flatten()
        chosen.append(mine[ranked[:, mine].nan_to_num(-torch.inf).topk(min(most, len(mine)), dim=1).indices])
    index = torch.cat(chosen, dim=1) if chosen else groups.new_zeros(len(ranked), 0)
    return [mine[ranked[image, mine].isfinite()] for image, mine in enumerate(index)]


def _suppressed(
    dense: Dense,
    image: int,
    index: Tensor,
    ranked: Tensor,
    groups: Tensor,
    size_hw: Tensor,
    nms: float,
    min_side: float,
    after: int,
) -> tuple[Tensor, Origin, Tensor]:
    """Boxes, origin and score of an image's candidates ``index`` [n] that are large enough and survive NMS in their group."""
    height, width = size_hw.tolist()
    boxes = clip_boxes_to_image(dense.boxes_xyxy[image, index], (height, width))
    keep = torch.nonzero(((boxes[:, 2:] - boxes[:, :2]) > min_side).all(dim=1)).flatten()
    keep = keep[batched_nms(boxes[keep], ranked[keep].to(boxes.dtype), groups[keep], nms)[:after]]
    index = index[keep]
    place = dense.levels[index], dense.cells[index], dense.anchors[index]
    return boxes[keep], Origin(torch.full_like(index, image), *place, torch.full_like(index, -1)), ranked[keep]


# ------------------------------------------------------------------------------------------------------------ sampling


class SampledRegions(NamedTuple):
    """Regions of each image, positives first; B entries each."""

    boxes_xyxy: list[Tensor]
    """[n_b, 4]."""
    origins: list[Origin]
    """Origin of the n_b boxes; for inserted ground truth the level is -1 and ``ground_truth`` is the index of the box."""
    matched: list[Tensor]
    """[n_b] int64 index of the ground truth within the image's ``Target`` (crowd boxes counted), -1 for negatives."""


@torch.no_grad()
def sample_regions(
    boxes_xyxy: Sequence[Tensor],
    origins: Sequence[Origin],
    targets: Sequence[Target],
    *,
    count: int = 512,
    positive_fraction: float = 0.25,
    iou: float = 0.5,
    insert_ground_truth: bool = True,
    generator: torch.Generator | None = None,
) -> SampledRegions:
    """Draw regions of each image for the training of a second stage (Girshick, "Fast R-CNN", section 2.3).

    A region is positive if its IoU with some ground truth is at least ``iou``, else negative. At most
    ``count * positive_fraction`` positives are drawn, then negatives up to ``count`` regions; fewer if there are not enough.
    Crowd boxes and boxes without area do not count as ground truth. An image without ground truth has negatives only.

    Args:
        boxes_xyxy: B tensors [n, 4].
        origins: origin of the boxes of each image.
        targets: ground truth of each image.
        count: number of regions of an image.
        positive_fraction: largest fraction of ``count`` that may be positive.
        iou: smallest IoU of a positive region.
        insert_ground_truth: append the ground-truth boxes to the given boxes before sampling.
        generator: random generator of the CPU (equal seeds draw the same regions on any device); None: torch's global one.

    Returns:
        The sampled regions, in the order of the given boxes within positives and within negatives.
    """
    sampled = SampledRegions([], [], [])
    for image, (boxes, origin, target) in enumerate(zip(boxes_xyxy, origins, targets, strict=True)):
        sides = target.boxes_xyxy[:, 2:] - target.boxes_xyxy[:, :2]
        usable = torch.nonzero(~target.crowd & (sides > 0).all(dim=1)).flatten()
        truth = target.boxes_xyxy[usable].to(boxes.dtype)
        if insert_ground_truth:
            nowhere = torch.full_like(usable, -1)
            inserted = Origin(torch.full_like(usable, image), nowhere, nowhere[:, None].expand(-1, 2), nowhere, usable)
            boxes, origin = torch.cat([boxes, truth]), Origin.cat([origin, inserted])
        matched = max_iou_assign(boxes, truth, positive=iou, negative=iou, low_quality=False)
        positive, negative = (torch.nonzero(side).flatten() for side in (matched >= 0, matched < 0))
        positive = _draw(positive, int(count * positive_fraction), generator)
        index = torch.cat([positive, _draw(negative, count - len(positive), generator)])
        if len(usable):
            matched = torch.where(matched >= 0, usable[matched.clamp(min=0)], matched)
        sampled.boxes_xyxy.append(boxes[index])
        sampled.origins.append(origin[index])
        sampled.matched.append(matched[index])
    return sampled


def _draw(index: Tensor, most: int, generator: torch.Generator | None) -> Tensor:
    if len(index) <= most:
        return index
    return index[torch.randperm(len(index), generator=generator)[:most].sort().values.to(index.device)]


# -------------------------------------------------------------------------------------------------------------- coding


def encode_boxes(
    boxes_xyxy: Tensor, references_xyxy: Tensor, weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
) -> Tensor:
    """Deltas that move and scale references onto boxes: ``(dx / w, dy / h, log(w' / w), log(h' / h))`` times the weights.

    Girshick et al., "Rich feature hierarchies", appendix C. Sides below 1e-6 count as 1e-6, so that the result is finite.

    Args:
        boxes_xyxy: [..., 4]; gradient flows.
        references_xyxy: [..., 4] anchors or regions, of a shape that broadcasts.
        weights: factors on the four numbers. Standard deviations 0.1, 0.1, 0.2, 0.2, as other code bases give them, are the
            weights (10, 10, 5, 5).

    Returns:
        [..., 4].

    Example:
        >>> encode_boxes(torch.tensor([2.0, 0.0, 6.0, 4.0]), torch.tensor([0.0, 0.0, 4.0, 4.0]), (10.0, 10.0, 5.0, 5.0)).tolist()
        [5.0, 0.0, 0.0, 0.0]
    """
    (center, side), (base, extent) = _center_side(boxes_xyxy), _center_side(references_xyxy)
    side, extent = side.clamp(min=LEAST_SIDE), extent.clamp(min=LEAST_SIDE)
    deltas = torch.cat([(center - base) / extent, (side / extent).log()], dim=-1)
    return deltas * deltas.new_tensor(weights)


def decode_boxes(
    deltas: Tensor,
    references_xyxy: Tensor,
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
    bound_shrinking: bool = False,
) -> Tensor:
    """Decode boxes from deltas, the inverse of ``encode_boxes``; the boxes are not clipped to an image.

    Args:
        deltas: [..., 4]; gradient flows.
        references_xyxy: [..., 4] anchors or regions, of a shape that broadcasts (for [R, K, 4]: [R, 1, 4]).
        weights: the weights of the encoding.
        bound_shrinking: also bound sides from below: at least 16 / 1000 of the reference's side (as in mmdet, unlike torchvision
            and detectron2). The upper bound, 1000 / 16 times the reference's side, always applies.

    Returns:
        [..., 4].

    Example:
        >>> decode_boxes(torch.tensor([5.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 4.0, 4.0]), (10.0, 10.0, 5.0, 5.0)).tolist()
        [2.0, 0.0, 6.0, 4.0]
    """
    deltas = deltas / deltas.new_tensor(weights)
    base, extent = _center_side(references_xyxy)
    growth = deltas[..., 2:].clamp(min=-LARGEST_GROWTH if bound_shrinking else None, max=LARGEST_GROWTH)
    center, half = base + deltas[..., :2] * extent, extent * growth.exp() / 2
    return torch.cat([center - half, center + half], dim=-1)


def _center_side(boxes_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    corner, opposite = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return (corner + opposite) / 2, opposite - corner
