"""Context managers that put modules into evaluation mode, freeze them or keep their statistics, and restore them afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class HasModules(Protocol):
    """A ``torch.nn.Module``, or another object with ``modules()``."""

    def modules(self) -> Iterator[nn.Module]:
        """As ``torch.nn.Module``."""
        ...


@contextmanager
def evaluating(module: HasModules) -> Iterator[None]:
    """Put a module into evaluation mode inside the context: no dropout, and batch norms keep their statistics.

    Afterwards each submodule has its own mode again. ``module.train()`` would also change submodules that are always kept in
    evaluation mode, such as frozen batch norms.

    Args:
        module: any module; only the ``training`` flags are changed, without calling ``train()`` or ``eval()``.

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
    """Freeze a module's parameters inside the context; gradients still flow through the module to its inputs.

    ``torch.no_grad`` would stop these gradients, too. ``backward`` may be called after the context: parameters get no gradient
    from results computed inside it. Afterwards the parameters that required a gradient before require it again.

    Args:
        module: any module; its mode (training or evaluation) is not changed.

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


@contextmanager
def keeping_statistics(module: HasModules) -> Iterator[None]:
    """Keep the running statistics of batch norms inside the context, in training mode too.

    In training mode, batch norms still normalise by the statistics of the batch, unlike with ``evaluating``.

    Args:
        module: any module; only the ``track_running_stats`` flags of its batch norms are changed.

    Example:
        >>> import torch
        >>> norm = nn.BatchNorm1d(1)
        >>> with keeping_statistics(norm):
        ...     normalised = norm(torch.tensor([[1.0], [3.0]]))
        >>> normalised.detach().round().flatten().tolist(), norm.running_mean.tolist(), norm.num_batches_tracked.item()
        ([-1.0, 1.0], [0.0], 0)
    """
    tracking = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    for part in tracking:
        part.track_running_stats = False
    try:
        yield
    finally:
        for part in tracking:
            part.track_running_stats = True
