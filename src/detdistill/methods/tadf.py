"""TADF: imitate features near objects' centres, and the region head's classes and boxes only where the teacher does better.

Sun, Tang, Zhang, Xiong, Tian, "Distilling Object Detectors with Task Adaptive Regularization", 2020, arXiv 2006.13108.

No code was released, and this is a RECONSTRUCTION. The mask is that of DeFeat's code. The paper's abstract says that knowledge
is transferred where the teacher does better, and that the penalty is reduced over training; a later paper says that boxes are
compared where the teacher improves the proposal. The other choices are ours and stated in the docstrings: divisor of the feature
loss, divergence and gate of the class loss, weights, adapter, and the linear decay (as in DWPose, which follows TADF).

Shape letters: B images, C channels of the teacher, H x W cells of a level, G boxes of an image, N cells, M positive regions of
the batch, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from detdistill.detectors.contract import Detector, HasRegions, Teacher
from detdistill.functional.boxes import paired_iou
from detdistill.functional.cells import level_of_box
from detdistill.functional.classes import class_columns
from detdistill.functional.counting import divisor_over_ranks, mean_over_ranks
from detdistill.functional.masks import gaussian_mask
from detdistill.functional.precision import full_precision
from detdistill.functional.regions import encode_boxes
from detdistill.functional.soft_targets import kl_divergence
from detdistill.methods.shared.align import LevelAdapters, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.methods.shared.needs import Needs
from detdistill.structures import Batch, Clock, Losses, MaskedCells, Observation, Positives, Regions, Taught
from detdistill.values import Count, Positive, Weight

CODING = (10.0, 10.0, 5.0, 5.0)
"""Weights of box deltas: standard deviations 0.1, 0.1, 0.2, 0.2."""


def tadf_masks(
    boxes_xyxy: Sequence[Tensor],
    strides: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    variance: float = 2.0,
    all_levels: bool = False,
) -> list[Tensor]:
    """Gaussian masks of all levels: 1 in the middle of a box, 0 outside of all boxes (see ``masks.gaussian_mask``).

    Each box is drawn on the level of its size (``cells.level_of_box``). Where boxes overlap, the larger value counts.

    Args:
        boxes_xyxy: B tensors [G, 4] in pixels, inside the image.
        strides: stride of each level in pixels.
        shapes: rows and columns of each level.
        variance: the square of the Gaussian's width in units of half the box's sides.
        all_levels: draw every box on every level.

    Returns:
        L masks [B, H, W], 0 to 1; all 0 for an image without boxes.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
        >>> [mask.amax().item() for mask in tadf_masks([boxes], [8, 16], [(2, 3), (1, 2)])]
        [1.0, 0.0]
    """
    levels = [level_of_box(boxes, len(strides)) for boxes in boxes_xyxy]
    masks = []
    for level, (stride, shape) in enumerate(zip(strides, shapes, strict=True)):
        mine = [boxes if all_levels else boxes[own == level] for boxes, own in zip(boxes_xyxy, levels, strict=True)]
        masks.append(gaussian_mask(mine, stride, shape, variance))
    return masks


def tadf_feature_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    masks: Sequence[Tensor],
    weight: float = 1.0,
    divisor: Literal["level", "all"] = "level",
) -> Tensor:
    """Squared difference weighted by the mask M: ``weight * sum M (S - T)^2 / (2 sum M)``, summed over levels.

    The upper sum runs over images, channels and cells, the lower one over images and cells.

    Args:
        student: L maps [B, C, H, W] after the adapter; gradient flows.
        teacher: L maps of the same shapes, treated as constant.
        masks: L masks [B, H, W] (``tadf_masks``).
        weight: factor of the loss (our choice).
        divisor: sum M over each level (our choice), or over all levels.

    Returns:
        [] the loss; 0 if the masks are 0.

    Example:
        >>> mask = torch.tensor([[[0.5, 0.0]]])
        >>> float(tadf_feature_loss([torch.ones(1, 3, 1, 2)], [torch.zeros(1, 3, 1, 2)], [mask]))
        1.5
    """
    rows = [[level.movedim(1, -1)[mask > 0] for level, mask in zip(side, masks, strict=True)] for side in (student, teacher)]
    return _loss_of_rows(rows[0], rows[1], [mask[mask > 0] for mask in masks], weight, divisor)


def _loss_of_rows(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Sequence[Tensor], weight: float, divisor: str
) -> Tensor:
    """``tadf_feature_loss`` of the vectors [N, C] and mask values [N] of the cells inside boxes."""
    masses = torch.stack([level.sum() for level in weights])
    if divisor == "all":
        masses = masses.sum().expand_as(masses)
    sums = [
        ((mine - theirs.detach()).square().sum(dim=1) * level.detach()).sum()
        for mine, theirs, level in zip(student, teacher, weights, strict=True)
    ]
    return weight * (torch.stack(sums) / (2 * mean_over_ranks(masses, least=1e-6))).sum()


def tadf_class_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, weight: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """KL divergence of class scores where the teacher gives the right class a higher probability; mean over these regions.

    Args:
        student_logits: [M, K+1] softmax logits of positive regions, background last; gradient flows.
        teacher_logits: [M, K+1] of the same regions, treated as constant.
        labels: [M] int64, the class that each region is assigned to.
        weight: factor of the loss (our choice).
        temperature: of both softmaxes (our choice).

    Returns:
        [] the loss; 0 if the teacher is better nowhere.

    Example:
        >>> student, teacher, labels = torch.zeros(1, 2), torch.tensor([[9.0, 0.0]]), torch.tensor([0])
        >>> round(float(tadf_class_loss(student, teacher, labels)), 2), float(tadf_class_loss(teacher, student, labels))
        (0.69, 0.0)
    """
    better = tadf_class_gate(student_logits, teacher_logits, labels)
    distance = kl_divergence(student_logits[better], teacher_logits[better], temperature)
    return weight * distance.sum() / divisor_over_ranks(len(distance), distance)


def tadf_class_gate(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """[M] bool: the teacher's probability of the right class is higher than the student's; arguments of ``tadf_class_loss``."""
    mine, theirs = (side.detach().log_softmax(dim=1).gather(1, labels[:, None]) for side in (student_logits, teacher_logits))
    return (theirs > mine)[:, 0]


def tadf_box_loss(
    student_xyxy: Tensor, teacher_xyxy: Tensor, proposals_xyxy: Tensor, targets_xyxy: Tensor, weight: float = 1.0
) -> Tensor:
    """Smooth L1 between box deltas where the teacher improves the proposal; sum over the 4 deltas, mean over these regions.

    Both sides' refined boxes are encoded again with standard deviations 0.1, 0.1, 0.2, 0.2, so that the coders of student and
    teacher may differ. With these standard deviations on both sides it is the loss between the heads' own outputs.

    Args:
        student_xyxy: [M, 4] refined boxes of positive regions in pixels; gradient flows.
        teacher_xyxy: [M, 4] the teacher's refined boxes of the same regions, treated as constant.
        proposals_xyxy: [M, 4] the regions.
        targets_xyxy: [M, 4] ground truth of each region.
        weight: factor of the loss (our choice).

    Returns:
        [] the loss; 0 if the teacher improves no proposal.
    """
    better = tadf_box_gate(teacher_xyxy, proposals_xyxy, targets_xyxy)
    mine, theirs = (encode_boxes(side[better], proposals_xyxy[better], CODING) for side in (student_xyxy, teacher_xyxy.detach()))
    return weight * F.smooth_l1_loss(mine, theirs, reduction="sum") / divisor_over_ranks(len(mine), mine)


def tadf_box_gate(teacher_xyxy: Tensor, proposals_xyxy: Tensor, targets_xyxy: Tensor) -> Tensor:
    """[M] bool: the teacher's refined box has a larger IoU with the ground truth than the proposal has."""
    return paired_iou(teacher_xyxy.detach(), targets_xyxy) > paired_iou(proposals_xyxy, targets_xyxy)


