"""GID: imitate features, relations and responses where teacher and student disagree most (general instances).

Dai et al., "General Instance Distillation for Object Detection", CVPR 2021, arXiv 2103.02340. The paper's code was not released.
The first author's port to detectron2 (RetinaNet only) is the reference of the numbers.

Shape letters: B images, P predictions of an image, K classes, n general instances of the batch, S side of a pooled region,
M predictions that belong to an instance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.contract import PREDICTION, Detector, DetectorSpec, Teacher
from detdistill.functional.assign import pairwise_iou
from detdistill.functional.boxes import giou_loss
from detdistill.functional.classes import class_columns
from detdistill.functional.counting import divisor_over_ranks
from detdistill.functional.dense_maps import find_partners
from detdistill.functional.precision import full_precision
from detdistill.functional.regions import pool_boxes, propose
from detdistill.functional.relations import normalized_distances
from detdistill.functional.soft_targets import soft_binary_cross_entropy, soft_cross_entropy
from detdistill.methods.shared.align import LevelAdapters, PairedMaps, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.structures import Batch, Clock, Dense, Features, Losses, Observation, Prediction, Regions, Target, cells_inside
from detdistill.values import Count, Fraction, Index, Positive, Weight

Score = Literal["max_abs_diff", "diff_of_max"]
SEMI_POSITIVE, STILL_NEGATIVE = 0.7, 0.3
"""Fractions of an instance inside a ground-truth box: from the first on it is semi-positive, below the second negative."""


class GIDInstances(NamedTuple):
    """General instances of each image, those of the largest score first; B entries each."""

    boxes_xyxy: list[Tensor]
    """[n_b, 4] clipped to the image."""
    scores: list[Tensor]
    """[n_b] how much teacher and student disagree, 0..1."""
    predictions: list[Tensor]
    """[n_b] index along P of the prediction that the box came from."""


@torch.no_grad()
def gid_instances(
    student: Dense,
    teacher_logits: Tensor,
    teacher_boxes_xyxy: Tensor,
    sizes_hw: Tensor,
    mask: Tensor | None = None,
    *,
    score: Score = "max_abs_diff",
    count: int = 10,
    nms: float = 0.3,
    candidates: int = 3000,
    min_side: float = 10.0,
) -> GIDInstances:
    """Select the boxes of the predictions whose class scores differ most between teacher and student (section 3.1).

    The box is the teacher's where its largest class score is larger, else the student's. The ``candidates`` best of all levels
    are clipped to the image, small ones are dropped, and class-agnostic NMS across levels leaves at most ``count``.
    Ground truth is not used.

    Args:
        student: P predictions.
        teacher_logits: [B, P, K] (with a background: K+1) the teacher's, in the student's order of predictions and classes.
        teacher_boxes_xyxy: [B, P, 4] the teacher's.
        sizes_hw: [B, 2] valid height and width of each image.
        mask: [B, P] bool, predictions that may be selected; None: all.
        score: ``max_abs_diff``: the largest difference of a class score (paper). ``diff_of_max``: the difference of the largest
            class scores (the port).
        count: largest number of instances of an image (K in the paper).
        nms: IoU above which the box of lower score is dropped.
        candidates: largest number of predictions of an image before NMS.
        min_side: both sides of a clipped box must be longer than this, in pixels.
    """
    mine, theirs = _probabilities(student.logits, student.softmax), _probabilities(teacher_logits, student.softmax)
    lead = theirs.amax(dim=-1) - mine.amax(dim=-1)
    differences = (theirs - mine).abs().amax(dim=-1) if score == "max_abs_diff" else lead.abs()
    if mask is not None:
        differences = differences.masked_fill(~mask, -torch.inf)
    chosen = replace(
        student,
        boxes_xyxy=torch.where(lead[..., None] > 0, teacher_boxes_xyxy, student.boxes_xyxy),
        anchors=torch.arange(student.logits.shape[1], device=lead.device),  # so that an origin tells the prediction
    )
    boxes, origins, scores = propose(
        chosen,
        sizes_hw,
        scores=differences,
        before=candidates,
        nms=nms,
        after=count,
        across_levels=True,
        min_side=min_side,
    )
    return GIDInstances(boxes, scores, [origin.anchor for origin in origins])


def _probabilities(logits: Tensor, softmax: bool) -> Tensor:
    """[B, P, K] class scores without the background."""
    return logits.softmax(dim=-1)[..., :-1] if softmax else logits.sigmoid()


def gid_feature_loss(student: Tensor, teacher: Tensor, distance: Literal["l2", "l1"] = "l2", beta: float = 0.0) -> Tensor:
    """Distance of pooled features: the sum over instances, channels and cells, divided by ``n * S * S`` (Eq. 4).

    Args:
        student: [n, C, S, S] in the teacher's channels; gradient flows.
        teacher: [n, C, S, S], treated as constant.
        distance: ``l2``: squared differences; ``l1``: smooth L1.
        beta: where smooth L1 turns from square to absolute value.

    Returns:
        []; 0 without instances.
    """
    cells = divisor_over_ranks(len(student) * student.shape[2] * student.shape[3], student)
    return _distance(student, teacher, distance, beta) / cells


def gid_relation_loss(student: Tensor, teacher: Tensor, beta: float = 1.0) -> Tensor:
    """Smooth L1 between the relative distances of all pairs of instances, the mean over pairs (Eq. 5 and 6).

    The pairs include instances of different images. Scaling all of the student's features, or adding one vector to all, does
    not change the loss.

    Args:
        student: [n, C, S, S] in the teacher's channels; gradient flows.
        teacher: [n, C, S, S], treated as constant.
        beta: where smooth L1 turns from square to absolute value.

    Returns:
        []; 0, connected to the graph, with fewer than three instances.
    """
    count = len(student)
    if count < 3:
        return student.sum() * 0.0
    mine, theirs = (normalized_distances(rows.flatten(1)) for rows in (student, teacher.detach()))
    return _distance(mine, theirs, "l1", beta) / (count * count - count)


class GIDResponse(NamedTuple):
    """The unweighted losses of the predictions that belong to an instance, [] each."""

    classification: Tensor
    box: Tensor


def gid_response_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_boxes: Tensor,
    teacher_boxes: Tensor,
    *,
    softmax: bool = False,
    class_distance: Literal["bce", "l1", "l2"] = "bce",
    box_distance: Literal["l1", "l2", "giou"] = "l1",
    class_beta: float = 0.0,
    box_beta: float = 0.1,
) -> GIDResponse:
    """Distances of class logits and of box regressions: the sums over M predictions, divided by M (section 3.4).

    Args:
        student_logits: [M, K] (with a background: K+1); gradient flows.
        teacher_logits: [M, K], treated as constant.
        student_boxes: [M, R] box regressions, or boxes [M, 4] for ``giou``; gradient flows.
        teacher_boxes: [M, R], treated as constant.
        softmax: ``bce`` is then the cross-entropy with the teacher's softmax.
        class_distance: ``bce``: cross-entropy with the teacher's sigmoid scores; ``l1``: smooth L1, ``l2``: squared differences
            of logits.
        box_distance: ``l1``: smooth L1; ``l2``: squared differences; ``giou``: GIoU loss of boxes.
        class_beta: of smooth L1 on logits.
        box_beta: of smooth L1 on regressions.
    """
    count = divisor_over_ranks(len(student_logits), student_logits)
    if class_distance == "bce":
        entropy = soft_cross_entropy if softmax else _binary_entropy
        classification = entropy(student_logits, teacher_logits).sum()
    else:
        classification = _distance(student_logits, teacher_logits, class_distance, class_beta)
    if box_distance == "giou":
        box = giou_loss(student_boxes, teacher_boxes.detach()).sum()
    else:
        box = _distance(student_boxes, teacher_boxes, box_distance, box_beta)
    return GIDResponse(classification / count, box / count)


def _binary_entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return soft_binary_cross_entropy(student_logits, teacher_logits.sigmoid())


def _distance(student: Tensor, teacher: Tensor, kind: str, beta: float) -> Tensor:
    """[] the sum of squared differences (``l2``) or of smooth L1 (``l1``)."""
    fixed = teacher.detach()
    if kind == "l2":
        return F.mse_loss(student, fixed, reduction="sum")
    return F.smooth_l1_loss(student, fixed, reduction="sum", beta=beta)


class GID(Method[Observation]):
    """GID between two dense or two two-stage detectors with the same levels and the same number of anchors of a cell.

    Two-stage detectors are compared by their first stage: objectness takes the place of class scores. The predictions that belong
    to an instance are found by the student's own assignment, with the instances in place of ground truth. Predictions and
    instances in the padding of an image are left out. The port's faults are not reproduced: it never applies its adapters, and
    fails on images without ground truth.
    """

    slug = "gid"
    title = "General Instance Distillation for Object Detection (CVPR 2021)"
    bibtex = """@inproceedings{dai2021gid,
  title={General Instance Distillation for Object Detection},
  author={Dai, Xing and Jiang, Zeren and Wu, Zhao and Bao, Yiping and Wang, Zhicheng and Liu, Si and Zhou, Erjin},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2021}
}"""
    teach_settings = ()

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        score: Score = "max_abs_diff",
        instances: Count = 10,
        nms: Fraction = 0.3,
        candidates: Count = 3000,
        min_side: Weight = 10.0,
        keep: Literal["all", "pos", "semi_pos", "neg"] = "all",
        size: Count = 10,
        sampling_ratio: Index = 2,
        adapter: Literal["conv", "none"] = "conv",
        feature_weight: Weight = 5e-4,
        relation_weight: Weight = 40.0,
        class_weight: Weight = 0.1,
        box_weight: Weight = 1.0,
        feature_distance: Literal["l2", "l1"] = "l2",
        class_distance: Literal["bce", "l1", "l2"] = "bce",
        box_distance: Literal["l1", "l2", "giou"] = "l1",
        relation_beta: Positive = 1.0,
        box_beta: Weight = 0.1,
        levels: Sequence[int] | None = None,
    ) -> None:
        """Pair the levels and classes.

        Args:
            teacher: a dense or two-stage detector that knows all classes of the student.
            student: a detector of the same family with the same cells.
            score: how much a prediction differs: ``max_abs_diff``, the largest difference of a class score (paper), or
                ``diff_of_max``, the difference of the largest class scores (the port).
            instances: largest number of general instances of an image.
            nms: IoU above which the instance of lower score is dropped.
            candidates: largest number of predictions of an image before NMS.
            min_side: smallest side of an instance in pixels.
            keep: which instances are used. ``pos``: those whose prediction is positive under the student's own assignment;
                ``semi_pos``: others that lie in a ground-truth box with 0.7 of their area; ``neg``: others with less than 0.3.
            size: side of the pooled features.
            sampling_ratio: samples along each side of a pooled cell; 0: as many as there are cells of the map.
            adapter: ``conv``: a 3x3 convolution on the student's maps, shared by levels of equal channels (paper). ``none``: no
                adapter, as the port runs; channels must be equal.
            feature_weight: factor of the feature loss.
            relation_weight: factor of the relation loss.
            class_weight: factor of the loss of class logits.
            box_weight: factor of the loss of box regressions.
            feature_distance: ``l2``, squared differences, or ``l1``.
            class_distance: ``bce``, cross-entropy with the teacher's scores, or ``l1`` or ``l2`` of logits.
            box_distance: ``l1``, smooth L1 of the regressions as the heads encode them, ``l2``, or ``giou`` of the boxes, for
                heads that encode boxes differently.
            relation_beta: where the smooth L1 of relations turns from square to absolute value.
            box_beta: the same for box regressions; 0: plain L1.
            levels: indices of the student levels that features are pooled from; None: all that have a partner.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            PairError: the detectors are of different families, or their channels or box encodings differ and nothing adapts them.
        """
        super().__init__(teacher, student)
        self._keep_settings(self.settings)
        self._check_kinds(student.spec, teacher.spec)
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        self._check_channels(teacher.spec, adapter)
        self.adapters: nn.Module = LevelAdapters(self.pairs, always=adapter == "conv", kernel=3, shared=True)
        self.paired_maps = PairedMaps(self.pairs, self.adapters)
        mine, theirs = student.spec, teacher.spec
        self.names, self.strides = (mine.name, theirs.name), mine.strides
        self.cells = [(pair.student, pair.teacher) for pair in pair_levels(self.slug, mine, theirs)]
        self.columns = class_columns(mine.classes, theirs.classes, theirs.softmax) if mine.family == "dense" else [0]

    def _keep_settings(self, given: Mapping[str, Any]) -> None:
        """Keep the hyper-parameters that ``learn`` reads.

        Raises:
            MethodError: all weights are 0.
        """
        self.weights: dict[str, float] = {name: given[f"{name}_weight"] for name in ("feature", "relation", "class", "box")}
        check_some(self.slug, **{f"{name}_weight": weight for name, weight in self.weights.items()})
        chosen = {name: given[name] for name in ("score", "nms", "candidates", "min_side")}
        self.selection: dict[str, Any] = {**chosen, "count": given["instances"]}
        self.keep, self.size, self.sampling_ratio = given["keep"], given["size"], given["sampling_ratio"]
        self.feature_distance, self.relation_beta = given["feature_distance"], given["relation_beta"]
        self.response: dict[str, Any] = {name: given[name] for name in ("class_distance", "box_distance", "box_beta")}

    def _check_channels(self, teacher: DetectorSpec, adapter: str) -> None:
        """Check that the pooled features of all instances can be compared.

        Raises:
            PairError: their channels differ, and nothing adapts them.
        """
        channels = tuple(pair.teacher_channels for pair in self.pairs)
        if (self.weights["feature"] or self.weights["relation"]) and len(set(channels)) > 1:
            raise PairError(
                f"{self.slug}: the levels of the teacher {teacher.name} have {channels} channels, and instances of "
                "different channels cannot be compared; take a teacher whose neck has equal channels, or set feature_weight=0 "
                "and relation_weight=0"
            )
        wide = [pair for pair in self.pairs if pair.student_channels != pair.teacher_channels]
        if adapter == "none" and wide:
            raise PairError(
                f"{self.slug}: adapter=none needs equal channels, but the student has {wide[0].student_channels}, the teacher "
                f"{wide[0].teacher_channels}; use adapter=conv"
            )

    def _check_kinds(self, mine: DetectorSpec, theirs: DetectorSpec) -> None:
        """Check that predictions can be compared.

        Raises:
            PairError: the families differ, or the codings of boxes.
        """
        box_distance = self.response["box_distance"]
        if mine.family != theirs.family:
            raise PairError(
                f"{self.slug}: the student {mine.name} predicts {mine.family}, the teacher {theirs.name} {theirs.family}; "
                f"take two detectors of one family, because predictions are compared one by one"
            )
        if box_distance != "giou" and mine.box_bins != theirs.box_bins:
            raise PairError(
                f"{self.slug}: box_distance={box_distance} compares encoded boxes, but the student {mine.name} has "
                f"{mine.box_bins} bins of a side, the teacher {theirs.name} {theirs.box_bins}; use box_distance=giou"
            )
        compared = box_distance != "giou" and (self.weights["class"] or self.weights["box"])
        own, other = mine.box_numbers, theirs.box_numbers
        if compared and own is not None and other is not None and own != other:
            raise PairError(self._other_numbers(mine.name, theirs.name, own, other))

    def _other_numbers(self, student: str, teacher: str, own: int, other: int) -> str:
        return (
            f"{self.slug}: the student {student} encodes a box by {own} numbers, the teacher {teacher} by {other}; use "
            f"box_distance=giou"
        )

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Two detectors of one family with the same cells, classes and kind of class scores."""
        families, distance = ("dense", "regions"), settings["box_distance"]
        return Needs(
            teacher=PREDICTION,
            teacher_families=families,
            student_families=families,
            same_classes=True,
            outputs="same",
            same_cells=True,
            one_size="" if distance == "giou" else f"box_distance={distance} compares boxes as the heads encode them",
        )

    @torch.no_grad()
    def teach(self, batch: Batch) -> Observation:
        """Compute the teacher's features and dense prediction; of two-stage detectors that of the first stage."""
        seen = self.teacher.observe(batch, PREDICTION)
        return replace(seen, prediction=replace(_dense(seen.prediction), own=None))

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Terms ``gid_feature``, ``gid_relation``, ``gid_class`` and ``gid_box``; monitor ``gid_instances``, their number.

        Terms with weight 0 are left out.
        """
        mine, theirs = _dense(seen.prediction), _dense(taught.prediction)
        with full_precision(batch.images.device):
            partners = find_partners(mine, theirs, self.cells)
            mask = partners.mask & cells_inside(mine, batch, self.strides)
            logits, boxes = partners.take(theirs.logits)[..., self.columns], partners.take(theirs.boxes_xyxy)
            found = gid_instances(mine, logits, boxes, batch.sizes, mask, **self.selection)  # type: ignore[arg-type]
            instances = _targets(mine, logits, self._kept(student, mine, found, batch))
            terms = self._pooled_terms(seen.features, taught.features, instances)
            if self.weights["class"] or self.weights["box"]:
                belongs = (student.assign(mine, batch.with_targets(instances)).matched >= 0) & mask
                deltas = boxes if self.response["box_distance"] == "giou" else partners.take(theirs.deltas)
                terms |= self._response_terms(mine, logits, deltas, belongs)
            number = mine.logits.new_tensor(sum(map(len, instances)))
        losses = {f"gid_{name}": self.weights[name] * term for name, term in terms.items() if self.weights[name]}
        return Losses(losses, {"gid_instances": number})

    def _pooled_terms(self, student: Features, teacher: Features, instances: Sequence[Target]) -> dict[str, Tensor]:
        if not (self.weights["feature"] or self.weights["relation"]):
            return {}
        boxes = [target.boxes_xyxy for target in instances]
        mine, theirs = self.paired_maps(student, teacher)
        strides = tuple(student.strides[pair.student] for pair in self.pairs)
        pooled = [
            pool_boxes(Features(tuple(maps), strides), boxes, self.size, sampling_ratio=self.sampling_ratio)
            for maps in (mine, [level.detach() for level in theirs])
        ]
        return {
            "feature": gid_feature_loss(pooled[0], pooled[1], self.feature_distance),  # type: ignore[arg-type]
            "relation": gid_relation_loss(pooled[0], pooled[1], self.relation_beta),
        }

    def _response_terms(self, student: Dense, logits: Tensor, regression: Tensor, belongs: Tensor) -> dict[str, Tensor]:
        own = student.boxes_xyxy if self.response["box_distance"] == "giou" else student.deltas
        if own.shape != regression.shape:
            # Refused before the first image, except where a description lacks the coding: a cache of an earlier version, or a
            # detector from elsewhere. Then only its predictions show the number.
            raise PairError(self._other_numbers(*self.names, own.shape[-1], regression.shape[-1]))
        losses = gid_response_loss(
            student.logits[belongs],
            logits[belongs],
            own[belongs],
            regression[belongs],
            softmax=student.softmax,
            **self.response,  # type: ignore[arg-type]
        )
        return {"class": losses.classification, "box": losses.box}

    def _kept(self, student: Detector, prediction: Dense, found: GIDInstances, batch: Batch) -> GIDInstances:
        """The instances of the kind ``keep``."""
        if self.keep == "all":
            return found
        matched = student.assign(prediction, batch).matched
        kept = []
        for image, (boxes, index, target) in enumerate(zip(found.boxes_xyxy, found.predictions, batch.targets, strict=True)):
            positive = matched[image, index] >= 0
            inside = _fraction_inside(boxes, target.without_crowd().boxes_xyxy.to(boxes.dtype))
            kinds = {
                "pos": positive,
                "semi_pos": ~positive & (inside >= SEMI_POSITIVE),
                "neg": ~positive & (inside < STILL_NEGATIVE),
            }
            kept.append(kinds[self.keep])
        parts = ([values[mask] for values, mask in zip(field, kept, strict=True)] for field in found)
        return GIDInstances(*parts)


def _dense(prediction: Prediction | None) -> Dense:
    """The prediction of a dense detector, or of the first stage of a two-stage one."""
    return cast(Dense, prediction.first if isinstance(prediction, Regions) else prediction)


def _targets(student: Dense, teacher_logits: Tensor, found: GIDInstances) -> list[Target]:
    """The instances as ground truth of each image; the class is the one of the largest score, of teacher or student."""
    targets = []
    for image, (boxes, index) in enumerate(zip(found.boxes_xyxy, found.predictions, strict=True)):
        rows = torch.stack([student.logits[image, index].detach(), teacher_logits[image, index]])
        labels = _probabilities(rows, student.softmax).amax(dim=0).argmax(dim=-1)
        targets.append(Target(boxes, labels, torch.zeros_like(labels, dtype=torch.bool)))
    return targets


def _fraction_inside(boxes: Tensor, truth: Tensor) -> Tensor:
    """[n] largest fraction of each box [n, 4] inside one of the ground-truth boxes [G, 4]; 0 without any."""
    if len(truth) == 0:
        return boxes.new_zeros(len(boxes))
    overlaps = pairwise_iou(boxes, truth)
    areas, others = ((sides[:, 2:] - sides[:, :2]).prod(dim=1) for sides in (boxes, truth))
    shared = overlaps / (1 + overlaps) * (areas[:, None] + others)
    return (shared / areas[:, None]).amax(dim=1)
