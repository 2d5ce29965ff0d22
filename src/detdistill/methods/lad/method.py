"""The method LAD: labels from the teacher's predictions, hard or soft."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from detdistill.detectors.contract import PREDICTION, Detector, Teacher
from detdistill.functional.classes import class_columns
from detdistill.functional.dense_maps import find_partners
from detdistill.functional.paa import paa_assign, paa_candidates, paa_costs, paa_select
from detdistill.functional.precision import full_precision
from detdistill.methods.lad.loss import lad_label_terms, lad_region, lad_soft_terms, lad_switched_costs
from detdistill.methods.shared.align import pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import MethodError, check_some
from detdistill.methods.shared.needs import Needs
from detdistill.structures import (
    AssignedCells,
    Assignment,
    Batch,
    Clock,
    Dense,
    Losses,
    Observation,
    Taught,
    cells_inside,
)
from detdistill.values import Count, Fraction, Weight


@dataclass(frozen=True)
class LADTaught(Taught):
    """The labels that the teacher assigns, a few hundred bytes for each image, and for soft labels its prediction."""

    labels: AssignedCells | None
    """Positive and ignored predictions. With ``switch``: the candidates, and their costs as weights. None with ``form=soft``."""
    prediction: Dense | None
    """The teacher's prediction; None with ``form=lad``."""


