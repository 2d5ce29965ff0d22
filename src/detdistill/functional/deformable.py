"""Multi-scale deformable attention in plain PyTorch, and the encoder layer of Deformable DETR built on it.

Zhu et al., "Deformable DETR", ICLR 2021, equation 3. Every cell of a pyramid looks at a few points around itself, on all
levels; where, and how much each point counts, are learned. No compiled kernel: ``grid_sample`` on any device.

Shape letters: B images, L levels, S = sum of H_l * W_l cells, Q queries, M heads, D channels of one head, P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def deformable_attention(value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples; outside the map the value is zero.

    Args:
        value: [B, S, M, D] the flattened levels one after the other, row by row.
        spatial_shapes: L pairs (rows, columns).
        locations: [B, Q, M, L, P, 2] x and y, 0..1 from edge to edge of the level.
        weights: [B, Q, M, L, P]; they sum to one over L and P.

    Returns:
        [B, Q, M * D].

    Example:
        >>> value = torch.arange(4.0).reshape(1, 4, 1, 1)  # one 2 x 2 level
        >>> middle = torch.full((1, 1, 1, 1, 1, 2), 0.5)
        >>> float(deformable_attention(value, [(2, 2)], middle, torch.ones(1, 1, 1, 1, 1)))
        1.5
    """
    images, _, heads, width = value.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)  # [B*M, L, Q, P, 2]
    sampled = []
    for level, cells in enumerate(torch.split(value, [rows * columns for rows, columns in spatial_shapes], dim=1)):
        maps = cells.permute(0, 2, 3, 1).reshape(images * heads, width, *spatial_shapes[level])
        sampled.append(F.grid_sample(maps, grids[:, level], mode="bilinear", padding_mode="zeros", align_corners=False))
    values = torch.stack(sampled, dim=2)  # [B*M, D, L, Q, P]
    factors = weights.permute(0, 2, 3, 1, 4).flatten(0, 1)[:, None]  # [B*M, 1, L, Q, P]
    summed = (values * factors).sum(dim=(2, 4))  # [B*M, D, Q]
    return summed.reshape(images, heads * width, queries).transpose(1, 2)


def sine_positions(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Sine and cosine of the cell's place, rows in the first half of the channels, columns in the second.

    Places are scaled to 0..2 pi over the map, so levels of one pyramid agree; the temperature is 10000 (as in DETR).

    Args:
        height: rows.
        width: columns.
        channels: D, any number.
        like: its device and dtype are used.

    Returns:
        [H * W, D].
    """
    count = math.ceil(channels / 4)  # sine and cosine of each frequency, for each of two axes
    exponents = torch.arange(count, device=like.device, dtype=like.dtype) / count
    frequencies = 2 * math.pi / 10000**exponents
    codes = []
    for size in (height, width):
        places = (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) / size
        angles = places[:, None] * frequencies
        codes.append(torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1))  # [size, D / 2]
    rows, columns = codes
    both = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1)
    return both.flatten(0, 1)[:, :channels]


def cell_centers(spatial_shapes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """[S, 2] x and y (0..1) of every cell's centre, level by level."""
    centers = []
    for rows, columns in spatial_shapes:
        y = (torch.arange(rows, device=like.device, dtype=like.dtype) + 0.5) / rows
        x = (torch.arange(columns, device=like.device, dtype=like.dtype) + 0.5) / columns
        centers.append(torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=-1).flatten(0, 1))
    return torch.cat(centers)


def num_heads(channels: int, wanted: int = 8) -> int:
    """The largest number of heads up to ``wanted`` that divides the channels."""
    return max(heads for heads in range(1, wanted + 1) if channels % heads == 0)


