"""Latency of detectors and exported files on this machine, measured in turns so that a change of load meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from detdistill.detectors.contract import Detector
from detdistill.structures import Batch


@dataclass(frozen=True)
class Timing:
    """Time of a detector from pixels to detections."""

    milliseconds: float
    """Median over the rounds, for one batch."""
    least: float
    """Shortest round, in milliseconds."""
    images_per_second: float
    """Images of a batch over the median."""


def interleaved(
    models: Mapping[str, Detector],
    batch: Batch,
    rounds: int,
    follow: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Measure detectors in turns: one round runs each of them once. Two rounds before do not count.

    Args:
        models: detectors by name, in eval mode, on the batch's device.
        batch: the images.
        rounds: number of rounds.
        follow: called with the number of rounds done.
        clock: time in seconds; ``time.process_time`` is right for one thread on a busy machine.
    """
    spent: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for number in range(-2, rounds):
            for name, model in models.items():
                _wait(batch)
                started = clock()
                model.detect(model.predict(model.features(batch), batch), batch)
                _wait(batch)
                if number >= 0:
                    spent[name].append(1000 * (clock() - started))
            if follow is not None and number >= 0:
                follow(number + 1)
    return {
        name: Timing(statistics.median(times), min(times), 1000 * len(batch) / statistics.median(times))
        for name, times in spent.items()
    }


def _wait(batch: Batch) -> None:
    if batch.images.is_cuda:
        torch.cuda.synchronize()
