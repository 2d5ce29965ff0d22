"""LD: the student's distributions of box sides should equal the teacher's, at positives and in a valuable region around them.

Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022; also as "Localization Distillation for Object
Detection", TPAMI 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from detdistill.detectors.contract import PREDICTION, Detector, HasBoxDistributions, Teacher
from detdistill.functional.cells import anchors_near_boxes, points_inside
from detdistill.functional.classes import class_columns
from detdistill.functional.counting import label_weights, mean_over_ranks, positives_per_level, sum_over_ranks
from detdistill.functional.dense_maps import Partners, find_partners
from detdistill.functional.precision import full_precision
from detdistill.methods.ld.loss import (
    Quality,
    ld_box_loss,
    ld_class_loss,
    ld_general_instances,
    ld_imitation_loss,
    ld_rebinned,
    ld_valuable_region,
)
from detdistill.methods.ld.parts import LDCells, LDObjects, LDSides, cells_of, objects_of, sides_of
from detdistill.methods.shared.align import LevelAdapters, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import MethodError, check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.structures import Assignment, Batch, Clock, Dense, Losses, Observation, Prediction, Queries, Target
from detdistill.values import Count, Fraction, Positive, Weight

MAIN_DIVISOR, VALUABLE_DIVISOR = 4.0, 16.0
"""Divisors of the released code: sides, and sides times 4."""


class _Chosen(NamedTuple):
    """M predictions of the student, and what the teacher says about them."""

    student: LDSides
    teacher: LDSides
    logits: Tensor
    """[M, K] the student's."""
    fixed_logits: Tensor
    """[M, K] the teacher's."""
    levels: Tensor
    """[M]."""


