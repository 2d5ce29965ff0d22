"""CrossKD: maps from inside the student's head run through the rest of the teacher's head, whose results should not change.

Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", arXiv 2306.11369, CVPR 2024. The predictions that
the teacher's head makes from the student's maps are compared with the teacher's own. So the student's own outputs learn from
labels only, and the two targets, which may contradict each other, do not meet in one layer.

Shape letters: B images, L levels, P predictions of an image, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from detdistill.detectors.contract import Detector, DetectorSpec, HasTowers, Teacher
from detdistill.functional.boxes import centerness_target
from detdistill.functional.classes import class_columns
from detdistill.functional.counting import EPSILON, label_weights, mean_over_ranks, number_of_positives
from detdistill.functional.dense_maps import find_partners, only_parts
from detdistill.functional.precision import full_precision
from detdistill.methods.crosskd.loss import (
    crosskd_align,
    crosskd_box_loss,
    crosskd_centerness_loss,
    crosskd_class_loss,
    crosskd_distribution_loss,
    crosskd_moments,
    crosskd_scores,
)
from detdistill.methods.shared.align import LevelAdapters, check_same_anchors, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.structures import Assignment, Batch, Clock, Dense, Look, Losses, Observation, Taught, Tower
from detdistill.values import Index, Limits, Positive, Weight

Profile = Literal["gfl", "retinanet", "atss", "fcos"]
BoxLoss = Literal["distribution", "giou", "log_iou"]
Normalizer = Literal["positives", "centerness"]


class _Published(NamedTuple):
    depth: int
    cls: float
    box: float
    centerness: float
    box_loss: BoxLoss
    normalizer: Normalizer


_PROFILES: dict[Profile, _Published] = {
    "gfl": _Published(3, 1.0, 4.0, 0.0, "distribution", "positives"),
    "retinanet": _Published(3, 1.0, 1.0, 0.0, "giou", "positives"),
    "atss": _Published(3, 1.0, 1.0, 1.0, "giou", "positives"),
    "fcos": _Published(2, 0.4, 0.75, 0.0, "log_iou", "centerness"),
}


@dataclass(frozen=True)
class CrossKDTaught(Taught):
    """The teacher's prediction, and moments of its inner maps; both branches (classes, boxes) lie along the second dimension."""

    prediction: Dense
    counts: Tensor
    """[B, L] cells of each level."""
    means: tuple[Tensor, ...]
    """For each level [B, 2, C]."""
    squares: tuple[Tensor, ...]
    """For each level [B, 2, C] sums of squared differences from the mean."""


