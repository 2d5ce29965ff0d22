"""Modules of ICD: the decoder that reads objects out of the teacher's features, and the projections of the features.

Shape letters: B images, N queries, S cells of all levels, C channels of the decoder, M heads, D = C / M channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.functional.positions import detr_positions
from detdistill.methods.icd.coco import COCO
from detdistill.methods.icd.loss import BoxPrior

LEAST_HEAD = 8
"""Smallest number of channels of a head: values are normalised in each head, which leaves little of a few channels."""


def heads_of(channels: int, wanted: int) -> int:
    """The largest number of heads up to ``wanted`` that divides the channels and leaves each at least 8 of them; at least 1."""
    fitting = [heads for heads in range(1, wanted + 1) if channels % heads == 0 and channels // heads >= LEAST_HEAD]
    return max(fitting, default=1)


def box_prior(classes: Sequence[str], coco: bool) -> BoxPrior:
    """The prior of the invented objects.

    Args:
        classes: names of the K classes.
        coco: use COCO's statistics if all classes are COCO's. Otherwise, as in the released code for other data, all classes are
            equally frequent, and their sizes have mean and standard deviation 0.2.
    """
    if coco and all(name in COCO for name in classes):
        rows = torch.tensor([COCO[name] for name in classes])
        return BoxPrior(rows[:, 0], rows[:, 1:3], rows[:, 3:])
    return BoxPrior(torch.ones(len(classes)), torch.full((len(classes), 2), 0.2), torch.full((len(classes), 2), 0.2))


def xavier(layer: nn.Linear) -> nn.Linear:
    """Initialise a layer as one third of the joint projection of ``nn.MultiheadAttention``."""
    nn.init.xavier_uniform_(layer.weight, gain=0.5**0.5)
    nn.init.zeros_(layer.bias)
    return layer


class Tokens(nn.Module):
    """Project maps to C channels, and flatten all levels into one sequence of cells, finest first.

    Levels of equal channels share one linear layer.
    """

    def __init__(self, channels: Sequence[int], width: int, always: bool) -> None:
        """Make the layers.

        Args:
            channels: channels of each level.
            width: C.
            always: project levels that have C channels already, too.
        """
        super().__init__()
        made = {count: xavier(nn.Linear(count, width)) if always or count != width else nn.Identity() for count in channels}
        self.layers = nn.ModuleList(made.values())
        self.layer_of_level = [list(made).index(count) for count in channels]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, C_l, H_l, W_l] of all levels -> [B, S, C]."""
        parts = zip(self.layer_of_level, maps, strict=True)
        return torch.cat([self.layers[index](level.flatten(2).mT) for index, level in parts], dim=1)


class Decoded(NamedTuple):
    """Results of one decoder layer."""

    outputs: Tensor
    """[B, N, 5] logits of the auxiliary task."""
    queries: Tensor
    """[B, M, N, D] projected queries."""
    keys: Tensor
    """[B, M, S, D] projected keys."""
    values: Tensor
    """[B, S, M, D] projected values."""


class DecoderLayer(nn.Module):
    """Cross-attention from queries to cells, then a feed-forward part; LayerNorm after each residual. Queries do not interact."""

    def __init__(self, width: int, heads: int, bare: bool = False) -> None:
        """Make the layers.

        Args:
            width: C.
            heads: M.
            bare: attention only, without residual, norms and feed-forward part.
        """
        super().__init__()
        self.heads = heads
        self.position = nn.Linear(width, width)
        self.query, self.key, self.value = (xavier(nn.Linear(width, width)) for _ in range(3))
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.bias)
        self.rest: nn.ModuleDict | None = None
        if not bare:
            feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
            norms = {"norm1": nn.LayerNorm(width), "norm2": nn.LayerNorm(width)}
            self.rest = nn.ModuleDict({**norms, "feed_forward": feed_forward})

    def forward(
        self, hidden: Tensor, cells: Tensor, positions: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decode queries.

        Args:
            hidden: [B, N, C] queries.
            cells: [B, S, C].
            positions: [B or 1, S, C] position codes, added to the keys only.
            padding: [B, S] bool, True for cells without attention; None: no such cell.

        Returns:
            [B, N, C] decoded queries, and queries, keys and values as in ``Decoded``.
        """
        split = (self.heads, -1)
        queries = self.query(hidden).unflatten(-1, split).transpose(1, 2)
        keys = self.key(cells + self.position(positions)).unflatten(-1, split).transpose(1, 2)
        values = self.value(cells).unflatten(-1, split)
        mask = None if padding is None else ~padding[:, None, None]
        read = F.scaled_dot_product_attention(queries, keys, values.transpose(1, 2), attn_mask=mask)
        read = self.out(read.transpose(1, 2).flatten(2))
        if self.rest is not None:
            hidden = self.rest["norm1"](hidden + read)
            read = self.rest["norm2"](hidden + self.rest["feed_forward"](hidden))
        return read, queries, keys, values


class ConditionalDecoder(nn.Module):
    """The teacher's side: encode descriptors of objects, decode them on the teacher's cells, and predict the auxiliary task."""

    def __init__(self, descriptor: int, width: int, heads: int, layers: int = 1) -> None:
        """Make the layers.

        Args:
            descriptor: numbers of a descriptor.
            width: C.
            heads: M.
            layers: number of decoder layers; 0: one layer of attention only.
        """
        super().__init__()
        self.width = width
        self.encoder = _mlp(descriptor, width, width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, bare=layers == 0) for _ in range(max(1, layers)))
        self.predictor = _mlp(width, width, 5)

    def forward(self, descriptors: Tensor, cells: Tensor, positions: Tensor, padding: Tensor | None) -> list[Decoded]:
        """Decode descriptors [B, N, ...]; ``cells``, ``positions`` and ``padding`` as in ``DecoderLayer``: one result a layer."""
        hidden, found = self.encoder(descriptors), []
        for layer in self.layers:
            hidden, *heads = layer(hidden, cells, positions, padding)
            found.append(Decoded(self.predictor(hidden), *heads))
        return found


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Three linear layers with ReLU between them."""
    layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)]
    return nn.Sequential(*layers)


def cell_positions(maps: Sequence[Tensor], padding: Sequence[Tensor] | None, width: int) -> tuple[Tensor, Tensor | None]:
    """Position codes and padding of all cells in one sequence.

    Args:
        maps: maps [B, C, H_l, W_l].
        padding: masks [B, H_l, W_l]; None: no padding, and then the codes are those of one image.
        width: number of channels of a code.

    Returns:
        [B or 1, S, width], and the padding [B, S] or None.
    """
    masks = [level.new_zeros((1, *level.shape[-2:]), dtype=torch.bool) for level in maps] if padding is None else padding
    positions = torch.cat([detr_positions(mask, width, maps[0].dtype).flatten(1, 2) for mask in masks], dim=1)
    return positions, None if padding is None else torch.cat([mask.flatten(1) for mask in masks], dim=1)
