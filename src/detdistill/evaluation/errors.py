"""What AP50 is lost to: the six kinds of detection errors of TIDE, each priced by an oracle that repairs it alone.

Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020, section 2. A detection is a hit
from IoU 0.5 on (foreground), and touches nothing up to IoU 0.1 (background). Every false positive has exactly one kind, the
first that fits:

- ``Loc``, localization: the right class, on an object of it with IoU 0.1 .. 0.5.
- ``Cls``, classification: the wrong class, on an object with IoU 0.5 or more.
- ``Dupe``, duplicate: right class and place, but another detection of a higher score has the object.
- ``Bkg``, background: IoU 0.1 or less with every object.
- ``Both``: the wrong class, with IoU 0.1 .. 0.5.

An object that was neither found nor could be by repairing a ``Cls`` or ``Loc`` is a ``Miss``. The paper leaves open what
comes first where two kinds fit; this is the order of its released code.

Oracles: ``Cls`` and ``Loc`` become hits of their object, unless it is found or a better one of the repaired has it, which
suppresses them. ``Both``, ``Dupe``, ``Bkg`` are suppressed. ``Miss`` takes the missed objects out of the count. Beside them
``FalsePos`` suppresses every false positive, and ``FalseNeg`` counts the found objects only. These do not add up to 1 - AP50:
one repair changes the worth of another.

Matching, crowds (a false positive half inside a crowd of its class counts for nothing), the limit of 100 detections of a class
in an image, and AP by 101 points of recall are pycocotools', so that the analysis starts from the AP50 of ``coco_scores``.
Two more departures from the released code: detections ignored at a crowd are never repaired, and one kind's repair is not
suppressed for the sake of a kind that is not being repaired.

D detections, G objects, P pairs of the two in one image, K classes. Boxes are xywh in pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
"""In the paper's order. False positives have the first five, objects the last."""
ERRORS = (*KINDS, "FalsePos", "FalseNeg")
"""All that is priced."""

FOREGROUND, BACKGROUND = 0.5, 0.1
MOST_DETECTIONS = 100
"""Of one class in one image: COCO's limit."""
PAIRS_AT_ONCE = 1_000_000
RECALLS = np.linspace(0, 1, 101)
NO_ERROR = -1

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def detection_errors(ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], classes: Sequence[str]) -> dict[str, float]:
    """AP50 that each kind of error costs.

    Args:
        ground_truth: a COCO dict: images, annotations (bbox xywh, iscrowd), categories with ids 1..K.
        results: one dict for each detection: image_id, category_id, bbox (xywh), score.
        classes: K names, in the order of the category ids.

    Returns:
        By the names of ``ERRORS``, AP50 in 0..1 that would be gained without that kind. Empty without ground truth.
    """
    found = sort_errors(ground_truth, results, classes)
    if not len(found.object_labels):
        return {}
    now = found.ap50()
    return {name: found.ap50([name]) - now for name in ERRORS}


@dataclass(frozen=True)
class SortedErrors:
    """Detections and objects of a data set with their kinds of errors. Without crowds, and what was ignored at them."""

    labels: Ints
    """[D] 0..K-1, in order of falling score."""
    hit: Bools
    """[D] true positives."""
    kind: Ints
    """[D] index in ``KINDS``, ``NO_ERROR`` for hits."""
    target: Ints
    """[D] the object that a ``Cls`` or ``Loc`` belongs to; else -1."""
    object_labels: Ints
    """[G]"""
    found: Bools
    """[G] by a hit."""
    missed: Bools
    """[G] neither found nor the target of a ``Cls`` or ``Loc``."""
    num_classes: int

    def ap50(self, fixed: Collection[str] = ()) -> float:
        """AP50 after some errors are repaired.

        Args:
            fixed: of ``ERRORS``; several at once are repaired together.

        Returns:
            Mean over the classes that have ground truth, 0..1; -1 when none has. A class that a repair leaves without
            objects has 1 when it has no detections either, else 0.
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
        order = np.argsort(labels.astype(np.uint16), kind="stable")  # by class; scores go on falling within each
        ends = np.cumsum(self._count(labels))
        hits_by_class = np.split(hit[order], ends[:-1])
        return float(np.mean([average_precision(hits_by_class[label], int(num_wanted[label])) for label in present]))

    def _count(self, labels: Ints) -> Ints:
        return np.bincount(labels, minlength=self.num_classes)


def average_precision(hit: Bools, num_objects: int) -> float:
    """AP of one class at one threshold, by pycocotools' 101 points of recall.

    Args:
        hit: [D] whether each detection is a true positive, in order of falling score.
        num_objects: how many there are to find.
    """
    if num_objects == 0:
        return float(len(hit) == 0)
    places = np.flatnonzero(hit)
    so_far = np.arange(1, len(places) + 1)
    precision = np.append(np.maximum.accumulate((so_far / (places + 1))[::-1])[::-1], 0.0)
    return float(precision[np.searchsorted(so_far / num_objects, RECALLS)].mean())


def sort_errors(ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], classes: Sequence[str]) -> SortedErrors:
    """Match detections to objects as COCO does at IoU 0.5, and give each false positive its kind. Arguments as above."""
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
    """[N] place among the sorted images."""
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
    """Places of the first ``most`` of each class in each image, in their order."""
    groups = np.lexsort((boxes.label, boxes.image))  # stable
    image, label = boxes.image[groups], boxes.label[groups]
    new = np.append(True, (image[1:] != image[:-1]) | (label[1:] != label[:-1]))[: len(groups)]
    starts = np.flatnonzero(new)
    rank = np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups))))
    return np.sort(groups[rank < most])


def _overlapping(detections: _Boxes, objects: _Boxes, crowd: Bools, num_images: int) -> Iterator[tuple[Ints, Ints, Floats]]:
    """Pairs of a detection and an object of its image that touch; the IoU, with a crowd the share of the detection inside.

    Args:
        detections: [D] in any order.
        objects: [G] by image.
        crowd: [G]
        num_images: of the data set.

    Yields:
        indices of detections and objects, and IoU, each [P]: part by part, to bound memory.
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
    """Highest IoU of each detection and the object it is with: 0 and -1 without; pairs come best first."""
    highest, which = np.zeros(num_detections), np.full(num_detections, -1)
    detections, index = np.unique(first, return_index=True)
    highest[detections], which[detections] = iou[index], second[index]
    return highest, which
