"""What a distillation costs on 1, 8 and 64 GPUs: online, from a cache, and from served teachers; a simulation, not a measurement.

    uv run python benchmarks/scale.py --out benchmarks/results/scale_simulated.json

No GPU was measured. Operations of teacher and student are counted, bytes of a view are those of ``results/cells_coco128.json``;
rates of GPU, store and network are inputs (``--help``). Every GPU runs a process of one data-parallel training: a step ends when
the slowest process has ended it, knowledge is fetched four batches ahead, and a store or a network gives its bandwidth to one
request after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simpy
import torch
from torch.utils.flop_counter import FlopCounterMode

from detdistill.detectors.build import build_detector
from detdistill.detectors.probe import probe_batch

DATA = {"COCO": 118_287, "Objects365": 1_742_289}
"""Training images."""
CELLS = Path(__file__).parent / "results/cells_coco128.json"
AHEAD = 4
"""Batches that are fetched ahead."""


@dataclass(frozen=True)
class Rates:
    """Inputs of the simulation."""

    tflops: float
    """What a GPU reaches in such networks, in 1e12 floating-point operations a second."""
    store_gbytes: float
    """Bandwidth of the shared store in 1e9 bytes a second."""
    link_gbytes: float
    """Bandwidth from one served teacher to the students in 1e9 bytes a second."""
    batch: int
    """Images of a step and GPU."""
    epochs: int
    spread: float
    """Standard deviation of the logarithm of a step's time."""
    steps: int
    """Steps that are simulated; the rest of a training goes on at their mean."""


@dataclass(frozen=True)
class Outcome:
    """A simulated training."""

    hours: float
    """From start to end; a cache's filling not counted."""
    busy: float
    """Share of the time in which the students' GPUs compute."""