class DeformableSelfAttention(nn.Module):
    """Each cell of a pyramid attends to ``points`` places on every level, for each head.

    Initialised as in Deformable DETR: heads look in evenly spread directions, the k-th point k cells away, all equally.
    """

    def __init__(self, channels: int, levels: int, heads: int, points: int = 4) -> None:
        """Build it.

        Args:
            channels: of every level; a multiple of ``heads``.
            levels: L.
            heads: M.
            points: P, for each head and level.
        """
        super().__init__()
        self.shape = (heads, levels, points)
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Deformable DETR's initialisation (appendix A.4)."""
        heads, levels, points = self.shape
        angles = torch.arange(heads) * (2 * math.pi / heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        offsets = directions[:, None, None] * torch.arange(1, points + 1)[:, None]  # [M, 1, P, 2], in cells
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, cells: Tensor, positions: Tensor, spatial_shapes: Sequence[tuple[int, int]], padding: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            cells: [B, S, C].
            positions: [S, C], added to what decides where to look, not to what is seen.
            spatial_shapes: L pairs (rows, columns).
            padding: [B, S] bool, True where there is nothing to see; or None.

        Returns:
            [B, S, C].
        """
        heads, levels, points = self.shape
        images, count, channels = cells.shape
        value = self.value_proj(cells)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        query = cells + positions
        # Places need at least float32: half precision is off by a cell at the far side of a large map.
        offsets = _at_least_float32(self.sampling_offsets(query)).view(images, count, heads, levels, points, 2)
        weights = _at_least_float32(self.attention_weights(query)).view(images, count, heads, levels * points)
        sizes = torch.tensor([(columns, rows) for rows, columns in spatial_shapes], device=offsets.device, dtype=offsets.dtype)
        centers = cell_centers(spatial_shapes, like=offsets)
        locations = centers[:, None, None, None] + offsets / sizes[:, None]
        shares = weights.softmax(dim=-1).view(images, count, heads, levels, points)
        value = value.to(offsets.dtype).view(images, count, heads, channels // heads)
        out: Tensor = self.output_proj(deformable_attention(value, spatial_shapes, locations, shares).to(cells.dtype))
        return out


class DeformableEncoderLayer(nn.Module):
    """Attention and a feed-forward part, each with a residual and a LayerNorm after it; no dropout."""

    def __init__(self, channels: int, levels: int, heads: int, points: int = 4) -> None:
        """Build it; the feed-forward part is 4 times as wide as ``channels``."""
        super().__init__()
        self.attention = DeformableSelfAttention(channels, levels, heads, points)
        self.attention_norm = nn.LayerNorm(channels)
        self.feed_forward = nn.Sequential(nn.Linear(channels, 4 * channels), nn.ReLU(), nn.Linear(4 * channels, channels))
        self.feed_forward_norm = nn.LayerNorm(channels)

    def forward(
        self, cells: Tensor, positions: Tensor, spatial_shapes: Sequence[tuple[int, int]], padding: Tensor | None = None
    ) -> Tensor:
        """As ``DeformableSelfAttention.forward``."""
        cells = self.attention_norm(cells + self.attention(cells, positions, spatial_shapes, padding))
        out: Tensor = self.feed_forward_norm(cells + self.feed_forward(cells))
        return out


class DeformableEncoder(nn.Module):
    """The encoder of Deformable DETR on a pyramid of equal channels.

    Places are relative to the padded map, where Deformable DETR takes the valid part; padded cells are never seen.
    """

    def __init__(self, channels: int, levels: int, layers: int, heads: int = 8, points: int = 4) -> None:
        """Build it.

        Args:
            channels: of every level.
            levels: L.
            layers: how many; 0 gives the identity.
            heads: at most; the largest number up to it that divides ``channels`` is used.
            points: sampled by each head on each level.
        """
        super().__init__()
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(channels, levels, num_heads(channels, heads), points) for _ in range(layers)
        )
        self.level_embedding = nn.Parameter(torch.randn(levels, channels)) if layers else None

    def forward(self, maps: Sequence[Tensor], padding: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Let the cells of all levels see each other.

        Args:
            maps: L tensors [B, C, H_l, W_l].
            padding: L masks [B, H_l, W_l] bool, True where a cell shows padding only; or None.

        Returns:
            L tensors of the same shapes.
        """
        if self.level_embedding is None:
            return list(maps)
        shapes = [(level.shape[2], level.shape[3]) for level in maps]
        cells = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)  # [B, S, C]
        places = [
            sine_positions(rows, columns, cells.shape[2], like=self.level_embedding) + embedding
            for (rows, columns), embedding in zip(shapes, self.level_embedding, strict=True)
        ]
        hidden = None if padding is None else torch.cat([mask.flatten(1) for mask in padding], dim=1)
        positions = torch.cat(places)
        for layer in self.layers:
            cells = layer(cells, positions, shapes, hidden)
        levels = torch.split(cells, [rows * columns for rows, columns in shapes], dim=1)
        return [level.transpose(1, 2).reshape(len(level), -1, *shape) for level, shape in zip(levels, shapes, strict=True)]


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
