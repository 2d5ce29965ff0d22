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
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from detdistill.detectors.contract import Detector, DetectorSpec, HasQueries, Teacher
from detdistill.functional.boxes import giou_loss, paired_iou, pairwise_iou
from detdistill.functional.classes import class_columns
from detdistill.functional.counting import EPSILON
from detdistill.functional.matching import giou_cost, hungarian, l1_cost
from detdistill.functional.precision import full_precision
from detdistill.functional.query_seeds import QueryFormat, QuerySpec, query_spec
from detdistill.methods.shared.align import LevelAdapters, PairedMaps, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.structures import (
    NEGATIVE,
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
from detdistill.values import Count, Fraction, Positive, Weight

FORBIDDEN = 1e6
"""Cost of pairs that must not be matched."""


# ------------------------------------------------------------------------------------------------------ predictions


class LogitsWeights(NamedTuple):
    """How much classes and boxes count, as losses or as costs of the matching."""

    cls: float = 1.0
    """Of the binary cross-entropy with the teacher's scores, summed over classes."""
    l1: float = 5.0
    """Of the L1 distance, cxcywh in parts of the image."""
    giou: float = 2.0
    """Of the GIoU in pixels."""


class LogitsTerms(NamedTuple):
    """Losses of the predictions, [L] each, weighted."""

    cls: Tensor
    l1: Tensor
    giou: Tensor


RELEASED = LogitsWeights()
"""Those of the released code."""


def detrdistill_layers(student: int, teacher: int) -> list[int]:
    """Which teacher layer each student layer follows: the last of its group, when the teacher's layers are grouped evenly.

    Student layer k of S (from 1) follows teacher layer ceil(k * T / S); a deeper student follows some layers several times.

    Args:
        student: S, its decoder layers.
        teacher: T, the teacher's.

    Returns:
        Indices from 0, one for each student layer.

    Raises:
        ValueError: one of them has no layer.

    Example:
        >>> detrdistill_layers(3, 6)
        [1, 3, 5]
    """
    if min(student, teacher) < 1:
        raise ValueError(f"decoders need one layer or more; the student has {student}, the teacher {teacher}")
    return [-(-layer * teacher // student) - 1 for layer in range(1, student + 1)]


def detrdistill_targets(boxes: Tensor) -> Tensor:
    """The teacher's boxes [..., 4] as targets: what leaves the image is cut off, so even equal boxes may differ from them."""
    return box_convert(box_convert(boxes, "cxcywh", "xyxy").clamp(0, 1), "xyxy", "cxcywh")


def _pixels(boxes: Tensor, sizes_hw: Tensor) -> Tensor:
    """Boxes [B, ..., 4] as xyxy in pixels of images of [B, 2] height and width."""
    scale = sizes_hw.flip(-1).repeat(1, 2).to(boxes)
    return box_convert(boxes, "cxcywh", "xyxy") * scale.view(len(scale), *[1] * (boxes.ndim - 2), 4)


@torch.no_grad()
def detrdistill_match(
    student_logits: Tensor,
    student_boxes: Tensor,
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    sizes_hw: Tensor,
    allowed: Tensor | None = None,
    costs: LogitsWeights = RELEASED,
) -> Tensor:
    """The teacher's query that each student query should follow (Hungarian matching, section 3.2).

    The cost of a pair: cross-entropy with the teacher's scores, plus L1 distance, minus GIoU. The teacher's boxes are cut off
    at the image.

    Args:
        student_logits: [L, B, N, K].
        student_boxes: [L, B, N, 4].
        teacher_logits: [L, B, M, K], of the layers to follow.
        teacher_boxes: [L, B, M, 4].
        sizes_hw: [B, 2] valid height and width.
        allowed: [L, B, M] bool, the teacher's queries that may be followed; None: all.
        costs: of a pair.

    Returns:
        [L, B, N] index of the teacher's query, -1 for student queries that are left over (when M < N).
    """
    targets, costed = detrdistill_targets(teacher_boxes), []
    for logits, said, mine, theirs in zip(student_logits, teacher_logits, student_boxes, targets, strict=True):
        # p softplus(-x) + (1-p) softplus(x) = softplus(x) - p x
        entropy = F.softplus(logits).sum(dim=-1, keepdim=True) - logits @ said.sigmoid().transpose(1, 2)
        apart = giou_cost(_pixels(mine, sizes_hw), _pixels(theirs, sizes_hw)[:, None])
        costed.append(costs.cls * entropy + costs.l1 * l1_cost(mine, theirs[:, None]) + costs.giou * apart)
    cost = torch.stack(costed)  # [L, B, N, M], matched at once: the device is waited for once, not layer by layer
    if allowed is None:
        return hungarian(cost)
    # A constant cost for the others: as many allowed queries as possible are matched, as cheaply as possible.
    matched = hungarian(cost.masked_fill(~allowed[:, :, None], FORBIDDEN))
    return matched.masked_fill(~allowed.gather(2, matched.clamp(min=0)), NEGATIVE)


def detrdistill_logits_loss(
    student_logits: Tensor,
    student_boxes: Tensor,
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    sizes_hw: Tensor,
    matched: Tensor,
    weights: LogitsWeights = RELEASED,
) -> LogitsTerms:
    """How far each student query is from the teacher's query that it follows, layer by layer.

    Binary cross-entropy with the teacher's scores (not zero at equality: the teacher's entropy remains), L1 distance in parts
    of the image, and 1 - GIoU in pixels, each summed and divided by the matched student queries of the batch. Queries that
    follow nobody count nowhere. (The released code gives them a class target beyond 1.)

    Args:
        student_logits: [L, B, N, K]; gradient flows.
        student_boxes: [L, B, N, 4]; gradient flows.
        teacher_logits: [L, B, M, K], treated as constant.
        teacher_boxes: [L, B, M, 4], likewise; cut off at the image.
        sizes_hw: [B, 2] valid height and width.
        matched: [L, B, N] see ``detrdistill_match``.
        weights: of the three.
    """
    good = (matched >= 0).to(student_logits.dtype)
    number = good.sum(dim=(1, 2)) + EPSILON
    index = matched.clamp(min=0)[..., None]
    scores = teacher_logits.detach().sigmoid()
    scores = scores.gather(2, index.expand(*index.shape[:3], scores.shape[-1]))
    targets = detrdistill_targets(teacher_boxes.detach()).gather(2, index.expand(*index.shape[:3], 4))
    entropy = F.binary_cross_entropy_with_logits(student_logits, scores, reduction="none").sum(dim=-1)
    distance = (student_boxes - targets).abs().sum(dim=-1)
    mine, theirs = (_pixels(boxes.transpose(0, 1), sizes_hw).transpose(0, 1) for boxes in (student_boxes, targets))
    apart = giou_loss(mine, theirs)
    parts = (entropy, distance, apart)
    return LogitsTerms(*(w * (part * good).sum(dim=(1, 2)) / number for w, part in zip(weights, parts, strict=True)))


def detrdistill_split_loss(
    student_logits: Tensor,
    student_boxes: Tensor,
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    sizes_hw: Tensor,
    positive: Tensor,
    costs: LogitsWeights = RELEASED,
    weights: LogitsWeights = RELEASED,
) -> LogitsTerms:
    """The paper's form (Eq. 2 to 4): positive and negative teacher queries are matched apart; negatives teach boxes only.

    Args:
        student_logits: [L, B, N, K]; gradient flows.
        student_boxes: [L, B, N, 4]; gradient flows.
        teacher_logits: [L, B, M, K], treated as constant.
        teacher_boxes: [L, B, M, 4], likewise.
        sizes_hw: [B, 2] valid height and width.
        positive: [L, B, M] bool, the teacher's queries that its own matching gave a ground-truth box.
        costs: of a pair in both matchings.
        weights: of the losses; the class's of positives only.
    """
    predictions = (student_logits, student_boxes, teacher_logits, teacher_boxes, sizes_hw)
    terms = []
    for allowed, kept in ((positive, weights), (~positive, weights._replace(cls=0.0))):
        matched = detrdistill_match(*predictions, allowed, costs)
        terms.append(detrdistill_logits_loss(*predictions, matched, kept))
    return LogitsTerms(*(first + second for first, second in zip(*terms, strict=True)))


# --------------------------------------------------------------------------------------------------------- features


@torch.no_grad()
def detrdistill_query_weights(
    logits: Tensor, boxes: Tensor, boxes_xyxy: Sequence[Tensor], sizes_hw: Tensor, max_per_img: int = 100
) -> Tensor:
    """How much each of the teacher's queries says in the released masks: [L, B, M].

    The best ``max_per_img`` pairs of query and class count by their score (a query may do so several times), times the
    largest IoU of the query's box with any ground-truth box; in an image without boxes by their score alone.

    Args:
        logits: [L, B, M, K] of the teacher.
        boxes: [L, B, M, 4] of the teacher, not cut off.
        boxes_xyxy: ground truth, B tensors [G, 4] in pixels.
        sizes_hw: [B, 2] valid height and width.
        max_per_img: pairs of query and class in each image and layer.
    """
    best, place = logits.sigmoid().flatten(2).topk(min(max_per_img, logits.shape[2] * logits.shape[3]), dim=2)
    weights = torch.zeros_like(boxes[..., 0]).scatter_add(2, place // logits.shape[3], best.to(boxes.dtype))
    for image, ground_truth in enumerate(boxes_xyxy):
        if len(ground_truth):
            mine = _pixels(boxes[:, image].reshape(1, -1, 4), sizes_hw[image : image + 1])[0]
            overlap = pairwise_iou(mine, ground_truth.to(mine.dtype)).amax(dim=1)
            weights[:, image] *= overlap.view_as(weights[:, image])
    return weights


@torch.no_grad()
def detrdistill_masks(weights: Tensor, embedding: Tensor, teacher: Tensor, floor: float = 0.01) -> Tensor:
    """The released masks of one level: where the teacher's features resemble its important queries.

    The cosine of every cell with every query, summed over queries by their weights, not below ``floor``, and divided by the
    largest of the map; so at most 1, and all 1 where nothing reaches ``floor``.

    Args:
        weights: [L, B, M] see ``detrdistill_query_weights``.
        embedding: [L, B, M, D] of the teacher.
        teacher: [B, D, H, W] the teacher's map.
        floor: least value, above 0, before the division.

    Returns:
        [L, B, H, W].
    """
    direction = torch.einsum("lbm,lbmd->lbd", weights, F.normalize(embedding, dim=-1))
    mask = torch.einsum("lbd,bdhw->lbhw", direction, F.normalize(teacher, dim=1)).clamp(min=floor)
    return mask / mask.amax(dim=(2, 3), keepdim=True)


@torch.no_grad()
def detrdistill_quality(
    logits: Tensor,
    boxes: Tensor,
    matched: Tensor,
    boxes_xyxy: Sequence[Tensor],
    labels: Sequence[Tensor],
    sizes_hw: Tensor,
    gamma: float = 0.5,
) -> Tensor:
    """Quality of the teacher's queries in the paper's masks (Eq. 8): score^gamma * IoU^(1-gamma), 0 without a box.

    Args:
        logits: [L, B, M, K] of the teacher; the score is that of the box's class.
        boxes: [L, B, M, 4] of the teacher.
        matched: [L, B, M] the ground-truth box that the teacher's own matching gave each query, negative for none.
        boxes_xyxy: ground truth, B tensors [G, 4] in pixels.
        labels: B tensors [G].
        sizes_hw: [B, 2] valid height and width.
        gamma: between score and IoU.

    Returns:
        [L, B, M].
    """
    quality = torch.zeros_like(boxes[..., 0])
    for image, (ground_truth, classes) in enumerate(zip(boxes_xyxy, labels, strict=True)):
        layer, query = torch.nonzero(matched[:, image] >= 0, as_tuple=True)
        if not len(query):
            continue
        box = matched[layer, image, query]
        score = logits[layer, image, query, classes[box]].sigmoid()
        mine = _pixels(boxes[layer, image, query][None], sizes_hw[image : image + 1])[0]
        overlap = paired_iou(mine, ground_truth[box].to(mine.dtype))
        quality[layer, image, query] = (score**gamma * overlap ** (1 - gamma)).to(quality.dtype)
    return quality


@torch.no_grad()
def detrdistill_quality_weights(quality: Tensor, embedding: Tensor, teacher: Tensor) -> Tensor:
    """The paper's weight of each cell (Eq. 6 and 7): mean over queries of quality times the squared product with the cell.

    Args:
        quality: [L, B, M] see ``detrdistill_quality``.
        embedding: [L, B, M, D] of the teacher.
        teacher: [B, D, H, W] the teacher's map.

    Returns:
        [L, B, H, W].
    """
    weights = []
    for share, queries in zip(quality, embedding, strict=True):
        # sum_i q_i (Q_i . F)^2 is a quadratic form of F; so no map for each query is kept.
        form = torch.einsum("bm,bmd,bme->bde", share, queries, queries)
        value = (torch.einsum("bde,behw->bdhw", form, teacher) * teacher).sum(dim=1)
        weights.append(value.clamp(min=0) / quality.shape[-1])
    return torch.stack(weights)


def detrdistill_feature_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """[L] mean over images, channels and cells of one level of the weighted squared difference (Eq. 7), for each layer.

    Args:
        student: [B, D, H, W] in the teacher's channels; gradient flows.
        teacher: [B, D, H, W], treated as constant.
        weights: [L, B, H, W]; the square of ``detrdistill_masks``, or ``detrdistill_quality_weights``.

    Example:
        >>> maps = torch.ones(1, 2, 2, 2)
        >>> detrdistill_feature_loss(3 * maps, maps, torch.tensor([1.0, 0.5]).view(2, 1, 1, 1).expand(2, 1, 2, 2)).tolist()
        [4.0, 2.0]
    """
    return (weights * (teacher.detach() - student).square().mean(dim=1)).mean(dim=(1, 2, 3))


# ------------------------------------------------------------------------------------------------------- contrastive


class ContrastiveHead(nn.Module):
    """Two towers that bring the student's and the teacher's query embeddings into one space (released code only)."""

    def __init__(self, student: int, teacher: int, width: int = 512) -> None:
        super().__init__()

        def tower(channels: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(channels, width),
                nn.Linear(width, width),
                nn.BatchNorm1d(width),
                nn.ReLU(inplace=True),
                nn.Linear(width, width),
            )

        self.student, self.teacher = tower(student), tower(teacher)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [R, D] of both sides as rows of length 1, [R, width]."""
        return F.normalize(self.student(student), dim=1), F.normalize(self.teacher(teacher), dim=1)


def detrdistill_contrastive_loss(student: Tensor, teacher: Tensor, temperature: float = 0.07) -> Tensor:
    """[] each teacher row should be most similar to the student row at its place: cross-entropy over the student's rows.

    Args:
        student: [R, C] of length 1; gradient flows.
        teacher: [R, C] of length 1; gradient flows (to the teacher's tower).
        temperature: of the similarities.
    """
    return F.cross_entropy(teacher @ student.T / temperature, torch.arange(len(student), device=student.device))


# ------------------------------------------------------------------------------------------------------------ taught


@dataclass(frozen=True)
class DETRDistillTaught(Taught):
    """All that the three terms need of the teacher."""

    features: Features
    prediction: Queries
    """With its seed; logits of all the teacher's classes."""
    matched: Tensor = field(metadata=SECOND)
    """[L, B, M] ground-truth box (index within its image's ``Target``) of each of the teacher's queries, -1 for none."""


# -------------------------------------------------------------------------------------------------------- the method


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
