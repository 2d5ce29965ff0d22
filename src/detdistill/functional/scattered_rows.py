"""Weighted rows added to the rows of a table, on the CPU: the backward pass of gathering them, as one sparse product."""

from __future__ import annotations

import torch
from torch import Tensor


def scattered_rows(rows: Tensor, index: Tensor, weights: Tensor, count: int) -> Tensor:
    """Table whose row ``index[k, s]`` is the sum of ``weights[k, s] * rows[k]`` over all k and s, without gradient.

    SciPy's product is several times as fast as torch's ``index_add_`` on a CPU.

    Args:
        rows: [K, D], contiguous, on the CPU.
        index: [K, S] int64, below ``count``.
        weights: [K, S].
        count: rows of the table.

    Returns:
        [count, D].

    Example:
        >>> one, half = torch.tensor([[8.0]]), torch.tensor([[0.5, 0.25]])
        >>> scattered_rows(one, torch.tensor([[0, 2]]), half, 3).flatten().tolist()
        [4.0, 0.0, 2.0]
    """
    from scipy.sparse import csr_array  # late: SciPy takes a part of a second to load

    starts = torch.arange(0, index.numel() + 1, index.shape[1], dtype=index.dtype)
    matrix = csr_array((weights.flatten().numpy(), index.flatten().numpy(), starts.numpy()), shape=(len(index), count))
    return torch.from_numpy(matrix.T @ rows.numpy())
