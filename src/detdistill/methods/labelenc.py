"""LabelEnc: features made from labels alone supervise the student's features.

Hao, Liu, Zhang, Sun, "LabelEnc: A New Intermediate Supervision Method for Object Detection", ECCV 2020, arXiv 2007.03282. The
defaults and details are those of the released code (FCOS, RetinaNet, Faster R-CNN).

Stage ``encoder``: an encoder draws the ground truth as maps and turns them into a pyramid of features, from which the head of an
auxiliary detector must find the objects again; the auxiliary detector learns beside it on the images. Stage ``distill``: the
frozen encoder's pyramid supervises the student's, and the student starts from the trained head and the encoder's neck.

Shape letters: B images, K classes, L levels, C channels, H x W pixels or cells of one level, G boxes of an image.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.contract import PREDICTION, Detector, HasBackboneFeatures, HasCopies, Pyramid, Teacher
from detdistill.functional.masks import label_map
from detdistill.functional.modes import evaluating
from detdistill.functional.precision import full_precision
from detdistill.methods.shared.align import ConvolutionAdapters
from detdistill.methods.shared.contract import Stage, TeacherFree
from detdistill.methods.shared.needs import Needs
from detdistill.structures import Batch, Clock, Features, Look, Losses, Observation
from detdistill.values import Fraction, Weight

EPS = 1e-5
LOOK = Look(backbone=True)
FIRST_MARK = 1_000_003
"""Number of the first tensor in ``_names_of_neck``: rare as a weight, and exact in float32."""


def labelenc_distance(student: Sequence[Tensor], label: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of normalised pyramids: the distance loss of step 1 and the auxiliary loss of step 2.

    Each map of each image is normalised to mean 0 and variance 1 over its channels and cells together (group norm with one
    group, eps 1e-5). The mean is over all numbers of all levels, so a level counts by its number of cells.

    Args:
        student: L adapted maps [B, C, H, W]; gradient flows.
        label: L maps of the same shapes, from labels; treated as constant.

    Returns:
        [] the unweighted loss: between 0 and 4, about 2 for unrelated maps.

    Example:
        >>> maps = [torch.arange(8.0).view(1, 2, 2, 2), torch.arange(2.0).view(1, 2, 1, 1)]
        >>> round(float(labelenc_distance([3 * level + 1 for level in maps], maps)), 6)
        0.0
    """
    squares = [
        F.mse_loss(_normalized(mine), _normalized(theirs.detach()), reduction="sum")
        for mine, theirs in zip(student, label, strict=True)
    ]
    return torch.stack(squares).sum() / sum(level.numel() for level in label)


def _normalized(maps: Tensor) -> Tensor:
    """Group norm with one group; a batch of a single number, which PyTorch refuses, becomes 0."""
    return F.group_norm(maps, 1, eps=EPS) if maps.numel() > 1 else maps * 0


class Bottleneck(nn.Module):
    """Residual block of three convolutions with biases and without norms; ReLU after each, the last one after the sum."""

    def __init__(self, inner: int, wide: int, width: int, stride: int) -> None:
        """``inner`` channels come in, ``wide`` are inside, ``width`` go out; the 3x3 convolution has the stride."""
        super().__init__()
        self.reduce = nn.Conv2d(inner, wide, 1)
        self.spread = nn.Conv2d(wide, wide, 3, stride, padding=1)
        self.expand = nn.Conv2d(wide, width, 1)
        keeps = stride == 1 and inner == width
        self.shortcut = nn.Identity() if keeps else nn.Conv2d(inner, width, 1, stride, bias=False)
        for layer in (self.reduce, self.spread, self.expand, self.shortcut):
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(self, maps: Tensor) -> Tensor:
        """[B, inner, H, W] to [B, width, H / stride, W / stride], rounded up."""
        inside = self.spread(self.reduce(maps).relu()).relu()
        added: Tensor = (self.expand(inside) + self.shortcut(maps)).relu()
        return added


