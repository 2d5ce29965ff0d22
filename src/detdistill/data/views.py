"""List all views of a data set that training can draw, if their number is finite; a cache stores knowledge for each view."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader, Dataset

from detdistill.data.loader import Sample, as_it_is, collate_views, read_pixels
from detdistill.data.records import DetectionSet
from detdistill.data.transforms import ViewSettings, make_views, plain_view
from detdistill.errors import DataError
from detdistill.structures import Batch


def endless(settings: ViewSettings) -> list[str]:
    """The settings that make the number of views infinite, in the form of the command line; empty if it is finite."""
    found = []
    if settings.colour > 0:
        found.append(f"colour={settings.colour:g}")
    if settings.scale_jitter is not None:
        found.append(f"scale_jitter={','.join(f'{number:g}' for number in settings.scale_jitter)}")
    if settings.mosaic > 0:
        found.append(f"mosaic={settings.mosaic:g}")
    return found


def variants(settings: ViewSettings) -> tuple[ViewSettings, ...]:
    """Deterministic settings, one for each combination of flip and scale that ``settings`` can draw."""
    flips = [0.0] * (settings.flip < 1) + [1.0] * (settings.flip > 0)
    scales: list[tuple[float, ...]] = [(scale,) for scale in settings.scales] or [()]
    return tuple(
        replace(settings, flip=flip, scales=scale, colour=0.0, scale_jitter=None, mosaic=0.0)
        for scale in scales
        for flip in flips
    )


@dataclass(frozen=True)
class Sight:
    """Description of one view of one image; the pixels are not read yet."""

    index: int
    """Index of the record in its set."""
    variant: int
    """Index in ``variants(settings)``."""
    key: str
    """``<image id>/<view key>``, the same as for this view in training."""
    canvas_hw: tuple[int, int]
    """Height and width of the view after padding, if it is alone in a batch."""
    teacher_hw: tuple[int, int] | None = None
    """The same of the teacher's image, if it has another size (``teacher_size``)."""


def key_of(image_id: int, view_key: str) -> str:
    """Key of one view of one image: ``<image id>/<view key>``."""
    return f"{image_id}/{view_key}"


def sights(data: DetectionSet, settings: ViewSettings) -> list[Sight]:
    """List every view of every image that training with these settings can draw, without duplicates."""
    found: dict[str, Sight] = {}
    kinds = variants(settings)
    for index, record in enumerate(data.records):
        for number, kind in enumerate(kinds):
            view = plain_view(record, kind)
            key = key_of(record.id, view.key)
            larger = None
            if kind.teacher_size is not None:
                larger = kind.of_teacher.padded_hw([plain_view(record, kind.of_teacher).size_hw])
            found.setdefault(key, Sight(index, number, key, kind.padded_hw([view.size_hw]), larger))
    return list(found.values())


def batches_of(
    data: DetectionSet, settings: ViewSettings, chosen: Sequence[Sight], batch_size: int, workers: int = 0
) -> Iterator[tuple[list[Sight], Batch]]:
    """Iterate over batches of views; all views of a batch have the same padded size, so none is padded because of another.

    Args:
        data: the images.
        settings: the settings from which ``chosen`` was made by ``sights``.
        chosen: the views.
        batch_size: largest number of views per batch.
        workers: number of processes that prepare batches. 0: batches are prepared in this process.

    Yields:
        The views of the batch, and the batch.

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
    """Groups of views with equal canvas, in roughly the order given, so that neighbouring files are read together."""
    open_groups: dict[tuple[tuple[int, int], tuple[int, int] | None], list[Sight]] = {}
    plan = []
    for sight in chosen:
        canvases = sight.canvas_hw, sight.teacher_hw
        group = open_groups.setdefault(canvases, [])
        group.append(sight)
        if len(group) == batch_size:
            plan.append(open_groups.pop(canvases))
    return plan + list(open_groups.values())


class _Maker(Dataset[Batch | DataError]):
    """Map from a group of views to its batch."""

    def __init__(self, data: DetectionSet, settings: ViewSettings) -> None:
        self.data, self.kinds = data, variants(settings)

    def __getitem__(self, group: Sequence[Sight]) -> Batch | DataError:
        try:
            return collate_views([self._samples(sight) for sight in group], self.kinds[0])
        except DataError as error:
            return error  # returned as a value: an exception raised in a worker would arrive wrapped in its traceback

    def _samples(self, sight: Sight) -> list[Sample]:
        record = self.data.records[sight.index]
        image = read_pixels(record, self.data.root)
        # As in training. The settings are deterministic, so the generator has no effect.
        views = make_views(image, record, self.kinds[sight.variant], torch.Generator())
        return [(*view, record.id) for view in views]
