"""CWD: each channel of the student should be strong at the same positions as the teacher's channel.

Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from detdistill.detectors.contract import Detector, DetectorSpec, Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.classes import class_columns
from detdistill.functional.dense_maps import to_map
from detdistill.functional.level_maps import paired_levels
from detdistill.functional.precision import full_precision
from detdistill.functional.similarity import mean_cosine
from detdistill.functional.soft_targets import kl_divergence, soft_cross_entropy
from detdistill.methods.shared.align import LevelAdapters, PairedMaps, pair_levels, resize_like
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.structures import Batch, Clock, Dense, Look, Losses, Observation
from detdistill.values import Positive, Weight


def cwd_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: float = 5.0,
    temperature: float = 1.0,
    divisors: Sequence[int] | None = None,
    cross_entropy: bool = False,
) -> Tensor:
    """KL divergence between softmaxes over the positions of each channel, summed over levels (equations 3 and 4).

    For each level ``weight * temperature^2 / (B * C) * sum p * (log p - log q)`` with p the teacher's and q the student's
    softmax over H*W: a mean over images and channels, a sum over positions. Padded cells count like all others; boxes
    are not used. Follows mmrazor.

    Args:
        student: L maps [B, C, H, W], already in the teacher's channels; gradient flows.
        teacher: L maps of the same shapes, treated as constant.
        weight: factor of every level's loss.
        temperature: of both softmaxes, above 0.
        divisors: L numbers that replace C. mmdetection-distiller divides by the student's channels before its adapter.
        cross_entropy: compute the cross-entropy instead of the divergence, as mmdetection-distiller does. The gradient is the
            same, but the minimum is not 0.

    Returns:
        [] the loss.

    Raises:
        DetdistillError: the shapes of a level differ, or ``temperature`` is not above 0.

    Example:
        >>> import torch
        >>> maps = torch.arange(16.0).reshape(1, 4, 2, 2)
        >>> abs(round(float(cwd_loss([maps], [maps + 7])), 6))
        0.0
    """
    if not temperature > 0:
        raise DetdistillError(f"cwd: temperature={temperature} is not a number above 0")
    losses = []
    for level, (mine, theirs) in enumerate(paired_levels("cwd_loss", student, teacher)):
        positions = mine.flatten(2), theirs.flatten(2)  # [B, C, H*W]
        if cross_entropy:
            distance = temperature**2 * soft_cross_entropy(*positions, temperature)
        else:
            distance = kl_divergence(*positions, temperature)
        rows = len(mine) * (mine.shape[1] if divisors is None else divisors[level])
        losses.append(weight * distance.sum() / rows)
    return sum(losses[1:], losses[0])


def cwd_logit_map(prediction: Dense, level: int, classes: Sequence[int] | None = None) -> Tensor:
    """Class logits of one level as a map with one channel for each anchor and class.

    Args:
        prediction: of a dense detector; logits [B, P, K].
        level: index of the level.
        classes: columns of the logits to take, in this order; None: all.

    Returns:
        [B, A * K, H, W], raw logits (before the sigmoid); the channel of anchor a and class k is ``a * K + k``.
    """
    logits = to_map(prediction.logits, prediction, level)
    if classes is None:
        return logits
    by_anchor = logits.view(len(logits), -1, prediction.logits.shape[-1], *logits.shape[-2:])
    return by_anchor[:, :, list(classes)].flatten(1, 2)


class CWD(Method[Observation]):
    """CWD between the necks' maps, or between the class logits of dense detectors; levels are paired by stride."""

    slug = "cwd"
    title = "Channel-wise Knowledge Distillation for Dense Prediction (ICCV 2021)"
    bibtex = """@inproceedings{shu2021cwd,
  title={Channel-wise Knowledge Distillation for Dense Prediction},
  author={Shu, Changyong and Liu, Yifan and Gao, Jianfei and Yan, Zheng and Shen, Chunhua},
  booktitle={IEEE/CVF International Conference on Computer Vision},
  year={2021}
}"""

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        on: Literal["features", "logits"] = "features",
        weight: Weight = 5.0,
        temperature: Positive = 1.0,
        levels: Sequence[int] | None = None,
        channels: Literal["compared", "student"] = "compared",
        resize_student: bool = False,
    ) -> None:
        """Pair the levels; channels that differ get a 1x1 convolution on the student, as in mmdetection-distiller.

        Args:
            teacher: any detector; for ``logits`` a dense one that knows the student's classes.
            student: any detector; for ``logits`` a dense one.
            on: what is compared: ``features``, the necks' maps; ``logits``, class logits with one channel for each anchor and
                class.
            weight: factor of every level's loss; 5 in mmdetection-distiller, 10 in mmrazor (five levels).
            temperature: of the softmax; 1 for detection, 4 for segmentation.
            levels: indices of the student levels to use; None: all that have a partner (mmdetection-distiller: the first four).
            channels: divisor of the sum: ``compared``, the number of compared channels (mmrazor); ``student``, the student's
                channels before its adapter (mmdetection-distiller). No effect with ``logits``.
            resize_student: resize the student's maps to the teacher's size; False: maps of different sizes are an error, as
                in the released codes.

        Raises:
            MethodError: a hyper-parameter is out of range.
            PairError: no common level; with ``logits`` also a detector that is not dense, a class that the teacher lacks,
                softmax on one side and sigmoid on the other, or different numbers of anchors.
        """
        super().__init__(teacher, student)
        self.on, self.weight, self.temperature, self.resize_student = on, weight, temperature, resize_student
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        self.divisors: list[int] | None = None
        if on == "features":
            self.adapters = LevelAdapters(self.pairs)
            self.paired_maps = PairedMaps(self.pairs, self.adapters)
            if channels == "student":
                self.divisors = [pair.student_channels for pair in self.pairs]
        else:
            self.columns = class_columns(student.spec.classes, teacher.spec.classes, student.spec.softmax)
            self._check_anchors(student.spec, teacher.spec)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Features of any detectors for ``features``; predictions of dense detectors with equal classes for ``logits``."""
        if settings["on"] == "features":
            return Needs()
        families = ("dense",)
        return Needs(
            teacher=Look(prediction=True),
            teacher_families=families,
            student_families=families,
            same_classes=True,
            outputs="same",
        )

    def _check_anchors(self, mine: DetectorSpec, theirs: DetectorSpec) -> None:
        """Check that both sides have the same number of anchors in a cell of each compared level.

        Raises:
            PairError: the numbers differ.
        """
        for pair in self.pairs:
            if mine.anchors[pair.student] != theirs.anchors[pair.teacher]:
                raise PairError(
                    f"{self.slug}: the student {mine.name} has {mine.anchors[pair.student]} anchors in a cell of stride "
                    f"{mine.strides[pair.student]}, the teacher {theirs.name} {theirs.anchors[pair.teacher]}; use on=features"
                )

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Compute the term ``cwd``; the monitor ``cosine`` is the mean cosine of the compared maps."""
        with full_precision(batch.images.device):
            if self.on == "features":
                mine, theirs = self.paired_maps(seen.features, taught.features)
            else:
                mine, theirs = self._logits(seen, taught)
            if self.resize_student:
                mine = [resize_like(level, fixed) for level, fixed in zip(mine, theirs, strict=True)]
            loss = cwd_loss(mine, theirs, self.weight, self.temperature, self.divisors)
            return Losses({"cwd": loss}, {"cosine": mean_cosine(mine, theirs)})

    def _logits(self, seen: Observation, taught: Observation) -> tuple[list[Tensor], list[Tensor]]:
        assert isinstance(seen.prediction, Dense)
        assert isinstance(taught.prediction, Dense)
        mine = [cwd_logit_map(seen.prediction, pair.student) for pair in self.pairs]
        theirs = [cwd_logit_map(taught.prediction, pair.teacher, self.columns) for pair in self.pairs]
        return mine, theirs
