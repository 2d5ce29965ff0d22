"""Time and peak memory of two ways to the same loss: value and gradient, in turns, in processor time."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LONG_ENOUGH = 3.0
"""Seconds that the rounds of one side take together, if ``MOST_ROUNDS`` allow it."""
MOST_ROUNDS = 101


@dataclass(frozen=True)
class Case:
    """One comparison: two functions of the same inputs, each with its own weights."""

    ours: Callable[[], Tensor]
    released: Callable[[], Tensor] | None
    """None: there is no released code, or it does not run alone."""
    inputs: list[Tensor]
    """The student's tensors that need gradients."""
    our_modules: Iterable[nn.Module] = ()
    released_modules: Iterable[nn.Module] = ()
    differs: str = ""
    """Why the two values differ, if they do (other random numbers, a mistake that ours does not make)."""
    note: str = ""
    leaves: list[Tensor] = field(default_factory=list)

    def weights(self, side: str) -> list[Tensor]:
        """Parameters of one side."""
        modules = self.our_modules if side == "ours" else self.released_modules
        return [parameter for module in modules for parameter in module.parameters()]


def step(case: Case, side: str) -> Tensor:
    """Value and gradient of one side."""
    function = case.ours if side == "ours" else case.released
    assert function is not None
    loss = function()
    loss.backward()
    return loss.detach()


def clear(case: Case, side: str, zeros: bool = False) -> None:
    """Forget the gradients, or set them to 0 so that the next step only adds to them."""
    for tensor in (*case.inputs, *case.weights(side)):
        tensor.grad = torch.zeros_like(tensor) if zeros else None


def timed(case: Case, rounds: int) -> dict[str, Any]:
    """Processor time of both sides in turns: medians in seconds, and the median of released / ours."""
    sides = ["ours"] if case.released is None else ["ours", "released"]
    found, values, gradients = {}, {}, {}
    for side in sides:
        clear(case, side)
        values[side] = float(step(case, side))
        gradients[side] = [tensor.grad for tensor in case.inputs]
    if len(sides) == 2:
        found["value_difference"] = abs(values["ours"] - values["released"]) / max(abs(values["released"]), 1e-30)
        pairs = [(a, b) for a, b in zip(*gradients.values(), strict=True) if a is not None and b is not None]
        found["gradient_difference"] = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)
        del pairs
    del gradients
    before = time.process_time()
    step(case, sides[-1])
    quick = LONG_ENOUGH / max(time.process_time() - before, 1e-6)  # a quick step needs more rounds
    pairs_of_seconds = []
    for index in range(max(rounds, min(int(quick), MOST_ROUNDS))):
        seconds = {}
        for side in sides if index % 2 else sides[::-1]:
            clear(case, side)
            before = time.process_time()
            step(case, side)
            seconds[side] = time.process_time() - before
        pairs_of_seconds.append(seconds)
    for side in sides:
        found[f"{side}_seconds"] = round(statistics.median(pair[side] for pair in pairs_of_seconds), 5)
    if len(sides) == 2:
        found["released_over_ours"] = round(statistics.median(pair["released"] / pair["ours"] for pair in pairs_of_seconds), 3)
    return found


def peak_mb(case: Case, side: str) -> float:
    """Largest memory of a step in MB, less that of inputs, weights and their gradients; Linux only.

    The process's high-water mark is reset after a first step, which loads code and makes buffers that stay.
    """
    clear(case, side)
    step(case, side)
    clear(case, side, zeros=True)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    step(case, side)
    return round((_memory("VmHWM") - before) / 1024, 1)


def _memory(name: str) -> int:
    """An entry of /proc/self/status in KB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))
