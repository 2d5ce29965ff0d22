"""Data loader with a reproducible order of batches that can be resumed in the middle of an epoch.

The order of the images depends only on seed and epoch; the augmentation of an image depends only on seed, epoch and the
image's index. So the number of workers changes nothing, and a resumed run continues with exactly the remaining batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image

from detdistill.data.pixels import eight_bits
from detdistill.data.records import DetectionSet, Record
from detdistill.data.transforms import ViewSettings, joined_scores, make_mosaic, make_view, make_views, resize_image
from detdistill.errors import DataError, RunError
from detdistill.structures import Batch, Target, View

Sample = tuple[Tensor, Target, View, int]
"""One image: pixels [3, h, w], boxes, view and image id."""


class DetectionLoader:
    """Iterable over the ``Batch``es of a data set; one pass is one epoch.

    After a full pass, the next pass is the next epoch. After a pass that was left early, the next pass repeats that epoch
    from its beginning, unless ``load_state_dict`` set another position. The state counts the batches that the loader has
    returned, not those that workers have prepared.

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
        ahead: Callable[[Batch], None] | None = None,
    ) -> None:
        """Check and store the settings; no image is read yet.

        Args:
            data: the images.
            settings: image size, resizing and augmentation.
            batch_size: images per batch of this rank; the last batch of an epoch may be smaller.
            train: True: shuffle and augment. False: the order of the set, without augmentation.
            seed: seed of order and augmentation.
            rank: index of this process, 0 .. ``world`` - 1.
            world: number of processes that share the set. In training, all get the same number of images: if ``world`` does
                not divide the number of images, the first ones of the order are used twice. In evaluation, each image goes
                to exactly one process.
            workers: number of processes that prepare batches. 0: batches are prepared in this process.
            in_memory: decode each image only once and keep its pixels, already resized if this does not change the result.
            ahead: called with each batch when it is prepared, which is then one batch earlier than it is returned.

        Raises:
            RunError: a number or setting is out of its range.
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
        self._ahead = ahead
        self._batches = _Batches(data, settings, train, seed, in_memory)
        self._epoch = 0
        self._batches_done = 0
        self._resumed = False

    @property
    def epoch(self) -> int:
        """Epoch of the last batch returned; before the first batch, the epoch that comes next."""
        return self._epoch

    batch_sampler = None
    """Attribute of torch's ``DataLoader`` that Lightning reads together with ``sampler``."""

    @property
    def sampler(self) -> DetectionLoader:
        """The loader itself, because Lightning calls ``sampler.set_epoch`` at the start of an epoch.

        This matters when a run resumes at the end of an epoch, because Lightning then does not restore the loader's state.
        """
        return self

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass this epoch, from its beginning; a loaded state in the middle of the same epoch is kept."""
        if self._resumed and epoch == self._epoch and self._batches_done < len(self):
            return
        self._epoch, self._batches_done, self._resumed = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """Position of the iteration: ``epoch``, and ``batches_done``, the number of its batches already returned."""
        return {"epoch": self._epoch, "batches_done": self._batches_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next pass continue at the position that ``state_dict`` returned.

        Raises:
            RunError: the state counts more batches than this loader has in an epoch.
        """
        epoch, done = int(state["epoch"]), int(state["batches_done"])
        if not 0 <= done <= len(self):
            raise RunError(
                f"cannot resume after batch {done}: an epoch has {len(self)} batches; use the same data, batch size and number "
                "of processes as in the interrupted run"
            )
        self._epoch, self._batches_done, self._resumed = epoch, done, True

    def __len__(self) -> int:
        """Number of batches of this rank in an epoch."""
        return -(-self._num_samples() // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """The (remaining) batches of an epoch.

        The loader's state changes only when the first batch is requested, because trainers create iterators that they never
        use.
        """
        if self._batches_done >= len(self):
            self._epoch, self._batches_done = self._epoch + 1, 0
        start = self._batches_done if self._resumed else 0
        self._resumed = False
        order = self._sample_order(self._epoch)
        chunks = [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]
        prepared = self._prepared([(self._epoch, chunk) for chunk in chunks[start:]])
        if self._ahead is not None:
            prepared = _one_ahead(prepared, self._ahead)
        for number, batch in enumerate(prepared, start=start):
            if isinstance(batch, DataError):
                raise batch
            self._batches_done = number + 1
            yield batch

    @property
    def images(self) -> int:
        """Number of images of this rank in an epoch."""
        return self._num_samples()

    def _num_samples(self) -> int:
        if self.train:
            return -(-len(self.data.records) // self._world)
        return len(range(self._rank, len(self.data.records), self._world))

    def _sample_order(self, epoch: int) -> list[int]:
        """Indices of this rank's images in the order of the epoch."""
        count = len(self.data.records)
        if not self.train:
            return list(range(self._rank, count, self._world))
        order = torch.randperm(count, generator=_generator(self._seed, epoch)).tolist()
        return [order[place % count] for place in range(self._rank, self._num_samples() * self._world, self._world)]

    def _prepared(self, plan: list[tuple[int, list[int]]]) -> Iterator[Batch | DataError]:
        """The batches of a plan (epoch and image indices of each batch), made by the workers or in this process."""
        self._batches.fill()  # before the workers start, so that they share the memory
        if self._workers == 0:
            return map(self._batches.__getitem__, plan)
        # Each item is a batch. A separate generator leaves the global one, which initialises models, unchanged. The workers
        # end with the pass: left to the garbage collector, each of them would cost a wait of 5 s in torch.
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


def _one_ahead(batches: Iterator[Batch | DataError], tell: Callable[[Batch], None]) -> Iterator[Batch | DataError]:
    """Pass batches on, each after ``tell`` was called with it and with the one behind it."""
    waiting: list[Batch | DataError] = []
    for batch in batches:
        if not isinstance(batch, DataError):
            tell(batch)
        waiting.append(batch)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def as_it_is(batch: Any) -> Any:
    """Collate function for a torch ``DataLoader`` that already returns batches: return the batch unchanged."""
    return batch


def _generator(*numbers: int) -> torch.Generator:
    """A generator seeded by a sequence of numbers; unlike their sum, different short sequences give different seeds."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


class _Batches(Dataset[Batch | DataError]):
    """Map from (epoch, image indices) to a batch; the batch is the same in every process."""

    def __init__(self, data: DetectionSet, settings: ViewSettings, train: bool, seed: int, in_memory: bool) -> None:
        self.data, self.settings, self.train, self.seed, self.in_memory = data, settings, train, seed, in_memory
        self.kept: list[Tensor] = []

    def fill(self) -> None:
        """Decode all images into memory, if ``in_memory`` is set and it has not been done yet."""
        if not self.in_memory or self.kept:
            return
        kept = []
        for index, record in enumerate(self.data.records):
            image = read_pixels(self.data.records[index], self.data.root)
            # Zooms and the teacher's images are computed from the original pixels, so these are kept.
            changing = self.settings.scale_jitter, self.settings.scales or None, self.settings.teacher_size
            zooms = self.train and any(setting is not None for setting in changing)
            kept.append(image if zooms else resize_image(image, self.settings.resized_hw(*record.size_hw)))
        self.kept = kept

    def __getitem__(self, key: tuple[int, Sequence[int]]) -> Batch | DataError:
        epoch, indices = key
        try:
            return collate_views([self._samples(epoch, index) for index in indices], self.settings)
        except DataError as error:
            # Returned as a value: an exception raised in a worker would arrive wrapped in its traceback.
            return error

    def _samples(self, epoch: int, index: int) -> list[Sample]:
        """The image, and in training with ``teacher_size`` the teacher's."""
        records = self.data.records
        generator = _generator(self.seed, epoch, index) if self.train else _UNUSED
        if self.train and self.settings.mosaic > 0 and float(torch.rand((), generator=generator)) < self.settings.mosaic:
            chosen = [index, *torch.randint(len(records), (3,), generator=generator).tolist()]
            parts = [records[which] for which in chosen]
            mosaic = make_mosaic([self._image(which) for which in chosen], parts, self.settings, generator)
            return [(*mosaic, records[index].id)]
        if self.train:
            views = make_views(self._image(index), records[index], self.settings, generator)
            return [(*view, records[index].id) for view in views]
        view = make_view(self._image(index), records[index], self.settings, generator, train=False)
        return [(*view, records[index].id)]

    def _image(self, index: int) -> Tensor:
        return self.kept[index] if self.kept else read_pixels(self.data.records[index], self.data.root)


_UNUSED = torch.Generator()
"""Placeholder for plain views, which use no random numbers."""


def read_pixels(record: Record, root: Path) -> Tensor:
    """Decode the image file of a record: [3, H, W] uint8 RGB.

    Args:
        record: the image.
        root: folder of the data set, named in error messages.

    Raises:
        DataError: the file cannot be decoded, or its size differs from the record's.
    """
    advice = f"run `detdistill data inspect {root} --deep` to find all such files"
    try:
        image = read_image(record.path)
    except (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{record.path}: the image cannot be decoded ({reason}); {advice}") from error
    if tuple(image.shape[-2:]) != tuple(record.size_hw):
        (height, width), (real_h, real_w) = record.size_hw, image.shape[-2:]
        raise DataError(f"{record.path}: the image has {real_w}x{real_h} pixels, but {width}x{height} were expected; {advice}")
    return image


def read_image(path: Path) -> Tensor:
    """Decode an image file: [3, H, W] uint8 RGB, with the EXIF orientation applied; 16-bit grey is scaled to 8 bits.

    Raises:
        OSError, ValueError, SyntaxError: the file is broken; PIL raises any of these.
    """
    with Image.open(path) as file:
        if _is_plain(file):
            with contextlib.suppress(RuntimeError):  # PIL says better what is wrong with a broken file
                content = torch.from_numpy(np.fromfile(path, np.uint8))
                return decode_image(content, ImageReadMode.RGB, apply_exif_orientation=True)
        image = ImageOps.exif_transpose(file)
        image = eight_bits(image)
        # A copy, because PIL's own memory is not writable.
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def _is_plain(file: Image.Image) -> bool:
    """True for the JPEG and PNG files that torchvision decodes to the same pixels as PIL, and more quickly."""
    if file.format in ("JPEG", "MPO"):
        return file.mode in ("RGB", "L")
    return file.format == "PNG" and file.mode == "RGB" and "transparency" not in file.info


def collate_views(samples: Sequence[Sequence[Sample]], settings: ViewSettings) -> Batch:
    """Stack views into a batch, and the teacher's views, if there are any, into its ``large``."""
    batch = collate([views[0] for views in samples], settings)
    if any(len(views) == 1 for views in samples):
        return batch
    assert settings.teacher_size is not None
    large = collate([views[1] for views in samples], settings.of_teacher)
    return replace(batch, large=large, enlarged=settings.teacher_size / settings.size)


def collate(samples: Sequence[Sample], settings: ViewSettings) -> Batch:
    """Stack views into a batch; pixels and masks are zero-padded on the right and at the bottom to ``settings.padded_hw``."""
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
    """The targets as slices of common tensors: workers need a file descriptor per tensor, and descriptors are limited."""
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
    scores: Sequence[Tensor | None] = [None] * len(targets)
    if any(target.scores is not None for target in targets):
        scores = torch.split(cast(Tensor, joined_scores(targets)), counts)
    return tuple(Target(*fields) for fields in zip(boxes, labels, crowd, masks, scores, strict=True))
