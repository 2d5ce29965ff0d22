"""Matched: the queries of teacher and student that are matched to the same object should predict the same.

A method of this library, not of a paper. Each DETR matches its own queries to the objects (Carion et al., "End-to-End Object
Detection with Transformers", ECCV 2020, section 3.1). The objects then pair the queries of both sides, so families, depths,
numbers of queries and image sizes may differ, and no queries have to be matched to each other. Weights are those of DETR's
losses; that of box sides is the weight of D-FINE's localization loss (Peng et al., "D-FINE", ICLR 2025, Eq. 4).

Shape letters: B images, L decoder layers, N queries, G objects of an image, M pairs of queries of all layers, K classes, S and T
steps of a distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from detdistill.detectors.contract import PREDICTION, Detector, HasBoxDistributions, Teacher
from detdistill.errors import name_list
from detdistill.functional.boxes import giou_loss, paired_iou
from detdistill.functional.counting import mean_over_ranks
from detdistill.functional.distributions import project_distribution, step_positions
from detdistill.functional.precision import full_precision
from detdistill.functional.soft_targets import soft_binary_cross_entropy
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.structures import SHARED, Batch, BoxDistributions, Clock, Losses, Observation, PerImage, Queries, Taught
from detdistill.values import Fraction, Weight

LEAST_UNIT = 1e-6
"""Smallest step of a box side, in parts of the image, on which the teacher's steps are placed."""


class MatchedPairs(NamedTuple):
    """M queries of the student and the objects to which they, and queries of the teacher, are matched."""

    layer: Tensor
    """[M] decoder layer of the student's query."""
    image: Tensor
    """[M]."""
    query: Tensor
    """[M] index of the student's query."""
    object: Tensor
    """[M] index of the object within its image."""

    def of_layer(self, layer: int) -> MatchedPairs:
        """The pairs of one decoder layer."""
        here = self.layer == layer
        return MatchedPairs(*(index[here] for index in self))


def matched_pairs(matched: Tensor, known: Tensor) -> MatchedPairs:
    """List the pairs: the student's queries whose object has a query of the teacher.

    Args:
        matched: [L, B, N] index of each query's object in the student's own assignment, negative for none.
        known: [B, G] bool, True for objects with a query of the teacher.

    Example:
        >>> pairs = matched_pairs(torch.tensor([[[1, -1, 0]]]), torch.tensor([[False, True]]))
        >>> pairs.query.tolist(), pairs.object.tolist()
        ([0], [1])
    """
    layer, image, query = torch.nonzero(matched >= 0, as_tuple=True)
    pairs = MatchedPairs(layer, image, query, matched[layer, image, query])
    there = known[pairs.image, pairs.object]
    return MatchedPairs(*(index[there] for index in pairs))


def matched_log_odds(logits: Tensor, softmax: bool = False) -> Tensor:
    """Log-odds of each class, ``log p / (1 - p)`` with the class's probability p: [..., K].

    So the scores of softmax classes with a background can be compared with those of sigmoid classes.

    Args:
        logits: [..., K] sigmoid logits, which are log-odds already; with ``softmax`` [..., K+1], the background last.
        softmax: the kind of the logits.

    Example:
        >>> matched_log_odds(torch.tensor([[2.0, 1.0]]), softmax=True).tolist()
        [[1.0]]
    """
    if not softmax:
        return logits
    outputs = logits.shape[-1]
    same = torch.eye(outputs, dtype=torch.bool, device=logits.device)[: outputs - 1]
    others = logits[..., None, :].masked_fill(same, -torch.inf).logsumexp(dim=-1)
    return logits[..., :-1] - others


class MatchedTerms(NamedTuple):
    """Unweighted losses of M pairs, [M] each."""

    cls: Tensor
    """Binary cross-entropy with the teacher's probabilities, summed over classes; at equality the teacher's entropy remains."""
    l1: Tensor
    """Sum of the absolute differences of cxcywh, as fractions of the image."""
    giou: Tensor
    """1 - generalised IoU, in pixels."""


