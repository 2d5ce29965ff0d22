"""Checks of the teacher: its weights, its AP on the run's images, and whether its classes are in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from detdistill.data.loader import DetectionLoader
from detdistill.data.records import DetectionSet
from detdistill.data.transforms import ViewSettings
from detdistill.doctor.case import Case
from detdistill.doctor.findings import Finding, Table, fine, some
from detdistill.evaluation.run import detections
from detdistill.evaluation.scores import Scores, coco_scores, points
from detdistill.training.teacher_scores import NEAR_ZERO_AP

LOWER_AP = 0.8
"""Part of the AP at its own size below which the teacher is said to suffer from the run's size."""
LOW_AP = 0.15
SAME_OBJECT_IOU = 0.5
LEAST_MATCHES = 20
"""Boxes that the teacher must find before its classes can be judged."""


def weights(case: Case) -> Iterator[Finding]:
    """Weights that are not finite, and a teacher that was built but never loaded."""
    if case.teacher is None:
        return
    detector = case.teacher.detector
    tensors = {**dict(detector.named_parameters()), **dict(detector.named_buffers())}
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    if bad:
        what = f"{len(bad)} of its {len(tensors)} tensors hold NaN or infinity: {some(bad, 3)}"
        yield Finding("stop", "teacher", what, case.teacher.spec.name, "load an earlier checkpoint, or train the teacher again")
    if never_trained(detector):
        what = "none of its batch norms has ever seen an image: it was built, but its weights were never loaded"
        todo = "give a run folder, a checkpoint, or a model string with weights=..."
        yield Finding("stop", "teacher", what, case.teacher.spec.name, todo)
    elif not bad:
        yield fine("teacher", f"all weights of {case.teacher.spec.name} are finite")


