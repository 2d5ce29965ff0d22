"""KD-DETR: teacher and student decode the same queries (the teacher's and random ones) and should predict the same.

Wang et al., "KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points Sampling", CVPR
2024, arXiv 2211.08071. Defaults are those of the code released for DAB-DETR. Its class loss is a sum over images and
queries, which grows with the batch; its box losses are weighted means.

The paper calls the decoded queries distillation points: specific points are the teacher's own queries, general points are
random queries.

Shape letters: B images, L decoder layers, N queries of a group, C class outputs, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from detdistill.detectors.contract import Detector, HasQueries, Teacher
from detdistill.functional.classes import class_columns
from detdistill.functional.counting import mean_over_ranks
from detdistill.functional.precision import full_precision
from detdistill.functional.query_seeds import (
    QueryBridge,
    QuerySpec,
    giou_with_eps,
    query_gaps,
    query_spec,
    random_queries,
)
from detdistill.functional.soft_targets import kl_divergence
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.structures import Batch, Clock, Look, Losses, Observation, Queries, QuerySeed, Taught
from detdistill.values import Index, Positive, Weight

ClassReduction = Literal["sum", "weighted_mean"]
GENERAL_POINTS = 300
"""Default number of random queries; the paper tried 10 to 900."""


class KDDETRTerms(NamedTuple):
    """The unweighted losses of one group of queries, [L] each: every student layer against the teacher's last layer."""

    cls: Tensor
    l1: Tensor
    giou: Tensor


def kd_detr_weights(teacher_logits: Tensor, softmax: bool = False) -> Tensor:
    """Weight of each query, [B, N] (foreground rebalance): the teacher's highest class score, without gradient.

    Args:
        teacher_logits: [B, N, C] of the teacher's last layer.
        softmax: the outputs are softmax logits with the background last (our addition; the paper's DETRs use sigmoids).
    """
    scores = teacher_logits.softmax(dim=-1)[..., :-1] if softmax else teacher_logits.sigmoid()
    return scores.amax(dim=-1).detach()


def kd_detr_terms(
    student_logits: Tensor,
    student_boxes_cxcywh01: Tensor,
    teacher_logits: Tensor,
    teacher_boxes_cxcywh01: Tensor,
    weights: Tensor,
    temperature: float = 10.0,
    cls_reduction: ClassReduction = "sum",
) -> KDDETRTerms:
    """Losses of one group of queries in every student layer.

    With the weights w, and the softmax over all C outputs at temperature T of teacher (p) and student (s):
    ``cls = sum w * T^2 / C * sum_c p (log p - log s)``, ``l1 = sum w * mean_4 |b - b_T| / sum w`` and
    ``giou = sum w * (1 - GIoU) / sum w``, all sums over images and queries.

    Args:
        student_logits: [L, B, N, C]; gradient flows.
        student_boxes_cxcywh01: [L, B, N, 4]; gradient flows.
        teacher_logits: [B, N, C] of the teacher's last layer, treated as constant.
        teacher_boxes_cxcywh01: [B, N, 4] of the teacher's last layer, treated as constant.
        weights: [B, N] weights of the queries (``kd_detr_weights``), treated as constant.
        temperature: of both class distributions.
        cls_reduction: ``sum``: the formula above, as released. ``weighted_mean``: divided by ``sum w`` instead of C, like the
            box losses.

    Example:
        >>> logits, boxes = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[0.5, 0.5, 0.2, 0.2]]]])
        >>> terms = kd_detr_terms(logits, boxes, logits[0], boxes[0], torch.ones(1, 1))
        >>> terms.cls.tolist(), terms.l1.tolist(), bool(terms.giou < 1e-3)
        ([0.0], [0.0], True)
    """
    fixed_boxes, w = teacher_boxes_cxcywh01.detach(), weights.detach()
    divergence = kl_divergence(student_logits, teacher_logits, temperature)  # [L, B, N]
    total = mean_over_ranks(w.sum(), least=torch.finfo(w.dtype).tiny)
    divisor = student_logits.shape[-1] if cls_reduction == "sum" else total
    distance = (student_boxes_cxcywh01 - fixed_boxes).abs().mean(dim=-1)
    apart = 1 - giou_with_eps(student_boxes_cxcywh01, fixed_boxes)
    return KDDETRTerms(
        cls=(w * divergence).sum(dim=(1, 2)) / divisor,
        l1=(w * distance).sum(dim=(1, 2)) / total,
        giou=(w * apart).sum(dim=(1, 2)) / total,
    )


