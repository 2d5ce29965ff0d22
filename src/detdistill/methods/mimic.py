"""Mimic: the features that the student pools from proposed regions should equal those of the teacher.

Li, Jin, Yan, "Mimicking Very Efficient Network for Object Detection", CVPR 2017. No released code was found: this is a
reconstruction from published notes on the paper and from the feature mimicker of United-Perception, a toolbox of the company
where two of the authors worked. ``two_stage`` is the paper's schedule; without it features and detector are trained together,
as in the toolbox.

Shape letters: B images, N regions of the whole batch, C channels, S side of a pooled region, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.contract import Detector, DetectorSpec, HasRegions, Teacher
from detdistill.functional.cells import level_of_box
from detdistill.functional.classes import class_columns
from detdistill.functional.counting import divisor_over_ranks
from detdistill.functional.precision import full_precision
from detdistill.functional.regions import pool_boxes
from detdistill.methods.shared.contract import Method, Stage
from detdistill.methods.shared.hyper_parameters import MethodError, check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.methods.shared.regions import proposed_boxes, usable_boxes
from detdistill.structures import Batch, Clock, Features, Losses, Observation, Regions
from detdistill.values import Count, Index, Positive, Weight

COARSEST_POOLED = 32
"""Stride of P5, the coarsest level that regions are pooled from by default, as in Faster R-CNN on a pyramid."""


def mimic_loss(student: Tensor, teacher: Tensor, weight: float = 1.0, normalize: bool = True) -> Tensor:
    """Half the squared difference of pooled regions: ``1 / (2N) * sum_i 1 / m_i * |u_i - r(v_i)|^2``.

    With ``normalize`` m_i is the number of values of a region, C * S * S, as in United-Perception, so the loss is half the mean
    over all values. A note on the paper leaves open whether m_i counts channels.

    Args:
        student: [N, C, S, S] the student's regions after the transform r; gradient flows.
        teacher: [N, C, S, S] the teacher's, in the same order, treated as constant.
        weight: factor (lambda1).
        normalize: False: m_i = 1, the first formula of the paper.

    Returns:
        [] the loss; 0, connected to the student, if there are no regions.

    Example:
        >>> float(mimic_loss(torch.ones(3, 2, 7, 7), torch.zeros(3, 2, 7, 7)))
        0.5
    """
    squares = F.mse_loss(student, teacher.detach(), reduction="sum")
    count = student.numel() if normalize else len(student)
    return weight * squares / (2 * divisor_over_ranks(count, student))


def mimic_prediction_loss(student: Tensor, teacher: Tensor, weight: float = 1.0) -> Tensor:
    """Half the squared difference of the predictions for N regions, ``1 / (2N) * sum |z_t - z_s|^2`` (second stage).

    Args:
        student: [N, ...] class logits or box deltas; gradient flows.
        teacher: the same shape, treated as constant.
        weight: factor; the paper's is not known, 1 is our choice.

    Returns:
        [] the loss; 0 without regions.
    """
    return mimic_loss(student, teacher, weight, normalize=False)


class RegionTransform(nn.Module):
    """The transform r: a 1x1 convolution from the student's channels to the teacher's, applied to pooled regions.

    Before pooling it would give the same values except at the map's border, where RoIAlign's zeros would not get the bias.
    """

    def __init__(self, channels: Sequence[int], teacher_channels: int, per_level: bool) -> None:
        """Make the convolutions with PyTorch's initialisation.

        Args:
            channels: the student's channels of each pooled level.
            teacher_channels: the teacher's.
            per_level: a convolution for each level; False: one for all.
        """
        super().__init__()
        own = channels if per_level else channels[:1]
        self.convolutions = nn.ModuleList(nn.Conv2d(width, teacher_channels, 1) for width in own)

    def forward(self, features: Features, boxes: Sequence[Tensor], levels: Tensor, size: int, sampling_ratio: int) -> Tensor:
        """Pool the boxes from the student's pyramid and transform them: [N, C, S, S] in the order of the boxes."""
        settings = {"sampling_ratio": sampling_ratio, "aligned": False}
        if len(self.convolutions) == 1:
            shared: Tensor = self.convolutions[0](pool_boxes(features, boxes, size, levels, **settings))  # type: ignore[arg-type]
            return shared
        of_image = levels.split([len(mine) for mine in boxes])
        found, order = [], []
        for level, convolution in enumerate(self.convolutions):
            mine = [given[there == level] for given, there in zip(boxes, of_image, strict=True)]
            found.append(convolution(pool_boxes(features.take([level]), mine, size, **settings)))  # type: ignore[arg-type]
            order.append(torch.nonzero(levels == level).flatten())
        return torch.cat(found)[torch.cat(order).argsort()]