def never_trained(detector: nn.Module) -> bool:
    """Whether a detector has batch norms, and all of them have the statistics they are built with."""
    norms = [module for module in detector.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    return bool(norms) and all(
        not bool(norm.running_mean.any()) and bool((norm.running_var == 1).all())  # type: ignore[union-attr]
        for norm in norms
    )


def scores(case: Case) -> Iterator[Finding]:
    """AP of the teacher on validation images, as the run shows them and as its own training did; order of its classes."""
    teacher = case.teacher
    if teacher is None or any(name not in teacher.spec.classes for name in case.splits.val.classes):
        return
    val = case.splits.val.take(case.images, seed=case.settings.seed)
    found, results = _scored(case, val, case.views, "score the teacher")
    ap = found.metrics["AP"]
    shown = f"AP {points(ap)}, AP50 {points(found.metrics['AP50'])} on {found.images} of {len(case.splits.val)} validation images"
    case.numbers["teacher"] = {"AP": ap, "AP50": found.metrics["AP50"], "images": found.images, "size": case.views.size}
    if ap < 0:
        return
    mixed = class_order(val, results)
    if mixed:
        yield Finding("stop", "teacher", f"{shown}; its boxes lie on objects, but its classes are mixed up: {mixed}", "",
                      "give the classes in the order in which the teacher was trained")  # fmt: skip
    elif ap < NEAR_ZERO_AP:
        yield Finding("stop", "teacher", f"{shown}: it knows next to nothing of these images", teacher.spec.name,
                      "check its weights, its classes and --size; `detdistill eval` scores it on all images")  # fmt: skip
    elif ap < LOW_AP:
        yield Finding("warning", "teacher", f"{shown}: there may be little to learn from it", "", "train a better teacher first")
    else:
        yield fine("teacher", shown)
    yield from _at_its_own_size(case, val, ap)


def _at_its_own_size(case: Case, val: DetectionSet, ap: float) -> Iterator[Finding]:
    """Compare with the AP at the image size of the teacher's training, if that is known and another one."""
    own = replace(case.views, **case.known)
    if (own.size, own.resize, own.max_size) == (case.views.size, case.views.resize, case.views.max_size):
        return
    there = _scored(case, val, own, "score the teacher at its own size")[0].metrics["AP"]
    case.numbers["teacher"] |= {"own_size": own.size, "AP_at_own_size": there}
    sizes = [f"{views.size} ({views.resize})" for views in (case.views, own)]
    text = f"AP {points(ap)} at the run's size {sizes[0]}, {points(there)} at its own {sizes[1]}"
    if ap < LOWER_AP * there:
        todo = f"train with --size {own.size} --resize {own.resize}, or take a teacher of the run's size"
        yield Finding("warning", "teacher", f"{text}: it suffers from images of this size", "", todo)
    else:
        yield fine("teacher", text)


def _scored(case: Case, val: DetectionSet, views: ViewSettings, title: str) -> tuple[Scores, list[dict[str, Any]]]:
    assert case.teacher is not None
    detector = case.teacher.to(case.device).detector
    loader = DetectionLoader(val, views, min(case.settings.batch, 8), train=False)
    bar = case.progress.bar(title, len(val))
    results = detections(detector, val, loader, torch.device(case.device), progress=bar.follow)
    return coco_scores(val.coco_ground_truth(), results, val.classes), results


def class_order(val: DetectionSet, results: Sequence[dict[str, Any]]) -> str:
    """The names that the teacher gives to objects, if the order of its classes is not that of the data; else empty.

    Args:
        val: images with K classes.
        results: detections in COCO's form, in pixels of the original images.

    For each object the best detection with an IoU of 0.5 or more counts. The order is called wrong if an exchange of names makes
    60 % or more of these detections right, and fewer than half as many are right as they stand.
    """
    counts = _confusion(val, results)
    total, present = int(counts.sum()), int((counts.sum(axis=1) > 0).sum())
    if total < max(LEAST_MATCHES, 3 * present) or len(counts) < 2:
        return ""
    rows, columns = linear_sum_assignment(counts, maximize=True)
    best, right = int(counts[rows, columns].sum()), int(np.trace(counts))
    if best < 0.6 * total or right >= 0.5 * best:
        return ""
    pairs = [(val.classes[row], val.classes[column]) for row, column in zip(rows, columns, strict=True)
             if row != column and counts[row, column]]  # fmt: skip
    said = some((f"it calls '{mine}' '{theirs}'" for mine, theirs in pairs), 3)
    return f"{said}; {right} of {total} found objects have the right name, {best} would have after an exchange"


def _confusion(val: DetectionSet, results: Sequence[dict[str, Any]]) -> np.ndarray:
    """[K, K] number of objects of each class (row) whose best detection has each class (column)."""
    counts = np.zeros((len(val.classes), len(val.classes)), dtype=int)
    by_image: dict[int, list[dict[str, Any]]] = {}
    for one in results:
        by_image.setdefault(one["image_id"], []).append(one)
    for record in val.records:
        mine = sorted(by_image.get(record.id, []), key=lambda one: -one["score"])[:100]
        if not mine:
            continue
        boxes = np.array([one["bbox"] for one in mine], dtype=float)
        boxes[:, 2:] += boxes[:, :2]
        for box, label in zip(record.boxes_xyxy[~record.crowd], record.labels[~record.crowd], strict=True):
            low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
            shared = (high - low).clip(min=0).prod(axis=1)
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
            hit = np.flatnonzero(shared / np.maximum(areas - shared, 1e-9) >= SAME_OBJECT_IOU)
            if len(hit):
                counts[label, mine[hit[0]]["category_id"] - 1] += 1
    return counts


def output(case: Case) -> Iterator[Finding]:
    """Whether what the teacher gives for a batch is finite."""
    if case.teacher is None:
        return
    seen = case.teacher.to(case.device).observe(case.batches[0])
    case.teacher.forget()
    bad = [
        stride
        for stride, level in zip(seen.features.strides, seen.features.maps, strict=True)
        if not bool(torch.isfinite(level).all())
    ]
    if bad:
        yield Finding("stop", "teacher", f"its feature maps of stride {some(bad)} are NaN or infinite on training images",
                      case.teacher.spec.name, "check its weights, and that --precision is 32")  # fmt: skip
    spread = [float(level.float().std()) for level in seen.features.maps]
    case.tables.append(
        Table("teacher's maps", ("stride", "size", "standard deviation"),
              tuple((str(stride), "x".join(map(str, level.shape[2:])), f"{value:.3g}")
                    for stride, level, value in zip(seen.features.strides, seen.features.maps, spread, strict=True)))
    )  # fmt: skip
