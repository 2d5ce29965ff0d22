"""Modules of G-DetKD: the level matching of SGFI, the projections of CKD, and the width of a region embedding.

Shape letters: N regions of the whole batch, L levels of the student, B images, C channels, S side of a pooled region, A anchors
of a cell, D and E widths of embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.contract import Detector, HasRegions
from detdistill.functional.modes import evaluating
from detdistill.methods.g_detkd.loss import g_detkd_blend, g_detkd_level_weights
from detdistill.structures import Batch, Features, Origin, Regions, Target, View

LEAST_TAU = 1e-3
"""Smallest value of the learned temperature."""


class Matched(NamedTuple):
    """Result of ``LevelMatching``."""

    regions: Tensor
    """[N, Ct, S, S] weighted sum of the student's levels, in the teacher's channels."""
    weights: Tensor
    """[N, L] weight of each level; rows sum to 1."""


class LevelMatching(nn.Module):
    """Soft matching of SGFI: weights the levels of the student by the similarity of their regions to the teacher's region.

    ``A_l = adapt(S_l)``, ``k_l = embed(A_l)``, ``q = embed(T)``, ``weights = softmax_l(k_l . q / tau)`` and the result is
    ``sum_l weights_l A_l``. ``embed`` is two 3x3 convolutions of stride 2 without padding.

    The adapter is affine and the weights sum to 1, so a shared adapter is applied once, to the weighted sum. The adapter and
    the first convolution of ``embed`` are one convolution of the student's regions, so ``A_l`` is never computed for the keys.
    """

    def __init__(
        self,
        channels: Sequence[int],
        teacher_channels: int,
        shared: bool = True,
        embed_channels: tuple[int, int] = (128, 64),
        relu: bool = True,
        tau: float = 1.0,
    ) -> None:
        """Make the convolutions with PyTorch's initialisation.

        Args:
            channels: the student's channels of each level.
            teacher_channels: Ct.
            shared: one adapter for all levels, which then have equal channels; False: one for each level.
            embed_channels: channels of the two convolutions of ``embed``.
            relu: a ReLU follows the second convolution, too.
            tau: initial value of the temperature.
        """
        super().__init__()
        self.adapters = nn.ModuleList(nn.Conv2d(width, teacher_channels, 1) for width in (channels[:1] if shared else channels))
        self.embed1 = nn.Conv2d(teacher_channels, embed_channels[0], 3, stride=2)
        self.embed2 = nn.Conv2d(embed_channels[0], embed_channels[1], 3, stride=2)
        self.relu = relu
        self.tau = nn.Parameter(torch.full((1,), tau))

    def forward(self, student: Sequence[Tensor], teacher: Tensor) -> Matched:
        """Match the levels.

        Args:
            student: the same N regions pooled from each of L levels, [N, C_l, S, S] with S at least 7; gradient flows.
            teacher: [N, Ct, S, S] the regions pooled from the teacher's own level.
        """
        folded = [self._folded(adapter) for adapter in self.adapters]
        first = [F.conv2d(pooled, *folded[level % len(folded)], stride=2) for level, pooled in enumerate(student)]
        keys = torch.stack([self._embed(hidden) for hidden in first])  # [L, N, E]
        query = self._embed(self.embed1(teacher))
        weights = g_detkd_level_weights(keys, query, self.tau.clamp(min=LEAST_TAU))
        if len(self.adapters) == 1:
            return Matched(self.adapters[0](g_detkd_blend(student, weights)), weights)
        adapted = [adapter(pooled) for adapter, pooled in zip(self.adapters, student, strict=True)]
        return Matched(g_detkd_blend(adapted, weights), weights)

    def _folded(self, adapter: nn.Module) -> tuple[Tensor, Tensor]:
        """Weight [E1, C, 3, 3] and bias [E1] of the first convolution after an adapter; exact, as nothing is padded."""
        assert isinstance(adapter, nn.Conv2d)
        assert adapter.bias is not None
        assert self.embed1.bias is not None
        weight = torch.einsum("etyx,tc->ecyx", self.embed1.weight, adapter.weight.flatten(1))
        return weight, self.embed1.bias + self.embed1.weight.sum(dim=(2, 3)) @ adapter.bias

    def _embed(self, hidden: Tensor) -> Tensor:
        """The rest of ``embed`` after its first convolution: [N, E]."""
        rows = self.embed2(hidden.relu()).flatten(1)
        return rows.relu() if self.relu else rows


class CellProjection(nn.Module):
    """Embeddings of a dense detector's boxes: the vector of its class tower at each box's cell, projected for its anchor.

    Each anchor of a cell has a projection of its own (linear, without bias), so that boxes of one cell differ. All levels share
    them if their channels are equal.
    """

    def __init__(self, channels: Sequence[int], anchors: int, width: int) -> None:
        """Make the projections with PyTorch's initialisation.

        Args:
            channels: channels of the tower on each level.
            anchors: A, the largest number of anchors of a cell.
            width: D.
        """
        super().__init__()
        own = channels[:1] if len(set(channels)) == 1 else channels
        self.anchors = anchors
        self.projections = nn.ModuleList(nn.Linear(count, anchors * width, bias=False) for count in own)

    def forward(self, maps: Sequence[Tensor], origin: Origin) -> Tensor:
        """[N, D] embeddings of boxes that all come from a cell; maps [B, C_l, H_l, W_l] of each level, gradient flows."""
        found, order = [], []
        for level, level_maps in enumerate(maps):
            mine = torch.nonzero(origin.level == level).flatten()
            rows = level_maps[origin.image[mine], :, origin.cell[mine, 0], origin.cell[mine, 1]]
            by_anchor = self.projections[level % len(self.projections)](rows).unflatten(1, (self.anchors, -1))
            found.append(by_anchor[torch.arange(len(mine), device=mine.device), origin.anchor[mine]])
            order.append(mine)
        return torch.cat(found)[torch.cat(order).argsort()]


@torch.no_grad()
def region_width(detector: Detector) -> int:
    """D of the region embedding of a two-stage detector, from one trial run of its region head; 0 if it has none."""
    assert isinstance(detector, HasRegions)
    spec = detector.spec
    side = 2 * max(spec.strides)
    tensor = next(iter(detector.parameters()), torch.zeros(()))
    maps = tuple(
        tensor.new_zeros(1, channels, -(-side // stride), -(-side // stride))
        for channels, stride in zip(spec.channels, spec.strides, strict=True)
    )
    device = tensor.device
    nobody = Target(*(torch.zeros(shape, dtype=kind, device=device) for shape, kind in _EMPTY))
    batch = Batch(
        tensor.new_zeros(1, 3, side, side),
        torch.tensor([[side, side]], device=device),
        (nobody,),
        (0,),
        (View((side, side), (side, side)),),
    )
    with evaluating(detector):
        found: Regions = detector.regions(Features(maps, spec.strides), [tensor.new_tensor([[0.0, 0.0, side, side]])], batch)
    embedding = found.before_refinement().embedding
    return 0 if embedding is None else embedding.shape[1]


_EMPTY = (((0, 4), torch.float32), ((0,), torch.int64), ((0,), torch.bool))
"""Shapes and types of the boxes, labels and crowd flags of an image without objects."""
