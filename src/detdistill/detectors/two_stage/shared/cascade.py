"""Base class of Cascade R-CNN and Cascade Mask R-CNN: stages of RoI heads, each on the refined boxes of the previous stage."""

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
    """Several stages of RoI heads (``models.cascade``), each on the refined boxes of the previous stage.

    ``predict`` returns the prediction of the last stage; ``previous`` links to the prediction of the stage before. The length
    of this chain gives the stage of a prediction, and ``assign`` uses the IoU threshold of that stage. In training mode each
    stage adds the ground truth, samples, and passes its sampled regions, refined and clipped, to the next stage, except the
    added ground truth. In eval mode and on given boxes, row r is the same region in all stages. Refined boxes keep the origin
    of their proposal.

    Weights and losses are those of the released code: stage t = 0, 1, 2 has weight 0.5^t, smooth L1 has beta 1, both terms
    are divided by the number of sampled regions.
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
        """Wrap a model; see ``TwoStageDetector``.

        Raises:
            ModelError: as ``TwoStageDetector``, or the model has outputs without a class.
        """
        super().__init__(model, classes, name, columns, description)
        if len(self.unused) > 0:
            raise ModelError(f"{name}: {len(self.unused)} outputs of the model have no class; name all of its classes")

    def _stages(self) -> Sequence[Any]:
        return cast(Sequence[Any], self.model.roi_heads.stages)

    def class_rows(self, name: str) -> Tensor | None:
        """Return class rows as ``TwoStageDetector``, but none for the box outputs, which are class-agnostic."""
        return None if ".bbox_pred." in name else super().class_rows(name)

    def _after_first_stage(
        self, features: Features, boxes: Sequence[Tensor], origins: Sequence[Origin], batch: Batch, sample: bool
    ) -> Regions:
        regions: Regions | None = None
        for heads in self.model.roi_heads.stages:
            if sample:
                proposed = [origin.ground_truth < 0 for origin in origins]  # each stage adds the ground truth again
                boxes = [given[mine] for given, mine in zip(boxes, proposed, strict=True)]
                origins = [origin[mine] for origin, mine in zip(origins, proposed, strict=True)]
                boxes, origins = self._sample_regions(boxes, origins, batch, heads)
            regions = replace(self._region_stage(features, boxes, origins, batch, heads), previous=regions)
            refined = regions.refined_xyxy[:, 0].detach().split([len(given) for given in boxes])
            sizes = image_sizes(batch)
            boxes = [clip_boxes_to_image(given, size) for given, size in zip(refined, sizes, strict=True)]
        return cast(Regions, regions)

    def assign(self, prediction: Prediction, batch: Batch) -> Assignment:
        """Assign by IoU with the input boxes and the threshold of the prediction's stage; crowd boxes match nothing."""
        if isinstance(prediction, Dense):
            return super().assign(prediction, batch)
        prediction = cast(Regions, prediction)
        heads = self.model.roi_heads.stages[len(_chain(prediction)) - 1]
        return self._assign_regions(prediction, batch, heads)

    def loss(self, prediction: Prediction, batch: Batch, assignment: Assignment | None = None) -> Losses:
        """Compute ``loss_objectness``, ``loss_rpn_box_reg`` and, for each stage t, ``loss_classifier_stage<t>`` and so on.

        A given ``assignment`` applies to the regions of the last stage; the earlier stages and the region proposal network use
        their own assignments. Otherwise as ``TwoStageDetector.loss``.

        Raises:
            DataError: the model has a mask branch, and a target has no masks.
            ModelError: the model has a mask branch, and the prediction was split or read from a cache.
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
        """Average the logits over all stages that contain the region."""
        earlier = _chain(prediction)[:-1]
        if all(_same_origin(regions.origin, prediction.origin) for regions in earlier):
            return mean_logits([*(regions.logits for regions in earlier), prediction.logits])
        # after sampling, a proposal is in all earlier stages, an added ground-truth box perhaps not
        total, count = prediction.logits, torch.ones_like(prediction.logits[:, :1])
        for regions in earlier:
            row = _rows_of_origin(prediction.origin, regions.origin)
            known = torch.nonzero(row >= 0).flatten()
            total = total.index_add(0, known, regions.logits[row[known]])
            count = count.index_add(0, known, torch.ones_like(count[known]))
        return total / count


def cascade_description(call: str, backbone: str, classes: Sequence[str], options: TwoStageOptions) -> dict[str, Any]:
    """Compute the description of a model of ``models.cascade``: ``two_stage_description`` with the box heads of three stages.

    Raises:
        ModelError: the options do not fit the backbone or the detector.
    """
    description = two_stage_description(call, backbone, classes, options)
    representation = description.pop("box_head")["representation_size"]
    del description["box_predictor"]
    stages = {"ious": list(IOUS), "stds": [list(stds) for stds in STDS]}
    return {**description, **stages, "num_classes": len(classes) + 1, "representation_size": representation}


def _chain(prediction: Regions) -> list[Regions]:
    """List the predictions of all stages, first stage first."""
    earlier = [] if prediction.previous is None else _chain(prediction.previous)
    return [*earlier, prediction]


def _same_origin(first: Origin, second: Origin) -> bool:
    """Whether two predictions have the same regions in the same rows."""
    mine, theirs = _origin_table(first), _origin_table(second)
    return mine.shape == theirs.shape and torch.equal(mine, theirs)


def _rows_of_origin(wanted: Origin, given: Origin) -> Tensor:
    """Find for each row of ``wanted`` the row [R] of ``given`` with the same origin; -1: no such row."""
    numbers = torch.cat([_origin_table(given), _origin_table(wanted)]).unique(dim=0, return_inverse=True)[1]
    rows = torch.full_like(numbers, -1)
    rows[numbers[: len(given.image)]] = torch.arange(len(given.image), device=numbers.device)
    return rows[numbers[len(given.image) :]]


def _origin_table(origin: Origin) -> Tensor:
    """Stack all fields of the origin into a table [R, 6]."""
    return torch.cat([getattr(origin, f.name)[:, None].flatten(1) for f in fields(Origin)], dim=1)
