"""D3ETR's matching, losses and attention maps; the method and its source are in ``method.py``.

Shape letters: B images, L decoder layers, N student's queries, M teacher's queries, P matched pairs of an image, K classes,
H heads, S cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.functional.matching import hungarian
from detdistill.functional.query_seeds import (
    giou_with_eps,
)

CrossMaps = Literal["each", "sum"]


class D3ETRQueries(NamedTuple):
    """Outputs of a decoder for one group of queries."""

    logits: Tensor
    """[L, B, N, K] sigmoid or [L, B, N, K+1] softmax logits."""
    boxes_cxcywh01: Tensor
    """[L, B, N, 4]."""
    self_attention: Tensor | None = None
    """[L, B, H, N, N] after the softmax; None leaves the loss on it out."""
    cross_attention: Tensor | None = None
    """[L, B, H, N, S] of each query, or [L, B, H, S] summed over queries; None leaves the loss on it out."""


class D3ETRTerms(NamedTuple):
    """Unweighted losses of each layer, [L] each; None without attention maps."""

    cls: Tensor
    l1: Tensor
    giou: Tensor
    self_attention: Tensor | None
    cross_attention: Tensor | None


@dataclass(frozen=True)
class D3ETRWeights:
    """Weights of the terms in every layer and both matchings (those of the re-implementation)."""

    cls: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    self_attention: float = 1e4
    """Entries are about 1/N, so squared differences are tiny."""
    cross_attention: float = 1e3


@torch.no_grad()
def d3etr_match(
    student: D3ETRQueries, teacher: D3ETRQueries, costs: Sequence[float] = (1.0, 5.0, 2.0), softmax: bool = False
) -> Tensor:
    """[L, B, N] index of the teacher's query matched to each student query in every layer (Hungarian matching).

    With N > M, N - M queries are unmatched (-1). The cost is a weighted sum of the cross-entropy of the student's class scores
    under the teacher's (summed over classes), the L1 distance of the boxes, and minus their GIoU; the student's boxes are
    clamped to 0..1. Attention maps are not used.

    Args:
        student: outputs for N queries.
        teacher: outputs for M queries.
        costs: weights of the class, L1 and GIoU costs.
        softmax: the outputs are softmax logits (our extension).
    """
    x = student.logits
    if softmax:
        cost = -x.log_softmax(dim=-1) @ teacher.logits.softmax(dim=-1).transpose(-1, -2)
    else:
        wanted = teacher.logits.sigmoid().transpose(-1, -2)
        cost = F.softplus(-x) @ wanted + F.softplus(x) @ (1 - wanted)
    mine, theirs = student.boxes_cxcywh01.clamp(0, 1)[..., :, None, :], teacher.boxes_cxcywh01[..., None, :, :]
    cost = costs[0] * cost + costs[1] * (mine - theirs).abs().sum(dim=-1) - costs[2] * giou_with_eps(mine, theirs)
    return hungarian(cost)


def d3etr_terms(student: D3ETRQueries, teacher: D3ETRQueries, match: Tensor | None, softmax: bool = False) -> D3ETRTerms:
    """Losses between matched queries in every layer.

    - cls: binary cross-entropy to the teacher's scores, summed over classes; mean over the pairs of all images. With softmax
      outputs the cross-entropy of the two distributions (ours). At equality its gradient is zero, not its value.
    - l1: sum over the four coordinates, giou: 1 - GIoU; means over the pairs.
    - self_attention: mean squared difference of the maps between matched queries, rows and columns both permuted.
    - cross_attention: mean squared difference of the maps of matched queries. Maps that are summed over queries are compared
      without a permutation.

    Args:
        student: outputs for N queries; gradient flows.
        teacher: outputs for M queries, treated as constant.
        match: [L, B, N] index of the teacher's query, -1 for none; every image and layer has the same number of pairs.
            None: each student query is compared with the teacher query of the same index.
        softmax: the outputs are softmax logits.

    Example:
        >>> logits, boxes = torch.tensor([[[[0.0], [9.0]]]]), torch.tensor([[[[0.5, 0.5, 1.0, 1.0], [0.2, 0.2, 0.1, 0.1]]]])
        >>> terms = d3etr_terms(D3ETRQueries(logits, boxes), D3ETRQueries(logits, boxes), torch.tensor([[[0, 1]]]))
        >>> terms.l1.tolist(), bool(terms.giou < 1e-3), terms.self_attention is None
        ([0.0], True, True)
    """
    images, queries = student.logits.shape[1:3]
    mine, theirs = (None, None) if match is None else _pairs(match)
    pairs = images * (queries if mine is None else mine.shape[2])
    if mine is not None and mine.shape[2] == queries:
        mine = None  # all student queries, in order: nothing to pick, neither forward nor backward
    logits, boxes = _take(student.logits, mine), _take(student.boxes_cxcywh01, mine)
    fixed_logits, fixed_boxes = _take(teacher.logits.detach(), theirs), _take(teacher.boxes_cxcywh01.detach(), theirs)
    if softmax:
        entropy = -fixed_logits.softmax(dim=-1) * logits.log_softmax(dim=-1)
    else:
        entropy = F.binary_cross_entropy_with_logits(logits, fixed_logits.sigmoid(), reduction="none")
    among = cross = None
    if student.self_attention is not None and teacher.self_attention is not None:
        wanted = _rows(_rows(teacher.self_attention.detach(), theirs).transpose(-1, -2), theirs).transpose(-1, -2)
        found = _rows(_rows(student.self_attention, mine).transpose(-1, -2), mine).transpose(-1, -2)
        among = (found - wanted).square().mean(dim=(1, 2, 3, 4))
    if student.cross_attention is not None and teacher.cross_attention is not None:
        looks, wanted = student.cross_attention, teacher.cross_attention.detach()
        if looks.ndim == 5:
            looks, wanted = _rows(looks, mine), _rows(wanted, theirs)
        cross = (looks - wanted).square().flatten(1).mean(dim=1)
    return D3ETRTerms(
        cls=entropy.sum(dim=(1, 2, 3)) / pairs,
        l1=(boxes - fixed_boxes).abs().sum(dim=(1, 2, 3)) / pairs,
        giou=(1 - giou_with_eps(boxes, fixed_boxes)).sum(dim=(1, 2)) / pairs,
        self_attention=among,
        cross_attention=cross,
    )


def d3etr_loss(terms: D3ETRTerms, weights: D3ETRWeights = D3ETRWeights()) -> dict[str, Tensor]:
    """Weighted terms, [] each, summed over layers. Terms that are None or have weight 0 are left out."""
    factors = vars(weights)
    return {name: factors[name] * value.sum() for name, value in terms._asdict().items() if value is not None and factors[name]}


def _pairs(match: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [L, B, P] of the matched student queries, and of their teacher queries."""
    mine = torch.nonzero(match >= 0)[:, 2].view(*match.shape[:2], -1)
    return mine, match.gather(2, mine)


