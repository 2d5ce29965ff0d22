"""Detect objects in images that belong to no data set: in batches of one size, while further images are decoded and drawn."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detdistill.data.loader import Sample, collate
from detdistill.data.records import Record
from detdistill.data.transforms import ViewSettings, make_view
from detdistill.detectors.contract import Detector
from detdistill.errors import DataError, RunError, counted
from detdistill.evaluation.drawing import draw_boxes
from detdistill.evaluation.image_files import FoundFiles, as_pixels, drawing_names, find_images, relative_name
from detdistill.files import json_by_entry, write_atomically
from detdistill.functional.folding import FoldedNorms
from detdistill.progress import Bar
from detdistill.structures import Detections

In = TypeVar("In")
Out = TypeVar("Out")

WORTH_FOLDING = 8
"""With fewer images, folding the detector's batch norms takes longer than it saves."""


@dataclass(frozen=True)
class NamedDetections(Detections):
    """Detections of one image in pixels of the original image, best first, with the names of the classes."""

    classes: tuple[str, ...] = ()
    """Names of the detector's classes in label order."""

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.classes[label] for label in self.labels.tolist()]

    def above(self, score: float) -> NamedDetections:
        """The detections with at least this score."""
        keep = self.scores >= score
        return NamedDetections(self.boxes_xyxy[keep], self.scores[keep], self.labels[keep], None, self.classes)

    def __repr__(self) -> str:
        """All detections, one a line."""
        rows = zip(self.names, self.scores.tolist(), self.boxes_xyxy.tolist(), strict=True)
        lines = [f"  {name} {score:.2f} at {', '.join(f'{side:.1f}' for side in box)}" for name, score, box in rows]
        return "\n".join([f"{len(self)} detections (x1, y1, x2, y2 in pixels)", *lines])


@dataclass(frozen=True)
class Prepared:
    """An image that is ready for a detector, or the reason why it is not."""

    index: int
    image: Tensor | None = None
    """[3, h, w] uint8, the original."""
    sample: Sample | None = None
    canvas_hw: tuple[int, int] = (0, 0)
    """Padded height and width of the view if it is alone in a batch."""
    error: DataError | None = None


@dataclass(frozen=True)
class Found:
    """Detections of one image, or the reason why there are none."""

    index: int
    image: Tensor | None
    detections: NamedDetections | None
    error: DataError | None = None


@dataclass(frozen=True, repr=False)
class Predicted:
    """Result of ``predict``."""

    folder: Path
    """The folder with the drawn images and ``detections.json``."""
    images: int
    """Number of images that were drawn."""
    boxes: int
    """Number of boxes drawn and written."""
    unreadable: tuple[str, ...] = ()
    """A line for each image that could not be read: path and reason."""
    left_out: str = ""
    """Files that are no images, counted by suffix; empty if there are none."""

    def __repr__(self) -> str:
        """Numbers of images and boxes, and the folder."""
        broken = f", {counted(len(self.unreadable), 'image')} unreadable" if self.unreadable else ""
        return f"Predicted({counted(self.boxes, 'box')} on {counted(self.images, 'image')}{broken}; {self.folder})"


