"""HEAD: an assistant with the teacher's head on the student's features makes a heterogeneous pair comparable.

Wang, Li, Liao, Jiang, Wu, Wang, Qian, Liu, "HEAD: HEtero-Assists Distillation for Heterogeneous Object Detectors", ECCV 2022.

A copy of the teacher's head, the assistant, is trained on the student's features with the detection loss of that head. The
assistant's layers should equal the teacher's, layer by layer (AKD, assistant-based distillation): both have the same
architecture. The student's own head should equal the teacher's, too (CKD, cross-architecture distillation): a cell of the
student's classification tower is compared with the teacher's features of the box that was predicted in the cell. Without a
teacher (TF-HEAD) the assistants are new heads of other kinds, and the student's head learns from their features.

Facts are those of the released code; the form without a teacher and the one between dense heads are in its history only (June
2022). Departures: see the class.

Shape letters: B images, R regions of the whole batch, D width of a hidden layer, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from detdistill.detectors.contract import (
    FEATURES,
    Detector,
    DetectorSpec,
    HasCopies,
    HasRegions,
    HasTowers,
    RegionHeadCopy,
    Teacher,
)
from detdistill.functional.classes import class_columns
from detdistill.functional.precision import full_precision
from detdistill.functional.region_heads import RegionHead, region_loss
from detdistill.functional.regions import features_at_origin
from detdistill.methods.head.loss import head_ckd_loss, head_layer_loss, head_neck_loss, head_neck_mask
from detdistill.methods.head.parts import (
    DenseAssistant,
    RegionAdapters,
    Stem,
    TowerAdapters,
    hidden_widths,
    tower_width,
)
from detdistill.methods.shared.align import LevelAdapters, PairedMaps, pair_levels, resize_like
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import MethodError, check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.methods.shared.region_heads import AnchorLinear, regions_of_dense
from detdistill.structures import (
    WHOLE_TOWER,
    Batch,
    Clock,
    Dense,
    Look,
    Losses,
    Observation,
    Origin,
    Regions,
)
from detdistill.values import Count, Fraction, Index, Weight

Pair = Literal["regions_to_dense", "regions_to_regions", "dense_to_dense", "teacher_free"]

WEIGHTS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "regions_to_dense": (2.0, 2.0),
        "regions_to_regions": (1.0, 0.0),
        "dense_to_dense": (1.0, 1.0),
        "teacher_free": (0.0, 1.0),
    }
)
"""Released factors of AKD (each layer) and CKD for each kind of pair; without a teacher each assistant has a further factor."""
WARM_UP_OF_ASSISTANTS: Mapping[str, int] = MappingProxyType(
    {"regions_to_dense": 0, "regions_to_regions": 0, "dense_to_dense": 2000, "teacher_free": 2000}
)
"""Released number of steps over which the weight of the assistants' detection losses rises."""
FIRST_DROP = 2 / 3
"""Progress at which the learning rate drops for the first time: after 8 of 12 epochs."""


