"""Loss of AP50 by kind of detection error (TIDE): for each kind, the AP50 gained if an oracle corrects only this kind.

Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020, section 2. The foreground
threshold is IoU 0.5, the background threshold IoU 0.1. Every false positive has exactly one kind, the first that fits:

- ``Loc``, localization: the right class, IoU 0.1 .. 0.5 with an object of this class.
- ``Cls``, classification: the wrong class, IoU 0.5 or more with an object.
- ``Dupe``, duplicate: right class and place, but the object is matched to a detection with a higher score.
- ``Bkg``, background: IoU 0.1 or less with every object.
- ``Both``: the wrong class, IoU 0.1 .. 0.5.

An object is a ``Miss`` if it was not found and correcting a ``Cls`` or ``Loc`` would not find it either. The paper gives no
order for false positives that fit two kinds; the order here is that of its released code.

Oracles: a ``Cls`` or ``Loc`` becomes a hit of its object. It is suppressed if the object is already found, or if another
corrected detection of the object has a higher score. ``Both``, ``Dupe`` and ``Bkg`` are suppressed. ``Miss`` removes the missed
objects from the ground truth. In addition, ``FalsePos`` suppresses every false positive, and ``FalseNeg`` removes all objects
that are not found. The values do not add up to 1 - AP50, because each correction changes the effect of the others.

Matching, crowds (a false positive at least half inside a crowd of its class is ignored), the limit of 100 detections per class
and image, and AP from 101 recall points follow pycocotools, so the analysis starts from the AP50 of ``coco_scores``. There are
two more differences from the released code: detections ignored because of a crowd are never corrected, and a corrected
detection is suppressed only by detections of the kinds that are being corrected.

Shape letters: D detections, G objects, P pairs of a detection and an object in the same image, K classes. Boxes are xywh in
pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
"""Kinds of errors in the paper's order: the first five of false positives, the last of objects."""
ERRORS = (*KINDS, "FalsePos", "FalseNeg")
"""Names of all values that ``detection_errors`` returns."""

FOREGROUND, BACKGROUND = 0.5, 0.1
MOST_DETECTIONS = 100
"""COCO's limit on the detections per class and image."""
PAIRS_AT_ONCE = 1_000_000
RECALLS = np.linspace(0, 1, 101)
NO_ERROR = -1

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def detection_errors(ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], classes: Sequence[str]) -> dict[str, float]:
    """Compute the AP50 lost to each kind of error.

    Args:
        ground_truth: a COCO dict: images, annotations (bbox xywh, iscrowd), categories with ids 1..K.
        results: a dict for each detection: image_id, category_id, bbox (xywh), score.
        classes: K names, in the order of the category ids.

    Returns:
        For each name of ``ERRORS``, the AP50 (0..1) that would be gained without this kind of error. Empty without ground
        truth.
    """
    found = sort_errors(ground_truth, results, classes)
    if not len(found.object_labels):
        return {}
    now = found.ap50()
    return {name: found.ap50([name]) - now for name in ERRORS}


@dataclass(frozen=True)
class SortedErrors:
    """Detections and objects of a data set with their kinds of errors, without crowds and the detections ignored there."""

    labels: Ints
    """[D] 0..K-1, in order of falling score."""
    hit: Bools
    """[D] true positives."""
    kind: Ints
    """[D] index in ``KINDS``; ``NO_ERROR`` for hits."""
    target: Ints
    """[D] index of the object to which a ``Cls`` or ``Loc`` belongs; -1 for all others."""
    object_labels: Ints
    """[G] 0..K-1."""
    found: Bools
    """[G] True if a hit is matched to the object."""
    missed: Bools
    """[G] True if the object is neither found nor the target of a ``Cls`` or ``Loc``."""
    num_classes: int

    def ap50(self, fixed: Collection[str] = ()) -> float:
        """Compute AP50 after correcting some kinds of errors.

        Args:
            fixed: names from ``ERRORS``, all corrected at once.

        Returns:
            Mean over the classes with ground truth, 0..1; -1 if no class has any. If the correction leaves a class without
            objects, its AP is 1 without detections, else 0.
        """
        keep, hit, labels = np.ones_like(self.hit), self.hit.copy(), self.labels.copy()
        repaired = np.isin(self.kind, [KINDS.index(name) for name in fixed if name in KINDS])
        keep[repaired] = False
        free = np.flatnonzero(repaired & (self.target >= 0))
        free = free[~self.found[self.target[free]]]
        better = free[np.unique(self.target[free], return_index=True)[1]]  # the first, that is the highest score, of each object
        keep[better] = hit[better] = True
        labels[better] = self.object_labels[self.target[better]]
        if "FalsePos" in fixed:
            keep &= hit
        wanted = np.ones_like(self.found)
        if "Miss" in fixed:
            wanted &= ~self.missed
        if "FalseNeg" in fixed:
            wanted = np.zeros_like(wanted)
            wanted[self.found] = True
            wanted[self.target[better]] = True
        present = np.flatnonzero(self._count(self.object_labels))
        if not len(present):
            return -1.0
        labels, hit, num_wanted = labels[keep], hit[keep], self._count(self.object_labels[wanted])
        order = np.argsort(labels.astype(np.uint16), kind="stable")  # by class; within a class, scores stay in falling order
        ends = np.cumsum(self._count(labels))
        hits_by_class = np.split(hit[order], ends[:-1])
        return float(np.mean([average_precision(hits_by_class[label], int(num_wanted[label])) for label in present]))

    def _count(self, labels: Ints) -> Ints:
        return np.bincount(labels, minlength=self.num_classes)


