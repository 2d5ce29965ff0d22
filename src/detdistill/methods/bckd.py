"""BCKD: the student's class scores and boxes should equal the teacher's at every location, compared as the detector uses them.

Yang et al., "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection", ICCV 2023. Class scores
are compared as sigmoids, one binary problem for each class. A softmax over classes would not see a number that is added to all
logits of a location, but a sigmoid detector's scores change with it.

Shape letters: B images, P predictions of an image, K classes, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from detdistill.detectors.contract import PREDICTION, Detector, Teacher
from detdistill.functional.boxes import paired_giou, paired_iou
from detdistill.functional.classes import class_columns
from detdistill.functional.counting import label_weights, number_of_positives, positives_per_level, sum_over_ranks
from detdistill.functional.dense_maps import find_partners, only_parts
from detdistill.functional.precision import full_precision
from detdistill.functional.soft_targets import largest_score_gap, soft_binary_rows
from detdistill.methods.shared.align import check_same_anchors, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.methods.shared.needs import Needs
from detdistill.structures import Assignment, Batch, Clock, Dense, Losses, Observation, Taught
from detdistill.values import Limits, Weight

LevelRule = Literal["skip", "all"]
Overlap = Literal["giou", "iou"]


def bckd_weights(assignment: Assignment, levels: Tensor, like: Tensor, level_rule: LevelRule = "skip") -> Tensor:
    """Weight of each location: the detector's label weight, and 0 on levels without a positive in the batch.

    Args:
        assignment: the student's own assignment [B, P].
        levels: [P] level of each prediction.
        like: tensor whose floating-point type the result has.
        level_rule: ``skip``: a level on which the batch has no positive counts nothing, as released; ``all``: it counts.

    Returns:
        [B, P], 0 for ignored predictions.

    Example:
        >>> assignment = Assignment(torch.tensor([[0, -1, -2, -1]]))
        >>> bckd_weights(assignment, torch.tensor([0, 0, 0, 1]), torch.ones(())).tolist()
        [[1.0, 1.0, 0.0, 0.0]]
    """
    weights = label_weights(assignment, like)
    if level_rule == "all" or levels.numel() == 0:
        return weights
    filled = sum_over_ranks(positives_per_level(assignment, levels, int(levels.max()) + 1)) > 0
    return weights * filled[levels]


def bckd_class_loss(
    student_logits: Tensor, teacher_logits: Tensor, weights: Tensor, normalizer: Tensor | float, beta: float = 1.0
) -> Tensor:
    """Binary cross-entropy with the teacher's sigmoids, weighted by the gap (section 3.2).

    ``sum u * |t - s|^beta * BCE(s, t) / N`` over locations and classes, with ``s`` and ``t`` the sigmoids. The gradient also
    flows through the weight ``|t - s|``, as released.

    Args:
        student_logits: [..., K]; gradient flows.
        teacher_logits: [..., K], treated as constant.
        weights: u [...] weight of each location.
        normalizer: N, the number of positives.
        beta: exponent of the gap, at least 1.

    Returns:
        [] the loss, 0 for equal logits.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0]])
        >>> [round(float(bckd_class_loss(logits + shift, logits, torch.ones(1), 1.0)), 3) for shift in (0, 1)]
        [0.0, 0.189]
    """
    return (soft_binary_rows(student_logits, teacher_logits, beta) * weights).sum() / normalizer


def bckd_box_loss(
    student_boxes_xyxy: Tensor,
    teacher_boxes_xyxy: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor,
    normalizer: Tensor | float,
    overlap: Overlap = "giou",
) -> Tensor:
    """Distance of decoded boxes where the class scores differ (section 3.3).

    ``sum u * m * (1 - GIoU) / N`` over all locations, positive or not, with ``m = max_c |t - s|`` treated as constant.

    Args:
        student_boxes_xyxy: [..., 4]; gradient flows.
        teacher_boxes_xyxy: [..., 4] in the same unit, treated as constant.
        student_logits: [..., K], treated as constant.
        teacher_logits: [..., K], treated as constant.
        weights: u [...] weight of each location.
        normalizer: N, the number of positives.
        overlap: ``giou`` as released; ``iou`` as the paper writes.

    Returns:
        [] the loss; 0 where the class scores are equal, whatever the boxes.
    """
    gap = largest_score_gap(student_logits, teacher_logits)
    similarity = paired_giou if overlap == "giou" else paired_iou
    distance = 1 - similarity(student_boxes_xyxy, teacher_boxes_xyxy.detach())
    return (distance * (gap * weights)).sum() / normalizer


@dataclass(frozen=True)
class BCKDTaught(Taught):
    """The teacher's class logits and boxes; with several anchors for each cell also the anchors."""

    prediction: Dense


