"""The processes of a distributed run compare what they have before they train, or else they would wait for each other."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch.distributed as dist

from detdistill.errors import RunError

Facts = Mapping[str, str | None]
"""What must be equal in all processes, by its name in words."""


class Agreement(L.Callback):
    """Raises the same error in all processes if they differ in their versions, data, weights, settings or progress."""

    def __init__(self, facts: Facts) -> None:
        """Compare ``facts`` when the processes have found each other."""
        self.facts = dict(facts)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gather the facts of all processes.

        Raises:
            RunError: they differ.
        """
        if trainer.world_size == 1:
            return
        everyone: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(everyone, (socket.gethostname(), self.facts))
        if found := disagreement(everyone):
            raise RunError(found)


def disagreement(everyone: Sequence[tuple[str, Facts]]) -> str:
    """The first process that differs from process 0, in words; empty if all agree.

    Args:
        everyone: machine and facts of each process.

    Example:
        >>> disagreement([("a", {"torch": "2.15.0"}), ("b", {"torch": "2.14.0"})])
        'process 1 on b has torch 2.14.0, process 0 on a has 2.15.0; all processes of a run must have the same'
        >>> disagreement([("a", {"torch": "2.15.0"}), ("b", {"torch": "2.15.0"})])
        ''
    """
    host, wanted = everyone[0]
    for rank, (other, facts) in enumerate(everyone):
        names = [name for name in {**wanted, **facts} if wanted.get(name) != facts.get(name)]
        if not names:
            continue
        name, *more = names
        also = f" (and other {', '.join(more[:3])}{' ...' if len(more) > 3 else ''})" if more else ""
        return (
            f"process {rank} on {other} has {name} {facts.get(name)}, process 0 on {host} has {wanted.get(name)}{also}; "
            "all processes of a run must have the same"
        )
    return ""
