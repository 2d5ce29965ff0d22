"""DETRDistill: a DETR learns from another DETR's predictions, from features under a mask its queries make, and its queries.

Chang, Wang, Xu, Chen, Yang, Zhao, "DETRDistill: A Universal Knowledge Distillation Framework for DETR-families", ICCV 2023,
arXiv 2211.10156. Only the Deformable DETR part was released, and it differs from the paper in places; the defaults are those
of the code, except that queries are decoded under the teacher's assignment, as the paper says (the code passes it on to
nobody), and that the contrastive term, which the paper does not have, is off.

Shape letters: B images, L decoder layers, N student's queries, M teacher's queries, K classes, D width, G boxes of an image.
Boxes of queries are cxcywh in parts of the valid image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from detdistill.detectors.contract import Detector, DetectorSpec, HasQueries, Teacher
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
    """DETRDistill between two detectors of queries.

    Which terms work for which pair:

    - Predictions: any two with sigmoid classes, of any depth and number of queries; the teacher must know the student's
      classes by name. DETR's softmax classes are refused.
    - Features: levels of common stride, as in all methods; a student of other channels gets a 1x1 convolution on each. The
      teacher's embeddings must be as wide as its features, as in all DETRs but RT-DETRs with a wider encoder.
    - Assignment: the student's decoder takes the teacher's queries as they are, so both must have the same format: content of
      the same width, positions on both sides or on neither, references of the same kind (points, boxes, none). Deformable
      and Conditional DETR have content, position and point (two-stage Deformable DETR: box); AdaMixer, DAB-DETR, RT-DETR,
      RT-DETRv2 and D-FINE content and box. Where points are made of positions, the student makes its own of the teacher's
      positions. Other pairs are refused; ``assignment_weight=0`` leaves the term out.

    The paper's pairs are of one kind (Deformable DETR, Conditional DETR, AdaMixer). Features are those of the encoder, as in
    the paper; the released code takes the maps before it.
    """

    slug = "detrdistill"
    title = "DETRDistill: A Universal Knowledge Distillation Framework for DETR-families (ICCV 2023)"
    bibtex = """@inproceedings{chang2023detrdistill,
  title={DETRDistill: A Universal Knowledge Distillation Framework for DETR-families},
  author={Chang, Jiahao and Wang, Shuo and Xu, Hai-Ming and Chen, Zehui and Yang, Chenhongyi and Zhao, Feng},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2023}
}"""
    teach_settings = ()

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
        assignment_weight: Weight = 1.0,
        assignment: Literal["teacher", "self"] = "teacher",
        contrastive_weight: Weight = 0.0,
        temperature: Positive = 0.07,
        contrastive_width: Count = 512,
    ) -> None:
        """Check the pair, by what both decoders' queries are made of, and pair the levels.

        Args:
            teacher: a detector of queries with sigmoid classes.
            student: likewise.
            logits_weight: of the predictions' term (the paper's lambda 1); 0 leaves it out, as with the other terms.
            cls_weight: of its cross-entropy with the teacher's scores.
            l1_weight: of its L1 distance.
            giou_weight: of its GIoU.
            cls_cost: of the cross-entropy in the matching.
            l1_cost: of the L1 distance in the matching.
            giou_cost: of the GIoU in the matching.
            split: match and teach the teacher's positives and negatives apart, as in the paper; the released code does not.
            progressive: layer by layer; False: every student layer follows the teacher's last.
            feature_weight: of the features' term (lambda 2); None: 1 with the released mask, 20 with the paper's.
            mask: ``released``: cosines of the best queries, scaled to 1; ``paper``: products with every query that found a
                box, by its quality.
            max_per_img: pairs of query and class in the released mask (the code's number of detections).
            mask_floor: least value of the released mask before scaling.
            gamma: of the quality in the paper's mask, between score and IoU.
            levels: student levels of the features' term, as indices; None: all that have a partner.
            assignment_weight: of the assignment term (lambda 3).
            assignment: ``teacher``: the student's decoder must find with each of the teacher's queries what the teacher found
                with it, as in the paper; ``self``: it is matched to the boxes anew, as in the released code.
            contrastive_weight: of the contrastive term on query embeddings; the released code has 0.2, the paper no such term.
            temperature: of the contrastive term.
            contrastive_width: of its towers.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            PairError: softmax classes, or a term that cannot work for this pair, with what would.
        """
        super().__init__(teacher, student)
        self.feature_weight = {"released": 1.0, "paper": 20.0}[mask] if feature_weight is None else feature_weight
        terms = {
            "logits_weight": logits_weight,
            "feature_weight": self.feature_weight,
            "assignment_weight": assignment_weight,
            "contrastive_weight": contrastive_weight,
        }
        self.weights, self.costs = LogitsWeights(cls_weight, l1_weight, giou_weight), LogitsWeights(cls_cost, l1_cost, giou_cost)
        check_some(self.slug, **terms)
        self.logits_weight, self.split, self.progressive = logits_weight, split, progressive
        self.mask, self.max_per_img, self.mask_floor, self.gamma = mask, max_per_img, mask_floor, gamma
        self.assignment_weight, self.assignment = assignment_weight, assignment
        self.contrastive_weight, self.temperature = contrastive_weight, temperature
        self.columns = class_columns(student.spec.classes, teacher.spec.classes, softmax=False)
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels) if self.feature_weight else ()
        self.adapters = LevelAdapters(self.pairs)
        self.paired_maps = PairedMaps(self.pairs, self.adapters, resize=True)
        widths = student.spec.channels[0], teacher.spec.channels[0]
        self.contrastive = ContrastiveHead(*widths, contrastive_width) if contrastive_weight else None
        assert isinstance(student, HasQueries)
        mine, theirs = query_spec(student), teacher.queries
        self._check_width("teacher", teacher.spec, theirs, bool(self.feature_weight or contrastive_weight))
        self._check_width("student", student.spec, mine, bool(contrastive_weight))
        if assignment_weight:
            self._check_formats(student.spec.name, mine.gives, theirs.gives)

    # ------------------------------------------------------------------------------------------------------- the pair

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Two detectors of queries with sigmoid classes. Nobody enters the teacher's decoder again, so a cache can stand in."""
        return Needs(
            teacher=Look(prediction=True),
            teacher_families=("queries",),
            student_families=("queries",),
            student_capabilities=(HasQueries,),
            same_classes=True,
            outputs="sigmoid",
        )

    def _check_width(self, side: str, spec: DetectorSpec, queries: QuerySpec, wanted: bool) -> None:
        """Queries as wide as the features, where they meet.

        Raises:
            PairError: they are not.
        """
        if wanted and set(spec.channels) != {queries.width}:
            raise PairError(
                f"{self.slug}: the {side} {spec.name} has queries of width {queries.width} and features of "
                f"{sorted(set(spec.channels))} channels; set feature_weight=0 and contrastive_weight=0, which need them equal"
            )

    def _check_formats(self, student: str, own: QueryFormat, given: QueryFormat) -> None:
        """Whether the student's decoder reads the teacher's queries as its own.

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
        """Features, predictions of all layers with the queries they began as, and what each of those should find."""
        observation = self.teacher.observe(batch, Look(prediction=True))
        prediction = cast(Queries, observation.prediction)
        columns = torch.tensor(self.columns, device=batch.images.device)
        named = batch.with_targets([dataclasses.replace(one, labels=columns[one.labels]) for one in batch.targets])
        with torch.no_grad():
            matched = self.teacher.detector.assign(prediction, named).matched
        seed = QuerySeed(prediction.seed.content, prediction.seed.position, prediction.seed.reference)
        plain = Queries(prediction.logits, prediction.boxes_cxcywh01, prediction.embedding, seed)
        return DETRDistillTaught(observation.features, plain, matched)

    # ---------------------------------------------------------------------------------------------------------- learn

    def learn(self, student: Detector, seen: Observation, taught: DETRDistillTaught, batch: Batch, clock: Clock) -> Losses:
        """Terms ``logits_cls``, ``logits_l1``, ``logits_giou``, ``feature``, ``assignment`` and ``contrastive``, where used."""
        auxiliary = self._decode(student, seen, taught, batch) if self.assignment_weight else None
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
                terms["feature"] = self.feature_weight * self._feature(seen.features, theirs, batch)
            if auxiliary is not None:
                given = Assignment(theirs.matched) if self.assignment == "teacher" else None
                terms["assignment"] = self.assignment_weight * student.loss(auxiliary.float(), batch, given).total()
            if self.contrastive is not None and matched is not None:
                terms["contrastive"] = self.contrastive_weight * self._contrastive(mine, theirs, matched)
        return Losses(terms)

    def _followed(self, taught: DETRDistillTaught, mine: Queries) -> DETRDistillTaught:
        """The teacher's layers that the student's follow, one for each, and the scores of the student's classes."""
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
        """[] summed over layers and levels."""
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
        """The student's decoder on the teacher's queries; it reads the features it has already made."""
        mine, theirs = cast(Queries, seen.prediction).seed, taught.prediction.seed
        made = mine.position is not None and mine.reference is not None and mine.reference.shape[-1] == 2
        seed = QuerySeed(theirs.content, theirs.position, None if made else theirs.reference)
        return cast(HasQueries, student).decode(seen.features, seed, batch)

    def _contrastive(self, mine: Queries, theirs: DETRDistillTaught, matched: Tensor) -> Tensor:
        """[] summed over layers."""
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
    """What queries begin as."""
    parts = [f"positions of width {queries.width}"] if queries.position else []
    parts += {0: [], 2: ["points"], 4: ["boxes"]}[queries.reference]
    return " with ".join([f"content of width {queries.width}", *([" and ".join(parts)] if parts else [])])
