"""Anchors, region pooling and RetinaNet's selection as Detectron2 and MMDetection have them, where torchvision differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, batched_nms, clip_boxes_to_image, roi_align
from torchvision.ops.poolers import _filter_input, _setup_scales

from .cascade import StageBoxCoder
from .dense import best_of_levels


class ExactAnchors(AnchorGenerator):
    """torchvision's anchors without its roundings, in the same order.

    torchvision rounds their sides to whole pixels, and takes as a level's stride the quotient of image and map, which is too
    small where an image is no multiple of it (224 pixels, 4 cells: 56 for 64).
    """

    def __init__(
        self, sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[Sequence[float]], strides: Sequence[int]
    ) -> None:
        """Build anchors.

        Args:
            sizes: of each level, sides of its square anchors in pixels.
            aspect_ratios: of each level, ratios of height to width.
            strides: of the levels.
        """
        super().__init__(sizes, aspect_ratios)  # type: ignore[arg-type]
        self.strides = tuple(strides)

    def grid_anchors(self, grid_sizes: list[list[int]], strides: Any) -> list[Tensor]:
        """[P_l, 4] of each level; the given ``strides`` are not read."""
        return super().grid_anchors(grid_sizes, [[stride, stride] for stride in self.strides])  # type: ignore[misc]

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - as in torchvision
    ) -> Tensor:
        """[A, 4] anchors around (0, 0), in pixels: for each ratio of height to width, all sizes."""
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)
        high = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths, heights = ((ratio[:, None] * sizes[None]).flatten() for ratio in (1 / high, high))
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2


class AlignedRoIAlign(MultiScaleRoIAlign):
    """RoIAlign that takes the centre of a cell as its place (half a cell off torchvision's), on a pyramid.

    With ``sampling_ratio=0`` a bin has as many samples as it has cells in each direction, rounded up.
    """

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool [R, C, h, w] from maps by name and the boxes [R_i, 4] of each image."""
        maps = _filter_input(x, self.featmap_names)
        scales: Any = self.scales  # type: ignore[has-type]
        find_levels: Any = self.map_levels  # type: ignore[has-type]
        if scales is None or find_levels is None:
            scales, find_levels = _setup_scales(maps, image_shapes, self.canonical_scale, self.canonical_level)
            self.scales, self.map_levels = scales, find_levels
        image = torch.cat([torch.full_like(one[:, :1], float(index)) for index, one in enumerate(boxes)])
        regions = torch.cat([image, torch.cat(boxes)], dim=1)
        size, ratio = (int(self.output_size[0]), int(self.output_size[1])), int(self.sampling_ratio)
        if len(maps) == 1:
            return roi_align(maps[0], regions, size, scales[0], ratio, aligned=True)
        levels = find_levels(boxes)
        rows, pooled = [], []  # put together by sorting, which exporters can trace for any number of boxes
        for number, (level, scale) in enumerate(zip(maps, scales, strict=True)):
            rows.append(torch.nonzero(levels == number).flatten())
            pooled.append(roi_align(level, regions[rows[-1]], size, scale, ratio, aligned=True))
        return torch.cat(pooled)[torch.cat(rows).argsort()]


def limited(model: Any) -> Any:
    """A two-stage model of torchvision in which no step shrinks a box by more than 1000 / 16; torchvision limits growing only.

    Args:
        model: the model; the box coders of its region proposal network and its RoI heads are replaced.

    Returns:
        The model.
    """
    for part in (model.rpn, model.roi_heads):
        if not isinstance(part.box_coder, StageBoxCoder):
            part.box_coder = StageBoxCoder([1 / weight for weight in part.box_coder.weights])
    return model


class RetinaNet(TorchvisionRetinaNet):
    """torchvision's RetinaNet whose detections have an area.

    Two differences: boxes that lie outside of the image are dropped before NMS (torchvision keeps them as boxes without area,
    among the best as any other), and a box neither grows nor shrinks by more than 1000 / 16 (torchvision limits growing only).
    """

    drop_empty = True

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        """As torchvision's."""
        super().__init__(*arguments, **settings)
        self.box_coder = StageBoxCoder((1.0, 1.0, 1.0, 1.0))

    def postprocess_detections(
        self,
        head_outputs: dict[str, list[Tensor]],
        anchors: list[list[Tensor]],
        image_shapes: Sequence[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """The final boxes of each image.

        Args:
            head_outputs: ``cls_logits`` and ``bbox_regression`` of each level, [B, P_l, K] and [B, P_l, 4].
            anchors: [P_l, 4] of each level, for each image.
            image_shapes: height and width of each image.

        Returns:
            For each image ``boxes`` [D, 4], ``scores`` [D] and ``labels`` [D], best first.
        """
        counts = [level.shape[1] for level in head_outputs["cls_logits"]]
        logits, deltas = (torch.cat(head_outputs[name], dim=1) for name in ("cls_logits", "bbox_regression"))
        found = []
        for image, size in enumerate(image_shapes):
            chosen = best_of_levels(logits[image].sigmoid(), counts, self.score_thresh, self.topk_candidates)
            values, index, labels = chosen
            boxes = self.box_coder.decode_single(deltas[image, index], torch.cat(anchors[image])[index])
            boxes = clip_boxes_to_image(boxes, size)
            filled = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
            boxes, values, labels = boxes[filled], values[filled], labels[filled]
            keep = batched_nms(boxes, values, labels, self.nms_thresh)[: self.detections_per_img]
            found.append({"boxes": boxes[keep], "scores": values[keep], "labels": labels[keep]})
        return found