def average_precision(hit: Bools, num_objects: int) -> float:
    """AP of one class at one threshold, by pycocotools' 101 points of recall.

    Args:
        hit: [D] whether each detection is a true positive, in order of falling score.
        num_objects: number of ground-truth objects of the class.
    """
    if num_objects == 0:
        return float(len(hit) == 0)
    places = np.flatnonzero(hit)
    so_far = np.arange(1, len(places) + 1)
    precision = np.append(np.maximum.accumulate((so_far / (places + 1))[::-1])[::-1], 0.0)
    return float(precision[np.searchsorted(so_far / num_objects, RECALLS)].mean())


def sort_errors(ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], classes: Sequence[str]) -> SortedErrors:
    """Match detections to objects as COCO does at IoU 0.5, and determine the kind of each false positive.

    The arguments are those of ``detection_errors``.
    """
    place = {image: index for index, image in enumerate(sorted(image["id"] for image in ground_truth["images"]))}
    objects = _Boxes.of(ground_truth["annotations"], place)
    crowd = np.array([bool(one["iscrowd"]) for one in ground_truth["annotations"]], dtype=bool)
    by_image = np.argsort(objects.image, kind="stable")
    objects, crowd = objects[by_image], crowd[by_image]
    detections = _Boxes.of(results, place)
    scores = np.array([one["score"] for one in results], dtype=np.float64)
    order = np.lexsort((detections.image, -scores))  # equal scores: by image, then as given
    detections = detections[order[_at_most(detections[order], MOST_DETECTIONS)]]
    num_detections, num_objects = len(detections.label), len(objects.label)

    parts = [[np.empty(0, np.int64)] * 2 + [np.empty(0)], *map(list, _overlapping(detections, objects, crowd, len(place)))]
    first, second, iou = (np.concatenate(part) for part in zip(*parts, strict=True))
    at_crowd = crowd[second]
    same = detections.label[first] == objects.label[second]
    in_crowd = np.zeros(num_detections, bool)
    in_crowd[first[at_crowd & same & (iou >= FOREGROUND)]] = True
    first, second, iou, same = first[~at_crowd], second[~at_crowd], iou[~at_crowd], same[~at_crowd]
    best_first = np.lexsort((-second, -iou, first))  # equal IoU: the later object, as pycocotools
    first, second, iou, same = first[best_first], second[best_first], iou[best_first], same[best_first]

    hit, found = np.zeros(num_detections, bool), np.zeros(num_objects, bool)
    candidates = same & (iou >= FOREGROUND)
    for detection, thing in zip(first[candidates].tolist(), second[candidates].tolist(), strict=True):
        if not hit[detection] and not found[thing]:
            hit[detection] = found[thing] = True

    own, own_target = _best(first[same], second[same], iou[same], num_detections)
    other, other_target = _best(first[~same], second[~same], iou[~same], num_detections)
    conditions = {
        "Loc": (own >= BACKGROUND) & (own < FOREGROUND),
        "Cls": other >= FOREGROUND,
        "Dupe": own >= FOREGROUND,
        "Bkg": np.maximum(own, other) <= BACKGROUND,
    }
    kind = np.select(list(conditions.values()), [KINDS.index(name) for name in conditions], KINDS.index("Both"))
    kind[hit] = NO_ERROR
    target = np.select([kind == KINDS.index("Loc"), kind == KINDS.index("Cls")], [own_target, other_target], -1)
    counted = hit | ~in_crowd
    missed = ~found
    missed[target[counted & (target >= 0)]] = False
    # Renumber the objects without the crowds, to which no target points.
    number = np.cumsum(~crowd) - 1
    target = np.where(target >= 0, number[target] if num_objects else -1, -1)
    return SortedErrors(
        detections.label[counted], hit[counted], kind[counted], target[counted],
        objects.label[~crowd], found[~crowd], missed[~crowd], len(classes),
    )  # fmt: skip


