"""Relations between feature vectors (rows) of objects, and blocks that relate the cells of a map.

Rows describe regions or queries. Their relations are cosines (DSIG), relative distances (GID) and contrastive losses (G-DetKD,
DETRDistill). The blocks learn relations of cells: non-local (FKD), or by a graph of a few nodes (DRKD).

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
        rows: [..., N, D]; gradient flows. A row of zeros has cosine 0 with all rows, itself included.
        eps: smallest length that a row is divided by.

    Example:
        >>> cosine_gram(torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])).tolist()
        [[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]
    """
    units = F.normalize(rows, dim=-1, eps=eps)
    return units @ units.mT


def normalized_distances(rows: Tensor) -> Tensor:
    """[N, N] Euclidean distances of all pairs, divided by their mean; 0 on the diagonal.

    Dai et al., "General Instance Distillation for Object Detection" (GID), CVPR 2021, as in the authors' port: squared
    distances are at least 1e-12, so that the gradient is finite for equal rows, and the mean is over all pairs of two different
    rows. The gradient also flows through the mean. Scaling all rows, or adding one vector to all, does not change the result.

    Args:
        rows: [N, D]; gradient flows. For N = 1 the result is [[0]], for N = 0 a tensor of shape [0, 0].

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
    """InfoNCE loss of each row (anchor): its own key should be the most similar of all keys.

    ``log sum_j exp(a_i . k_j / T) - a_i . k_i / T`` with j over the own key and the negatives (the other keys and the bank).
    Van den Oord et al., "Representation Learning with Contrastive Predictive Coding", equation 4.

    Args:
        anchors: [N, D] of length 1 (``torch.nn.functional.normalize``); gradient flows.
        keys: [N, D] of length 1, row i is the key of anchor i; gradient flows, so detach keys of a teacher.
        temperature: T, above 0.
        bank: [M, D] further negatives of length 1, treated as constant; see ``RowBank``.
        ignored: [N, N] bool, True for keys that are not negatives of an anchor, such as overlapping boxes; the diagonal is not
            read.
        positive_in_denominator: False: the sum does not contain the own key, as in a re-implementation of G-DetKD. The loss may
            then be negative, and is 0 for an anchor without negatives.

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
    """[N, N] bool, pairs of different boxes of the same image with an IoU above ``iou``; G-DetKD does not contrast them.

    Args:
        boxes_xyxy: B tensors [N_b, 4], in the order of the rows.
        iou: IoU above which two boxes overlap.
    """
    boxes = torch.cat(list(boxes_xyxy))
    image = torch.cat([torch.full((len(mine),), index, device=boxes.device) for index, mine in enumerate(boxes_xyxy)])
    overlapping = (pairwise_iou(boxes, boxes) > iou) & (image[:, None] == image[None])
    return overlapping.fill_diagonal_(False)


class RowBank(nn.Module):
    """Memory of the rows of the last batches, newest first and detached: negatives for ``info_nce``. Saved in checkpoints."""

    def __init__(self, batches: int) -> None:
        """Create an empty bank.

        Args:
            batches: number of batches whose rows are kept.
        """
        super().__init__()
        self.rows: Tensor
        self.counts: Tensor
        self.batches = batches
        self.register_buffer("rows", torch.zeros(0, 0))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))

    def push(self, rows: Tensor) -> None:
        """Add a batch's rows [N, D] and drop those of the oldest batch beyond ``batches``; no rows: no change."""
        if len(rows):
            self.counts = torch.cat([self.counts.new_tensor([len(rows)]), self.counts])[: self.batches]
            kept = self.rows[: int(self.counts[1:].sum())].reshape(-1, rows.shape[1])
            self.rows = torch.cat([rows.detach(), kept.to(rows)])

    def forward(self, like: Tensor) -> Tensor:
        """[M, D] all rows, on the device and in the type of ``like`` [N, D]; [0, D] for an empty bank."""
        return self.rows.reshape(-1, like.shape[1]).to(like)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("rows", "counts"):  # the number of rows is part of the state
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


