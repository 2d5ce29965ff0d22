"""CWD: each channel of the student should look where the teacher's channel looks.

Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from detdistill.detectors.contract import Detector, Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.classes import class_columns
from detdistill.functional.dense_maps import to_map
from detdistill.functional.similarity import mean_cosine
from detdistill.methods._settings import check_choice, check_temperatures, check_weights
from detdistill.methods.align import ChannelAdapters, float32, pair_levels, resize_like
from detdistill.methods.contract import Method, Needs, PairError, check_pair
from detdistill.structures import Batch, Clock, Dense, Losses, Observation, Taught


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
    softmax over H*W: a mean over images and channels, a sum over positions. Padding takes part as any other cell; boxes
    are not used. Follows mmrazor.

    Args:
        student: L maps [B, C, H, W], already in the teacher's channels; gradient flows.
        teacher: L maps of the same shapes, treated as constant.
        weight: of every level.
        temperature: of both softmaxes, above 0.
        divisors: one number for each level instead of C. mmdetection-distiller divides by the student's channels before
            its adapter.
        cross_entropy: leave out the teacher's entropy, as mmdetection-distiller: the same gradient, but not 0 at the optimum.

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
    check_temperatures("cwd", temperature=temperature)
    losses = []
    for level, (mine, theirs) in enumerate(zip(student, teacher, strict=True)):
        if mine.shape != theirs.shape:
            raise DetdistillError(
                f"cwd: level {level}: student map {tuple(mine.shape)} and teacher map {tuple(theirs.shape)} differ; "
                f"resize first (resize_student=true in the method)"
            )
        log_q = (mine.flatten(2) / temperature).log_softmax(dim=2)  # [B, C, H*W]
        log_p = (theirs.detach().flatten(2) / temperature).log_softmax(dim=2)
        gap = -log_q if cross_entropy else log_p - log_q
        rows = len(mine) * (mine.shape[1] if divisors is None else divisors[level])
        losses.append(weight * temperature**2 * (log_p.exp() * gap).sum() / rows)
    return sum(losses[1:], losses[0])


def cwd_logit_map(prediction: Dense, level: int, classes: Sequence[int] | None = None) -> Tensor:
    """One level's class logits as a map with one channel for each anchor and class.

    Args:
        prediction: of a dense detector; logits [B, P, K].
        level: which of its levels.
        classes: columns of the logits to take, in this order; None: all.

    Returns:
        [B, A * K, H, W], raw logits (before the sigmoid); the channel of anchor a and class k is ``a * K + k``.
    """
    logits = to_map(prediction.logits, prediction, level)
    if classes is None:
        return logits
    by_anchor = logits.view(len(logits), -1, prediction.logits.shape[-1], *logits.shape[-2:])
    return by_anchor[:, :, list(classes)].flatten(1, 2)


class CWD(Method):
    """CWD between necks, or between the class logits of dense detectors, paired by stride."""

    slug = "cwd"
    title = "Channel-wise Knowledge Distillation for Dense Prediction (ICCV 2021)"
    bibtex = """@inproceedings{shu2021cwd,
  title={Channel-wise Knowledge Distillation for Dense Prediction},
  author={Shu, Changyong and Liu, Yifan and Gao, Jianfei and Yan, Zheng and Shen, Chunhua},
  booktitle={IEEE/CVF International Conference on Computer Vision},
  year={2021}
}"""
    teach_settings = ("on",)

    def __init__(
        self,
        teacher: Teacher | None,
        student: Detector,
        *,
        on: Literal["features", "logits"] = "features",
        weight: float = 5.0,
        temperature: float = 1.0,
        levels: Sequence[int] | None = None,
        channels: Literal["compared", "student"] = "compared",
        resize_student: bool = False,
    ) -> None:
        """Pair the levels; channels that differ get a 1x1 convolution on the student, as in mmdetection-distiller.

        Args:
            teacher: any detector; for ``logits`` a dense one that knows the student's classes.
            student: any detector; for ``logits`` a dense one.
            on: ``features`` compares necks, ``logits`` the class logits with one channel for each anchor and class.
            weight: of every level; 5 in mmdetection-distiller, 10 in mmrazor (five levels).
            temperature: of the softmax; 1 for detection, 4 for segmentation.
            levels: student levels to use, as indices; None: all that have a partner (mmdetection-distiller: the first four).
            channels: what the sum is divided by: the channels ``compared`` (mmrazor), or the ``student``'s own before its
                adapter (mmdetection-distiller); they differ on ``features`` only.
            resize_student: where sizes differ, resize the student's map to the teacher's; False refuses them, as the
                released codes do.

        Raises:
            DetdistillError: a hyper-parameter is out of range.
            PairError: no common level; for ``logits`` also other families, unknown classes, or softmax against sigmoid.
        """
        super().__init__(teacher, student)
        check_choice(self.slug, "on", on, ("features", "logits"))
        check_choice(self.slug, "channels", channels, ("compared", "student"))
        check_weights(self.slug, weight=weight)
        check_temperatures(self.slug, temperature=temperature)
        self.on, self.weight, self.temperature, self.resize_student = on, weight, temperature, resize_student
        self.pairs = pair_levels(self.slug, student.spec, self.teacher.spec, levels)
        self.divisors: list[int] | None = None
        if on == "features":
            self.adapters = ChannelAdapters(self.pairs)
            if channels == "student":
                self.divisors = [pair.student_channels for pair in self.pairs]
        else:
            self.columns = self._match_classes(student)

    def _match_classes(self, student: Detector) -> list[int]:
        """The teacher's logit columns in the order of the student's."""
        needs = Needs(teacher_families=("dense",), student_families=("dense",), same_classes=True)
        check_pair(self.slug, needs, self.teacher, student)
        mine, theirs = student.spec, self.teacher.spec
        if mine.softmax != theirs.softmax:
            kinds = ("sigmoid", "softmax") if theirs.softmax else ("softmax", "sigmoid")
            raise PairError(
                f"{self.slug}: the student {mine.name} has {kinds[0]} and the teacher {theirs.name} {kinds[1]} class logits; "
                f"use on=features"
            )
        return class_columns(mine.classes, theirs.classes, theirs.softmax)

    def teach(self, batch: Batch) -> Taught:
        """The teacher's neck; for ``logits`` its prediction too."""
        return self.teacher.observe(batch, prediction=self.on == "logits")

    def learn(self, student: Detector, seen: Observation, taught: Taught | None, batch: Batch, clock: Clock) -> Losses:
        """One term, ``cwd``, and the ``cosine`` of the maps as a monitor."""
        assert isinstance(taught, Observation)
        mine, theirs = self._logits(seen, taught) if self.on == "logits" else self._features(seen, taught)
        if self.resize_student:
            mine = [resize_like(level, fixed) for level, fixed in zip(mine, theirs, strict=True)]
        loss = cwd_loss(mine, theirs, self.weight, self.temperature, self.divisors)
        return Losses({"cwd": loss}, {"cosine": mean_cosine(mine, theirs)})

    def _features(self, seen: Observation, taught: Observation) -> tuple[list[Tensor], list[Tensor]]:
        mine = self.adapters([seen.features.maps[pair.student] for pair in self.pairs])
        return float32(mine), float32([taught.features.maps[pair.teacher] for pair in self.pairs])

    def _logits(self, seen: Observation, taught: Observation) -> tuple[list[Tensor], list[Tensor]]:
        assert isinstance(seen.prediction, Dense)
        assert isinstance(taught.prediction, Dense)
        mine = [cwd_logit_map(seen.prediction, pair.student) for pair in self.pairs]
        theirs = [cwd_logit_map(taught.prediction, pair.teacher, self.columns) for pair in self.pairs]
        if any(a.shape[1] != b.shape[1] for a, b in zip(mine, theirs, strict=True)):
            raise PairError(f"{self.slug}: student and teacher have different numbers of anchors in a cell; use on=features")
        return float32(mine), float32(theirs)
