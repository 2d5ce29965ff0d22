"""ScaleKD: scale-decoupled features, and the predictions of a trained cross-scale assistant.

Zhu, Zhou, Liu, Xu, Ou, Mou, Tang, "ScaleKD: Distilling Scale-Aware Knowledge in Small Object Detector", CVPR 2023. Neither code
nor the full text was to be had: this is a reconstruction from a published digest of components, weights and schedule, and from
the attention of the Shunted Transformer, which the digest describes. Divergences, widths and down-sampling rates are ours.

Shape letters: B images, C channels, H x W cells of a map, R regions of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from detdistill.detectors.contract import (
    DetectionHead,
    Detector,
    DetectorSpec,
    HasCopies,
    HasRegions,
    Teacher,
)
from detdistill.errors import ModelError
from detdistill.functional.counting import number_of_positives
from detdistill.functional.precision import full_precision
from detdistill.methods.scalekd.loss import (
    scalekd_box_loss,
    scalekd_class_loss,
    scalekd_feature_loss,
    scalekd_region_class_loss,
)
from detdistill.methods.scalekd.parts import (
    CrossScaleAttention,
    ScaleDecoupling,
    ScaleKDTaught,
    default_rates,
    enlarged,
)
from detdistill.methods.shared.align import resize_like
from detdistill.methods.shared.contract import Method, Stage
from detdistill.methods.shared.hyper_parameters import MethodError, check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.methods.shared.regions import label_regions, of_class
from detdistill.structures import Batch, Clock, Dense, Features, Look, Losses, Observation, Regions
from detdistill.values import Count, Index, Positive, Weight

WEIGHTS = {"one_stage": (0.01, 0.2, 0.05), "two_stage": (0.07, 0.5, 0.2)}
"""The paper's factors of features, classes and boxes (alpha, beta, gamma)."""
WARM_UP = 1 / 3
"""Part of a run before the assistant teaches: 30,000 of 90,000 steps, the paper's 1x schedule."""
FREEZE = 1 / 9
"""Part of a run with a frozen backbone: 10,000 of 90,000 steps, or 20,000 of 180,000."""


