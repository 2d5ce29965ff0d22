"""Holding the share of the distillation terms in the student's gradient (``--balance``), for every method.

The published weight of a term belongs to the paper's teacher, student and image size; on another pair the same weight may give
the term a hundredth of the student's gradient, or nearly all of it. ``Balance`` measures both gradients every few steps and
multiplies the distillation terms by a factor that moves slowly towards the wanted share, as GradNorm does for tasks (Chen et
al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing", ICML 2018) and the gradient-guided adaptive modulation of
RT-DETRv4 for its distillation term (Liao et al., 2025).

With D the norm of the gradient of the student's own loss (all its terms together) and K_m that of the distillation terms of
method m (together, before the factor f_m), both over all trained weights of the student, the share of method m is
``f_m K_m / (D + sum_n f_n K_n)``. Own loss and methods each count by the norm of their sum; the monitors ``share/<term>`` count
every single term by its own norm, so their numbers differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detdistill.functional.synced_norm import backward_alone
from detdistill.structures import Losses

STEPS_PER_NORM = 50
"""Steps between measurements for each gradient norm that is measured (one for the own loss, one for each method). A norm costs a
backward pass through the student, so the cost for each step does not depend on the number of methods."""
FIRST_STEPS = (0, 1, 4, 16)
"""Steps of earlier measurements, because the gradients change most at the start."""
PULL = 0.25
"""Part of the way (of the factor's logarithm) to the wanted factor after one measurement; the first measurements are averaged."""
LARGEST_MOVE = 4.0
"""Largest change of a factor, up or down, after one of the later measurements: one odd batch must not undo the rest."""
EARLY_MOVE = 64.0
"""Largest change after one of the first measurements but the very first. The norm of a term can fall a thousandfold in the first
steps (ODKD's boxes under FCOS), and a factor that followed by ``LARGEST_MOVE`` would need the whole run."""
SMALLEST_NORM = 1e-12
"""Norms below this fraction of that of the own loss count as no gradient."""
OTHERS = "others"
"""Name of the terms of a composition's earlier stage, which do not name their method."""


class Balance:
    """Factors on the distillation terms of each method of a run, which hold their share of the student's gradient.

    Each method with a gradient in a measurement has an equal part of the share: with 0.3 and two methods, 0.15 each.
    """

    def __init__(self, share: float, members: Sequence[str]) -> None:
        """Start with all factors at 1.

        Args:
            share: wanted share of all distillation terms together, above 0 and below 1.
            members: slugs of the methods; terms of a composition begin with ``<slug>/``.
        """
        self.share, self.members = share, tuple(members)
        self.names = self.members if len(self.members) == 1 else (*self.members, OTHERS)
        self.factors = dict.fromkeys(self.names, 1.0)
        self.counts = dict.fromkeys(self.names, 0)
        """Number of measurements in which the method had a gradient."""
        self.alone: set[str] = set()
        """Distillation terms that train only modules of the method; they keep their weight."""
        self.reached: set[str] = set()
        """Distillation terms that had a gradient into the student in a measurement."""
        self.trace: dict[str, float] = {}
        """The latest measurement: ``balance/<slug>/share`` before, ``balance/<slug>/factor`` after it."""

    def due(self, step: int) -> bool:
        """Whether a measurement is due at a step of the stage."""
        return step in FIRST_STEPS or step % (STEPS_PER_NORM * (1 + len(self.members))) == 0

    def groups(self, losses: Losses) -> dict[str, list[str]]:
        """Names of the distillation terms of each method that act on the student; for every method, possibly none."""
        found: dict[str, list[str]] = {name: [] for name in self.names}
        for term in losses.terms:
            if term in losses.distilled and term not in self.alone:
                prefix = term.partition("/")[0]
                found[self.members[0] if len(self.members) == 1 else prefix if prefix in self.members else OTHERS].append(term)
        return found

    def apply(self, losses: Losses) -> Losses:
        """The losses with the distillation terms multiplied by the factor of their method."""
        factors = {term: self.factors[name] for name, terms in self.groups(losses).items() for term in terms}
        return losses.with_scaled(factors)

    def measure(
        self, losses: Losses, weights: Sequence[Tensor], scale: float = 1.0, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> str:
        """Measure the norms of the gradients and move the factors.

        Args:
            losses: of a step, before ``apply``.
            weights: the student's trained weights.
            scale: factor on the losses during the measurement, for gradients in float16.
            reduce: mean over the processes of a tensor; None: there is one process.

        Returns:
            Why nothing can be balanced, in words; empty if something can.
        """
        self._find_alone(losses, weights)
        groups = self.groups(losses)
        own = [term for term in losses.terms if term not in losses.distilled]
        found = [gradient_norm(losses, terms, weights, scale) for terms in (own, *groups.values())]
        device = weights[0].device
        numbers = torch.stack(
            [
                torch.stack([torch.zeros((), device=device) if norm is None else norm for norm in found]),
                torch.tensor([float(norm is not None) for norm in found], device=device),
            ]
        )
        norms, paths = (numbers if reduce is None else reduce(numbers)).double().tolist()
        self.update(norms[0] / scale, dict(zip(groups, (norm / scale for norm in norms[1:]), strict=True)))
        if not paths[0]:
            return "no loss of the student's own has a gradient"
        return "" if any(paths[1:]) else "no distillation term has a gradient into the student"

    def _find_alone(self, losses: Losses, weights: Sequence[Tensor]) -> None:
        """Note the distillation terms whose graph does not reach the student. A term may reach it later, after a warm-up."""
        for name in sorted((losses.distilled & losses.terms.keys()) - self.reached):
            if not losses.terms[name].requires_grad:
                continue
            reaches = gradient_norm(losses, [name], weights) is not None
            (self.reached if reaches else self.alone).add(name)
            if reaches:
                self.alone.discard(name)

    def update(self, own: float, norms: Mapping[str, float]) -> None:
        """Move each factor towards the one that gives its method its part of the share.

        Args:
            own: norm of the gradient of the student's own loss.
            norms: norm of the gradient of each method's terms, without the factor.
        """
        self.trace = {}
        if not (math.isfinite(own) and own > 0):
            return
        live = {name: norm for name, norm in norms.items() if math.isfinite(norm) and norm > SMALLEST_NORM * own}
        whole = own + sum(self.factors[name] * norm for name, norm in live.items())
        for name, norm in live.items():
            share = self.factors[name] * norm / whole
            wanted = self.share / len(live) / (1 - self.share) * own / norm
            move = math.log(wanted / self.factors[name]) * max(PULL, 1 / (self.counts[name] + 1))
            if self.counts[name]:
                most = math.log(EARLY_MOVE if self.counts[name] < len(FIRST_STEPS) else LARGEST_MOVE)
                move = min(max(move, -most), most)
            self.factors[name] *= math.exp(move)
            self.counts[name] += 1
            self.trace |= {f"balance/{name}/share": share, f"balance/{name}/factor": self.factors[name]}

    def state_dict(self) -> dict[str, Any]:
        """Factors, counts, and what is known of the terms, for a resumed run."""
        terms = {"alone": sorted(self.alone), "reached": sorted(self.reached)}
        return {"factors": dict(self.factors), "counts": dict(self.counts), **terms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from ``state_dict``."""
        self.factors, self.counts = dict(state["factors"]), dict(state["counts"])
        self.alone, self.reached = set(state["alone"]), set(state["reached"])


def gradient_norm(losses: Losses, terms: Iterable[str], weights: Sequence[Tensor], scale: float = 1.0) -> Tensor | None:
    """[] norm of the gradient of the sum of some terms, times ``scale``; None if no term reaches the weights."""
    found = [losses.terms[term] for term in terms if losses.terms[term].requires_grad]
    if not found:
        return None
    total = torch.stack([term.float() for term in found]).sum() * scale
    with backward_alone():  # a term may have no gradient in some of the processes
        grads = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
    squares = [grad.float().square().sum() for grad in grads if grad is not None]
    return torch.stack(squares).sum().sqrt() if squares else None


def gradient_shares(losses: Losses, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """Share of each term: the norm of its gradient, divided by the sum of the norms of all terms; 0 without a gradient."""
    found = {name: gradient_norm(losses, [name], weights) for name in losses.terms}
    norms = {name: weights[0].new_zeros(()) if norm is None else norm for name, norm in found.items()}
    whole = torch.stack(list(norms.values())).sum().clamp(min=1e-30)
    return {name: norm / whole for name, norm in norms.items()}
