"""SSD-Det: noisy boxes are refined in every training step, and the refined boxes train the detector.

Wu, Chen, Yu, Li, Han, Jiao, "Spatial Self-Distillation for Object Detection with Inaccurate Bounding Boxes", ICCV 2023, arXiv
2307.12101. The defaults and details are those of the released code (branch SSD-Det).

Around every box lies a bag of boxes. Heads on the detector's own features move them towards the object (spatial position),
score them (multiple instance learning, two stages), and estimate their overlap with the object (spatial identity). The best of a
bag are merged into the refined box.

Shape letters: n objects of the batch, P boxes of a bag, K classes, L levels, D width of the refiner, B images, G boxes of an
image.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detdistill.detectors.contract import Detector, DetectorSpec, Teacher
from detdistill.functional.boxes import paired_iou
from detdistill.functional.counting import share_over_ranks
from detdistill.functional.precision import full_precision
from detdistill.methods.shared.contract import TeacherFree
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.methods.ssd_det.loss import RATIOS, ssd_det_random_boxes
from detdistill.methods.ssd_det.parts import Refiner, Weights
from detdistill.structures import Batch, Clock, Features, Losses, Observation
from detdistill.values import Count, Fraction, Index, Positive, Weight


class SSDDet(TeacherFree[None]):
    """SSD-Det for any student with predictions and levels of equal channels, on data with inaccurate boxes.

    Differences from the released code: any detector (the code has Faster R-CNN); images without boxes have no bag (the code
    fails); bags whose scores are all 0 or equal are merged by a plain mean (the code divides by 0).
    """

    slug = "ssd_det"
    title = "Spatial Self-Distillation for Object Detection with Inaccurate Bounding Boxes (ICCV 2023)"
    bibtex = """@inproceedings{wu2023ssddet,
  title={Spatial Self-Distillation for Object Detection with Inaccurate Bounding Boxes},
  author={Wu, Di and Chen, Pengfei and Yu, Xuehui and Li, Guorong and Han, Zhenjun and Jiao, Jianbin},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2023}
}"""

    def __init__(
        self,
        teacher: Teacher | None,
        student: Detector,
        *,
        detector_weight: Weight = 4.0,
        rpn_box_weight: Weight = 1.0,
        position_weight: Weight = 0.25,
        mil_1_weight: Weight = 0.25,
        mil_2_weight: Weight = 0.25,
        negative_weight: Weight = 0.75,
        identity_weight: Weight = 5.0,
        with_identity: bool = True,
        resample_stage2: bool = False,
        ratios: Sequence[Positive] = RATIOS,
        shift: Weight = 0.2,
        valid_share: Fraction = 0.7,
        topk: Count = 7,
        negatives: Index = 500,
        negative_iou: Fraction = 0.3,
        width: Count = 1024,
        pooled: Count = 7,
    ) -> None:
        """Build the refiner.

        Args:
            teacher: not used (other methods of a composition may use it).
            student: a detector with predictions whose levels have equal channels.
            detector_weight: factor of the detector's own losses, on the refined boxes.
            rpn_box_weight: factor of the box loss of a two-stage detector's first stage, in place of ``detector_weight``.
            position_weight: weight of both position losses.
            mil_1_weight: weight of the bag classification of stage 1.
            mil_2_weight: weight of the bag classification of stage 2.
            negative_weight: weight of the loss on background boxes.
            identity_weight: weight of the identity loss (5 in the released code, 0.25 in the paper).
            with_identity: learn the overlap of the boxes with the object, and merge by it; false: merge by class and instance
                scores.
            resample_stage2: stage 2 begins with a new neighbourhood of the first refined box, as the paper writes; false: with
                the boxes of stage 1, as in the released code.
            ratios: ratios of the neighbourhood's sides to the box's.
            shift: moves of the neighbourhood, as a fraction of the sides.
            valid_share: smallest part of a box's area that must lie inside the image.
            topk: number of boxes that are merged into a refined box.
            negatives: number of random background boxes of an image.
            negative_iou: largest overlap of a background box with a box of a bag.
            width: width of the refiner's layers.
            pooled: side of a pooled box in cells.

        Raises:
            MethodError: a hyper-parameter is out of range.
            PairError: the student's levels differ in their channels, or it has no predictions.
        """
        super().__init__(teacher, student)
        self.detector_weight, self.rpn_box_weight, self.negatives = detector_weight, rpn_box_weight, negatives
        self._check_channels(student.spec)
        # Two-stage detectors pool from P2 to P5; so do we, as far as the student has these levels.
        self.levels = [index for index, stride in enumerate(student.spec.strides) if stride <= 32] or [0]
        weights = Weights(position_weight, mil_1_weight, position_weight, mil_2_weight, negative_weight, identity_weight)
        self.refiner = Refiner(
            len(student.spec.classes), student.spec.channels[0], width=width, pooled=pooled,
            base=14.0 * student.spec.strides[0],  # 56 pixels at stride 4
            ratios=ratios, shift=shift, valid_share=valid_share, topk=topk, negative_iou=negative_iou, weights=weights,
            with_identity=with_identity, resample=resample_stage2,
        )  # fmt: skip

    def _check_channels(self, student: DetectorSpec) -> None:
        """Check that one head can read all levels.

        Raises:
            PairError: they differ in their channels.
        """
        if len(set(student.channels)) > 1:
            raise PairError(
                f"{self.slug}: the levels of the student {student.name} have {student.channels} channels, but boxes are pooled "
                f"from all of them into one head; take a student whose levels have equal channels"
            )

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """A student with predictions; no teacher."""
        return Needs(teacher=None, student_families=("dense", "regions", "queries"))

    def relabel(self, student: Detector, features: Features, batch: Batch, clock: Clock) -> tuple[Batch, Losses]:
        """Replace the boxes by refined ones; labels and crowd boxes stay.

        Terms ``position_1``, ``mil_1``, ``position_2``, ``mil_2``, ``negative`` and ``identity``; those of weight 0 are left
        out. Monitor ``moved_iou``: mean IoU of refined and given boxes. A batch without boxes has the one term ``refiner``, 0.
        """
        objects = [torch.nonzero(~target.crowd).flatten() for target in batch.targets]
        with full_precision(batch.images.device):
            used = features.take(self.levels).float()
            share = share_over_ranks(batch.images.new_tensor(float(sum(map(len, objects)))))
            if not any(len(index) for index in objects):
                return batch, Losses({"refiner": self._nothing(used)})
            boxes = [target.boxes_xyxy[index] for target, index in zip(batch.targets, objects, strict=True)]
            labels = [target.labels[index] for target, index in zip(batch.targets, objects, strict=True)]
            found = self.refiner(used, boxes, labels, batch.sizes, self.random_boxes(batch, clock))
            overlap = paired_iou(found.boxes_xyxy, torch.cat(boxes).to(found.boxes_xyxy)).mean()
        targets = []
        refined = found.boxes_xyxy.split([len(index) for index in objects])
        for target, index, own in zip(batch.targets, objects, refined, strict=True):
            changed = target.boxes_xyxy.clone()
            changed[index] = own.to(changed.dtype)
            targets.append(replace(target, boxes_xyxy=changed))
        losses = {name: term * share for name, term in found.losses.items()}
        return batch.with_targets(targets), Losses(losses, {"moved_iou": overlap})

    def _nothing(self, features: Features) -> Tensor:
        """A 0 that is connected to the features and to all layers of the refiner."""
        parts = [level[:0].sum() for level in features.maps] + [parameter.flatten()[:0].sum() for parameter in self.parameters()]
        return torch.stack(parts).sum()

    def random_boxes(self, batch: Batch, clock: Clock) -> list[Tensor]:
        """Random boxes for the background of each image, seeded by image, view and step."""
        drawn = []
        for number, view, (height, width) in zip(batch.ids, batch.views, batch.sizes.tolist(), strict=True):
            seed = zlib.crc32(f"{number}/{view.key}/{clock.epoch}/{clock.step}".encode())
            boxes = ssd_det_random_boxes((height, width), self.negatives, torch.Generator().manual_seed(seed))
            drawn.append(boxes.to(batch.images.device))
        return drawn

    def supervise(self, student: Detector, seen: Observation, taught: None, batch: Batch) -> Losses:
        """Compute the detector's own losses on the refined boxes, weighted."""
        assert seen.prediction is not None
        losses = student.loss(seen.prediction, batch)
        factors = {name: self.rpn_box_weight if "rpn_box" in name else self.detector_weight for name in losses.terms}
        return replace(losses, terms={name: factors[name] * term for name, term in losses.terms.items() if factors[name]})

    def learn(self, student: Detector, seen: Observation, taught: None, batch: Batch, clock: Clock) -> Losses:
        """Nothing: the refiner's losses are those of ``relabel``."""
        return Losses({})
