"""Batch norms whose statistics in training are those of the images of all processes; the same code on all devices.

Torch's ``SyncBatchNorm`` needs a GPU, and replacing modules by it would leave the references of methods and detectors behind, and
lose the activations of timm's batch norms. So here the class of a module is exchanged for a while, and the module stays.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detdistill.errors import RunError
from detdistill.functional.counting import number_of_ranks

KNOWN = ("torch", "timm", "detdistill")
"""Packages whose batch norms are known."""
_state: dict[str, Any] = {"world": None, "group": None, "alone": False}
"""The processes' own group for these norms, and the default group for which it was made; whether the backward pass is alone."""


@contextmanager
def synchronized(*modules: nn.Module | None) -> Iterator[None]:
    """Context in which the batch norms of modules use the statistics of all processes in training mode.

    Frozen norms (timm's and transformers' constants) and norms over groups or layers stay as they are.

    Args:
        modules: networks; None is skipped.

    Raises:
        RunError: a network has batch norms of a kind that is not known here.
    """
    changed: list[tuple[Any, Any]] = []
    try:
        parts: list[Any] = [part for module in modules if module is not None for part in module.modules()]
        for part in parts:
            if isinstance(part, _BatchNorm) and not isinstance(part, _Synced):
                kind: Any = type(part)
                part.__class__ = _synced(kind)  # type: ignore[assignment]
                changed.append((part, kind))
        yield
    finally:
        for part, kind in changed:
            part.__class__ = kind


@contextmanager
def backward_alone() -> Iterator[None]:
    """Context in which backward passes leave out the other processes, for measurements; the gradient is then approximate."""
    _state["alone"] = True
    try:
        yield
    finally:
        _state["alone"] = False


def synced_batch_norm(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Normalise maps or rows [N, C, ...] by the mean and variance of all processes, and update the running statistics."""
    mean, variance, count = _statistics(x.detach().float() if x.dtype.itemsize < 4 else x.detach())
    if norm.track_running_stats and norm.running_mean is not None and norm.running_var is not None:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        share = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
        norm.running_var.lerp_((variance * count / (count - 1).clamp(min=1)).to(norm.running_var.dtype), share)
    result: Tensor = _Normalize.apply(x, norm.weight, norm.bias, mean, (variance + norm.eps).rsqrt(), count)
    return result


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], variance [C] (biased) and number [] of the values of each channel, over all processes."""
    rows = x.transpose(0, 1).flatten(1)  # [C, N]
    sums = _sum(torch.cat([rows.sum(dim=1), rows.new_tensor([float(rows.shape[1])])]))
    count = sums[-1]
    mean = sums[:-1] / count
    return mean, _sum((rows - mean[:, None]).square().sum(dim=1)) / count, count


def _sum(value: Tensor) -> Tensor:
    """Sum over the processes in a group of their own, so that the order of DDP's messages does not matter."""
    if _state["world"] is not dist.group.WORLD:
        _state["world"], _state["group"] = dist.group.WORLD, dist.new_group()
    dist.all_reduce(value, group=_state["group"])
    return value


class _Normalize(torch.autograd.Function):
    """``(x - mean) * scale * weight + bias``, where mean and scale depend on the values of all processes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor, count: Tensor
    ) -> Tensor:
        shape = (1, -1, *[1] * (x.ndim - 2))
        normed = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        ctx.save_for_backward(normed, weight, scale, count)
        result = normed if weight is None else normed * weight.view(shape)
        result = result if bias is None else result + bias.view(shape)
        return result.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, weight, scale, count = ctx.saved_tensors
        shape, dims = (1, -1, *[1] * (grad.ndim - 2)), [0, *range(2, grad.ndim)]
        given = grad.to(normed.dtype)
        of_bias, of_weight = given.sum(dim=dims), (given * normed).sum(dim=dims)
        sums = torch.stack([of_bias, of_weight])
        if not _state["alone"]:
            sums = _sum(sums.clone())
        first, second = (row.view(shape) / count for row in sums)
        factor = scale if weight is None else scale * weight
        inputs = (given - first - normed * second) * factor.view(shape)
        return (
            inputs.to(grad.dtype),
            None if weight is None else of_weight.to(weight.dtype),
            of_bias.to(weight.dtype) if weight is not None else None,
            None,
            None,
            None,
        )


class _Synced(_BatchNorm):
    """Batch norm over all processes; in evaluation mode, and in a single process, like its parent."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [N, C, ...]; timm's norms then apply their activation."""
        if not self.training or number_of_ranks() == 1:
            return super().forward(input)
        normed = synced_batch_norm(self, input)
        return cast(Tensor, self.act(self.drop(normed))) if isinstance(self, BatchNormAct2d) else normed


@functools.cache
def _synced(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that takes the place of a class of batch norms.

    Raises:
        RunError: it is not one of torch, timm or this package, so its forward pass may be another.
    """
    if not issubclass(kind, nn.BatchNorm1d | nn.BatchNorm2d) or kind.__module__.partition(".")[0] not in KNOWN:
        raise RunError(f"sync_bn: batch norms of the class {kind.__name__} are not known; leave out --sync_bn")
    return type(f"Synced{kind.__name__}", (_Synced, kind), {})