def matched_terms(
    log_odds: Tensor, boxes_cxcywh01: Tensor, probabilities: Tensor, targets_cxcywh01: Tensor, sizes_hw: Tensor
) -> MatchedTerms:
    """Losses of class scores and boxes of M pairs, not reduced; the gradient of each is zero where both sides are equal.

    Args:
        log_odds: [M, K] of the student (``matched_log_odds``); gradient flows.
        boxes_cxcywh01: [M, 4] of the student; gradient flows.
        probabilities: [M, K] of the teacher, treated as constant.
        targets_cxcywh01: [M, 4] boxes of the teacher, treated as constant.
        sizes_hw: [M, 2] height and width of each pair's image in pixels.

    Example:
        >>> boxes, even = torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.zeros(1, 1)
        >>> terms = matched_terms(even, boxes, even + 0.5, boxes, torch.tensor([[64, 64]]))
        >>> [round(float(term), 4) for term in terms]
        [0.6931, 0.0, 0.0]
    """
    fixed = targets_cxcywh01.detach()
    scale = sizes_hw.flip(-1).repeat(1, 2).to(boxes_cxcywh01)
    mine, theirs = (box_convert(boxes, "cxcywh", "xyxy") * scale for boxes in (boxes_cxcywh01, fixed))
    return MatchedTerms(
        soft_binary_cross_entropy(log_odds, probabilities).sum(dim=-1),
        (boxes_cxcywh01 - fixed).abs().sum(dim=-1),
        giou_loss(mine, theirs),
    )