class HEAD(Method[Observation | None]):
    """HEAD from two-stage or dense teachers to dense students, between two-stage detectors, and without a teacher.

    Departures from the released code: the assistant pools by the rule of the teacher's own pooling, from the levels of the
    student that have the teacher's numbers, where the code takes mmdet's rule; levels of two dense heads are paired by stride.
    Between dense heads the last maps of both towers are compared; the code also compares three inner layers of RepPoints. A
    cascade is compared by its first stage, because later stages of teacher and assistant have different boxes; all stages of the
    assistant are trained. Without a region that has an origin, CKD is 0 (the code: NaN).
    """

    slug = "head"
    title = "HEAD: HEtero-Assists Distillation for Heterogeneous Object Detectors (ECCV 2022)"
    bibtex = """@inproceedings{wang2022head,
  title={{HEAD}: HEtero-Assists Distillation for Heterogeneous Object Detectors},
  author={Wang, Luting and Li, Xiaojie and Liao, Yue and Jiang, Zeren and Wu, Jianlong and Wang, Fei and Qian, Chen and
    Liu, Si},
  booktitle={European Conference on Computer Vision},
  year={2022}
}"""

    def __init__(
        self,
        teacher: Teacher | None,
        student: Detector,
        *,
        pair: Pair = "regions_to_dense",
        assistant_weight: Weight = 1.0,
        akd_weight: Weight | None = None,
        ckd_weight: Weight | None = None,
        decouple_anchors: bool | None = None,
        tower_depth: Index | None = None,
        warmup_iters: Index = 2000,
        assistant_warmup_iters: Index | None = None,
        ckd_until: Fraction | None = None,
        regions_per_image: Count = 512,
        positive_fraction: Fraction = 0.25,
        before_nms: Count = 2000,
        max_proposals: Count = 1000,
        nms: Fraction = 0.7,
        neck_weight: Weight = 0.0,
        neck_gain: Weight = 9.0,
        assistants: Literal["both", "dense", "regions"] = "both",
        dense_weight: Weight = 1.0,
        region_weight: Weight = 1.3,
        dense_assistant_weight: Weight = 0.5,
        width: Count = 1024,
    ) -> None:
        """Copy the teacher's head (or make new heads), and build the adapters.

        Args:
            teacher: a detector of the kind that ``pair`` names; not used with ``pair=teacher_free``.
            student: a detector of the kind that ``pair`` names. Dense students need towers for CKD.
            pair: kinds of teacher and student, or ``teacher_free`` (TF-HEAD, for dense students).
            assistant_weight: factor of the assistants' detection losses.
            akd_weight: factor of each layer in which the assistant is compared with the teacher; None: the released one: 2 for
                ``regions_to_dense``, else 1 (for dense heads each level).
            ckd_weight: factor of the comparison of the student's head with the teacher's; None: 2 for ``regions_to_dense``, 1
                for ``dense_to_dense``, 0 for ``regions_to_regions``. Without a teacher it multiplies ``dense_weight`` and
                ``region_weight``.
            decouple_anchors: give CKD of regions a linear layer for each anchor of a cell; None: only without a teacher.
            tower_depth: number of blocks of the student's towers before the compared maps; None: all (2 in the released setting
                with RepPoints as teacher).
            warmup_iters: steps over which the weights of AKD and CKD rise linearly from 0.
            assistant_warmup_iters: steps over which ``assistant_weight`` rises; None: 2000 for ``dense_to_dense`` and without a
                teacher, else 0.
            ckd_until: part of the run after which CKD is off; None: 2/3 (first drop of the learning rate) without a teacher,
                else 1.
            regions_per_image: regions sampled from the predictions of a dense student. A two-stage student gives its own.
            positive_fraction: largest fraction of positive regions.
            before_nms: predictions of each level that enter non-maximum suppression.
            max_proposals: boxes of an image after it.
            nms: IoU above which the box of lower score is dropped, within a level.
            neck_weight: factor of a masked loss between the necks (0.1 or 1 in released settings of June 2022); 0: none.
            neck_gain: weight of the background in that loss, where the boxes have 1.
            assistants: the assistants without a teacher: an FCOS head, an R-CNN head, or both.
            dense_weight: factor of the comparison with the FCOS head, each level; without a teacher only.
            region_weight: factor of the comparison with the R-CNN head; without a teacher only.
            dense_assistant_weight: further factor of the FCOS head's detection losses.
            width: width of the hidden layers of the R-CNN head without a teacher.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            PairError: the pair does not fit.
        """
        super().__init__(None if pair == "teacher_free" else teacher, student)
        self._keep_settings(self.settings)
        self.tower_channels = self._tower_channels(student)
        self._make_heads(student, assistants, width)
        if neck_weight:
            self._pair_necks(student.spec)

    def _keep_settings(self, given: Mapping[str, Any]) -> None:
        """Keep the hyper-parameters that ``learn`` reads; those without a value get that of the pair.

        Raises:
            MethodError: all weights are 0.
        """
        self.pair: Pair = given["pair"]
        self.akd_weight, self.ckd_weight = _weights(given)
        self.assistant_weight, self.neck_weight, self.neck_gain = (
            given[name] for name in ("assistant_weight", "neck_weight", "neck_gain")
        )
        check_some(self.slug, assistant_weight=self.assistant_weight, akd_weight=self.akd_weight, ckd_weight=self.ckd_weight)
        self.depth = WHOLE_TOWER if given["tower_depth"] is None else given["tower_depth"]
        alone, self.warmup_iters = self.pair == "teacher_free", given["warmup_iters"]
        warmup, until, decouple = (given[name] for name in ("assistant_warmup_iters", "ckd_until", "decouple_anchors"))
        self.assistant_warmup_iters = WARM_UP_OF_ASSISTANTS[self.pair] if warmup is None else warmup
        self.ckd_until = (FIRST_DROP if alone else 1.0) if until is None else until
        self.decoupled = alone if decouple is None else decouple
        self.sampling: dict[str, Any] = {
            "before": given["before_nms"], "nms": given["nms"], "after": given["max_proposals"],
            "count": given["regions_per_image"], "positive_fraction": given["positive_fraction"],
        }  # fmt: skip
        self.self_weights: dict[str, float] = {
            "dense": given["dense_weight"] if given["assistants"] != "regions" else 0.0,
            "regions": given["region_weight"] if given["assistants"] != "dense" else 0.0,
        }
        self.dense_assistant_weight = given["dense_assistant_weight"]

    def _make_heads(self, student: Detector, assistants: Literal["both", "dense", "regions"], width: int) -> None:
        """Make the assistants and the adapters of AKD and CKD.

        Raises:
            PairError: the pair does not fit.
        """
        self.akd: nn.Module | None = None
        self.ckd: nn.Module | None = None
        self.necks: PairedMaps | None = None
        if self.pair == "teacher_free":
            self._make_assistants(student.spec, assistants, width)
        elif self.pair == "dense_to_dense":
            self._copy_dense_head(student)
        else:
            self._copy_region_head(student)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """The kinds of ``pair``; towers for CKD of a dense student; the live teacher, whose head the assistant copies."""
        pair, (_, ckd) = settings["pair"], _weights(settings)
        depth = WHOLE_TOWER if settings["tower_depth"] is None else settings["tower_depth"]
        towers = Look(towers=(depth,)) if ckd else FEATURES
        why = "its assistant is a copy of the teacher's head, which no cache holds"
        shares = bool(settings["assistant_weight"])
        if pair == "teacher_free":
            return Needs(teacher=None, student=towers, student_families=("dense",))
        if pair == "dense_to_dense":
            return Needs(
                teacher=Look(towers=(WHOLE_TOWER,)),
                student=towers,
                teacher_families=("dense",),
                student_families=("dense",),
                teacher_capabilities=(HasCopies, HasTowers),
                live_teacher=why,
                same_classes=shares,
            )
        dense = pair == "regions_to_dense"
        return Needs(
            student=towers if dense else FEATURES,
            teacher_families=("regions",),
            student_families=("dense",) if dense else ("regions",),
            teacher_capabilities=(HasRegions,),
            student_capabilities=() if dense else (HasRegions,),
            live_teacher=why,
            same_classes=shares,
        )

    # ------------------------------------------------------------------------------------------------------- building

    def _tower_channels(self, student: Detector) -> int:
        """Channels of the student's towers at the compared depth; 0 if they are not compared."""
        if not self.ckd_weight or not isinstance(student, HasTowers):
            return 0
        return tower_width(student, student.spec, None if self.depth == WHOLE_TOWER else self.depth)

    def _cell_adapter(self, spec: DetectorSpec, width: int) -> nn.Module:
        """The layer psi from the student's tower to a region head's features."""
        if self.decoupled:
            return AnchorLinear(self.tower_channels, width, max(spec.anchors))
        return nn.Linear(self.tower_channels, width)

    def _channels(self, spec: DetectorSpec) -> int:
        """Channels of a detector's levels.

        Raises:
            PairError: they differ.
        """
        if len(set(spec.channels)) > 1:
            raise PairError(
                f"{self.slug}: the levels of the teacher {spec.name} have {spec.channels} channels; an assistant that reads "
                f"the student's features needs a teacher whose neck has equal channels"
            )
        return spec.channels[0]

    def _copy_region_head(self, student: Detector) -> None:
        detector = self.teacher.detector
        assert isinstance(detector, HasRegions)
        self.columns = self._class_columns(student)
        self.stem = Stem(student.spec.channels, self._channels(detector.spec))
        trained = bool(self.assistant_weight or self.akd_weight)
        self.assistant = _trainable(detector.copy_region_head()) if trained else None
        widths = hidden_widths(detector, detector.spec)
        if not widths:
            raise PairError(f"{self.slug}: the region head of the teacher {detector.spec.name} has no hidden layer to compare")
        self.akd = RegionAdapters(widths, widths) if self.akd_weight else None
        if self.ckd_weight and self.pair == "regions_to_dense":
            self.ckd = self._cell_adapter(student.spec, widths[-1])
        elif self.ckd_weight:
            assert isinstance(student, HasRegions)
            mine = hidden_widths(student, student.spec)
            count = min(len(mine), len(widths))  # the last layers are paired
            self.ckd = RegionAdapters(mine[len(mine) - count :], widths[len(widths) - count :])

    def _copy_dense_head(self, student: Detector) -> None:
        detector, mine = self.teacher.detector, student.spec
        assert isinstance(detector, HasCopies)
        assert isinstance(detector, HasTowers)
        theirs = detector.spec
        pairs = pair_levels(self.slug, mine, theirs)
        self.levels = [pair.student for pair in sorted(pairs, key=lambda pair: pair.teacher)]
        if len(self.levels) < len(theirs.strides):
            raise PairError(
                f"{self.slug}: the assistant is the head of the teacher {theirs.name}, which reads levels of strides "
                f"{theirs.strides}, but the student {mine.name} has {mine.strides}; give the student levels= with all of them"
            )
        self.columns = self._class_columns(student)
        self.stem = Stem([mine.channels[level] for level in self.levels], self._channels(theirs))
        trained = bool(self.assistant_weight or self.akd_weight)
        self.assistant = _trainable(detector.copy_head()) if trained else None
        width = tower_width(detector, theirs, None)
        self.akd = TowerAdapters(width, width) if self.akd_weight else None
        self.ckd = TowerAdapters(self.tower_channels, width) if self.ckd_weight else None

    def _class_columns(self, student: Detector) -> list[int]:
        """Label of each of the student's classes in the teacher; the assistant is trained with the teacher's labels."""
        known = self.teacher.spec.classes
        return class_columns(student.spec.classes, known, softmax=False) if self.assistant_weight else []

    def _make_assistants(self, spec: DetectorSpec, assistants: str, width: int) -> None:
        channels = spec.channels[0]
        self.stem = Stem(spec.channels, channels)
        classes, wanted = len(spec.classes), {"dense", "regions"} if assistants == "both" else {assistants}
        if not self.assistant_weight:
            raise MethodError(
                f"{self.slug}: assistant_weight=0 leaves the assistants untrained, and without a teacher the student would learn "
                f"from random features; give a weight above 0"
            )
        self.dense = DenseAssistant(channels, classes, spec.strides) if "dense" in wanted else None
        self.regions = RegionHead(channels, classes, width) if "regions" in wanted else None
        compares = {name: bool(self.ckd_weight and weight) for name, weight in self.self_weights.items()}
        self.dense_adapter = nn.Conv2d(self.tower_channels, channels, 1) if compares["dense"] else None
        self.ckd = self._cell_adapter(spec, width) if compares["regions"] else None

    def _pair_necks(self, mine: DetectorSpec) -> None:
        """Adapters for the masked loss between necks.

        Raises:
            MethodError: there is no teacher.
        """
        if self.pair == "teacher_free":
            raise MethodError(f"{self.slug}: neck_weight compares with a teacher's neck, but pair=teacher_free has no teacher")
        pairs = pair_levels(self.slug, mine, self.teacher.spec)
        self.neck_adapters = LevelAdapters(pairs, always=True)
        self.necks = PairedMaps(pairs, self.neck_adapters, resize=True)

    # ---------------------------------------------------------------------------------------------------------- learn

    def learn(self, student: Detector, seen: Observation, taught: Observation | None, batch: Batch, clock: Clock) -> Losses:
        """Compute ``head_assistant`` (detection losses), ``head_akd``, ``head_ckd`` and ``head_neck``, without those of weight 0.

        ``head_ckd`` is 0 after ``ckd_until``.
        """
        if self.pair == "teacher_free":
            found = self._without_teacher(seen, batch)
        else:
            assert taught is not None
            of_dense = self.pair == "dense_to_dense"
            found = (self._from_dense if of_dense else self._from_regions)(seen, taught, batch)
        warm = clock.warm_up(self.warmup_iters)
        factors = {
            "head_assistant": self.assistant_weight * clock.warm_up(self.assistant_warmup_iters),
            "head_akd": warm,
            "head_ckd": warm if clock.progress < self.ckd_until or self.ckd_until == 1 else 0.0,
        }
        terms = {name: factors[name] * value for name, value in found.terms.items()}
        if self.necks is not None:
            terms["head_neck"] = warm * self._neck(self.necks, seen, taught, batch)
        return Losses(terms, found.monitors)

    def _in_teachers_labels(self, batch: Batch) -> Batch:
        """The batch with the labels of the teacher's classes."""
        places = torch.tensor(self.columns, device=batch.images.device)
        return batch.with_targets([replace(target, labels=places[target.labels]) for target in batch.targets])

    def _from_regions(self, seen: Observation, taught: Observation, batch: Batch) -> Losses:
        """Terms of a two-stage teacher: the assistant's region head runs on the student's regions, and so does the teacher's."""
        boxes, origin, own = self._regions(seen, batch)
        like = own or _boxes_only(boxes, origin)
        assisted: Regions | None = None
        if self.assistant is not None:
            head = cast(RegionHeadCopy, self.assistant)
            assisted = head.regions(self.stem(seen.features), boxes, batch).float()
        terms: dict[str, Tensor] = {}
        compares = self.akd is not None or self.ckd is not None
        theirs = self.teacher.predict_regions(like, taught.features, batch).hidden if compares else ()
        with full_precision(batch.images.device):
            if assisted is not None and self.assistant_weight:
                terms["head_assistant"] = head.loss(assisted, self._in_teachers_labels(batch)).total()
            if assisted is not None and self.akd is not None:
                mine = self.akd(assisted.before_refinement().hidden)
                terms["head_akd"] = head_layer_loss(mine, theirs, self.akd_weight)
            if self.ckd is not None and own is None:
                terms["head_ckd"] = self._cells(seen, origin, theirs[-1], self.ckd_weight)
            elif self.ckd is not None and own is not None:
                count = len(cast(RegionAdapters, self.ckd))
                mine = self.ckd(own.hidden[len(own.hidden) - count :])
                terms["head_ckd"] = head_layer_loss(mine, theirs[len(theirs) - count :], self.ckd_weight)
        return Losses(terms, _mean_number(origin, batch))

    def _regions(self, seen: Observation, batch: Batch) -> tuple[list[Tensor], Origin, Regions | None]:
        """Boxes of each image, their origin, and of a two-stage student its prediction for them (a cascade's first stage)."""
        prediction = seen.prediction
        if isinstance(prediction, Dense):
            sampled = regions_of_dense(prediction, batch, **self.sampling)
            return sampled.boxes_xyxy, Origin.cat(sampled.origins), None
        assert isinstance(prediction, Regions)
        own = prediction.before_refinement()
        by_image = [torch.nonzero(own.origin.image == image).flatten() for image in range(len(batch))]
        order = torch.cat(by_image)
        if not torch.equal(order, torch.arange(len(order), device=order.device)):
            own = own.rows(order)
        return list(own.boxes_xyxy.split([len(rows) for rows in by_image])), own.origin, own

    def _cells(self, seen: Observation, origin: Origin, target: Tensor, weight: float) -> Tensor:
        """CKD between the cells of the student's classification tower that the regions came from and a region head's features."""
        assert self.ckd is not None
        rows = features_at_origin(seen.tower(self.depth).classification, origin)
        anchor = origin.anchor[origin.level >= 0]
        mine = self.ckd(rows, anchor) if self.decoupled else self.ckd(rows)
        return head_ckd_loss(mine, target, origin, weight)

    def _from_dense(self, seen: Observation, taught: Observation, batch: Batch) -> Losses:
        """Terms of a dense teacher: the assistant is its whole dense head on the student's levels of its strides."""
        theirs, hidden, prediction = taught.tower(), None, None
        if self.assistant is not None:
            head = cast(Any, self.assistant)  # a DetectionHead with towers
            hidden = head.tower(self.stem(seen.features.take(self.levels)))
            prediction = head.finish(hidden, batch).float() if self.assistant_weight else None
        terms: dict[str, Tensor] = {}
        with full_precision(batch.images.device):
            fixed = [*theirs.classification, *theirs.regression]
            if prediction is not None:
                terms["head_assistant"] = head.loss(prediction, self._in_teachers_labels(batch)).total()
            if self.akd is not None and hidden is not None:
                own = self.akd(hidden.float(), range(len(self.levels)))
                terms["head_akd"] = head_layer_loss(_resized(own, fixed), fixed, self.akd_weight)
            if self.ckd is not None:
                own = self.ckd(seen.tower(self.depth), self.levels)
                terms["head_ckd"] = head_layer_loss(_resized(own, fixed), fixed, self.ckd_weight)
        return Losses(terms)

    def _without_teacher(self, seen: Observation, batch: Batch) -> Losses:
        """Terms of TF-HEAD: the assistants are trained on the student's features; their activations teach the student's head."""
        assert isinstance(seen.prediction, Dense)
        features = self.stem(seen.features)
        detection, cross = [], []
        if self.dense is not None:
            hidden = self.dense.tower(features)
            outputs = self.dense.predict(hidden)
            with full_precision(batch.images.device):
                detection.append(self.dense_assistant_weight * self.dense.loss(hidden, outputs, batch))
                if self.dense_adapter is not None:
                    mine = [self.dense_adapter(level) for level in seen.tower(self.depth).classification]
                    fixed = hidden.float().classification
                    cross.append(self.ckd_weight * head_layer_loss(mine, fixed, self.self_weights["dense"]))
        monitors: dict[str, Tensor] = {}
        if self.regions is not None:
            sampled = regions_of_dense(seen.prediction, batch, **self.sampling)
            origin = Origin.cat(sampled.origins)
            output = self.regions.predict(features, sampled.boxes_xyxy)
            with full_precision(batch.images.device):
                detection.append(region_loss(output, sampled, batch))
                if self.ckd is not None:
                    weight = self.ckd_weight * self.self_weights["regions"]
                    cross.append(self._cells(seen, origin, output.class_hidden, weight))
            monitors = _mean_number(origin, batch)
        named = {"head_assistant": detection if self.assistant_weight else [], "head_ckd": cross}
        return Losses({name: torch.stack(values).sum() for name, values in named.items() if values}, monitors)

    def _neck(self, necks: PairedMaps, seen: Observation, taught: Observation | None, batch: Batch) -> Tensor:
        """The masked loss between the necks."""
        assert taught is not None
        boxes = [target.without_crowd().boxes_xyxy for target in batch.targets]
        with full_precision(batch.images.device):
            mine, theirs = necks(seen.features, taught.features)
            masks = [
                head_neck_mask(boxes, taught.features.strides[pair.teacher], _size(fixed), self.neck_gain)
                for pair, fixed in zip(necks.pairs, theirs, strict=True)
            ]
            return head_neck_loss(mine, theirs, masks, self.neck_weight)


