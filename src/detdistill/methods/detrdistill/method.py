"""DETRDistill: a DETR learns from another DETR's predictions, its features under a mask made of its queries, and its queries.

Chang, Wang, Xu, Chen, Yang, Zhao, "DETRDistill: A Universal Knowledge Distillation Framework for DETR-families", ICCV 2023,
arXiv 2211.10156. Only the part for Deformable DETR was released, and it differs from the paper in places. The defaults are
those of the code with two exceptions: queries are decoded under the teacher's assignment, as in the paper (the code computes
it but does not use it), and the contrastive term, which is not in the paper, is off.

Shape letters: B images, L decoder layers, N student's queries, M teacher's queries, K classes, D width, G boxes of an image.
Boxes of queries are cxcywh in parts of the valid image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from detdistill.detectors.contract import Detector, DetectorSpec, HasMapsBeforeEncoder, HasQueries, Teacher
from detdistill.functional.classes import class_columns
from detdistill.functional.precision import full_precision
from detdistill.functional.query_seeds import QueryFormat, QuerySpec, query_spec
from detdistill.methods.detrdistill.loss import (
    LogitsTerms,
    LogitsWeights,
    detrdistill_contrastive_loss,
    detrdistill_feature_loss,
    detrdistill_layers,
    detrdistill_logits_loss,
    detrdistill_masks,
    detrdistill_match,
    detrdistill_quality,
    detrdistill_quality_weights,
    detrdistill_query_weights,
    detrdistill_split_loss,
)
from detdistill.methods.detrdistill.parts import ContrastiveHead, DETRDistillTaught
from detdistill.methods.shared.align import LevelAdapters, PairedMaps, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.structures import (
    Assignment,
    Batch,
    Clock,
    Features,
    Look,
    Losses,
    Observation,
    Queries,
    QuerySeed,
)
from detdistill.values import Count, Fraction, Positive, Weight


class DETRDistill(Method[DETRDistillTaught]):
    """DETRDistill between two DETRs.

    Pairs that each term supports:

    - Predictions: any two with sigmoid classes, of any depth and number of queries. The teacher must have the student's
      classes, compared by name. DETR's softmax classes are refused.
    - Features: levels of common stride, as in all methods. If channels differ, each student level gets a 1x1 convolution. The
      teacher's embeddings must be as wide as its features, as in all DETRs but RT-DETRs with a wider encoder.
    - Assignment: the student's decoder takes the teacher's queries as they are, so both must have the same format: content of
      the same width, positions on both sides or on neither, references of the same kind (points, boxes, none). Deformable
      and Conditional DETR have content, position and point (two-stage Deformable DETR: box); AdaMixer, DAB-DETR, RT-DETR,
      RT-DETRv2 and D-FINE content and box. A student that computes its points from positions computes them from the teacher's
      positions. Other pairs are refused; ``assignment_weight=0`` leaves the term out.

    The paper's pairs are of one kind (Deformable DETR, Conditional DETR, AdaMixer). Features are those of the encoder, as in
    the paper; the released code takes the maps before it (``tap="neck"``).
    """

    slug = "detrdistill"
    title = "DETRDistill: A Universal Knowledge Distillation Framework for DETR-families (ICCV 2023)"
    bibtex = """@inproceedings{chang2023detrdistill,
  title={DETRDistill: A Universal Knowledge Distillation Framework for DETR-families},
  author={Chang, Jiahao and Wang, Shuo and Xu, Hai-Ming and Chen, Zehui and Yang, Chenhongyi and Zhao, Feng},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2023}
}"""
    teach_settings = ("tap",)

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        logits_weight: Weight = 1.0,
        cls_weight: Weight = 1.0,
        l1_weight: Weight = 5.0,
        giou_weight: Weight = 2.0,
        cls_cost: Weight = 1.0,
        l1_cost: Weight = 5.0,
        giou_cost: Weight = 2.0,
        split: bool = False,
        progressive: bool = True,
        feature_weight: Weight | None = None,
        mask: Literal["released", "paper"] = "released",
        max_per_img: Count = 100,
        mask_floor: Positive = 0.01,
        gamma: Fraction = 0.5,
        levels: Sequence[int] | None = None,
        tap: Literal["encoder", "neck"] = "encoder",
        assignment_weight: Weight = 1.0,
        assignment: Literal["teacher", "self"] = "teacher",
        contrastive_weight: Weight = 0.0,
        temperature: Positive = 0.07,
        contrastive_width: Count = 512,
    ) -> None:
        """Check that both decoders' queries have compatible formats, and pair the levels.

        Args:
            teacher: a DETR with sigmoid classes.
            student: a DETR with sigmoid classes.
            logits_weight: weight of the prediction loss (the paper's lambda 1); 0 leaves it out, as with the other terms.
            cls_weight: weight of the cross-entropy with the teacher's scores in the prediction loss.
            l1_weight: weight of the L1 distance in the prediction loss.
            giou_weight: weight of the GIoU loss in the prediction loss.
            cls_cost: weight of the cross-entropy in the matching cost.
            l1_cost: weight of the L1 distance in the matching cost.
            giou_cost: weight of the GIoU in the matching cost.
            split: match the teacher's positive and negative queries separately, as in the paper; the released code does not.
            progressive: student layers follow successive teacher layers; False: every student layer follows the teacher's last.
            feature_weight: weight of the feature loss (lambda 2); None: 1 with the released mask, 20 with the paper's.
            mask: ``released``: cosines with the best queries, scaled to a maximum of 1; ``paper``: squared products with the
                queries that are matched to a box, weighted by their quality.
            max_per_img: number of pairs of query and class in the released mask (the code's number of detections).
            mask_floor: smallest value of the released mask before scaling.
            gamma: exponent of the score in the quality of the paper's mask; that of the IoU is 1 - gamma.
            levels: indices of the student levels in the feature loss; None: all levels that the teacher has, too.
            tap: maps that the feature loss compares. ``encoder``: the encoder's output, as in the paper; ``neck``: the projected
                maps that the encoder reads, as in the released code.
            assignment_weight: weight of the assignment loss (lambda 3).
            assignment: targets of the teacher's queries in the student's decoder. ``teacher``: the boxes that the teacher's
                matching gave them, as in the paper; ``self``: a new matching, as in the released code.
            contrastive_weight: weight of the contrastive loss on query embeddings. The released code has 0.2, the paper no such
                loss.
            temperature: temperature of the contrastive loss.
            contrastive_width: width of the contrastive loss's towers.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            PairError: softmax classes, or a term that this pair does not support; the message says what to change.
        """
        super().__init__(teacher, student)
        self._keep_settings(self.settings)
        self.columns = class_columns(student.spec.classes, teacher.spec.classes, softmax=False)
        self._pair_maps(student.spec, teacher.spec, levels)
        widths = student.spec.channels[0], teacher.spec.channels[0]
        self.contrastive = ContrastiveHead(*widths, contrastive_width) if contrastive_weight else None
        self._check_queries(student, teacher)

    def _keep_settings(self, given: Mapping[str, Any]) -> None:
        """Keep the hyper-parameters that ``learn`` reads.

        Raises:
            MethodError: all weights are 0.
        """
        self.tap, self.mask = given["tap"], given["mask"]
        of_mask = {"released": 1.0, "paper": 20.0}[self.mask]
        self.feature_weight: float = of_mask if given["feature_weight"] is None else given["feature_weight"]
        self.logits_weight, self.assignment_weight = given["logits_weight"], given["assignment_weight"]
        self.contrastive_weight, self.temperature = given["contrastive_weight"], given["temperature"]
        terms = ("logits_weight", "feature_weight", "assignment_weight", "contrastive_weight")
        check_some(self.slug, **{name: getattr(self, name) for name in terms})
        self.weights, self.costs = (
            LogitsWeights(*(given[f"{part}_{kind}"] for part in LogitsWeights._fields)) for kind in ("weight", "cost")
        )
        self.split, self.progressive, self.assignment = given["split"], given["progressive"], given["assignment"]
        self.max_per_img, self.mask_floor, self.gamma = given["max_per_img"], given["mask_floor"], given["gamma"]

    def _pair_maps(self, student: DetectorSpec, teacher: DetectorSpec, levels: Sequence[int] | None) -> None:
        """Pair the levels of the feature loss.

        Raises:
            PairError: as ``pair_levels``.
        """
        self.pairs = pair_levels(self.slug, student, teacher, levels) if self.feature_weight else ()
        self.adapters = LevelAdapters(self.pairs)
        self.paired_maps = PairedMaps(self.pairs, self.adapters, resize=True)

    # ------------------------------------------------------------------------------------------------------- the pair

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Two DETRs with sigmoid classes. The teacher's decoder is not run again, so a cache can replace the teacher."""
        below = settings["tap"] == "neck" and settings["feature_weight"] != 0
        projection = (HasMapsBeforeEncoder,) if below else ()
        return Needs(
            teacher=Look(prediction=True, backbone=below),
            student=Look(backbone=below),
            teacher_families=("queries",),
            student_families=("queries",),
            student_capabilities=(HasQueries, *projection),
            teaching_capabilities=projection,
            advice={HasMapsBeforeEncoder: "set tap=encoder"},
            same_classes=True,
            outputs="sigmoid",
            one_size="tap=neck projects the teacher's maps anew" if below else "",
        )

    def _check_queries(self, student: Detector, teacher: Teacher) -> None:
        """Check widths and formats of the queries of both sides.

        Raises:
            PairError: a term that is used does not support them.
        """
        assert isinstance(student, HasQueries)
        mine, theirs = query_spec(student), teacher.queries
        self._check_width("teacher", teacher.spec, theirs, bool(self.feature_weight or self.contrastive_weight))
        self._check_width("student", student.spec, mine, bool(self.contrastive_weight))
        if self.assignment_weight:
            self._check_formats(student.spec.name, mine.gives, theirs.gives)

    def _check_width(self, side: str, spec: DetectorSpec, queries: QuerySpec, wanted: bool) -> None:
        """Check that queries and features have the same width, if they are compared.

        Raises:
            PairError: the widths differ.
        """
        if wanted and set(spec.channels) != {queries.width}:
            raise PairError(
                f"{self.slug}: the {side} {spec.name} has queries of width {queries.width} and features of "
                f"{sorted(set(spec.channels))} channels; set feature_weight=0 and contrastive_weight=0, which need them equal"
            )

    def _check_formats(self, student: str, own: QueryFormat, given: QueryFormat) -> None:
        """Check that the student's decoder can decode the teacher's queries.

        Raises:
            PairError: the formats differ.
        """
        if _in_words(own) != _in_words(given):
            raise PairError(
                f"{self.slug}: the student {student} decodes {_in_words(own)}, the teacher {self.teacher.spec.name} has "
                f"{_in_words(given)}; set assignment_weight=0 to leave that term out, or take two detectors of one kind and width"
            )

    # ---------------------------------------------------------------------------------------------------------- teach

    def teach(self, batch: Batch) -> DETRDistillTaught:
        """Features, predictions of all layers with their initial queries, and the ground-truth box matched to each query."""
        assert self.requirements.teacher is not None
        observation = self.teacher.observe(batch, self.requirements.teacher)
        prediction = cast(Queries, observation.prediction)
        matched = self.teacher.assign(prediction, batch, self.columns).matched
        seed = QuerySeed(prediction.seed.content, prediction.seed.position, prediction.seed.reference)
        plain = Queries(prediction.logits, prediction.boxes_cxcywh01, prediction.embedding, seed)
        with torch.no_grad():
            features = self._tapped(self.teacher.detector, observation, batch)
        return DETRDistillTaught(features, plain, matched)

    def _tapped(self, detector: Detector, seen: Observation, batch: Batch) -> Features:
        """The features that are compared, in a detector's pass."""
        if seen.backbone_features is None or self.tap == "encoder" or not self.feature_weight:
            return seen.features
        return cast(HasMapsBeforeEncoder, detector).before_encoder(seen.backbone_features, batch)

    # ---------------------------------------------------------------------------------------------------------- learn

    def learn(self, student: Detector, seen: Observation, taught: DETRDistillTaught, batch: Batch, clock: Clock) -> Losses:
        """Terms ``logits_cls``, ``logits_l1``, ``logits_giou``, ``feature``, ``assignment`` and ``contrastive``, where used."""
        auxiliary = self._decode(student, seen, taught, batch) if self.assignment_weight else None
        features = self._tapped(student, seen, batch).float()
        with full_precision(batch.images.device):
            mine = cast(Queries, seen.prediction)
            theirs = self._followed(taught, mine)
            terms: dict[str, Tensor] = {}
            together = (self.logits_weight and not self.split) or self.contrastive is not None
            matched = detrdistill_match(*_predictions(mine, theirs), batch.sizes, None, self.costs) if together else None
            if self.logits_weight:
                found = self._logits(mine, theirs, matched, batch)
                terms |= {f"logits_{name}": self.logits_weight * value.sum() for name, value in found._asdict().items()}
            if self.feature_weight:
                terms["feature"] = self.feature_weight * self._feature(features, theirs, batch)
            if auxiliary is not None:
                given = Assignment(theirs.matched) if self.assignment == "teacher" else None
                terms["assignment"] = self.assignment_weight * student.loss(auxiliary.float(), batch, given).total()
            if self.contrastive is not None and matched is not None:
                terms["contrastive"] = self.contrastive_weight * self._contrastive(mine, theirs, matched)
        return Losses(terms)

    def _followed(self, taught: DETRDistillTaught, mine: Queries) -> DETRDistillTaught:
        """The teacher's layer for each student layer, with the scores of the student's classes."""
        depth, available = len(mine.logits), len(taught.prediction.logits)
        layers = detrdistill_layers(depth, available) if self.progressive else [available - 1] * depth
        said = taught.prediction
        chosen = Queries(said.logits[layers][..., self.columns], said.boxes_cxcywh01[layers], said.embedding[layers], said.seed)
        return DETRDistillTaught(taught.features, chosen, taught.matched[layers])

    def _logits(self, mine: Queries, theirs: DETRDistillTaught, matched: Tensor | None, batch: Batch) -> LogitsTerms:
        predictions = (*_predictions(mine, theirs), batch.sizes)
        if self.split or matched is None:
            return detrdistill_split_loss(*predictions, theirs.matched >= 0, self.costs, self.weights)
        return detrdistill_logits_loss(*predictions, matched, self.weights)

    def _feature(self, features: Features, theirs: DETRDistillTaught, batch: Batch) -> Tensor:
        """Feature loss [], summed over layers and levels."""
        said = theirs.prediction
        targets = [target.without_crowd() for target in batch.targets]
        boxes = [target.boxes_xyxy for target in targets]
        if self.mask == "paper":
            whole = ([t.boxes_xyxy for t in batch.targets], [t.labels for t in batch.targets])  # ``matched`` counts crowd boxes
            shares = detrdistill_quality(said.logits, said.boxes_cxcywh01, theirs.matched, *whole, batch.sizes, self.gamma)
        else:
            shares = detrdistill_query_weights(said.logits, said.boxes_cxcywh01, boxes, batch.sizes, self.max_per_img)
        levels = []
        for level, fixed in zip(*self.paired_maps(features, theirs.features), strict=True):
            if self.mask == "paper":
                weights = detrdistill_quality_weights(shares, said.embedding, fixed)
            else:
                weights = detrdistill_masks(shares, said.embedding, fixed, self.mask_floor).square()
            levels.append(detrdistill_feature_loss(level, fixed, weights).sum())
        return torch.stack(levels).sum()

    def _decode(self, student: Detector, seen: Observation, taught: DETRDistillTaught, batch: Batch) -> Queries:
        """Run the student's decoder on the teacher's queries and the student's features of this pass."""
        mine, theirs = cast(Queries, seen.prediction).seed, taught.prediction.seed
        made = mine.position is not None and mine.reference is not None and mine.reference.shape[-1] == 2
        seed = QuerySeed(theirs.content, theirs.position, None if made else theirs.reference)
        return cast(HasQueries, student).decode(seen.features, seed, batch)

    def _contrastive(self, mine: Queries, theirs: DETRDistillTaught, matched: Tensor) -> Tensor:
        """Contrastive loss [], summed over layers."""
        assert self.contrastive is not None
        losses = []
        for layer, follows in enumerate(matched):
            image, query = torch.nonzero(follows >= 0, as_tuple=True)
            fixed = theirs.prediction.embedding[layer, image, follows[image, query]]
            rows, anchors = self.contrastive(mine.embedding[layer, image, query], fixed)
            losses.append(detrdistill_contrastive_loss(rows, anchors, self.temperature))
        return torch.stack(losses).sum()


def _predictions(mine: Queries, theirs: DETRDistillTaught) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    said = theirs.prediction
    return mine.logits, mine.boxes_cxcywh01, said.logits, said.boxes_cxcywh01


def _in_words(queries: QueryFormat) -> str:
    """Name the parts of initial queries for a message."""
    parts = [f"positions of width {queries.width}"] if queries.position else []
    parts += {0: [], 2: ["points"], 4: ["boxes"]}[queries.reference]
    return " with ".join([f"content of width {queries.width}", *([" and ".join(parts)] if parts else [])])
