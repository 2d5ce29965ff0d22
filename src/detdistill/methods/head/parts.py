"""Modules of HEAD: assistants, adapters of the student's features, and trial runs that measure the widths of layers.

Shape letters: B images, R regions of the whole batch, P points of an image, C channels, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from detdistill.detectors.contract import DetectorSpec, HasRegions, HasTowers
from detdistill.functional.boxes import boxes_from_distances, centerness_target, distances_to_sides, giou_loss
from detdistill.functional.counting import mean_over_ranks
from detdistill.functional.modes import evaluating
from detdistill.functional.precision import full_precision
from detdistill.methods.shared.align import LevelAdapters, LevelPair
from detdistill.structures import Batch, Features, Tower, View


class Stem(nn.Module):
    """1x1 convolutions that give the student's levels the channels that an assistant reads; levels that have them are kept."""

    def __init__(self, channels: Sequence[int], wanted: int) -> None:
        """Make one convolution for each number of channels other than ``wanted``."""
        super().__init__()
        self.adapters = LevelAdapters([LevelPair(level, level, mine, wanted) for level, mine in enumerate(channels)], shared=True)

    def forward(self, features: Features) -> Features:
        """Compute the levels in ``wanted`` channels, in full precision."""
        with full_precision(features.maps[0].device):
            return replace(features, maps=tuple(self.adapters(features.maps)))


class RegionAdapters(nn.ModuleList):
    """Linear layers, one for each pair of hidden layers: [R, D] -> [R, D'] each."""

    def __init__(self, widths: Sequence[int], wanted: Sequence[int]) -> None:
        """One layer from each width to the wanted width at the same place, with bias."""
        super().__init__(nn.Linear(mine, theirs) for mine, theirs in zip(widths, wanted, strict=True))

    def forward(self, layers: Sequence[Tensor]) -> list[Tensor]:
        """Map the hidden layers."""
        return [adapter(layer) for adapter, layer in zip(self, layers, strict=True)]


class TowerAdapters(nn.Module):
    """1x1 convolutions with bias, one for the classification tower and one for the regression tower, shared by the levels."""

    def __init__(self, channels: int, wanted: int) -> None:
        """Map C channels to the wanted number; equal numbers get convolutions, too."""
        super().__init__()
        self.classification, self.regression = (nn.Conv2d(channels, wanted, 1) for _ in range(2))

    def forward(self, tower: Tower, levels: Sequence[int]) -> list[Tensor]:
        """The adapted maps of the classification tower at ``levels``, then those of the regression tower."""
        classes = [self.classification(tower.classification[level]) for level in levels]
        return classes + [self.regression(tower.regression[level]) for level in levels]


