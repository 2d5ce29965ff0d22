"""TBD: imitate predictions that agree in class and box, and features under a mask for each of the two tasks.

Tang et al., "Task-Balanced Distillation for Object Detection", Pattern Recognition 137, 2023, arXiv 2208.03006.

THIS IS A RECONSTRUCTION FROM THE ABSTRACT. No code was released and the text was not available. The abstract fixes the two
parts (harmony distillation, task-decoupled feature distillation) and their purpose; every formula, weight and reduction here is
ours and unchecked.

Shape letters: B images, C channels of the teacher, H x W cells of one level, M positives of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.detectors.contract import Detector, Teacher
from detdistill.functional.boxes import paired_iou
from detdistill.functional.classes import class_columns
from detdistill.functional.counting import mean_over_ranks
from detdistill.functional.dense_maps import find_partners
from detdistill.functional.masks import overlap_mask, score_mask
from detdistill.functional.precision import full_precision
from detdistill.methods.shared.align import LevelAdapters, PairedMaps, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.methods.shared.needs import Needs
from detdistill.structures import Batch, Clock, Dense, Look, Losses, Observation
from detdistill.values import Fraction, Index, Weight

Harmony = Literal["both", "product", "gap"]
"""Forms of the harmony score of ``tbd_harmony``."""


class TaskQuality(NamedTuple):
    """How well a detector classifies and localises each of M positives."""

    scores: Tensor
    """[M] probability of the object's class."""
    overlaps: Tensor
    """[M] IoU of predicted and ground-truth box."""


def tbd_harmony(scores: Tensor, overlaps: Tensor, form: Harmony = "both") -> Tensor:
    """Harmony score of predictions: how well class score and localisation agree (our form, unchecked).

    Args:
        scores: [M] probabilities of the object's class; gradient flows.
        overlaps: [M] IoU of predicted and ground-truth box; gradient flows.
        form: ``both``: ``sqrt(score * IoU) * (1 - |score - IoU|)``, high if both are high and close (1e-12 under the root keeps
            the gradient finite); ``product``: ``score * IoU``; ``gap``: ``1 - |score - IoU|``.

    Returns:
        [M] 0..1.

    Example:
        >>> tbd_harmony(torch.tensor([1.0, 0.9, 0.1]), torch.tensor([1.0, 0.4, 0.1]))
        tensor([1.0000, 0.3000, 0.1000])
    """
    agreement = 1 - (scores - overlaps).abs()
    if form == "gap":
        return agreement
    if form == "product":
        return scores * overlaps
    return (scores * overlaps + 1e-12).sqrt() * agreement


