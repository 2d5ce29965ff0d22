"""Modules in another state for a while: in evaluation mode, or frozen; afterwards exactly as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import nn


class HasModules(Protocol):
    """A ``torch.nn.Module``, or anything that lists its modules."""

    def modules(self) -> Iterator[nn.Module]:
        """As ``torch.nn.Module``."""
        ...


@contextmanager
def evaluating(module: HasModules) -> Iterator[None]:
    """Evaluation mode inside: no dropout, and no batch norm moves its statistics.

    Afterwards each module is in its own mode again. ``module.train()`` instead would also switch on the parts that their owner
    keeps in evaluation mode, such as frozen batch norms.

    Args:
        module: any; its ``training`` flags are set directly, so that nothing but them has to be undone.

    Example:
        >>> network = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluating(network):
        ...     [part.training for part in network]
        [False, False]
        >>> [part.training for part in network]
        [True, False]
    """
    modes = {part: part.training for part in module.modules()}
    for part in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradient for the module's own parameters; gradients still flow through it to its inputs.

    What is computed inside stays so: ``backward`` may be called after the end. Afterwards the parameters that had a gradient
    before have one again. Unlike ``torch.no_grad``, which would also cut the inputs off.

    Args:
        module: any; its mode (training or evaluation) is left alone.

    Example:
        >>> import torch
        >>> layer, inputs = nn.Linear(1, 1, bias=False), torch.ones(1, 1, requires_grad=True)
        >>> with frozen(layer):
        ...     outputs = layer(inputs)
        >>> outputs.backward()
        >>> torch.equal(inputs.grad, layer.weight.detach()), layer.weight.grad, layer.weight.requires_grad
        (True, None, True)
    """
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
