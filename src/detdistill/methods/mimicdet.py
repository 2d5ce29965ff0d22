"""MimicDet: a one-stage head learns the features of a region head that is trained beside it on the same pyramid.

Lu, Li, Li, Yan, "MimicDet: Bridging the Gap Between One-Stage and Two-Stage Object Detection", ECCV 2020. No released code was
found: this is a reconstruction from the abstract and a published note.

The paper's detector has heads of its own; it is the model ``mimicdet:BACKBONE`` (``detectors/dense/mimicdet.py``), which trains
alone. This is its idea in a form that teaches an existing dense detector: a region head (T-head) is trained on boxes that the
student predicts, and at the cell that a box came from, the student's towers (S-head) should point in the direction of the region
head's last features, for classes and for boxes. There is no pretrained teacher.

Shape letters: B images, R regions of the whole batch, M of them that are compared, D width of the compared features, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detdistill.detectors.contract import Detector, HasTowers, Teacher
from detdistill.functional.modes import evaluating
from detdistill.functional.precision import full_precision
from detdistill.functional.region_heads import RegionHead, region_loss, staggered_levels
from detdistill.functional.regions import features_at_origin
from detdistill.functional.similarity import cosine_distance
from detdistill.methods.shared.contract import TeacherFree
from detdistill.methods.shared.hyper_parameters import MethodError, check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.methods.shared.region_heads import AnchorLinear, regions_of_dense
from detdistill.structures import WHOLE_TOWER, Batch, Clock, Dense, Features, Look, Losses, Observation, Origin
from detdistill.values import Count, Fraction, Index, Weight


def mimicdet_loss(student: Tensor, teacher: Tensor, weight: float = 1.0, detach_teacher: bool = True) -> Tensor:
    """Mean over boxes of ``1 - cos(student, teacher)``, one of the two terms (classes, boxes) of the mimic loss.

    Args:
        student: [M, D] the one-stage head's features at the cells of the boxes; gradient flows. A row of zeros has the cosine 0
            and no gradient.
        teacher: [M, D] the region head's features of the boxes.
        weight: factor (gamma).
        detach_teacher: treat the teacher's features as constant; False: gradient flows to them, too.

    Returns:
        [] the loss, between 0 and ``2 * weight``; 0, connected to the student, without boxes.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> float(mimicdet_loss(rows, 3 * rows)), float(mimicdet_loss(rows, -rows))
        (0.0, 2.0)
    """
    fixed = teacher.detach() if detach_teacher else teacher
    return weight * cosine_distance(student, fixed)


class MimicDet(TeacherFree[None]):
    """MimicDet for any dense student with towers. The region head and the adapters are parts of the method, never exported.

    Departures from the paper's detector (``detectors/dense/mimicdet.py``): the boxes are the student's predictions instead of
    anchors that a refinement module has moved, and they are suppressed; the compared features are the student's tower vectors
    after a linear layer (for each anchor of a cell), instead of those of a head that samples within the refined box by
    deformable convolutions; the pyramid has no finer level for the region head. With squared errors it would be HEAD's form
    without a teacher.
    """

    slug = "mimicdet"
    title = "MimicDet: Bridging the Gap Between One-Stage and Two-Stage Object Detection (ECCV 2020)"
    bibtex = """@inproceedings{lu2020mimicdet,
  title={{MimicDet}: Bridging the Gap Between One-Stage and Two-Stage Object Detection},
  author={Lu, Xin and Li, Quanquan and Li, Buyu and Yan, Junjie},
  booktitle={European Conference on Computer Vision},
  year={2020}
}"""

    def __init__(
        self,
        teacher: Teacher | None,
        student: Detector,
        *,
        class_weight: Weight = 1.0,
        box_weight: Weight = 1.0,
        region_weight: Weight = 1.0,
        max_mimic: Count = 512,
        regions_per_image: Count = 512,
        positive_fraction: Fraction = 0.25,
        positive_iou: Fraction = 0.6,
        max_proposals: Count = 1000,
        nms: Fraction = 0.7,
        width: Count = 1024,
        staggered: bool = True,
        decouple_anchors: bool = True,
        detach_teacher: bool = True,
        tower_depth: Index | None = None,
    ) -> None:
        """Build the region head and the adapters.

        The defaults are recollections of the paper that were not checked against its text.

        Args:
            teacher: not used (other methods of a composition may use it).
            student: a dense detector with towers.
            class_weight: factor of the class branch's mimic loss (gamma).
            box_weight: factor of the box branch's mimic loss (gamma).
            region_weight: factor of the region head's detection losses, which also train the student's neck and backbone.
            max_mimic: largest number of compared boxes of an image, drawn at random from the region head's (M).
            regions_per_image: boxes of an image on which the region head is trained.
            positive_fraction: largest fraction of positives among them.
            positive_iou: smallest IoU of a positive with its object.
            max_proposals: boxes of an image that are left after non-maximum suppression.
            nms: IoU above which the box of lower score is dropped, within a level; 1: none is.
            width: D, width of the region head's hidden layers.
            staggered: pool a box from the level below the one that it came from, of half the stride, as in the paper; from the
                finest level, if it came from that. False: by its size.
            decouple_anchors: give the adapters a linear layer for each anchor of a cell; the features of one cell must serve
                several boxes. Without effect on heads of one anchor.
            detach_teacher: stop the gradient of the mimic losses at the region head (unknown from the paper).
            tower_depth: number of blocks of the student's towers before the compared maps; None: all.

        Raises:
            MethodError: a hyper-parameter is out of range, or both mimic weights are 0, or ``region_weight`` is.
            PairError: the student's levels differ in their channels.
        """
        super().__init__(teacher, student)
        check_some(self.slug, class_weight=class_weight, box_weight=box_weight)
        if not region_weight:
            raise MethodError(f"{self.slug}: region_weight=0 leaves the region head untrained, and it is the only teacher here")
        spec = student.spec
        if len(set(spec.channels)) > 1:
            raise PairError(
                f"{self.slug}: the levels of the student {spec.name} have {spec.channels} channels, but the region head reads "
                f"all levels; take a student whose neck has equal channels"
            )
        self.weights, self.region_weight = {"class": class_weight, "box": box_weight}, region_weight
        self.max_mimic, self.staggered, self.detach_teacher = max_mimic, staggered, detach_teacher
        self.depth = WHOLE_TOWER if tower_depth is None else tower_depth
        chosen = {"count": regions_per_image, "positive_fraction": positive_fraction, "iou": positive_iou}
        self.sampling: dict[str, Any] = {**chosen, "after": max_proposals, "nms": nms}
        self.region_head = RegionHead(spec.channels[0], len(spec.classes), width, branches=2)
        channels = self._tower_channels(student)
        self.anchors = max(spec.anchors) if decouple_anchors else 1
        self.class_adapter = AnchorLinear(channels, width, self.anchors) if class_weight else None
        self.box_adapter = AnchorLinear(channels, width, self.anchors) if box_weight else None

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """A dense student with towers; no teacher."""
        depth = WHOLE_TOWER if settings["tower_depth"] is None else settings["tower_depth"]
        return Needs(teacher=None, student=Look(towers=(depth,)), student_families=("dense",))

    @torch.no_grad()
    def _tower_channels(self, student: Detector) -> int:
        """Channels of the student's towers, found by a run on zeros."""
        assert isinstance(student, HasTowers)
        device = next(student.parameters()).device
        maps = tuple(torch.zeros(1, width, 2, 2, device=device) for width in student.spec.channels)
        with evaluating(student):
            tower = student.tower(Features(maps, student.spec.strides), None if self.depth == WHOLE_TOWER else self.depth)
        return tower.classification[0].shape[1]

    # ---------------------------------------------------------------------------------------------------------- learn

    def learn(self, student: Detector, seen: Observation, taught: None, batch: Batch, clock: Clock) -> Losses:
        """Compute ``mimicdet_regions`` (the region head's losses), ``mimicdet_class`` and ``mimicdet_box`` (not if weight 0).

        The monitor ``mimicked`` is the mean number of compared boxes of an image.
        """
        assert isinstance(seen.prediction, Dense)
        regions = regions_of_dense(seen.prediction, batch, **self.sampling)
        origin = Origin.cat(regions.origins)
        boxes, count = torch.cat(regions.boxes_xyxy), len(seen.features.maps)
        levels = staggered_levels(boxes, origin, count) if self.staggered else None
        output = self.region_head.predict(seen.features, regions.boxes_xyxy, levels)
        with full_precision(batch.images.device):
            terms = {"mimicdet_regions": self.region_weight * region_loss(output, regions, batch)}
            chosen = self._chosen(origin, len(batch))
            where, tower = origin[chosen], seen.tower(self.depth)
            anchor = where.anchor if self.anchors > 1 else torch.zeros_like(where.anchor)
            branches = (
                ("class", self.class_adapter, tower.classification, output.class_hidden),
                ("box", self.box_adapter, tower.regression, output.box_hidden),
            )
            for name, adapter, maps, theirs in branches:
                if adapter is not None:
                    mine = adapter(features_at_origin(maps, where), anchor)
                    loss = mimicdet_loss(mine, theirs[chosen], self.weights[name], self.detach_teacher)
                    terms[f"mimicdet_{name}"] = loss
            return Losses(terms, {"mimicked": terms["mimicdet_regions"].new_tensor(len(chosen) / len(batch))})

    def _chosen(self, origin: Origin, images: int) -> Tensor:
        """Rows of the compared boxes: those with an origin cell, at most ``max_mimic`` of each image."""
        found = []
        for image in range(images):
            mine = torch.nonzero((origin.image == image) & (origin.level >= 0)).flatten()
            if len(mine) > self.max_mimic:
                mine = mine[torch.randperm(len(mine))[: self.max_mimic].sort().values.to(mine.device)]
            found.append(mine)
        return torch.cat(found)