def gflops(model: str, size: int) -> float:
    """1e9 floating-point operations of a forward pass on one image."""
    detector = build_detector(model, [str(index) for index in range(80)]).eval()
    batch = probe_batch(size=size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        detector.predict(detector.features(batch), batch)
    return float(counter.get_total_flops()) / 1e9 / len(batch)


def train(seconds: float, fetch: Callable[[simpy.Environment, int], Any], gpus: int, images: int, rates: Rates) -> Outcome:
    """Simulate a data-parallel training.

    Args:
        seconds: mean time of a step in which a GPU waits for nothing.
        fetch: for an environment and a process, an event that ends when the knowledge of its next batch is there.
        gpus: processes.
        images: training images.
        rates: the inputs.
    """
    env = simpy.Environment()
    draw = np.random.default_rng(0)
    times = seconds * draw.lognormal(-(rates.spread**2) / 2, rates.spread, (rates.steps, gpus))
    waiting = [simpy.Store(env, AHEAD) for _ in range(gpus)]
    ends: list[float] = []

    def loader(rank: int) -> Generator[Any, Any, None]:
        while True:
            yield env.process(fetch(env, rank))
            yield waiting[rank].put(None)

    def compute(rank: int, step: int) -> Generator[Any, Any, None]:
        yield waiting[rank].get()
        yield env.timeout(times[step, rank])

    def training() -> Generator[Any, Any, None]:
        for step in range(rates.steps):
            yield env.all_of([env.process(compute(rank, step)) for rank in range(gpus)])
            ends.append(env.now)

    for rank in range(gpus):
        env.process(loader(rank))
    env.run(until=env.process(training()))
    skipped = rates.steps // 5  # until the first batches that were fetched ahead are used up
    each = (ends[-1] - ends[skipped]) / (rates.steps - 1 - skipped)
    steps = rates.epochs * images / (rates.batch * gpus)
    return Outcome(float(each * steps / 3600), float(seconds / each))


def from_pipe(size: float, gbytes: float) -> Callable[[simpy.Environment, int], Any]:
    """Knowledge of ``size`` bytes a batch through one shared pipe."""
    pipes: dict[simpy.Environment, simpy.Resource] = {}

    def fetch(env: simpy.Environment, rank: int) -> Generator[Any, Any, None]:
        pipe = pipes.setdefault(env, simpy.Resource(env, 1))
        with pipe.request() as turn:
            yield turn
            yield env.timeout(size / (gbytes * 1e9))

    return fetch


def from_teachers(seconds: float, size: float, teachers: int, rates: Rates) -> Callable[[simpy.Environment, int], Any]:
    """Knowledge from teachers, each computing a batch in ``seconds`` and sending ``size`` bytes over its own link meanwhile."""
    pools: dict[simpy.Environment, simpy.Resource] = {}

    def fetch(env: simpy.Environment, rank: int) -> Generator[Any, Any, None]:
        pool = pools.setdefault(env, simpy.Resource(env, teachers))
        with pool.request() as turn:
            yield turn
            yield env.timeout(max(seconds, size / (rates.link_gbytes * 1e9)))

    return fetch


def nothing(env: simpy.Environment, rank: int) -> Generator[Any, Any, None]:
    """Nothing to be fetched."""
    yield env.timeout(0)


def rows_of(data: str, kind: str, view: float, teacher: float, student: float, rates: Rates) -> Iterator[dict[str, Any]]:
    """Online, cached and served, for each number of GPUs."""
    images, scale = DATA[data], rates.batch / (rates.tflops * 1e3)
    learn, teach = 3 * student * scale, teacher * scale
    for gpus in (1, 8, 64):
        online = train(learn + teach, nothing, gpus, images, rates)
        cached = train(learn, from_pipe(view * rates.batch, rates.store_gbytes), gpus, images, rates)
        row = {
            "data": data,
            "knowledge": kind,
            "gpus": gpus,
            "online_hours": round(online.hours, 2),
            "teacher_gpu_hours_online": round(rates.epochs * images * teach / rates.batch / 3600, 1),
            "cache_tbytes": round(2 * images * view / 1e12, 4),
            "cache_gpu_hours": round(2 * images * teach / rates.batch / 3600, 1),
            "cached_hours": round(cached.hours, 2),
            "cached_busy": round(cached.busy, 2),
            "cached_reads_gbytes_per_second": round(rates.epochs * images * view / (cached.hours * 3600) / 1e9, 3),
        }
        if gpus > 1:
            tried = {
                count: train(learn, from_teachers(teach, view * rates.batch, count, rates), gpus - count, images, rates)
                for count in sorted({max(1, round(gpus * share)) for share in (0.125, 0.25, 0.375, 0.5, 0.625)})
            }
            best = min(tried, key=lambda count: tried[count].hours)
            row |= {
                "served_hours": round(tried[best].hours, 2),
                "served_teachers": best,
                "served_busy": round(tried[best].busy, 2),
            }
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="fcos:resnet101", help="model whose multiply-adds are counted")
    parser.add_argument("--student", default="fcos:resnet18")
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--tflops", type=float, default=40.0, help="what a GPU reaches, 1e12 operations a second")
    parser.add_argument("--store", type=float, default=5.0, help="1e9 bytes a second that all GPUs together read")
    parser.add_argument("--link", type=float, default=3.0, help="1e9 bytes a second from one served teacher")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--steps", type=int, default=100, help="steps that are simulated")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    rates = Rates(chosen.tflops, chosen.store, chosen.link, chosen.batch, chosen.epochs, 0.05, chosen.steps)
    cells = {row["method"]: row["bytes"] for row in json.loads(CELLS.read_text())["rows"] if row["teacher"] == "fcos:resnet18"}
    kinds = {"maps, int8": cells["pkd"] / 4, "cells near objects": cells["fgfi,form=fpn"], "labels or queries": 5e3}
    teacher, student = gflops(chosen.teacher, chosen.size), gflops(chosen.student, chosen.size)
    rows = [row for data in DATA for kind, view in kinds.items() for row in rows_of(data, kind, view, teacher, student, rates)]
    for row in rows:
        print(row, flush=True)
    if chosen.out:
        content = {
            "what": "simulated, no GPU was measured: hours of a training online, from a cache and from served teachers",
            "command": "uv run python benchmarks/scale.py --out benchmarks/results/scale_simulated.json",
            "inputs": dataclasses.asdict(rates) | {"bytes_of_a_view": kinds, "size": chosen.size},
            "counted_gflops": {chosen.teacher: round(teacher, 1), chosen.student: round(student, 1)},
            "rows": rows,
        }
        chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
