"""ODKD: class scores of the teacher, its box errors as a bound, and its features as hints, for both stages of a detector.

Chen, Choi, Yu, Han, Chandraker, "Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS 2017. No
code of the authors was found: this is a reconstruction from published notes and from a third-party implementation
(HqWei/Distillation-of-Faster-rcnn), whose values it reproduces. RPN is the region proposal network, RCN the region head.

Shape letters: B images, P anchors of an image, R regions or anchors, K classes, L levels, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.detectors.contract import Detector, DetectorSpec, HasRegions, Teacher, dense_positives
from detdistill.functional.classes import class_columns
from detdistill.functional.counting import divisor_over_ranks
from detdistill.functional.dense_maps import find_partners
from detdistill.functional.precision import full_precision
from detdistill.functional.regions import encode_boxes
from detdistill.functional.soft_targets import soft_cross_entropy
from detdistill.methods.shared.align import LevelAdapters, LevelPair, pair_levels, resize_like
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.methods.shared.regions import has_area, label_regions, of_class
from detdistill.structures import IGNORED, Batch, Clock, Dense, Features, Look, Losses, Observation, Regions, Taught
from detdistill.values import Fraction, Positive, Weight

Norm = Literal["l2", "l1"]
Reduction = Literal["mean", "batch"]
REGION_CODING = (10.0, 10.0, 5.0, 5.0)
"""Weights of the four box deltas of a region, as in Fast R-CNN (standard deviations 0.1, 0.1, 0.2, 0.2)."""
ANCHOR_CODING = (1.0, 1.0, 1.0, 1.0)


def odkd_class_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    background_weight: float = 1.5,
    object_weight: float = 1.0,
    softmax: bool = True,
) -> Tensor:
    """Cross-entropy with the teacher's class scores, weighted by class: ``-sum_c w_c P_t log P_s``, mean over regions.

    Nothing renormalises by the weights, so the gradient does not vanish for equal logits unless the weights are equal.

    Args:
        student_logits: [R, K+1], the background last; without ``softmax`` [R, K]. Gradient flows.
        teacher_logits: the same shape, treated as constant.
        temperature: T of both sides.
        background_weight: weight of the background.
        object_weight: weight of every class of objects.
        softmax: False: sigmoid logits. Each is a pair of scores, object and background (our reading), and the cross-entropies
            of a row's classes are added.

    Returns:
        [] the loss; 0, connected to the student, without regions.

    Example:
        >>> round(float(odkd_class_loss(torch.zeros(1, 2), torch.tensor([[-99.0, 0.0]]))), 4)
        1.0397
    """
    if softmax:
        weights = student_logits.new_full(student_logits.shape[-1:], object_weight)
        weights[-1] = background_weight
        rows = soft_cross_entropy(student_logits, teacher_logits, temperature, weights)
    else:
        mine, theirs = student_logits / temperature, teacher_logits.detach() / temperature
        objects = theirs.sigmoid() * F.logsigmoid(mine)
        background = (-theirs).sigmoid() * F.logsigmoid(-mine)
        rows = -(object_weight * objects + background_weight * background).sum(dim=-1)
    return rows.sum() / divisor_over_ranks(len(rows), rows)


def odkd_worse(student: Tensor, teacher: Tensor, target: Tensor, margin: float = 0.0) -> Tensor:
    """[R] bool, True where the student's squared box error plus the margin is larger than the teacher's, without gradient.

    Args:
        student: [R, 4] box deltas.
        teacher: [R, 4] box deltas of the same regions, in the same coding.
        target: [R, 4] deltas of the ground truth.
        margin: m, 0 or more.
    """
    errors = [(deltas.detach() - target.detach()).square().sum(dim=-1) for deltas in (student, teacher)]
    return errors[0] + margin > errors[1]


def odkd_box_loss(student: Tensor, teacher: Tensor, target: Tensor, margin: float = 0.0, count: int | None = None) -> Tensor:
    """Bounded regression: the student's squared box error where it is not better than the teacher by the margin, else 0.

    The teacher only switches the penalty on and off; the student is never pulled towards the teacher's box.

    Args:
        student: [R, 4] box deltas of the positive regions, for the class of their ground truth; gradient flows.
        teacher: [R, 4], treated as constant.
        target: [R, 4], treated as constant.
        margin: m.
        count: divisor; None: R, so that regions that are switched off count, too.

    Returns:
        [] the loss; 0, connected to the student, without regions.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0, 0, 0], [1, 0, 0, 0]]), torch.tensor([[1.0, 0, 0, 0], [3, 0, 0, 0]])
        >>> float(odkd_box_loss(student, teacher, torch.zeros(2, 4)))
        2.0
    """
    errors = (student - target.detach()).square().sum(dim=-1)
    bounded = errors.masked_fill(~odkd_worse(student, teacher, target, margin), 0.0)
    return bounded.sum() / divisor_over_ranks(len(errors) if count is None else count, bounded)


def odkd_hint_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], norm: Norm = "l2", reduction: Reduction = "mean"
) -> Tensor:
    """Difference of the hint maps, mean over levels.

    Args:
        student: L maps [B, C, H, W] after the adapter; gradient flows. Maps of another size are resized to the teacher's.
        teacher: L maps [B, C, H, W], treated as constant.
        norm: ``l2``: squared differences; ``l1``: absolute differences.
        reduction: ``mean`` over all values (our choice, the paper gives none); ``batch``: sum divided by B.

    Returns:
        [] the loss.

    Example:
        >>> float(odkd_hint_loss([torch.full((1, 2, 2, 2), 2.0)], [torch.zeros(1, 2, 2, 2)], reduction="batch"))
        32.0
    """
    distance = F.mse_loss if norm == "l2" else F.l1_loss
    losses = []
    for mine, theirs in zip(student, teacher, strict=True):
        gap = distance(resize_like(mine, theirs), theirs.detach(), reduction="mean" if reduction == "mean" else "sum")
        losses.append(gap if reduction == "mean" else gap / len(theirs))
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class ODKDTaught(Taught):
    """The teacher's hint maps and the prediction of its first stage; parts that no term reads are None."""

    features: Features | None
    """Neck features."""
    backbone: Features | None
    """Last map of the backbone."""
    first: Dense | None
    """Prediction of the first stage, or of a one-stage teacher."""


