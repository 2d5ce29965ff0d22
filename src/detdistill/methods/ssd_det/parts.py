"""SSD-Det's refiner: the heads that move, score and merge the boxes of a bag.

Shape letters: n objects of the batch, P boxes of a bag, K classes, L levels, D width of the refiner, B images, G boxes of an
image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.functional.assign import pairwise_iou
from detdistill.functional.boxes import paired_iou
from detdistill.functional.cells import level_of_box
from detdistill.functional.regions import decode_boxes, encode_boxes, pool_boxes
from detdistill.methods.ssd_det.loss import RATIOS, TINY, ssd_det_bag, ssd_det_focal, ssd_det_merge
from detdistill.structures import Features

CODING = (10.0, 10.0, 5.0, 5.0)
"""Factors on encoded boxes: standard deviations 0.1, 0.1, 0.2, 0.2."""


@dataclass(frozen=True)
class Weights:
    """Factors of the refiner's losses, by the names of the terms."""

    position_1: float = 0.25
    mil_1: float = 0.25
    position_2: float = 0.25
    mil_2: float = 0.25
    negative: float = 0.75
    identity: float = 5.0


@dataclass(frozen=True)
class Refinement:
    """Result of a refiner for n objects: refined boxes, losses, and what led to them."""

    boxes_xyxy: Tensor
    """[n, 4] the refined boxes of stage 2; not clipped to the image."""
    losses: dict[str, Tensor]
    """The weighted losses; those of weight 0 are left out."""
    first_xyxy: Tensor
    """[n, 4] the refined boxes of stage 1, clipped to the image."""
    bags: tuple[Tensor, Tensor, Tensor]
    """[n, P, 4] each: the neighbourhood, the boxes moved once, the boxes moved twice."""
    valid: Tensor
    """[n, P] bool: the box of the neighbourhood lies inside the image."""
    scores: tuple[Tensor, Tensor]
    """[n] each: score of the bag for the object's class in both stages, in stage 2 times the spread identity of its boxes."""
    identity: Tensor | None
    """[n, P] predicted overlap (-1 to 1) with the object."""


