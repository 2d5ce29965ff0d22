"""DSIG: regions are the nodes of a graph; nodes and edges of the student's graph should equal those of the teacher's.

Chen, Chen, Liu, Wang, Jia, "Deep Structured Instance Graph for Distilling Object Detectors", ICCV 2021, arXiv 2109.12862, as in
the released code (dvlab-research/Dsig). Means and sums differ between terms: nodes and edges are means within an image that are
added over images, so these terms grow with the batch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from detdistill.detectors.contract import Detector, HasRegions, Teacher
from detdistill.functional.classes import class_columns
from detdistill.functional.dense_maps import find_partners
from detdistill.functional.precision import full_precision
from detdistill.functional.regions import pool_boxes, propose_by_class
from detdistill.functional.soft_targets import kl_divergence
from detdistill.methods.dsig.loss import (
    dsig_box_loss,
    dsig_class_loss,
    dsig_edge_loss,
    dsig_feature_loss,
    dsig_mine,
    dsig_node_losses,
)
from detdistill.methods.shared.align import pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import MethodError, check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.methods.shared.regions import label_regions, of_class
from detdistill.structures import IGNORED, Assignment, Batch, Clock, Dense, Features, Look, Losses, Observation, Regions
from detdistill.values import Count, Positive, Weight

WEIGHTS = {
    "two_stage": {"feature": 0.5, "foreground": 0.5, "background": 0.5, "edge": 2.0, "class": 3.0, "box": 1.0},
    "one_stage": {"feature": 0.5, "foreground": 0.5, "background": 0.0, "edge": 1.0, "class": 1.0, "box": 1.0},
}
"""Released weights for ResNet-18 students: Faster R-CNN and RetinaNet. RetinaNet has no background nodes."""
COARSEST_POOLED = 32
"""Stride of P5, the coarsest level that a two-stage detector pools regions from."""
FIRST_STAGE_SAMPLES = 256
"""Anchors of an image by which the released code divides the losses of the first stage."""


class DSIG(Method[Observation]):
    """DSIG between two detectors of one kind with equal channels: two-stage, or dense with ``profile=one_stage``."""

    slug = "dsig"
    title = "Deep Structured Instance Graph for Distilling Object Detectors (ICCV 2021)"
    bibtex = """@inproceedings{chen2021deep,
  title={Deep Structured Instance Graph for Distilling Object Detectors},
  author={Chen, Yixin and Chen, Pengguang and Liu, Shu and Wang, Liwei and Jia, Jiaya},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2021}
}"""

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        profile: Literal["two_stage", "one_stage"] = "two_stage",
        feature_weight: Weight | None = None,
        foreground_weight: Weight | None = None,
        background_weight: Weight | None = None,
        edge_weight: Weight | None = None,
        class_weight: Weight | None = None,
        box_weight: Weight | None = None,
        alpha: Weight = 7.5,
        mine_threshold: Weight | None = 0.6,
        temperature: Positive = 1.0,
        beta: Weight = 0.0,
        size: Count = 7,
        max_regions: Count = 100,
        first_class_weight: Weight = 0.0,
        first_box_weight: Weight = 0.0,
    ) -> None:
        """Pair the levels.

        Args:
            teacher: a detector of the student's kind; without class, box and mining terms any detector.
            student: a two-stage detector, or a dense one with ``profile=one_stage``.
            profile: kind of student, with the released weights of its ResNet-18.
            feature_weight: factor of the pyramid's loss; None: the profile's.
            foreground_weight: factor of the foreground nodes; None: the profile's.
            background_weight: factor of the background nodes; None: the profile's. Dense students have none.
            edge_weight: factor of the edges; None: the profile's.
            class_weight: factor of the class scores of regions or anchors; None: the profile's.
            box_weight: factor of their box deltas; None: the profile's.
            alpha: further factor of the background nodes.
            mine_threshold: smallest cross-entropy of the teacher's scores against the background for which a background region
                has edges; 0: all have (no live teacher needed), None: none has.
            temperature: of both class distributions.
            beta: distance of box deltas at which the smooth L1 loss becomes linear; 0: L1.
            size: side in bins of the regions that the method pools itself.
            max_regions: largest number of regions of an image, for dense students.
            first_class_weight: factor of the objectness of the region proposal network (0 in all released settings).
            first_box_weight: factor of its box deltas (0 in all released settings).

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            PairError: the pair does not fit the profile, or channels differ.
        """
        super().__init__(teacher, student)
        self.weights = _weights(self.settings)
        check_some(self.slug, **{f"{name}_weight": weight for name, weight in self.weights.items()})
        self.one_stage = profile == "one_stage"
        for name in ("background_weight", "first_class_weight", "first_box_weight"):
            if self.one_stage and self.settings[name]:
                raise MethodError(f"{self.slug}: {name} means nothing to profile=one_stage; leave it out")
        self.alpha, self.mine_threshold, self.temperature, self.beta = alpha, mine_threshold, temperature, beta
        self.size, self.max_regions = size, max_regions
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec)
        self._check(teacher, student)
        compares = self.weights["class"] or self.weights["box"]
        self.columns = class_columns(student.spec.classes, teacher.spec.classes, student.spec.softmax) if compares else []

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Two detectors of the profile's kind; the live teacher for the terms that read its region head."""
        weights, dense = _weights(settings), settings["profile"] == "one_stage"
        compares = bool(weights["class"] or weights["box"])
        anchors = bool(weights["first_class"] or weights["first_box"]) or (dense and compares)
        head = not dense and _reads_head(settings)
        family = ("dense",) if dense else ("regions",)
        return Needs(
            teacher=Look(prediction=anchors),
            teacher_families=family if head or anchors else (),
            student_families=family,
            teacher_capabilities=(HasRegions,) if head else (),
            live_teacher=(
                "its region head predicts on the student's regions, which no cache holds "
                f"({cls.slug},class_weight=0,box_weight=0,mine_threshold=0 learns nodes and edges from the cache)"
            )
            if head
            else "",
            same_classes=compares,
            outputs="same" if compares else "any",
            same_cells=anchors,
        )

    def _check(self, teacher: Teacher, student: Detector) -> None:
        """Check the channels, and the coding of boxes.

        Raises:
            PairError: they do not fit.
        """
        mine, theirs = student.spec, teacher.spec
        if len({*mine.channels, *theirs.channels}) > 1:
            raise PairError(
                f"{self.slug}: it has no adapter, but the student {mine.name} has {mine.channels} channels and the teacher "
                f"{theirs.name} {theirs.channels}; choose equal channels, e.g. by neck= in the model's name"
            )
        if self.one_stage and self.weights["box"] and mine.box_bins != theirs.box_bins:
            raise PairError(
                f"{self.slug}: it compares box deltas, but the student {mine.name} predicts {mine.box_bins} bins of each side, "
                f"the teacher {theirs.name} {theirs.box_bins}; set {self.slug},profile=one_stage,box_weight=0"
            )
        if self.one_stage and self.weights["class"] and len(mine.classes) == 1 and not mine.softmax:
            raise PairError(
                f"{self.slug}: a softmax over one class ({mine.classes[0]}) is always 1, so the class term would be zero; set "
                f"{self.slug},profile=one_stage,class_weight=0"
            )

    # ---------------------------------------------------------------------------------------------------------- learn

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Compute ``dsig_*`` for features, foreground, background, edges, class and box, without terms of weight 0."""
        found = self._dense(student, seen, taught, batch) if self.one_stage else self._regions(student, seen, taught, batch)
        terms = dict(found.terms)
        with full_precision(batch.images.device):
            if self.weights["feature"]:
                maps = [(seen.features.maps[pair.student], taught.features.maps[pair.teacher]) for pair in self.pairs]
                mine, theirs = zip(*maps, strict=True)
                terms["dsig_features"] = self.weights["feature"] * dsig_feature_loss(mine, theirs)
            if self.weights["first_class"] or self.weights["first_box"]:
                terms |= self._first_stage(student, seen, taught, batch)
        return Losses(terms, found.monitors)

    def _regions(self, student: Detector, seen: Observation, taught: Observation, batch: Batch) -> Losses:
        """Compute the terms of a two-stage detector, on the regions that it trains on; of a cascade, on its first stage's."""
        assert isinstance(seen.prediction, Regions)
        mine = seen.prediction.before_refinement()
        reads_head = _reads_head(self.settings)
        theirs = self.teacher.predict_regions(mine, taught.features, batch) if reads_head else None
        with full_precision(batch.images.device):
            labels, positives = label_regions(student, mine, batch)
            used, image = labels != IGNORED, mine.origin.image
            foreground = torch.zeros_like(used)
            foreground[positives.index] = True
            background = used & ~foreground
            nodes = foreground
            if self.mine_threshold == 0:
                nodes = used
            elif self.mine_threshold is not None and theirs is not None:
                nodes = foreground | dsig_mine(theirs.logits, background, self.mine_threshold)
            terms = {}
            if self._has_graph():
                pooled = self._pooled(mine, theirs, seen.features, taught.features, len(batch))
                terms = self._graph(*pooled, image, foreground, background, nodes)
            if self.weights["class"] and theirs is not None:
                loss = dsig_class_loss(mine.logits[used], theirs.logits[used][:, self.columns], self.temperature)
                terms["dsig_class"] = self.weights["class"] * loss
            if self.weights["box"] and theirs is not None:
                columns = torch.tensor(self.columns, device=labels.device)[positives.labels]
                own = of_class(mine.deltas[positives.index], positives.labels)
                loss = dsig_box_loss(own, of_class(theirs.deltas[positives.index], columns), int(used.sum()), self.beta)
                terms["dsig_box"] = self.weights["box"] * loss
            return Losses(terms, {"mined": (nodes & background).sum().float() / len(batch)})

    def _dense(self, student: Detector, seen: Observation, taught: Observation, batch: Batch) -> Losses:
        """Compute the terms of a dense detector: its own predictions are the regions, and all of them are foreground."""
        prediction = seen.prediction
        assert isinstance(prediction, Dense)
        terms: dict[str, Tensor] = {}
        monitors: dict[str, Tensor] = {}
        with full_precision(batch.images.device):
            if self._has_graph():
                boxes = propose_by_class(prediction, batch.sizes, after=self.max_regions).boxes_xyxy
                mine, theirs = (pool_boxes(side.features, boxes, self.size) for side in (seen, taught))
                counts = torch.tensor([len(given) for given in boxes], device=mine.device)
                image = torch.repeat_interleave(torch.arange(len(batch), device=mine.device), counts)
                every = torch.ones_like(image, dtype=torch.bool)
                terms = self._graph(mine, theirs, image, every, ~every, every)
                monitors = {"regions": counts.float().mean()}
            if self.weights["class"] or self.weights["box"]:
                terms |= self._predictions(prediction, taught, student.assign(prediction, batch))
        return Losses(terms, monitors)

    def _has_graph(self) -> bool:
        return any(self.weights[name] for name in ("foreground", "background", "edge"))

    def _pooled(self, mine: Regions, theirs: Regions | None, own: Features, fixed: Features, count: int) -> tuple[Tensor, Tensor]:
        """The pooled regions of both sides: those that the detectors pooled already, else pooled from the pyramids."""
        first, second = mine.pooled, None if theirs is None else theirs.pooled
        if first is not None and second is not None and first.shape == second.shape:
            return first, second
        by_image = [torch.nonzero(mine.origin.image == image).flatten() for image in range(count)]
        boxes, order = [mine.boxes_xyxy[rows] for rows in by_image], torch.cat(by_image).argsort()
        taken = [side.take([i for i, s in enumerate(side.strides) if s <= COARSEST_POOLED] or [0]) for side in (own, fixed)]
        return pool_boxes(taken[0], boxes, self.size)[order], pool_boxes(taken[1], boxes, self.size)[order]

    def _graph(
        self, mine: Tensor, theirs: Tensor, image: Tensor, foreground: Tensor, background: Tensor, nodes: Tensor
    ) -> dict[str, Tensor]:
        """Weighted losses of nodes and edges."""
        terms = {}
        if self.weights["foreground"] or self.weights["background"]:
            found = dsig_node_losses(mine, theirs, image, foreground, background, self.alpha)
            terms = {f"dsig_{name}": self.weights[name] * loss for name, loss in found._asdict().items() if self.weights[name]}
        if self.weights["edge"]:
            terms["dsig_edges"] = self.weights["edge"] * dsig_edge_loss(mine, theirs, image, nodes)
        return terms

    def _predictions(self, mine: Dense, taught: Observation, assignment: Assignment) -> dict[str, Tensor]:
        """Weighted losses of class scores (all anchors that are not ignored) and deltas (positives) of a dense head."""
        theirs = taught.prediction
        assert isinstance(theirs, Dense)
        partners = find_partners(mine, theirs, [(pair.student, pair.teacher) for pair in self.pairs])
        valid = partners.mask & (assignment.matched != IGNORED)
        terms = {}
        if self.weights["class"]:
            logits = partners.take(theirs.logits)[valid][:, self.columns]
            terms["dsig_class"] = self.weights["class"] * dsig_class_loss(mine.logits[valid], logits, self.temperature)
        if self.weights["box"]:
            positive = partners.mask & (assignment.matched >= 0)
            deltas = partners.take(theirs.deltas)[positive]
            loss = dsig_box_loss(mine.deltas[positive], deltas, len(deltas), self.beta)
            terms["dsig_box"] = self.weights["box"] * loss
        return terms

    def _first_stage(self, student: Detector, seen: Observation, taught: Observation, batch: Batch) -> dict[str, Tensor]:
        """Weighted losses of the first stage: objectness as one distribution over an image's anchors, and box deltas."""
        assert isinstance(seen.prediction, Regions)
        assert isinstance(taught.prediction, Regions)
        mine, theirs = seen.prediction.first, taught.prediction.first
        assert mine is not None
        assert theirs is not None
        partners = find_partners(mine, theirs, [(pair.student, pair.teacher) for pair in self.pairs])
        matched = student.assign(mine, batch).matched
        valid, divisor = partners.mask & (matched != IGNORED), FIRST_STAGE_SAMPLES * len(batch)
        terms = {}
        if self.weights["first_class"]:
            # a logit of -1e4 takes an anchor out of both distributions, and its gradient is 0
            logits = [x[..., 0].masked_fill(~valid, -1e4) for x in (mine.logits, partners.take(theirs.logits))]
            loss = kl_divergence(logits[0], logits[1], self.temperature).sum() / divisor
            terms["dsig_first_class"] = self.weights["first_class"] * loss
        if self.weights["first_box"]:
            positive = partners.mask & (matched >= 0)
            loss = dsig_box_loss(mine.deltas[positive], partners.take(theirs.deltas)[positive], divisor, self.beta)
            terms["dsig_first_box"] = self.weights["first_box"] * loss
        return terms


def _weights(settings: dict[str, Any]) -> dict[str, float]:
    """The factor of each term: the given one, or the profile's."""
    profile = WEIGHTS[settings["profile"]]
    given = {name: settings[f"{name}_weight"] for name in profile}
    found = {name: profile[name] if weight is None else weight for name, weight in given.items()}
    first = {name: settings[f"{name}_weight"] for name in ("first_class", "first_box")}
    return found | first


def _reads_head(settings: dict[str, Any]) -> bool:
    """Whether a term of a two-stage student reads the predictions of the teacher's region head."""
    weights = _weights(settings)
    return bool(weights["class"] or weights["box"] or (weights["edge"] and settings["mine_threshold"]))