def predict_image(detector: Detector, image: Tensor, settings: ViewSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Detect objects in one image; boxes are in pixels of this image.

    Args:
        detector: the detector, in eval mode.
        image: [3, h, w] uint8 RGB.
        settings: image size and resizing for the detector.

    Returns:
        Boxes [D, 4] xyxy clipped to the image, scores [D], labels [D].
    """
    found = detect_batch(detector, [_prepared((0, image), settings)], settings)[0].detections
    assert found is not None
    return found.boxes_xyxy, found.scores, found.labels


@torch.no_grad()
def detect_batch(
    detector: Detector, group: Sequence[Prepared], settings: ViewSettings, folded: FoldedNorms | None = None
) -> list[Found]:
    """Detect objects in prepared images of one padded size, in one forward pass; ``folded``: with folded norms."""
    batch = collate([one.sample for one in group if one.sample is not None], settings)
    moved = batch.to(next((parameter.device for parameter in detector.parameters()), torch.device("cpu")))
    with nullcontext(moved) if folded is None else folded.running(moved) as fast:
        results = detector.detect(detector.predict(detector.features(fast), fast), fast)
    found = []
    for one, view, result in zip(group, batch.views, results, strict=True):
        boxes = view.to_original(result.boxes_xyxy.float().cpu())
        height, width = view.original_hw
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
        named = NamedDetections(boxes, result.scores.float().cpu(), result.labels.cpu(), None, detector.spec.classes)
        found.append(Found(one.index, one.image, named))
    return found


def predict_images(
    detector: Detector, images: Sequence[Any], settings: ViewSettings, *, batch: int, pool: ThreadPoolExecutor
) -> Iterator[Found]:
    """Detect objects in images, in batches of one padded size, so that no image is padded because of another.

    Args:
        detector: the detector, in eval mode.
        images: paths, or images in memory (see ``as_pixels``).
        settings: image size and resizing for the detector.
        batch: largest number of images of a forward pass.
        pool: threads that decode and resize the images.

    Yields:
        The detections of each image, in the order in which batches are full; an image that cannot be decoded has an error.
    """
    folded = FoldedNorms(detector) if len(images) >= WORTH_FOLDING else None
    waiting: dict[tuple[int, int], list[Prepared]] = {}
    for one in _ahead(pool, partial(_prepared, settings=settings), enumerate(images), 2 * batch):
        if one.error is not None:
            yield Found(one.index, None, None, one.error)
            continue
        waiting.setdefault(one.canvas_hw, []).append(one)
        fullest = max(waiting.values(), key=len)
        # Without this limit, a folder of many sizes would be held in memory.
        if len(fullest) == batch or sum(map(len, waiting.values())) >= 4 * batch:
            yield from detect_batch(detector, waiting.pop(fullest[0].canvas_hw), settings, folded)
    for group in waiting.values():
        yield from detect_batch(detector, group, settings, folded)


def detect_all(detector: Detector, images: Sequence[Any], settings: ViewSettings, *, batch: int) -> list[NamedDetections]:
    """The detections of each image, in order.

    Args:
        detector: the detector, in eval mode.
        images: paths, or images in memory (see ``as_pixels``).
        settings: image size and resizing for the detector.
        batch: largest number of images of a forward pass.

    Raises:
        DataError: an image cannot be read; the first one is named.
    """
    found: dict[int, NamedDetections] = {}
    with ThreadPoolExecutor(min(default_threads(), max(1, len(images)))) as pool:
        for one in predict_images(detector, images, settings, batch=batch, pool=pool):
            if one.detections is None:
                pool.shutdown(wait=False, cancel_futures=True)
                assert one.error is not None
                raise one.error
            found[one.index] = one.detections
    return [found[index] for index in range(len(images))]


def predict_folder(
    detector: Detector,
    images: Path,
    out: Path,
    settings: ViewSettings,
    *,
    score: float,
    bar: Bar,
    batch: int = 8,
    threads: int = 2,
) -> Predicted:
    """Draw the detected boxes of every image into the folder ``out`` and write ``detections.json``.

    ``detections.json`` is a COCO document that pycocotools opens: ``images`` lists every image that was read (id, file_name
    relative to ``images``, width, height), ``categories`` the detector's classes (label + 1 is the id), and ``annotations`` every
    box (image_id, file_name, category_id, category, score, and bbox as x, y, width, height in pixels of the image).
    ``annotations`` alone is what ``loadRes`` takes. ``unreadable`` lists the images that could not be read. A drawing has the
    name and the sub-folder of its image.

    Args:
        detector: the detector, in eval mode.
        images: an image or a folder.
        out: folder for the drawings.
        settings: image size and resizing for the detector.
        score: boxes with a lower score are left out.
        bar: progress bar.
        batch: largest number of images of a forward pass.
        threads: number of threads that decode and draw images.

    Raises:
        DataError: ``images`` does not exist, holds no image, or no image of it can be decoded.
        RunError: ``out`` cannot be written.
    """
    files = find_images(images, out)
    bar.resize(len(files.paths))
    drawings = drawing_names(files.paths, images)
    kept: dict[int, tuple[tuple[int, int], NamedDetections]] = {}
    errors: dict[int, DataError] = {}
    try:
        with ThreadPoolExecutor(threads) as decoders, ThreadPoolExecutor(threads) as drawers:
            pending: deque[Future[None]] = deque()
            try:
                for found in predict_images(detector, files.paths, settings, batch=batch, pool=decoders):
                    if found.image is None or found.detections is None:
                        assert found.error is not None
                        errors[found.index] = found.error
                        if len(errors) == len(files.paths):
                            raise _nothing_readable(images, list(errors.values()))
                    else:
                        chosen = found.detections.above(score)
                        kept[found.index] = ((found.image.shape[-2], found.image.shape[-1]), chosen)
                        pending.append(drawers.submit(_draw, found.image, chosen, out / drawings[found.index]))
                    while len(pending) > 2 * batch:
                        pending.popleft().result()
                    bar.update(len(kept) + len(errors), files.paths[found.index].name)
                while pending:
                    pending.popleft().result()
            except BaseException:
                decoders.shutdown(wait=False, cancel_futures=True)
                drawers.shutdown(wait=False, cancel_futures=True)
                raise
        document = _document(detector, files, images, kept, errors, score)
        write_atomically(out / "detections.json", lambda path: path.write_text(json_by_entry(document)))
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror or error}; make space or give another --out") from error
    broken = tuple(str(errors[index]) for index in sorted(errors))
    return Predicted(out, len(kept), sum(len(found) for _, found in kept.values()), broken, str(files))


def _prepared(numbered: tuple[int, Any], settings: ViewSettings) -> Prepared:
    """Decode an image and make its view."""
    index, source = numbered
    try:
        image = as_pixels(source)
    except DataError as error:
        return Prepared(index, error=error)
    height, width = image.shape[-2:]
    nothing = np.zeros((0,))
    record = Record(
        index, Path("image"), (height, width), np.zeros((0, 4)), nothing.astype(np.int64), nothing.astype(bool), nothing, None
    )
    pixels, target, view = make_view(image, record, settings, torch.Generator(), train=False)
    return Prepared(index, image, (pixels, target, view, index), settings.padded_hw([view.size_hw]))


def _ahead(pool: ThreadPoolExecutor, act: Callable[[In], Out], items: Iterable[In], count: int) -> Iterator[Out]:
    """The results of ``act`` for all items in order; up to ``count`` of them are computed before they are asked for."""
    running: deque[Future[Out]] = deque()
    for item in items:
        running.append(pool.submit(act, item))
        if len(running) > count:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _draw(image: Tensor, found: NamedDetections, target: Path) -> None:
    """Draw boxes on an image and write it as JPEG."""
    drawn = Image.fromarray(image.permute(1, 2, 0).numpy())
    texts = [f"{name} {score:.2f}" for name, score in zip(found.names, found.scores.tolist(), strict=True)]
    side = min(drawn.size)
    order = found.scores.argsort(descending=True, stable=True)
    draw_boxes(
        drawn,
        found.boxes_xyxy[order].numpy(),
        found.labels[order].tolist(),
        [texts[index] for index in order.tolist()],
        font_px=min(28, max(11, side // 40)),
        line_px=min(6, max(2, side // 250)),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, lambda path: drawn.save(path, format="JPEG", quality=92))


def _document(
    detector: Detector,
    files: FoundFiles,
    images: Path,
    kept: dict[int, tuple[tuple[int, int], NamedDetections]],
    errors: dict[int, DataError],
    score: float,
) -> dict[str, Any]:
    """Content of ``detections.json``, in the order of the files."""
    names = [relative_name(path, images).as_posix() for path in files.paths]
    shown: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in sorted(kept):
        (height, width), found = kept[index]
        shown.append({"id": index + 1, "file_name": names[index], "width": width, "height": height})
        rows = zip(found.names, found.labels.tolist(), found.scores.tolist(), found.boxes_xyxy.tolist(), strict=True)
        for name, label, value, (x1, y1, x2, y2) in rows:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "file_name": names[index],
                    "category_id": label + 1,
                    "category": name,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": value,
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"description": f"detections of {detector.spec.name} with a score of at least {score:g}", "folder": str(images)},
        "images": shown,
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(detector.spec.classes)],
        "annotations": annotations,
        "unreadable": [{"file_name": names[index], "reason": str(errors[index])} for index in sorted(errors)],
    }


def _nothing_readable(images: Path, errors: Sequence[DataError]) -> DataError:
    if len(errors) == 1:
        return errors[0]
    return DataError(f"{images}: none of its {len(errors)} images can be read; the first: {errors[0]}")


def default_batch(detector: Detector) -> int:
    """Images of a forward pass: 8 on a GPU; 1 on a CPU, where batches of 8 took 1.1 times the processor time of single images."""
    return 8 if any(parameter.is_cuda for parameter in detector.parameters()) else 1


def default_threads() -> int:
    """Number of threads that decode and draw images: the processors this process may use, at most 8."""
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
