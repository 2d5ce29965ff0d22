"""GLAMD: imitate features and dense predictions, weighted by attention over the whole map and inside its patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.contract import Detector, Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.classes import class_columns
from detdistill.functional.counting import mean_over_ranks
from detdistill.functional.dense_maps import at_cells, find_partners
from detdistill.functional.precision import full_precision
from detdistill.methods.glamd.loss import GLAMDLevel, GLAMDTerms, glamd_box_loss, glamd_class_loss
from detdistill.methods.shared.align import pair_levels, resize_like
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.methods.shared.needs import Needs
from detdistill.structures import Batch, Clock, Dense, Look, Losses, Observation, Prediction, Regions
from detdistill.values import Count, Positive, Weight


class _Profile(NamedTuple):
    weights: tuple[float, float, float]
    temperature: float
    channel_mask: bool
    eps: float


_PROFILES = {
    # The released code adds both parts of the channel loss, with 0.012 each; here their mean has twice the weight.
    "one_stage": _Profile((4.2e-4, 2.4e-2, 2.4e-2), 0.1, True, 0.0),
    "two_stage": _Profile((7e-5, 4e-3, 4e-3), 0.5, False, 1e-10),
}


class GLAMD(Method[Observation]):
    """GLAMD between the necks' maps and the dense predictions; levels are paired by stride, predictions by cell and anchor.

    The norms are over the whole local batch, so a batch of twice the size multiplies them by sqrt(2); the published weights are
    for 4 images per device. No ground truth is used. Departures from the released code: padding gets no attention and is
    counted in no mean, and cells whose channels are all 0 are ordinary cells.
    """

    slug = "glamd"
    title = "GLAMD: Global and Local Attention Mask Distillation for Object Detectors (ECCV 2022)"
    bibtex = """@inproceedings{jang2022glamd,
  title={{GLAMD}: Global and Local Attention Mask Distillation for Object Detectors},
  author={Jang, Younho and Shin, Wheemyung and Kim, Jinbeom and Woo, Simon and Bae, Sung-Ho},
  booktitle={European Conference on Computer Vision},
  year={2022}
}"""

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        profile: Literal["one_stage", "two_stage"] = "one_stage",
        feature_weight: Weight | None = None,
        channel_weight: Weight | None = None,
        spatial_weight: Weight | None = None,
        class_weight: Weight = 0.1,
        box_weight: Weight = 0.1,
        temperature: Positive | None = None,
        patch: Count = 7,
        channel_mask: bool | None = None,
        levels: Sequence[int] | None = None,
    ) -> None:
        """Pair the levels.

        Args:
            teacher: a dense detector with the student's anchors and classes; ``two_stage``: a two-stage detector. With both
                ``class_weight`` and ``box_weight`` 0 any detector.
            student: as the teacher.
            profile: which released form to use. ``two_stage`` compares the predictions of the first stages (RPN).
            feature_weight: factor of the attention-weighted distance; None: the profile's.
            channel_weight: factor of the distance of the means over cells; None: the profile's.
            spatial_weight: factor of the distance of the means over channels; None: the profile's.
            class_weight: factor of the cross-entropy of class scores (first stage: objectness).
            box_weight: factor of the IoU loss between the decoded boxes.
            temperature: of the attention; None: the profile's, 0.1 or 0.5.
            patch: side of a patch in cells.
            channel_mask: multiply by the attention over channels too; None: only in the profile ``one_stage``, as released.
            levels: indices of the student levels to use; None: all that have a partner.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            PairError: the detectors do not fit each other.
        """
        super().__init__(teacher, student)
        published = _PROFILES[profile]
        given = zip((feature_weight, channel_weight, spatial_weight), published.weights, strict=True)
        self.weights = dict(zip(GLAMDTerms._fields, (other if mine is None else mine for mine, other in given), strict=True))
        self.weights |= {"class": class_weight, "box": box_weight}
        check_some(self.slug, **{f"{name}_weight": weight for name, weight in self.weights.items()})
        self.settings_of_attention = {
            "temperature": published.temperature if temperature is None else temperature,
            "patch": patch,
            "channel_mask": published.channel_mask if channel_mask is None else channel_mask,
            "eps": published.eps,
        }
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        self.parts = nn.ModuleList(GLAMDLevel(pair.student_channels, pair.teacher_channels) for pair in self.pairs)
        self.columns: list[int] | None = None
        if profile == "one_stage" and _compares_predictions(self.weights["class"], self.weights["box"]):
            self.columns = class_columns(student.spec.classes, teacher.spec.classes, softmax=False)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Features; and, unless their weights are 0, predictions of two detectors of one kind with equal cells and anchors."""
        if not _compares_predictions(settings["class_weight"], settings["box_weight"]):
            return Needs()
        one_stage = settings["profile"] == "one_stage"
        families = ("dense",) if one_stage else ("regions",)
        return Needs(
            teacher=Look(prediction=True),
            teacher_families=families,
            student_families=families,
            same_classes=one_stage,
            outputs="sigmoid" if one_stage else "any",
            same_cells=True,
        )

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Terms ``glamd_feature``, ``glamd_channel``, ``glamd_spatial``, ``glamd_class`` and ``glamd_box``, summed over levels.

        Terms with weight 0 are left out.
        """
        levels, masks = [], []
        with full_precision(batch.images.device):
            for part, pair in zip(self.parts, self.pairs, strict=True):
                theirs = taught.features.maps[pair.teacher]
                own = seen.features.maps[pair.student]
                hidden = None if seen.features.padding is None else _resized(seen.features.padding[pair.student], theirs)
                terms, attention = part(resize_like(own, theirs), theirs, **self.settings_of_attention, padding=hidden)
                levels.append(torch.stack(terms))
                masks.append(resize_like(attention.mask()[:, None], own))
            found = dict(zip(GLAMDTerms._fields, torch.stack(levels).sum(dim=0), strict=True))
            if _compares_predictions(self.weights["class"], self.weights["box"]):
                found |= self._head_terms(self._dense(seen.prediction), self._dense(taught.prediction), masks)
        return Losses({f"glamd_{name}": self.weights[name] * value for name, value in found.items() if self.weights[name]})

    def _dense(self, prediction: Prediction | None) -> Dense:
        """The dense prediction of a detector: its own, or that of its first stage.

        Raises:
            DetdistillError: a two-stage detector does not show its first stage.
        """
        if isinstance(prediction, Regions):
            if prediction.first is None:
                raise DetdistillError(f"{self.slug}: a detector does not show its first stage; use class_weight=0, box_weight=0")
            return prediction.first
        return cast(Dense, prediction)

    def _head_terms(self, mine: Dense, theirs: Dense, masks: Sequence[Tensor]) -> dict[str, Tensor]:
        """The losses of the predictions, weighted by the masks [B, 1, H, W] of the paired levels."""
        partners = find_partners(mine, theirs, [(pair.student, pair.teacher) for pair in self.pairs])
        weights = mine.logits.new_zeros(2, *mine.logits.shape[:2])  # of classes and of boxes
        for pair, mask in zip(self.pairs, masks, strict=True):
            here = mine.levels == pair.student
            at_predictions = at_cells(mask, mine, pair.student)[..., 0] * partners.mask[:, here]
            cells = mean_over_ranks(mask.sum())  # the number of cells that are not padding
            weights[0, :, here] = at_predictions / cells
            weights[1, :, here] = at_predictions / (cells * int(mine.anchors[here].max() + 1))
        found = {}
        if self.weights["class"]:
            logits = theirs.logits if self.columns is None else theirs.logits[..., self.columns]
            found["class"] = glamd_class_loss(mine.logits, partners.take(logits), weights[0])
        if self.weights["box"]:
            found["box"] = glamd_box_loss(mine.boxes_xyxy, partners.take(theirs.boxes_xyxy), weights[1])
        return found


def _compares_predictions(class_weight: float, box_weight: float) -> bool:
    return bool(class_weight or box_weight)


def _resized(padding: Tensor, like: Tensor) -> Tensor:
    """A mask [B, h, w] at the size of maps [B, C, H, W]."""
    if padding.shape[-2:] == like.shape[-2:]:
        return padding
    return F.interpolate(padding[:, None].float(), size=like.shape[-2:])[:, 0] > 0.5