class Refiner(nn.Module):
    """The heads that move, score and merge the boxes of a bag."""

    def __init__(
        self,
        num_classes: int,
        channels: int,
        *,
        width: int = 1024,
        pooled: int = 7,
        base: float = 56.0,
        ratios: Sequence[float] = RATIOS,
        shift: float = 0.2,
        valid_share: float = 0.7,
        topk: int = 7,
        negative_iou: float = 0.3,
        weights: Weights | None = None,
        with_identity: bool = True,
        resample: bool = False,
    ) -> None:
        """Build the layers for K classes and features of equal channels.

        Args:
            num_classes: K.
            channels: channels of the features.
            width: D, width of the layers.
            pooled: side of a pooled box in cells.
            base: side in pixels of boxes that are pooled from the finest level (``level_of_box``).
            ratios: ratios of the neighbourhood (``ssd_det_bag``).
            shift: moves of the neighbourhood.
            valid_share: smallest part of a valid box's area that lies inside the image.
            topk: number of boxes that are merged.
            negative_iou: largest IoU of a background box with any box of a bag.
            weights: factors of the losses; None: the released code's.
            with_identity: learn and use the spatial identity.
            resample: begin stage 2 with a neighbourhood of the first refined box, as the paper writes.
        """
        super().__init__()
        self.pooled, self.base, self.ratios, self.shift, self.valid_share = pooled, base, tuple(ratios), shift, valid_share
        self.topk, self.negative_iou, self.weights, self.resample = topk, negative_iou, weights or Weights(), resample
        inputs = channels * pooled**2
        self.fc1, self.fc2 = nn.Linear(inputs, width), nn.Linear(width, width)
        self.position1, self.position2 = nn.Linear(width, 4), nn.Linear(width, 4)
        self.cls1, self.ins1 = nn.Linear(width, num_classes + 1), nn.Linear(width, num_classes + 1)
        self.cls2, self.ins2 = nn.Linear(width, num_classes), nn.Linear(width, num_classes)
        self.with_identity = with_identity
        if with_identity:
            self.identity_fc1, self.identity_fc2 = nn.Linear(inputs, width), nn.Linear(width, width)
            self.identity = nn.Linear(width, 1)
        for layer in self.children():
            nn.init.normal_(cast(nn.Linear, layer).weight, std=0.01)
            nn.init.zeros_(cast(nn.Linear, layer).bias)

    def forward(
        self,
        features: Features,
        boxes_xyxy: Sequence[Tensor],
        labels: Sequence[Tensor],
        sizes_hw: Tensor,
        negatives_xyxy: Sequence[Tensor],
    ) -> Refinement:
        """Refine the boxes of a batch with at least one box.

        Args:
            features: maps of equal channels, finest first; gradient flows.
            boxes_xyxy: B tensors [G, 4], the noisy boxes.
            labels: B tensors [G] int64, 0 .. K-1.
            sizes_hw: [B, 2] height and width of each image without padding.
            negatives_xyxy: B tensors of random boxes, which are background where they overlap no box of a bag.
        """
        counts = [len(some) for some in boxes_xyxy]
        noisy, label = torch.cat(list(boxes_xyxy)).to(features.maps[0].dtype), torch.cat(list(labels))
        limits = sizes_hw.to(noisy).flip(1).repeat(1, 2)
        limit = limits.repeat_interleave(torch.tensor(counts, device=limits.device), dim=0)  # [n, 4] width, height, twice
        bag = ssd_det_bag(noisy, self.ratios, self.shift)
        valid = self._inside(bag, limit)
        offsets = self.position1(self._embed(self._pool(features, bag, counts)))
        losses = {"position_1": _position_loss(offsets, bag, noisy)}
        moved = decode_boxes(offsets.detach(), bag, CODING, bound_shrinking=True)

        embedded = self._embed(self._pool(features, moved, counts))
        losses["mil_1"], evidence = self._first_bags(embedded, label, valid)
        weight = evidence.sum(dim=1)
        first = torch.minimum(ssd_det_merge(moved, evidence, self.topk).clamp(min=0), limit)

        start = ssd_det_bag(first, self.ratios, self.shift) if self.resample else moved
        offsets = self.position2(self._embed(self._pool(features, start, counts)) if self.resample else embedded)
        losses["position_2"] = _position_loss(offsets, start, first, weight)
        last = decode_boxes(offsets.detach(), start, CODING, bound_shrinking=True)

        pooled = self._pool(features, last, counts)
        embedded = self._embed(pooled)
        classes, instances = self.cls2(embedded).sigmoid(), self.ins2(embedded).softmax(dim=1)
        score = (classes * instances).sum(dim=1)
        wanted = F.one_hot(label, score.shape[1]).to(score.dtype)
        losses["mil_2"] = (weight[:, None] * ssd_det_focal(score, wanted)).sum() / len(noisy)
        losses["negative"] = weight.mean() * self._on_negatives(features, negatives_xyxy, last, counts)
        identity = None
        if self.with_identity:
            identity = self._identity(pooled)
            target = (paired_iou(last, first[:, None].expand_as(last)) - 0.5) / 0.5
            losses["identity"] = F.smooth_l1_loss(identity, target)
            evidence = _of_class(classes.detach(), label) * _spread(identity.detach() / 2 + 0.5)
            certainty = (evidence * _of_class(instances.detach(), label)).sum(dim=1)
        else:
            evidence = _of_class((classes * instances).detach(), label)
            certainty = evidence.sum(dim=1)
        factors = asdict(self.weights)
        losses = {name: factors[name] * term for name, term in losses.items() if factors[name]}
        scores = weight, certainty
        return Refinement(ssd_det_merge(last, evidence, self.topk), losses, first, (bag, moved, last), valid, scores, identity)

    def _first_bags(self, embedded: Tensor, label: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The bag loss of stage 1, and how much each box speaks for its object's class [n, P], detached."""
        classes, instances = self.cls1(embedded).softmax(dim=-1), self.ins1(embedded).softmax(dim=1) * valid[..., None]
        instances = instances / instances.sum(dim=1, keepdim=True).clamp(min=TINY)
        scores = classes * instances
        return _bag_loss(scores, label, valid), _of_class(scores.detach(), label)

    def _inside(self, bag: Tensor, limit: Tensor) -> Tensor:
        """[n, P] bool: the boxes lie inside their images by more than ``valid_share`` of their areas."""
        limit = limit[:, None].expand_as(bag)
        shown = torch.minimum(bag.clamp(min=0), limit)
        area = (bag[..., 2:] - bag[..., :2]).prod(dim=-1)
        return (shown[..., 2:] - shown[..., :2]).clamp(min=0).prod(dim=-1) > self.valid_share * area

    def _pool(self, features: Features, bags: Tensor, counts: Sequence[int]) -> Tensor:
        """[n, P, C * S * S] the features of the boxes [n, P, 4] of all bags."""
        boxes = [some.flatten(0, 1) for some in bags.split(list(counts))]
        return self._pool_boxes(features, boxes).unflatten(0, bags.shape[:2])

    def _pool_boxes(self, features: Features, boxes: Sequence[Tensor]) -> Tensor:
        levels = level_of_box(torch.cat(list(boxes)), len(features.maps), self.base, plus_one=False)
        return pool_boxes(features, boxes, self.pooled, levels).flatten(1)

    def _embed(self, pooled: Tensor) -> Tensor:
        hidden: Tensor = self.fc2(self.fc1(pooled).relu()).relu()
        return hidden

    def _identity(self, pooled: Tensor) -> Tensor:
        """[n, P] the overlap of each box with its object, estimated from its features and the mean of its bag's."""
        hidden = self.identity_fc2(self.identity_fc1(pooled).relu()).relu()
        found: Tensor = self.identity(hidden + hidden.mean(dim=1, keepdim=True))
        return found[..., 0]

    def _on_negatives(self, features: Features, negatives: Sequence[Tensor], bags: Tensor, counts: Sequence[int]) -> Tensor:
        """Focal loss of the background boxes, summed, divided by the number of objects of the batch."""
        kept = [
            some[self.negative(some, own.flatten(0, 1))] for some, own in zip(negatives, bags.split(list(counts)), strict=True)
        ]
        found = self.cls2(self._embed(self._pool_boxes(features, kept))).sigmoid()
        return ssd_det_focal(found, torch.zeros_like(found)).sum() / len(bags)

    def negative(self, boxes_xyxy: Tensor, bags_xyxy: Tensor) -> Tensor:
        """[N] bool: boxes [N, 4] whose IoU with every box [M, 4] of an image's bags is small; all if the image has no bag."""
        if len(bags_xyxy) == 0:
            return torch.ones_like(boxes_xyxy[:, 0], dtype=torch.bool)
        return pairwise_iou(boxes_xyxy, bags_xyxy).amax(dim=1) < self.negative_iou


def _position_loss(offsets: Tensor, boxes: Tensor, wanted: Tensor, weight: Tensor | None = None) -> Tensor:
    """L1 between predicted and wanted offsets, summed over the coordinates, a mean over all boxes; ``weight`` [n]."""
    apart = (offsets - encode_boxes(wanted[:, None].expand_as(boxes), boxes, CODING)).abs().sum(dim=-1)
    return (apart if weight is None else apart * weight[:, None]).mean()


def _bag_loss(scores: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy of the bags' scores, summed over the classes; a mean over the bags that have a valid box."""
    bag = scores.sum(dim=1).clamp(0, 1)
    usable = valid.any(dim=1).to(bag.dtype)
    apart = F.binary_cross_entropy(bag, F.one_hot(label, bag.shape[1]).to(bag.dtype), reduction="none")
    return (apart.sum(dim=1) * usable).sum() / usable.sum().clamp(min=1)


def _of_class(scores: Tensor, label: Tensor) -> Tensor:
    """[n, P] the scores [n, P, K] of each object's own class."""
    return scores.gather(2, label[:, None, None].expand(-1, scores.shape[1], 1))[..., 0]


def _spread(scores: Tensor) -> Tensor:
    """Scores [n, P] moved and scaled to 0..1 within each bag; 0 if all are equal."""
    low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
    return (scores - low) / (high - low).clamp(min=TINY)
