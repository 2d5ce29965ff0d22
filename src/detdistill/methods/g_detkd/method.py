"""G-DetKD: soft matching of a region's features over all levels, and a contrast of region embeddings.

Yao, Pi, Xu, Zhang, Li, Zhang, "G-DetKD: Towards General Distillation Framework for Object Detectors via Contrastive and
Semantic-guided Feature Imitation", ICCV 2021, arXiv 2108.07482. The authors released no code. This is a reconstruction from the
abstract, a published note on the paper, and the re-implementation of LutingWang/todd (the authors of HEAD), whose values it
reproduces.

Shape letters: B images, N regions of the whole batch, C channels, D width of an embedding, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from detdistill.detectors.contract import Detector, DetectorSpec, HasRegions, Teacher
from detdistill.functional.classes import class_columns
from detdistill.functional.counting import gather_over_ranks
from detdistill.functional.precision import full_precision
from detdistill.functional.regions import (
    canonical_levels,
    features_at_origin,
    pool_boxes,
    pool_boxes_on_all_levels,
    propose,
    sample_regions,
)
from detdistill.functional.relations import RowBank, overlapping_pairs
from detdistill.methods.g_detkd.loss import (
    g_detkd_box_loss,
    g_detkd_ckd_loss,
    g_detkd_class_loss,
    g_detkd_sgfi_loss,
    g_detkd_units,
)
from detdistill.methods.g_detkd.parts import CellProjection, LevelMatching, region_width
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import MethodError, check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.methods.shared.regions import has_area
from detdistill.structures import WHOLE_TOWER, Batch, Clock, Dense, Features, Look, Losses, Observation, Origin, Regions
from detdistill.values import Count, Fraction, Index, Limits, Positive, Weight

Profile = Literal["two_stage", "one_stage"]
COARSEST_POOLED = 32
"""Stride of P5, the coarsest level that a two-stage teacher pools regions from."""


@dataclass(frozen=True)
class _Chosen:
    """The regions of a step, image by image, and both predictions of them (None if no term reads them)."""

    boxes: list[Tensor]
    """[n_b, 4] for each of the B images."""
    origin: Origin
    mine: Regions | None = None
    theirs: Regions | None = None


class GDetKD(Method[Observation]):
    """G-DetKD on the regions of a two-stage student, or on the boxes of a dense one with ``profile=one_stage``."""

    slug = "g_detkd"
    title = "G-DetKD: Towards General Distillation Framework for Object Detectors (ICCV 2021)"
    bibtex = """@inproceedings{yao2021gdetkd,
  title={G-DetKD: Towards General Distillation Framework for Object Detectors via Contrastive and Semantic-guided Feature
    Imitation},
  author={Yao, Lewei and Pi, Renjie and Xu, Hang and Zhang, Wei and Li, Zhenguo and Zhang, Tong},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2021}
}"""

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        profile: Profile = "two_stage",
        teacher_profile: Profile = "two_stage",
        sgfi_weight: Weight = 1.0,
        ckd_weight: Weight = 1.0,
        class_weight: Weight | None = None,
        box_weight: Weight | None = None,
        temperature: Positive = 1.0,
        box_reduction: Literal["sum", "mean"] = "sum",
        size: Annotated[int, Limits(7)] = 7,
        sampling_ratio: Index = 0,
        aligned: bool = True,
        levels: Sequence[int] | None = None,
        adapter: Literal["shared", "per_level"] = "shared",
        embed_channels: tuple[Count, Count] = (128, 64),
        embed_relu: bool = True,
        tau_init: Positive = 1.0,
        gamma: Positive = 0.07,
        ignore_iou: Fraction = 0.5,
        positive_in_denominator: bool = True,
        queue_batches: Index = 10,
        projection: Literal["student", "shared"] = "student",
        num_rois: Count = 512,
        positive_fraction: Fraction = 0.25,
    ) -> None:
        """Build the level matching, the projection and the bank.

        Args:
            teacher: a two-stage detector, or a dense one with ``teacher_profile=one_stage``; for SGFI alone (the other weights 0)
                any detector.
            student: a two-stage detector, or a dense one with ``profile=one_stage``.
            profile: kind of student. ``two_stage``: the regions are those that the student trains on. ``one_stage``: its decoded
                boxes, filtered like proposals and sampled by ground truth.
            teacher_profile: kind of teacher. ``one_stage`` (our addition): the embedding of a box is the vector of the teacher's
                class tower at the box's centre.
            sgfi_weight: factor of the feature imitation.
            ckd_weight: factor of the contrast (0.5 in the re-implementation).
            class_weight: factor of the KL divergence of class scores; None: 1 between two two-stage detectors, else 0.
            box_weight: factor of the box imitation; None: as ``class_weight``.
            temperature: of both class distributions (not known from the paper).
            box_reduction: sum or mean over the 4 numbers of a box (not known from the paper).
            size: side of a pooled region in bins, at least 7.
            sampling_ratio: samples along each side of a bin; 0: the number of cells along that side.
            aligned: RoIAlign shifts by half a cell.
            levels: indices of the student's levels to pool from; None: all.
            adapter: ``shared``: one 1x1 convolution for all levels; ``per_level``: one each, for levels of different channels.
            embed_channels: channels of the two convolutions that compare levels.
            embed_relu: a ReLU follows the second of them; a later re-implementation has none.
            tau_init: initial value of the learned temperature over levels.
            gamma: temperature of the contrast.
            ignore_iou: boxes of one image that overlap by a higher IoU are not contrasted.
            positive_in_denominator: the paper's contrast; False: the re-implementation's, which can be negative.
            queue_batches: number of earlier batches whose teacher embeddings are negatives; 0: none.
            projection: ``student``: a projection of the student's embeddings only, as in the re-implementation. ``shared``: one
                for both, as in a note on the paper; for two two-stage detectors with embeddings of equal width.
            num_rois: largest number of boxes of an image, for dense students.
            positive_fraction: largest fraction of them that may be positive, for dense students.

        Raises:
            MethodError: a hyper-parameter is out of range or means nothing to the profiles, or all weights are 0.
            PairError: channels or embeddings of the pair do not fit.
        """
        super().__init__(teacher, student)
        self._keep_settings(self.settings)
        self._build(teacher.spec, student, self.settings)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Detectors of the profiles' kinds; towers of dense ones for CKD; the live teacher if a term reads its region head."""
        weights = _weights(settings)
        dense, dense_teacher = (settings[name] == "one_stage" for name in ("profile", "teacher_profile"))
        tower = (WHOLE_TOWER,) if weights["ckd"] else ()
        predicts = bool(weights["class"] or weights["box"])
        head = not dense_teacher and bool(weights["ckd"] or predicts)
        family: tuple[str, ...] = ("regions",) if head else ()
        return Needs(
            teacher=Look(towers=tower if dense_teacher else ()),
            student=Look(towers=tower if dense else ()),
            teacher_families=("dense",) if dense_teacher and tower else family,
            student_families=("dense",) if dense else ("regions",),
            teacher_capabilities=(HasRegions,) if head else (),
            live_teacher=(
                "its region head reads the student's regions, which no cache holds "
                f"({cls.slug},ckd_weight=0,class_weight=0,box_weight=0 learns the features alone from the cache)"
            )
            if head
            else "",
            same_classes=predicts,
        )

    # ---------------------------------------------------------------------------------------------------------- building

    def _keep_settings(self, given: Mapping[str, Any]) -> None:
        """Keep the hyper-parameters that ``learn`` reads.

        Raises:
            MethodError: all weights are 0, or a value means nothing to the profiles.
        """
        self.weights = _weights(given)
        check_some(self.slug, **{f"{name}_weight": weight for name, weight in self.weights.items()})
        self._check_settings()
        self.one_stage, self.one_stage_teacher = (given[name] == "one_stage" for name in ("profile", "teacher_profile"))
        self.temperature, self.box_reduction = given["temperature"], given["box_reduction"]
        self.size, self.pooling = given["size"], {name: given[name] for name in ("sampling_ratio", "aligned")}
        self.gamma, self.ignore_iou = given["gamma"], given["ignore_iou"]
        self.positive_in_denominator = given["positive_in_denominator"]
        self.num_rois, self.positive_fraction = given["num_rois"], given["positive_fraction"]

    def _build(self, teacher: DetectorSpec, student: Detector, given: Mapping[str, Any]) -> None:
        """Choose the levels, and build the level matching, the projection and the bank.

        Raises:
            MethodError: ``levels`` are not levels of the student.
            PairError: channels or embeddings of the pair do not fit.
        """
        self.levels = self._student_levels(student, given["levels"])
        pooled = [i for i, s in enumerate(teacher.strides) if teacher.family != "regions" or s <= COARSEST_POOLED]
        self.teacher_levels = pooled or [0]
        self.matching: LevelMatching | None = None
        if given["sgfi_weight"]:
            shared = given["adapter"] == "shared"
            embedding = (given[name] for name in ("embed_channels", "embed_relu", "tau_init"))
            self.matching = LevelMatching(*self._channels(student, shared), shared, *embedding)
        self.projection: nn.Module | None = self._projection(student) if given["ckd_weight"] else None
        self.bank = RowBank(given["queue_batches"])
        predicts = bool(self.weights["class"] or self.weights["box"])
        self.columns = class_columns(student.spec.classes, teacher.classes, softmax=True) if predicts else []

    def _check_settings(self) -> None:
        """Check that no hyper-parameter is set that the profiles give no meaning.

        Raises:
            MethodError: one is.
        """
        if _homogeneous(self.settings):
            return
        both = "profile=two_stage and teacher_profile=two_stage"
        for name in ("class_weight", "box_weight"):
            if self.settings[name]:
                raise MethodError(f"{self.slug}: {name} compares region heads, so it needs {both}; leave it out")
        if self.settings["projection"] == "shared":
            raise MethodError(f"{self.slug}: projection=shared needs {both}; leave it out")

    def _student_levels(self, student: Detector, levels: Sequence[int] | None) -> list[int]:
        """Indices of the student's levels, finest first.

        Raises:
            MethodError: a level does not exist or is given twice, or the list is empty.
        """
        count = len(student.spec.strides)
        if levels is None:
            return list(range(count))
        chosen = sorted({level + count if level < 0 else level for level in levels})
        if not chosen or len(chosen) < len(levels) or chosen[0] < 0 or chosen[-1] >= count:
            raise MethodError(f"{self.slug}: levels={list(levels)}: give each level once, from 0 to {count - 1}")
        return chosen

    def _channels(self, student: Detector, shared: bool) -> tuple[list[int], int]:
        """The student's channels of each level, and the teacher's.

        Raises:
            PairError: the teacher's levels differ in their channels, or the student's do and the adapter is shared.
        """
        mine = [student.spec.channels[level] for level in self.levels]
        if shared and len(set(mine)) > 1:
            raise PairError(
                f"{self.slug}: the levels of the student {student.spec.name} have {tuple(mine)} channels, which one convolution "
                f"cannot read; set {self.slug},adapter=per_level"
            )
        return mine, self._teacher_channels()

    def _teacher_channels(self) -> int:
        """Channels of the levels that the teacher's regions or vectors come from.

        Raises:
            PairError: they differ.
        """
        theirs = [self.teacher.spec.channels[level] for level in self.teacher_levels]
        if len(set(theirs)) > 1:
            raise PairError(
                f"{self.slug}: the levels of the teacher {self.teacher.spec.name} have {tuple(theirs)} channels; regions of "
                f"different channels cannot be compared, take a teacher whose neck has equal channels"
            )
        return theirs[0]

    def _projection(self, student: Detector) -> nn.Module:
        """The projection of the student's embeddings to the width of the teacher's.

        Raises:
            PairError: a region head has no embedding, or ``shared`` and the widths differ.
        """
        if self.one_stage_teacher:
            theirs = self._teacher_channels()
        else:
            theirs = self._region_width("teacher", self.teacher.detector)
        if self.one_stage:
            return CellProjection(student.spec.channels, max(student.spec.anchors, default=1), theirs)
        mine = self._region_width("student", student)
        if self.settings["projection"] == "shared" and mine != theirs:
            raise PairError(
                f"{self.slug}: the region embeddings of the student {student.spec.name} have {mine} numbers, the teacher's "
                f"{theirs}, so one projection cannot read both; set {self.slug},projection=student"
            )
        return nn.Linear(mine, theirs, bias=False)

    def _region_width(self, side: str, detector: Detector) -> int:
        width = region_width(detector)
        if not width:
            raise PairError(
                f"{self.slug}: the {side} {detector.spec.name} does not show the last layer of its region head; set "
                f"{self.slug},ckd_weight=0"
            )
        return width

    # ------------------------------------------------------------------------------------------------------------ learn

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Compute ``g_detkd_{sgfi,ckd,class,box}``, without terms of weight 0.

        Monitors: the mean number of regions of an image, and the temperature over levels. A pass without gradients does not
        change the bank.
        """
        chosen = self._dense(seen, taught, batch) if self.one_stage else self._regions(seen, taught, batch)
        terms: dict[str, Tensor] = {}
        with full_precision(batch.images.device):
            count = sum(len(boxes) for boxes in chosen.boxes) / len(batch)
            monitors = {"regions": batch.images.new_tensor(count)}
            if self.matching is not None:
                terms["g_detkd_sgfi"] = self.weights["sgfi"] * self._imitate(chosen, seen, taught)
                monitors["tau"] = self.matching.tau.detach()[0]
            if self.projection is not None:
                terms["g_detkd_ckd"] = self.weights["ckd"] * self._contrast(chosen, seen, taught)
            if self.columns:
                terms |= self._predictions(chosen)
        return Losses(terms, monitors)

    def _regions(self, seen: Observation, taught: Observation, batch: Batch) -> _Chosen:
        """The regions that a two-stage student trains on, without empty boxes; of a cascade, those of its first stage."""
        assert isinstance(seen.prediction, Regions)
        mine = seen.prediction.before_refinement()
        reads_head = bool(self.requirements.teacher_capabilities)
        theirs = self.teacher.predict_regions(mine, taught.features, batch) if reads_head else None
        usable = has_area(mine.boxes_xyxy)
        by_image = [torch.nonzero(usable & (mine.origin.image == image)).flatten() for image in range(len(batch))]
        order = torch.cat(by_image)
        boxes = [mine.boxes_xyxy[rows] for rows in by_image]
        return _Chosen(boxes, mine.origin[order], mine.rows(order), None if theirs is None else theirs.rows(order))

    def _dense(self, seen: Observation, taught: Observation, batch: Batch) -> _Chosen:
        """Sampled boxes of a dense student, each from a cell; ground truth is not added, because it has no cell."""
        assert isinstance(seen.prediction, Dense)
        with full_precision(batch.images.device):
            found = propose(seen.prediction, batch.sizes)
            sampled = sample_regions(
                found.boxes_xyxy,
                found.origins,
                batch.targets,
                count=self.num_rois,
                positive_fraction=self.positive_fraction,
                insert_ground_truth=False,
            )
        theirs = None
        if self.requirements.teacher_capabilities:
            detector = self.teacher.detector
            assert isinstance(detector, HasRegions)
            with torch.no_grad():
                theirs = detector.regions(taught.features, sampled.boxes_xyxy, batch).before_refinement().float()
        return _Chosen(sampled.boxes_xyxy, Origin.cat(sampled.origins), theirs=theirs)

    def _imitate(self, chosen: _Chosen, seen: Observation, taught: Observation) -> Tensor:
        """SGFI: regions of all student levels against the region of the teacher's level, pooled in the same way."""
        assert self.matching is not None
        mine = pool_boxes_on_all_levels(seen.features.take(self.levels), chosen.boxes, self.size, **self.pooling)  # type: ignore[arg-type]
        with torch.no_grad():
            theirs = pool_boxes(taught.features.take(self.teacher_levels), chosen.boxes, self.size, **self.pooling)  # type: ignore[arg-type]
        return g_detkd_sgfi_loss(self.matching(mine, theirs).regions, theirs)

    def _contrast(self, chosen: _Chosen, seen: Observation, taught: Observation) -> Tensor:
        """CKD; then the teacher's embeddings join the bank. Those of other processes are negatives, too."""
        assert self.projection is not None
        if self.one_stage:
            mine = self.projection(seen.tower().classification, chosen.origin)
        else:
            assert chosen.mine is not None
            mine = self.projection(chosen.mine.embedding)
        with torch.no_grad():
            theirs = self._teacher_embedding(chosen, taught)
            if self.settings["projection"] == "shared":
                theirs = self.projection(theirs)
            own = len(theirs)
            units = gather_over_ranks(g_detkd_units(theirs))  # those of this process first
        loss = g_detkd_ckd_loss(
            mine,
            theirs,
            self.gamma,
            bank=torch.cat([units[own:], self.bank(units)]),
            ignored=overlapping_pairs(chosen.boxes, self.ignore_iou),
            positive_in_denominator=self.positive_in_denominator,
        )
        if self.bank.batches and torch.is_grad_enabled():
            self.bank.push(units)
        return loss

    def _teacher_embedding(self, chosen: _Chosen, taught: Observation) -> Tensor:
        """[N, D] the last hidden layer of the teacher's region head, or the vector of its class tower at the box's centre."""
        if not self.one_stage_teacher:
            assert chosen.theirs is not None
            assert chosen.theirs.embedding is not None
            return chosen.theirs.embedding
        tower = taught.tower()
        maps = Features(tower.classification, tower.strides).take(self.teacher_levels)
        return features_at_origin(maps.maps, _central_cells(torch.cat(chosen.boxes), chosen.origin.image, maps))

    def _predictions(self, chosen: _Chosen) -> dict[str, Tensor]:
        """Weighted losses of class scores and boxes between two region heads."""
        mine, theirs = chosen.mine, chosen.theirs
        assert mine is not None
        assert theirs is not None
        logits, terms = theirs.logits[:, self.columns], {}
        if self.weights["class"]:
            terms["g_detkd_class"] = self.weights["class"] * g_detkd_class_loss(mine.logits, logits, self.temperature)
        if self.weights["box"]:
            deltas = theirs.deltas if theirs.deltas.shape[1] == 1 else theirs.deltas[:, self.columns[:-1]]
            loss = g_detkd_box_loss(mine.deltas, deltas, logits, self.box_reduction)  # type: ignore[arg-type]
            terms["g_detkd_box"] = self.weights["box"] * loss
        return terms


def _central_cells(boxes_xyxy: Tensor, image: Tensor, features: Features) -> Origin:
    """The cell of each box's centre, on the level that the box would be pooled from."""
    levels = canonical_levels(boxes_xyxy, features.strides)
    strides = levels.new_tensor(features.strides)[levels]
    last = levels.new_tensor([level.shape[-2:] for level in features.maps])[levels] - 1
    centers = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    cells = torch.minimum((centers.flip(1) / strides[:, None]).long().clamp(min=0), last)
    return Origin(image, levels, cells, torch.zeros_like(levels), torch.full_like(levels, -1))


def _homogeneous(settings: Mapping[str, Any]) -> bool:
    return bool(settings["profile"] == settings["teacher_profile"] == "two_stage")


def _weights(settings: Mapping[str, Any]) -> dict[str, float]:
    """The factor of each term: the given one, or for ``class`` and ``box`` that of the profiles."""
    own = 1.0 if _homogeneous(settings) else 0.0
    given = {name: settings[f"{name}_weight"] for name in ("sgfi", "ckd", "class", "box")}
    return {name: own if weight is None else weight for name, weight in given.items()}
