"""LGD: a small teacher made of the labels and of the student's own features, trained along with the student.

Zhang, Kang, Yang, Zhang, Zheng, Sun, "LGD: Label-Guided Self-Distillation for Object Detection", AAAI 2022, arXiv 2109.11496.
The defaults and details are those of the released code.

The dynamic teacher embeds each labelled box, lets the objects of an image attend to each other, and draws the results into the
cells of the boxes. The student's own head judges the pyramid that it draws; the student's pyramid imitates it.

Shape letters: B images, L levels, C channels, H x W cells of one level, N boxes of an image (with the context box), T boxes of
the batch, K classes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.contract import Detector, Teacher
from detdistill.functional.cells import index_cells
from detdistill.functional.deformable import num_heads
from detdistill.functional.modes import keeping_statistics
from detdistill.functional.positions import boxes_with_context, corner_descriptors
from detdistill.functional.precision import full_precision
from detdistill.methods.shared.align import ConvolutionAdapters
from detdistill.methods.shared.contract import Stage, TeacherFree
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.structures import Batch, Clock, Dense, Features, Losses, Observation
from detdistill.values import Count, Fraction, Weight

Interaction = Literal["student_guided", "label_guided", "student", "label"]


def lgd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], weight: float = 1.0) -> Tensor:
    """Mean squared difference of the pyramids, each channel of each image normalised to mean 0 and variance 1 over its cells.

    The mean is over all numbers of all levels, so a level counts by its number of cells. A level of one cell counts as 0.

    Args:
        student: L adapted maps [B, C, H, W]; gradient flows.
        teacher: L maps of the same shapes, treated as constant.
        weight: factor (lambda).

    Returns:
        [] the loss: between 0 and ``4 * weight``, about 2 for unrelated maps.

    Example:
        >>> maps = [torch.arange(8.0).view(1, 2, 2, 2)]
        >>> opposite, shifted = [-level for level in maps], [level + 1 for level in maps]
        >>> round(float(lgd_loss(opposite, maps)), 2), round(float(lgd_loss(shifted, maps)), 6)
        (4.0, 0.0)
    """
    squares = [
        F.mse_loss(_normalized(mine), _normalized(theirs.detach()), reduction="sum")
        for mine, theirs in zip(student, teacher, strict=True)
    ]
    return weight * torch.stack(squares).sum() / sum(level.numel() for level in teacher)


def _normalized(maps: Tensor) -> Tensor:
    return F.instance_norm(maps) if maps[0, 0].numel() > 1 else maps * 0  # PyTorch refuses to normalise single cells


class SpatialTransformer(nn.Module):
    """Multiplies each row by a matrix [D, D] that a small network computes from the row."""

    def __init__(self, width: int) -> None:
        """Build the network for rows of D = ``width`` numbers."""
        super().__init__()
        widths = (width, 64, 128, 1024, 512, 256)
        self.layers = nn.ModuleList(nn.Linear(inner, outer) for inner, outer in itertools.pairwise(widths))
        self.matrix = nn.Linear(256, width * width)

    def forward(self, rows: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        hidden = rows
        for layer in self.layers:
            hidden = _block(layer, hidden)
        matrix = self.matrix(hidden).view(len(rows), rows.shape[1], rows.shape[1])
        return torch.bmm(rows[:, None], matrix)[:, 0]


def _block(layer: nn.Module, rows: Tensor) -> Tensor:
    """Linear layer, layer norm without weights, ReLU."""
    raw: Tensor = layer(rows)
    return F.layer_norm(raw, raw.shape[-1:]).relu()


class LabelEmbedding(nn.Module):
    """Embeds labelled boxes, each in view of the other boxes of its image (in the manner of PointNet)."""

    def __init__(self, num_classes: int, channels: int) -> None:
        """Build the layers for K classes and embeddings of C channels."""
        super().__init__()
        self.transform = SpatialTransformer(4 + num_classes)
        self.first = nn.Linear(4 + num_classes, 64)
        self.inner_transform = SpatialTransformer(64)
        self.second = nn.Linear(64, 128)
        self.third = nn.Linear(128, 1024)
        self.last = nn.Linear(64 + 1024, channels)

    def forward(self, descriptors: Tensor, counts: Sequence[int]) -> Tensor:
        """Embed descriptors [T, 4 + K] (``corner_descriptors``) of ``counts[b]`` boxes of each image b: [T, C]."""
        local = self.inner_transform(_block(self.first, self.transform(descriptors)))
        wide = _block(self.third, _block(self.second, local))
        whole = [rows.amax(dim=0, keepdim=True).expand(len(rows), -1) for rows in wide.split(list(counts))]
        return _block(self.last, torch.cat([local, torch.cat(whole)], dim=1))


class DynamicTeacher(nn.Module):
    """Draws a pyramid from labelled boxes and from the student's maps; all levels share all layers."""

    def __init__(
        self, num_classes: int, channels: int, heads: int = 8, context: bool = True, interaction: Interaction = "student_guided"
    ) -> None:
        """Build the layers; ``heads`` must divide the channels."""
        super().__init__()
        self.num_classes, self.context, self.interaction = num_classes, context, interaction
        self.labels = LabelEmbedding(num_classes, channels)
        self.key = nn.Linear(channels, channels)
        self.appearance = nn.Conv2d(channels, channels, 3, padding=1)
        if interaction in ("student_guided", "label_guided"):
            self.attention = nn.MultiheadAttention(channels, heads)
        self.of_object = nn.Linear(channels, channels)
        self.of_map = nn.Conv2d(channels, channels, 3, padding=1)
        if context:
            self.of_context = nn.Linear(channels, channels)
        self.refine = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))

    def forward(
        self, maps: Sequence[Tensor], boxes_xyxy: Sequence[Tensor], labels: Sequence[Tensor], image_hw: tuple[int, int]
    ) -> list[Tensor]:
        """Draw the pyramid.

        Args:
            maps: L maps [B, C, H, W] of the student; gradient flows.
            boxes_xyxy: B tensors [G, 4] in pixels. An image without boxes gets a box of one pixel in its corner; with
                ``context`` this box counts as the context box, and nothing is drawn.
            labels: B tensors [G] int64, 0 .. K-1.
            image_hw: height and width in pixels of the area that the maps show.

        Returns:
            L maps [B, C, H, W].
        """
        described = [
            boxes_with_context(boxes.to(maps[0]), own, image_hw, self.context)
            for boxes, own in zip(boxes_xyxy, labels, strict=True)
        ]
        boxes = [pair[0] for pair in described]
        counts = [len(some) for some in boxes]
        descriptors = [corner_descriptors(*pair, image_hw, self.num_classes) for pair in described]
        keys = _block(self.key, self.labels(torch.cat(descriptors), counts))
        image = torch.arange(len(counts), device=keys.device).repeat_interleave(torch.tensor(counts, device=keys.device))
        others = image[:, None] != image
        return [self._draw(level, boxes, image_hw, keys, others) for level in maps]

    def _draw(self, level: Tensor, boxes: Sequence[Tensor], image_hw: tuple[int, int], keys: Tensor, others: Tensor) -> Tensor:
        """One level of the pyramid. ``others`` [T, T] bool: the boxes belong to different images."""
        size = (level.shape[-2], level.shape[-1])
        regions = [index_cells(some, image_hw, size).regions().flatten(1).to(level.dtype) for some in boxes]
        shown = F.group_norm(self.appearance(level), 1).relu().flatten(2)
        pairs = zip(shown, regions, strict=True)
        looks = torch.cat([mask @ cells.T / mask.sum(dim=1, keepdim=True).clamp(min=1) for cells, mask in pairs])
        mixed = self._mix(looks, keys, others).split([len(some) for some in boxes])
        objects = slice(None, -1) if self.context else slice(None)
        drawn = [self.of_object(rows[objects]).T @ mask[objects] for rows, mask in zip(mixed, regions, strict=True)]
        hidden: Tensor = self.of_map(torch.stack(drawn).unflatten(2, size))
        if self.context:
            hidden = hidden + self.of_context(torch.stack([rows[-1] for rows in mixed]))[:, :, None, None]
        for layer in self.refine:
            hidden = F.group_norm(layer(hidden.relu()), 1)
        return hidden

    def _mix(self, looks: Tensor, keys: Tensor, others: Tensor) -> Tensor:
        """What is drawn for each box, [T, C], from its appearance [T, C] and its label's embedding [T, C]."""
        if self.interaction in ("student", "label"):
            return looks if self.interaction == "student" else keys
        query, values = (looks, keys) if self.interaction == "student_guided" else (keys, looks)
        mixed: Tensor = self.attention(query, values, values, need_weights=False, attn_mask=others)[0]
        return mixed