class LabelEncoder(nn.Module):
    """Turns ground truth, drawn as one plane for each class, into maps with the channels and strides of a backbone.

    A convolution 7x7 of stride 2 to 128 channels, then stages of residual blocks, each of which halves the map: one block at
    the strides 4 and 32, two at 8 and 16. For ResNet-50's pyramid this is the released network. For other pyramids, stages at
    strides that the pyramid lacks have 64 channels per stride (256 at stride 4), and inside a block are a quarter of its
    channels.
    """

    def __init__(self, num_classes: int, pyramid: Pyramid) -> None:
        """Build the layers for K classes and a backbone's channels and strides."""
        super().__init__()
        self.first = nn.Conv2d(num_classes, 128, 7, stride=2, padding=3)
        self.stages = nn.ModuleList()
        self.outputs: list[int] = []
        """For each level of the pyramid the index of its stage."""
        width, stride = 128, 2
        for channels, wanted in zip(pyramid.channels, pyramid.strides, strict=True):
            steps = max(0, round(math.log2(wanted / stride)))
            for remaining in reversed(range(steps)):
                stride *= 2
                self._add_stage(width, channels if remaining == 0 else 64 * stride, stride, halve=True)
                width = self.width
            if steps == 0:  # two levels of one stride
                self._add_stage(width, channels, stride, halve=False)
                width = self.width
            self.outputs.append(len(self.stages) - 1)

    def _add_stage(self, inner: int, width: int, stride: int, halve: bool) -> None:
        wide = max(1, width // 4)
        blocks = [Bottleneck(inner, wide, width, 2 if halve else 1)]
        if stride in (8, 16):
            blocks.append(Bottleneck(width, wide, width, 1))
        self.stages.append(nn.Sequential(*blocks))
        self.width = width

    def forward(self, planes: Tensor) -> list[Tensor]:
        """Encode planes [B, K, H, W] (``label_map``): a map [B, C_l, H_l, W_l] for each level of the pyramid."""
        maps, found = self.first(planes), []
        for stage in self.stages:
            maps = stage(maps)
            found.append(maps)
        return [found[index] for index in self.outputs]


class LabelEnc(TeacherFree[None]):
    """LabelEnc for any student whose neck can be built a second time; there is no teacher.

    Differences from the released code: the auxiliary detector is a copy of the student, with the student's backbone (the code
    takes ResNet-50 for every student); the encoder gives the channels and strides of the student's backbone; levels of several
    widths (SSD) have one adapter for each width; boxes below one pixel are not drawn (in the code they make the map NaN);
    the adapter is not decayed after the last auxiliary loss.
    """

    slug = "labelenc"
    title = "LabelEnc: A New Intermediate Supervision Method for Object Detection (ECCV 2020)"
    bibtex = """@inproceedings{hao2020labelenc,
  title={LabelEnc: A New Intermediate Supervision Method for Object Detection},
  author={Hao, Miao and Liu, Yitao and Zhang, Xiangyu and Sun, Jian},
  booktitle={European Conference on Computer Vision},
  year={2020}
}"""

    def __init__(
        self,
        teacher: Teacher | None,
        student: Detector,
        *,
        auxiliary_weight: Weight = 1.0,
        auxiliary_until: Fraction = 8 / 9,
        hand_over: bool = True,
        encoder_epochs: Weight = 4 / 3,
        distance_weight: Weight = 1.0,
        distance_from: Fraction = 0.25,
        label_weight: Weight = 1.0,
        vary_intensity: bool = True,
    ) -> None:
        """Build encoder, auxiliary detector and adapters.

        Args:
            teacher: not used (other methods of a composition may use it).
            student: a detector whose neck and head can be copied.
            auxiliary_weight: weight of the loss between the student's pyramid and the labels' pyramid.
            auxiliary_until: part of the run after which this loss ends (the paper: iteration 80000 of 90000).
            hand_over: start the student from the trained head and from the label branch's neck, as in the paper; false: from
                its own weights.
            encoder_epochs: length of the stage ``encoder`` as a multiple of the run's epochs (the paper: 120000 iterations
                before 90000).
            distance_weight: weight of the same loss on the auxiliary detector, in the stage ``encoder``.
            distance_from: part of the stage ``encoder`` after which its distance loss begins (the paper: iteration 30000 of
                120000). Until then its adapter is frozen.
            label_weight: weight of the detection losses on the labels' pyramid, in the stage ``encoder``.
            vary_intensity: in the stage ``encoder`` multiply each drawn box by ``min(1, 2u)`` with u uniform in 0..1.

        Raises:
            MethodError: a hyper-parameter is out of range.
            PairError: neck or head of the student cannot be copied.
        """
        super().__init__(teacher, student)
        self.auxiliary_weight, self.auxiliary_until, self.hand_over = auxiliary_weight, auxiliary_until, hand_over
        self.encoder_epochs, self.distance_weight, self.distance_from = encoder_epochs, distance_weight, distance_from
        self.label_weight, self.vary_intensity = label_weight, vary_intensity
        assert student.spec.backbone is not None
        self.encoder = LabelEncoder(len(student.spec.classes), student.spec.backbone)
        # A plain copy: it learns on the images in the first stage, and only its head is used afterwards.
        self.auxiliary = copy.deepcopy(student)
        self.label_neck = cast(HasCopies, student).copy_neck(fresh=True)
        self.neck_names = _names_of_neck(self.auxiliary)
        self.auxiliary_adapters = ConvolutionAdapters(student.spec.channels)
        self.adapters = ConvolutionAdapters(student.spec.channels)
        settings = (encoder_epochs, distance_weight, distance_from, label_weight, vary_intensity)
        self._settings = repr((settings, student.spec))

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """A student whose neck and head can be copied; its backbone's maps give the sizes of the label branch's maps."""
        return Needs(teacher=None, student=LOOK, student_capabilities=(HasBackboneFeatures, HasCopies))

    def encode(self, below: Features, batch: Batch, vary: bool = False) -> Features:
        """Compute the labels' pyramid: the encoder, then the label branch's neck. Crowd boxes are not drawn.

        Args:
            below: the backbone's maps of the batch; only their sizes and padding are read.
            batch: gives boxes and labels.
            vary: draw a random intensity for each box.
        """
        targets = [target.without_crowd() for target in batch.targets]
        sizes = [(level.shape[-2], level.shape[-1]) for level in below.maps]
        # The image as the backbone padded it: the encoder then rounds sizes as the backbone does.
        canvas = (sizes[0][0] * below.strides[0], sizes[0][1] * below.strides[0])
        boxes = [target.boxes_xyxy for target in targets]
        intensity = [(2 * torch.rand(len(some)).to(some)).clamp(max=1) for some in boxes] if vary else None
        planes = label_map(boxes, [target.labels for target in targets], canvas, self.encoder.first.in_channels, intensity)
        maps = []
        for level, size in zip(self.encoder(planes.to(self.encoder.first.weight)), sizes, strict=True):
            same = level.shape[-2:] == size
            maps.append(level if same else F.interpolate(level, size=size, mode="bilinear", align_corners=False))
        encoded: Features = self.label_neck(Features(tuple(maps), below.strides, below.padding))
        return encoded

    # -------------------------------------------------------------------------------------------------- stage encoder

    def train_encoder(self, batch: Batch, taught: None, clock: Clock) -> Losses:
        """Step of the stage ``encoder``: detection losses ``image/*`` and ``label/*``, and from its time on ``distance``."""
        seen = self.auxiliary(batch, PREDICTION | LOOK)
        assert seen.backbone_features is not None
        encoded = self.encode(seen.backbone_features, batch, vary=self.vary_intensity)
        found = self.auxiliary.predict(encoded, batch)
        adapted = self.auxiliary_adapters(seen.features.maps) if self._compares(clock) else []
        seen, found = seen.float(), found.float()
        with full_precision(batch.images.device):
            on_labels = self.auxiliary.loss(found, batch)
            weighted = {name: self.label_weight * term for name, term in on_labels.terms.items()} if self.label_weight else {}
            losses = [self.auxiliary.loss(seen.prediction, batch).prefixed("image"), Losses(weighted).prefixed("label")]
            if adapted:
                distance = labelenc_distance([level.float() for level in adapted], [level.float() for level in encoded.maps])
                losses.append(Losses({"distance": self.distance_weight * distance}))
        return Losses.merge(losses)

    def _compares(self, clock: Clock) -> bool:
        """Whether the distance loss of the stage ``encoder`` has begun."""
        return self.distance_weight > 0 and clock.progress >= self.distance_from

    # -------------------------------------------------------------------------------------------------- stage distill

    def learn(self, student: Detector, seen: Observation, taught: None, batch: Batch, clock: Clock) -> Losses:
        """The term ``auxiliary``, until its time is over."""
        if not self._supervises(clock):
            return Losses({})
        assert seen.backbone_features is not None
        with full_precision(batch.images.device):
            with torch.no_grad(), evaluating(self.label_neck):
                encoded = self.encode(seen.backbone_features, batch)
            loss = labelenc_distance(self.adapters(seen.features.maps), encoded.maps)
        return Losses({"auxiliary": self.auxiliary_weight * loss})

    def _supervises(self, clock: Clock) -> bool:
        return self.auxiliary_weight > 0 and clock.progress < self.auxiliary_until

    @torch.no_grad()
    def hand_over_to(self, student: Detector) -> None:
        """Copy the auxiliary detector's head and the label branch's neck into the student."""
        state, head = student.state_dict(), self.auxiliary.state_dict()
        for name in self.auxiliary.parts().names(self.auxiliary, self.auxiliary.parts().head):
            state[name].copy_(head[name])
        for name, tensor in self.label_neck.state_dict().items():
            if name in self.neck_names:
                state[self.neck_names[name]].copy_(tensor)

    def stages(self, student: Detector) -> tuple[Stage, ...]:
        """First train the encoder beside an auxiliary detector, then the student under the frozen encoder."""
        always = (self.encoder, self.label_neck, self.auxiliary)
        first = Stage(
            "encoder",
            step=self.train_encoder,
            trains=lambda clock: (*always, self.auxiliary_adapters) if self._compares(clock) else always,
            evaluates=None,
            share=self.encoder_epochs,
            depends_on=hashlib.sha256(f"{self.slug} {self._settings}".encode()).hexdigest()[:16],
        )
        distill = dataclasses.replace(
            self.distill_stage(student, ()),
            trains=lambda clock: (student, self.adapters) if self._supervises(clock) else (student,),
            before=(lambda: self.hand_over_to(student)) if self.hand_over else None,
        )
        return first, distill


@torch.no_grad()
def _names_of_neck(detector: Detector) -> dict[str, str]:
    """For each tensor of a ``copy_neck`` of the detector: its name in the copy, and its name in the detector.

    A copy may have other names, and another order. So each tensor of the detector's neck is filled with a number of its own
    for a moment, by which the copy's tensors are recognised.
    """
    state = detector.state_dict()
    names = [name for name in detector.parts().names(detector, detector.parts().neck) if state[name].dtype != torch.bool]
    kept = {name: state[name].clone() for name in names}
    for mark, name in enumerate(names, start=FIRST_MARK):
        state[name].fill_(mark)
    found = {}
    for name, tensor in cast(HasCopies, detector).copy_neck().state_dict().items():
        seen = float(tensor.flatten()[0]) - FIRST_MARK if tensor.numel() else -1.0
        if seen in range(len(names)) and tensor.shape == state[names[int(seen)]].shape:
            found[name] = names[int(seen)]
    for name in names:
        state[name].copy_(kept[name])
    return found
