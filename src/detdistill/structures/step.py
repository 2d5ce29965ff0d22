"""Losses of a training step (``Losses``), and progress of training (``Clock``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """Loss terms, already weighted: all of ``terms`` are summed. ``monitors`` are logged only."""

    terms: Mapping[str, Tensor]
    monitors: Mapping[str, Tensor] = field(default_factory=dict)
    distilled: frozenset[str] = frozenset()
    """Names of the distillation terms, which the run's ``distill_weight`` scales."""

    def total(self) -> Tensor:
        """[] the sum of all terms."""
        return torch.stack([term.float() if term.dtype != torch.float64 else term for term in self.terms.values()]).sum()

    def as_distilled(self) -> Losses:
        """The same losses with every term marked as distillation."""
        return replace(self, distilled=frozenset(self.terms))

    def with_distilled_scaled(self, factor: float) -> Losses:
        """The same losses with the distillation terms multiplied by ``factor``."""
        return self if factor == 1.0 else self.with_scaled(dict.fromkeys(self.distilled, factor))

    def with_scaled(self, factors: Mapping[str, float]) -> Losses:
        """The same losses with some terms multiplied by factors of their own; terms without a factor stay as they are."""
        scaled = {name: factors[name] * term if name in factors else term for name, term in self.terms.items()}
        return replace(self, terms=scaled)

    def prefixed(self, prefix: str) -> Losses:
        """The same losses with ``prefix/`` before every name."""
        return Losses(
            {f"{prefix}/{name}": value for name, value in self.terms.items()},
            {f"{prefix}/{name}": value for name, value in self.monitors.items()},
            frozenset(f"{prefix}/{name}" for name in self.distilled),
        )

    @staticmethod
    def merge(losses: Sequence[Losses]) -> Losses:
        """Join the terms and monitors of several losses.

        Raises:
            ValueError: two losses use the same name.
        """
        terms: dict[str, Tensor] = {}
        monitors: dict[str, Tensor] = {}
        for loss in losses:
            for mine, new in ((terms, loss.terms), (monitors, loss.monitors)):
                twice = mine.keys() & new.keys()
                if twice:
                    raise ValueError(f"two losses are called {sorted(twice)[0]!r}; give one of them another prefix")
                mine.update(new)
        return Losses(terms, monitors, frozenset().union(*(loss.distilled for loss in losses)))


@dataclass(frozen=True)
class Clock:
    """Progress of a training stage. Warm-up, decay and phases are functions of it; the loop keeps no state for them."""

    step: int
    """Number of optimizer steps done."""
    total: int
    """Number of optimizer steps of the whole stage."""
    epoch: int = 0
    epochs: int = 1
    """Number of epochs of the stage; the last one may be cut short."""

    @property
    def progress(self) -> float:
        """0 at the first step, 1 at the end."""
        return self.step / max(1, self.total)

    def warm_up(self, steps: int) -> float:
        """Linear factor: 0 at step 0, 1 from ``steps`` on (1 at once when ``steps`` is 0)."""
        return 1.0 if steps <= 0 else min(1.0, self.step / steps)