class LGD(TeacherFree[None]):
    """LGD for any student with predictions and levels of equal width; there is no teacher.

    Differences from the released code: one optimizer for student and dynamic teacher (the code has two with the same schedule,
    and clips their gradients apart); any number of classes and channels; norms with running statistics in the student's head
    do not count the pyramids of the dynamic teacher; a map of one cell counts as 0 in the loss (the code fails).
    """

    slug = "lgd"
    title = "LGD: Label-Guided Self-Distillation for Object Detection (AAAI 2022)"
    bibtex = """@inproceedings{zhang2022lgd,
  title={LGD: Label-Guided Self-Distillation for Object Detection},
  author={Zhang, Peizhen and Kang, Zijian and Yang, Tong and Zhang, Xiangyu and Zheng, Nanning and Sun, Jian},
  booktitle={Proceedings of the AAAI Conference on Artificial Intelligence},
  year={2022}
}"""

    def __init__(
        self,
        teacher: Teacher | None,
        student: Detector,
        *,
        weight: Weight = 1.0,
        teacher_weight: Weight = 1.0,
        imitates_from: Fraction = 1 / 6,
        imitates_until: Fraction = 1.0,
        backbone_from: Fraction = 1 / 9,
        context: bool = True,
        detach_appearance: bool = False,
        heads: Count = 8,
        interaction: Interaction = "student_guided",
    ) -> None:
        """Build the dynamic teacher and the adapter.

        Args:
            teacher: not used (other methods of a composition may use it).
            student: a detector with predictions whose levels have equal channels.
            weight: weight of the distillation loss (lambda).
            teacher_weight: weight of the detection losses on the dynamic teacher's pyramid; its only training.
            imitates_from: part of the run from which the student imitates (the paper: iteration 30000 of 180000). Before, only
                the adapter learns from the distillation loss.
            imitates_until: part of the run until which the student imitates (the largest models of the paper stop at 13/18).
            backbone_from: part of the run from which the student's backbone is trained (the paper: iteration 20000 of 180000).
            context: add a box over the whole image to the labels. The paper's setting for RetinaNet and large FCOS; false for
                FCOS with ResNet-50 and for two-stage students.
            detach_appearance: stop the gradient from the dynamic teacher to the student's features (two-stage students of the
                paper).
            heads: attention heads; the largest number up to this that divides the channels is taken.
            interaction: ``student_guided``: appearances of boxes ask label embeddings (the paper's method);
                ``label_guided``: the reverse; ``student``, ``label``: one of the two is drawn without attention (ablations,
                ``student_fill`` and ``teacher_fill`` in the code).

        Raises:
            MethodError: a hyper-parameter is out of range, or both weights are 0.
            PairError: the student's levels differ in their channels, or it has no predictions.
        """
        super().__init__(teacher, student)
        check_some(self.slug, weight=weight, teacher_weight=teacher_weight)
        widths = set(student.spec.channels)
        if len(widths) > 1:
            raise PairError(
                f"{self.slug}: the levels of the student {student.spec.name} have {student.spec.channels} channels, but the "
                f"layers that draw them are shared; take a student whose levels have equal channels"
            )
        (channels,) = widths
        self.weight, self.teacher_weight, self.detach_appearance = weight, teacher_weight, detach_appearance
        self.imitates_from, self.imitates_until, self.backbone_from = imitates_from, imitates_until, backbone_from
        heads = num_heads(channels, heads)
        self.dynamic_teacher = DynamicTeacher(len(student.spec.classes), channels, heads, context, interaction)
        self.adapters = ConvolutionAdapters([channels])

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """A student with predictions; no teacher."""
        return Needs(teacher=None, student_families=("dense", "regions", "queries"))

    def learn(self, student: Detector, seen: Observation, taught: None, batch: Batch, clock: Clock) -> Losses:
        """Terms ``teacher_*`` (the student's own losses on the dynamic teacher's pyramid) and ``imitation``."""
        features, device = seen.features, batch.images.device
        with full_precision(device):
            drawn = self.draw(features, batch)
        terms: dict[str, Tensor] = {}
        if self.teacher_weight:
            with full_precision(device):
                # Dense predictions share one assignment; two-stage detectors propose anew, DETRs match anew.
                same = student.assign(seen.prediction, batch) if isinstance(seen.prediction, Dense) else None
            with keeping_statistics(student):
                prediction = student.predict(Features(tuple(drawn), features.strides, features.padding), batch)
            with full_precision(device):
                judged = student.loss(prediction.float(), batch, same).terms
            terms = {f"teacher_{name}": self.teacher_weight * term for name, term in judged.items()}
        if self.weight:
            with full_precision(device):
                mine = features.maps if self.imitates(clock) else [level.detach() for level in features.maps]
                terms["imitation"] = lgd_loss(self.adapters(mine), drawn, self.weight)
        return Losses(terms)

    def draw(self, features: Features, batch: Batch) -> list[Tensor]:
        """Compute the dynamic teacher's pyramid, L maps [B, C, H, W]. Crowd boxes are left out."""
        targets = [target.without_crowd() for target in batch.targets]
        maps = [level.detach() for level in features.maps] if self.detach_appearance else features.maps
        # The area that the maps show: the batch as the student padded it.
        canvas = (maps[0].shape[-2] * features.strides[0], maps[0].shape[-1] * features.strides[0])
        boxes, labels = [target.boxes_xyxy for target in targets], [target.labels for target in targets]
        drawn: list[Tensor] = self.dynamic_teacher(maps, boxes, labels, canvas)
        return drawn

    def imitates(self, clock: Clock) -> bool:
        """Whether the student's features learn from the distillation loss at this time."""
        return self.imitates_from <= clock.progress <= self.imitates_until

    def stages(self, student: Detector) -> tuple[Stage, ...]:
        """One stage; the student's backbone rests at its beginning."""
        if not self.backbone_from:
            return super().stages(student)
        parts = student.parts()
        without_backbone = (*parts.neck, *parts.head, self)
        trains = dataclasses.replace(
            self.distill_stage(student, ()),
            trains=lambda clock: (student, self) if clock.progress >= self.backbone_from else without_backbone,
        )
        return (trains,)
