"""Multi-scale deformable attention in plain PyTorch, and the layers of Deformable DETR built on it.

Zhu et al., "Deformable DETR", ICLR 2021, equation 3. Every query samples a few points around its reference, on all
levels; the places of the points and their weights are learned. There is no compiled kernel: ``grid_sample`` is used on any
device, and on a CPU weighted sums of cells, which give the same values in a quarter of the time.

References are fractions of the VALID image. ``valid_ratios`` is the valid part of each padded map, so results do not depend on
how far a batch is padded.

Shape letters: B images, L levels, S = sum of H_l * W_l cells, Q queries, M heads, D channels of one head, P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.functional.positions import sine_positions
from detdistill.functional.weighted_rows import weighted_rows

LEAST_ROW = 16
"""Smallest number of channels of a head for which weighted sums of cells are used on a CPU; at 8, ``grid_sample`` is faster."""


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
    points = [locations.shape[4]] * locations.shape[3]
    return sampled_sums(value, spatial_shapes, points, locations.flatten(3, 4), weights.flatten(3, 4))


def sampled_sums(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], points: Sequence[int], locations: Tensor, weights: Tensor
) -> Tensor:
    """``deformable_attention`` with another number of points on each level, as in D-FINE; T is their sum.

    Args:
        value: [B, S, M, D].
        spatial_shapes: L pairs (rows, columns).
        points: P of each level.
        locations: [B, Q, M, T, 2] x and y, 0..1 from edge to edge of the level; the first level's points come first.
        weights: [B, Q, M, T].

    Returns:
        [B, Q, M * D].
    """
    # Queries last: all that follows then runs along them, and nothing is copied if the caller had them last in memory.
    places, shares = locations.permute(0, 2, 3, 4, 1), weights.permute(0, 2, 3, 1)
    attended = (_by_cells if by_cells(value) else _by_grids)(value, spatial_shapes, points, places, shares)
    return attended.permute(0, 3, 1, 2).flatten(2)


def by_cells(value: Tensor) -> bool:
    """Whether weighted sums of cells are faster than ``grid_sample`` for values [B, S, M, D]."""
    return value.device.type == "cpu" and value.shape[3] >= LEAST_ROW


def _by_grids(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], points: Sequence[int], places: Tensor, shares: Tensor
) -> Tensor:
    """[B, M, D, Q] from places [B, M, T, 2, Q] and shares [B, M, T, Q], by ``grid_sample``."""
    images, _, heads, width = value.shape
    grids = (2 * places - 1).flatten(0, 1).permute(0, 1, 3, 2)  # [B*M, T, Q, 2]
    factors = shares.flatten(0, 1)[:, None]  # [B*M, 1, T, Q]
    levels = [rows * columns for rows, columns in spatial_shapes]
    summed = value.new_zeros(())
    for shape, cells, grid, factor in zip(
        spatial_shapes,
        torch.split(value, levels, dim=1),
        torch.split(grids, list(points), dim=1),
        torch.split(factors, list(points), dim=2),
        strict=True,
    ):
        maps = cells.permute(0, 2, 3, 1).reshape(images * heads, width, *shape)
        samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        summed = summed + (samples * factor).sum(dim=2)  # [B*M, D, Q]; level by level needs least memory
    return summed.view(images, heads, width, -1)


def _by_cells(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], points: Sequence[int], places: Tensor, shares: Tensor
) -> Tensor:
    """The same: every sample is a weighted sum of four cells, so a query's result is one of 4 T cells."""
    images, cells, heads, width = value.shape
    count, device = places.shape[-1], value.device
    shapes = torch.tensor(spatial_shapes, device=device)  # [L, 2]
    starts = F.pad(shapes.prod(dim=1).cumsum(0), (1, 0))[:-1]  # [L]
    of_points = torch.repeat_interleave(torch.tensor(points, device=device))  # [T] the level of each point
    rows, columns = shapes[of_points][:, :, None].unbind(1)  # [T, 1]
    firsts = torch.arange(0, images * cells, cells, device=device)[:, None, None, None] + starts[of_points][:, None]
    firsts = firsts * heads + torch.arange(heads, device=device)[:, None, None]  # [B, M, T, 1] in rows of the table
    left, right = _neighbours(places[..., 0, :] * columns - 0.5, columns)
    upper, lower = _neighbours(places[..., 1, :] * rows - 0.5, rows)
    index, weights = [], []
    for row, row_weight in (upper, lower):
        row, row_weight = row * (columns * heads).int() + firsts.int(), row_weight * shares
        for column, column_weight in (left, right):
            index.append(row + column * heads)
            weights.append(row_weight * column_weight)
    bags, factors = (
        torch.stack(corners, dim=3).flatten(2, 3).transpose(2, 3).reshape(images * heads * count, -1)
        for corners in (index, weights)
    )
    summed = weighted_rows(value.reshape(-1, width), bags, factors)
    return summed.view(images, heads, count, width).transpose(2, 3)


