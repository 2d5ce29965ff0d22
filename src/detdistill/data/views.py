"""All views of a data set that a training run can draw, when they are finitely many: what a cache of knowledge holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader, Dataset

from detdistill.data.loader import Sample, as_it_is, collate, read_pixels
from detdistill.data.records import DetectionSet
from detdistill.data.transforms import ViewSettings, make_view, plain_view
from detdistill.errors import DataError
from detdistill.structures import Batch


def endless(settings: ViewSettings) -> list[str]:
    """The settings under which no two views are alike, as the command line writes them; empty when views are finitely many."""
    found = []
    if settings.colour > 0:
        found.append(f"colour={settings.colour:g}")
    if settings.scale_jitter is not None:
        found.append(f"scale_jitter={','.join(f'{number:g}' for number in settings.scale_jitter)}")
    if settings.mosaic > 0:
        found.append(f"mosaic={settings.mosaic:g}")
    return found


def variants(settings: ViewSettings) -> tuple[ViewSettings, ...]:
    """One setting, which leaves nothing to chance, for each kind of view that ``settings`` can draw (flips, scales)."""
    flips = [0.0] * (settings.flip < 1) + [1.0] * (settings.flip > 0)
    scales: list[tuple[float, ...]] = [(scale,) for scale in settings.scales] or [()]
    return tuple(
        replace(settings, flip=flip, scales=scale, colour=0.0, scale_jitter=None, mosaic=0.0)
        for scale in scales
        for flip in flips
    )


@dataclass(frozen=True)
class Sight:
    """One view of one image, before any pixel is read."""

    index: int
    """Of the record in its set."""
    variant: int
    key: str
    """``<image id>/<view key>``: equal to that of the same view in training."""
    canvas_hw: tuple[int, int]
    """What the view is padded to in a batch of its own."""


def key_of(image_id: int, view_key: str) -> str:
    """The name of one view of one image."""
    return f"{image_id}/{view_key}"


def sights(data: DetectionSet, settings: ViewSettings) -> list[Sight]:
    """All views of all images that training with these settings can draw, each once."""
    found: dict[str, Sight] = {}
    kinds = variants(settings)
    for index, record in enumerate(data.records):
        for number, kind in enumerate(kinds):
            view = plain_view(record, kind)
            key = key_of(record.id, view.key)
            found.setdefault(key, Sight(index, number, key, kind.padded_hw([view.size_hw])))
    return list(found.values())


def batches_of(
    data: DetectionSet, settings: ViewSettings, chosen: Sequence[Sight], batch_size: int, workers: int = 0
) -> Iterator[tuple[list[Sight], Batch]]:
    """Batches of views with one canvas each, so that nothing in a batch is padded because of the others.

    Raises:
        DataError: an image cannot be read.
    """
    plan = _by_canvas(chosen, batch_size)
    maker = _Maker(data, settings)
    if workers:
        made: Iterator[Batch | DataError] = iter(
            DataLoader(maker, batch_size=None, sampler=plan, num_workers=workers, collate_fn=as_it_is)  # type: ignore[arg-type]
        )
    else:
        made = map(maker.__getitem__, plan)
    for group, batch in zip(plan, made, strict=True):
        if isinstance(batch, DataError):
            raise batch
        yield group, batch


def _by_canvas(chosen: Sequence[Sight], batch_size: int) -> list[list[Sight]]:
    """Groups in about the order given, which keeps files that lie side by side together."""
    open_groups: dict[tuple[int, int], list[Sight]] = {}
    plan = []
    for sight in chosen:
        group = open_groups.setdefault(sight.canvas_hw, [])
        group.append(sight)
        if len(group) == batch_size:
            plan.append(open_groups.pop(sight.canvas_hw))
    return plan + list(open_groups.values())


class _Maker(Dataset[Batch | DataError]):
    """Maps a group of sights to its batch."""

    def __init__(self, data: DetectionSet, settings: ViewSettings) -> None:
        self.data, self.kinds = data, variants(settings)

    def __getitem__(self, group: Sequence[Sight]) -> Batch | DataError:
        try:
            return collate([self._sample(sight) for sight in group], self.kinds[0])
        except DataError as error:
            return error  # as a value: raised in a worker, it would arrive wrapped in its traceback

    def _sample(self, sight: Sight) -> Sample:
        record = self.data.records[sight.index]
        image = read_pixels(record, self.data.root)
        # With boxes as in training; nothing is left to chance, so nothing depends on the generator.
        view = make_view(image, record, self.kinds[sight.variant], torch.Generator(), train=True)
        return *view, record.id
