"""RM and PFI: imitate the ranking of each object's positives, and the features where the predictions differ.

Li, Li, Wang, Zhang, Wu, Liang, "Knowledge Distillation for Object Detection via Rank Mimicking and Prediction-Guided Feature
Imitation", AAAI 2022, arXiv 2112.04840.

This is a reconstruction: no code was released, and the paper's full text was not available. The formulas come from descriptions
of the paper and from an independent implementation, which agree with each other; what they leave open is said below.

Shape letters: B images, P predictions of an image, K classes, C channels, H x W cells of a level, M positives of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from detdistill.detectors.contract import Detector, Teacher
from detdistill.functional.boxes import paired_iou
from detdistill.functional.classes import class_columns
from detdistill.functional.counting import divisor_over_ranks, number_objects
from detdistill.functional.dense_maps import Partners, find_partners, to_map
from detdistill.functional.precision import full_precision
from detdistill.methods.shared.align import LevelAdapters, PairedMaps, pair_levels, resize_like
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.methods.shared.needs import Needs
from detdistill.structures import Batch, Clock, Dense, Look, Losses, Observation
from detdistill.values import Positive, Weight


def rm_pfi_rank_loss(
    student_scores: Tensor, teacher_scores: Tensor, objects: Tensor, count: int, temperature: float = 1.0
) -> Tensor:
    """Rank mimicking: divergence of the softmaxes over the positives of each object, averaged over the objects.

    ``sum over positives i of an object of t_i log(t_i / s_i)`` with ``s = softmax over its positives (scores / T)``; no factor
    T^2. Adding a number to all scores of an object changes nothing, and an object with one positive adds 0.

    Args:
        student_scores: [M] score of each positive, such as the probability of its object's class; gradient flows.
        teacher_scores: [M], treated as constant.
        objects: [M] int64 number of each positive's object, 0 .. count-1 (``counting.number_objects``).
        count: number of objects.
        temperature: T, above 0.

    Returns:
        [] the loss; 0, and still part of the graph, without positives.

    Example:
        >>> one_object = torch.tensor([0, 0])
        >>> rm_pfi_rank_loss(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]), one_object, count=1)
        tensor(0.1109)
    """
    log_q = _log_softmax(student_scores / temperature, objects, count)
    log_p = _log_softmax(teacher_scores.detach() / temperature, objects, count)
    ratio = log_q - log_p
    # Equal to the sum of p (log p - log q), as p and q sum to 1; its terms do not cancel when the ranks are nearly equal.
    return (log_p.exp() * (torch.expm1(ratio) - ratio)).sum() / divisor_over_ranks(count, student_scores)


def _log_softmax(scores: Tensor, groups: Tensor, count: int) -> Tensor:
    """[M] logarithm of the softmax within each of ``count`` groups."""
    lowest = scores.new_full((count,), -torch.inf)
    largest = lowest.scatter_reduce(0, groups, scores.detach(), "amax")
    shifted = scores - largest[groups]
    sums = scores.new_zeros(count).index_add(0, groups, shifted.exp())
    return shifted - sums.log()[groups]


def rm_pfi_prediction_gap(student_logits: Tensor, teacher_logits: Tensor, softmax: bool = False) -> Tensor:
    """Squared difference of the class probabilities of each prediction, averaged over the classes.

    Args:
        student_logits: [B, P, K] sigmoid logits, or [B, P, K+1] softmax logits with the background last; gradient flows.
        teacher_logits: the same shape, treated as constant.
        softmax: the logits are softmax logits; the background is left out.

    Returns:
        [B, P].
    """
    mine, theirs = (_probabilities(logits, softmax) for logits in (student_logits, teacher_logits.detach()))
    return (theirs - mine).square().mean(dim=-1)


def rm_pfi_feature_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], gaps: Sequence[Tensor], detach_gaps: bool = True
) -> Tensor:
    """Prediction-guided feature imitation: the squared difference of the maps, weighted by the gap of the predictions.

    ``mean over images and cells of gap * (mean over channels of (teacher - student)^2)``, averaged over levels.

    Args:
        student: L maps [B, C, H, W] in the teacher's channels and at its size; gradient flows.
        teacher: L maps of the same shapes, treated as constant.
        gaps: L weights [B, H, W]: the mean of ``rm_pfi_prediction_gap`` over the anchors of each cell.
        detach_gaps: treat the weights as constant; False: gradient also flows through them to the student's predictions.

    Returns:
        [] the loss.

    Example:
        >>> rm_pfi_feature_loss([torch.zeros(1, 3, 2, 2)], [torch.full((1, 3, 2, 2), 2.0)], [torch.full((1, 2, 2), 0.25)])
        tensor(1.)
    """
    losses = []
    for mine, theirs, gap in zip(student, teacher, gaps, strict=True):
        apart = (theirs.detach() - mine).square().mean(dim=1)
        losses.append(((gap.detach() if detach_gaps else gap) * apart).mean())
    return torch.stack(losses).mean()


def _probabilities(logits: Tensor, softmax: bool) -> Tensor:
    return logits.softmax(dim=-1)[..., :-1] if softmax else logits.sigmoid()


class RMPFI(Method[Observation]):
    """RM and PFI between two dense detectors with equal levels and anchors; a reconstruction, because no code was released.

    Left open by the sources: whose assignment makes the positives (here the student's, as anchors coincide), the objects that are
    counted (here those with a positive, over the whole batch), the weights of the two rankings (here equal), and whether the
    gap is constant in PFI (``detach_gaps``). Softmax scores (SSD) are ours; the paper's detectors have sigmoids.
    """

    slug = "rm_pfi"
    title = "Knowledge Distillation for Object Detection via Rank Mimicking and Prediction-Guided Feature Imitation (AAAI 2022)"
    bibtex = """@inproceedings{li2022rmpfi,
  title={Knowledge Distillation for Object Detection via Rank Mimicking and Prediction-Guided Feature Imitation},
  author={Li, Gang and Li, Xiang and Wang, Yujie and Zhang, Shanshan and Wu, Yichao and Liang, Ding},
  booktitle={Proceedings of the AAAI Conference on Artificial Intelligence},
  volume={36},
  number={2},
  pages={1306--1313},
  year={2022}
}"""

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        rank_weight: Weight = 4.0,
        feature_weight: Weight = 1.5,
        rank: Literal["both", "class", "box"] = "both",
        scores: Literal["probabilities", "logits"] = "probabilities",
        temperature: Positive = 1.0,
        detach_gaps: bool = True,
        always_adapt: bool = False,
        levels: Sequence[int] | None = None,
    ) -> None:
        """Pair the levels; channels that differ get a 1x1 convolution on the student.

        Args:
            teacher: a dense detector with the student's levels and anchors that knows its classes.
            student: a dense detector.
            rank_weight: factor of rank mimicking.
            feature_weight: factor of prediction-guided feature imitation.
            rank: qualities of positives that are ranked: ``class``, the score of the object's class; ``box``, the IoU of the
                predicted box with the object; ``both``, the sum of two losses.
            scores: class scores that are ranked. Logits differ more than probabilities; give them a smaller weight.
            temperature: of the softmax over the positives of an object.
            detach_gaps: treat the gaps of the predictions as constant weights of the features.
            always_adapt: add the convolution for equal channels too, as the independent implementation does.
            levels: indices of the student levels to use, for positives and features; None: all.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            PairError: a detector that is not dense, other levels or anchors, classes that the teacher lacks, or sigmoid scores
                on one side and softmax on the other.
        """
        super().__init__(teacher, student)
        check_some(self.slug, rank_weight=rank_weight, feature_weight=feature_weight)
        self.rank_weight, self.feature_weight, self.rank = rank_weight, feature_weight, rank
        self.scores, self.temperature, self.detach_gaps = scores, temperature, detach_gaps
        self.softmax = student.spec.softmax
        self.columns = class_columns(student.spec.classes, teacher.spec.classes, self.softmax)
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        self.adapters = LevelAdapters(self.pairs if feature_weight else (), always_adapt)
        self.paired_maps = PairedMaps(self.pairs, self.adapters, resize=True)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Predictions of two dense detectors with equal classes, class scores and cells."""
        return Needs(
            teacher=Look(prediction=True),
            teacher_families=("dense",),
            student_families=("dense",),
            same_classes=True,
            outputs="same",
            same_cells=True,
        )

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Terms ``rank_class``, ``rank_box`` and ``guided_features``, without those that are turned off.

        The monitor ``ranked`` is the number of objects with positives.
        """
        mine, theirs = seen.prediction, taught.prediction
        assert isinstance(mine, Dense)
        assert isinstance(theirs, Dense)
        terms: dict[str, Tensor] = {}
        monitors: dict[str, Tensor] = {}
        with full_precision(batch.images.device):
            partners = find_partners(mine, theirs, [(pair.student, pair.teacher) for pair in self.pairs])
            logits = partners.take(theirs.logits[..., self.columns])
            if self.rank_weight:
                ranks, count = self._ranks(student, mine, logits, partners.take(theirs.boxes_xyxy), partners, batch)
                terms |= {f"rank_{name}": self.rank_weight * value for name, value in ranks.items()}
                monitors["ranked"] = torch.tensor(float(count), device=batch.images.device)
            if self.feature_weight:
                gap = rm_pfi_prediction_gap(mine.logits, logits, self.softmax) * partners.mask
                maps = self.paired_maps(seen.features, taught.features)
                levels = (to_map(gap, mine, pair.student).mean(dim=1, keepdim=True) for pair in self.pairs)
                gaps = [resize_like(level, fixed)[:, 0] for level, fixed in zip(levels, maps[1], strict=True)]
                terms["guided_features"] = self.feature_weight * rm_pfi_feature_loss(*maps, gaps, self.detach_gaps)
        return Losses(terms, monitors)

    def _ranks(
        self, student: Detector, mine: Dense, logits: Tensor, boxes_xyxy: Tensor, partners: Partners, batch: Batch
    ) -> tuple[dict[str, Tensor], int]:
        """The unweighted losses of rank mimicking, and the number of objects with positives.

        Args:
            student: assigns its predictions.
            mine: its prediction.
            logits: [B, P, K] of the teacher, in the student's order.
            boxes_xyxy: [B, P, 4] of the teacher, in the student's order.
            partners: tells which predictions the teacher has.
            batch: images with ground truth.
        """
        assignment = student.assign(mine, batch)
        found = student.positives(mine, assignment.as_ignored(~partners.mask), batch)
        objects, count = number_objects(found.image, found.ground_truth)
        theirs = found.image, found.index
        pairs = {}
        if self.rank != "box":
            both = (self._class_scores(found.logits, found.labels), self._class_scores(logits[theirs], found.labels))
            pairs["class"] = both
        if self.rank != "class":
            overlaps = (paired_iou(boxes, found.targets_xyxy) for boxes in (found.boxes_xyxy, boxes_xyxy[theirs]))
            pairs["box"] = (next(overlaps), next(overlaps))
        return {name: rm_pfi_rank_loss(*both, objects, count, self.temperature) for name, both in pairs.items()}, count

    def _class_scores(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[M] score of each positive's own class, from logits [M, K] (K+1 with softmax)."""
        if self.scores == "logits":
            values = logits.log_softmax(dim=-1) if self.softmax else logits
        else:
            values = _probabilities(logits, self.softmax)
        return values.gather(1, labels[:, None])[:, 0]
