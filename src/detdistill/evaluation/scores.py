"""The 12 COCO numbers and the AP of each class, by faster-coco-eval."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from detdistill.printing import html_table

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""Names of the 12 COCO metrics, in COCO's order. Values are in 0..1; -1 without ground truth (e.g. APl without large boxes)."""


def points(value: float) -> str:
    """A metric of 0..1 as text in points of 100; ``-`` for a metric that is undefined because there is no ground truth."""
    return "-" if value < 0 else f"{100 * value:.1f}"


@dataclass(frozen=True, repr=False)
class Scores:
    """Scores of a detector on a data set."""

    metrics: dict[str, float]
    """The 12 COCO metrics by name, 0..1; -1 if undefined."""
    per_class: dict[str, float]
    """AP of each class by name; -1 for a class without ground truth."""
    images: int
    seconds: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    """AP50 (0..1) lost to each kind of error (``detection_errors``); empty if not computed, or without ground truth."""

    def points(self, name: str) -> str:
        """A metric, or the AP of a class, as text in points of 100; ``-`` if it is undefined."""
        return points(self.metrics[name] if name in self.metrics else self.per_class[name])

    def __repr__(self) -> str:
        """The first three metrics in points of 100."""
        shown = ", ".join(f"{name} {self.points(name)}" for name in METRICS[:3] if name in self.metrics)
        return f"Scores({shown}; {self.images} images)"

    def _repr_html_(self) -> str:
        """A small table for notebooks, in points of 100."""
        return html_table([*((name, points(value)) for name, value in self.metrics.items()), ("images", str(self.images))])


def coco_scores(ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], classes: Sequence[str]) -> Scores:
    """Score detections in COCO form.

    Args:
        ground_truth: a COCO dict: images, annotations (bbox xywh, area, iscrowd), categories with ids 1..K.
        results: a dict for each detection: image_id, category_id, bbox (xywh), score.
        classes: K names, in the order of the category ids.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    if not results or not ground_truth["annotations"]:
        return _without_detections(ground_truth, classes)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO({**ground_truth, "annotations": [dict(one) for one in ground_truth["annotations"]]})
        evaluation = COCOeval_faster(truth, truth.loadRes([dict(one) for one in results]), "bbox", print_function=lambda *_: None)
        evaluation.params.catIds = list(range(1, len(classes) + 1))
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = {name: float(value) for name, value in zip(METRICS, evaluation.stats, strict=False)}
    precision = evaluation.eval["precision"]  # [IoU thresholds, recalls, K classes, areas, max detections]
    per_class = {}
    for index, name in enumerate(classes):
        values = precision[:, :, index, 0, -1]
        values = values[values > -1]
        per_class[name] = float(values.mean()) if values.size else -1.0
    return Scores(metrics, per_class, len(ground_truth["images"]))


def _without_detections(ground_truth: dict[str, Any], classes: Sequence[str]) -> Scores:
    """Scores for empty results, which the library refuses: 0 where ground truth (without crowds) exists, else -1."""
    wanted = [annotation for annotation in ground_truth["annotations"] if not annotation["iscrowd"]]

    def zero(low: float = 0, high: float = float("inf")) -> float:
        return 0.0 if any(low <= annotation["area"] <= high for annotation in wanted) else -1.0

    of_size = {"s": zero(0, 32**2), "m": zero(32**2, 96**2), "l": zero(96**2)}
    present = {annotation["category_id"] for annotation in wanted}
    per_class = {name: 0.0 if index + 1 in present else -1.0 for index, name in enumerate(classes)}
    metrics = {name: of_size[name[-1]] if name[-1] in of_size else zero() for name in METRICS}
    return Scores(metrics, per_class, len(ground_truth["images"]))