class Mimic(Method[Observation]):
    """Mimic between two-stage detectors; without ``two_stage`` between any detectors with feature maps."""

    slug = "mimic"
    title = "Mimicking Very Efficient Network for Object Detection (CVPR 2017)"
    bibtex = """@inproceedings{li2017mimicking,
  title={Mimicking Very Efficient Network for Object Detection},
  author={Li, Quanquan and Jin, Shengying and Yan, Junjie},
  booktitle={Proceedings of the IEEE Conference on Computer Vision and Pattern Recognition},
  year={2017}
}"""

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        two_stage: bool = True,
        weight: Weight = 1.0,
        normalize: bool = True,
        proposals: Literal["student", "teacher", "labels"] = "student",
        max_regions: Count = 1000,
        size: Count = 7,
        sampling_ratio: Index = 2,
        base_scale: Positive = 56.0,
        levels: Sequence[int] | None = None,
        transform: Literal["shared", "per_level", "none"] = "shared",
        deconvolution: Literal[0, 2, 4] = 0,
        class_weight: Weight = 1.0,
        box_weight: Weight = 1.0,
        keep_features: bool = False,
        mimic_share: Positive = 1.0,
        warm_iters: Index = 0,
    ) -> None:
        """Choose the pooled levels and build the transform.

        Args:
            teacher: with ``two_stage`` a two-stage detector with all classes of the student, else any detector.
            student: with ``two_stage`` a two-stage detector, else any detector.
            two_stage: the paper's schedule: first train the student's features and region proposal network with the feature
                loss, then the whole detector with the losses on region predictions. False: train the whole detector with the
                feature loss in one stage, as in United-Perception; works for any pair.
            weight: factor of the feature loss (lambda1).
            normalize: divide the difference of a region by the number of its values (m_i).
            proposals: detector whose proposals are the regions. ``teacher`` (United-Perception's default) is safer while the
                student's proposals are poor, and needs the live teacher. ``labels``: the ground-truth boxes (not in the paper).
            max_regions: largest number of regions of an image.
            size: side of a pooled region in bins (S).
            sampling_ratio: samples along each side of a bin.
            base_scale: side in pixels of the smallest box of level 1, halved, in a pyramid that begins at stride 4. It grows with
                the stride at which a pyramid begins.
            levels: indices of the student's levels to pool from; None: those of stride 32 or less (P2 to P5). The teacher's are
                always those of stride 32 or less.
            transform: transform r of the student's regions. ``shared``: one 1x1 convolution; ``per_level``: one for each level;
                ``none``: no transform (United-Perception), for equal channels.
            deconvolution: kernel of a transposed convolution that doubles the student's maps before pooling (2 or 4), for a
                student whose pyramid is coarser than the teacher's by a factor of 2; 0: none.
            class_weight: factor of the loss on class logits in the second stage (1 is our choice).
            box_weight: factor of the loss on box deltas in the second stage (1 is our choice).
            keep_features: keep the feature loss in the second stage.
            mimic_share: length of the first stage as a multiple of the run's epochs (not known from the paper).
            warm_iters: steps over which the weight of the feature loss rises linearly from 0 (United-Perception).

        Raises:
            MethodError: a hyper-parameter is out of range, or ``weight`` is 0.
            PairError: the pair does not fit ``two_stage``, or the channels of the pooled levels do not fit ``transform``.
        """
        super().__init__(teacher, student)
        check_some(self.slug, weight=weight)
        self.two_stage, self.weight, self.normalize = two_stage, weight, normalize
        self.proposals, self.max_regions = proposals, max_regions
        self.size, self.sampling_ratio, self.base_scale = size, sampling_ratio, base_scale
        self.prediction_weights = {"class": class_weight, "box": box_weight}
        self.keep_features, self.mimic_share, self.warm_iters = keep_features, mimic_share, warm_iters
        self.levels = self._student_levels(student.spec, levels)
        self.teacher_levels = _pooled_levels(teacher.spec)
        mine = [student.spec.channels[level] for level in self.levels]
        theirs = self._channels(mine, [teacher.spec.channels[level] for level in self.teacher_levels], transform, student.spec)
        self.deconvolutions = _doubling(mine if deconvolution else (), deconvolution)
        self.transform = None if transform == "none" else RegionTransform(mine, theirs, transform == "per_level")
        predicts = two_stage and class_weight + box_weight > 0
        self.columns = class_columns(student.spec.classes, teacher.spec.classes, softmax=True) if predicts else []

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Two two-stage detectors and the live teacher for ``two_stage``; else any detectors."""
        predicts = bool(settings["two_stage"] and settings["class_weight"] + settings["box_weight"])
        why = ""
        if predicts:
            why = (
                "its second stage runs the teacher's region head on the student's regions, which no cache holds "
                f"({cls.slug},class_weight=0,box_weight=0 learns the features alone, {cls.slug},two_stage=false in one stage)"
            )
        elif settings["proposals"] == "teacher":
            why = f"the teacher's proposals are computed in each step ({cls.slug},proposals=student needs none)"
        return Needs(
            teacher_families=("regions",) if predicts else (),
            student_families=("regions",) if settings["two_stage"] else (),
            teacher_capabilities=(HasRegions,) if predicts else (),
            live_teacher=why,
            same_classes=predicts,
        )

    def _student_levels(self, spec: DetectorSpec, levels: Sequence[int] | None) -> list[int]:
        """Indices of the student's levels, finest first.

        Raises:
            MethodError: a level does not exist or is given twice, or the list is empty.
        """
        if levels is None:
            return _pooled_levels(spec)
        count = len(spec.strides)
        chosen = sorted({level + count if level < 0 else level for level in levels})
        if not chosen or len(chosen) < len(levels) or chosen[0] < 0 or chosen[-1] >= count:
            raise MethodError(f"{self.slug}: levels={list(levels)}: give each level once, from 0 to {count - 1}")
        return chosen

    def _channels(self, mine: Sequence[int], theirs: Sequence[int], transform: str, spec: DetectorSpec) -> int:
        """Number of channels of the teacher's pooled levels.

        Raises:
            PairError: they differ, or the student's levels do not fit the transform.
        """
        if len(set(theirs)) > 1:
            raise PairError(
                f"{self.slug}: the levels of the teacher {self.teacher.spec.name} have {tuple(theirs)} channels; regions of "
                f"different channels cannot be compared, take a teacher whose neck has equal channels"
            )
        if transform == "shared" and len(set(mine)) > 1:
            raise PairError(
                f"{self.slug}: the levels of the student {spec.name} have {tuple(mine)} channels, which one convolution cannot "
                f"read; set {self.slug},transform=per_level"
            )
        if transform == "none" and set(mine) != set(theirs):
            raise PairError(
                f"{self.slug}: without a transform the student {spec.name} with {mine[0]} channels cannot be compared with the "
                f"teacher's {theirs[0]}; set {self.slug},transform=shared"
            )
        return theirs[0]

    # ------------------------------------------------------------------------------------------------------- features

    @torch.no_grad()
    def regions(self, seen: Observation, taught: Observation, batch: Batch) -> list[Tensor]:
        """The regions that are compared, [n_b, 4] for each image."""
        if self.proposals == "labels":
            return [boxes[: self.max_regions] for boxes in usable_boxes(_ground_truth(batch), batch)]
        if self.proposals == "student":
            assert seen.prediction is not None
            return proposed_boxes(seen.prediction, batch, self.max_regions)
        detector = self.teacher.detector
        if isinstance(detector, HasRegions):
            boxes, _ = detector.proposals(taught.features, batch)
            return [mine[: self.max_regions] for mine in usable_boxes([mine.float() for mine in boxes], batch)]
        return proposed_boxes(detector.predict(taught.features, batch).float(), batch, self.max_regions)

    def mimic(self, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Compute the term ``mimic_features``; the monitor ``regions`` is the mean number of regions of an image."""
        boxes = self.regions(seen, taught, batch)
        with full_precision(batch.images.device):
            mine = seen.features.take(self.levels)
            if self.deconvolutions:
                maps = tuple(layer(level) for layer, level in zip(self.deconvolutions, mine.maps, strict=True))
                mine = Features(maps, tuple(max(1, stride // 2) for stride in mine.strides))
            pooled = self._pool(mine, boxes, self.transform)
            with torch.no_grad():
                wanted = self._pool(taught.features.take(self.teacher_levels), boxes, None)
            loss = mimic_loss(pooled, wanted, self.weight, self.normalize) * clock.warm_up(self.warm_iters)
            return Losses({"mimic_features": loss}, {"regions": loss.new_tensor(len(pooled) / len(batch))})

    def _pool(self, features: Features, boxes: Sequence[Tensor], transform: RegionTransform | None) -> Tensor:
        base = self.base_scale * features.strides[0] / 4
        levels = level_of_box(torch.cat(list(boxes)), len(features.maps), base)
        if transform is not None:
            pooled: Tensor = transform(features, boxes, levels, self.size, self.sampling_ratio)
            return pooled
        return pool_boxes(features, boxes, self.size, levels, sampling_ratio=self.sampling_ratio, aligned=False)

    # ------------------------------------------------------------------------------------------------------ predictions

    def _predictions(self, seen: Observation, taught: Observation, batch: Batch) -> dict[str, Tensor]:
        """Compute ``mimic_class`` and ``mimic_box`` on the regions that the student trains on, without those of weight 0."""
        if not self.columns:
            return {}
        assert isinstance(seen.prediction, Regions)
        mine = seen.prediction.before_refinement()
        theirs = self.teacher.predict_regions(mine, taught.features, batch)
        terms = {}
        with full_precision(batch.images.device):
            if self.prediction_weights["class"]:
                logits = theirs.logits[:, self.columns]
                terms["mimic_class"] = mimic_prediction_loss(mine.logits, logits, self.prediction_weights["class"])
            if self.prediction_weights["box"]:
                deltas = theirs.deltas if theirs.deltas.shape[1] == 1 else theirs.deltas[:, self.columns[:-1]]
                own, fixed = torch.broadcast_tensors(mine.deltas, deltas)  # class-agnostic: the same box for all classes
                terms["mimic_box"] = mimic_prediction_loss(own, fixed, self.prediction_weights["box"])
        return terms

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Compute ``mimic_features`` (one stage, or ``keep_features``), ``mimic_class`` and ``mimic_box`` (second stage)."""
        if not self.two_stage:
            return self.mimic(seen, taught, batch, clock)
        found = Losses(self._predictions(seen, taught, batch))
        return Losses.merge([self.mimic(seen, taught, batch, clock), found]) if self.keep_features else found

    def first_step(self, student: Detector, batch: Batch, taught: Observation, clock: Clock) -> Losses:
        """Run a step of the stage ``mimic``: the loss of the student's region proposal network, and the feature loss."""
        seen, taught = student(batch).float(), taught.float()
        prediction = seen.prediction
        assert isinstance(prediction, Regions)
        assert prediction.first is not None
        with full_precision(batch.images.device):
            own = student.loss(prediction.first, batch, prediction.first_assignment)
        return Losses.merge([own, self.mimic(seen, taught, batch, clock).as_distilled()])

    def stages(self, student: Detector) -> tuple[Stage, ...]:
        """Return the stage ``distill``; with ``two_stage`` the stage ``mimic`` before it."""
        last = super().stages(student)
        if not self.two_stage:
            return last
        trains = (student, self)
        first = Stage(
            "mimic",
            step=lambda batch, taught, clock: self.first_step(student, batch, taught, clock),
            trains=lambda clock: trains,
            evaluates=None,
            learns_from=self,
            share=self.mimic_share,
        )
        return (first, *last)


def _doubling(widths: Iterable[int], kernel: int) -> nn.ModuleList:
    """A transposed convolution for each map, which doubles its size and keeps its channels."""
    return nn.ModuleList(nn.ConvTranspose2d(width, width, kernel, stride=2, padding=kernel // 4) for width in widths)


def _pooled_levels(spec: DetectorSpec) -> list[int]:
    """Indices of the levels of stride 32 or less; the finest level if all are coarser."""
    return [level for level, stride in enumerate(spec.strides) if stride <= COARSEST_POOLED] or [0]


def _ground_truth(batch: Batch) -> list[Tensor]:
    return [target.without_crowd().boxes_xyxy for target in batch.targets]
