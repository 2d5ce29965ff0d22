"""Optimizers and learning-rate schedules of torch, as chosen by ``TrainSettings``."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from detdistill.detectors.contract import Detector, Parts
from detdistill.errors import ModelError, RunError
from detdistill.settings import TrainSettings


def build_optimizer(modules: Iterable[nn.Module], settings: TrainSettings) -> Optimizer:
    """Build the optimizer of all parameters. Biases, norms and other vectors have no weight decay.

    With ``backbone_lr_factor`` other than 1, the backbones' parameters are the last parameter groups, at their own rate.

    Raises:
        RunError: the factor is other than 1, and a detector does not expose its backbone.
    """
    modules = list(modules)
    parameters = {id(p): p for module in modules for p in module.parameters()}
    backbones = _backbones(modules) if settings.backbone_lr_factor != 1 else set()
    groups = []
    for inside, lr in ((False, settings.lr), (True, settings.lr * settings.backbone_lr_factor)):
        part = [p for key, p in parameters.items() if (key in backbones) == inside]
        groups.append({"params": [p for p in part if p.ndim > 1], "lr": lr, "weight_decay": settings.weight_decay})
        groups.append({"params": [p for p in part if p.ndim <= 1], "lr": lr, "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    # One kernel for all tensors saves 5 % of a small detector's step, but under a loss scaler Lightning cannot clip with it.
    # DTensors, in which fsdp shares weights out, have no fused SGD in torch 2.15.
    fused = settings.precision != "16" and (settings.strategy, settings.optimizer) != ("fsdp", "sgd")
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, fused=fused)
    return torch.optim.AdamW(groups, lr=settings.lr, fused=fused)


def _backbones(modules: Iterable[nn.Module]) -> set[int]:
    found: set[int] = set()
    for detector in (module for module in modules if isinstance(module, Detector)):
        try:
            parts = detector.parts()
        except ModelError as error:
            raise RunError(f"backbone_lr_factor: {error}, or leave the factor at 1") from error
        found |= {id(p) for p in Parts.parameters(parts.backbone)}
    return found


def build_schedule(optimizer: Optimizer, settings: TrainSettings, total: int) -> LRScheduler:
    """Build the learning-rate schedule: one scheduler step per optimizer step, ``total`` steps in all."""
    if settings.schedule == "one_cycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, max_lr=peaks, total_steps=total + 1, pct_start=0.15)
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, total, settings))


def learning_rate_factor(step: int, total: int, settings: TrainSettings) -> float:
    """Factor on the peak learning rate at a step, for the schedules cosine, step and constant, including warm-up."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    progress = step / max(1, total)
    if settings.schedule == "cosine":
        return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min(1.0, progress)))))
    if settings.schedule == "step":
        return 0.1 ** sum(progress >= milestone for milestone in (2 / 3, 11 / 12))
    return 1.0