class ScaleKD(Method[ScaleKDTaught]):
    """ScaleKD for dense and two-stage students; with ``class_weight=0,box_weight=0`` for any detector with a backbone.

    The assistant is an attention of the student's cells to the teacher's maps, followed by a newly initialised copy of the
    student's head. It learns from the ground truth, in the same optimizer step as the student, and no gradient of its loss
    reaches the student. The student imitates its predictions as they are before that step.
    """

    slug = "scalekd"
    title = "ScaleKD: Distilling Scale-Aware Knowledge in Small Object Detector (CVPR 2023)"
    bibtex = """@inproceedings{zhu2023scalekd,
  title={{ScaleKD}: Distilling Scale-Aware Knowledge in Small Object Detector},
  author={Zhu, Yichen and Zhou, Qiqi and Liu, Ning and Xu, Zhiyuan and Ou, Zhicai and Mou, Xiaofeng and Tang, Jian},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  pages={19723--19733},
  year={2023}
}"""
    teach_settings = ("teacher_scale", "profile", "feature_weight", "class_weight", "box_weight")
    trains_alone = ("scalekd_assistant",)

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        profile: Literal["one_stage", "two_stage"] = "one_stage",
        feature_weight: Weight | None = None,
        class_weight: Weight | None = None,
        box_weight: Weight | None = None,
        teacher_scale: Literal[1, 2] = 2,
        sdf: Literal["shared", "separate", "fixed"] = "shared",
        branches: Literal["shared", "separate"] = "shared",
        width: Count = 256,
        heads: Count = 8,
        rates: tuple[Count, Count] | None = None,
        residual: bool = False,
        box_loss: Literal["smooth_l1", "giou"] = "smooth_l1",
        assistant_weight: Positive = 1.0,
        warmup_steps: Index | None = None,
        freeze_steps: Index | None = None,
    ) -> None:
        """Build adapters, branches and the assistant.

        Args:
            teacher: a detector with backbone features; its classes may differ.
            student: a dense detector, or a two-stage one with ``profile=two_stage``; without class and box terms any.
            profile: kind of student, with the paper's weights.
            feature_weight: factor of the features (alpha); None: the profile's.
            class_weight: factor of the class scores (beta); None: the profile's.
            box_weight: factor of the boxes (gamma); None: the profile's.
            teacher_scale: the teacher sees the image in this size. The paper's teacher is trained for twice the size; set 1 for a
                teacher of the run's size.
            sdf: branches of the teacher's side. ``shared``: those of the student's; ``separate``: its own. Both are trained by
                the feature loss from both sides. ``fixed``: its own, not trained, which cannot collapse to a constant.
            branches: the three dilations share one set of weights, or each has its own (an ablation of the paper).
            width: width of branches and assistant.
            heads: heads of the assistant's attention, in two groups.
            rates: cells along one side of the blocks that each group reads; None: by the stride, as in the Shunted Transformer.
            residual: add the student's features to the result of the attention (not in the digest).
            box_loss: on the encoded boxes, or GIoU on the decoded ones, which heads that predict distributions need.
            assistant_weight: factor of the assistant's own loss, which acts on its learning rate (under SGD).
            warmup_steps: steps before the student imitates the assistant (the paper: 30,000); None: a third of the run.
            freeze_steps: steps with a frozen backbone of the student (the paper: 10,000 of 90,000); None: a ninth of the run.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            PairError: the pair does not fit: unequal channels of the levels, a teacher of one image size, an unknown backbone.
        """
        super().__init__(teacher, student)
        self.weights = _weights(self.settings)
        check_some(self.slug, **{f"{name}_weight": weight for name, weight in self.weights.items()})
        if heads % 2 or width % heads:
            raise MethodError(f"{self.slug}: heads={heads} must be even, and width={width} a multiple of it")
        self.one_stage, self.teacher_scale = profile == "one_stage", teacher_scale
        self.residual, self.box_loss, self.assistant_weight = residual, box_loss, assistant_weight
        self.warmup_steps, self.freeze_steps = warmup_steps, freeze_steps
        self._check(teacher.spec, student)
        self.adapters: nn.ModuleList | None = None
        self.decoupling: ScaleDecoupling | None = None
        self.teacher_decoupling: ScaleDecoupling | None = None
        self.attention: CrossScaleAttention | None = None
        self.head: DetectionHead | None = None
        if self.weights["feature"]:
            self._build_features(teacher.spec, student.spec, width, sdf, branches == "shared")
        if _assists(self.weights):
            self._build_assistant(teacher.spec, student, width, heads, rates)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Backbone features for the feature term; a dense or two-stage student with a head to copy for the others."""
        weights = _weights(settings)
        deepest, assists = bool(weights["feature"]), _assists(weights)
        family = ("dense",) if settings["profile"] == "one_stage" else ("regions",)
        return Needs(
            teacher=Look(backbone=deepest),
            student=Look(backbone=deepest),
            student_families=family if assists else (),
            student_capabilities=(HasCopies,) if assists else (),
            one_size="it shows the teacher images of a scale of its own (teacher_scale)",
        )

    # ---------------------------------------------------------------------------------------------------------- building

    def _check(self, teacher: DetectorSpec, student: Detector) -> None:
        """Check what ``needs`` cannot express.

        Raises:
            PairError: the teacher reads images of one size only, the backbone cannot be frozen, or the coding of boxes.
        """
        if self.teacher_scale > 1 and teacher.fixed_size_hw is not None:
            raise PairError(
                f"{self.slug}: the teacher {teacher.name} reads images of {teacher.fixed_size_hw} only; set "
                f"{self.slug},teacher_scale=1"
            )
        if self.freeze_steps != 0:
            try:
                student.parts()
            except ModelError as error:
                raise PairError(f"{self.slug}: {error}, or set {self.slug},freeze_steps=0") from error
        if self.weights["box"] and student.spec.box_bins and self.box_loss == "smooth_l1":
            raise PairError(
                f"{self.slug}: the student {student.spec.name} predicts {student.spec.box_bins} bins of each side; set "
                f"{self.slug},box_loss=giou"
            )

    def _build_features(self, teacher: DetectorSpec, student: DetectorSpec, width: int, sdf: str, shared: bool) -> None:
        """Build adapters and branches.

        Raises:
            PairError: a detector does not know the channels of its backbone.
        """
        channels = []
        for side, spec in (("student", student), ("teacher", teacher)):
            if spec.backbone is None:
                raise PairError(
                    f"{self.slug}: the {side} {spec.name} does not know its backbone's channels; set {self.slug},feature_weight=0"
                )
            channels.append(spec.backbone.channels[-1])
        self.adapters = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.decoupling = ScaleDecoupling(width, shared)
        self.teacher_decoupling = None if sdf == "shared" else ScaleDecoupling(width, shared)
        if sdf == "fixed":
            assert self.teacher_decoupling is not None
            self.teacher_decoupling.requires_grad_(False)
            self.adapters[1].requires_grad_(False)

    def _build_assistant(
        self, teacher: DetectorSpec, student: Detector, width: int, heads: int, rates: tuple[int, int] | None
    ) -> None:
        """Pair the levels, and build attention and head.

        Raises:
            PairError: the levels of a detector differ in their channels.
        """
        mine, theirs = student.spec, teacher
        for side, spec in (("student", mine), ("teacher", theirs)):
            if len(set(spec.channels)) > 1:
                raise PairError(
                    f"{self.slug}: the levels of the {side} {spec.name} have {spec.channels} channels, but the assistant reads "
                    f"all levels with the same weights; set {self.slug},class_weight=0,box_weight=0"
                )
        seen_strides = [stride / self.teacher_scale for stride in theirs.strides]
        self.partners = [_nearest(seen_strides, own) for own in mine.strides]
        self.rates = [rates or default_rates(seen_strides[level]) for level in self.partners]
        self.attention = CrossScaleAttention(mine.channels[0], theirs.channels[0], width, heads, self.rates)
        assert isinstance(student, HasCopies)
        self.head = student.copy_head(fresh=True)

    def stages(self, student: Detector) -> tuple[Stage, ...]:
        """The stage ``distill``, at whose beginning the student's backbone is frozen.

        In a composition with a method that trains the whole student, the backbone is not frozen.
        """
        (last,) = super().stages(student)
        if self.freeze_steps == 0:
            return (last,)
        parts = student.parts()
        early, late = (*parts.neck, *parts.head, self), (student, self)
        return (replace(last, trains=lambda clock: early if clock.step < _steps(self.freeze_steps, FREEZE, clock) else late),)

    # ------------------------------------------------------------------------------------------------------ teach, learn

    @torch.no_grad()
    def teach(self, batch: Batch) -> ScaleKDTaught:
        """Compute the teacher's maps for the image in ``teacher_scale``: the backbone's last, and those of the neck."""
        look = Look(backbone=bool(self.weights["feature"]))
        if self.teacher_scale == 1:
            seen = self.teacher.observe(batch, look)
        else:  # not by `observe`, which keeps the pass that the methods of a composition share
            seen = self.teacher.detector.observe_features(enlarged(batch, self.teacher_scale), look)
        below = seen.backbone_features
        deepest = None if below is None else below.take([len(below.maps) - 1])
        return ScaleKDTaught(deepest, seen.features if _assists(self.weights) else None)

    def learn(self, student: Detector, seen: Observation, taught: ScaleKDTaught, batch: Batch, clock: Clock) -> Losses:
        """Compute ``scalekd_{feature,assistant,class,box}``, without those of weight 0.

        ``scalekd_assistant`` trains the assistant alone; its parts are monitors. Class and box terms are 0 in the warm-up.
        """
        terms: dict[str, Tensor] = {}
        monitors: dict[str, Tensor] = {}
        with full_precision(batch.images.device):
            if self.weights["feature"]:
                terms["scalekd_feature"] = self.weights["feature"] * self._feature_loss(seen, taught)
            if _assists(self.weights):
                features = self._assist(seen.features, taught)
                teaches = clock.step >= _steps(self.warmup_steps, WARM_UP, clock)
                imitate = self._dense if self.one_stage else self._regions
                own, found = imitate(student, seen, features, batch, teaches)
                terms["scalekd_assistant"] = self.assistant_weight * own.total()
                monitors = {f"assistant_{name}": term.detach() for name, term in own.terms.items()}
                zero = batch.images.new_zeros(())
                for name in ("class", "box"):
                    if self.weights[name]:
                        terms[f"scalekd_{name}"] = self.weights[name] * found.get(name, zero)
        return Losses(terms, monitors)

    def _feature_loss(self, seen: Observation, taught: ScaleKDTaught) -> Tensor:
        """SDF: the decoupled features of both backbones' last maps, the student's resized to the teacher's size."""
        assert seen.backbone_features is not None
        assert taught.deepest is not None
        assert self.adapters is not None
        assert self.decoupling is not None
        theirs = taught.deepest.maps[0]
        adapted = self.adapters[0](seen.backbone_features.maps[-1]), self.adapters[1](theirs)
        mine = self.decoupling(resize_like(adapted[0], theirs))
        decoupling = self.teacher_decoupling or self.decoupling
        padding = None if taught.deepest.padding is None else taught.deepest.padding[0]
        return scalekd_feature_loss(mine, decoupling(adapted[1]), padding)

    def _assist(self, student: Features, taught: ScaleKDTaught) -> Features:
        """CSA: the student's pyramid, without gradient, after it has read the teacher's."""
        assert taught.features is not None
        assert self.attention is not None
        theirs, fixed = taught.features, student.detach()
        maps = []
        for own, level, rates in zip(fixed.maps, self.partners, self.rates, strict=True):
            padding = None if theirs.padding is None else theirs.padding[level]
            read = self.attention(own, theirs.maps[level], rates, padding)
            maps.append(own + read if self.residual else read)
        return replace(fixed, maps=tuple(maps))

    def _dense(
        self, student: Detector, seen: Observation, features: Features, batch: Batch, teaches: bool
    ) -> tuple[Losses, dict[str, Tensor]]:
        """The assistant's losses under the student's assignment, and the losses of the student's dense prediction."""
        head, mine = cast(DetectionHead, self.head), seen.prediction
        theirs = head.predict(features, batch)
        assert isinstance(mine, Dense)
        assert isinstance(theirs, Dense)
        assignment = student.assign(mine, batch)
        own, found = head.loss(theirs, batch, assignment), {}
        if teaches and self.weights["class"]:
            divisor = number_of_positives(assignment, mine.logits)
            mask = _inside(mine, batch, student.spec.strides)
            found["class"] = scalekd_class_loss(mine.logits, theirs.logits, divisor, softmax=mine.softmax, mask=mask)
        if teaches and self.weights["box"]:
            positive = assignment.matched >= 0
            boxes = [x.deltas if self.box_loss == "smooth_l1" else x.boxes_xyxy for x in (mine, theirs)]
            found["box"] = scalekd_box_loss(boxes[0][positive], boxes[1][positive], self.box_loss)  # type: ignore[arg-type]
        return own, found

    def _regions(
        self, student: Detector, seen: Observation, features: Features, batch: Batch, teaches: bool
    ) -> tuple[Losses, dict[str, Tensor]]:
        """The assistant's losses on its own regions, and the losses of the student's; of a cascade, of its first stage's."""
        head = cast(DetectionHead, self.head)
        own = head.loss(head.predict(features, batch), batch)
        if not teaches:
            return own, {}
        assert isinstance(seen.prediction, Regions)
        assert isinstance(head, HasRegions)
        mine, found = seen.prediction.before_refinement(), {}
        by_image = [torch.nonzero(mine.origin.image == image).flatten() for image in range(len(batch))]
        with torch.no_grad():
            theirs = head.regions(features.detach(), [mine.boxes_xyxy[rows] for rows in by_image], batch).before_refinement()
        mine = mine.rows(torch.cat(by_image))
        if self.weights["class"]:
            found["class"] = scalekd_region_class_loss(mine.logits, theirs.logits)
        if self.weights["box"]:
            _, positives = label_regions(student, mine, batch)
            sides = [x.deltas if self.box_loss == "smooth_l1" else x.refined_xyxy for x in (mine, theirs)]
            boxes = [of_class(side[positives.index], positives.labels) for side in sides]
            found["box"] = scalekd_box_loss(boxes[0], boxes[1], self.box_loss)  # type: ignore[arg-type]
        return own, found


def _inside(prediction: Dense, batch: Batch, strides: tuple[int, ...]) -> Tensor:
    """[B, P] bool, True where the top left pixel of a prediction's cell lies inside the image."""
    stride = prediction.levels.new_tensor(strides)[prediction.levels]
    inside = ((prediction.cells * stride[:, None])[None] < batch.sizes[:, None]).all(dim=2)
    return inside if prediction.padding is None else inside & ~prediction.padding


def _nearest(strides: Sequence[float], wanted: float) -> int:
    """Index of the level with the nearest stride; levels of a teacher may serve several of the student's."""
    return min(range(len(strides)), key=lambda level: abs(math.log(strides[level] / wanted)))


def _steps(given: int | None, part: float, clock: Clock) -> float:
    return part * clock.total if given is None else given


def _weights(settings: dict[str, Any]) -> dict[str, float]:
    """The factor of each term: the given one, or the profile's."""
    names = ("feature", "class", "box")
    given = zip(names, WEIGHTS[settings["profile"]], strict=True)
    return {name: own if settings[f"{name}_weight"] is None else settings[f"{name}_weight"] for name, own in given}


def _assists(weights: dict[str, float]) -> bool:
    return bool(weights["class"] or weights["box"])