def tadf_decay(step: int, total: int, parts: int = 12) -> float:
    """Factor of all terms: from 1 in the first of ``parts`` equal parts of the training down to 1 / parts in the last.

    With one part for each epoch it is ``1 - (e - 1) / E`` in epoch e = 1..E.

    Example:
        >>> [tadf_decay(step, 100, 4) for step in (0, 24, 25, 99)]
        [1.0, 1.0, 0.75, 0.25]
    """
    return 1.0 - min(step * parts // max(1, total), parts - 1) / parts


@dataclass(frozen=True)
class TADFTaught(Taught):
    """The teacher's features inside boxes, with the mask: a small part of its maps, so a cache of them is small."""

    inside: tuple[MaskedCells, ...]
    """The cells inside boxes of each level of the teacher."""


class _Compared(NamedTuple):
    """The positive regions of both sides, in the same order."""

    positives: Positives
    proposals_xyxy: Tensor
    teacher_logits: Tensor
    teacher_xyxy: Tensor


class TADF(Method[TADFTaught]):
    """TADF between the necks' maps and the region heads of two-stage detectors (a reconstruction, see the file's docstring).

    The teacher's region head runs on the student's positive regions, which change with the student. So the terms on classes and
    boxes need the teacher itself. With ``class_weight=0,box_weight=0`` only features are compared: then any pair of detectors is
    served and a cache is enough. Crowd boxes are not drawn. A box whose level the student lacks is left out.
    """

    slug = "tadf"
    title = "Distilling Object Detectors with Task Adaptive Regularization (arXiv 2020)"
    bibtex = """@article{sun2020tadf,
  title={Distilling Object Detectors with Task Adaptive Regularization},
  author={Sun, Ruoyu and Tang, Fuhui and Zhang, Xiaopeng and Xiong, Hongkai and Tian, Qi},
  journal={arXiv preprint arXiv:2006.13108},
  year={2020}
}"""
    teach_settings = ("variance", "all_levels")

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        feature_weight: Weight = 1.0,
        class_weight: Weight = 1.0,
        box_weight: Weight = 1.0,
        variance: Positive = 2.0,
        temperature: Positive = 1.0,
        decay_parts: Count = 12,
        divisor: Literal["level", "all"] = "level",
        all_levels: bool = False,
        always_adapt: bool = False,
        levels: Sequence[int] | None = None,
    ) -> None:
        """Pair the levels; channels that differ get a 1x1 convolution on the student.

        Args:
            teacher: a two-stage detector that knows the student's classes; any detector for features alone.
            student: a two-stage detector; any detector for features alone.
            feature_weight: factor of the feature loss.
            class_weight: factor of the loss on class scores.
            box_weight: factor of the loss on boxes.
            variance: the square of the mask's width, in units of half a box's sides.
            temperature: of the class scores.
            decay_parts: number of equal parts of the run, in which all terms decay from 1 to 1 / decay_parts; the paper's run has
                12 epochs. 1: no decay.
            divisor: mass of the mask that divides the feature loss: of each ``level``, or of ``all`` levels together.
            all_levels: draw every box on every level, and not only on the level of its size.
            always_adapt: put a 1x1 convolution on pairs of equal channels, too.
            levels: indices of the student levels to use; None: all that have a partner.

        Raises:
            MethodError: all weights are 0.
            PairError: no common level, or a detector without a region head while classes or boxes are compared.
        """
        super().__init__(teacher, student)
        check_some(self.slug, feature_weight=feature_weight, class_weight=class_weight, box_weight=box_weight)
        self.feature_weight, self.class_weight, self.box_weight = feature_weight, class_weight, box_weight
        self.variance, self.temperature, self.decay_parts = variance, temperature, decay_parts
        self.divisor, self.all_levels = divisor, all_levels
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        self.adapters = LevelAdapters(self.pairs, always=always_adapt)
        if class_weight or box_weight:
            self.columns = class_columns(student.spec.classes, teacher.spec.classes, softmax=True)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Two-stage detectors and a live teacher; any detectors for features alone."""
        if not (settings["class_weight"] or settings["box_weight"]):
            return Needs()
        families = ("regions",)
        return Needs(
            teacher_families=families,
            student_families=families,
            teacher_capabilities=(HasRegions,),
            same_classes=True,
            outputs="same",
        )

    @torch.no_grad()
    def teach(self, batch: Batch) -> TADFTaught:
        """Take the teacher's features and the mask in the cells inside boxes, on all its levels."""
        features = self.teacher.observe(batch).features
        boxes = [
            clip_boxes_to_image(target.without_crowd().boxes_xyxy, (height, width))
            for target, (height, width) in zip(batch.targets, batch.sizes.tolist(), strict=True)
        ]
        shapes = [(level.shape[2], level.shape[3]) for level in features.maps]
        masks = tadf_masks(boxes, features.strides, shapes, self.variance, self.all_levels)
        return TADFTaught(tuple(MaskedCells.of(level, mask) for level, mask in zip(features.maps, masks, strict=True)))

    def learn(self, student: Detector, seen: Observation, taught: TADFTaught, batch: Batch, clock: Clock) -> Losses:
        """Compute the terms ``tadf_features``, ``tadf_classes`` and ``tadf_boxes``; terms with weight 0 are left out.

        Monitors: ``decay``, and the fractions of positive regions in which the teacher is better.
        """
        decay = tadf_decay(clock.step, clock.total, self.decay_parts)
        terms: dict[str, Tensor] = {}
        monitors = {"decay": torch.tensor(decay, device=batch.images.device)}
        if self.feature_weight:
            cells = [taught.inside[pair.teacher] for pair in self.pairs]
            with full_precision(batch.images.device):
                adapted = self.adapters([seen.features.maps[pair.student] for pair in self.pairs])
                mine = [level.pick(maps) for level, maps in zip(cells, adapted, strict=True)]
                weights = [cast(Tensor, level.weights) for level in cells]
                loss = _loss_of_rows(mine, [level.values for level in cells], weights, self.feature_weight, self.divisor)
            terms["tadf_features"] = decay * loss
        if self.class_weight or self.box_weight:
            self._compare_regions(self._regions(student, seen, batch), decay, terms, monitors)
        return Losses(terms, monitors)

    def _regions(self, student: Detector, seen: Observation, batch: Batch) -> _Compared:
        """The teacher's predictions on the student's positive regions.

        The teacher predicts on all regions, so that the methods of a composition share its pass; a cascade by its first stage.
        """
        prediction = seen.prediction
        assert isinstance(prediction, Regions)
        with full_precision(batch.images.device):
            positives = student.positives(prediction, student.assign(prediction, batch), batch)
        proposals = prediction.boxes_xyxy[positives.index]
        if not len(positives):
            return _Compared(positives, proposals, positives.logits.detach(), positives.boxes_xyxy.detach())
        theirs = self.teacher.predict_regions(prediction, self.teacher.observe(batch).features, batch).rows(positives.index)
        columns = torch.tensor(self.columns, device=proposals.device)
        logits, refined = theirs.logits[:, columns], theirs.refined_xyxy
        if refined.shape[1] > 1:
            refined = refined[torch.arange(len(proposals), device=proposals.device), columns[positives.labels]]
        return _Compared(positives, proposals, logits, refined.flatten(1))

    def _compare_regions(self, found: _Compared, decay: float, terms: dict[str, Tensor], monitors: dict[str, Tensor]) -> None:
        """Add the terms and monitors of classes and boxes."""
        positives = found.positives
        count = max(1, len(positives))
        with full_precision(found.proposals_xyxy.device):
            if self.class_weight:
                logits = positives.logits, found.teacher_logits, positives.labels
                terms["tadf_classes"] = decay * tadf_class_loss(*logits, self.class_weight, self.temperature)
                monitors["better_classes"] = tadf_class_gate(*logits).sum() / count
            if self.box_weight:
                fixed = found.teacher_xyxy, found.proposals_xyxy, positives.targets_xyxy
                terms["tadf_boxes"] = decay * tadf_box_loss(positives.boxes_xyxy, *fixed, self.box_weight)
                monitors["better_boxes"] = tadf_box_gate(*fixed).sum() / count
