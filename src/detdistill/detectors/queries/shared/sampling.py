"""Deformable attention of transformers' models, sampled faster on a CPU; parameters and state dict stay as they are.

transformers samples by ``grid_sample`` and keeps every sample. ``functional.deformable`` adds up weighted cells: the same values
to the rounding of a sum, in a fraction of the time and memory. RT-DETRv2 samples by a function of its module, which cannot be
replaced in one model alone, so it stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detdistill.functional.deformable import by_cells, sampled_sums


def sample_by_cells(model: nn.Module) -> None:
    """Let the deformable attentions of a transformers model sample by ``functional.deformable`` where that is faster."""
    for module in list(model.modules()):
        if isinstance(module, SampledByCells):
            continue
        for name, child in list(module.named_children()):
            if type(child).__name__ == "MultiScaleDeformableAttention":
                setattr(module, name, SampledByCells(child))
        attention: Any = module
        core = getattr(attention, "ms_deformable_attn_core", None)
        if core is not None and not isinstance(core, SampledByLists):
            attention.ms_deformable_attn_core = SampledByLists(core)


class SampledByCells(nn.Module):
    """transformers' ``MultiScaleDeformableAttention``, which has no parameters."""

    def __init__(self, plain: nn.Module) -> None:
        """``plain``: the library's module, which is used where its sampling is as fast or can be traced."""
        super().__init__()
        self.plain = plain

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Sequence[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """Value [B, S, M, D], locations [B, Q, M, L, P, 2], weights [B, Q, M, L, P] -> [B, Q, M * D]."""
        if not faster(value):
            out: Tensor = self.plain(
                value,
                value_spatial_shapes,
                value_spatial_shapes_list,
                level_start_index,
                sampling_locations,
                attention_weights,
                im2col_step,
            )
            return out
        points = [sampling_locations.shape[4]] * sampling_locations.shape[3]
        locations, weights = sampling_locations.flatten(3, 4), attention_weights.flatten(3)
        return sampled(value, value_spatial_shapes_list, points, locations, weights)


class SampledByLists:
    """The function by which D-FINE and DEIMv2 sample another number of points on each level."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        """``plain``: the library's function, see ``SampledByCells``."""
        self.plain = plain

    def __call__(
        self,
        value: Tensor,
        value_spatial_shapes: Sequence[tuple[int, int]],
        sampling_locations: Tensor,
        attention_weights: Tensor,
        num_points_list: Sequence[int],
        method: str = "default",
    ) -> Tensor:
        """Value [B, S, M, D], locations [B, Q, M, T, 2], weights [B, Q, M, T] -> [B, Q, M * D]."""
        if method != "default" or not faster(value):
            out: Tensor = self.plain(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method)
            return out
        return sampled(value, value_spatial_shapes, num_points_list, sampling_locations, attention_weights)


def faster(value: Tensor) -> bool:
    """Whether weighted sums of cells are faster and may be used: they cannot be traced, and have no half precision."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.jit.is_scripting()
    precise = value.dtype in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu")
    return by_cells(value) and precise and not traced


def sampled(
    value: Tensor, shapes: Sequence[tuple[int, int]], points: Sequence[int], locations: Tensor, weights: Tensor
) -> Tensor:
    """``sampled_sums`` in one precision, float32 under autocast (as autocast computes ``grid_sample``)."""
    precision = torch.promote_types(torch.float32, value.dtype)
    sizes = [(int(height), int(width)) for height, width in shapes]
    return sampled_sums(value.to(precision), sizes, points, locations.to(precision), weights.to(precision))