def _take(values: Tensor, index: Tensor | None) -> Tensor:
    """[L, B, P, X] of [L, B, N, X] by an index [L, B, P]; None: all."""
    if index is None:
        return values
    return values.gather(2, index[..., None].expand(*index.shape, values.shape[-1]))


def _rows(maps: Tensor, index: Tensor | None) -> Tensor:
    """[L, B, H, P, X] of [L, B, H, N, X] by an index [L, B, P]; None: all."""
    if index is None:
        return maps
    wide = index[:, :, None, :, None].expand(-1, -1, maps.shape[2], -1, maps.shape[4])
    return maps.gather(3, wide)


def spread_attention(attention: Tensor, cells_hw: Sequence[tuple[int, int]], summed: bool) -> tuple[Tensor, ...]:
    """Cross-attention as maps per level, so that a place of an image has the same index under any padding.

    Args:
        attention: [L, B, H, N, S].
        cells_hw: rows and columns of each level; S cells in all.
        summed: sum over the queries.

    Returns:
        For each level [B, L, H, N, h, w], or [B, L, H, h, w] if summed.
    """
    attention = (attention.sum(dim=3) if summed else attention).transpose(0, 1)
    levels = attention.split([rows * columns for rows, columns in cells_hw], dim=-1)
    return tuple(level.unflatten(-1, shape) for level, shape in zip(levels, cells_hw, strict=True))


def gathered_attention(maps: Sequence[Tensor], cells_hw: Sequence[tuple[int, int]]) -> Tensor:
    """The inverse of ``spread_attention``; maps of other sizes are cropped or zero-padded on the right and at the bottom."""
    flat = []
    for level, (rows, columns) in zip(maps, cells_hw, strict=True):
        fitted = F.pad(level, (0, columns - level.shape[-1], 0, rows - level.shape[-2]))
        flat.append(fitted.flatten(-2))
    return torch.cat(flat, dim=-1).transpose(0, 1)
