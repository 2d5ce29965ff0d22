"""The ``Taught`` of LD: predictions of all cells, or one prediction for each ground-truth box."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from detdistill.detectors.contract import Detector, HasBoxDistributions
from detdistill.functional.boxes import paired_iou
from detdistill.functional.dense_maps import only_parts
from detdistill.functional.distributions import step_positions
from detdistill.structures import SHARED, Batch, BoxDistributions, Dense, Features, Prediction, Queries, Taught


@dataclass(frozen=True)
class LDCells(Taught):
    """The teacher's prediction of every cell."""

    prediction: Dense
    """Logits and boxes; ``deltas`` [B, P, 4 * S + 8] are the logits of the sides, then their origins and units
    (``BoxDistributions``), so that a cache lays out all of them together."""
    steps: Tensor = field(metadata=SHARED)
    """[S] steps of the distributions."""
    features: Features | None = None
    """Maps of the neck, if features are imitated."""


@dataclass(frozen=True)
class LDObjects(Taught):
    """The teacher's prediction for each ground-truth box; images with fewer boxes are filled up with zeros."""

    logits: Tensor
    """[B, G, K]."""
    sides: Tensor
    """[B, G, 4, S + 2] logits of the sides, then their origin and unit."""
    known: Tensor
    """[B, G] bool, False if the teacher has no prediction for the box, or there is no such box."""
    steps: Tensor = field(metadata=SHARED)
    """[S] steps of the distributions."""


@dataclass(frozen=True)
class LDSides:
    """Distributions of M chosen predictions."""

    logits: Tensor
    """[M, 4, S]."""
    origins: Tensor
    """[M, 4]."""
    units: Tensor
    """[M, 4]."""
    steps: Tensor
    """[S]."""

    @staticmethod
    def of(found: BoxDistributions, image: Tensor, index: Tensor) -> LDSides:
        """The distributions of the predictions ``index`` [M] of the images ``image`` [M]."""
        return LDSides(found.logits[image, index], found.origins[image, index], found.units[image, index], found.steps)

    def same_scale(self, other: LDSides) -> bool:
        """Whether all steps of both lie at the same coordinates, to a hundredth of a step."""
        if len(self.steps) != len(other.steps):
            return False
        mine, theirs = self.positions(other), other.steps.to(self.units.dtype)
        return bool(((mine - theirs).abs() < 0.01).all())

    def positions(self, other: LDSides) -> Tensor:
        """[M, 4, S] position of these steps on the scale of ``other``; the units of ``other`` are at least a thousandth pixel."""
        return step_positions(self.steps, self.origins, self.units, other.origins, other.units, least_unit=1e-3)


def cells_of(prediction: Dense, distributions: BoxDistributions, features: Features | None) -> LDCells:
    """Pack a dense prediction and its distributions."""
    packed = torch.cat([distributions.logits.flatten(2), distributions.origins, distributions.units], dim=-1)
    return LDCells(replace(only_parts(prediction), deltas=packed), distributions.steps, features)


def sides_of(packed: Tensor, steps: Tensor) -> LDSides:
    """The distributions of ``LDCells.prediction.deltas[image, index]``, [M, 4 * S + 8]."""
    logits, origins, units = packed.split([packed.shape[-1] - 8, 4, 4], dim=-1)
    return LDSides(logits.unflatten(-1, (4, -1)), origins, units, steps.to(packed.dtype))


def objects_of(detector: Detector, prediction: Prediction, batch: Batch) -> LDObjects:
    """The teacher's prediction for each ground-truth box: of those that it assigns to the box, the best one.

    The best has the highest product of class score and IoU. Of DETRs the last decoder layer is used, with one prediction for
    each box.

    Args:
        detector: the teacher.
        prediction: its prediction.
        batch: with labels in the teacher's order.
    """
    assert isinstance(detector, HasBoxDistributions)
    found = detector.distributions(prediction, batch)
    positives = detector.positives(prediction, detector.assign(prediction, batch), batch)
    last = positives.layer == (len(prediction.logits) - 1 if isinstance(prediction, Queries) else 0)
    image, box, index = positives.image[last], positives.ground_truth[last], positives.index[last]
    score = positives.logits[last].gather(1, positives.labels[last, None])[:, 0].sigmoid()
    value = score * paired_iou(positives.boxes_xyxy[last], positives.targets_xyxy[last])
    order = value.sort().indices  # the best one is written last
    most = max([1, *(len(target) for target in batch.targets)])
    chosen = torch.full((len(batch), most), -1, device=image.device)
    for row in order.tolist():
        chosen[image[row], box[row]] = row
    known = chosen >= 0
    logits, sides = positives.logits[last], LDSides.of(found, image, index)
    packed = torch.cat([sides.logits, sides.origins[..., None], sides.units[..., None]], dim=-1)

    def laid(rows: Tensor) -> Tensor:
        whole = rows.new_zeros(*known.shape, *rows.shape[1:])
        whole[known] = rows[chosen[known]]
        return whole

    return LDObjects(laid(logits), laid(packed), known, found.steps)