class LAD(Method[LADTaught]):
    """LAD between dense detectors with the same levels and the same number of anchors of a cell; backbones may differ.

    The teacher's labels replace the student's own assignment. They depend on the teacher's prediction, its classes matched by
    name, and on the ground truth. Predictions of the student on levels that the teacher lacks do not exist (``same_cells``);
    labels on levels that the student lacks are left out.

    CoLAD trains both networks at once. Here the teacher is frozen; of CoLAD there is its choice between the two networks
    (``switch``). Two departures from the released code: divisors are means over processes, and cells in the padding of an
    image take no part.
    """

    slug = "lad"
    title = "Improving Object Detection by Label Assignment Distillation (WACV 2022)"
    bibtex = """@inproceedings{nguyen2022lad,
  title={Improving Object Detection by Label Assignment Distillation},
  author={Nguyen, Chuong H. and Nguyen, Thuy C. and Tang, Tuan N. and Phan, Nam L. H.},
  booktitle={Proceedings of the IEEE/CVF Winter Conference on Applications of Computer Vision},
  year={2022}
}"""
    teach_settings = ("form", "rule", "switch", "most")

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        form: Literal["lad", "solad", "soft"] = "lad",
        rule: Literal["paa", "own"] = "paa",
        losses: Literal["own", "released"] = "own",
        switch: bool = False,
        most: Count = 9,
        class_weight: Weight | None = None,
        box_weight: Weight = 1.3,
        iou_weight: Weight = 10.0,
        power: Weight = 0.5,
        min_iou: Fraction = 0.5,
    ) -> None:
        """Match the classes and the levels.

        Args:
            teacher: a dense detector that knows all classes of the student.
            student: a dense detector with the same cells.
            form: ``lad``: the teacher's labels; ``soft``: its scores, boxes and IoU as soft labels, beside the student's own
                loss; ``solad``: both.
            rule: how labels are assigned. ``paa``: by the costs of the teacher's predictions (PAA's rule, for any teacher with
                sigmoid scores). ``own``: by the teacher's own rule; the labels are those of the student's own assignment if this
                rule looks at anchors only (FCOS, RetinaNet, ATSS, GFL, SSD).
            losses: of the hard labels. ``own``: the student's own detection loss, as in the paper. ``released``: focal, GIoU
                and IoU losses of the released code, whose GIoU loss is not weighted by the IoU as PAA's is; for students with
                sigmoid scores.
            switch: for each box and level, use the costs of the network that separates the candidates better, teacher or
                student (CoLAD, with a frozen teacher). Needs hard labels and ``rule=paa``.
            most: largest number of candidates of each level and box (``rule=paa``).
            class_weight: factor of the soft class labels; None: 2 with ``solad``, 10 with ``soft``, as released.
            box_weight: factor of the soft boxes.
            iou_weight: factor of the soft IoU (or centerness) scores; without such a branch on both sides the term is left out.
            power: exponent of the difference of the scores in soft labels (gamma).
            min_iou: boxes and IoU scores are compared where the teacher's box has an IoU above it with a ground-truth box.

        Raises:
            MethodError: a hyper-parameter is out of range, all weights of the soft labels are 0, or ``switch`` is given without
                ``rule=paa`` and hard labels.
        """
        super().__init__(teacher, student)
        self.form, self.rule, self.losses, self.switch, self.most = form, rule, losses, switch, most
        if class_weight is None:
            class_weight = 2.0 if form == "solad" else 10.0
        self.weights = {"classification": class_weight, "box": box_weight, "iou": iou_weight}
        if form != "lad":
            check_some(self.slug, class_weight=class_weight, box_weight=box_weight, iou_weight=iou_weight)
        if switch and (form == "soft" or rule == "own"):
            raise MethodError(f"{self.slug}: switch=true chooses between costs of labels; give form=lad or solad, and rule=paa")
        self.power, self.min_iou = power, min_iou
        self.strides = student.spec.strides
        self.columns = class_columns(student.spec.classes, teacher.spec.classes, teacher.spec.softmax)
        pairs = pair_levels(self.slug, student.spec, teacher.spec)
        self.levels = [(pair.student, pair.teacher) for pair in pairs]

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Dense detectors with the same cells and classes; sigmoid scores where scores are compared or make the costs."""
        sigmoid = settings["form"] != "lad" or settings["rule"] == "paa" or settings["losses"] == "released"
        return Needs(
            teacher=PREDICTION,
            teacher_families=("dense",),
            student_families=("dense",),
            same_classes=True,
            outputs="sigmoid" if sigmoid else "any",
            same_cells=True,
            one_size="the teacher assigns labels to its own cells",
        )

    @torch.no_grad()
    def teach(self, batch: Batch) -> LADTaught:
        """Assign the labels by the teacher's prediction. For soft labels, the prediction itself is part of the result."""
        prediction = cast(Dense, self.teacher.observe(batch, PREDICTION).float().prediction)
        with full_precision(batch.images.device):
            labels = None
            if self.form != "soft":
                columns = torch.tensor(self.columns, device=batch.images.device)
                targets = [replace(target, labels=columns[target.labels]) for target in batch.targets]
                labels = self._labels(prediction, batch.with_targets(targets))
        return LADTaught(labels, None if self.form == "lad" else replace(prediction, own=None))

    def _labels(self, prediction: Dense, batch: Batch) -> AssignedCells:
        """Labels, or with ``switch`` candidates and costs; the labels of ``batch`` are the teacher's."""
        strides = self.teacher.spec.strides
        if self.rule == "own":
            return AssignedCells.of(self.teacher.detector.assign(prediction, batch), prediction, batch, strides)
        valid = cells_inside(prediction, batch, strides)
        if not self.switch:
            return AssignedCells.of(paa_assign(prediction, valid, batch.targets, self.most), prediction, batch, strides)
        candidates = paa_candidates(prediction.priors_xyxy, valid, batch.targets)
        costs = torch.ones_like(prediction.boxes_xyxy[..., 0])
        costs[candidates >= 0] = paa_costs(prediction, candidates, batch.targets)
        return AssignedCells.of(Assignment(candidates, costs), prediction, batch, strides)

    def supervise(self, student: Detector, seen: Observation, taught: LADTaught, batch: Batch) -> Losses:
        """Compute the detection loss under the teacher's labels; with ``form=soft`` under the student's own."""
        if taught.labels is None:
            return super().supervise(student, seen, taught, batch)
        prediction = cast(Dense, seen.prediction)
        assignment = taught.labels.with_strides(self.strides).on(prediction, batch)
        monitors = {}
        if self.switch:
            assignment, monitors["teacher_costs"] = self._switched(prediction, assignment, batch)
        if self.losses == "own":
            losses = student.loss(prediction, batch, assignment)
            return replace(losses, monitors={**losses.monitors, **monitors})
        terms = lad_label_terms(prediction.logits, prediction.boxes_xyxy, prediction.quality, assignment.matched, batch.targets)
        return Losses({name: term for name, term in terms._asdict().items() if term is not None}, monitors)

    @torch.no_grad()
    def _switched(self, prediction: Dense, candidates: Assignment, batch: Batch) -> tuple[Assignment, Tensor]:
        """Labels from the candidates and the teacher's costs, and the fraction of these that are used."""
        matched = candidates.matched
        theirs = cast(Tensor, candidates.weights)[matched >= 0]
        costs, fraction = lad_switched_costs(paa_costs(prediction, matched, batch.targets), theirs, matched, prediction.levels)
        return Assignment(paa_select(costs, matched, prediction.levels, self.most)), fraction

    def learn(self, student: Detector, seen: Observation, taught: LADTaught, batch: Batch, clock: Clock) -> Losses:
        """Terms ``lad_classification``, ``lad_box`` and ``lad_iou`` of soft labels; with ``form=lad`` there are none.

        Terms with weight 0 are left out.
        """
        if taught.prediction is None:
            return Losses({})
        prediction, teacher = cast(Dense, seen.prediction), taught.prediction
        with full_precision(batch.images.device):
            partners = find_partners(prediction, teacher, self.levels)
            mask = partners.mask & cells_inside(prediction, batch, self.strides)
            boxes = partners.take(teacher.boxes_xyxy)
            overlaps = lad_region(boxes, batch.targets, batch.sizes, self.min_iou).masked_fill(~mask, 0.0)
            terms = lad_soft_terms(
                prediction.logits,
                partners.take(teacher.logits)[..., self.columns],
                prediction.boxes_xyxy,
                boxes,
                prediction.quality,
                None if teacher.quality is None else partners.take(teacher.quality),
                overlaps,
                batch.sizes,
                mask,
                self.power,
            )
        found = {name: term for name, term in terms._asdict().items() if term is not None and self.weights[name]}
        return Losses({f"lad_{name}": self.weights[name] * term for name, term in found.items()})