def matched_sides_loss(logits: Tensor, probabilities: Tensor, positions: Tensor, steps: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the distributions of box sides, summed over the four sides: [M], not reduced.

    Each of the teacher's masses goes to the two steps of the student around its position, in proportion to nearness
    (``project_distribution``); at equal steps the distribution is compared as it is.

    Args:
        logits: [M, 4, T] of the student; gradient flows.
        probabilities: [M, 4, S] of the teacher, treated as constant; scaled to a sum of 1.
        positions: [M, 4, S] position of each of the teacher's steps on the student's scale (``step_positions``).
        steps: [T] the student's steps, ascending.

    Example:
        >>> even = torch.full((1, 4, 2), 0.5)
        >>> matched_sides_loss(torch.zeros(1, 4, 2), even, torch.tensor([0.0, 1.0]).expand(1, 4, 2), torch.arange(2.0)).tolist()
        [0.0]
    """
    fixed = probabilities.detach()
    fixed = fixed / fixed.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(fixed.dtype).tiny)
    wanted = project_distribution(fixed, positions.detach(), steps)
    return F.kl_div(logits.log_softmax(dim=-1), wanted, reduction="none").sum(dim=(-2, -1))


@dataclass(frozen=True)
class MatchedSides(PerImage):
    """Distributions of the box sides of the teacher's queries, by object; lengths are parts of the valid image."""

    probabilities: Tensor
    """[B, G, 4, S] of left, top, right and bottom."""
    reference_origins: Tensor
    """[B, G, 4] x or y of each side at step 0."""
    reference_units: Tensor
    """[B, G, 4] length of a step; negative for left and top."""
    reference_steps: Tensor = field(metadata=SHARED)
    """[S]."""

    def first(self, count: int) -> MatchedSides:
        """The distributions of the first ``count`` objects."""
        probabilities, origins, units = self.probabilities, self.reference_origins, self.reference_units
        return MatchedSides(probabilities[:, :count], origins[:, :count], units[:, :count], self.reference_steps)


@dataclass(frozen=True)
class MatchedTaught(Taught):
    """The teacher's prediction for each object: that of the query of the last decoder layer that it matches to the object."""

    probabilities: Tensor
    """[B, G, K] of the teacher's classes; 0 for objects without a query."""
    boxes_cxcywh01: Tensor
    """[B, G, 4] boxes as fractions of the valid image; 0 for objects without a query."""
    known: Tensor
    """[B, G] bool, False for objects without a query: crowds, and classes that the teacher does not know."""
    sides: MatchedSides | None = None
    """None: the teacher predicts each side as one number."""

    def split(self, count: int) -> list[Self]:
        """Split into one structure for each image, without the objects after the last one that has a query."""
        return [piece._first(_last(piece.known)) for piece in super().split(count)]

    def _first(self, count: int) -> Self:
        """The first ``count`` objects."""
        sides = None if self.sides is None else self.sides.first(count)
        cut = {name: getattr(self, name)[:, :count] for name in ("probabilities", "boxes_cxcywh01", "known")}
        return replace(self, **cut, sides=sides)


def _last(known: Tensor) -> int:
    """Number of objects up to the last one with a query, of ``known`` [B, G]."""
    places = torch.nonzero(known.any(dim=0))
    return int(places.max()) + 1 if len(places) else 0


class Matched(Method[MatchedTaught]):
    """Query distillation by ground truth between any two DETRs.

    Classes are matched by name. Objects of classes that the teacher does not know are left out, and their scores are not
    compared. Distributions of box sides are compared where both sides predict them (D-FINE, DEIMv2), in the last decoder layer.
    """

    slug = "matched"
    title = "Query distillation by ground truth (of this library; after DETR, ECCV 2020, and D-FINE, ICLR 2025)"
    published = False
    bibtex = """@inproceedings{carion2020detr,
  title={End-to-End Object Detection with Transformers},
  author={Carion, Nicolas and Massa, Francisco and Synnaeve, Gabriel and Usunier, Nicolas and Kirillov, Alexander
    and Zagoruyko, Sergey},
  booktitle={European Conference on Computer Vision},
  year={2020}
}
@inproceedings{peng2025dfine,
  title={D-FINE: Redefine Regression Task of DETRs as Fine-grained Distribution Refinement},
  author={Peng, Yansong and Li, Hebei and Wu, Peixi and Zhang, Yueyi and Sun, Xiaoyan and Wu, Feng},
  booktitle={International Conference on Learning Representations},
  year={2025}
}"""
    teach_settings = ()
    teaches_parts = True

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        cls_weight: Weight = 1.0,
        l1_weight: Weight = 5.0,
        giou_weight: Weight = 2.0,
        sides_weight: Weight = 0.15,
        layers: Literal["all", "last"] = "all",
        min_iou: Fraction = 0.0,
    ) -> None:
        """Match the classes by name.

        Args:
            teacher: a DETR.
            student: a DETR.
            cls_weight: factor of the binary cross-entropy with the teacher's class probabilities, summed over classes.
            l1_weight: factor of the L1 distance of boxes as fractions of the image.
            giou_weight: factor of 1 - GIoU.
            sides_weight: factor of the divergence of box sides, summed over the four sides; without effect unless both sides
                predict distributions.
            layers: the student's decoder layers that follow the teacher's last one; the terms of all of them are summed.
            min_iou: smallest IoU of the teacher's box with the object; objects that the teacher places worse are left out.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            PairError: a side that predicts no queries, or a teacher that knows none of the student's classes.
        """
        super().__init__(teacher, student)
        check_some(self.slug, cls_weight=cls_weight, l1_weight=l1_weight, giou_weight=giou_weight, sides_weight=sides_weight)
        self.weights = {"cls": cls_weight, "l1": l1_weight, "giou": giou_weight}
        self.sides_weight, self.layers, self.min_iou = sides_weight, layers, min_iou
        mine, theirs = student.spec.classes, teacher.spec.classes
        self.labels = [theirs.index(name) if name in theirs else -1 for name in mine]
        """The teacher's label of each of the student's classes; -1: unknown to it."""
        self.shared = [label for label, other in enumerate(self.labels) if other >= 0]
        if not self.shared:
            raise PairError(
                f"{self.slug}: the teacher {teacher.spec.name} knows none of the student's classes ({name_list(mine)}); its "
                f"classes: {name_list(theirs)}"
            )
        self.compares_sides = bool(sides_weight and student.spec.box_bins and teacher.spec.box_bins)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Two detectors that predict queries."""
        families = ("queries",)
        return Needs(teacher=PREDICTION, teacher_families=families, student_families=families, assignment=True)

    # ---------------------------------------------------------------------------------------------------------- teach

    @torch.no_grad()
    def teach(self, batch: Batch) -> MatchedTaught:
        """Gather the teacher's prediction for each object that it knows."""
        found = self.teacher.observe(batch, PREDICTION).prediction
        assert isinstance(found, Queries)
        with full_precision(batch.images.device):
            found = found.last_layer().float()
            columns = [max(label, 0) for label in self.labels]  # objects of unknown classes are not matched
            matched = self.teacher.assign(found, self._known_objects(batch), columns).matched[-1]  # [B, N]
            image, query = torch.nonzero(matched >= 0, as_tuple=True)
            known = torch.zeros(len(batch), _most(batch), dtype=torch.bool, device=matched.device)
            known[image, matched[image, query]] = True

            def laid(rows: Tensor) -> Tensor:
                """[B, G, ...] by object, of rows [B, N, ...] by query."""
                whole = rows.new_zeros(*known.shape, *rows.shape[2:])
                whole[image, matched[image, query]] = rows[image, query]
                return whole

            logits = found.logits[-1]
            probabilities = logits.softmax(dim=-1)[..., :-1] if found.softmax else logits.sigmoid()
            sides = self._sides(found, batch, laid)
            return MatchedTaught(laid(probabilities), laid(found.boxes_cxcywh01[-1]), known, sides)

    def _known_objects(self, batch: Batch) -> Batch:
        """The batch with objects of classes that the teacher does not know marked as crowds, which are never matched."""
        unknown = torch.tensor([label < 0 for label in self.labels], device=batch.images.device)
        targets = [replace(one, crowd=one.crowd | unknown[one.labels]) for one in batch.targets]
        return batch.with_targets(targets)

    def _sides(self, found: Queries, batch: Batch, laid: Any) -> MatchedSides | None:
        detector = self.teacher.detector
        if not (detector.spec.box_bins and isinstance(detector, HasBoxDistributions)):
            return None
        sides = _in_parts(detector.distributions(found, batch), batch)
        probabilities = sides.logits.softmax(dim=-1)
        return MatchedSides(laid(probabilities), laid(sides.origins), laid(sides.units), sides.steps)

    # ---------------------------------------------------------------------------------------------------------- learn

    def learn(self, student: Detector, seen: Observation, taught: MatchedTaught, batch: Batch, clock: Clock) -> Losses:
        """Compute ``matched_cls``, ``matched_l1``, ``matched_giou`` and ``matched_sides``, without those of weight 0.

        Each is a sum over pairs and layers, divided by the number of covered objects (mean over processes, their sum at least
        1). The monitors are the numbers of objects (no crowds) in the batch, and of those that are covered: that have a query
        of the teacher, and one of the student's last layer.
        """
        mine = seen.prediction
        assert isinstance(mine, Queries)
        with full_precision(batch.images.device):
            with torch.no_grad():
                assignment = seen.assignment or student.assign(mine, batch)
                pairs = matched_pairs(assignment.matched, self._usable(taught, batch))
                last = pairs.of_layer(len(mine.logits) - 1)
                covered = torch.as_tensor(float(len(last.query)), device=batch.images.device)
                divisor = mean_over_ranks(covered, least=1)
            losses = self._terms(mine, taught, pairs if self.layers == "all" else last, batch)
            terms = {f"matched_{name}": self.weights[name] * rows.sum() / divisor for name, rows in losses if self.weights[name]}
            if self.compares_sides:
                assert isinstance(student, HasBoxDistributions)
                found = _in_parts(student.distributions(mine, batch), batch)
                rows = self._side_rows(found, taught, last)
                terms["matched_sides"] = self.sides_weight * rows.sum() / divisor
            objects = torch.cat([~target.crowd for target in batch.targets]).sum().to(covered)
        return Losses(terms, {"objects": objects, "covered": covered})

    def _usable(self, taught: MatchedTaught, batch: Batch) -> Tensor:
        """[B, G] bool, True for objects with a query of the teacher whose box has an IoU of ``min_iou`` or more."""
        usable = torch.zeros(len(batch), _most(batch), dtype=torch.bool, device=taught.known.device)
        usable[:, : taught.known.shape[1]] = taught.known[:, : usable.shape[1]]
        if self.min_iou:
            for image, (target, size) in enumerate(zip(batch.targets, batch.sizes, strict=True)):
                boxes = box_convert(taught.boxes_cxcywh01[image], "cxcywh", "xyxy")
                boxes = boxes * size.flip(-1).repeat(2).to(boxes)
                truth = target.boxes_xyxy[: len(boxes)].to(boxes)
                usable[image, : len(truth)] &= paired_iou(boxes[: len(truth)], truth) >= self.min_iou
        return usable

    def _terms(self, mine: Queries, taught: MatchedTaught, pairs: MatchedPairs, batch: Batch) -> Sequence[tuple[str, Tensor]]:
        """Names and values [M] of the terms on class scores and boxes."""
        where, there = (pairs.layer, pairs.image, pairs.query), (pairs.image, pairs.object)
        columns = [label for label in self.labels if label >= 0]
        found = matched_terms(
            matched_log_odds(mine.logits[where], mine.softmax)[:, self.shared],
            mine.boxes_cxcywh01[where],
            taught.probabilities[there][:, columns],
            taught.boxes_cxcywh01[there],
            batch.sizes[pairs.image],
        )
        return list(found._asdict().items())

    def _side_rows(self, mine: BoxDistributions, taught: MatchedTaught, pairs: MatchedPairs) -> Tensor:
        """[M] divergence of box sides of the student's last layer."""
        theirs = taught.sides
        assert theirs is not None
        where, there = (pairs.image, pairs.query), (pairs.image, pairs.object)
        steps = theirs.reference_steps.to(theirs.probabilities)
        positions = step_positions(
            steps,
            theirs.reference_origins[there],
            theirs.reference_units[there],
            mine.origins[where],
            mine.units[where],
            LEAST_UNIT,
        )
        return matched_sides_loss(mine.logits[where], theirs.probabilities[there], positions, mine.steps)


def _most(batch: Batch) -> int:
    """The largest number of boxes of an image, crowds counted."""
    return max((len(target) for target in batch.targets), default=0)


def _in_parts(sides: BoxDistributions, batch: Batch) -> BoxDistributions:
    """Distributions whose lengths are parts of each valid image instead of pixels."""
    size = batch.sizes.flip(-1).repeat(1, 2).to(sides.origins)[:, None]
    return replace(sides, origins=sides.origins / size, units=sides.units / size)