def _weights(settings: Mapping[str, Any]) -> tuple[float, float]:
    """Factors of AKD and CKD: the given ones, or the released ones of the pair. Without a teacher there is no AKD."""
    akd, ckd = WEIGHTS[settings["pair"]]
    if settings["akd_weight"] is not None and settings["pair"] != "teacher_free":
        akd = settings["akd_weight"]
    return akd, ckd if settings["ckd_weight"] is None else settings["ckd_weight"]


def _trainable(copied: Any) -> nn.Module:
    """The copy of a frozen teacher's head, ready for training."""
    assert isinstance(copied, nn.Module)
    return copied.requires_grad_(True).train()


def _mean_number(origin: Origin, batch: Batch) -> dict[str, Tensor]:
    """The monitor ``regions``: mean number of regions of an image."""
    return {"regions": torch.tensor(len(origin.image) / len(batch), device=origin.image.device)}


def _boxes_only(boxes: Sequence[Tensor], origin: Origin) -> Regions:
    """Boxes to predict on, in the form that ``Teacher.predict_regions`` reads."""
    flat = torch.cat(list(boxes))
    return Regions(flat, origin, flat.new_zeros(len(flat), 0), flat[:, None], flat[:, None])


def _resized(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
    return [resize_like(mine, fixed) for mine, fixed in zip(student, teacher, strict=True)]


def _size(level: Tensor) -> tuple[int, int]:
    return level.shape[-2], level.shape[-1]
