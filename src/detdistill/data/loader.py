"""Batches of a data set in an order that depends on seed and epoch alone, and that can be taken up again in the middle.

What an image looks like depends on (seed, epoch, index of the image) alone. So neither the number of workers nor an
interruption changes anything: the run goes on with exactly the batches it has not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detdistill.data.records import DetectionSet, Record
from detdistill.data.transforms import ViewSettings, make_mosaic, make_view, resize_image
from detdistill.errors import DataError, RunError
from detdistill.structures import Batch, Target, View

Sample = tuple[Tensor, Target, View, int]
"""Pixels [3, h, w], boxes, view and id of one image."""


class DetectionLoader:
    """Iterates over ``Batch``es of a data set, one epoch a pass.

    A full pass moves on to the next epoch; one that was left early starts again at its beginning, unless
    ``load_state_dict`` said where to go on. The state counts the batches handed out, not those that workers have ready.

    Example:
        for batch in DetectionLoader(splits.train, ViewSettings(size=320), batch_size=8, train=True):
            ...
    """

    def __init__(
        self,
        data: DetectionSet,
        settings: ViewSettings,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        in_memory: bool = False,
    ) -> None:
        """Read nothing yet.

        Args:
            data: the images.
            settings: how to show them.
            batch_size: images of a batch (of this rank); the last batch of an epoch may be smaller.
            train: shuffle and augment; else the set's order and plain views.
            seed: of order and augmentation.
            rank: this process, 0 .. ``world`` - 1.
            world: processes that share the set. In training all get the same number of images (the first ones of the order
                are shown twice where it does not divide); in evaluation every image goes to exactly one.
            workers: processes that prepare batches; 0: this one does.
            in_memory: decode once and keep the pixels, at the size that is shown where this does not change the result.

        Raises:
            RunError: a number or setting is not possible.
        """
        settings.validate()
        if batch_size < 1 or workers < 0 or seed < 0:
            raise RunError(
                f"needs batch >= 1, workers >= 0 and seed >= 0, got batch={batch_size}, workers={workers}, seed={seed}"
            )
        if not 0 <= rank < world:
            raise RunError(f"rank {rank} does not exist among {world} processes")
        self.data, self.settings, self.batch_size, self.train = data, settings, batch_size, train
        self._seed, self._rank, self._world, self._workers = seed, rank, world, workers
        self._batches = _Batches(data, settings, train, seed, in_memory)
        self._epoch = 0
        self._batches_done = 0
        self._resumed = False

    @property
    def epoch(self) -> int:
        """The epoch of the batch handed out last (before the first: of the one to come)."""
        return self._epoch

    batch_sampler = None
    """As in torch's ``DataLoader``: Lightning looks here, too, where it looks for ``sampler``."""

    @property
    def sampler(self) -> DetectionLoader:
        """The loader itself, because Lightning tells ``sampler.set_epoch`` which epoch begins.

        It matters when a run resumes at the end of an epoch: Lightning does not restore the loader's state then.
        """
        return self

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be this epoch, from its beginning unless a loaded state stands in the middle of just this one."""
        if self._resumed and epoch == self._epoch and self._batches_done < len(self):
            return
        self._epoch, self._batches_done, self._resumed = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """Where iteration stands: ``epoch`` and the number of its batches handed out."""
        return {"epoch": self._epoch, "batches_done": self._batches_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass go on from there.

        Raises:
            RunError: the state has more batches than this loader's epochs.
        """
        epoch, done = int(state["epoch"]), int(state["batches_done"])
        if not 0 <= done <= len(self):
            raise RunError(
                f"cannot resume after batch {done} of an epoch of {len(self)}; use the data, batch size and processes of then"
            )
        self._epoch, self._batches_done, self._resumed = epoch, done, True

    def __len__(self) -> int:
        """Batches of an epoch (of this rank)."""
        return -(-self._num_samples() // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """The (remaining) batches of an epoch.

        Nothing happens before the first batch is asked for: trainers make iterators that they never use.
        """
        if self._batches_done >= len(self):
            self._epoch, self._batches_done = self._epoch + 1, 0
        start = self._batches_done if self._resumed else 0
        self._resumed = False
        order = self._sample_order(self._epoch)
        chunks = [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]
        for number, batch in enumerate(self._prepared([(self._epoch, chunk) for chunk in chunks[start:]]), start=start):
            if isinstance(batch, DataError):
                raise batch
            self._batches_done = number + 1
            yield batch

    def _num_samples(self) -> int:
        if self.train:
            return -(-len(self.data.records) // self._world)
        return len(range(self._rank, len(self.data.records), self._world))

    def _sample_order(self, epoch: int) -> list[int]:
        """Indices of this rank's images."""
        count = len(self.data.records)
        if not self.train:
            return list(range(self._rank, count, self._world))
        order = torch.randperm(count, generator=_generator(self._seed, epoch)).tolist()
        return [order[place % count] for place in range(self._rank, self._num_samples() * self._world, self._world)]

    def _prepared(self, plan: list[tuple[int, list[int]]]) -> Iterator[Batch | DataError]:
        """The batches of a plan, by the workers or by this process."""
        self._batches.fill()  # before workers start, so that they share the memory
        if self._workers == 0:
            return map(self._batches.__getitem__, plan)
        # One item is one batch. The own generator keeps the global one, which seeds the model, out of this. Workers live for
        # one pass: kept longer, they would be left to the garbage collector, and then torch waits 5 s for each of them.
        return iter(
            DataLoader(
                self._batches,
                batch_size=None,
                sampler=plan,
                num_workers=self._workers,
                collate_fn=as_it_is,
                generator=torch.Generator(),
            )
        )


def as_it_is(batch: Any) -> Any:
    """What torch calls a collate function: a batch that is one already."""
    return batch


def _generator(*numbers: int) -> torch.Generator:
    """A generator for this sequence of numbers; unlike sums of them, no two short sequences meet."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


class _Batches(Dataset[Batch | DataError]):
    """Maps (epoch, indices of images) to a batch; the same in every process."""

    def __init__(self, data: DetectionSet, settings: ViewSettings, train: bool, seed: int, in_memory: bool) -> None:
        self.data, self.settings, self.train, self.seed, self.in_memory = data, settings, train, seed, in_memory
        self.kept: list[Tensor] = []

    def fill(self) -> None:
        """Decode all images into memory if that is wanted and not done yet."""
        if not self.in_memory or self.kept:
            return
        kept = []
        for index, record in enumerate(self.data.records):
            image = read_pixels(self.data.records[index], self.data.root)
            # A zoom is computed from the file's own pixels: then those are kept.
            zooms = self.train and (self.settings.scale_jitter is not None or bool(self.settings.scales))
            kept.append(image if zooms else resize_image(image, self.settings.resized_hw(*record.size_hw)))
        self.kept = kept

    def __getitem__(self, key: tuple[int, Sequence[int]]) -> Batch | DataError:
        epoch, indices = key
        try:
            return collate([self._sample(epoch, index) for index in indices], self.settings)
        except DataError as error:
            # As a value: raised in a worker, it would arrive wrapped in its traceback.
            return error

    def _sample(self, epoch: int, index: int) -> Sample:
        records = self.data.records
        generator = _generator(self.seed, epoch, index) if self.train else _UNUSED
        if self.train and self.settings.mosaic > 0 and float(torch.rand((), generator=generator)) < self.settings.mosaic:
            chosen = [index, *torch.randint(len(records), (3,), generator=generator).tolist()]
            parts = [records[which] for which in chosen]
            return *make_mosaic([self._image(which) for which in chosen], parts, self.settings, generator), records[index].id
        view = make_view(self._image(index), records[index], self.settings, generator, self.train)
        return *view, records[index].id

    def _image(self, index: int) -> Tensor:
        return self.kept[index] if self.kept else read_pixels(self.data.records[index], self.data.root)


_UNUSED = torch.Generator()
"""For plain views, which draw nothing."""


def read_pixels(record: Record, root: Path) -> Tensor:
    """[3, H, W] uint8 of a record's file.

    Raises:
        DataError: it cannot be decoded, or has another size than the record says.
    """
    advice = f"run `detdistill data inspect {root} --deep` to find all such files"
    try:
        image = read_image(record.path)
    except (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{record.path}: the image cannot be decoded ({reason}); {advice}") from error
    if tuple(image.shape[-2:]) != tuple(record.size_hw):
        (height, width), (real_h, real_w) = record.size_hw, image.shape[-2:]
        raise DataError(f"{record.path}: the image has {real_w}x{real_h} pixels but {width}x{height} were announced; {advice}")
    return image


def read_image(path: Path) -> Tensor:
    """[3, H, W] uint8 RGB of an image file, turned as its EXIF orientation says; 16-bit greys are scaled to 8 bits.

    Raises:
        OSError, ValueError, SyntaxError: whatever PIL says of a broken file.
    """
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        # A copy, because PIL's own memory is not writable.
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def collate(samples: Sequence[Sample], settings: ViewSettings) -> Batch:
    """Put views side by side, zero-padded on the right and at the bottom to ``settings.padded_hw``; masks as well."""
    pixels, targets, views, ids = zip(*samples, strict=True)
    sizes = [view.size_hw for view in views]
    height, width = settings.padded_hw(sizes)
    if all(size == (height, width) for size in sizes):
        images = torch.stack(pixels)
    else:
        images = torch.zeros(len(samples), 3, height, width)
        for image, own, (own_h, own_w) in zip(images, pixels, sizes, strict=True):
            image[:, :own_h, :own_w] = own
    canvases = tuple(settings.padded_hw([size]) for size in sizes)
    return Batch(images, torch.tensor(sizes, dtype=torch.int64), _side_by_side(targets, (height, width)), ids, views, canvases)


def _side_by_side(targets: Sequence[Target], padded_hw: tuple[int, int]) -> tuple[Target, ...]:
    """The targets as slices of common tensors: workers send every tensor through a file descriptor, and those are few."""
    counts = [len(target) for target in targets]
    boxes = torch.split(torch.cat([target.boxes_xyxy for target in targets]), counts)
    labels = torch.split(torch.cat([target.labels for target in targets]), counts)
    crowd = torch.split(torch.cat([target.crowd for target in targets]), counts)
    masks: list[Tensor | None] = []
    for target in targets:
        mask = target.masks
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, padded_hw[1] - mask.shape[2], 0, padded_hw[0] - mask.shape[1]))
        masks.append(mask)
    return tuple(Target(*fields) for fields in zip(boxes, labels, crowd, masks, strict=True))
