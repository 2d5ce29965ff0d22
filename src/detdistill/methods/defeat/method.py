"""DeFeat: imitate foreground and background apart, in the neck's maps, the backbone's maps and the head's class scores.

Guo, Han, Wang, Wu, Chen, Xu, Xu, "Distilling Object Detectors via Decoupled Features", CVPR 2021, arXiv 2103.14475. Defaults are
those of the released configuration, which distils the neck only; the backbone and the head are options of the released code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from detdistill.detectors.contract import Detector, DetectorSpec, HasRegions, Teacher
from detdistill.functional.cells import anchors_near_boxes, level_of_box
from detdistill.functional.classes import class_columns
from detdistill.functional.dense_maps import find_partners, prediction_grid
from detdistill.functional.precision import full_precision
from detdistill.methods.defeat.loss import (
    Decay,
    DeFeatTerms,
    Normalization,
    defeat_backbone_masks,
    defeat_decay,
    defeat_head_terms,
    defeat_map_terms,
    defeat_masks,
    nearest_mask,
)
from detdistill.methods.defeat.parts import DeFeatTaught, by_images, start_small, teacher_regions
from detdistill.methods.shared.align import LevelAdapters, LevelPair, PairedMaps, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.structures import NEGATIVE, Batch, Clock, Dense, Look, Losses, Observation, Regions
from detdistill.values import Count, Positive, Weight

Mask = Literal["boxes", "anchors", "ones"]


class DeFeat(Method[DeFeatTaught]):
    """DeFeat between the necks' maps, optionally also the backbones' maps and the heads' class scores; levels by stride.

    Differences from the released code: boxes are clipped to their image, because the code fails for boxes beyond the map; the
    groups of the head's loss are those of the regions that gave the logits (the code takes the labels of other regions); the
    background is a fixed class, not the largest label of the batch; the decay changes with every step instead of every epoch.
    Crowd boxes are background. Padded cells are background, as in the code.
    """

    slug = "defeat"
    title = "Distilling Object Detectors via Decoupled Features (CVPR 2021)"
    bibtex = """@inproceedings{guo2021defeat,
  title={Distilling Object Detectors via Decoupled Features},
  author={Guo, Jianyuan and Han, Kai and Wang, Yunhe and Wu, Han and Chen, Xinghao and Xu, Chunjing and Xu, Chang},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2021}
}"""
    teach_settings = ("backbone", "head", "regions", "samples")

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        foreground_weight: Weight = 3.0,
        background_weight: Weight = 12.0,
        backbone: bool = False,
        backbone_foreground_weight: Weight | None = None,
        backbone_background_weight: Weight | None = None,
        head: Literal["none", "regions", "cells"] = "none",
        head_foreground_weight: Weight = 2.0,
        head_background_weight: Weight = 2.0,
        temperature: Positive = 1.0,
        background_temperature: Positive | None = None,
        regions: Literal["teacher", "student", "both"] = "teacher",
        samples: Count = 512,
        mask: Mask = "boxes",
        normalization: Normalization = "level",
        decay: Decay = "none",
        base: Positive = 56.0,
        levels: Sequence[int] | None = None,
        backbone_levels: Sequence[int] | None = None,
    ) -> None:
        """Pair the levels; every pair gets a 3x3 convolution on the student, also with equal channels.

        Args:
            teacher: any detector; for ``head`` one of the student's family that knows its classes.
            student: any detector; for ``head=regions`` a two-stage one, for ``head=cells`` a dense one.
            foreground_weight: factor of the foreground of the neck's maps.
            background_weight: factor of the background of the neck's maps.
            backbone: also compare the backbones' maps.
            backbone_foreground_weight: factor of their foreground; None: the neck's factor.
            backbone_background_weight: factor of their background; None: the neck's factor.
            head: class scores that are compared: ``none``; ``regions`` of two-stage detectors; ``cells`` of dense detectors.
            head_foreground_weight: factor of the class scores of foreground predictions.
            head_background_weight: factor of the class scores of background predictions.
            temperature: of the class scores.
            background_temperature: of the class scores of background predictions; None: ``temperature``.
            regions: whose sampled regions are compared with ``head=regions``. ``student`` and ``both`` need the live teacher.
            samples: number of regions of an image that are sampled from the teacher's proposals.
            mask: foreground of the neck's maps. ``boxes``: the cells of the boxes of a level's size; ``anchors``: the cells
                with an anchor near such a box (FGFI's rule); ``ones``: all cells.
            normalization: of the maps' losses, see ``defeat_map_terms``.
            decay: change of all losses in the course of training, see ``defeat_decay``.
            base: boxes of less than twice this side in pixels belong to the student's finest level.
            levels: indices of the student levels to use; None: all that have a partner.
            backbone_levels: indices of the student's backbone levels to use; None: all that have a partner.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            PairError: no common level; with ``head`` a detector of another family, classes that the teacher lacks, or, for
                cells, other levels or anchors; with ``mask=anchors`` a student without anchors.
        """
        super().__init__(teacher, student)
        self.backbone, self.head, self.regions, self.samples = backbone, head, regions, samples
        neck = (foreground_weight, background_weight)
        below = (backbone_foreground_weight, backbone_background_weight)
        self.weights = self._weights(neck, below, (head_foreground_weight, head_background_weight))
        self.temperatures = (temperature, background_temperature)
        self.mask, self.normalization, self.decay = mask, normalization, decay
        mine, theirs = student.spec, teacher.spec
        if mask == "anchors" and not mine.anchors:
            raise PairError(f"{self.slug}: mask=anchors needs a student with anchors or points; {mine.name} has none")
        self.pairs = pair_levels(self.slug, mine, theirs, levels)
        self.strides = [theirs.strides[pair.teacher] for pair in self.pairs]
        self.base = base * 2 ** self.pairs[0].student
        self._make_adapters(student, backbone_levels)
        if head != "none":
            self._prepare_head(student)

    def _weights(
        self, neck: tuple[float, float], backbone: tuple[float | None, float | None], head: tuple[float, float]
    ) -> dict[str, tuple[float, float]]:
        """Weights of the parts that are compared, without parts of weight 0.

        Raises:
            MethodError: all are 0.
        """
        parts = {"neck": neck}
        if self.backbone:
            parts["backbone"] = (neck[0] if backbone[0] is None else backbone[0], neck[1] if backbone[1] is None else backbone[1])
        if self.head != "none":
            parts["head"] = head
        named = {
            f"{'' if part == 'neck' else part + '_'}{side}_weight": weight
            for part, weights in parts.items()
            for side, weight in zip(DeFeatTerms._fields, weights, strict=True)
        }
        check_some(self.slug, **named)
        return {part: weights for part, weights in parts.items() if any(weights)}

    def _prepare_head(self, student: Detector) -> None:
        mine, theirs = student.spec, self.teacher.spec
        self.columns = class_columns(mine.classes, theirs.classes, mine.softmax)
        self.cell_levels = [(pair.student, pair.teacher) for pair in pair_levels(self.slug, mine, theirs)]

    def _make_adapters(self, student: Detector, backbone_levels: Sequence[int] | None) -> None:
        neck = self.pairs if "neck" in self.weights else ()
        backbone: tuple[LevelPair, ...] = ()
        if "backbone" in self.weights:
            backbone = pair_levels(self.slug, _below(student.spec), _below(self.teacher.spec), backbone_levels)
        self.adapters = LevelAdapters(neck, True, kernel=3, initialize=start_small)
        self.backbone_adapters = LevelAdapters(backbone, True, kernel=3, activation=nn.ReLU, initialize=start_small)
        self.paired_maps = PairedMaps(neck, self.adapters, resize=True)
        self.paired_backbones = PairedMaps(backbone, self.backbone_adapters, resize=True)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Features of any detectors; with ``head`` two detectors of one family with equal classes."""
        looks = Look(backbone=settings["backbone"])
        if settings["head"] == "none":
            return Needs(looks, looks)
        family, dense = ("dense",) if settings["head"] == "cells" else ("regions",), settings["head"] == "cells"
        live = (HasRegions,) if not dense and settings["regions"] != "teacher" else ()
        return Needs(
            dataclasses.replace(looks, prediction=dense),
            looks,
            teacher_families=family,
            student_families=family,
            student_capabilities=() if dense else (HasRegions,),
            teacher_capabilities=live,
            teaching_capabilities=() if dense else (HasRegions,),
            advice={HasRegions: "use head=none"},
            same_classes=True,
            outputs="same",
            same_cells=dense,
            one_size="" if dense else "the teacher proposes regions on its own maps",
        )

    @torch.no_grad()
    def teach(self, batch: Batch) -> DeFeatTaught:
        """The teacher's maps; with ``head=cells`` its prediction; with ``head=regions`` sampled regions and their scores."""
        assert self.requirements.teacher is not None
        seen = self.teacher.observe(batch, self.requirements.teacher)
        if self.head != "regions" or self.regions == "student":
            return DeFeatTaught(seen)
        assert isinstance(self.teacher.detector, HasRegions)
        return DeFeatTaught(seen, teacher_regions(self.teacher.detector, seen.features, batch, self.samples))

    def learn(self, student: Detector, seen: Observation, taught: DeFeatTaught, batch: Batch, clock: Clock) -> Losses:
        """Terms ``defeat_PART_foreground`` and ``defeat_PART_background`` of each part: ``neck``, ``backbone`` and ``head``.

        Terms with weight 0 are left out.
        """
        factor = defeat_decay(clock.progress, self.decay)
        found = dict(self._maps(seen, taught.seen, batch))
        if "head" in self.weights:
            found["head"] = (
                self._cells(student, seen, taught, batch) if self.head == "cells" else self._regions(student, seen, taught, batch)
            )
        return Losses(
            {
                f"defeat_{part}_{side}": factor * weight * value
                for part, terms in found.items()
                for side, weight, value in zip(terms._fields, self.weights[part], terms, strict=True)
                if weight
            }
        )

    # ----------------------------------------------------------------------------------------------------------- maps

    def _maps(self, seen: Observation, taught: Observation, batch: Batch) -> Iterator[tuple[str, DeFeatTerms]]:
        """Losses of the neck's and the backbone's maps."""
        boxes = [
            clip_boxes_to_image(target.without_crowd().boxes_xyxy, (height, width))
            for target, (height, width) in zip(batch.targets, batch.sizes.tolist(), strict=True)
        ]
        shapes = [_shape(taught.features.maps[pair.teacher]) for pair in self.pairs]
        with full_precision(batch.images.device):
            if "neck" in self.weights:
                mine, theirs = self.paired_maps(seen.features, taught.features)
                yield "neck", defeat_map_terms(mine, theirs, self._masks(seen, boxes, shapes), self.normalization)
            if "backbone" in self.weights:
                assert seen.backbone_features is not None
                assert taught.backbone_features is not None
                mine, theirs = self.paired_backbones(seen.backbone_features, taught.backbone_features)
                masks = defeat_backbone_masks(boxes, self.strides[0], shapes[0], [_shape(level) for level in theirs])
                yield "backbone", defeat_map_terms(mine, theirs, masks, self.normalization)

    def _masks(self, seen: Observation, boxes: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Foreground [B, H, W] of each level."""
        if self.mask == "boxes":
            return defeat_masks(boxes, self.strides, shapes, self.base)
        if self.mask == "ones":
            return [torch.ones(len(boxes), *shape, dtype=torch.bool, device=boxes[0].device) for shape in shapes]
        first = seen.prediction.first if isinstance(seen.prediction, Regions) else seen.prediction
        assert isinstance(first, Dense)
        levels = [level_of_box(own, len(self.pairs), self.base) for own in boxes]
        masks = []
        for place, (pair, shape) in enumerate(zip(self.pairs, shapes, strict=True)):
            grid = prediction_grid(first, pair.student)  # [A, h, w]
            near = [
                anchors_near_boxes(priors[grid.flatten()], own[level == place]).view(grid.shape).any(dim=0)
                for priors, own, level in zip(first.priors_xyxy, boxes, levels, strict=True)
            ]
            masks.append(nearest_mask(torch.stack(near), shape))
        return masks

    # ----------------------------------------------------------------------------------------------------------- head

    def _cells(self, student: Detector, seen: Observation, taught: DeFeatTaught, batch: Batch) -> DeFeatTerms:
        """Class scores of all cells; positives and negatives of the student's assignment are the groups."""
        mine, theirs = seen.prediction, taught.seen.prediction
        assert isinstance(mine, Dense)
        assert isinstance(theirs, Dense)
        with full_precision(batch.images.device):
            matched = student.assign(mine, batch).matched
            partners = find_partners(mine, theirs, self.cell_levels)
            logits = partners.take(theirs.logits[..., self.columns])
            foreground, background = ((group & partners.mask).flatten() for group in (matched >= 0, matched == NEGATIVE))
            both = (mine.logits.flatten(0, 1), logits.flatten(0, 1))
            return defeat_head_terms(*both, foreground, background, *self.temperatures, softmax=mine.softmax)

    def _regions(self, student: Detector, seen: Observation, taught: DeFeatTaught, batch: Batch) -> DeFeatTerms:
        """Class scores of sampled regions; with ``regions=both`` the losses of the teacher's and the student's are added."""
        found = []
        if taught.regions is not None:
            assert isinstance(student, HasRegions)
            mine = student.regions(seen.features, taught.regions.boxes(), batch).logits.float()
            theirs, foreground = taught.regions.flat()
            found.append(self._scores(mine, theirs, foreground, batch))
        if self.regions != "teacher":
            prediction, detector = seen.prediction, self.teacher.detector
            assert isinstance(prediction, Regions)
            assert isinstance(detector, HasRegions)
            boxes, order = by_images(prediction, len(batch))
            with torch.no_grad():
                theirs = detector.regions(taught.seen.features, boxes, batch).logits.float()
            foreground = student.assign(prediction, batch).matched[order] >= 0
            found.append(self._scores(prediction.logits[order], theirs, foreground, batch))
        return DeFeatTerms(*(sum(values[1:], values[0]) for values in zip(*found, strict=True)))

    def _scores(self, mine: Tensor, theirs: Tensor, foreground: Tensor, batch: Batch) -> DeFeatTerms:
        with full_precision(batch.images.device):
            return defeat_head_terms(mine, theirs[:, self.columns], foreground, ~foreground, *self.temperatures)


def _below(spec: DetectorSpec) -> DetectorSpec:
    """The spec with the backbone's pyramid in place of the neck's."""
    assert spec.backbone is not None
    return dataclasses.replace(spec, channels=spec.backbone.channels, strides=spec.backbone.strides)


def _shape(level: Tensor) -> tuple[int, int]:
    return level.shape[-2], level.shape[-1]
