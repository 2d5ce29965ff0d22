"""Forecast of a run's memory, time and disk, online and from a cache, before it starts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from detdistill.cache.fill import Lecture, look
from detdistill.cache.forecast import Forecast, forecast, in_bytes, in_seconds
from detdistill.cache.identity import views_of
from detdistill.cache.storage import CacheError
from detdistill.data.views import sights
from detdistill.doctor.case import Case
from detdistill.doctor.findings import Finding, Table, fine
from detdistill.errors import DetdistillError
from detdistill.evaluation import evaluate
from detdistill.settings import DistillSettings
from detdistill.training.from_cache import why_live_teacher

PROBED_IMAGES = 8
"""Images that the cache's forecast and the time of an evaluation are measured on."""
NEARLY_ALL = 0.9
"""Part of the free memory or disk above which a run is warned of."""
FLOAT = 4
"""Bytes of a weight."""


@dataclass(frozen=True)
class Cost:
    """Forecast for all runs that the settings ask for: every seed, and with ``baseline`` each twice."""

    distilled_runs: int
    baselines: int
    steps: int
    """Optimizer steps of a run."""
    online_seconds: float
    """Time of a distilled run with the teacher, evaluations included."""
    cached_seconds: float
    """The same from a cache."""
    baseline_seconds: float
    memory_bytes: int
    """Of a process: weights, gradients, optimizer, teacher, and what a batch keeps for its backward pass."""
    run_bytes: int
    """Of the folder of a distilled run: two checkpoints and the student."""
    cache: Forecast | None
    """None: there can be no cache, for the reason in ``no_cache``."""
    store: str = ""
    no_cache: str = ""

    @property
    def cache_bytes(self) -> int:
        """Size of the cache in the number format that ``--store auto`` would choose; 0 without a cache."""
        return 0 if self.cache is None else self.cache.bytes[self.store]  # type: ignore[index]

    @property
    def all_online_seconds(self) -> float:
        """Time of all runs with the teacher, one after the other."""
        return self.distilled_runs * self.online_seconds + self.baselines * self.baseline_seconds

    @property
    def all_cached_seconds(self) -> float:
        """Time of the cache and of all runs from it, one after the other."""
        filling = 0.0 if self.cache is None else self.cache.seconds
        return filling + self.distilled_runs * self.cached_seconds + self.baselines * self.baseline_seconds


def training_steps(settings: DistillSettings, images: int) -> tuple[int, int]:
    """Optimizer steps and epochs of a run's last stage on a number of training images."""
    batches = math.ceil(images / (settings.batch * settings.devices * settings.nodes))
    each = math.ceil(batches / settings.accumulate)
    steps = each * settings.epochs if settings.steps is None else settings.steps
    return steps, math.ceil(steps / each)


def folder_bytes(student: nn.Module, method: nn.Module | None, settings: DistillSettings) -> int:
    """Bytes of ``last.ckpt``, ``best.ckpt`` and the student's folder."""
    modules = [student] if method is None else [student, method]
    state = sum(tensor.numel() * tensor.element_size() for module in modules for tensor in module.state_dict().values())
    own = sum(tensor.numel() * tensor.element_size() for tensor in student.state_dict().values())
    moments = _trained(modules) * FLOAT * (2 if settings.optimizer == "adamw" else 1)
    return 2 * (state + moments + (own if settings.ema else 0)) + own


