"""What Cascade R-CNN and Cascade Mask R-CNN share: several stages of RoI heads, each on the boxes of the one before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from detdistill.detectors.student_files.models.cascade import IOUS, STDS, mean_logits
from detdistill.detectors.torchvision.images import image_sizes
from detdistill.detectors.two_stage.shared.detector import TwoStageDetector, TwoStageOptions, two_stage_description
from detdistill.errors import ModelError
from detdistill.structures import Assignment, Batch, Dense, Features, Losses, Origin, Prediction, Regions


class CascadeDetector(TwoStageDetector):
    """Several stages of RoI heads (``models.cascade``), each on the boxes that the one before refined.

    A prediction is that of the last stage; ``previous`` leads to the stages before it, and the length of that chain says
    which stage a prediction is of: ``assign`` takes the overlap of that stage. In training mode each stage inserts the
    ground truth, samples, and hands on what it sampled, refined and clipped, without the inserted boxes; in eval mode, and
    on given boxes, row r of every stage is about the same region. Refined boxes keep the origin of their proposal.

    The paper's weights and losses (as released): stage t counts 0.5^t, smooth L1 has beta 1, both terms are divided by the
    sampled regions.
    """

    without_masks = "cascade_rcnn"

    def __init__(
        self,
        model: Any,
        classes: Sequence[str],
        name: str,
        columns: Sequence[int] | None = None,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        """As ``TwoStageDetector``.

        Raises:
            ModelError: as there, or outputs of the model are no class of ours.
        """
        super().__init__(model, classes, name, columns, description)
        if len(self.unused) > 0:
            raise ModelError(f"{name}: {len(self.unused)} outputs of the model are no class; name all of its classes")

    def class_rows(self, name: str) -> Tensor | None:
        """As there; the boxes belong to no class."""
        return None if ".bbox_pred." in name else super().class_rows(name)

    def _after_first_stage(
        self, features: Features, boxes: Sequence[Tensor], origins: Sequence[Origin], batch: Batch, sample: bool
    ) -> Regions:
        regions: Regions | None = None
        for heads in self.model.roi_heads.stages:
            if sample:
                proposed = [origin.ground_truth < 0 for origin in origins]  # each stage inserts the ground truth anew
                boxes = [given[mine] for given, mine in zip(boxes, proposed, strict=True)]
                origins = [origin[mine] for origin, mine in zip(origins, proposed, strict=True)]
                boxes, origins = self._sample_regions(boxes, origins, batch, heads)
            regions = replace(self._region_stage(features, boxes, origins, batch, heads), previous=regions)
            refined = regions.refined_xyxy[:, 0].detach().split([len(given) for given in boxes])
            sizes = image_sizes(batch)
            boxes = [clip_boxes_to_image(given, size) for given, size in zip(refined, sizes, strict=True)]
        return cast(Regions, regions)

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """IoU with the boxes that the prediction's stage pooled from, by that stage's threshold; crowds match nothing."""
        if isinstance(prediction, Dense):
            return super().assign(prediction, batch)
        prediction = cast(Regions, prediction)
        heads = self.model.roi_heads.stages[len(_chain(prediction)) - 1]
        return self._assign_regions(prediction, batch, heads)

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Terms ``loss_objectness``, ``loss_rpn_box_reg`` and, for each stage t, ``loss_classifier_stage<t>`` and so on.

        A foreign ``assignment`` is that of the last stage's regions; the stages before, and the first of all, keep their
        own rules. Otherwise as ``TwoStageDetector.loss``.

        Raises:
            DataError: a mask branch and a target without masks.
            ModelError: a mask branch and a prediction that has lost the features it was made from.
        """
        if isinstance(prediction, Dense):
            return super().loss(prediction, batch, assignment)
        prediction = cast(Regions, prediction)
        terms = self._losses_of_first(prediction, batch)
        stages = zip(_chain(prediction), self.model.roi_heads.stages, strict=False)
        for number, (regions, heads) in enumerate(stages):
            foreign = assignment if regions is prediction else None
            found = self._region_losses(regions, batch, foreign or self._assign_regions(regions, batch, heads), heads, beta=1.0)
            terms |= {f"{name}_stage{number + 1}": 0.5**number * value for name, value in found.items()}
        return Losses(terms)

    def _detection_logits(self, prediction: Regions) -> Tensor:
        """The mean over the stages that a region went through."""
        earlier = _chain(prediction)[:-1]
        if all(_same_origin(regions.origin, prediction.origin) for regions in earlier):
            return mean_logits([*(regions.logits for regions in earlier), prediction.logits])
        # sampled: a proposal was in all stages before, an inserted box perhaps not
        total, count = prediction.logits, torch.ones_like(prediction.logits[:, :1])
        for regions in earlier:
            row = _rows_of_origin(prediction.origin, regions.origin)
            known = torch.nonzero(row >= 0).flatten()
            total = total.index_add(0, known, regions.logits[row[known]])
            count = count.index_add(0, known, torch.ones_like(count[known]))
        return total / count


def cascade_description(call: str, backbone: str, classes: Sequence[str], options: TwoStageOptions) -> dict[str, Any]:
    """The call of a model of ``models.cascade``: as ``two_stage_description``, with the box heads of three stages.

    Raises:
        ModelError: the options do not fit the backbone or the detector.
    """
    description = two_stage_description(call, backbone, classes, options)
    representation = description.pop("box_head")["representation_size"]
    del description["box_predictor"]
    stages = {"ious": list(IOUS), "stds": [list(stds) for stds in STDS]}
    return {**description, **stages, "num_classes": len(classes) + 1, "representation_size": representation}


def _chain(prediction: Regions) -> list[Regions]:
    """The stages of a cascade's prediction, the first one first."""
    earlier = [] if prediction.previous is None else _chain(prediction.previous)
    return [*earlier, prediction]


def _same_origin(first: Origin, second: Origin) -> bool:
    """Two predictions are about the same regions, row by row."""
    mine, theirs = _origin_table(first), _origin_table(second)
    return mine.shape == theirs.shape and torch.equal(mine, theirs)


def _rows_of_origin(wanted: Origin, given: Origin) -> Tensor:
    """[R] the row of ``given`` with the origin of each row of ``wanted``, -1 where there is none."""
    numbers = torch.cat([_origin_table(given), _origin_table(wanted)]).unique(dim=0, return_inverse=True)[1]
    rows = torch.full_like(numbers, -1)
    rows[numbers[: len(given.image)]] = torch.arange(len(given.image), device=numbers.device)
    return rows[numbers[len(given.image) :]]


def _origin_table(origin: Origin) -> Tensor:
    """[R, 6] all that is known of each row."""
    return torch.cat([getattr(origin, f.name)[:, None].flatten(1) for f in fields(Origin)], dim=1)