def _neighbours(coordinates: Tensor, count: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two cells around each coordinate (in cells, from the first one's centre), and their linear weights; 0 outside."""
    low = coordinates.detach().floor()
    part = coordinates - low
    found = []
    for cell, weight in ((low, 1 - part), (low + 1, part)):
        inside = (cell >= 0) & (cell < count)
        found.append((cell.int().clamp(min=0).minimum(count.int() - 1), weight * inside))  # NaN becomes some cell, weight NaN
    return found[0], found[1]


def valid_ratios(padding: Sequence[Tensor]) -> Tensor:
    """Valid part of each padded map, counted in whole cells as in Deformable DETR.

    Args:
        padding: L masks [B, H_l, W_l] bool, True where a cell shows padding only.

    Returns:
        [B, L, 2] valid columns over W_l, valid rows over H_l.
    """
    ratios = [torch.stack([(~m).any(1).float().mean(1), (~m).any(2).float().mean(1)], dim=-1) for m in padding]
    return torch.stack(ratios, dim=1)


def cell_centers(spatial_shapes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """[S, 2] x and y of every cell's centre, 0..1 of its padded map, level by level."""
    centers = []
    for rows, columns in spatial_shapes:
        y = (torch.arange(rows, device=like.device, dtype=like.dtype) + 0.5) / rows
        x = (torch.arange(columns, device=like.device, dtype=like.dtype) + 0.5) / columns
        centers.append(torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=-1).flatten(0, 1))
    return torch.cat(centers)


def places_of_cells(spatial_shapes: Sequence[tuple[int, int]], ratios: Tensor) -> Tensor:
    """[B, S, 2] x and y of every cell's centre as fractions of the valid image, above 1 in padding; ``ratios`` [B, L, 2]."""
    counts = torch.tensor([rows * columns for rows, columns in spatial_shapes], device=ratios.device)
    return cell_centers(spatial_shapes, like=ratios) / ratios.repeat_interleave(counts, dim=1)


def num_heads(channels: int, wanted: int = 8) -> int:
    """The largest number of heads up to ``wanted`` that divides the channels."""
    return max(heads for heads in range(1, wanted + 1) if channels % heads == 0)


class DeformableAttention(nn.Module):
    """Deformable attention: for each head, a query samples ``points`` places on every level.

    Initialised as in Deformable DETR: the heads' directions are evenly spread, the k-th point is k cells away, and all points
    have equal weights.
    """

    def __init__(self, channels: int, levels: int, heads: int, points: int = 4) -> None:
        """Build it.

        Args:
            channels: number of channels of queries and of every level; a multiple of ``heads``.
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
        """Initialise the weights as in Deformable DETR (appendix A.4)."""
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
        self,
        queries: Tensor,
        references: Tensor,
        cells: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        ratios: Tensor,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Attend to the cells, without a residual connection.

        Args:
            queries: [B, Q, C].
            references: [B, Q, 2] x and y, or [B, Q, 4] box as centre and size, as fractions of the valid image. Learned
                offsets are in cells for a point, and in halves of the box's sides for a box.
            cells: [B, S, C] cells that are sampled.
            spatial_shapes: L pairs (rows, columns).
            ratios: [B, L, 2] valid part of each map (x, y).
            padding: [B, S] bool, True for cells of padding, which count as zeros; or None.

        Returns:
            [B, Q, C].
        """
        heads, levels, points = self.shape
        images, count, channels = queries.shape
        value = self.value_proj(cells)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        # Queries last, as in ``deformable_attention``: a softmax over a few neighbouring numbers is slow on a CPU.
        # Places need at least float32: half precision is off by a cell at the far side of a large map.
        offsets, weights = (
            _at_least_float32(layer(queries)).transpose(1, 2).contiguous()
            for layer in (self.sampling_offsets, self.attention_weights)
        )
        offsets = offsets.view(images, heads, levels, points, 2, count)
        shares = weights.view(images, heads, levels * points, count).softmax(dim=2)
        pairs = references.shape[-1] // 2  # the centre, and the size of a box
        places = references.to(offsets.dtype).transpose(1, 2).reshape(images, 1, pairs, 2, count)
        places = (places * ratios.to(offsets.dtype)[:, :, None, :, None])[:, None]  # [B, 1, L, 1 or 2, 2, Q]
        if references.shape[-1] == 2:
            sizes = [(columns, rows) for rows, columns in spatial_shapes]
            offsets = offsets / torch.tensor(sizes, device=offsets.device, dtype=offsets.dtype)[:, None, :, None]
        else:
            offsets = offsets / points * places[:, :, :, 1:] * 0.5
        locations = (places[:, :, :, :1] + offsets).permute(0, 5, 1, 2, 3, 4)
        shares = shares.view(images, heads, levels, points, count).permute(0, 4, 1, 2, 3)
        value = value.to(offsets.dtype).view(images, -1, heads, channels // heads)
        attended = deformable_attention(value, spatial_shapes, locations, shares)
        out: Tensor = self.output_proj(attended.to(queries.dtype))
        return out


def _feed_forward(channels: int, width: int | None) -> nn.Sequential:
    width = width or 4 * channels
    return nn.Sequential(nn.Linear(channels, width), nn.ReLU(inplace=True), nn.Linear(width, channels))


class DeformableEncoderLayer(nn.Module):
    """Self-attention among the cells of a pyramid, then a feed-forward part; LayerNorm after each residual, no dropout."""

    def __init__(self, channels: int, levels: int, heads: int, points: int = 4, width: int | None = None) -> None:
        """Build it; ``width`` of the feed-forward part: 4 times ``channels`` when None."""
        super().__init__()
        self.attention = DeformableAttention(channels, levels, heads, points)
        self.attention_norm = nn.LayerNorm(channels)
        self.feed_forward = _feed_forward(channels, width)
        self.feed_forward_norm = nn.LayerNorm(channels)

    def forward(
        self,
        cells: Tensor,
        positions: Tensor,
        places: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        ratios: Tensor,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Apply the layer.

        Args:
            cells: [B, S, C].
            positions: [B, S, C] position embeddings, added to the queries of the attention but not to its values.
            places: [B, S, 2] centres of the cells (``places_of_cells``).
            spatial_shapes: as in ``DeformableAttention.forward``.
            ratios: as in ``DeformableAttention.forward``.
            padding: as in ``DeformableAttention.forward``.

        Returns:
            [B, S, C].
        """
        attended = self.attention(cells + positions, places, cells, spatial_shapes, ratios, padding)
        cells = self.attention_norm(cells + attended)
        out: Tensor = self.feed_forward_norm(cells + self.feed_forward(cells))
        return out


class DeformableDecoderLayer(nn.Module):
    """Optional self-attention of queries, attention to a pyramid, a feed-forward part; LayerNorm after each, no dropout."""

    def __init__(
        self,
        channels: int,
        levels: int,
        heads: int,
        points: int = 4,
        width: int | None = None,
        self_attention: bool = True,
    ) -> None:
        """Build it; ``width`` of the feed-forward part: 4 times ``channels`` when None."""
        super().__init__()
        self.self_attention = nn.MultiheadAttention(channels, heads, batch_first=True) if self_attention else None
        self.self_attention_norm = nn.LayerNorm(channels) if self_attention else None
        self.cross_attention = DeformableAttention(channels, levels, heads, points)
        self.cross_attention_norm = nn.LayerNorm(channels)
        self.feed_forward = _feed_forward(channels, width)
        self.feed_forward_norm = nn.LayerNorm(channels)

    def forward(
        self,
        queries: Tensor,
        references: Tensor,
        cells: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        ratios: Tensor,
        padding: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Apply the layer: as ``DeformableAttention.forward``; ``positions`` [B, Q, C] are added to queries and keys only."""
        if self.self_attention is not None and self.self_attention_norm is not None:
            keys = queries if positions is None else queries + positions
            seen, _ = self.self_attention(keys, keys, queries, need_weights=False)
            queries = self.self_attention_norm(queries + seen)
        looking = queries if positions is None else queries + positions
        queries = self.cross_attention_norm(
            queries + self.cross_attention(looking, references, cells, spatial_shapes, ratios, padding)
        )
        out: Tensor = self.feed_forward_norm(queries + self.feed_forward(queries))
        return out


@dataclass(frozen=True)
class Cells:
    """A feature pyramid flattened for attention: all cells in one sequence, with the shapes of the levels."""

    cells: Tensor
    """[B, S, C]."""
    spatial_shapes: tuple[tuple[int, int], ...]
    """L pairs (rows, columns)."""
    ratios: Tensor
    """[B, L, 2] valid part of each map."""
    padding: Tensor | None
    """[B, S] bool, True for cells of padding; or None."""

    @staticmethod
    def of(maps: Sequence[Tensor], padding: Sequence[Tensor] | None = None, ratios: Tensor | None = None) -> Cells:
        """Flatten maps [B, C, H_l, W_l] and masks [B, H_l, W_l]; ``ratios`` None: computed from the masks."""
        shapes = tuple((level.shape[2], level.shape[3]) for level in maps)
        if ratios is None:
            like = maps[0]
            ratios = like.new_ones(len(like), len(maps), 2) if padding is None else valid_ratios(padding).to(like.dtype)
        hidden = None if padding is None else torch.cat([mask.flatten(1) for mask in padding], dim=1)
        return Cells(torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1), shapes, ratios, hidden)

    def maps(self) -> list[Tensor]:
        """Convert back to L maps [B, C, H_l, W_l]."""
        levels = torch.split(self.cells, [rows * columns for rows, columns in self.spatial_shapes], dim=1)
        pairs = zip(levels, self.spatial_shapes, strict=True)
        return [level.transpose(1, 2).reshape(len(level), -1, *shape) for level, shape in pairs]


class DeformableEncoder(nn.Module):
    """The encoder of Deformable DETR on a pyramid of equal channels; padded cells count as zeros."""

    def __init__(
        self, channels: int, levels: int, layers: int, heads: int = 8, points: int = 4, width: int | None = None
    ) -> None:
        """Build it.

        Args:
            channels: number of channels of every level.
            levels: L.
            layers: number of layers; 0 gives the identity.
            heads: largest number of heads; the largest number up to it that divides ``channels`` is used.
            points: number of points that each head samples on each level.
            width: hidden width of the feed-forward parts; None: 4 times ``channels``.
        """
        super().__init__()
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(channels, levels, num_heads(channels, heads), points, width) for _ in range(layers)
        )
        self.level_embedding = nn.Parameter(torch.randn(levels, channels)) if layers else None

    def forward(self, pyramid: Cells) -> Cells:
        """Apply all layers to the cells of all levels."""
        if self.level_embedding is None:
            return pyramid
        shapes, cells = pyramid.spatial_shapes, pyramid.cells
        places = places_of_cells(shapes, _at_least_float32(pyramid.ratios))
        counts = torch.tensor([rows * columns for rows, columns in shapes], device=cells.device)
        positions = sine_positions(places, cells.shape[2]) + self.level_embedding.repeat_interleave(counts, dim=0)
        for layer in self.layers:
            cells = layer(cells, positions.to(cells.dtype), places, shapes, pyramid.ratios, pyramid.padding)
        return replace(pyramid, cells=cells)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
