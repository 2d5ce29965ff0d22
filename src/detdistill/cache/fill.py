"""Run the teacher on every view of every image and write its knowledge to a cache."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from detdistill.cache.encoding import decode, encode
from detdistill.cache.forecast import Probe, loss_changes
from detdistill.cache.identity import knowledge_of, unique
from detdistill.cache.knowledge import KnowledgeCache, unwritable
from detdistill.cache.shards import ShardWriter, source_of
from detdistill.cache.storage import CacheError
from detdistill.data.records import DetectionSet
from detdistill.data.transforms import ViewSettings
from detdistill.data.views import Sight, batches_of
from detdistill.detectors.contract import Detector
from detdistill.methods.shared.contract import Composition, Method, teach_in_view
from detdistill.processes import attempt
from detdistill.progress import Bar
from detdistill.structures import Batch, Taught, map_tensors


class Lecture:
    """Runs ``teach`` of the methods of a run, once for each kind of knowledge."""

    def __init__(self, methods: str, method: Method, device: str = "cpu", precision: str = "32") -> None:
        """For each kind of knowledge, choose a method that provides it.

        Args:
            methods: the text that ``method`` was built from, e.g. ``fgd+unikd``.
            method: a method or a composition; it is moved to the device together with its teachers.
            device: device of the teacher's forward pass.
            precision: ``32``, or ``bf16`` for autocast.

        Raises:
            CacheError: a method has no teacher, so there is nothing to cache.
        """
        parts = method.methods if isinstance(method, Composition) else (method,)
        kinds = knowledge_of(methods)
        for part in parts:
            if not part.teachers() and type(part).teach is Method.teach:
                raise CacheError(f"{part.slug} has no teacher, so there is nothing to cache")
        self.knowledge = unique(kinds)
        self.method, self.device, self.precision = method.to(device), device, precision
        self.asked = [parts[kinds.index(kind)] for kind in self.knowledge]
        self.parts = [self.knowledge.index(kind) for kind in kinds]
        """For each method of the composition, the index of its knowledge in ``knowledge``."""
        for teacher in method.teachers():
            teacher.to(device)

    @torch.no_grad()
    def teach(self, batch: Batch) -> list[tuple[Taught, ...]]:
        """Run ``teach`` on a batch.

        Returns:
            For each image, the knowledge of each kind in ``knowledge``.

        Raises:
            CacheError: a method's ``teach`` returned None.
        """
        moved = batch.to(self.device)
        said: list[list[Taught]] = []
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16"):
            if isinstance(self.method, Composition):
                self.method.look_at_teachers(moved)
            for part in self.asked:
                taught = teach_in_view(part, moved)
                if taught is None:
                    raise CacheError(f"{part.slug} learns nothing from a teacher, so there is nothing to cache")
                said.append(taught.split(len(batch)))
        for teacher in self.method.teachers():
            teacher.forget()
        return [tuple(pieces) for pieces in zip(*said, strict=True)]


def look(
    lecture: Lecture,
    student: Detector,
    data: DetectionSet,
    settings: ViewSettings,
    sights: Sequence[Sight],
    batch_size: int,
    images: int = 8,
) -> Probe:
    """Probe a random sample of views: sizes, seconds and changes of the losses.

    Args:
        lecture: the methods.
        student: detector for which the losses are computed; moved to the device of ``lecture``.
        data: the images.
        settings: image size, resizing and augmentation.
        sights: all views of the cache.
        batch_size: number of images per forward pass of the teacher, at most 4 here.
        images: number of views to probe.

    Raises:
        DataError: an image cannot be read.
    """
    probe = Probe()
    chosen = random.Random(0).sample(list(sights), min(images, len(sights)))
    student.to(lecture.device)
    for index, (_, batch) in enumerate(_timed(probe, batches_of(data, settings, chosen, min(batch_size, 4)))):
        started = time.monotonic()
        pieces = lecture.teach(batch)
        if index:
            probe.seconds += time.monotonic() - started
        else:  # the first batch warms up caches and kernels, so its time is not typical
            lecture.teach(batch)
            probe.seconds += time.monotonic() - started
            probe.seconds /= 2
        probe.add(batch, pieces)
        kept = [tuple(piece[place] for place in lecture.parts) for piece in pieces]
        changes = loss_changes(lecture.method, student, batch.to(lecture.device), kept)
        probe.changes = {store: max(probe.changes[store], change) for store, change in changes.items()}
    return probe


def _timed(probe: Probe, batches: Iterator[tuple[list[Sight], Batch]]) -> Iterator[tuple[list[Sight], Batch]]:
    """Pass the batches on and add the time of reading them to ``probe.seconds``."""
    while True:
        started = time.monotonic()
        item = next(batches, None)
        probe.seconds += time.monotonic() - started
        if item is None:
            return
        yield item


def fill(
    cache: KnowledgeCache,
    lecture: Lecture,
    data: DetectionSet,
    settings: ViewSettings,
    sights: Sequence[Sight],
    batch_size: int,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    bar: Bar | None = None,
    shard_records: int = 256,
) -> int:
    """Write the missing records of this writer's share of the views.

    Args:
        cache: a cache that was created for these views.
        lecture: the methods.
        data: the images.
        settings: image size, resizing and augmentation.
        sights: all views, including those of the other writers.
        batch_size: number of images per forward pass of the teacher.
        rank: index of this writer, 0 .. ``world`` - 1; it handles every ``world``-th view.
        world: number of writers working at the same time, each in its own process.
        workers: number of processes that read images.
        bar: progress bar of this writer.
        shard_records: largest number of records in a shard.

    Returns:
        Number of records written.

    Raises:
        CacheError: the cache cannot be written, e.g. because the disk is full; finished shards are kept.
        DataError: an image cannot be read.
    """
    share = sights[rank::world]
    missing = set(cache.index.missing(sight.key for sight in share))
    todo = [sight for sight in share if sight.key in missing]
    done = len(share) - len(todo)
    sources: dict[Path, tuple[int, int]] = {}
    if bar is not None:
        bar.resize(len(share))
        bar.update(done)
    try:
        # A writer that replaces a lost one has a name of its own: the lost one may be alive behind a broken network.
        name = f"{rank:03d}of{world:03d}" + (f"again{attempt()}" if attempt() else "")
        writer = ShardWriter(cache.folder, cache.about.fingerprint, name, shard_records)
        for group, batch in batches_of(data, settings, todo, batch_size, workers):
            for sight, pieces in zip(group, lecture.teach(batch), strict=True):
                path = data.records[sight.index].path
                if path not in sources:
                    sources[path] = source_of(path)
                writer.add(sight.key, encode(pieces, cache.about.store), sources[path])
            done += len(group)
            if bar is not None:
                bar.update(done, f"{writer.written} written")
        writer.flush()
    except OSError as error:
        raise unwritable(cache.folder, error) from error
    return writer.written


@torch.no_grad()
def compare(
    cache: KnowledgeCache,
    lecture: Lecture,
    data: DetectionSet,
    settings: ViewSettings,
    sights: Sequence[Sight],
) -> float:
    """Compare cached records with new results of the teacher.

    The new results are encoded and decoded first, so rounding by the store does not count as a difference.

    Returns:
        Largest absolute difference, relative to the largest absolute value of its tensor.

    Raises:
        CacheError: the shapes of the tensors in a record differ from those of the new result.
    """
    largest = 0.0
    for group, batch in batches_of(data, settings, sights, 1):
        for sight, pieces in zip(group, lecture.teach(batch), strict=True):
            record = encode(pieces, cache.about.store)
            live, kept = _tensors(decode(record.layout, bytearray(record.data))), _tensors(cache.read(sight.key))
            if [tensor.shape for tensor in live] != [tensor.shape for tensor in kept]:
                raise CacheError(
                    f"cache {cache.folder.url}, image {sight.key}: the record's tensors have other shapes than the teacher gives "
                    "now; make the cache again in a new folder"
                )
            for one, other in zip(live, kept, strict=True):
                if one.numel():
                    scale = one.double().abs().max().clamp(min=1e-12)
                    largest = max(largest, float((one.double() - other.double()).abs().max() / scale))
    return largest


def _tensors(value: object) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    return found