class ODKD(Method[ODKDTaught]):
    """ODKD between two-stage detectors; with ``rcn_weight=0`` also between dense detectors of one kind."""

    slug = "odkd"
    title = "Learning Efficient Object Detection Models with Knowledge Distillation (NeurIPS 2017)"
    bibtex = """@inproceedings{chen2017learning,
  title={Learning Efficient Object Detection Models with Knowledge Distillation},
  author={Chen, Guobin and Choi, Wongun and Yu, Xiang and Han, Tony and Chandraker, Manmohan},
  booktitle={Advances in Neural Information Processing Systems},
  year={2017}
}"""
    teach_settings = ("hint", "hint_weight", "rpn_weight", "rcn_weight", "mu", "mu_end", "nu", "nu_end", "lambda_box")

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        rpn_weight: Weight = 1.0,
        rcn_weight: Weight = 1.0,
        hint_weight: Weight = 0.5,
        lambda_box: Weight = 1.0,
        mu: Fraction = 0.5,
        mu_end: Fraction | None = None,
        mix_hard: bool = True,
        temperature: Positive = 1.0,
        background_weight: Weight = 1.5,
        object_weight: Weight = 1.0,
        nu: Weight = 0.5,
        nu_end: Weight | None = None,
        margin: Weight = 0.0,
        box_norm: Literal["positives", "sampled"] = "positives",
        hint: Literal["neck", "backbone"] = "neck",
        hint_norm: Norm = "l2",
        hint_reduction: Reduction = "mean",
    ) -> None:
        """Check the pair and build the hint adapters.

        Args:
            teacher: a two-stage detector; with ``rcn_weight=0`` also a dense detector.
            student: a detector of the teacher's kind with the same levels and anchors.
            rpn_weight: factor of the distillation terms of the region proposal network, or of a dense head (our extension).
            rcn_weight: factor of the distillation terms of the region head.
            hint_weight: factor of the hint loss (gamma).
            lambda_box: factor of the box losses of both stages (lambda).
            mu: share of the hard class loss; the rest is the soft loss (0.5 is our choice).
            mu_end: share at the end of the training, reached linearly; None: constant.
            mix_hard: subtract the hard loss's other share, so that the detector's own class loss counts mu in total, as in the
                paper. False: only add the soft loss. Dense heads only add it, because their own loss is no cross-entropy.
            temperature: of both class distributions (the paper found higher ones worse).
            background_weight: weight of the background in the soft loss.
            object_weight: weight of the other classes in the soft loss.
            nu: factor of the bounded box loss.
            nu_end: factor at the end of the training, reached linearly; None: constant.
            margin: advance over the teacher at which the penalty of a box ends (m).
            box_norm: divisor of the bounded loss: ``positives``, or all ``sampled`` regions like the detector's box loss.
            hint: maps that are compared: ``neck``: all levels that have a partner (our extension to pyramids); ``backbone``: the
                backbone's last map.
            hint_norm: ``l2`` or ``l1``.
            hint_reduction: ``mean`` over values, or ``batch``: sum divided by images.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            PairError: the pair does not meet ``needs``, or no level has a partner.
        """
        super().__init__(teacher, student)
        check_some(self.slug, rpn_weight=rpn_weight, rcn_weight=rcn_weight, hint_weight=hint_weight)
        self.weights = {"rpn": rpn_weight, "rcn": rcn_weight, "hint": hint_weight}
        self.lambda_box, self.mix_hard, self.margin, self.box_norm = lambda_box, mix_hard, margin, box_norm
        self.mu, self.nu = (mu, mu if mu_end is None else mu_end), (nu, nu if nu_end is None else nu_end)
        self.soft = temperature, background_weight, object_weight
        self.active = _active(self.settings)
        self.hint, self.hint_norm, self.hint_reduction = hint, hint_norm, hint_reduction
        mine, theirs = student.spec, teacher.spec
        self.columns = self._columns(mine, theirs)
        self.levels = [
            (level, theirs.strides.index(stride)) for level, stride in enumerate(mine.strides) if stride in theirs.strides
        ]
        self.pairs = self._hint_pairs(teacher, student)
        self.adapters = LevelAdapters(self.pairs, always=True)

    def _columns(self, mine: DetectorSpec, theirs: DetectorSpec) -> list[int]:
        """The teacher's column of each class, if class scores are compared; else an empty list.

        Raises:
            PairError: the detectors are of different kinds, or the teacher lacks a class.
        """
        if self.active["rpn"] and mine.family != theirs.family:
            raise PairError(
                f"{self.slug}: the student {mine.name} predicts {mine.family}, the teacher {theirs.name} {theirs.family}; take "
                f"two detectors of one kind, or set {self.slug},rpn_weight=0,rcn_weight=0"
            )
        if not (self.active["rcn"] or (self.active["rpn"] and mine.family == "dense")):
            return []
        if unknown := [name for name in mine.classes if name not in theirs.classes]:
            raise PairError(f"{self.slug}: it compares class scores, but the teacher does not know {', '.join(unknown)}")
        return class_columns(mine.classes, theirs.classes, mine.softmax)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Two-stage detectors and the live teacher for the region head; equal anchors for the first stage."""
        active = _active(settings)
        below = bool(settings["hint_weight"]) and settings["hint"] == "backbone"
        families = ("regions",) if active["rcn"] else ("regions", "dense") if active["rpn"] else ()
        return Needs(
            teacher=Look(backbone=below, prediction=active["rpn"]),
            student=Look(backbone=below),
            teacher_families=families,
            student_families=families,
            teacher_capabilities=(HasRegions,) if active["rcn"] else (),
            live_teacher=(
                "its region head predicts on the student's regions, which no cache holds "
                f"({cls.slug},rcn_weight=0 learns the first stage and the hints from the cache)"
            )
            if active["rcn"]
            else "",
            same_classes=active["rcn"],
            outputs="same" if active["rcn"] or active["rpn"] else "any",
            same_cells=active["rpn"],
        )

    def _hint_pairs(self, teacher: Teacher, student: Detector) -> tuple[LevelPair, ...]:
        if not self.weights["hint"]:
            return ()
        if self.hint == "neck":
            return pair_levels(self.slug, student.spec, teacher.spec)
        mine, theirs = student.spec.backbone, teacher.spec.backbone
        if mine is None or theirs is None:
            raise PairError(f"{self.slug}: hint=backbone needs two detectors that know their backbone's channels; set hint=neck")
        return (LevelPair(0, 0, mine.channels[-1], theirs.channels[-1]),)

    @torch.no_grad()
    def teach(self, batch: Batch) -> ODKDTaught:
        """Return the maps and the first-stage prediction that the terms read."""
        look = self.requirements.teacher
        assert look is not None
        seen = self.teacher.observe(batch, look)
        first = seen.prediction.first if isinstance(seen.prediction, Regions) else seen.prediction
        assert first is None or isinstance(first, Dense)
        reads_neck = self.active["rcn"] or (self.weights["hint"] and self.hint == "neck")
        return ODKDTaught(
            seen.features if reads_neck else None,
            None if seen.backbone_features is None else seen.backbone_features.take([len(seen.backbone_features.maps) - 1]),
            None if first is None else replace(first, own=None),
        )

    # ---------------------------------------------------------------------------------------------------------- learn

    def learn(self, student: Detector, seen: Observation, taught: ODKDTaught, batch: Batch, clock: Clock) -> Losses:
        """Compute ``odkd_{rcn,rpn}_{class,box}`` and ``odkd_hint``, without terms of weight 0.

        The monitors ``{rcn,rpn}_worse`` are the shares of positives whose box loss is switched on.
        """
        mu, nu = (start + (end - start) * clock.progress for start, end in (self.mu, self.nu))
        found = []
        if self.active["rcn"]:
            found.append(self._region_head(student, seen, taught, batch, mu, nu))
        with full_precision(batch.images.device):
            if self.active["rpn"]:
                found.append(self._first_stage(student, seen, taught, batch, mu, nu))
            if self.weights["hint"]:
                found.append(Losses({"odkd_hint": self._hint(seen, taught)}))
        return Losses.merge(found)

    def _region_head(
        self, student: Detector, seen: Observation, taught: ODKDTaught, batch: Batch, mu: float, nu: float
    ) -> Losses:
        """Compute the terms of the region head on the regions that the student trains on; of a cascade, of its first stage."""
        assert isinstance(seen.prediction, Regions)
        assert taught.features is not None
        mine = seen.prediction.before_refinement()
        theirs = self.teacher.predict_regions(mine, taught.features, batch)
        with full_precision(batch.images.device):
            labels, positives = label_regions(student, mine, batch)
            used = labels != IGNORED
            hard = _mean(F.cross_entropy(mine.logits[used], labels[used], reduction="none"))
            soft = odkd_class_loss(mine.logits[used], theirs.logits[used][:, self.columns], *self.soft)
            sized = has_area(mine.boxes_xyxy[positives.index]) & has_area(positives.targets_xyxy)
            index, labels = positives.index[sized], positives.labels[sized]
            regions, theirs_labels = mine.boxes_xyxy[index], torch.tensor(self.columns, device=labels.device)[labels]
            boxes = [
                encode_boxes(given, regions, REGION_CODING)
                for given in (
                    of_class(mine.refined_xyxy[index], labels),
                    of_class(theirs.refined_xyxy[index], theirs_labels),
                    positives.targets_xyxy[sized],
                )
            ]
            return self._terms("rcn", soft, hard, boxes, int(used.sum()), mu, nu)

    def _first_stage(
        self, student: Detector, seen: Observation, taught: ODKDTaught, batch: Batch, mu: float, nu: float
    ) -> Losses:
        """Compute the terms of the first stage over the anchors that its own loss samples, or of a dense head."""
        prediction, theirs = seen.prediction, taught.first
        two_stage = isinstance(prediction, Regions)
        mine = prediction.first if isinstance(prediction, Regions) else prediction
        assert isinstance(mine, Dense)
        assert theirs is not None
        sampled = prediction.first_assignment if isinstance(prediction, Regions) else None
        assignment = student.assign(mine, batch) if sampled is None else sampled
        partners = find_partners(mine, theirs, self.levels)
        used = (assignment.matched != IGNORED) & partners.mask
        columns = slice(None) if two_stage else self.columns
        logits = partners.take(theirs.logits)[used][:, columns]
        soft = odkd_class_loss(mine.logits[used], logits, *self.soft, mine.softmax)
        hard = None
        if two_stage:
            objects = (assignment.matched >= 0)[used].to(mine.logits.dtype)
            hard = _mean(F.binary_cross_entropy_with_logits(mine.logits[used][:, 0], objects, reduction="none"))
        positives = dense_positives(mine, assignment, batch)
        priors = mine.priors_xyxy[positives.image, positives.index]
        sized = partners.mask[positives.image, positives.index] & has_area(priors) & has_area(positives.targets_xyxy)
        guesses = partners.take(theirs.boxes_xyxy)[positives.image, positives.index]
        boxes = [
            encode_boxes(given[sized], priors[sized], ANCHOR_CODING)
            for given in (positives.boxes_xyxy, guesses, positives.targets_xyxy)
        ]
        return self._terms("rpn", soft, hard, boxes, int(used.sum()), mu, nu)

    def _terms(
        self, part: str, soft: Tensor, hard: Tensor | None, boxes: Sequence[Tensor], sampled: int, mu: float, nu: float
    ) -> Losses:
        """Weight the losses of one part; ``boxes`` are the deltas of student, teacher and ground truth."""
        weight, terms, monitors = self.weights[part], {}, {}
        if self.active["class"]:
            rest = soft - hard if self.mix_hard and hard is not None else soft
            terms[f"odkd_{part}_class"] = weight * (1 - mu) * rest
        if self.active["box"]:
            student, teacher, target = boxes
            bounded = odkd_box_loss(student, teacher, target, self.margin, sampled if self.box_norm == "sampled" else None)
            terms[f"odkd_{part}_box"] = weight * self.lambda_box * nu * bounded
            monitors[f"{part}_worse"] = _mean(odkd_worse(student, teacher, target, self.margin).to(soft.dtype))
        return Losses(terms, monitors)

    def _hint(self, seen: Observation, taught: ODKDTaught) -> Tensor:
        if self.hint == "neck":
            assert taught.features is not None
            mine = [seen.features.maps[pair.student] for pair in self.pairs]
            theirs = [taught.features.maps[pair.teacher] for pair in self.pairs]
        else:
            assert seen.backbone_features is not None
            assert taught.backbone is not None
            mine, theirs = [seen.backbone_features.maps[-1]], [taught.backbone.maps[-1]]
        return self.weights["hint"] * odkd_hint_loss(self.adapters(mine), theirs, self.hint_norm, self.hint_reduction)


def _active(settings: dict[str, Any]) -> dict[str, bool]:
    """Which kinds of terms and which parts of the detector have a weight above 0 at some time of the training."""
    ends = [settings["nu"] if settings["nu_end"] is None else settings["nu_end"], settings["nu"]]
    shares = [settings["mu"] if settings["mu_end"] is None else settings["mu_end"], settings["mu"]]
    kinds = {"class": min(shares) < 1, "box": bool(settings["lambda_box"]) and max(ends) > 0}
    some = any(kinds.values())
    return kinds | {part: some and settings[f"{part}_weight"] > 0 for part in ("rpn", "rcn")}


def _mean(rows: Tensor) -> Tensor:
    """Mean of [R] (its divisor is the mean over processes); 0, connected to the graph, for no rows."""
    return rows.sum() / divisor_over_ranks(len(rows), rows)