class LD(Method[LDCells | LDObjects]):
    """LD between detectors whose box sides are distributions.

    With ``match=cells``, as in the paper, predictions of two GFL are compared cell by cell. With ``match=objects``, not in the
    paper, a prediction of the student is compared with the teacher's best prediction for the same ground-truth box; the
    detectors may then be of different families. Steps of distributions that differ are matched by position in the image
    (``ld_rebinned``).

    The terms are reduced as released: the divergences of box sides are sums over predictions, which grow with the batch; the
    divergence of classes is a mean over the positives of each level. The released code fails on an image without boxes; here it
    has no terms. Counts of positives are means over processes.
    """

    slug = "ld"
    title = "Localization Distillation for Dense Object Detection (CVPR 2022)"
    bibtex = """@inproceedings{zheng2022localization,
  title={Localization Distillation for Dense Object Detection},
  author={Zheng, Zhaohui and Ye, Rongguang and Wang, Ping and Ren, Dongwei and Zuo, Wangmeng and Hou, Qibin
    and Cheng, Ming-Ming},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2022}
}"""
    teach_settings = ("match", "imitation_weight")

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        match: Literal["cells", "objects"] = "cells",
        box_weight: Weight = 0.25,
        box_temperature: Positive = 10.0,
        valuable_weight: Weight = 0.25,
        gamma: Fraction = 0.25,
        quality: Quality = "iof",
        candidates: Count = 9,
        exclude_positives: bool = False,
        cls_weight: Weight = 10.0,
        cls_temperature: Positive = 2.0,
        valuable_cls_weight: Weight = 0.0,
        imitation_weight: Weight = 0.0,
        imitation: Literal["general_instances", "fine_grained", "inside"] = "general_instances",
        instances: Count = 10,
        instances_of: Literal["image", "batch"] = "image",
    ) -> None:
        """Pair the levels; channels that differ get a 1x1 convolution on the student if features are imitated (not in the paper).

        Args:
            teacher: a detector with distributions of box sides (GFL; with ``match=objects`` also D-FINE, DEIMv2).
            student: a detector with distributions of box sides.
            match: ``cells``: predictions at the same cell are compared. ``objects``: predictions for the same box.
            box_weight: factor of the divergence of box sides at positives (main region).
            box_temperature: of the distributions of box sides, in both regions.
            valuable_weight: factor of the divergence of box sides in the valuable region. Students that predict queries have no
                such region.
            gamma: lower bound of the valuable region, as a fraction of the ATSS threshold; 1: no region, 0: the largest.
            quality: measure of the valuable region: ``iof`` as released, ``iou`` as in the paper (see ``ld_valuable_region``).
            candidates: anchors of each level and box from which the ATSS threshold is computed.
            exclude_positives: leave positives out of the valuable region (released for RetinaNet).
            cls_weight: factor of the divergence of class scores at positives.
            cls_temperature: of the softmax over classes.
            valuable_cls_weight: factor of the divergence of class scores in the valuable region, each level divided by its number
                of cells there. The released code has this loss with the factor 0.
            imitation_weight: factor of the imitation of features; the released config for ResNet-50 has 2 with ``fine_grained``.
            imitation: cells whose features are imitated. ``general_instances``: the predictions that differ most.
                ``fine_grained``: anchors near a box. ``inside``: anchors whose centre lies inside a box.
            instances: largest number of general instances of a level.
            instances_of: ``image``: that number for each image; ``batch``: for all images together, with one NMS for all of them,
                as released.

        Raises:
            MethodError: a hyper-parameter is out of range, all weights are 0, or features are imitated with ``match=objects``.
            PairError: a detector without distributions; with ``cells`` one that is not dense, or other cells; a class that the
                teacher lacks; a class loss with one class only, whose softmax is always 1.
        """
        self._check_match(match, imitation_weight, teacher, student)
        super().__init__(teacher, student)
        weights = ("box_weight", "valuable_weight", "cls_weight", "valuable_cls_weight", "imitation_weight")
        check_some(self.slug, **{name: self.settings[name] for name in weights})
        self.match, self.quality, self.imitation, self.instances_of = match, cast(Quality, quality), imitation, instances_of
        self.box_weight, self.valuable_weight, self.cls_weight = box_weight, valuable_weight, cls_weight
        self.valuable_cls_weight = valuable_cls_weight
        self.imitation_weight, self.instances = imitation_weight, instances
        self.box_temperature, self.cls_temperature = box_temperature, cls_temperature
        self.gamma, self.candidates, self.exclude_positives = gamma, candidates, exclude_positives
        self.columns = class_columns(student.spec.classes, teacher.spec.classes, softmax=False)
        self._check_classes(student.spec.classes)
        self.num_levels = len(student.spec.strides)
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec) if match == "cells" else ()
        self.adapters = LevelAdapters(self.pairs) if imitation_weight else None

    def _check_classes(self, classes: Sequence[str]) -> None:
        """Check that there are several classes, if their scores are compared.

        Raises:
            PairError: there is one class, whose softmax is always 1.
        """
        for name, given in (("cls_weight", self.cls_weight), ("valuable_cls_weight", self.valuable_cls_weight)):
            if given and len(classes) == 1:
                only = f"a softmax over one class ({classes[0]}) is always 1, so the class term would be zero"
                raise PairError(f"{self.slug}: {only}; set {self.slug},{name}=0")

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Two detectors with distributions and the same classes; for ``match=cells`` dense ones with the same cells."""
        cells = settings["match"] == "cells"
        families = ("dense",) if cells else ("dense", "queries")
        return Needs(
            teacher=PREDICTION,
            teacher_families=families,
            student_families=families,
            same_classes=True,
            outputs="sigmoid",
            same_cells=cells,
            box_distributions=True,
        )

    def _check_match(self, match: str, imitation_weight: float, teacher: Teacher | None, student: Detector) -> None:
        """Check ``match`` against the other settings and the pair.

        Raises:
            MethodError: features are imitated with ``match=objects``.
            PairError: ``match=cells`` with a DETR that ``match=objects`` accepts.
        """
        if match == "objects":
            if imitation_weight:
                raise MethodError(f"{self.slug}: imitation compares features of equal cells, so it needs match=cells")
            return
        if teacher is None:
            return  # the check of ``needs`` tells
        specs = student.spec, teacher.spec
        if all(spec.box_bins for spec in specs) and (queries := [spec for spec in specs if spec.family == "queries"]):
            raise PairError(
                f"{self.slug}: {queries[0].name} predicts queries, which belong to no cell; set {self.slug},match=objects "
                f"to compare the predictions for the same box"
            )

    # --------------------------------------------------------------------------------------------------------- the teacher

    @torch.no_grad()
    def teach(self, batch: Batch) -> LDCells | LDObjects:
        """Return the teacher's logits, boxes and distributions, of all cells or for each ground-truth box."""
        seen = self.teacher.observe(batch, PREDICTION)
        assert seen.prediction is not None
        detector = self.teacher.detector
        if self.match == "objects":
            with full_precision(batch.images.device):
                return objects_of(detector, seen.prediction.float(), self._in_teachers_labels(batch))
        assert isinstance(seen.prediction, Dense)
        assert isinstance(detector, HasBoxDistributions)
        found = detector.distributions(seen.prediction, batch)
        return cells_of(seen.prediction, found, seen.features if self.imitation_weight else None)

    def _in_teachers_labels(self, batch: Batch) -> Batch:
        """The batch with labels counted in the teacher's classes."""
        columns = torch.tensor(self.columns, device=batch.images.device)
        targets = [Target(t.boxes_xyxy, columns[t.labels], t.crowd, t.masks) for t in batch.targets]
        return batch.with_targets(targets)

    # --------------------------------------------------------------------------------------------------------- the student

    def learn(self, student: Detector, seen: Observation, taught: LDCells | LDObjects, batch: Batch, clock: Clock) -> Losses:
        """Compute ``ld_box``, ``ld_valuable``, ``ld_cls``, ``ld_valuable_cls`` and ``ld_imitation``; not those of weight 0.

        The monitors ``positives`` and ``valuable`` are the numbers of compared predictions in an image.
        """
        mine = seen.prediction
        assert mine is not None
        with full_precision(batch.images.device):
            with torch.no_grad():
                assignment = student.assign(mine, batch)
                partners = self._partners(mine, taught)
                main = self._main(mine, assignment, partners)
            chosen = self._compare(student, mine, taught, batch, partners, *main)
            terms, monitors = self._main_terms(chosen), {"positives": len(chosen.levels) / len(batch)}
            if (self.valuable_weight or self.valuable_cls_weight) and isinstance(mine, Dense):
                *where, weights = self._valuable(mine, assignment, partners, taught, batch)
                there = self._compare(student, mine, taught, batch, partners, *where)
                if self.valuable_weight:
                    terms["ld_valuable"] = self.valuable_weight * self._box_loss(there, weights, VALUABLE_DIVISOR)
                if self.valuable_cls_weight:
                    terms["ld_valuable_cls"] = self.valuable_cls_weight * self._class_loss(there)
                monitors["valuable"] = len(weights) / len(batch)
            if self.imitation_weight:
                assert isinstance(taught, LDCells)  # the constructor refuses imitation of objects
                assert partners is not None
                terms["ld_imitation"] = self.imitation_weight * self._imitation(seen, taught, assignment, partners, batch)
            return Losses(terms, {name: torch.tensor(value, device=batch.images.device) for name, value in monitors.items()})

    def _partners(self, mine: Prediction, taught: LDCells | LDObjects) -> Partners | None:
        """Pairs of cells; None if objects are compared."""
        if isinstance(taught, LDObjects):
            return None
        assert isinstance(mine, Dense)
        return find_partners(mine, taught.prediction, [(pair.student, pair.teacher) for pair in self.pairs])

    def _main(self, mine: Prediction, assignment: Assignment, partners: Partners | None) -> tuple[Tensor, Tensor, Tensor]:
        """Image, index and ground truth [M] of the positives (of queries: in the last layer) that have a partner."""
        matched = assignment.matched[-1] if isinstance(mine, Queries) else assignment.matched
        positive = matched >= 0
        if partners is not None:
            positive &= partners.mask
        image, index = torch.nonzero(positive, as_tuple=True)
        return image, index, matched[image, index]

    def _valuable(
        self, mine: Dense, assignment: Assignment, partners: Partners | None, taught: LDCells | LDObjects, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Image, index, ground truth and weight [M] of the valuable region, without ignored predictions."""
        allowed = label_weights(assignment, mine.boxes_xyxy) > 0
        if partners is not None:
            allowed &= partners.mask
        weights, boxes = torch.zeros_like(mine.boxes_xyxy[..., 0]), torch.zeros_like(assignment.matched)
        for row, target in enumerate(batch.targets):
            usable = _usable(target)
            open_to = torch.nonzero(allowed[row]).flatten()
            anchors, truth = mine.priors_xyxy[row, open_to], target.boxes_xyxy[usable].to(weights.dtype)
            region = ld_valuable_region(anchors, mine.levels[open_to], truth, self.gamma, self.quality, self.candidates)
            weights[row, open_to] = region.weights.to(weights.dtype)
            if len(usable):
                boxes[row, open_to] = usable[region.ground_truth]
        if self.exclude_positives:
            weights = weights.masked_fill(assignment.matched >= 0, 0.0)
        image, index = torch.nonzero(weights > 0, as_tuple=True)
        box, weight = boxes[image, index], weights[image, index]
        if isinstance(taught, LDObjects):
            known = taught.known[image, box]
            return image[known], index[known], box[known], weight[known]
        return image, index, box, weight

    def _compare(
        self,
        student: Detector,
        mine: Prediction,
        taught: LDCells | LDObjects,
        batch: Batch,
        partners: Partners | None,
        image: Tensor,
        index: Tensor,
        box: Tensor,
    ) -> _Chosen:
        """Gather predictions of the student and of the teacher; objects that the teacher does not know are left out."""
        assert isinstance(student, HasBoxDistributions)
        if isinstance(taught, LDObjects):
            known = taught.known[image, box]
            image, index, box = image[known], index[known], box[known]
            packed, fixed = taught.sides[image, box], taught.logits[image, box]
            theirs = LDSides(packed[..., :-2], packed[..., -2], packed[..., -1], taught.steps.to(packed.dtype))
        else:
            assert partners is not None
            other = taught.prediction
            theirs = sides_of(other.deltas[image, partners.index[index]], taught.steps)
            fixed = other.logits[image, partners.index[index]]
        logits = mine.logits[-1] if isinstance(mine, Queries) else cast(Dense, mine).logits
        levels = mine.levels[index] if isinstance(mine, Dense) else torch.zeros_like(index)
        sides = LDSides.of(student.distributions(mine, batch), image, index)
        return _Chosen(sides, theirs, logits[image, index], fixed[:, self.columns], levels)

    def _main_terms(self, chosen: _Chosen) -> dict[str, Tensor]:
        terms = {}
        if self.box_weight:
            weights = chosen.logits.detach().sigmoid().amax(dim=1)
            terms["ld_box"] = self.box_weight * self._box_loss(chosen, weights, MAIN_DIVISOR)
        if self.cls_weight:
            terms["ld_cls"] = self.cls_weight * self._class_loss(chosen)
        return terms

    def _class_loss(self, chosen: _Chosen) -> Tensor:
        """Divergence of class scores, each level divided by its number of predictions."""
        counts = torch.bincount(chosen.levels, minlength=self.num_levels).to(chosen.logits.dtype)
        counts = mean_over_ranks(counts)[chosen.levels]
        return ld_class_loss(chosen.logits, chosen.fixed_logits, 1 / counts, self.cls_temperature)

    def _box_loss(self, chosen: _Chosen, weights: Tensor, divisor: float) -> Tensor:
        mine, theirs = chosen.student, chosen.teacher
        fixed = theirs.logits
        if not theirs.same_scale(mine):
            fixed = ld_rebinned(fixed, theirs.positions(mine), mine.steps.to(fixed.dtype), self.box_temperature)
        return ld_box_loss(mine.logits, fixed, weights, self.box_temperature, divisor)

    # -------------------------------------------------------------------------------------------------- imitated features

    def _imitation(self, seen: Observation, taught: LDCells, assignment: Assignment, partners: Partners, batch: Batch) -> Tensor:
        """Sum over levels of the mean squared differences in the region; a level without positives counts 0, as released."""
        mine = cast(Dense, seen.prediction)
        assert taught.features is not None
        assert self.adapters is not None
        with torch.no_grad():
            region = self._region(mine, taught, partners, assignment, batch)
        maps = self.adapters([seen.features.maps[pair.student] for pair in self.pairs])
        losses, positives = [], sum_over_ranks(positives_per_level(assignment, mine.levels, self.num_levels))
        for pair, own in zip(self.pairs, maps, strict=True):
            here, filled = mine.levels == pair.student, bool(positives[pair.student] > 0)
            image, index = torch.nonzero(region & here & filled, as_tuple=True)
            row, column = mine.cells[index].unbind(1)
            fixed = taught.features.maps[pair.teacher]
            losses.append(ld_imitation_loss(own[image, :, row, column], fixed[image, :, row, column]))
        return torch.stack(losses).sum()

    def _region(self, mine: Dense, taught: LDCells, partners: Partners, assignment: Assignment, batch: Batch) -> Tensor:
        """[B, P] predictions at whose cells features are imitated."""
        allowed = (label_weights(assignment, mine.boxes_xyxy) > 0) & partners.mask
        region = torch.zeros_like(allowed)
        if self.imitation == "general_instances":
            other = taught.prediction
            fixed, boxes = other.logits[:, partners.index][..., self.columns], other.boxes_xyxy[:, partners.index]
            for pair in self.pairs:
                image, index = torch.nonzero(allowed & (mine.levels == pair.student), as_tuple=True)
                sides = mine.logits[image, index], fixed[image, index], mine.boxes_xyxy[image, index], boxes[image, index]
                groups = image if self.instances_of == "image" else torch.zeros_like(image)
                kept = ld_general_instances(*sides, groups, self.instances)
                region[image[kept], index[kept]] = True
            return region
        for row, target in enumerate(batch.targets):
            open_to = torch.nonzero(allowed[row]).flatten()
            anchors, boxes = mine.priors_xyxy[row, open_to], target.boxes_xyxy[_usable(target)]
            if self.imitation == "fine_grained":
                region[row, open_to] = anchors_near_boxes(anchors, boxes)
            else:
                centers = (anchors[:, :2] + anchors[:, 2:]) / 2
                region[row, open_to] = points_inside(centers, boxes).any(dim=1)
        return region


def _usable(target: Target) -> Tensor:
    """Indices of the boxes that are no crowd and have an area."""
    sides = target.boxes_xyxy[:, 2:] - target.boxes_xyxy[:, :2]
    return torch.nonzero(~target.crowd & (sides > 0).all(dim=1)).flatten()