def _trained(modules: list[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


def estimate(case: Case) -> Cost:
    """Measure what is missing, and extrapolate to the whole run."""
    settings, probe, session = case.settings, case.probe, case.session()
    student, method = session.student.to(case.device), session.method
    scale = settings.batch / len(case.batches[0])
    loading = case.seconds_per_image * settings.batch
    waits = loading if settings.workers == 0 else max(0.0, loading / settings.workers - probe.distilled.seconds * scale)
    steps, epochs = training_steps(settings, len(case.splits.train.records))
    passes = steps * settings.accumulate
    few = case.splits.val.take(PROBED_IMAGES)
    scored = evaluate(student, few, case.views, batch_size=min(settings.batch, PROBED_IMAGES), device=case.device)
    evaluations = math.ceil(epochs / settings.evaluate_every)
    evaluating = evaluations * scored.seconds * len(case.splits.val) / len(few) / (settings.devices * settings.nodes)

    def whole(step: float) -> float:
        return passes * (step * scale + waits) + evaluating

    states = 2 if settings.optimizer == "adamw" else 1
    modules: list[nn.Module] = [student] if method is None else [student, method]
    held = _trained(modules) * FLOAT * (2 + states + (1 if settings.ema else 0))
    taught = [] if method is None else [teacher.detector for teacher in method.teachers()]
    held += sum(p.numel() * p.element_size() for detector in taught for p in detector.parameters())
    height, width = case.batches[0].padding_hw
    held += round(probe.saved_bytes * scale) + settings.batch * 3 * height * width * FLOAT
    ahead, store, why = _cache(case)
    course, runs = probe.distilled, max(1, len(settings.seeds))
    return Cost(
        runs, runs if settings.baseline else 0, steps, whole(course.seconds), whole(course.seconds - course.teach_seconds),
        whole(probe.alone.seconds), held, folder_bytes(student, method, settings), ahead, store, why,
    )  # fmt: skip


def _cache(case: Case) -> tuple[Forecast | None, str, str]:
    """The forecast of a cache and its number format, or why there can be none."""
    if case.settings.cache is not None:
        return None, "", "the run learns from one already"
    if case.settings.served is not None:
        return None, "", "the run learns from a served teacher, which can write one (detdistill teach --out)"
    if reason := why_live_teacher(case.settings.method):
        return None, "", reason
    session = case.session()
    assert session.method is not None
    try:
        views_of(case.views)
        precision = "bf16" if case.settings.precision == "bf16" else "32"
        lecture = Lecture(case.settings.method, session.method, case.device, precision)
        train = case.splits.train
        everything = sights(train, case.views)
        probe = look(lecture, session.student, train, case.views, everything, case.settings.batch, PROBED_IMAGES)
    except CacheError as error:
        return None, "", str(error).partition(";")[0]
    return forecast(probe, (sight.canvas_hw for sight in everything), None), probe.choose(), ""


def cost(case: Case) -> Iterator[Finding]:
    """Whether memory and disk suffice, and what the run costs online and from a cache."""
    try:
        found = estimate(case)
    except DetdistillError as error:
        yield Finding("warning", "cost", f"no forecast: {error}".rstrip("."))
        return
    case.numbers["cost"] = {
        "steps": found.steps, "online_seconds": found.online_seconds, "cached_seconds": found.cached_seconds,
        "baseline_seconds": found.baseline_seconds, "memory_bytes": found.memory_bytes, "run_bytes": found.run_bytes,
        "cache_bytes": found.cache_bytes, "cache_store": found.store,
        "cache_seconds": None if found.cache is None else found.cache.seconds,
        "all_online_seconds": found.all_online_seconds, "all_cached_seconds": found.all_cached_seconds,
    }  # fmt: skip
    case.tables.append(_table(found))
    yield from _room("memory", found.memory_bytes, free_memory(case.device), "lower --batch or --size; use --accumulate")
    folder = case.settings.out or Path("runs")
    runs = found.run_bytes * (found.distilled_runs + found.baselines)
    yield from _room("disk", runs, free_disk(folder), "make space, or give another --out")
    if found.cache is None:
        yield fine("cost", f"no cache: {found.no_cache}")
    elif found.all_cached_seconds < found.all_online_seconds:
        times = f"{in_seconds(found.all_cached_seconds)} instead of {in_seconds(found.all_online_seconds)}"
        yield fine("cost", f"a cache of {in_bytes(found.cache_bytes)} ({found.store}) would save time: {times}")
    else:
        size = in_bytes(found.cache_bytes)
        yield fine("cost", f"a cache ({size}) pays from more runs on; now it would take {in_seconds(found.all_cached_seconds)}")


def _table(found: Cost) -> Table:
    cached = found.cache is not None
    rows = [
        ("a distilled run", in_seconds(found.online_seconds), in_seconds(found.cached_seconds) if cached else "-"),
        ("a baseline", in_seconds(found.baseline_seconds), in_seconds(found.baseline_seconds) if cached else "-"),
        ("filling the cache", "-", in_seconds(found.cache.seconds) if found.cache is not None else "-"),
        ("all runs", in_seconds(found.all_online_seconds), in_seconds(found.all_cached_seconds) if cached else "-"),
        ("disk of a run", in_bytes(found.run_bytes), in_bytes(found.run_bytes) if cached else "-"),
        ("disk of the cache", "-", in_bytes(found.cache_bytes) if cached else "-"),
        ("memory, beside libraries", in_bytes(found.memory_bytes), ""),
    ]
    count = f"{found.distilled_runs} distilled, {found.baselines} baselines, {found.steps} steps each"
    return Table(f"Forecast ({count})", ("", "online", "from a cache"), tuple(rows))


def _room(what: str, needed: int, free: int | None, todo: str) -> Iterator[Finding]:
    if free is None:
        yield fine("cost", f"about {in_bytes(needed)} of {what}; how much is free is not known here")
        return
    text = f"about {in_bytes(needed)} of {what}, {in_bytes(free)} free"
    if needed > free:
        yield Finding("stop", "cost", f"{text}: it will not fit", "", todo)
    elif needed > NEARLY_ALL * free:
        yield Finding("warning", "cost", f"{text}: it may not fit", "", todo)
    else:
        yield fine("cost", text)


def free_memory(device: str) -> int | None:
    """Free memory of the GPU, or of this machine (Linux); None: not known."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


def free_disk(folder: Path) -> int | None:
    """Free bytes of the disk on which a folder is or would be made; None: not known."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None
