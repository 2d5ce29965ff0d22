"""How rows resemble each other, and blocks that let all cells of a map speak to each other.

Rows are described regions or queries: their cosines (DSIG), their relative distances (GID), and the contrast of each with all
others (G-DetKD, DETRDistill). Blocks are the learned relations of cells: non-local (FKD) and by a graph of a few nodes (DRKD).

Shape letters: N rows, M rows of a bank, D width; B images, C channels, H, W rows and columns of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.functional.assign import pairwise_iou

# ---------------------------------------------------------------------------------------------------------------- rows


def cosine_gram(rows: Tensor, eps: float = 1e-12) -> Tensor:
    """[..., N, N] cosine of every row with every row, the diagonal included (the edges of DSIG's graph, ICCV 2021).

    Args:
        rows: [..., N, D]; gradient flows. A row of zeros has cosine 0 with all, itself included.
        eps: least length that a row is divided by.

    Example:
        >>> cosine_gram(torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])).tolist()
        [[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]
    """
    units = F.normalize(rows, dim=-1, eps=eps)
    return units @ units.mT


def normalized_distances(rows: Tensor) -> Tensor:
    """[N, N] Euclidean distances of all pairs, divided by their mean; 0 on the diagonal.

    Dai et al., "General Instance Distillation for Object Detection" (GID), CVPR 2021, as the authors' port has it: squared
    distances are at least 1e-12, so that the gradient is finite for equal rows, and the mean is over the pairs of different
    rows. The gradient flows through the mean, too. Scaling all rows, or adding one vector to all, changes nothing.

    Args:
        rows: [N, D]; gradient flows. One row gives [[0]], none give [0, 0].

    Example:
        >>> normalized_distances(torch.tensor([[0.0], [1.0], [4.0]])).tolist()
        [[0.0, 0.375, 1.5], [0.375, 0.0, 1.125], [1.5, 1.125, 0.0]]
    """
    squares = rows.square().sum(dim=1)
    apart = (squares[:, None] + squares[None] - 2 * rows @ rows.T).clamp(min=1e-12).sqrt()
    apart = apart.masked_fill(torch.eye(len(rows), dtype=torch.bool, device=rows.device), 0.0)
    mean = apart.sum() / max(1, len(rows) * (len(rows) - 1))
    return apart / mean.clamp(min=1e-12)


def info_nce(
    anchors: Tensor,
    keys: Tensor,
    temperature: float,
    *,
    bank: Tensor | None = None,
    ignored: Tensor | None = None,
    positive_in_denominator: bool = True,
) -> Tensor:
    """Contrastive loss of each row: its key should be the most similar of all keys.

    ``log sum_j exp(a_i . k_j / T) - a_i . k_i / T`` with j over the own key and the negatives: the other keys and the bank.
    Van den Oord et al., "Representation Learning with Contrastive Predictive Coding", equation 4.

    Args:
        anchors: [N, D] of length 1 (``torch.nn.functional.normalize``); gradient flows.
        keys: [N, D] of length 1, row i the positive of anchor i; gradient flows, so detach a teacher's.
        temperature: T, above 0.
        bank: [M, D] further negatives of length 1, treated as constant; see ``RowBank``.
        ignored: [N, N] bool, keys that are no negatives of an anchor, such as overlapping boxes; the diagonal is not read.
        positive_in_denominator: False leaves the own key out of the sum, so that the loss may be negative (a re-implementation
            of G-DetKD has it so); an anchor without any negative then gives 0.

    Returns:
        [N], not reduced.

    Example:
        >>> rows = torch.eye(2)
        >>> info_nce(rows, rows, temperature=1.0)
        tensor([0.3133, 0.3133])
    """
    similar = anchors @ (keys if bank is None else torch.cat([keys, bank.detach()])).T / temperature  # [N, N + M]
    positive = similar.diagonal()
    if ignored is None and positive_in_denominator:
        return similar.logsumexp(dim=1) - positive
    out = torch.zeros_like(similar, dtype=torch.bool)
    if ignored is not None:
        out[:, : len(keys)] = ignored
    out.fill_diagonal_(not positive_in_denominator)
    total = similar.masked_fill(out, -torch.inf).logsumexp(dim=1)
    return torch.where(out.all(dim=1), 0.0, total - positive)  # a sum over nothing has no logarithm


def overlapping_pairs(boxes_xyxy: Sequence[Tensor], iou: float = 0.5) -> Tensor:
    """[N, N] bool, pairs of different boxes of one image whose IoU is above ``iou`` (those that G-DetKD does not contrast).

    Args:
        boxes_xyxy: B tensors [N_b, 4], in the order of the rows.
        iou: see above.
    """
    boxes = torch.cat(list(boxes_xyxy))
    image = torch.cat([torch.full((len(mine),), index, device=boxes.device) for index, mine in enumerate(boxes_xyxy)])
    overlapping = (pairwise_iou(boxes, boxes) > iou) & (image[:, None] == image[None])
    return overlapping.fill_diagonal_(False)


class RowBank(nn.Module):
    """The rows of the last batches, newest first, without a graph: negatives for ``info_nce``. Kept in checkpoints."""

    def __init__(self, batches: int) -> None:
        """Begin with none.

        Args:
            batches: how many batches are remembered.
        """
        super().__init__()
        self.rows: Tensor
        self.counts: Tensor
        self.batches = batches
        self.register_buffer("rows", torch.zeros(0, 0))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))

    def push(self, rows: Tensor) -> None:
        """Remember a batch's rows [N, D] and forget the oldest batch's; a batch without rows changes nothing."""
        if len(rows):
            self.counts = torch.cat([self.counts.new_tensor([len(rows)]), self.counts])[: self.batches]
            kept = self.rows[: int(self.counts[1:].sum())].reshape(-1, rows.shape[1])
            self.rows = torch.cat([rows.detach(), kept.to(rows)])

    def forward(self, like: Tensor) -> Tensor:
        """[M, D] all rows, on the device and in the type of ``like`` [N, D]; [0, D] at first."""
        return self.rows.reshape(-1, like.shape[1]).to(like)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("rows", "counts"):  # the number of rows is part of the state
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


# -------------------------------------------------------------------------------------------------------------- blocks


def relate_cells(theta: Tensor, phi: Tensor, values: Tensor) -> Tensor:
    """Each cell's sum of other cells' values, weighted by dot product: ``values (theta^T phi / M)^T``.

    There is no softmax between the products, so ``phi`` and ``values`` are multiplied first: [D, D] per image instead of
    [N, M], which at stride 4 of an 800 x 1333 image would be 282 MB.

    Args:
        theta: [B, D, N] queries.
        phi: [B, D, M] keys.
        values: [B, D, M].

    Returns:
        [B, D, N].
    """
    context = values @ phi.transpose(1, 2) / phi.shape[2]
    return context @ theta


def _fold_normalization(maps: Tensor, out: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Weight [C, D] and bias [C] of a 1x1 convolution and the batch normalisation after it, as one convolution.

    Mean and variance of ``out(maps)`` follow from mean and covariance of ``maps``, so no C-channel map is kept for the
    backward pass; and a single value, which ``nn.BatchNorm2d`` refuses, gives just the bias.

    Args:
        maps: [B, D, N] whose statistics are taken.
        out: [C, D] of the convolution, which has no bias.
        norm_weight: [C].
        norm_bias: [C].
        eps: added to the variance.
    """
    mean = maps.mean(dim=(0, 2))
    centered = (maps - mean[:, None]).transpose(0, 1).flatten(1)  # [D, B*N]
    covariance = centered @ centered.T / centered.shape[1]
    variance = torch.einsum("cd,de,ce->c", out, covariance, out).clamp(min=0)  # never below 0 by rounding
    weight = out * (norm_weight * (variance + eps).rsqrt())[:, None]
    return weight, norm_bias - weight @ mean


class NonLocalBlock(nn.Module):
    """``maps + BN(conv(relations of maps))``, the relations by dot product with max-pooled cells (Wang et al., CVPR 2018).

    The normalisation always uses the batch's statistics and starts with weight 0, so at first the block is the identity.
    """

    eps = 1e-5

    def __init__(self, channels: int, reduction: int = 2, pool: int = 2) -> None:
        """Make the convolutions as mmcv does: normal of deviation 0.01, no bias after the relations.

        Args:
            channels: of the maps.
            reduction: inner channels are ``channels // reduction``, at least 1.
            pool: cells per side that keys and values are max-pooled over; 1: none. A map that is smaller is pooled whole.
        """
        super().__init__()
        inner = max(1, channels // reduction)
        self.pool = pool
        self.theta, self.phi, self.values = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, channels, 1, bias=False)
        for conv in (self.theta, self.phi, self.values, self.out):
            nn.init.normal_(conv.weight, std=0.01)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        self.norm_weight = nn.Parameter(torch.zeros(channels))
        self.norm_bias = nn.Parameter(torch.zeros(channels))

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        height, width = maps.shape[-2:]
        pool = min(self.pool, height, width)
        phi, values = self.phi(maps), self.values(maps)
        if pool > 1:
            phi, values = F.max_pool2d(phi, pool), F.max_pool2d(values, pool)
        related = relate_cells(self.theta(maps).flatten(2), phi.flatten(2), values.flatten(2))
        weight, bias = _fold_normalization(related, self.out.weight.flatten(1), self.norm_weight, self.norm_bias, self.eps)
        return maps + F.conv2d(related.view(*related.shape[:2], height, width), weight[:, :, None, None], bias)


class GloReBlock(nn.Module):
    """Global reasoning: cells are summed into a few nodes, the nodes exchange what they know, and the cells get it back.

    Chen et al., "Graph-Based Global Reasoning Networks", CVPR 2019, as DRKD (IJCAI 2023) uses it: for a map as columns X
    with ``B = project(X)`` and ``V = reduce(X) B^T`` it is ``X + BN(extend(U B))``, where
    ``U = mix_states(relu(V + mix_nodes(V)))``. The sum over cells is not divided by their number; the normalisation makes up
    for that. It always uses the batch's statistics.
    """

    eps = 1e-4

    def __init__(self, channels: int, nodes: int, states: int | None = None) -> None:
        """Make the convolutions with PyTorch's initialisation; the normalisation starts with weight 1.

        Args:
            channels: C of the maps.
            nodes: of the graph.
            states: width of a node; None: twice the nodes, as in DRKD.
        """
        super().__init__()
        states = 2 * nodes if states is None else states
        self.reduce = nn.Conv2d(channels, states, 1)
        self.project = nn.Conv2d(channels, nodes, 1)
        self.mix_nodes = nn.Conv1d(nodes, nodes, 1)
        self.mix_states = nn.Conv1d(states, states, 1, bias=False)
        self.extend = nn.Conv2d(states, channels, 1, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(channels))
        self.norm_bias = nn.Parameter(torch.zeros(channels))

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        projection = self.project(maps).flatten(2)  # [B, nodes, H*W]
        states = self.reduce(maps).flatten(2) @ projection.mT  # [B, states, nodes]
        mixed = self.mix_states((states + self.mix_nodes(states.mT).mT).relu())
        related = mixed @ projection  # [B, states, H*W]
        weight, bias = _fold_normalization(related, self.extend.weight.flatten(1), self.norm_weight, self.norm_bias, self.eps)
        return maps + F.conv2d(related.unflatten(2, maps.shape[-2:]), weight[:, :, None, None], bias)