@dataclass(frozen=True)
class _Boxes:
    image: Ints
    """[N] index of the image, in the order of the image ids."""
    label: Ints
    """[N]"""
    xywh: Floats
    """[N, 4]"""

    @classmethod
    def of(cls, ones: Sequence[dict[str, Any]], place: dict[int, int]) -> _Boxes:
        return cls(
            np.array([place[one["image_id"]] for one in ones], dtype=np.int64),
            np.array([one["category_id"] for one in ones], dtype=np.int64) - 1,
            np.array([one["bbox"] for one in ones], dtype=np.float64).reshape(-1, 4),
        )

    def __getitem__(self, index: NDArray[Any]) -> _Boxes:
        return _Boxes(self.image[index], self.label[index], self.xywh[index])


def _at_most(boxes: _Boxes, most: int) -> Ints:
    """Indices of the first ``most`` boxes of each class in each image, in the order of ``boxes``."""
    groups = np.lexsort((boxes.label, boxes.image))  # stable
    image, label = boxes.image[groups], boxes.label[groups]
    new = np.append(True, (image[1:] != image[:-1]) | (label[1:] != label[:-1]))[: len(groups)]
    starts = np.flatnonzero(new)
    rank = np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups))))
    return np.sort(groups[rank < most])


def _overlapping(detections: _Boxes, objects: _Boxes, crowd: Bools, num_images: int) -> Iterator[tuple[Ints, Ints, Floats]]:
    """Find the pairs of a detection and an object of its image that overlap, and their IoU.

    For a crowd object, the value is the share of the detection's area inside the crowd.

    Args:
        detections: [D] in any order.
        objects: [G] sorted by image.
        crowd: [G] True for crowd objects.
        num_images: number of images of the data set.

    Yields:
        Indices of detections, indices of objects, and IoU, each [P]; in several parts, to bound memory.
    """
    per_image = np.bincount(objects.image, minlength=num_images)
    start = np.cumsum(per_image) - per_image
    partners = per_image[detections.image]
    total = np.cumsum(partners)
    low = 0
    while low < len(total):
        before = total[low] - partners[low]
        high = max(low + 1, int(np.searchsorted(total, before + PAIRS_AT_ONCE, side="right")))
        count = partners[low:high]
        first = np.repeat(np.arange(low, high), count)
        within = np.arange(len(first)) - np.repeat(np.cumsum(count) - count, count)
        second = start[detections.image[first]] + within
        # Column by column: rows of four numbers would be read four times.
        x1, y1, w1, h1 = (detections.xywh[:, column][first] for column in range(4))
        x2, y2, w2, h2 = (objects.xywh[:, column][second] for column in range(4))
        width = np.minimum(x1 + w1, x2 + w2) - np.maximum(x1, x2)
        height = np.minimum(y1 + h1, y2 + h2) - np.maximum(y1, y2)
        touch = (width > 0) & (height > 0)
        first, second, shared = first[touch], second[touch], (width * height)[touch]
        area = (w1 * h1)[touch]
        yield first, second, shared / np.where(crowd[second], area, area + (w2 * h2)[touch] - shared)
        low = high


def _best(first: Ints, second: Ints, iou: Floats, num_detections: int) -> tuple[Floats, Ints]:
    """Highest IoU of each detection, and its object; 0 and -1 without a pair. Each detection's pairs must be best first."""
    highest, which = np.zeros(num_detections), np.full(num_detections, -1)
    detections, index = np.unique(first, return_index=True)
    highest[detections], which[detections] = iou[index], second[index]
    return highest, which
