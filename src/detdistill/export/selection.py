"""From a file's boxes and scores to final detections, by the rule of the detector it was made of.

Shape letters: P predictions of an image (N queries of one with queries), K classes, D detections.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from detdistill.detectors.contract import Detector
from detdistill.detectors.dense.shared.heads import DenseDetector, OwnDenseDetector
from detdistill.detectors.single_shot.shared.detector import SingleShotDetector
from detdistill.detectors.torchvision.detector import TorchvisionDetector
from detdistill.detectors.yolo.shared import detector as yolo
from detdistill.detectors.yolo.shared.libreyolo_detector import LibreNetwork
from detdistill.structures import Detections


@dataclass(frozen=True)
class Rule:
    """How detections are chosen; written into the file."""

    by: Literal["level", "class", "pair", "query", "inside"]
    """``level``: the best pairs of prediction and class of each pyramid level, then NMS. ``class``: the best predictions of each
    class, then NMS. ``pair``: the best pairs. ``query``: each query's best class. ``inside``: the file's results are final."""
    score: float = 0.0
    """Scores must be larger."""
    topk: int | None = None
    """Candidates of each level or class; None: all."""
    iou: float | None = None
    """IoU from which NMS drops the lower of two boxes of a class; None: no NMS."""
    detections: int | None = None
    """Largest number of detections of an image; None: no limit."""
    drop_empty: bool = False
    """Boxes without area are dropped before NMS."""
    clip: bool = False
    """The file's boxes reach out of the image, and detections are clipped to it after NMS."""

    @staticmethod
    def from_plain(content: Mapping[str, Any]) -> Rule:
        """Invert ``to_plain``."""
        return Rule(**content)

    def to_plain(self) -> dict[str, Any]:
        """The rule as JSON."""
        return asdict(self)


def rule_of(detector: Detector) -> Rule:
    """The rule of a detector's ``detect``."""
    owner: Any = detector
    if isinstance(detector, DenseDetector | SingleShotDetector):
        model = owner.model
        return Rule(
            "level" if isinstance(detector, DenseDetector) else "class",
            float(model.score_thresh),
            int(model.topk_candidates),
            float(model.nms_thresh),
            int(model.detections_per_img),
            isinstance(detector, OwnDenseDetector) or bool(getattr(model, "drop_empty", False)),
        )
    if isinstance(detector, yolo.Network):
        chosen = detector.options
        if not chosen.nms:
            return Rule("pair", chosen.score, detections=chosen.dets, clip=True)
        return Rule("class", chosen.score, iou=chosen.iou, detections=chosen.dets, clip=True)
    if isinstance(detector, LibreNetwork):
        mine = detector.options
        return Rule("class", mine.score, iou=mine.iou, detections=mine.dets, drop_empty=True)
    if detector.spec.family == "regions":
        return Rule("inside")
    if isinstance(detector, TorchvisionDetector):  # AdaMixer
        return Rule("pair", float(owner.model.score_thresh), detections=int(owner.model.detections_per_img))
    if detector.spec.softmax:
        return Rule("query", float(owner.score), detections=owner.dets)
    return Rule("pair", float(owner.score), detections=owner.dets or owner.top_k or int(owner.config.num_queries))


def select(found: Mapping[str, Tensor], rule: Rule) -> Detections:
    """Choose the detections of one image.

    Args:
        found: results of the file for this image: ``boxes`` [P, 4], ``scores`` [P, K], perhaps ``quality`` [P] and ``levels``
            [P]; with ``inside`` the final ``boxes`` [D, 4], ``scores`` [D] and ``labels`` [D].
        rule: the file's rule.
    """
    boxes, scores = found["boxes"], found["scores"]
    if rule.by == "inside":
        return Detections(boxes, scores, found["labels"])
    if rule.by == "query":
        values, labels = scores.max(dim=1)
        values, row = values.sort(descending=True, stable=True)
        keep = values > rule.score
        row = row[keep][: rule.detections]
        return Detections(boxes[row], values[keep][: rule.detections], labels[row])
    if rule.by == "pair":
        count = scores.numel() if rule.detections is None else min(rule.detections, scores.numel())
        values, place = scores.flatten().topk(count)
        keep = values > rule.score
        row, label = torch.div(place[keep], scores.shape[1], rounding_mode="floor"), place[keep] % scores.shape[1]
        return Detections(boxes[row], values[keep], label)
    values, row, label = _candidates(found, rule)
    mine = boxes[row]
    if "quality" in found:
        values = values * found["quality"][row]
    if rule.drop_empty:
        filled = (mine[:, 2:] > mine[:, :2]).all(dim=1)
        mine, values, label = mine[filled], values[filled], label[filled]
    assert rule.iou is not None
    best = suppressed(mine, values, label, rule.iou, rule.detections)
    return Detections(mine[best], values[best], label[best])


FIRST = 4
"""How many times as many candidates as wanted detections are suppressed at first."""


def suppressed(boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, iou: float, count: int | None) -> Tensor:
    """The first ``count`` rows that NMS of each class keeps, best first.

    Whether a box is kept depends on better boxes only, so the best candidates are suppressed first; the rest is looked at only if
    too few of them are kept. The result is that of NMS on all of them.

    Args:
        boxes_xyxy: [P, 4].
        scores: [P].
        labels: [P].
        iou: IoU from which the lower of two boxes is dropped.
        count: None: all.
    """
    if count is not None and len(scores) > FIRST * count:
        first = scores.sort(descending=True, stable=True).indices[: FIRST * count]
        kept = batched_nms(boxes_xyxy[first], scores[first], labels[first], iou)
        if len(kept) >= count:
            return first[kept[:count]]
    return batched_nms(boxes_xyxy, scores, labels, iou)[:count]


def _candidates(found: Mapping[str, Tensor], rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Score, prediction and class of the best of each level or class, above the least score."""
    scores = found["scores"]
    row, label = torch.nonzero(scores > rule.score, as_tuple=True)
    value = scores[row, label]
    group = found["levels"][row] if rule.by == "level" else label
    values, rows, labels = [value[:0]], [row[:0]], [label[:0]]
    for number in group.unique().tolist():
        mine = torch.nonzero(group == number).flatten()
        mine = mine[value[mine].sort(descending=True).indices[: rule.topk]]
        values.append(value[mine])
        rows.append(row[mine])
        labels.append(label[mine])
    return torch.cat(values), torch.cat(rows), torch.cat(labels)
