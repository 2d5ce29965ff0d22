"""FRS: imitate features and class scores, each cell weighted by the teacher's best class score there (its feature richness).

Du, Zhang, Chang, Zhang, Liu, Chen, Chen, "Distilling Object Detectors with Feature Richness", NeurIPS 2021, arXiv 2111.00674.
No ground-truth boxes are used.

Shape letters: B images, C channels of the teacher, H x W cells of one level, A anchors of a cell, K class outputs of an anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.detectors.contract import PREDICTION, Detector, DetectorSpec, Teacher
from detdistill.functional.classes import class_columns
from detdistill.functional.counting import mean_over_ranks
from detdistill.functional.dense_maps import to_map
from detdistill.functional.masks import best_scores, score_mask
from detdistill.functional.precision import full_precision
from detdistill.functional.soft_targets import soft_cross_entropy
from detdistill.methods.shared.align import LevelAdapters, PairedMaps, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.structures import Batch, Clock, Dense, Features, Look, Losses, Observation, Prediction, Regions, Taught
from detdistill.values import Index, Weight


def frs_richness(logits: Tensor) -> Tensor:
    """The largest class score of each cell, over anchors and classes; it is soft and never thresholded.

    Args:
        logits: [B, A * K, H, W] sigmoid logits of the teacher, treated as constant.

    Returns:
        [B, H, W] between 0 and 1, at least float32.

    Example:
        >>> frs_richness(torch.tensor([0.0, -9.0]).view(1, 2, 1, 1)).item()
        0.5
    """
    return best_scores(logits.movedim(1, -1))


def frs_feature_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], richness: Sequence[Tensor], weight: float = 0.005
) -> Tensor:
    """Squared difference of the maps, weighted by richness m: ``weight * sum m (T - S)^2 / sum m``, summed over levels.

    The upper sum runs over images, channels and cells, the lower one over images and cells. Channels are summed and not averaged,
    as in the released code. Duplicating the batch changes nothing.

    Args:
        student: L maps [B, C, H, W] after the adapter; gradient flows.
        teacher: L maps of the same shapes, treated as constant.
        richness: L masks [B, H, W] (``frs_richness``), treated as constant.
        weight: factor of every level's loss (alpha).

    Returns:
        [] the loss.

    Example:
        >>> float(frs_feature_loss([torch.ones(1, 3, 1, 2)], [torch.zeros(1, 3, 1, 2)], [torch.tensor([[[0.5, 0.25]]])], 1.0))
        3.0
    """
    levels = [
        ((mine - theirs.detach()).square().sum(dim=1) * mask.detach()).sum() / _mass(mask)
        for mine, theirs, mask in zip(student, teacher, richness, strict=True)
    ]
    return weight * torch.stack(levels).sum()


def frs_class_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    richness: Sequence[Tensor],
    weight: float = 0.02,
    softmax_outputs: int | None = None,
) -> Tensor:
    """Cross-entropy with the teacher's class scores, weighted by richness m: ``weight * sum m CE / sum m``, summed over levels.

    The upper sum runs over images, anchors, classes and cells. The smallest value is the teacher's entropy and not 0. Scores are
    taken from the logits, so that saturated ones keep their gradient; the released code takes logarithms of the scores.

    Args:
        student: L maps of logits [B, A * K, H, W]; gradient flows.
        teacher: L maps of logits of the same shapes, treated as constant.
        richness: L masks [B, H, W], treated as constant.
        weight: factor of every level's loss (beta).
        softmax_outputs: None: sigmoid scores, and the binary cross-entropy of each. K: the K outputs of each anchor are softmax
            logits, background included, and their cross-entropy is taken (not in the paper).

    Returns:
        [] the loss.
    """
    levels = []
    for mine, theirs, mask in zip(student, teacher, richness, strict=True):
        constant = mask.detach()[:, None]
        if softmax_outputs is None:
            total = F.binary_cross_entropy_with_logits(mine, theirs.detach().sigmoid(), constant, reduction="sum")
        else:
            by_anchor = [side.unflatten(1, (-1, softmax_outputs)) for side in (mine, theirs)]
            total = (soft_cross_entropy(by_anchor[0], by_anchor[1], dim=2) * constant).sum()
        levels.append(total / _mass(mask))
    return weight * torch.stack(levels).sum()


def _mass(mask: Tensor) -> Tensor:
    """[] the sum of a mask, above 0; the mean over processes."""
    return mean_over_ranks(mask.sum(), least=torch.finfo(mask.dtype).tiny)


@dataclass(frozen=True)
class FRSTaught(Taught):
    """Features, masks and class logits of the teacher: less than its whole prediction, so a cache is smaller."""

    features: Features
    richness: tuple[Tensor, ...]
    """L masks [B, H, W]; 0 in cells that stacking adds to a smaller map."""
    logits: tuple[Tensor, ...] = ()
    """L maps [B, A * K, H, W] of class logits; empty without the class term."""


_PROFILES = {"retinanet": (0.005, 0.02), "faster_rcnn": (0.002, 0.1), "fcos": (0.01, 0.05), "gfl": (0.1, 0.05)}


class FRS(Method[FRSTaught]):
    """FRS between the necks' maps and the class scores of dense heads; levels are paired by stride.

    In two-stage detectors the first stage is the dense head: its objectness is the class score. Centerness and IoU branches are
    not used. Softmax scores, which the paper does not treat, leave the background out of the richness.
    """

    slug = "frs"
    title = "Distilling Object Detectors with Feature Richness (NeurIPS 2021)"
    bibtex = """@inproceedings{du2021frs,
  title={Distilling Object Detectors with Feature Richness},
  author={Du, Zhixing and Zhang, Rui and Chang, Ming and Zhang, Xishan and Liu, Shaoli and Chen, Tianshi and Chen, Yunji},
  booktitle={Advances in Neural Information Processing Systems},
  year={2021}
}"""
    teach_settings = ("class_term",)

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        profile: Literal["retinanet", "faster_rcnn", "fcos", "gfl"] = "retinanet",
        feature_weight: Weight | None = None,
        class_weight: Weight | None = None,
        class_term: bool = True,
        warm_steps: Index = 500,
        kernel: Literal[1, 3] = 3,
        levels: Sequence[int] | None = None,
    ) -> None:
        """Pair the levels; each pair has a convolution on the student, for equal channels, too.

        Args:
            teacher: a dense or two-stage detector.
            student: with the class term a detector of the teacher's kind with the same strides, anchors and classes; else any.
            profile: which published weights to use.
            feature_weight: factor of the feature loss (alpha); None: the profile's.
            class_weight: factor of the class loss (beta); None: the profile's.
            class_term: compare class scores, too. False: features only, for pairs of unlike heads.
            warm_steps: steps over which both weights rise linearly from 0.
            kernel: side of the convolutions.
            levels: indices of the student levels to use; None: all that have a partner.

        Raises:
            MethodError: all weights are 0.
            PairError: no common level; with the class term also two detectors of different kinds.
        """
        super().__init__(teacher, student)
        published = _PROFILES[profile]
        self.feature_weight = published[0] if feature_weight is None else feature_weight
        self.class_weight = (published[1] if class_weight is None else class_weight) if class_term else 0.0
        check_some(self.slug, feature_weight=self.feature_weight, class_weight=self.class_weight)
        self.class_term, self.warm_steps = class_term, warm_steps
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        self.adapters = LevelAdapters(self.pairs, always=True, kernel=kernel)
        self.paired_maps = PairedMaps(self.pairs, self.adapters, resize=True)
        if class_term:
            self._prepare_classes(student.spec, teacher.spec)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """A teacher with a dense head; with the class term a student with the same cells and classes."""
        with_classes = settings["class_term"]
        families = ("dense", "regions")
        return Needs(
            teacher=Look(prediction=True),
            teacher_families=families,
            student_families=families if with_classes else (),
            same_classes=with_classes,
            outputs="same" if with_classes else "any",
            same_cells=with_classes,
        )

    def _prepare_classes(self, mine: DetectorSpec, theirs: DetectorSpec) -> None:
        """Find the teacher's class outputs in the student's order, and the number of softmax outputs.

        Raises:
            PairError: one detector has one stage, the other two.
        """
        if mine.family != theirs.family:
            raise PairError(
                f"{self.slug}: the dense head of the teacher {theirs.name} ({theirs.family}) and of the student {mine.name} "
                f"({mine.family}) predict different things; use class_term=false"
            )
        one_stage = mine.family == "dense"
        softmax = one_stage and mine.softmax
        self.columns = class_columns(mine.classes, theirs.classes, softmax) if one_stage else [0]
        self.softmax_outputs = len(self.columns) if softmax else None

    @torch.no_grad()
    def teach(self, batch: Batch) -> FRSTaught:
        """Compute the maps, the richness of their cells and, with the class term, the class logits of all levels."""
        seen = self.teacher.observe(batch, PREDICTION)
        dense = _dense_head(seen.prediction)
        levels = range(len(seen.features.maps))
        richness = tuple(score_mask(dense, level) for level in levels)
        logits = tuple(to_map(dense.logits, dense, level) for level in levels) if self.class_term else ()
        return FRSTaught(seen.features, richness, logits)

    def learn(self, student: Detector, seen: Observation, taught: FRSTaught, batch: Batch, clock: Clock) -> Losses:
        """Compute the terms ``frs_features`` and ``frs_classes``; terms with weight 0 are left out."""
        richness = [taught.richness[pair.teacher] for pair in self.pairs]
        warm, terms = clock.warm_up(self.warm_steps), {}
        with full_precision(batch.images.device):
            if self.feature_weight:
                mine, theirs = self.paired_maps(seen.features, taught.features)
                terms["frs_features"] = warm * frs_feature_loss(mine, theirs, richness, self.feature_weight)
            if self.class_weight:
                classes = frs_class_loss(*self._scores(seen, taught, richness), self.class_weight, self.softmax_outputs)
                terms["frs_classes"] = warm * classes
            mean = torch.stack([level.mean() for level in richness]).mean()
        return Losses(terms, {"richness": mean})

    def _scores(
        self, seen: Observation, taught: FRSTaught, richness: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Class logits of both sides, [B, A * K, H, W] in the student's order, and the richness of the compared levels."""
        dense = _dense_head(seen.prediction)
        outputs = taught.logits[0].shape[1] // self.teacher.spec.anchors[0]
        levels = []
        for pair, mask in zip(self.pairs, richness, strict=True):
            theirs = taught.logits[pair.teacher].unflatten(1, (-1, outputs))[:, :, self.columns].flatten(1, 2)
            levels.append(_common(to_map(dense.logits, dense, pair.student), theirs, mask))
        return [level[0] for level in levels], [level[1] for level in levels], [level[2] for level in levels]


def _dense_head(prediction: Prediction | None) -> Dense:
    """The dense prediction: of a one-stage detector, or of the first stage."""
    dense = prediction.first if isinstance(prediction, Regions) else prediction
    assert isinstance(dense, Dense)
    return dense


def _common(*maps: Tensor) -> tuple[Tensor, ...]:
    """The cells that all maps [..., H, W] have: strides are equal, but necks may round the size of a level differently."""
    height, width = (min(level.shape[dim] for level in maps) for dim in (-2, -1))
    return tuple(level[..., :height, :width] for level in maps)
