"""What a step of training yields, and where training stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """Loss terms, already weighted: ALL of ``terms`` are summed. ``monitors`` are shown and never trained on."""

    terms: Mapping[str, Tensor]
    monitors: Mapping[str, Tensor] = field(default_factory=dict)
    distilled: frozenset[str] = frozenset()
    """Names of the terms that come from distillation: those that the run's ``distill_weight`` scales."""

    def total(self) -> Tensor:
        """[] the sum of all terms."""
        return torch.stack([term.float() if term.dtype != torch.float64 else term for term in self.terms.values()]).sum()

    def as_distilled(self) -> Losses:
        """The same, with every term counted as distillation."""
        return replace(self, distilled=frozenset(self.terms))

    def with_distilled_scaled(self, factor: float) -> Losses:
        """The same, with the terms of the distillation times ``factor``."""
        if factor == 1.0:
            return self
        scaled = {name: factor * term if name in self.distilled else term for name, term in self.terms.items()}
        return replace(self, terms=scaled)

    def prefixed(self, prefix: str) -> Losses:
        """The same with ``prefix/`` before every name."""
        return Losses(
            {f"{prefix}/{name}": value for name, value in self.terms.items()},
            {f"{prefix}/{name}": value for name, value in self.monitors.items()},
            frozenset(f"{prefix}/{name}" for name in self.distilled),
        )

    @staticmethod
    def merge(losses: Sequence[Losses]) -> Losses:
        """All terms and monitors side by side.

        Raises:
            ValueError: two of them use the same name.
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
    """Where training stands. Warm-up, decay and phases are functions of this, never state in the loop."""

    step: int
    """Optimizer steps done, from 0."""
    total: int
    """Optimizer steps of the whole stage."""
    epoch: int = 0

    @property
    def progress(self) -> float:
        """0 at the first step, 1 at the end."""
        return self.step / max(1, self.total)

    def warm_up(self, steps: int) -> float:
        """Linear factor: 0 at step 0, 1 from ``steps`` on (1 at once when ``steps`` is 0)."""
        return 1.0 if steps <= 0 else min(1.0, self.step / steps)
