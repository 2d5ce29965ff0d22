"""Layers for levels of one cell, which torch refuses or computes wrongly in a batch of one image.

- BatchNorm in training has no variance of one value per channel: it then normalises by its running statistics and keeps them.
- GroupNorm of one value per group gives its bias.
- A strided convolution of bf16 on a CPU leaves memory uninitialised in its weight's gradient (torch 2.15, ``findings/``): on a
  map of one cell it is computed in float32.

All other results are torch's.
"""

from __future__ import annotations

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn


def accept_single_cells(model: nn.Module) -> None:
    """Let the layers of a model compute maps of one cell; parameters and state dict stay as they are."""
    for module in model.modules():
        if type(module) is nn.Conv2d and set(module.stride) == {1}:
            continue
        if (tolerant := TOLERANT.get(type(module))) is not None:
            module.__class__ = tolerant


def is_single_value(maps: Tensor) -> bool:
    """Whether [B, C, H, W] holds one value per channel."""
    return maps.numel() == maps.shape[1]


class TolerantBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that accepts one value per channel in training."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        if self.training and self.track_running_stats and is_single_value(input):
            return nn.functional.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


class TolerantBatchNormAct2d(BatchNormAct2d):
    """timm's norm with activation that accepts one value per channel in training."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        if not (self.training and self.track_running_stats and is_single_value(x)):
            return super().forward(x)
        self.training = False
        try:
            return super().forward(x)
        finally:
            self.training = True


class TolerantGroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` that accepts one value per group."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C, ...]."""
        if input.numel() != self.num_groups:
            return super().forward(input)
        constant = input.new_zeros(()) if self.bias is None else self.bias.to(input).view(1, -1, *[1] * (input.ndim - 2))
        return input * 0 + constant  # connected to the graph


class TolerantConv2d(nn.Conv2d):
    """``nn.Conv2d`` with strides that computes maps of one cell in float32 on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, h, w]."""
        if input.device.type != "cpu" or input.shape[-2:] != (1, 1):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.to(self.weight.dtype))


TOLERANT: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: TolerantBatchNorm2d,
    BatchNormAct2d: TolerantBatchNormAct2d,
    nn.GroupNorm: TolerantGroupNorm,
    nn.Conv2d: TolerantConv2d,
}
