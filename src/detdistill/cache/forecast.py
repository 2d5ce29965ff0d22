"""Forecast of a cache's size, writing time and precision from a few images, before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from detdistill.cache.encoding import DEFLATED, STORES, Store, decode, encode
from detdistill.cache.storage import CacheError
from detdistill.detectors.contract import Detector
from detdistill.methods.shared.contract import Method, part_of
from detdistill.structures import Batch, Clock, Taught, TaughtTogether

LARGEST_CHANGE = 0.01
"""Largest relative change of any loss term that ``store=auto`` accepts."""
RESERVE = 1.02
"""Factor on the forecast size, for manifests, headers and a small margin."""
MIDDLE = Clock(step=500, total=1000, epoch=5)
"""A time in training after every warm-up."""


@dataclass
class Probe:
    """Measurements on a few images."""

    pixels: int = 0
    """Total number of pixels of the padded images."""
    bytes: dict[Store, int] = field(default_factory=lambda: dict.fromkeys(STORES, 0))
    """Total size of the records in each store."""
    seconds: float = 0.0
    """Time of reading the images and running ``teach``."""
    changes: dict[Store, float] = field(default_factory=lambda: dict.fromkeys(STORES, 0.0))
    """Largest relative change of any loss term under each store."""

    def add(self, batch: Batch, pieces: Sequence[tuple[Taught, ...]]) -> None:
        """Add the pixels and record sizes of a batch."""
        self.pixels += len(batch) * batch.padding_hw[0] * batch.padding_hw[1]
        for store in STORES:
            self.bytes[store] += sum(len(encode(piece, store).data) for piece in pieces)

    def choose(self) -> Store:
        """The smallest store that changes no loss term by more than one percent; int6 is never chosen automatically."""
        good = [store for store in STORES if self.changes[store] <= LARGEST_CHANGE and store not in DEFLATED]
        # Of two stores of equal size, the more precise: bfloat16 has 8 significant bits, float16 has 11.
        return min(good or ["float32"], key=lambda store: (self.bytes[store], STORES.index(store)))


@dataclass(frozen=True)
class Forecast:
    """Forecast for a whole cache: number of records, bytes by store, seconds, free bytes (None: unknown), loss changes."""

    records: int
    bytes: Mapping[Store, int]
    seconds: float
    free: int | None
    changes: Mapping[Store, float]

    def lines(self, chosen: Store) -> list[str]:
        """The forecast as two lines of text."""
        sizes = ", ".join(f"{store} {in_bytes(self.bytes[store])} (loss {100 * self.changes[store]:.2g} %)" for store in STORES)
        free = "unknown" if self.free is None else in_bytes(self.free)
        return [
            f"{self.records} records, about {in_seconds(self.seconds)}; free space {free}",
            f"size and largest change of a loss: {sizes}; store={chosen}",
        ]

    def check(self, chosen: Store, url: str) -> None:
        """Check that the cache fits on the disk.

        Raises:
            CacheError: it does not fit; the message suggests what would.
        """
        if self.free is None or self.bytes[chosen] * RESERVE <= self.free:
            return
        fits = [store for store in STORES if self.bytes[store] * RESERVE <= self.free]
        ways = (
            [f"--store {fits[0]} ({in_bytes(self.bytes[fits[0]])})"] if fits else ["fewer views (--flip 0)", "a smaller --size"]
        )
        raise CacheError(
            f"the cache would need about {in_bytes(self.bytes[chosen])} as {chosen}, {url} has {in_bytes(self.free)} free; "
            f"try {', '.join(ways)}, another disk, or train online (without --cache)"
        )


def forecast(probe: Probe, canvases_hw: Iterable[tuple[int, int]], free: int | None, writers: int = 1) -> Forecast:
    """Extrapolate a probe to all records; bytes and seconds are proportional to the pixels of the padded images.

    Args:
        probe: measurements on at least one image.
        canvases_hw: padded height and width of each record still to be written.
        free: free space in bytes; None if unknown.
        writers: number of processes that share the work.
    """
    records, pixels = 0, 0
    for height, width in canvases_hw:
        records += 1
        pixels += height * width
    scale = pixels / probe.pixels
    sizes = {store: round(count * scale) for store, count in probe.bytes.items()}
    return Forecast(records, sizes, probe.seconds * scale / writers, free, probe.changes)


def loss_changes(method: Method, student: Detector, batch: Batch, pieces: Sequence[tuple[Taught, ...]]) -> dict[Store, float]:
    """Measure how much rounding by each store changes the losses.

    Args:
        method: a method or a composition.
        student: an untrained student. The state of student and method is restored afterwards.
        batch: images with the same padded size.
        pieces: for each image, the knowledge for each member of ``method``.

    Returns:
        For each store, the largest relative change of any loss term against the unrounded knowledge.
    """
    expected = _losses(method, student, batch, pieces)
    changes: dict[Store, float] = {}
    for store in STORES:
        records = [encode(piece, store) for piece in pieces]
        again: list[tuple[Taught, ...]] = [decode(record.layout, bytearray(record.data)) for record in records]
        actual = _losses(method, student, batch, again)
        found = [abs(actual[name] - value) / max(abs(value), 1e-12) for name, value in expected.items() if abs(value) > 1e-9]
        changes[store] = max(found, default=0.0)
    return changes


@torch.no_grad()
def _losses(method: Method, student: Detector, batch: Batch, pieces: Sequence[tuple[Taught, ...]]) -> dict[str, float]:
    whole = [TaughtTogether(piece) if len(piece) > 1 else piece[0] for piece in pieces]
    stacked = type(whole[0]).stack(whole).to(batch.images.device)
    found: dict[str, Tensor] = {}
    state = copy.deepcopy([student.state_dict(), method.state_dict()])
    devices = [batch.images.device] if batch.images.device.type == "cuda" else []
    for stage in method.stages(student):
        if stage.depends_on:  # an earlier stage of the method itself, which runs before the cache is used
            continue
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            taught = None if stage.learns_from is None else part_of(stacked, method, stage.learns_from)
            losses = stage.step(batch, taught, MIDDLE)
        found |= {f"{stage.name}/{name}": term for name, term in losses.terms.items()}
    student.load_state_dict(state[0])
    method.load_state_dict(state[1])
    return {name: float(term) for name, term in found.items()}


def stranger(detector: Detector) -> Detector:
    """Make an untrained detector of the same architecture by shuffling the values within each weight tensor.

    It replaces the student in loss measurements if the user names none.
    """
    other = copy.deepcopy(detector)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return other.requires_grad_(True).train()


def in_bytes(count: float) -> str:
    """Format a number of bytes, e.g. ``3.8 TB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1000
    raise AssertionError


def in_seconds(seconds: float) -> str:
    """Format a duration, e.g. ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