class DenseAssistant(nn.Module):
    """The head of FCOS (Tian et al., ICCV 2019) with the settings of HEAD's released code, for training without a teacher.

    Two towers of convolutions with group norm, centre sampling, distances in strides, centerness on the regression tower.
    """

    radius = 1.5
    """Half of the side, in strides, of the square around a box's centre in which points are positive."""
    range_in_strides = 8.0
    """A level of stride s serves boxes whose farthest side is up to ``8 s`` from the point (64 pixels at stride 8)."""

    def __init__(self, channels: int, classes: int, strides: Sequence[int], convs: int = 4) -> None:
        """Build the head.

        Args:
            channels: C of all levels.
            classes: K.
            strides: stride of each level, finest first.
            convs: convolutions of each tower.
        """
        super().__init__()
        self.strides = tuple(strides)
        groups = next(number for number in range(min(32, channels), 0, -1) if channels % number == 0)
        self.classification, self.regression = (
            nn.Sequential(
                *(
                    part
                    for _ in range(convs)
                    for part in (nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(groups, channels), nn.ReLU())
                )
            )
            for _ in range(2)
        )
        self.logits = nn.Conv2d(channels, classes, 3, padding=1)
        self.distances = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(self.strides)))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.logits.bias, -4.59511985)  # type: ignore[arg-type]  # a probability of 0.01

    def tower(self, features: Features) -> Tower:
        """Compute the last maps of both towers."""
        classes = tuple(_normed(self.classification, level) for level in features.maps)
        boxes = tuple(_normed(self.regression, level) for level in features.maps)
        return Tower(classes, boxes, 1, features.strides)

    def predict(self, tower: Tower) -> tuple[Tensor, Tensor, Tensor]:
        """Compute logits [B, P, K], distances [B, P, 4] in strides, and centerness logits [B, P], level by level."""
        logits = [_flat(self.logits(level)) for level in tower.classification]
        distances = [_flat(self.distances(level)) * scale for level, scale in zip(tower.regression, self.scales, strict=True)]
        centerness = [_flat(self.centerness(level)) for level in tower.regression]
        return torch.cat(logits, dim=1), torch.cat(distances, dim=1).relu(), torch.cat(centerness, dim=1)[..., 0]

    def loss(self, tower: Tower, outputs: tuple[Tensor, Tensor, Tensor], batch: Batch) -> Tensor:
        """Focal loss, GIoU loss (weighted by the centerness of the target) and cross-entropy of the centerness, added."""
        logits, distances, centerness = outputs
        points, strides, farthest = self._points(tower, logits)
        wanted, terms = torch.zeros_like(logits), []
        for image, target in enumerate(batch.targets):
            objects = target.without_crowd()
            boxes = objects.boxes_xyxy.to(points)
            matched = self._matched(points, strides, farthest, boxes)
            index = torch.nonzero(matched >= 0).flatten()
            mine = boxes[matched[index]]
            wanted[image, index, objects.labels[matched[index]]] = 1
            weight = centerness_target(points[index], mine)
            found = boxes_from_distances(points[index], distances[image, index] * strides[index, None])
            entropy = F.binary_cross_entropy_with_logits(centerness[image, index], weight, reduction="sum")
            terms.append(torch.stack([(giou_loss(found, mine) * weight).sum(), entropy, weight.sum()]))
        overlap, entropy, weights = torch.stack(terms).sum(dim=0)
        count = mean_over_ranks(wanted.sum(), least=1)
        focal = sigmoid_focal_loss(logits, wanted, alpha=0.25, gamma=2, reduction="sum") / count
        return focal + overlap / mean_over_ranks(weights, least=1e-6) + entropy / count

    def _points(self, tower: Tower, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points [P, 2] in pixels, their strides [P], and the largest distance [P, 2] (lower and upper limit) of their level."""
        points, strides, limits = [], [], []
        for index, (level, stride) in enumerate(zip(tower.classification, self.strides, strict=True)):
            rows, columns = (
                (torch.arange(side, device=like.device, dtype=like.dtype) + 0.5) * stride for side in level.shape[-2:]
            )
            points.append(torch.cartesian_prod(rows, columns).flip(1))
            low = 0.0 if index == 0 else self.range_in_strides * self.strides[index - 1]
            high = torch.inf if index == len(self.strides) - 1 else self.range_in_strides * stride
            strides.append(like.new_full((len(points[-1]),), stride))
            limits.append(like.new_tensor([low, high]).expand(len(points[-1]), 2))
        return torch.cat(points), torch.cat(strides), torch.cat(limits)

    def _matched(self, points: Tensor, strides: Tensor, limits: Tensor, boxes: Tensor) -> Tensor:
        """[P] index of the smallest box whose centre region and size range contain the point; -1: none."""
        if not len(boxes):
            return torch.full_like(strides, -1, dtype=torch.int64)
        sides = distances_to_sides(points[:, None], boxes)  # [P, G, 4]
        reach = self.radius * strides[:, None]
        center = (boxes[:, :2] + boxes[:, 2:]) / 2
        near = (points[:, None] - center).abs().amax(dim=-1) < reach
        farthest = sides.amax(dim=-1)
        fits = (sides.amin(dim=-1) > 0) & near & (farthest >= limits[:, :1]) & (farthest <= limits[:, 1:])
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=-1)
        best, index = area.expand_as(fits).masked_fill(~fits, torch.inf).min(dim=1)
        return torch.where(best.isfinite(), index, -1)


def _normed(tower: nn.Sequential, level: Tensor) -> Tensor:
    """The tower's output; GroupNorm refuses one value per group (a level of one cell), whose normed value is its bias."""
    for part in tower:
        if isinstance(part, nn.GroupNorm) and level.numel() == part.num_groups:
            level = level * 0 + part.bias[:, None, None]
        else:
            level = part(level)
    return level


def _flat(level: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H * W, C], at least float32."""
    flat = level.flatten(2).transpose(1, 2)
    return flat if flat.dtype == torch.float64 else flat.float()


# ---------------------------------------------------------------------------------------------------------- trial runs


def _trial(spec: DetectorSpec) -> tuple[Features, Batch]:
    """Features of zeros for one image of twice the largest stride, and a batch without ground truth."""
    side = 2 * max(spec.strides)
    maps = tuple(
        torch.zeros(1, width, -(-side // stride), -(-side // stride))
        for width, stride in zip(spec.channels, spec.strides, strict=True)
    )
    size = torch.tensor([[side, side]])
    return Features(maps, spec.strides), Batch(torch.zeros(1, 3, side, side), size, (), (0,), (View((side, side), (side, side)),))


@torch.no_grad()
def hidden_widths(head: HasRegions, spec: DetectorSpec) -> tuple[int, ...]:
    """Width of each hidden layer of a region head, of a cascade's first stage; found by a run on one box."""
    features, batch = _trial(spec)
    device = _device(head)
    boxes = [torch.tensor([[0.0, 0.0, *batch.padding_hw]], device=device)]
    found = head.regions(features.to(device), boxes, batch.to(device))
    return tuple(layer.shape[1] for layer in found.before_refinement().hidden)


@torch.no_grad()
def tower_width(head: HasTowers, spec: DetectorSpec, depth: int | None) -> int:
    """Channels of a dense head's towers at a depth (None: after all blocks); found by a run on zeros."""
    features, _ = _trial(spec)
    with evaluating(head):  # type: ignore[arg-type]
        return head.tower(features.to(_device(head)), depth).classification[0].shape[1]


def _device(head: object) -> torch.device:
    assert isinstance(head, nn.Module)
    return next(head.parameters()).device
