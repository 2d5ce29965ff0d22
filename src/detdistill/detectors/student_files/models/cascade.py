"""Cascade R-CNN and Cascade Mask R-CNN: network and inference, made of torchvision's parts.

Cai and Vasconcelos, "Cascade R-CNN: Delving into High Quality Object Detection", CVPR 2018, and "Cascade R-CNN: High
Quality Object Detection and Instance Segmentation", TPAMI 2019. Behind one region proposal network stand three stages of
RoI heads; each pools from the boxes that the one before refined, moves them whatever their class is, and was trained on
boxes of higher overlap. Region proposal network and RoIAlign are torchvision's, with its anchors, matching and 2 x 2
sampling points in each bin.

Shape letters: R regions of the batch, C classes with the background first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image

IOUS = (0.5, 0.6, 0.7)
"""Overlap from which a region is positive, for each stage, as in the paper."""
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
"""Standard deviations of the deltas (x, y, width, height) of each stage, as in the released configurations."""


class CascadeRCNN(FasterRCNN):
    """Three (or any number of) stages of RoI heads behind a region proposal network.

    Speaks torchvision's contract in eval mode; losses are computed outside.
    """

    roi_heads: CascadeRoIHeads

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        ious: Sequence[float] = IOUS,
        stds: Sequence[Sequence[float]] = STDS,
        representation_size: int = 1024,
        mask_roi_pool: MultiScaleRoIAlign | None = None,
        **settings: Any,
    ) -> None:
        """Build with random weights.

        Args:
            backbone: maps images to an ordered dictionary of maps of ``out_channels`` channels.
            num_classes: outputs, the background among them.
            ious: of each stage, where a region becomes positive.
            stds: of each stage, what its deltas are divided by.
            representation_size: width of each box head's two layers.
            mask_roi_pool: gives each stage a mask branch that reads from it, as wide as the backbone.
            settings: of ``torchvision.models.detection.FasterRCNN``; ``box_fg_iou_thresh``, ``box_bg_iou_thresh`` and
                ``bbox_reg_weights`` have no effect.
        """
        super().__init__(backbone, box_head=nn.Identity(), box_predictor=nn.Identity(), **settings)
        plain = cast(Any, self.roi_heads)  # what torchvision made of the settings
        width = cast(int, backbone.out_channels)
        stages: list[RoIHeads] = []
        for iou, std in zip(ious, stds, strict=True):
            masks = () if mask_roi_pool is None else (mask_roi_pool, *mask_branch(width, num_classes))
            arguments = (
                plain.box_roi_pool,
                TwoMLPHead(width * plain.box_roi_pool.output_size[0] ** 2, representation_size),
                ClassAgnosticPredictor(representation_size, num_classes),
                *(iou, iou, plain.fg_bg_sampler.batch_size_per_image, plain.fg_bg_sampler.positive_fraction, None),
                *(plain.score_thresh, plain.nms_thresh, plain.detections_per_img, *masks),
            )
            last = len(stages) == len(ious) - 1
            stages.append(CascadeRoIHeads(stages, *arguments) if last else RoIHeads(*arguments))
            stages[-1].box_coder = StageBoxCoder(std)
        self.roi_heads = stages[-1]

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Detections, as torchvision's models give them.

        Raises:
            RuntimeError: in training mode.
        """
        if self.training:
            raise RuntimeError(f"{type(self).__name__} alone has no losses; call eval() first")
        return super().forward(images, targets)


class CascadeMaskRCNN(CascadeRCNN):
    """A mask branch in each stage; masks are the mean of what the branches say about the final boxes."""

    def __init__(
        self, backbone: nn.Module, num_classes: int, mask_roi_pool: MultiScaleRoIAlign | None = None, **settings: Any
    ) -> None:
        """As ``CascadeRCNN``; ``mask_roi_pool`` is 14 x 14 on the four finest levels when it is None."""
        pool = mask_roi_pool or MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=14, sampling_ratio=2)
        super().__init__(backbone, num_classes, mask_roi_pool=pool, **settings)


class CascadeRoIHeads(RoIHeads):
    """The last stage, and the stages before it as ``earlier``. Thresholds and numbers of detections are those of the last."""

    def __init__(self, earlier: Sequence[RoIHeads], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.earlier = nn.ModuleList(earlier)

    @property
    def stages(self) -> list[Any]:
        """All of them, the first stage first."""
        return [*self.earlier, self]

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Boxes of the last stage under the mean of all stages' logits; no losses."""
        logits: list[Tensor] = []
        for stage in self.stages:
            pooled = stage.box_roi_pool(features, proposals, image_shapes)
            scores, deltas = stage.box_predictor(stage.box_head(pooled))
            logits.append(scores)
            if stage is not self:
                refined = stage.box_coder.decode_single(deltas, torch.cat(proposals)).split(
                    [boxes.shape[0] for boxes in proposals]
                )
                proposals = [clip_boxes_to_image(boxes, size) for boxes, size in zip(refined, image_shapes, strict=True)]
        mean = mean_logits(logits)
        found = self.postprocess_detections(mean, deltas.repeat(1, mean.shape[1]), proposals, image_shapes)
        result = [dict(zip(("boxes", "scores", "labels"), image, strict=True)) for image in zip(*found, strict=True)]
        if self.has_mask():
            boxes, labels = [image["boxes"] for image in result], [image["labels"] for image in result]
            pooled = self.mask_roi_pool(features, boxes, image_shapes)
            for stage in self.stages:
                masks = maskrcnn_inference(stage.mask_predictor(stage.mask_head(pooled)), labels)
                for image, mask in zip(result, masks, strict=True):
                    image["masks"] = image.get("masks", 0) + mask / len(self.stages)
        return result, {}


class ClassAgnosticPredictor(FastRCNNPredictor):
    """Scores of each class, and one box for all of them."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random weights: before training every class scores the same and boxes stay where they are."""
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)


class StageBoxCoder(BoxCoder):
    """torchvision's coder, told standard deviations; a box neither grows nor shrinks by more than 1000 / 16."""

    def __init__(self, stds: Sequence[float]) -> None:
        x, y, width, height = (1 / std for std in stds)
        super().__init__((x, y, width, height))

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """[N, 4 c] boxes of deltas [N, 4 c] on boxes [N, 4]. torchvision's limits growing only."""
        codes = rel_codes.unflatten(1, (-1, 4))
        least = -self.bbox_xform_clip * codes.new_tensor(self.weights[2:])
        codes = torch.cat([codes[..., :2], torch.maximum(codes[..., 2:], least)], dim=-1)
        return super().decode_single(codes.flatten(1), boxes)


def mask_branch(channels: int, num_classes: int) -> tuple[MaskRCNNHeads, MaskRCNNPredictor]:
    """Mask head and predictor of torchvision."""
    return MaskRCNNHeads(channels, (channels,) * 4, 1), MaskRCNNPredictor(channels, channels, num_classes)


def mean_logits(logits: Sequence[Tensor]) -> Tensor:
    """[R, C] mean of the stages' logits, each [R, C] about the same regions."""
    total = logits[0]
    for other in logits[1:]:
        total = total + other
    return total / len(logits)