def tbd_harmony_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance of harmony scores, weighted by the teacher's: ``sum t |t - s| / max(sum t, 1e-6)``, [].

    Args:
        student: [M] scores of the positives; gradient flows.
        teacher: [M] scores of the teacher's predictions at the same places, treated as constant.
    """
    fixed = teacher.detach()
    return (fixed * (fixed - student).abs()).sum() / mean_over_ranks(fixed.sum(), least=1e-6)


@torch.no_grad()
def tbd_task_weights(student: TaskQuality, teacher: TaskQuality, image: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
    """Weights of both tasks for each image: the task in which the student is further behind counts more; no gradient.

    ``2 e / (sum of both e)`` of each task, where e is the mean over an image's positives of the absolute difference between
    student and teacher. 1e-6 is added so that equal errors, or no positives, give the weight 1.

    Args:
        student: qualities of the student's positives.
        teacher: qualities of the teacher's predictions at the same places.
        image: [M] image of each positive.
        num_images: B.

    Returns:
        The weights for classification and for regression, [B] each; they sum to 2.
    """
    gaps = torch.stack([(mine - theirs).abs() for mine, theirs in zip(student, teacher, strict=True)], dim=1)  # [M, 2]
    sums = gaps.new_zeros(num_images, 2).index_add_(0, image, gaps)
    counts = torch.bincount(image, minlength=num_images).clamp(min=1)
    errors = sums / counts[:, None]
    weights = (2 * errors + 1e-6) / (errors.sum(dim=1, keepdim=True) + 1e-6)
    return weights[:, 0], weights[:, 1]


def tbd_feature_loss(
    student: Tensor, teacher: Tensor, class_mask: Tensor, box_mask: Tensor, class_weights: Tensor, box_weights: Tensor
) -> Tensor:
    """Squared distance of features under two masks: mean over channels, weighted mean over cells, mean over images, [].

    ``class_weight * sum M_cls E / max(sum M_cls, 1e-6) + box_weight * sum M_reg E / max(sum M_reg, 1e-6)`` for each image, where
    E is the mean over channels of the squared difference. An empty mask gives 0.

    Args:
        student: [B, C, H, W] in the teacher's channels; gradient flows.
        teacher: [B, C, H, W], treated as constant.
        class_mask: [B, H, W] region of classification, treated as constant.
        box_mask: [B, H, W] region of regression, treated as constant.
        class_weights: [B] (``tbd_task_weights``).
        box_weights: [B].
    """
    weights = [
        task[:, None, None] * mask.detach() / mask.detach().sum(dim=(1, 2), keepdim=True).clamp(min=1e-6)
        for task, mask in ((class_weights, class_mask), (box_weights, box_mask))
    ]
    error = F.mse_loss(student, teacher.detach(), reduction="none").mean(dim=1)
    return (error * (weights[0] + weights[1])).sum() / len(student)


class TBD(Method[Observation]):
    """TBD between the necks' maps and the predictions of two dense detectors; a reconstruction from the abstract.

    Levels are paired by stride, predictions by cell and anchor. The positives are those of the student's own assignment. Every
    formula and weight is ours: no code was released.
    """

    slug = "tbd"
    title = "Task-Balanced Distillation for Object Detection (Pattern Recognition 2023), a reconstruction from the abstract"
    bibtex = """@article{tang2023tbd,
  title={Task-Balanced Distillation for Object Detection},
  author={Tang, Ruining and Liu, Zhenyu and Li, Yangguang and Song, Yiguo and Liu, Hui and Wang, Qide and Shao, Jing
          and Duan, Guifang and Tan, Jianrong},
  journal={Pattern Recognition},
  volume={137},
  pages={109320},
  year={2023}
}"""

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        harmony_weight: Weight = 1.0,
        feature_weight: Weight = 1.0,
        harmony: Harmony = "both",
        balance: Literal["dynamic", "fixed"] = "dynamic",
        threshold: Fraction = 0.0,
        warm_up: Index = 0,
        levels: Sequence[int] | None = None,
    ) -> None:
        """Pair the levels; channels that differ get a 1x1 convolution on the student.

        Args:
            teacher: a dense detector with the student's strides, anchors and classes.
            student: a dense detector.
            harmony_weight: factor of the harmony loss.
            feature_weight: factor of the feature loss of every level; tune it first, because the features of a neck may have any
                variance.
            harmony: form of the harmony score, see ``tbd_harmony``.
            balance: weights of the two tasks in the feature loss: ``dynamic``, by the student's errors; ``fixed``, both 1.
            threshold: class scores of the teacher below this do not enter the mask of classification; 0 keeps a faint weight on
                the whole image.
            warm_up: optimizer steps over which the harmony loss rises from 0; early boxes are noise.
            levels: indices of the student levels to use; None: all that have a partner.

        Raises:
            MethodError: a hyper-parameter is out of range, or both weights are 0.
            PairError: the detectors do not fit each other.
        """
        super().__init__(teacher, student)
        check_some(self.slug, harmony_weight=harmony_weight, feature_weight=feature_weight)
        self.harmony_weight, self.feature_weight, self.harmony, self.balance = harmony_weight, feature_weight, harmony, balance
        self.threshold, self.warm_up = threshold, warm_up
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        self.adapters = LevelAdapters(self.pairs if feature_weight else ())
        self.paired_maps = PairedMaps(self.pairs, self.adapters, resize=True)
        self.register_buffer(
            "columns", torch.tensor(class_columns(student.spec.classes, teacher.spec.classes, softmax=False)), persistent=False
        )

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Features and predictions of two dense detectors with equal classes, cells and anchors."""
        return Needs(
            teacher=Look(prediction=True),
            teacher_families=("dense",),
            student_families=("dense",),
            same_classes=True,
            outputs="same",
            same_cells=True,
        )

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Terms ``tbd_harmony`` and ``tbd_feature``; a term with weight 0 is left out."""
        assert isinstance(seen.prediction, Dense)
        assert isinstance(taught.prediction, Dense)
        terms = {}
        with full_precision(batch.images.device):
            mine, theirs, image = self._qualities(student, seen.prediction, taught.prediction, batch)
            if self.harmony_weight:
                scores = [tbd_harmony(*quality, self.harmony) for quality in (mine, theirs)]
                terms["tbd_harmony"] = self.harmony_weight * clock.warm_up(self.warm_up) * tbd_harmony_loss(*scores)
            if self.feature_weight:
                weights = tbd_task_weights(mine, theirs, image, len(batch))
                if self.balance == "fixed":
                    weights = torch.ones_like(weights[0]), torch.ones_like(weights[1])
                terms["tbd_feature"] = self.feature_weight * self._feature_loss(seen, taught, batch, weights)
        return Losses(terms)

    def _qualities(
        self, student: Detector, prediction: Dense, teacher: Dense, batch: Batch
    ) -> tuple[TaskQuality, TaskQuality, Tensor]:
        """Qualities of both sides at the student's positives that have a partner, and the image [M] of each."""
        positives = student.positives(prediction, student.assign(prediction, batch), batch)
        partners = find_partners(prediction, teacher, [(pair.student, pair.teacher) for pair in self.pairs])
        kept = torch.nonzero(partners.mask[positives.image, positives.index]).flatten()
        image, labels, targets = positives.image[kept], positives.labels[kept], positives.targets_xyxy[kept]
        place = image, partners.index[positives.index[kept]]

        def quality(logits: Tensor, column: Tensor, boxes: Tensor, softmax: bool) -> TaskQuality:
            scores = logits.softmax(dim=1) if softmax else logits.sigmoid()
            return TaskQuality(scores.gather(1, column[:, None])[:, 0], paired_iou(boxes, targets))

        mine = quality(positives.logits[kept], labels, positives.boxes_xyxy[kept], positives.softmax)
        columns: Tensor = self.columns  # type: ignore[assignment]
        theirs = quality(teacher.logits[place], columns[labels], teacher.boxes_xyxy[place], teacher.softmax)
        return mine, theirs, image

    def _feature_loss(self, seen: Observation, taught: Observation, batch: Batch, weights: tuple[Tensor, Tensor]) -> Tensor:
        """The feature loss, summed over levels; padding is in no mask."""
        assert isinstance(taught.prediction, Dense)
        boxes = [target.without_crowd().boxes_xyxy for target in batch.targets]
        mine, theirs = self.paired_maps(seen.features, taught.features)
        losses = []
        for pair, student_map, teacher_map in zip(self.pairs, mine, theirs, strict=True):
            class_mask = score_mask(taught.prediction, pair.teacher)
            class_mask = class_mask.masked_fill(class_mask < self.threshold, 0.0)
            box_mask = overlap_mask(taught.prediction, pair.teacher, boxes)
            if taught.features.padding is not None:
                padding = taught.features.padding[pair.teacher]
                class_mask, box_mask = class_mask.masked_fill(padding, 0.0), box_mask.masked_fill(padding, 0.0)
            losses.append(tbd_feature_loss(student_map, teacher_map, class_mask, box_mask, *weights))
        return torch.stack(losses).sum()
