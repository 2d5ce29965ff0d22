"""MimicDet: anchors are moved by a refinement module, and a one-stage head looks into the moved box.

Lu, Li, Li, Yan, "MimicDet: Bridging the Gap Between One-Stage and Two-Stage Object Detection", ECCV 2020. No released code was
found: a reconstruction, whose numbers were not checked against the paper. The region head that teaches this head in training is
no part of the model.

Shape letters: B images, P predictions of an image (one for each cell), C channels, K classes, D width of the compared layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .atss import decode_deltas
from .dense import DeformableConv, OneStage, flat, reset, tower


class Refinement(nn.Module):
    """One objectness logit and four deltas of each anchor: a 3x3 convolution and two 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, 1, 1)
        self.deltas = nn.Conv2d(channels, 4, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] -> objectness [B, 1, H, W], deltas [B, 4, H, W]."""
        inner = self.conv(features).relu()
        return self.objectness(inner), self.deltas(inner)


class GuidedConv(nn.Module):
    """A deformable convolution whose offsets follow the refinement of the anchor ("guided deformable convolution")."""

    def __init__(self, channels: int, width: int, kernel: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(4, 2 * kernel**2, 1)
        self.deformable = DeformableConv(channels, width, kernel)

    def forward(self, features: Tensor, deltas: Tensor) -> Tensor:
        """Features [B, C, H, W] and deltas [B, 4, H, W] -> [B, D, H, W] after a ReLU."""
        return self.deformable(features, self.offset(deltas)).relu()


class Branch(nn.Module):
    """Guided convolution and a 1x1 convolution, each with a ReLU: what the branch's output layer reads."""

    def __init__(self, channels: int, width: int, kernel: int, convs: int) -> None:
        super().__init__()
        self.conv = tower(channels, convs)
        self.guided = GuidedConv(channels, width, kernel)
        self.hidden = nn.Conv2d(width, width, 1)

    def look(self, features: Tensor, deltas: Tensor) -> Tensor:
        """[B, C, H, W] and deltas [B, 4, H, W] of the refinement -> [B, D, H, W], the features that mimic."""
        return self.hidden(self.guided(features, deltas)).relu()


class ClassificationHead(Branch):
    """A tower (``conv``), a look into the refined box, K+1 logits (``cls_logits``), background last."""

    def __init__(self, channels: int, num_classes: int, width: int, kernel: int, convs: int) -> None:
        super().__init__(channels, width, kernel, convs)
        self.num_classes, self.num_anchors = num_classes + 1, 1
        self.cls_logits = nn.Conv2d(width, num_classes + 1, 1)


class RegressionHead(Branch):
    """A tower (``conv``), the refinement module, a look into the refined box, and its correction (``bbox_reg``)."""

    def __init__(self, channels: int, width: int, kernel: int, convs: int) -> None:
        super().__init__(channels, width, kernel, convs)
        self.refinement = Refinement(channels)
        self.bbox_reg = nn.Conv2d(width, 4, 1)


class Looked(NamedTuple):
    """Results of the head before its output layers, for each level."""

    objectness: list[Tensor]
    """[B, 1, H, W] logits."""
    refinement: list[Tensor]
    """[B, 4, H, W] deltas of the anchors."""
    class_hidden: list[Tensor]
    """[B, D, H, W]."""
    box_hidden: list[Tensor]
    """[B, D, H, W]."""


