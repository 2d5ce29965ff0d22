"""Modules of ScaleKD: scale-decoupled features (SDF), and the attention of the cross-scale assistant (CSA).

Shape letters: B images, C channels (Cs of the student, Ct of the teacher), D width, H x W cells of the student's map, h x w
cells of the teacher's, K blocks of cells of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.structures import Batch, Features, Taught, View

DILATIONS = (1, 2, 3)
"""Dilation of the three branches of SDF."""


@dataclass(frozen=True)
class ScaleKDTaught(Taught):
    """The teacher's maps. They may be those of an image of twice the size."""

    deepest: Features | None
    """The last map of the backbone; None if no term reads it."""
    features: Features | None
    """The neck's maps; None if no term reads them."""


class ScaleDecoupling(nn.Module):
    """SDF: three residual bottlenecks of dilation 1, 2 and 3, each followed by two linear layers at every cell.

    ``u_b = relu(x + c3(relu(c2_b(relu(c1(x))))))``, and the result is the concatenation of ``w2(gelu(w1(u_b)))``. The paper's
    layers read a flattened map; these read each cell alone, so that maps of any size fit.
    """

    def __init__(self, width: int, shared: bool = True) -> None:
        """Make the layers with PyTorch's initialisation.

        Args:
            width: D; the bottlenecks have a quarter of it.
            shared: the branches share their weights and differ in their dilation alone.
        """
        super().__init__()
        inner = max(1, width // 4)
        count = 1 if shared else len(DILATIONS)
        self.reduce = nn.ModuleList(nn.Conv2d(width, inner, 1) for _ in range(count))
        self.spread = nn.ModuleList(nn.Conv2d(inner, inner, 3) for _ in range(count))
        self.expand = nn.ModuleList(nn.Conv2d(inner, width, 1) for _ in range(count))
        self.cells = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1), nn.GELU(), nn.Conv2d(width, width, 1)) for _ in range(count)
        )

    def forward(self, maps: Tensor) -> Tensor:
        """[B, D, H, W] -> [B, 3 D, H, W]."""
        hidden = [reduce(maps).relu() for reduce in self.reduce]
        found = []
        for branch, dilation in enumerate(DILATIONS):
            index = branch % len(self.reduce)
            layer = cast(nn.Conv2d, self.spread[index])
            spread = F.conv2d(hidden[index], layer.weight, layer.bias, padding=dilation, dilation=dilation)
            found.append(self.cells[index]((maps + self.expand[index](spread.relu())).relu()))
        return torch.cat(found, dim=1)


class CrossScaleAttention(nn.Module):
    """Multi-scale cross-attention: the student's cells ask, and blocks of the teacher's cells answer.

    The heads form two groups. Group i reads the teacher's map reduced by a convolution of kernel and stride r_i, a LayerNorm and
    a GELU, as in shunted attention (Ren et al., "Shunted Self-Attention via Multi-Scale Token Aggregation", CVPR 2022). A
    depthwise 3x3 convolution of the values is added to them. All levels share the weights; rates may differ between levels, and
    each rate has its own convolution.
    """

    def __init__(self, channels: int, teacher_channels: int, width: int, heads: int, rates: Sequence[tuple[int, int]]) -> None:
        """Make the layers with PyTorch's initialisation.

        Args:
            channels: Cs.
            teacher_channels: Ct.
            width: D, a multiple of ``heads``.
            heads: number of heads, even.
            rates: the rates of both groups for each level.
        """
        super().__init__()
        self.heads = heads // 2
        used = sorted({rate for pair in rates for rate in pair})
        self.query = nn.Linear(channels, width)
        self.reduce = nn.ModuleDict(
            {str(rate): nn.Conv2d(teacher_channels, teacher_channels, rate, stride=rate) for rate in used}
        )
        self.norm = nn.ModuleDict({str(rate): nn.LayerNorm(teacher_channels) for rate in used})
        self.key = nn.ModuleList(nn.Linear(teacher_channels, width // 2) for _ in range(2))
        self.value = nn.ModuleList(nn.Linear(teacher_channels, width // 2) for _ in range(2))
        self.near = nn.ModuleList(nn.Conv2d(width // 2, width // 2, 3, padding=1, groups=width // 2) for _ in range(2))
        self.out = nn.Linear(width, channels)

    def forward(self, student: Tensor, teacher: Tensor, rates: tuple[int, int], padding: Tensor | None = None) -> Tensor:
        """Read the teacher's map.

        Args:
            student: [B, Cs, H, W].
            teacher: [B, Ct, h, w], of any size.
            rates: rate of each group.
            padding: [B, h, w] bool, True for cells of the teacher that are not read; None: none. Each image needs one cell.

        Returns:
            [B, Cs, H, W].
        """
        queries = self.query(student.flatten(2).transpose(1, 2)).chunk(2, dim=2)
        if padding is not None:
            teacher = teacher.masked_fill(padding[:, None], 0.0)
        read = [self._group(index, queries[index], teacher, rate, padding) for index, rate in enumerate(rates)]
        return self.out(torch.cat(read, dim=2)).transpose(1, 2).unflatten(2, student.shape[-2:])

    def _group(self, index: int, queries: Tensor, teacher: Tensor, rate: int, padding: Tensor | None) -> Tensor:
        """The heads of one group: [B, H * W, D / 2]."""
        missing = (0, -teacher.shape[-1] % rate, 0, -teacher.shape[-2] % rate)  # whole blocks, so that no cell is lost
        blocks = self.reduce[str(rate)](F.pad(teacher, missing))
        rows = F.gelu(self.norm[str(rate)](blocks.flatten(2).transpose(1, 2)))  # [B, K, Ct]
        values, mask = self.value[index](rows), None
        if padding is not None:
            full = F.max_pool2d(F.pad((~padding[:, None]).float(), missing), rate).flatten(2) > 0  # [B, 1, K]
            values, mask = values.masked_fill(~full.transpose(1, 2), 0.0), full[:, None]
        map_of_values = values.transpose(1, 2).unflatten(2, blocks.shape[-2:])
        values = values + self.near[index](map_of_values).flatten(2).transpose(1, 2)
        asks, keys, values = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (queries, self.key[index](rows), values))
        return F.scaled_dot_product_attention(asks, keys, values, attn_mask=mask).transpose(1, 2).flatten(2)


def default_rates(stride: float) -> tuple[int, int]:
    """Rates of both groups for a teacher's map of a given stride, by the stages of shunted attention.

    Example:
        >>> [default_rates(stride) for stride in (4, 8, 16, 32)]
        [(8, 4), (4, 2), (2, 1), (2, 1)]
    """
    if stride < 6:
        return 8, 4
    return (4, 2) if stride < 12 else (2, 1)


def enlarged(batch: Batch, factor: int) -> Batch:
    """The batch with images of ``factor`` times the size (bilinear); boxes are scaled, masks are dropped."""
    if factor == 1:
        return batch
    images = F.interpolate(batch.images, scale_factor=factor, mode="bilinear", align_corners=False)
    targets = [replace(target, boxes_xyxy=target.boxes_xyxy * factor, masks=None) for target in batch.targets]
    return Batch(
        images, batch.sizes * factor, tuple(targets), batch.ids, tuple(_enlarged_view(view, factor) for view in batch.views)
    )


def _enlarged_view(view: View, factor: int) -> View:
    (height, width), scale, offset = view.size_hw, view.scale_xy, view.offset_xy
    return replace(
        view,
        size_hw=(height * factor, width * factor),
        scale_xy=(scale[0] * factor, scale[1] * factor),
        offset_xy=(offset[0] * factor, offset[1] * factor),
    )
