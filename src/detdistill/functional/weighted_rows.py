"""Weighted sums of a table's rows on a CPU, with gradients of the table and of the weights.

The result is that of ``embedding_bag`` with weights per sample, whose backward pass sorts all indices. Here each of the two
gradients is one product with a sparse matrix, which is several times as fast for the shapes of deformable attention.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.functional.scattered_rows import scattered_rows


def weighted_rows(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sum ``weights[k, i] * table[index[k, i]]`` over i.

    Args:
        table: [R, D] float32 or float64, on the CPU; gradient flows.
        index: [K, n] int32 or int64, in 0..R-1.
        weights: [K, n] of the table's type; gradient flows.

    Returns:
        [K, D].

    Example:
        >>> import torch
        >>> table = torch.tensor([[1.0, 0.0], [0.0, 10.0]])
        >>> weighted_rows(table, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]])).tolist()
        [[0.5, 2.5]]
    """
    return cast(Tensor, _WeightedRows.apply(table, index, weights))


class _WeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(table, index, weights)
        return F.embedding_bag(index, table, mode="sum", per_sample_weights=weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        table, index, weights = ctx.saved_tensors
        grad = grad.contiguous()
        of_table = of_weights = None
        if ctx.needs_input_grad[0]:
            of_table = scattered_rows(grad, index, weights, len(table))
        if ctx.needs_input_grad[2]:
            starts = torch.arange(0, index.numel() + 1, index.shape[1], dtype=index.dtype)
            shape = (len(index), len(table))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
                pattern = torch.sparse_csr_tensor(starts, index.flatten(), weights.flatten(), shape, check_invariants=False)
                products = torch.sparse.sampled_addmm(pattern, grad, table.t(), beta=0)
            of_weights = products.values().view_as(weights)
        return of_table, None, of_weights