class MimicDetHead(nn.Module):
    """Refinement, classes and boxes of every cell, the same weights for all levels."""

    def __init__(self, channels: int, num_classes: int, width: int, kernel: int = 5, convs: int = 0) -> None:
        """Build with random weights.

        Args:
            channels: of the pyramid.
            num_classes: K, no background.
            width: D.
            kernel: taps along each side of the guided convolutions.
            convs: blocks of a tower before each branch (the paper's head has none).
        """
        super().__init__()
        self.classification_head = ClassificationHead(channels, num_classes, width, kernel, convs)
        self.regression_head = RegressionHead(channels, width, kernel, convs)
        self.reset()

    def reset(self) -> None:
        """Draw all weights: normal of deviation 0.01; offsets begin at 0, objectness at 0.01.

        The two hidden layers of a branch keep the scale of what they read (He et al., ICCV 2015), else they would begin dead.
        """
        reset(self)
        for branch in (self.classification_head, self.regression_head):
            nn.init.zeros_(branch.guided.offset.weight)
            for layer in (branch.guided.deformable, branch.hidden):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.constant_(cast(Tensor, self.regression_head.refinement.objectness.bias), -math.log(0.99 / 0.01))

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """As ``outputs``, from the pyramid's maps [B, C, H_l, W_l]."""
        classification, regression = self.classification_head.conv, self.regression_head.conv
        return self.outputs([classification(level) for level in maps], [regression(level) for level in maps])

    def outputs(self, class_maps: Sequence[Tensor], box_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """As ``predicted``, from the last maps of the towers."""
        return self.predicted(self.look(class_maps, box_maps))

    def look(self, class_maps: Sequence[Tensor], box_maps: Sequence[Tensor]) -> Looked:
        """Everything before the output layers. No gradient flows from the looks to the refinement that guides them."""
        found = Looked([], [], [], [])
        classes, boxes = self.classification_head, self.regression_head
        for class_map, box_map in zip(class_maps, box_maps, strict=True):
            objectness, deltas = boxes.refinement(box_map)
            found.objectness.append(objectness)
            found.refinement.append(deltas)
            found.class_hidden.append(classes.look(class_map, deltas.detach()))
            found.box_hidden.append(boxes.look(box_map, deltas.detach()))
        return found

    def predicted(self, looked: Looked) -> dict[str, Tensor]:
        """The output layers.

        Returns:
            ``cls_logits`` [B, P, K+1], background last; ``bbox_regression`` [B, P, 4], deltas of the refined box; ``objectness``
            [B, P, 1] and ``refinement`` [B, P, 4], deltas of the anchor.
        """
        return {
            "cls_logits": flat([self.classification_head.cls_logits(level) for level in looked.class_hidden]),
            "bbox_regression": flat([self.regression_head.bbox_reg(level) for level in looked.box_hidden]),
            "objectness": flat(looked.objectness),
            "refinement": flat(looked.refinement),
        }


class MimicDet(OneStage):
    """Network and inference; score = the class's share of the softmax, for the refined anchors of the best objectness."""

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        num_classes: int,
        strides: Sequence[int],
        *,
        width: int = 1024,
        kernel: int = 5,
        convs: int = 0,
        refined: int = 1000,
        anchor_scale: float = 4,
        nms_thresh: float = 0.5,
        training_only: Mapping[str, float] | None = None,
        **settings: Any,
    ) -> None:
        """Build a head on a backbone.

        Args:
            backbone: maps images to the pyramid's levels.
            channels: of the pyramid.
            num_classes: K, no background.
            strides: of the levels.
            width: D.
            kernel: taps along each side of the guided convolutions.
            convs: blocks of a tower before each branch.
            refined: anchors of an image that are kept, by objectness.
            anchor_scale: side of an anchor in strides.
            nms_thresh: IoU from which the lower of two boxes of a class falls away.
            training_only: settings of the training, which the model only remembers.
            settings: of ``OneStage``.
        """
        head = MimicDetHead(channels, num_classes, width, kernel, convs)
        super().__init__(backbone, head, strides, anchor_scale=anchor_scale, nms_thresh=nms_thresh, **settings)
        self.width, self.refined, self.training_only = width, refined, dict(training_only or {})

    def decode(self, regression: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
        """Boxes [..., 4] of deltas [..., 4] on anchors or on refined anchors."""
        return decode_deltas(regression, anchors)

    def references(self, outputs: Mapping[str, Tensor], anchors: Tensor, strides: Tensor) -> Tensor:
        """The refined anchors [B, P, 4], constant."""
        return self.decode(outputs["refinement"].to(anchors.dtype), anchors, strides).detach()

    def kept(self, objectness: Tensor, valid: Tensor) -> Tensor:
        """Which refined anchors are kept, [B, P] bool: the ``refined`` valid ones with the highest objectness [B, P, 1]."""
        ranked = objectness[..., 0].masked_fill(~valid, -torch.inf).sort(dim=1, descending=True).indices
        chosen = torch.zeros_like(objectness[..., 0]).scatter(1, ranked[:, : self.refined], 1.0)
        return (chosen > 0) & valid

    def scores(self, outputs: Mapping[str, Tensor], valid: Tensor) -> Tensor:
        """Class scores [B, P, K]; 0 where the refined anchor is not kept."""
        probabilities = outputs["cls_logits"].softmax(dim=-1)[..., :-1]
        return probabilities * self.kept(outputs["objectness"], valid)[..., None].to(probabilities.dtype)