class BCKD(Method[BCKDTaught]):
    """BCKD between two dense detectors with sigmoid classes and the same cells; their box codings may differ.

    The divisor of both terms is the number of positives of the student's own assignment (each image counts at least 1). All
    locations count that the student's detector does not ignore, with or without boxes in the image. Quality outputs (centerness)
    are not compared. The released code also changes two details of the student's own loss (an offset of the score that weights
    the box loss, and its divisor); the student's loss is unchanged here.
    """

    slug = "bckd"
    title = "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection (ICCV 2023)"
    bibtex = """@inproceedings{yang2023bridging,
  title={Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection},
  author={Yang, Longrong and Zhou, Xianpan and Li, Xuewei and Qiao, Liang and Li, Zheyang and Yang, Ziwei and Wang, Gaoang
    and Li, Xi},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2023}
}"""
    teach_settings = ()

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        cls_weight: Weight = 1.0,
        box_weight: Weight = 4.0,
        beta: Annotated[float, Limits(1)] = 1.0,
        overlap: Overlap = "giou",
        level_rule: LevelRule = "skip",
        levels: Sequence[int] | None = None,
    ) -> None:
        """Pair the levels.

        Args:
            teacher: a dense detector with sigmoid classes that knows the student's classes.
            student: a dense detector with sigmoid classes and the teacher's cells.
            cls_weight: factor of the class loss.
            box_weight: factor of the box loss.
            beta: exponent of the gap between the class scores that weights the class loss.
            overlap: similarity of boxes: ``giou``, as released; ``iou``, as the paper writes.
            level_rule: ``skip``: a level without any positive in the batch counts nothing, as released; ``all``: all count.
            levels: indices of the student levels to use; None: all.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            PairError: a detector that is not dense or has softmax classes, different cells, or a class that the teacher lacks.
        """
        super().__init__(teacher, student)
        check_some(self.slug, cls_weight=cls_weight, box_weight=box_weight)
        self.cls_weight, self.box_weight, self.beta = cls_weight, box_weight, beta
        self.overlap: Overlap = overlap
        self.level_rule: LevelRule = level_rule
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        self.columns = class_columns(student.spec.classes, teacher.spec.classes, softmax=False)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Predictions of two dense detectors with the same cells and anchors, and sigmoid scores of the same classes."""
        levels = settings["levels"]
        return Needs(
            teacher=PREDICTION,
            teacher_families=("dense",),
            student_families=("dense",),
            same_classes=True,
            outputs="sigmoid",
            same_cells=True,
            same_anchors=True if levels is None else tuple(levels),
        )

    @torch.no_grad()
    def teach(self, batch: Batch) -> BCKDTaught:
        """Return the teacher's logits and boxes, so that a cache holds no feature maps."""
        prediction = self.teacher.observe(batch, PREDICTION).prediction
        assert isinstance(prediction, Dense)
        return BCKDTaught(only_parts(prediction, *(("priors_xyxy",) if max(self.teacher.spec.anchors) > 1 else ())))

    def learn(self, student: Detector, seen: Observation, taught: BCKDTaught, batch: Batch, clock: Clock) -> Losses:
        """Compute the terms ``bckd_cls`` and ``bckd_box``; terms with weight 0 are left out."""
        mine, theirs = seen.prediction, taught.prediction
        assert isinstance(mine, Dense)
        with full_precision(batch.images.device):
            partners = find_partners(mine, theirs, [(pair.student, pair.teacher) for pair in self.pairs])
            check_same_anchors(self.slug, mine, theirs, partners)
            with torch.no_grad():
                assignment = student.assign(mine, batch)
                weights = bckd_weights(assignment, mine.levels, mine.logits, self.level_rule) * partners.mask
                normalizer = number_of_positives(assignment, mine.logits)
                logits, boxes = partners.take(theirs.logits)[..., self.columns], partners.take(theirs.boxes_xyxy)
            terms = {}
            if self.cls_weight:
                loss = bckd_class_loss(mine.logits, logits, weights, normalizer, self.beta)
                terms["bckd_cls"] = self.cls_weight * loss
            if self.box_weight:
                loss = bckd_box_loss(mine.boxes_xyxy, boxes, mine.logits, logits, weights, normalizer, self.overlap)
                terms["bckd_box"] = self.box_weight * loss
            return Losses(terms)
