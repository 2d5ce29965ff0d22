"""Evaluate a detector on a data set; the same code serves teacher, baseline and student, in one or several processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from detdistill.data.loader import DetectionLoader
from detdistill.data.records import DetectionSet
from detdistill.data.transforms import ViewSettings
from detdistill.detectors.contract import Detector
from detdistill.errors import ModelError
from detdistill.evaluation.errors import detection_errors
from detdistill.evaluation.scores import Scores, coco_scores
from detdistill.functional.modes import evaluating
from detdistill.structures import Batch, Detections


@torch.no_grad()
def evaluate(
    detector: Detector,
    data: DetectionSet,
    settings: ViewSettings,
    *,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    workers: int = 0,
    precision: torch.dtype = torch.float32,
    loader: DetectionLoader | None = None,
    progress: Callable[[int, int], None] | None = None,
    errors: bool = False,
) -> Scores:
    """Compute the COCO scores of a detector. With several processes, each evaluates a share, and all return the same scores.

    Args:
        detector: the detector; it is in eval mode during the call.
        data: the data set; boxes are compared in pixels of the original images. Detections of classes for which an image is not
            labelled (``Record.labelled``) do not count.
        settings: image size and resizing; augmentation is off.
        batch_size: number of images per forward pass.
        device: device to run on. None: the detector's device.
        workers: number of processes that load images.
        precision: float32, or bfloat16/float16 for autocast.
        loader: loader of ``data`` to reuse (it can keep the images in memory between evaluations); None: a new one is made.
        progress: called with (images done, total images) of this process.
        errors: also compute the AP50 lost to each kind of error.

    Raises:
        ModelError: the detector lacks classes of the data.
    """
    started = time.monotonic()
    check_classes(detector, data)
    where = torch.device(device) if device is not None else next(detector.parameters()).device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    if loader is None:
        loader = DetectionLoader(data, settings, batch_size, train=False, rank=rank, world=world, workers=workers)
    detector.to(where)
    results = detections(detector, data, loader, where, precision, progress)
    if world > 1:
        gathered: list[list[dict[str, Any]]] = [[] for _ in range(world)]
        dist.all_gather_object(gathered, results)
        results = [result for part in gathered for result in part]
    results = _labelled(results, data)
    truth = data.coco_ground_truth()
    scores = coco_scores(truth, results, data.classes)
    lost = detection_errors(truth, results, data.classes) if errors else {}
    return replace(scores, seconds=time.monotonic() - started, errors=lost)


@torch.no_grad()
def detections(
    detector: Detector,
    data: DetectionSet,
    loader: DetectionLoader,
    where: torch.device,
    precision: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Run a detector on the images of a loader.

    Args:
        detector: the detector, already on its device; it is in eval mode during the call.
        data: the data set of the loader; classes that it lacks are left out.
        loader: the images, without augmentation.
        where: the detector's device.
        precision: float32, or bfloat16/float16 for autocast.
        progress: called with (images done, total images) of this process.

    Returns:
        The detections in COCO's form, in pixels of the original images.
    """
    column = [data.classes.index(name) if name in data.classes else -1 for name in detector.spec.classes]
    results: list[dict[str, Any]] = []
    done, everything = 0, loader.images
    with evaluating(detector):
        for batch in loader:
            moved = batch.to(where)
            with torch.autocast(where.type, dtype=precision, enabled=precision != torch.float32):
                features = detector.features(moved)
                prediction = detector.predict(features, moved)
            for index, found in enumerate(detector.detect(prediction, moved)):
                results += coco_results(found, batch, index, column)
            done += len(batch)
            if progress is not None:
                progress(done, everything)
    return results


def _labelled(results: list[dict[str, Any]], data: DetectionSet) -> list[dict[str, Any]]:
    """The detections of classes for which their images are labelled; of others nobody knows whether they are right."""
    some = {record.id: record.labelled for record in data.records if record.labelled is not None}
    return [one for one in results if one["image_id"] not in some or one["category_id"] - 1 in some[one["image_id"]]]


def check_classes(detector: Detector, data: DetectionSet) -> None:
    """Check that the detector has all classes of the data.

    Raises:
        ModelError: a class is missing; the message shows both lists.
    """
    unknown = [name for name in data.classes if name not in detector.spec.classes]
    if unknown:
        raise ModelError(
            f"{detector.spec.name} does not know {len(unknown)} of the data's {len(data.classes)} classes "
            f"({_few(unknown, 5)} of {_few(data.classes, 10)}); it knows {len(detector.spec.classes)}: "
            f"{_few(detector.spec.classes, 10)}"
        )


def _few(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")


def coco_results(found: Detections, batch: Batch, index: int, column: list[int]) -> list[dict[str, Any]]:
    """Convert the detections of one image to COCO result dicts, in pixels of the original image and clipped to it.

    Args:
        found: detections of the image, in pixels of its view.
        batch: the batch of the image.
        index: index of the image in the batch.
        column: for each class of the detector, its label in the data; -1 if the data lack the class.
    """
    view = batch.views[index]
    boxes = view.to_original(found.boxes_xyxy.detach().float().cpu())
    height, width = view.original_hw
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {"image_id": batch.ids[index], "category_id": column[label] + 1, "bbox": box, "score": score}
        for box, score, label in zip(boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
        if column[label] >= 0
    ]
