"""D3ETR: the student's decoder follows the teacher's, layer by layer, in what it predicts and where its queries look.

Chen et al., "D3ETR: Decoder Distillation for Detection Transformer", IJCAI 2024, arXiv 2211.09768. There is no released code.
Losses, matching costs and WEIGHTS ARE THOSE OF A RE-IMPLEMENTATION by others, for Deformable DETR; its numbers are the golden
vectors of the tests. They could not be checked against the paper. The form of cross-attention for decoders that see one dense
map (query by query) could be compared with nothing.

Shape letters: B images, L decoder layers, N student's queries, M teacher's queries, P matched pairs of an image, K classes,
H heads, S cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from detdistill.detectors.contract import Detector, DetectorSpec, HasQueries, Teacher
from detdistill.functional.classes import class_columns
from detdistill.functional.precision import full_precision
from detdistill.functional.query_seeds import (
    QueryBridge,
    QueryFormat,
    QuerySpec,
    query_gaps,
    query_spec,
)
from detdistill.methods.d3etr.loss import (
    CrossMaps,
    D3ETRQueries,
    D3ETRWeights,
    d3etr_loss,
    d3etr_match,
    d3etr_terms,
    gathered_attention,
    spread_attention,
)
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import MethodError, check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.structures import (
    SECOND,
    Assignment,
    Batch,
    Clock,
    Features,
    Look,
    Losses,
    Observation,
    Queries,
    QuerySeed,
    Taught,
)
from detdistill.structures.base import ADDED
from detdistill.values import Weight

Matching = Literal["both", "adaptive", "fixed"]


def _cells(features: Features) -> list[tuple[int, int]]:
    return [(level.shape[-2], level.shape[-1]) for level in features.maps]


@dataclass(frozen=True)
class D3ETRTaught(Taught):
    """Outputs of all layers of the teacher's decoder for its own queries."""

    logits: Tensor = field(metadata=SECOND)
    """[L, B, M, C]."""
    boxes_cxcywh01: Tensor = field(metadata=SECOND)
    """[L, B, M, 4]."""
    seed: QuerySeed
    self_attention: Tensor | None = field(default=None, metadata=SECOND)
    """[L, B, H, M, M]."""
    cross_attention: tuple[Tensor, ...] | None = None
    """Maps per level, see ``spread_attention``."""
    matched: Tensor | None = field(default=None, metadata=SECOND | ADDED)
    """[L, B, M] ground-truth box (index within its image's ``Target``) of each query, -1 for none; for the detection loss."""


