"""Golden vectors: numbers made by running the released code of a method.

The folder is ``DETDISTILL_GOLDEN`` (default ``tests/golden``). Shapes and hyper-parameters come from each file.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


class Golden:
    """One file: tensors by name, and its ``meta``."""

    def __init__(self, slug: str) -> None:
        folder = Path(os.environ.get("DETDISTILL_GOLDEN", Path(__file__).parent / "golden"))
        path = folder / f"{slug}.npz"
        if not path.exists():
            pytest.skip(f"no {path}")
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}
        self.meta: dict[str, Any] = json.loads(str(self.arrays.pop("meta")))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name]))

    def levels(self, prefix: str) -> list[Tensor]:
        """``prefix_0``, ``prefix_1`` ... as many as there are."""
        found = []
        while f"{prefix}_{len(found)}" in self.arrays:
            found.append(self[f"{prefix}_{len(found)}"])
        return found

    def parameters(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose name starts with ``prefix``, without it: a state dict."""
        return {name[len(prefix) :]: self[name] for name in self.arrays if name.startswith(prefix)}


def sine_parameter(number: int, shape: list[int]) -> Tensor:
    """The weights of files whose ``meta`` gives them as a formula: parameter ``number``, float32, uniform-looking.

    Tensors of several dimensions lie within ``sqrt(6 / inputs)``, vectors within 0.1.
    """
    count = math.prod(shape)
    x = 43758.5453 * torch.sin(12.9898 * (torch.arange(count, dtype=torch.float64) % 9973) + 78.233 * (number + 1))
    scale = math.sqrt(6 / (count / shape[0])) if len(shape) > 1 else 0.1
    return (scale * (2 * (x - x.floor()) - 1)).float().view(shape)


def assert_golden(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-9 relative in float64, 1e-5 in float32 (relative to the largest entry for arrays)."""
    tolerance = 1e-9 if expected.dtype == torch.float64 else 1e-5
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.detach().to(expected.dtype), expected, rtol=tolerance, atol=tolerance * max(scale, 1e-12))