class CrossKD(Method[CrossKDTaught]):
    """CrossKD between dense detectors whose heads have towers; the teacher's head runs live on the student's maps.

    The student's kind of head may differ from the teacher's, because all compared numbers are outputs of the teacher's head.
    Label weights and numbers of positives are those of the student's assignment.

    Maps are held after the ReLU of a block: the released code stores them before, but its ReLU works in place. Moments are
    those of the local batch, padding included, as released.
    """

    slug = "crosskd"
    title = "CrossKD: Cross-Head Knowledge Distillation for Object Detection (CVPR 2024)"
    bibtex = """@inproceedings{wang2024crosskd,
  title={CrossKD: Cross-Head Knowledge Distillation for Object Detection},
  author={Wang, Jiabao and Chen, Yuming and Zheng, Zhaohui and Li, Xiang and Cheng, Ming-Ming and Hou, Qibin},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2024}
}"""
    teach_settings = ("profile", "depth")

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        profile: Profile | None = None,
        depth: Index | None = None,
        cls_weight: Weight | None = None,
        box_weight: Weight | None = None,
        centerness_weight: Weight | None = None,
        box_loss: BoxLoss | None = None,
        normalizer: Normalizer | None = None,
        beta: Annotated[float, Limits(1)] = 1.0,
        temperature: Positive = 1.0,
        adapt: bool = False,
    ) -> None:
        """Check that the teacher's head can continue from the student's maps.

        Args:
            teacher: a dense detector with towers and sigmoid classes that knows the student's classes; it is run in each step.
            student: a dense detector with towers, the teacher's strides and anchors.
            profile: which released settings to use. None: ``gfl`` for teachers with distributions, ``retinanet`` for several
                anchors of a cell, else ``atss``. Give ``fcos`` for FCOS.
            depth: number of blocks of the student's towers before its maps are handed over; 0: the neck's maps. None: the
                profile's (3; ``fcos`` 2; of 4 blocks).
            cls_weight: factor of the class loss; None: the profile's.
            box_weight: factor of the box loss; None: the profile's.
            centerness_weight: factor of the centerness loss; None: the profile's, if the teacher predicts centerness.
            box_loss: ``distribution``: divergence of the sides' distributions. ``giou``, ``log_iou``: of decoded boxes. None:
                the profile's.
            normalizer: divisor of all losses but ``distribution``. ``positives``: the number of positives (each image counts at
                least 1). ``centerness``: the sum of their centerness targets. None: the profile's.
            beta: exponent of the difference of scores in the class loss.
            temperature: of ``distribution``.
            adapt: train 1x1 convolutions on the student's inner maps if the channels differ (not in the paper); False: such
                pairs are refused.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            PairError: a detector without towers, or with too few blocks; other strides, anchors, channels or class outputs; a
                class that the teacher lacks; ``distribution`` without distributions.
        """
        super().__init__(teacher, student)
        mine, theirs = student.spec, teacher.spec
        self.profile: Profile = profile or _profile_of(theirs)
        published = _PROFILES[self.profile]
        self.depth = published.depth if depth is None else depth
        self.weights = {
            "cls": published.cls if cls_weight is None else cls_weight,
            "box": published.box if box_weight is None else box_weight,
            "centerness": published.centerness if centerness_weight is None else centerness_weight,
        }
        check_some(self.slug, **{f"{name}_weight": weight for name, weight in self.weights.items()})
        self.box_loss: BoxLoss = box_loss or published.box_loss
        self.normalizer: Normalizer = normalizer or published.normalizer
        self.beta, self.temperature = beta, temperature
        self.wants_centerness = centerness_weight is not None
        self._check_heads(mine, theirs)
        self.columns = class_columns(mine.classes, theirs.classes, softmax=False)
        self.pairs = pair_levels(self.slug, mine, theirs)
        if not adapt and (differ := [p for p in self.pairs if p.student_channels != p.teacher_channels]):
            raise PairError(
                f"{self.slug}: the teacher's head reads {differ[0].teacher_channels} channels, the student's maps have "
                f"{differ[0].student_channels}; build the student with the teacher's neck width, or set {self.slug},adapt=true"
            )
        self.class_adapters = LevelAdapters(self.pairs, shared=True)
        self.box_adapters = LevelAdapters(self.pairs, shared=True)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Two dense detectors with towers, the same cells and anchors, sigmoid scores of the same classes; the teacher itself."""
        depth = settings["depth"]
        if depth is None:
            depth = _PROFILES[settings["profile"] or "gfl"].depth  # all profiles but fcos have the same
        return Needs(
            teacher=Look(towers=(depth,), prediction=True),
            student=Look(towers=(depth,)),
            teacher_families=("dense",),
            student_families=("dense",),
            teacher_capabilities=(HasTowers,),
            same_classes=True,
            outputs="sigmoid",
            same_cells=True,
            same_anchors=True,
        )

    def _check_heads(self, mine: DetectorSpec, theirs: DetectorSpec) -> None:
        """Check levels and coding.

        Raises:
            PairError: they do not fit.
        """
        if mine.strides != theirs.strides:
            raise PairError(
                f"{self.slug}: the teacher's head runs on the student's maps, so both need the same levels, but the student "
                f"{mine.name} has strides {mine.strides}, the teacher {theirs.name} {theirs.strides}; build them with equal "
                f"levels="
            )
        wanted = self.weights["centerness"] and self.wants_centerness
        if wanted and theirs.coding is not None and not theirs.coding.quality:
            raise PairError(self._no_centerness())
        if self.weights["box"] and self.box_loss == "distribution" and not theirs.box_bins:
            raise PairError(
                f"{self.slug}: the teacher {theirs.name} predicts each box side as one number, not as a distribution; set "
                f"{self.slug},box_loss=giou, or another profile="
            )

    def _no_centerness(self) -> str:
        return f"{self.slug}: the teacher {self.teacher.spec.name} predicts no centerness; set {self.slug},centerness_weight=0"

    # --------------------------------------------------------------------------------------------------------- the teacher

    @torch.no_grad()
    def teach(self, batch: Batch) -> CrossKDTaught:
        """Return the teacher's outputs, and moments of its inner maps instead of the maps."""
        seen = self.teacher.observe(batch, self.requirements.teacher or Look())
        assert isinstance(seen.prediction, Dense)
        hidden = seen.tower(self.depth)
        counts, means, squares = [], [], []
        with full_precision(batch.images.device):
            for branches in zip(hidden.classification, hidden.regression, strict=True):
                both = [level.float().flatten(2) if level.dtype.itemsize < 4 else level.flatten(2) for level in branches]
                mean = [level.mean(dim=2) for level in both]
                square = [(level - m[..., None]).square().sum(dim=2) for level, m in zip(both, mean, strict=True)]
                counts.append(mean[0].new_full((len(batch),), both[0].shape[2]))
                means.append(torch.stack(mean, dim=1))
                squares.append(torch.stack(square, dim=1))
        several = max(self.teacher.spec.anchors) > 1
        parts = ["quality", *(["deltas"] if self.teacher.spec.box_bins else []), *(["priors_xyxy"] if several else [])]
        prediction = only_parts(seen.prediction, *cast(Sequence[Any], parts))
        return CrossKDTaught(prediction, torch.stack(counts, dim=1), tuple(means), tuple(squares))

    # --------------------------------------------------------------------------------------------------------- the student

    def learn(self, student: Detector, seen: Observation, taught: CrossKDTaught, batch: Batch, clock: Clock) -> Losses:
        """Compute the terms ``crosskd_cls``, ``crosskd_box`` and ``crosskd_centerness``; terms of weight 0 are left out.

        Raises:
            PairError: what the detectors' descriptions do not state: places of anchors (see ``check_same_anchors``), or that a
                detector from elsewhere has no centerness.
        """
        mine, teacher = seen.prediction, self.teacher.detector
        assert isinstance(mine, Dense)
        assert isinstance(teacher, HasTowers)
        with full_precision(batch.images.device):
            hidden = self._aligned(seen.tower(self.depth), taught)
        cross = teacher.finish(hidden, batch).float()  # in the run's precision
        with full_precision(batch.images.device):
            with torch.no_grad():
                if max(student.spec.anchors) > 1:
                    check_same_anchors(self.slug, mine, taught.prediction, find_partners(mine, taught.prediction))
                assignment = student.assign(mine, batch)
                divisor = self._divisor(student, mine, assignment, batch)
                own = find_partners(cross, mine)
                weights = own.take(label_weights(assignment, mine.logits))
                positive = own.take(assignment.matched >= 0)
            return Losses(self._terms(cross, taught.prediction, weights, positive, divisor))

    def _aligned(self, hidden: Tower, taught: CrossKDTaught) -> Tower:
        """The student's inner maps with the teacher's moments."""
        sides = [self.class_adapters(hidden.classification), self.box_adapters(hidden.regression)]
        aligned = []
        for branch, maps in enumerate(sides):
            levels = []
            for level, (mine, means, squares) in enumerate(zip(maps, taught.means, taught.squares, strict=True)):
                moments = crosskd_moments(taught.counts[:, level], means[:, branch], squares[:, branch])
                levels.append(crosskd_align(mine, moments, rectify=self.depth > 0))
            aligned.append(tuple(levels))
        return replace(hidden, classification=aligned[0], regression=aligned[1])

    def _divisor(self, student: Detector, mine: Dense, assignment: Assignment, batch: Batch) -> Tensor:
        """[] N of the losses."""
        if self.normalizer == "positives":
            return number_of_positives(assignment, mine.logits)
        positives = student.positives(mine, assignment, batch)
        priors = mine.priors_xyxy[positives.image, positives.index]
        central = centerness_target((priors[:, :2] + priors[:, 2:]) / 2, positives.targets_xyxy)
        return mean_over_ranks(central.sum().to(mine.logits.dtype), least=1e-6) + EPSILON

    def _terms(self, cross: Dense, fixed: Dense, weights: Tensor, positive: Tensor, divisor: Tensor) -> dict[str, Tensor]:
        """The weighted losses of the predictions that both sides have."""
        partners = find_partners(cross, fixed)
        weights, positive = weights * partners.mask, positive & partners.mask
        logits = partners.take(fixed.logits)[..., self.columns]
        scores = crosskd_scores(logits, weights)
        found: dict[str, Tensor] = {}
        if self.weights["cls"]:
            found["cls"] = crosskd_class_loss(cross.logits[..., self.columns], logits, weights, divisor, self.beta)
        if self.weights["box"] and self.box_loss == "distribution":
            sides = cross.deltas.unflatten(-1, (4, -1)), partners.take(fixed.deltas).unflatten(-1, (4, -1))
            found["box"] = crosskd_distribution_loss(*sides, scores, self.temperature)
        elif self.weights["box"]:
            boxes = partners.take(fixed.boxes_xyxy)
            kind = cast(Literal["giou", "log_iou"], self.box_loss)
            found["box"] = crosskd_box_loss(cross.boxes_xyxy, boxes, scores, divisor, kind)
        if self.weights["centerness"] and cross.quality is not None and fixed.quality is not None:
            quality = partners.take(fixed.quality)[positive]
            found["centerness"] = crosskd_centerness_loss(cross.quality[positive], quality, divisor)
        elif self.weights["centerness"] and self.wants_centerness:
            # Refused before the first image where the description states it; of a detector from elsewhere only this shows it.
            raise PairError(self._no_centerness())
        return {f"crosskd_{name}": self.weights[name] * term for name, term in found.items()}


def _profile_of(teacher: DetectorSpec) -> Profile:
    """The profile that fits a teacher's outputs."""
    if teacher.box_bins:
        return "gfl"
    return "retinanet" if max(teacher.anchors) > 1 else "atss"