class D3ETR(Method[D3ETRTaught]):
    """D3ETR between two DETRs with decoders of equal depth. Weights and class loss could not be checked, see the module.

    Adaptive matching pairs the student's queries with the teacher's by their predictions. Fixed matching decodes the teacher's
    queries with the student's decoder, beside its own queries. Both compare predictions, self-attention and cross-attention.

    The student's attention maps come from its one forward pass. Deformable decoders have no dense maps: their sampling weights
    are scattered to the cells that bilinear sampling reads (with its half-cell shift, which the re-implementation leaves out),
    and by default summed over queries. Cross-attention needs memory: L * H * N * S numbers per image.
    """

    slug = "d3etr"
    title = "D3ETR: Decoder Distillation for Detection Transformer (IJCAI 2024)"
    bibtex = """@inproceedings{chen2024d3etr,
  title={D3ETR: Decoder Distillation for Detection Transformer},
  author={Chen, Xiaokang and Chen, Jiahui and Liu, Yan and Tang, Jiaxiang and Zeng, Gang},
  booktitle={Proceedings of the International Joint Conference on Artificial Intelligence},
  year={2024}
}"""
    teach_settings = ("self_attention_weight", "cross_attention_weight", "cross_maps", "detection_weight")

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        matching: Matching = "both",
        cls_weight: Weight = 1.0,
        l1_weight: Weight = 5.0,
        giou_weight: Weight = 2.0,
        self_attention_weight: Weight = 1e4,
        cross_attention_weight: Weight = 1e3,
        cls_cost: Weight = 1.0,
        l1_cost: Weight = 5.0,
        giou_cost: Weight = 2.0,
        cross_maps: CrossMaps | None = None,
        detection_weight: Weight = 0.0,
        average_heads: bool = False,
        project: bool = False,
    ) -> None:
        """Check that the decoders can be compared.

        Args:
            teacher: a DETR.
            student: a DETR with as many decoder layers and the same kind of class outputs.
            matching: queries that are compared. ``adaptive``: student queries with the teacher queries whose predictions are
                most similar; ``fixed``: the teacher's queries, decoded by both sides; ``both``: both.
            cls_weight: weight of the class loss. All weights apply to both matchings.
            l1_weight: weight of the L1 loss.
            giou_weight: weight of the GIoU loss.
            self_attention_weight: weight of the loss on self-attention maps, which need equal numbers of heads; 0 leaves it out.
            cross_attention_weight: weight of the loss on cross-attention maps, which need equal numbers of heads and equal
                strides; 0 leaves it out.
            cls_cost: weight of the class cost in the adaptive matching.
            l1_cost: weight of the L1 distance in the adaptive matching.
            giou_cost: weight of the GIoU in the adaptive matching.
            cross_maps: compare cross-attention query by query (``each``) or summed over queries (``sum``); None: ``sum`` for
                detectors with several maps, which are deformable, else ``each``.
            detection_weight: weight of the student's detection loss on the teacher's queries in fixed matching. Their targets are
                the boxes that the teacher's own matching gave them, layer by layer, so that both sides agree on the targets. A
                summary of the paper names it; it is in no code, and off by default.
            average_heads: compare means over heads; the numbers of heads may then differ (our extension).
            project: learn layers that make the parts that the student's decoder needs and the teacher's queries lack (our
                extension, ``QueryBridge``); only for fixed matching.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0; ``detection_weight`` without fixed matching.
            PairError: softmax against sigmoid classes; decoders, maps or queries that cannot be compared.
        """
        super().__init__(teacher, student)
        self.weights = D3ETRWeights(cls_weight, l1_weight, giou_weight, self_attention_weight, cross_attention_weight)
        check_some(self.slug, **{f"{name}_weight": value for name, value in vars(self.weights).items()})
        self.matchings = [name for name in ("adaptive", "fixed") if matching in (name, "both")]
        if detection_weight and "fixed" not in self.matchings:
            raise MethodError(
                f"{self.slug}: detection_weight={detection_weight:g} is for fixed matching; set matching=both or fixed"
            )
        self.detection_weight = detection_weight
        self.costs, self.average_heads, self.project = (cls_cost, l1_cost, giou_cost), average_heads, project
        theirs, mine = teacher.spec, student.spec
        self.softmax, self.classes = mine.softmax, mine.classes
        self.columns = class_columns(mine.classes, theirs.classes, self.softmax)
        self.summed = cross_maps == "sum" or (cross_maps is None and max(len(theirs.strides), len(mine.strides)) > 1)
        self._check_strides(mine, theirs)
        assert isinstance(student, HasQueries)
        own, other = query_spec(student), teacher.queries
        self._check_maps("student", own, mine.name)
        self._check_maps("teacher", other, theirs.name)
        self._check_shape(own, other)
        self.bridge = self._bridge(other.gives, own.reads) if "fixed" in self.matchings else None

    # ------------------------------------------------------------------------------------------------------- the pair

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Two DETRs with the same classes; attention maps of both if they are compared."""
        attends = settings["self_attention_weight"] > 0 or settings["cross_attention_weight"] > 0
        return Needs(
            teacher=Look(prediction=True, attention=attends),
            student=Look(attention=attends),
            teacher_families=("queries",),
            student_families=("queries",),
            student_capabilities=(HasQueries,),
            same_classes=True,
            outputs="same",
        )

    @property
    def attends(self) -> bool:
        """Attention maps are compared."""
        return self.weights.self_attention > 0 or self.weights.cross_attention > 0

    def _check_strides(self, mine: DetectorSpec, theirs: DetectorSpec) -> None:
        """Check that cross-attention is compared on equal maps.

        Raises:
            PairError: the strides differ.
        """
        if self.weights.cross_attention and theirs.strides != mine.strides:
            raise PairError(
                f"{self.slug}: compares cross-attention on equal maps, but the strides are {theirs.strides} in teacher "
                f"{theirs.name} and {mine.strides} in student {mine.name}; set cross_attention_weight=0"
            )

    def _check_maps(self, side: str, queries: QuerySpec, name: str) -> None:
        """Whether one decoder shows the maps that are compared.

        Raises:
            PairError: it does not.
        """
        shown = {"self_attention": queries.self_attention, "cross_attention": queries.cross_attention}
        for kind, there in shown.items():
            if getattr(self.weights, kind) and not there:
                reason = queries.no_attention.partition("; ")[0]  # a detector's refusal may end in a remedy of its own
                raise PairError(
                    f"{self.slug}: the {side} {name} shows no {kind} maps of its features: {reason}; take a DETR that shows "
                    f"them, or set {kind}_weight=0"
                )

    def _check_shape(self, mine: QuerySpec, theirs: QuerySpec) -> None:
        """The teacher's decoder against the student's.

        Raises:
            PairError: other numbers of layers or heads.
        """
        if theirs.layers != mine.layers:
            raise PairError(
                f"{self.slug}: compares decoders layer by layer, but the teacher {self.teacher.spec.name} has {theirs.layers} "
                f"layers and the student {mine.layers}; add decoder={theirs.layers} to the student's name, or take a method that "
                f"compares all layers with the teacher's last"
            )
        if self.attends and theirs.heads != mine.heads and not self.average_heads:
            raise PairError(
                f"{self.slug}: compares attention maps head by head, but the teacher {self.teacher.spec.name} has {theirs.heads} "
                f"heads and the student {mine.heads}; set average_heads=true, or "
                f"self_attention_weight=0,cross_attention_weight=0"
            )

    def _bridge(self, gives: QueryFormat, reads: QueryFormat) -> QueryBridge:
        """The teacher's queries as the student reads them.

        Raises:
            PairError: the student reads something that they lack, and nothing may be learned.
        """
        gaps = query_gaps(gives, reads)
        if gaps and not self.project:
            raise PairError(
                f"{self.slug}: in fixed matching the student's decoder reads {' and '.join(gaps)}, which the queries of the "
                f"teacher {self.teacher.spec.name} lack; set matching=adaptive, or project=true to learn them"
            )
        return QueryBridge(gives, reads)

    # ---------------------------------------------------------------------------------------------------------- teach

    @torch.no_grad()
    def teach(self, batch: Batch) -> D3ETRTaught:
        """All decoder layers, with attention maps if they are compared."""
        assert self.requirements.teacher is not None
        observed = self.teacher.observe(batch, self.requirements.teacher)
        found = cast(Queries, observed.prediction)
        cross = None
        if self.weights.cross_attention and found.attention is not None:
            cross = spread_attention(found.attention, _cells(observed.features), self.summed)
        return D3ETRTaught(
            found.logits,
            found.boxes_cxcywh01,
            QuerySeed(found.seed.content, found.seed.position, found.seed.reference),
            found.self_attention if self.weights.self_attention else None,
            cross,
            self.teacher.assign(found, batch, self.columns[: len(self.classes)]).matched if self.detection_weight else None,
        )

    # ---------------------------------------------------------------------------------------------------------- learn

    def learn(self, student: Detector, seen: Observation, taught: D3ETRTaught, batch: Batch, clock: Clock) -> Losses:
        """Terms ``adaptive_*`` and ``fixed_*``, and ``fixed_detection`` with ``detection_weight``."""
        fixed = self._decode(student, seen.features, taught, batch)
        terms: dict[str, Tensor] = {}
        with full_precision(batch.images.device):
            theirs = self._theirs(taught, seen.features)
            for matching in self.matchings:
                mine = self._mine(cast(Queries, seen.prediction if fixed is None or matching == "adaptive" else fixed))
                match = None if matching == "fixed" else d3etr_match(mine, theirs, self.costs, self.softmax)
                found = d3etr_loss(d3etr_terms(mine, theirs, match, self.softmax), self.weights)
                terms |= {f"{matching}_{name}": value for name, value in found.items()}
            if self.detection_weight and fixed is not None:
                assert taught.matched is not None
                found_boxes = student.loss(fixed, batch, Assignment(taught.matched)).total()
                terms["fixed_detection"] = self.detection_weight * found_boxes
        return Losses(terms)

    def _decode(self, student: Detector, features: Features, taught: D3ETRTaught, batch: Batch) -> Queries | None:
        """What the student's decoder makes of the teacher's queries; None without fixed matching."""
        if self.bridge is None:
            return None
        assert isinstance(student, HasQueries)
        with full_precision(batch.images.device):
            seed: QuerySeed = self.bridge(taught.seed)
        return student.decode(features, seed, batch, attention=self.attends).float()

    def _theirs(self, taught: D3ETRTaught, features: Features) -> D3ETRQueries:
        cross = None if taught.cross_attention is None else gathered_attention(taught.cross_attention, _cells(features))
        logits = taught.logits[..., self.columns]
        return self._with_heads(D3ETRQueries(logits, taught.boxes_cxcywh01, taught.self_attention, cross))

    def _mine(self, found: Queries) -> D3ETRQueries:
        cross = None
        if self.weights.cross_attention and found.attention is not None:
            cross = found.attention.sum(dim=3) if self.summed else found.attention
        among = found.self_attention if self.weights.self_attention else None
        return self._with_heads(D3ETRQueries(found.logits, found.boxes_cxcywh01, among, cross))

    def _with_heads(self, queries: D3ETRQueries) -> D3ETRQueries:
        if not self.average_heads:
            return queries
        maps = [None if m is None else m.mean(dim=2, keepdim=True) for m in (queries.self_attention, queries.cross_attention)]
        return queries._replace(self_attention=maps[0], cross_attention=maps[1])
