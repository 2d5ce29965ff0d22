"""DRKD: imitate the relations between the cells of a map, the relations between the objects of an image, and the objects.

Ni, Yang, Wen, Zhang, "Dual Relation Knowledge Distillation for Object Detection", IJCAI 2023, arXiv 2302.05637, in the form of
the authors' code: the losses are Euclidean norms (not squared, not averaged) of differences of features that were enhanced by
relations. The paper writes squared differences, and compares matrices of relations between objects.

Shape letters: B images, C channels of the teacher, H x W cells of one level, R objects of the batch, n objects of one image,
S side of a pooled region, D = C * S * S numbers of a region.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.contract import Detector, Teacher
from detdistill.functional.precision import full_precision
from detdistill.functional.regions import pool_boxes_on_all_levels
from detdistill.functional.relations import GloReBlock
from detdistill.methods.shared.align import LevelAdapters, LevelPair, PairedMaps, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import MethodError, check_some
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Batch, Clock, Features, Losses, Observation
from detdistill.values import Count, Weight

RelationFilter = Literal["none", "random"]


def drkd_pixel_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], weight: float = 1e-3) -> Tensor:
    """Relations between cells: the Euclidean norm of the difference of each level, over the whole batch, summed over levels.

    Args:
        student: L maps [B, C, H, W], outputs of the student's ``GloReBlock`` after the adapter; gradient flows.
        teacher: L maps of the same shapes, outputs of the teacher's ``GloReBlock``; gradient flows to the block, too.
        weight: factor of every level.

    Returns:
        [] the loss; a batch of twice the size multiplies it by about sqrt(2).

    Example:
        >>> drkd_pixel_loss([torch.ones(1, 4, 2, 2)], [torch.zeros(1, 4, 2, 2)], weight=0.5)
        tensor(2.)
    """
    return weight * torch.stack([_norm(mine - theirs) for mine, theirs in zip(student, teacher, strict=True)]).sum()


def drkd_instance_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], counts: Sequence[int], weight: float = 4e-3
) -> Tensor:
    """Objects or their relations: the Euclidean norm of the difference of each image and level, summed over both.

    Args:
        student: L tensors [R, C, S, S] of regions, image by image; gradient flows.
        teacher: L tensors of the same shapes; gradient flows, so detach what should be constant.
        counts: B numbers of objects; an image without objects adds nothing.
        weight: factor of every image and level.

    Returns:
        [] the loss.

    Example:
        >>> drkd_instance_loss([torch.ones(2, 4, 1, 1)], [torch.zeros(2, 4, 1, 1)], [1, 0, 1], weight=0.5)
        tensor(2.)
    """
    norms = [_norm(image) for mine, theirs in zip(student, teacher, strict=True) for image in (mine - theirs).split(list(counts))]
    return weight * torch.stack(norms).sum()


def _norm(difference: Tensor) -> Tensor:
    """Euclidean norm, []. Its gradient at zero is zero, where that of a plain square root is NaN."""
    norm: Tensor = torch.linalg.vector_norm(difference)
    return norm


def drkd_regions(
    features: Features,
    boxes_xyxy: Sequence[Tensor],
    size: int = 3,
    *,
    scale_by_width: bool = False,
    from_first_image: bool = False,
) -> tuple[Tensor, ...]:
    """Pool the features of every object from every level (first form of RoIAlign, not aligned to cell centres).

    Args:
        features: L maps [B, C_l, H_l, W_l]; gradient flows.
        boxes_xyxy: B tensors [n, 4] in pixels.
        size: S.
        scale_by_width: level l has ``W_l / (W_0 * stride of level 0)`` cells per pixel, as in the released code. This differs
            from 1 / stride where a stride does not divide the size of the padded image.
        from_first_image: pool the boxes of all images from the first image, as the released code does by mistake.

    Returns:
        L tensors [R, C_l, S, S], image by image.
    """
    boxes, scales = list(boxes_xyxy), None
    if scale_by_width:
        widths = [level.shape[-1] for level in features.maps]
        scales = [width / (widths[0] * features.strides[0]) for width in widths]
    if from_first_image:
        boxes = [torch.cat(boxes), *(own[:0] for own in boxes[1:])]
    return pool_boxes_on_all_levels(features, boxes, size, aligned=False, scales=scales)


class DrawnFilter(NamedTuple):
    """The random layer of a relation filter for an image with n objects."""

    weight: Tensor
    """[n, D]."""
    bias: Tensor
    """[n]."""


def drawn_filter(count: int, like: Tensor, generator: torch.Generator | None = None) -> DrawnFilter:
    """Draw the layer of a relation filter as ``nn.Linear`` initialises it.

    Args:
        count: n.
        like: [R, D] rows of the objects.
        generator: random generator of the CPU; None: torch's global one.
    """
    bound = like.shape[1] ** -0.5
    drawn = (2 * torch.rand(count, like.shape[1] + 1, generator=generator) - 1).to(like) * bound
    return DrawnFilter(drawn[:, :-1], drawn[:, -1])


class RelationBlock(nn.Module):
    """Enhance each object by the other objects of its image: ``rows + W(attention g(rows))``.

    The attention is ``softmax(f)`` with ``f = theta(rows) phi(rows)^T``, not divided by the root of the width. With a filter it
    is ``softmax(f * softmax(layer(rows)))``, element by element.
    """

    def __init__(self, width: int) -> None:
        """Make the layers with PyTorch's initialisation.

        Args:
            width: D; the inner width is half of it.
        """
        super().__init__()
        inner = max(1, width // 2)
        self.theta, self.phi, self.g = (nn.Linear(width, inner) for _ in range(3))
        self.out = nn.Linear(inner, width)

    def forward(self, regions: Tensor, counts: Sequence[int], filters: Sequence[DrawnFilter] | None = None) -> Tensor:
        """Enhance the regions.

        Args:
            regions: [R, C, S, S], image by image.
            counts: B numbers of objects.
            filters: the layer of the filter of each image with objects and of each without; None: no filter.

        Returns:
            [R, C, S, S].
        """
        rows = regions.flatten(1)
        parts = [part.split(list(counts)) for part in (rows, self.theta(rows), self.phi(rows), self.g(rows))]
        mixed = []
        for image, (own, theta, phi, values) in enumerate(zip(*parts, strict=True)):
            related = theta @ phi.mT
            if filters is not None:
                related = related * F.linear(own, *filters[image]).softmax(dim=-1)
            mixed.append(related.softmax(dim=-1) @ values)
        enhanced: Tensor = self.out(torch.cat(mixed)) + rows
        return enhanced.view_as(regions)


_PROFILES = {"two_stage": (1e-3, 4e-3, 2.4e-3), "one_stage": (4e-3, 5e-3, 6e-3)}


class DRKD(Method[Observation]):
    """DRKD between the necks' maps; levels are paired by stride. Heads may differ; crowd boxes are no objects.

    The norms are over the whole local batch or image, so the published weights are for 2 images per device, and the gradient
    does not fade as the student improves. The blocks on the teacher's side are trained, too. The losses could therefore fall
    because these blocks shrink their outputs; the monitors ``teacher_pixels`` and ``teacher_relations`` show the outputs' size.

    Differences from the released code: regions are pooled from their own image (``roi_from_first_image``); the filter of the
    relations is off (``relation_filter``); images without boxes have no instance losses, where the code fails; regions are
    scaled by the levels' strides, not by the ratio of the maps' widths.
    """

    slug = "drkd"
    title = "Dual Relation Knowledge Distillation for Object Detection (IJCAI 2023)"
    bibtex = """@inproceedings{ni2023drkd,
  title={Dual Relation Knowledge Distillation for Object Detection},
  author={Ni, Zhen-Liang and Yang, Fukui and Wen, Shengzhao and Zhang, Gang},
  booktitle={Proceedings of the International Joint Conference on Artificial Intelligence},
  pages={1276--1284},
  year={2023}
}"""

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        profile: Literal["two_stage", "one_stage"] = "two_stage",
        pixel_weight: Weight | None = None,
        relation_weight: Weight | None = None,
        instance_weight: Weight | None = None,
        nodes: Sequence[Count] = (64, 64, 256, 256, 256),
        roi_size: Count = 3,
        relation_filter: RelationFilter = "none",
        roi_from_first_image: bool = False,
        levels: Sequence[int] | None = None,
        instance_levels: Sequence[int] | None = None,
    ) -> None:
        """Pair the levels; channels that differ get a 1x1 convolution on the student first (not in the paper).

        Args:
            teacher: any detector.
            student: any detector.
            profile: which released weights to use: those for two-stage or for one-stage students.
            pixel_weight: factor of the relations between cells; None: the profile's.
            relation_weight: factor of the relations between objects; None: the profile's.
            instance_weight: factor of the objects' features; None: the profile's.
            nodes: nodes of the graphs that relate the cells, one number for each student level, finest first; the last value
                holds for all further levels.
            roi_size: side of a pooled region in bins.
            relation_filter: weights on the relations between objects. ``none``, as in the code for one-stage students;
                ``random``: as in the code for two-stage students, which draws new random weights in each step and never trains
                them (the paper describes learned weights).
            roi_from_first_image: pool all regions of a batch from its first image, as the released code does by mistake.
            levels: indices of the student levels to use; None: all that have a partner.
            instance_levels: indices of the student levels from which objects are pooled; None: the finest two of ``levels``.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            PairError: no common level, or an instance level is not among the compared levels.
        """
        super().__init__(teacher, student)
        given = zip((pixel_weight, relation_weight, instance_weight), _PROFILES[profile], strict=True)
        self.pixel_weight, self.relation_weight, self.instance_weight = (other if mine is None else mine for mine, other in given)
        check_some(
            self.slug,
            pixel_weight=self.pixel_weight,
            relation_weight=self.relation_weight,
            instance_weight=self.instance_weight,
        )
        if not nodes:
            raise MethodError(f"{self.slug}: nodes is empty; give at least one number, which then serves all levels")
        self.roi_size, self.relation_filter, self.roi_from_first_image = roi_size, relation_filter, roi_from_first_image
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        self.strides = tuple(teacher.spec.strides[pair.teacher] for pair in self.pairs)
        self.objects = self._places(student, instance_levels)
        self.adapters = LevelAdapters(self.pairs)
        self.paired_maps = PairedMaps(self.pairs, self.adapters, resize=True)
        self._make_blocks(nodes)

    def _places(self, student: Detector, levels: Sequence[int] | None) -> list[int]:
        """Places of the instance levels among the pairs."""
        if levels is None:
            return list(range(min(2, len(self.pairs))))
        compared = [pair.student for pair in self.pairs]
        chosen = [level + len(student.spec.strides) if level < 0 else level for level in levels]
        if missing := [level for level in chosen if level not in compared]:
            raise PairError(
                f"{self.slug}: instance_levels={list(levels)}: student level {missing[0]} is not compared; "
                f"compared are {compared}"
            )
        return [compared.index(level) for level in chosen]

    def _make_blocks(self, nodes: Sequence[int]) -> None:
        def convolutions(pairs: Sequence[LevelPair]) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(pair.teacher_channels, pair.teacher_channels, 1) for pair in pairs)

        def graphs(pairs: Sequence[LevelPair]) -> nn.ModuleList:
            counts = [nodes[min(pair.student, len(nodes) - 1)] for pair in pairs]
            return nn.ModuleList(GloReBlock(pair.teacher_channels, count) for pair, count in zip(pairs, counts, strict=True))

        def relations(pairs: Sequence[LevelPair]) -> nn.ModuleList:
            return nn.ModuleList(RelationBlock(pair.teacher_channels * self.roi_size**2) for pair in pairs)

        pixels = self.pairs if self.pixel_weight else ()
        objects = [self.pairs[place] for place in self.objects]
        related = objects if self.relation_weight else ()
        self.student_pixels, self.teacher_pixels, self.adapt_pixels = graphs(pixels), graphs(pixels), convolutions(pixels)
        self.student_relations, self.teacher_relations = relations(related), relations(related)
        self.adapt_relations = convolutions(related)
        self.adapt_instances = convolutions(objects if self.instance_weight else ())

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Terms ``drkd_pixel``, ``drkd_relation`` and ``drkd_instance``, without those of weight 0."""
        terms: dict[str, Tensor] = {}
        monitors: dict[str, Tensor] = {}
        with full_precision(batch.images.device):
            mine, theirs = self.paired_maps(seen.features, taught.features)
            theirs = [level.detach() for level in theirs]
            if self.pixel_weight:
                related = _each(self.adapt_pixels, _each(self.student_pixels, mine))
                fixed = _each(self.teacher_pixels, theirs)
                terms["drkd_pixel"] = drkd_pixel_loss(related, fixed, self.pixel_weight)
                monitors["teacher_pixels"] = _size(fixed)
            if self.relation_weight or self.instance_weight:
                boxes = [target.without_crowd().boxes_xyxy for target in batch.targets]
                counts = [len(own) for own in boxes]
                my_regions, their_regions = (self._regions(maps, boxes) for maps in (mine, theirs))
            if self.relation_weight:
                related = _each(self.adapt_relations, self._related(self.student_relations, my_regions, counts))
                fixed = self._related(self.teacher_relations, their_regions, counts)
                terms["drkd_relation"] = drkd_instance_loss(related, fixed, counts, self.relation_weight)
                monitors["teacher_relations"] = _size(fixed)
            if self.instance_weight:
                adapted = _each(self.adapt_instances, my_regions)
                terms["drkd_instance"] = drkd_instance_loss(adapted, their_regions, counts, self.instance_weight)
        return Losses(terms, monitors)

    def _regions(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Regions of all objects on the instance levels."""
        features = Features(tuple(maps), self.strides).take(self.objects)
        return drkd_regions(features, boxes, self.roi_size, from_first_image=self.roi_from_first_image)

    def _related(self, blocks: nn.ModuleList, regions: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        enhanced = []
        for block, own in zip(blocks, regions, strict=True):
            filters = None
            if self.relation_filter == "random":
                filters = [drawn_filter(count, own.flatten(1)) for count in counts]
            enhanced.append(block(own, counts, filters))
        return enhanced


def _each(modules: nn.ModuleList, values: Sequence[Tensor]) -> list[Tensor]:
    return [module(value) for module, value in zip(modules, values, strict=True)]


@torch.no_grad()
def _size(outputs: Sequence[Tensor]) -> Tensor:
    """Root mean square of all levels' numbers; 0 if there are none."""
    total = torch.stack([output.square().sum() for output in outputs]).sum()
    return (total / max(1, sum(output.numel() for output in outputs))).sqrt()