def kd_detr_loss(terms: KDDETRTerms, cls_weight: float = 1.0, l1_weight: float = 5.0, giou_weight: float = 2.0) -> Tensor:
    """Loss of one group of queries, []: the weighted sum over terms and layers."""
    return cls_weight * terms.cls.sum() + l1_weight * terms.l1.sum() + giou_weight * terms.giou.sum()


@dataclass(frozen=True)
class KDDETRTaught(Taught):
    """A group of the teacher's queries with the predictions of its last layer."""

    logits: Tensor
    """[B, N, C]."""
    boxes_cxcywh01: Tensor
    """[B, N, 4]."""
    seed: QuerySeed
    """The initial queries."""


class KDDETR(Method[KDDETRTaught | None]):
    """KD-DETR between two DETRs; their backbones, encoders, depths and numbers of queries may differ.

    Both detectors decode two further groups of queries. Specific points are the teacher's initial queries. General points are
    random queries, drawn anew in each step and shared by all images. Groups do not attend to each other. ``project`` bridges
    differences between the queries of two families (widths, positions, points or boxes).
    """

    slug = "kd_detr"
    title = "KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points Sampling (CVPR 2024)"
    bibtex = """@inproceedings{wang2024kddetr,
  title={KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points Sampling},
  author={Wang, Yu and Li, Xin and Weng, Shengzhao and Zhang, Gang and Yue, Haixiao and Feng, Haocheng and Han, Junyu
    and Ding, Errui},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2024}
}"""
    teach_settings = ("specific_points",)
    teaches_parts = True

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        temperature: Positive = 10.0,
        cls_weight: Weight = 1.0,
        l1_weight: Weight = 5.0,
        giou_weight: Weight = 2.0,
        specific_points: bool = True,
        general_points: Index = GENERAL_POINTS,
        rebalance: bool = True,
        cls_reduction: ClassReduction = "sum",
        project: bool = False,
    ) -> None:
        """Check that the student can decode the teacher's queries.

        Args:
            teacher: a DETR.
            student: a DETR with the same kind of class outputs.
            temperature: of both class distributions (T).
            cls_weight: factor of the class loss, in both groups of queries.
            l1_weight: factor of the L1 loss, in both groups.
            giou_weight: factor of the GIoU loss, in both groups.
            specific_points: decode the teacher's queries. Its predictions for them can come from a cache.
            general_points: number of random queries; 0 turns them off. They need the live teacher in each step.
            rebalance: weight queries by the teacher's highest class score; False: all queries count equally.
            cls_reduction: reduction of the class loss. ``sum``: over images and queries, divided by the number of class outputs,
                as released; ``weighted_mean``: weighted mean over queries, like the box losses. It is part of the terms' names.
            project: train projections for the parts that the student's decoder reads and the teacher's queries lack
                (``QueryBridge``). Not in the paper, which uses one family, or a similar bridge to a CNN.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            PairError: neither specific nor general points; softmax classes on one side and sigmoid on the other; a class loss
                with one class only, whose softmax is always 1; queries that the student cannot decode; general points
                without a live teacher.
        """
        super().__init__(teacher, student)
        check_some(self.slug, cls_weight=cls_weight, l1_weight=l1_weight, giou_weight=giou_weight)
        if not (general_points or specific_points):
            raise PairError(f"{self.slug}: specific_points=false and general_points=0 leave no points to distil; turn one on")
        self.temperature, self.cls_reduction, self.rebalance = temperature, cls_reduction, rebalance
        self.weights = {"cls": cls_weight, "l1": l1_weight, "giou": giou_weight}
        self.specific_points, self.general_points, self.project = specific_points, general_points, project
        mine = student.spec
        self.softmax = mine.softmax
        self.columns = class_columns(mine.classes, teacher.spec.classes, self.softmax)
        if cls_weight and len(self.columns) == 1:
            raise PairError(
                f"{self.slug}: a softmax over one class ({mine.classes[0]}) is always 1, so the class terms would be zero; "
                f"set {self.slug},cls_weight=0"
            )
        assert isinstance(student, HasQueries)
        self.reads, self.gives = query_spec(student).reads, teacher.queries.gives
        if general_points:
            self._check_general(teacher.queries)
        self.bridge = self._bridge()

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Two DETRs with equal classes; the general points also need the live teacher, which a cache cannot replace."""
        general_points = settings["general_points"]
        why = (
            "the general points are random queries that the live teacher decodes anew in each step, which a cache does not hold "
            f"({cls.slug},general_points=0 turns them off; the specific points learn from the cache)"
        )
        return Needs(
            teacher=Look(prediction=True),
            teacher_families=("queries",),
            student_families=("queries",),
            student_capabilities=(HasQueries,),
            teacher_capabilities=(HasQueries,) if general_points else (),
            live_teacher=why if general_points else "",
            same_classes=True,
            outputs="same",
        )

    def _check_general(self, own: QuerySpec) -> None:
        """Check that both sides give a random query the same reference point.

        Raises:
            PairError: the teacher derives reference points from positions, and the student reads them as an input.
        """
        if self.reads.reference and own.gives.reference and not own.reads.reference:
            raise PairError(
                f"{self.slug}: the teacher {self.teacher.spec.name} derives its reference points from position embeddings, so "
                f"random ones cannot be shared with a student that reads references; set general_points=0"
            )

    def _bridge(self) -> QueryBridge:
        """Build the conversion of the teacher's queries to the student's format.

        Raises:
            PairError: the student reads a part that these queries lack, and ``project`` is off.
        """
        gaps = query_gaps(self.gives, self.reads)
        if gaps and not self.project:
            raise PairError(
                f"{self.slug}: the student's decoder reads {' and '.join(gaps)}, which the queries of the teacher "
                f"{self.teacher.spec.name} lack; set {self.slug},project=true to learn them, or take a student of the teacher's "
                f"family and width"
            )
        return QueryBridge(self.gives, self.reads)

    @torch.no_grad()
    def teach(self, batch: Batch) -> KDDETRTaught | None:
        """Return the specific points with the teacher's predictions; None if ``specific_points`` is off."""
        if not self.specific_points:
            return None
        prediction = self.teacher.observe(batch, Look(prediction=True)).prediction
        assert isinstance(prediction, Queries)
        seed = QuerySeed(prediction.seed.content, prediction.seed.position, prediction.seed.reference)
        return KDDETRTaught(prediction.logits[-1], prediction.boxes_cxcywh01[-1], seed)

    def learn(self, student: Detector, seen: Observation, taught: KDDETRTaught | None, batch: Batch, clock: Clock) -> Losses:
        """Compute the terms ``specific_*`` and ``general_*``, without those of weight 0; monitors: mean weight of each group."""
        assert isinstance(student, HasQueries)
        terms: dict[str, Tensor] = {}
        monitors: dict[str, Tensor] = {}
        groups = {"specific": taught, "general": self._general(batch) if self.general_points else None}
        for group, theirs in groups.items():
            if theirs is None:
                continue
            with full_precision(batch.images.device):
                seed = self.bridge(theirs.seed)
            mine = student.decode(seen.features, seed, batch).float()
            with full_precision(batch.images.device):
                logits = theirs.logits[..., self.columns]
                weights = kd_detr_weights(logits, self.softmax)
                found = kd_detr_terms(
                    mine.logits,
                    mine.boxes_cxcywh01,
                    logits,
                    theirs.boxes_cxcywh01,
                    weights if self.rebalance else torch.ones_like(weights),
                    self.temperature,
                    self.cls_reduction,
                )
            for name, value in ((name, value) for name, value in found._asdict().items() if self.weights[name]):
                shown = f"{name}_{self.cls_reduction}" if name == "cls" else name
                terms[f"{group}_{shown}"] = self.weights[name] * value.sum()
            monitors[f"{group}_weight"] = weights.mean()
        return Losses(terms, monitors)

    @torch.no_grad()
    def _general(self, batch: Batch) -> KDDETRTaught:
        """Draw random queries and decode them with the live teacher."""
        decoder = self.teacher.detector
        assert isinstance(decoder, HasQueries)
        features = self.teacher.observe(batch).features.float()
        seed = random_queries(self.gives, self.general_points, like=features.maps[0])
        decoded = decoder.decode(features, seed, batch).float()
        return KDDETRTaught(decoded.logits[-1], decoded.boxes_cxcywh01[-1], seed)
