"""Objects that a teacher knows and the labels do not: they are no background.

Where images are labelled for some of the student's classes only (data sets joined by ``+``, see ``data.joined``), an object of
another class counts as background in every detector's loss. Here the boxes that a teacher finds there, of classes that the image
is not labelled for, join the image's targets with a score (``Target.scores``): with ``unlabelled=label`` the teacher's own, so
that the box teaches as much as the teacher is sure of it; with ``ignore`` 0, so that whatever the detector matches to the box
has no loss. Both hold for dense, two-stage and query detectors, because each matches the boxes by its own rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from detdistill.data.records import DetectionSet
from detdistill.detectors.contract import PREDICTION, Detector, Teacher
from detdistill.errors import RunError, name_list
from detdistill.methods.shared.contract import Method
from detdistill.settings import DistillSettings
from detdistill.structures import Batch, Detections, Look, Target

SAME_OBJECT = 0.7
"""Boxes of a teacher that overlap a labelled object by more (IoU) are left out: the label says what is there."""
SAME_BOX = 0.5
"""Of boxes of one class, from one or several teachers or from the labels, that overlap by more, one is kept."""
MOST = 100
"""Largest number of boxes that are added to an image, the surest first."""


class Unlabelled:
    """Adds to a batch the boxes of the teachers, of classes for which an image is not labelled."""

    def __init__(
        self,
        looks: Mapping[Teacher, Look],
        classes: Sequence[str],
        labelled: Mapping[int, frozenset[int]],
        mode: Literal["label", "ignore"],
        least: float,
    ) -> None:
        """Prepare for a run.

        Args:
            looks: what the run's methods request of each teacher's pass, which is shared with them.
            classes: the student's classes, by label.
            labelled: for each image that is not labelled for all classes, by id, the labels for which it is.
            mode: ``label`` or ``ignore``.
            least: boxes with a lower score are left out, 0..1.
        """
        self.looks, self.classes, self.labelled, self.mode, self.least = looks, tuple(classes), labelled, mode, least
        self._columns: dict[Teacher, Tensor] = {}
        for teacher in looks:
            known = teacher.spec.classes
            self._columns[teacher] = torch.tensor([classes.index(name) if name in classes else -1 for name in known])

    @classmethod
    def of(
        cls, method: Method[Any], student: Detector, data: DetectionSet, settings: DistillSettings, cached: bool
    ) -> Unlabelled | None:
        """For a run; None if all its images are labelled for all classes, or what is unlabelled stays background.

        Raises:
            RunError: the run cannot have it.
        """
        labelled = {one.id: frozenset(one.labelled) for one in data.records if one.labelled is not None}
        if not labelled or settings.unlabelled == "background" or not method.teachers():
            return None
        way_out = "or leave such objects background with --unlabelled background"
        if cached:
            raise RunError(
                "unlabelled: neither a cache nor a served teacher gives boxes of classes that the labels lack; run the teacher "
                f"itself, {way_out}"
            )
        if student.spec.needs_masks:
            raise RunError(
                f"unlabelled: {student.spec.name} learns masks, and teachers add boxes only; take a student of boxes, {way_out}"
            )
        own = [one.slug for one in _flat(method) if type(one).supervise is not Method.supervise]
        if own:
            raise RunError(f"unlabelled: {own[0]} replaces the student's own loss, which weighs the added boxes; {way_out}")
        known = {name for teacher in method.teachers() for name in teacher.spec.classes}
        all_labels = frozenset(range(len(data.classes)))
        lacking = {data.classes[label] for labels in labelled.values() for label in all_labels - labels}
        if not lacking & known:
            raise RunError(
                f"unlabelled: no teacher knows a class that some images are not labelled for ({name_list(sorted(lacking))}); "
                f"give a teacher that does, {way_out}"
            )
        return cls(method.looks(), data.classes, labelled, settings.unlabelled, settings.unlabelled_score)

    def in_words(self) -> str:
        """The treatment of the boxes that teachers add, in words for the user."""
        what = "are labels, which count as much as their score" if self.mode == "label" else "are ignored"
        return f"those with a score of {self.least:g} or more {what}"

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Batch, Tensor]:
        """Add the teachers' boxes.

        Returns:
            The batch with its new targets, and [] the mean number of boxes added to an image.
        """
        every = frozenset(range(len(self.classes)))
        wanted = [every - self._labels_of(batch, index) for index in range(len(batch))]
        if not any(wanted):
            return batch, batch.images.new_zeros(())
        found = [self._found(teacher, batch, wanted) for teacher in self.looks]
        added = [_merged(parts, target) for parts, target in zip(zip(*found, strict=True), batch.targets, strict=True)]
        targets = [self._with(target, boxes) for target, boxes in zip(batch.targets, added, strict=True)]
        return batch.with_targets(targets), batch.images.new_tensor(sum(map(len, added)) / len(batch))

    def _labels_of(self, batch: Batch, index: int) -> frozenset[int]:
        """The labels for which all images are labelled that make up an image of the batch."""
        every = frozenset(range(len(self.classes)))
        ids = batch.views[index].mosaic or (batch.ids[index],)
        return frozenset.intersection(*(self.labelled.get(one, every) for one in ids))

    def _found(self, teacher: Teacher, batch: Batch, wanted: Sequence[frozenset[int]]) -> list[Detections]:
        """The boxes of a teacher in each image, in pixels of the batch and with the student's labels."""
        shown = batch if batch.large is None else batch.large
        seen = teacher.observe(shown, self.looks[teacher] | PREDICTION).float()
        assert seen.prediction is not None
        columns = self._columns[teacher].to(batch.images.device)
        kept = []
        for index, found in enumerate(teacher.detector.detect(seen.prediction, shown)):
            labels = columns[found.labels]
            open_to = torch.tensor([label in wanted[index] for label in range(len(self.classes))], device=labels.device)
            keep = (labels >= 0) & open_to[labels] & (found.scores >= self.least)
            scale = (batch.sizes[index] / shown.sizes[index]).to(found.boxes_xyxy)[[1, 0, 1, 0]]
            kept.append(Detections(found.boxes_xyxy[keep] * scale, found.scores[keep], labels[keep]))
        return kept

    def _with(self, target: Target, boxes: Detections) -> Target:
        if not len(boxes):
            return target
        known = torch.ones(len(target), device=target.boxes_xyxy.device) if target.scores is None else target.scores
        scores = boxes.scores if self.mode == "label" else torch.zeros_like(boxes.scores)
        return replace(
            target,
            boxes_xyxy=torch.cat([target.boxes_xyxy, boxes.boxes_xyxy.to(target.boxes_xyxy)]),
            labels=torch.cat([target.labels, boxes.labels]),
            crowd=torch.cat([target.crowd, torch.zeros_like(boxes.labels, dtype=torch.bool)]),
            scores=torch.cat([known, scores.to(known)]),
        )


def _merged(parts: Sequence[Detections], target: Target) -> Detections:
    """The boxes of all teachers in an image, each object once, without those that the labels or a surer box name."""
    boxes = torch.cat([part.boxes_xyxy for part in parts])
    scores, labels = torch.cat([part.scores for part in parts]), torch.cat([part.labels for part in parts])
    if len(target) and len(boxes):
        overlap = box_iou(boxes, target.boxes_xyxy.to(boxes))
        same_class = labels[:, None] == target.labels
        free = ~((overlap > SAME_OBJECT) | (same_class & (overlap > SAME_BOX))).any(dim=1)
        boxes, scores, labels = boxes[free], scores[free], labels[free]
    keep = batched_nms(boxes, scores, labels, SAME_BOX)[:MOST]
    return Detections(boxes[keep], scores[keep], labels[keep])


def _flat(method: Method[Any]) -> list[Method[Any]]:
    """The methods of a composition or progression, or the method itself."""
    parts: Sequence[Method[Any]] = getattr(method, "methods", ())
    return [one for part in parts for one in _flat(part)] or [method]