# -------------------------------------------------------------------------------------------------------------- blocks


def relate_cells(theta: Tensor, phi: Tensor, values: Tensor) -> Tensor:
    """For each cell, the sum of all cells' values, weighted by dot product: ``values (theta^T phi / M)^T``.

    There is no softmax between the products, so ``phi`` and ``values`` are multiplied first. This needs a matrix [D, D] for each
    image instead of [N, M], which would take 282 MB at stride 4 of an 800 x 1333 image.

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
    """Fold a 1x1 convolution and the batch normalisation after it into one convolution: weight [C, D] and bias [C].

    Mean and variance of ``out(maps)`` are computed from mean and covariance of ``maps``, so that no map of C channels is kept
    for the backward pass. A single value, which ``nn.BatchNorm2d`` refuses, gives the bias of the normalisation.

    Args:
        maps: [B, D, N] input of the convolution.
        out: [C, D] weight of the convolution, which has no bias.
        norm_weight: [C] weight of the normalisation.
        norm_bias: [C] bias of the normalisation.
        eps: added to the variance.
    """
    mean = maps.mean(dim=(0, 2))
    centered = (maps - mean[:, None]).transpose(0, 1).flatten(1)  # [D, B*N]
    covariance = centered @ centered.T / centered.shape[1]
    variance = torch.einsum("cd,de,ce->c", out, covariance, out).clamp(min=0)  # never below 0 by rounding
    weight = out * (norm_weight * (variance + eps).rsqrt())[:, None]
    return weight, norm_bias - weight @ mean


class NonLocalBlock(nn.Module):
    """Non-local block ``maps + BN(conv(relate_cells(maps)))`` with max-pooled keys and values (Wang et al., CVPR 2018).

    The normalisation always uses the batch's statistics. Its weight starts at 0, so the block is initially the identity.
    """

    eps = 1e-5

    def __init__(self, channels: int, reduction: int = 2, pool: int = 2) -> None:
        """Make the convolutions as mmcv does: weights of standard deviation 0.01, no bias in the output convolution.

        Args:
            channels: number of channels of the maps.
            reduction: inner channels are ``channels // reduction``, at least 1.
            pool: side in cells of the max pooling of keys and values; 1: no pooling. For smaller maps the shorter side is used.
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
    """Global reasoning block: project cells to a few graph nodes, mix the nodes, and project back to the cells.

    Chen et al., "Graph-Based Global Reasoning Networks", CVPR 2019, as DRKD (IJCAI 2023) uses it. For a map with cells as columns
    of X, ``B = project(X)`` and ``V = reduce(X) B^T``, the result is ``X + BN(extend(U B))`` with
    ``U = mix_states(relu(V + mix_nodes(V)))``. The sum over cells is not divided by their number, because the normalisation
    rescales it. The normalisation always uses the batch's statistics.
    """

    eps = 1e-4

    def __init__(self, channels: int, nodes: int, states: int | None = None) -> None:
        """Make the convolutions with PyTorch's initialisation; the normalisation starts with weight 1.

        Args:
            channels: C of the maps.
            nodes: number of nodes of the graph.
            states: width of a node; None: twice the number of nodes, as in DRKD.
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
        # All that follows is linear: the small matrices are multiplied first, [B, C, nodes].
        related: Tensor = (self.extend.weight.flatten(1) @ mixed @ projection).view_as(maps)
        if maps.numel() == maps.shape[1]:  # one value of each channel, which batch_norm refuses
            only_bias: Tensor = 0 * related * self.norm_weight[:, None, None] + self.norm_bias[:, None, None]
            return maps + only_bias
        return maps + F.batch_norm(related, None, None, self.norm_weight, self.norm_bias, training=True, eps=self.eps)
