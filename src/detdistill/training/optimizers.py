"""Optimizers and learning-rate schedules, from torch, by the names of ``TrainSettings``."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from detdistill.settings import TrainSettings


def build_optimizer(modules: Iterable[nn.Module], settings: TrainSettings) -> Optimizer:
    """Two groups: weights with decay; biases, norms and other vectors without."""
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # One kernel for all tensors (5 % of a small detector's step); Lightning cannot clip with it under a loss scaler.
    fused = settings.precision != "16"
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, fused=fused)
    return torch.optim.AdamW(groups, lr=settings.lr, fused=fused)


def build_schedule(optimizer: Optimizer, settings: TrainSettings, total: int) -> LRScheduler:
    """A scheduler that steps once per optimizer step, for ``total`` steps."""
    if settings.schedule == "one_cycle":
        return OneCycleLR(optimizer, max_lr=settings.lr, total_steps=total + 1, pct_start=0.15)
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, total, settings))


def learning_rate_factor(step: int, total: int, settings: TrainSettings) -> float:
    """Factor on the peak learning rate for cosine, step and constant, warm-up included."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    progress = step / max(1, total)
    if settings.schedule == "cosine":
        return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min(1.0, progress)))))
    if settings.schedule == "step":
        return 0.1 ** sum(progress >= milestone for milestone in (2 / 3, 11 / 12))
    return 1.0
