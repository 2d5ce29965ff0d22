"""Crops of boxes from images by a spatial transformer, differentiable with respect to the boxes.

Jaderberg et al., "Spatial Transformer Networks", NeurIPS 2015, with the affine map of an axis-aligned box.

Shape letters: B images, C channels, M boxes of the whole batch, S side of a crop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.functional.precision import full_precision

Size = tuple[int, int]


def crop_boxes(images: Tensor, boxes_xyxy: Tensor, image: Tensor, size: int, sizes_hw: Sequence[Size] | None = None) -> Tensor:
    """Resample each box to S x S: one bilinear sample in the middle of each of its S x S bins; the aspect is not kept.

    Equals ``torchvision.ops.roi_align`` with ``aligned=True, sampling_ratio=1`` inside the image, but the gradient also flows
    to the boxes. Pixels beyond the image are zeros. Large boxes are sampled, not averaged. ``grid_sample`` is called once for
    each image, so that an image is not copied for each of its boxes. Coordinates are at least float32, also under autocast.

    Args:
        images: [B, C, H, W].
        boxes_xyxy: [M, 4] pixels.
        image: [M] index of each box's image.
        size: S.
        sizes_hw: valid height and width of each image; pixels beyond it count as zeros. None: all pixels of ``images``.

    Returns:
        [M, C, S, S], in the order of the boxes.

    Example:
        >>> pixels = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> crop_boxes(pixels, torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([0]), size=2)
        tensor([[[[ 9., 10.],
                  [13., 14.]]]])
    """
    boxes_xyxy = boxes_xyxy if boxes_xyxy.dtype == torch.float64 else boxes_xyxy.float()
    order = image.argsort(stable=True)
    counts = torch.bincount(image, minlength=len(images)).tolist()
    sizes = sizes_hw or [(images.shape[-2], images.shape[-1])] * len(images)
    middles = (torch.arange(size, device=boxes_xyxy.device, dtype=boxes_xyxy.dtype) + 0.5) / size
    crops = [boxes_xyxy.new_zeros(0, images.shape[1], size, size)]
    with full_precision(images.device):
        for index, (boxes, (height, width)) in enumerate(zip(torch.split(boxes_xyxy[order], counts), sizes, strict=True)):
            if len(boxes):
                corner, side = boxes[:, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None]
                places = (corner + side * middles[:, None]) / boxes.new_tensor([width, height]) * 2 - 1  # [m, S, 2]
                columns, rows = places[:, None, :, 0].expand(-1, size, -1), places[:, :, None, 1].expand(-1, -1, size)
                grid = torch.stack([columns, rows], dim=-1).reshape(1, -1, size, 2)
                shown = images[index, None, :, :height, :width].to(boxes.dtype)
                sampled = F.grid_sample(shown, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
                crops.append(sampled[0].reshape(-1, len(boxes), size, size).transpose(0, 1))
    return torch.cat(crops)[order.argsort()]


def clamp_boxes(boxes_xyxy: Tensor, image: Tensor, sizes_hw: Sequence[Size]) -> Tensor:
    """Clip boxes to their images; a side that is moved has no gradient.

    Only left and top are raised to 0, and only right and bottom are lowered to the image's size. A box that lies wholly outside
    therefore gets a width or height of 0 or less.

    Args:
        boxes_xyxy: [M, 4] pixels.
        image: [M] index of each box's image.
        sizes_hw: valid height and width of each image.

    Example:
        >>> clamp_boxes(torch.tensor([[-2.0, 1.0, 9.0, 3.0], [9.0, 0.0, 12.0, 2.0]]), torch.tensor([0, 0]), [(4, 8)]).tolist()
        [[0.0, 1.0, 8.0, 3.0], [9.0, 0.0, 8.0, 2.0]]
    """
    limits = boxes_xyxy.new_tensor([[width, height] for height, width in sizes_hw]).reshape(-1, 2)[image]
    corner, opposite = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    # Not clamp and minimum: what gradient they give to a side that lies on the border depends on torch's version.
    return torch.cat([torch.where(corner < 0, 0.0, corner), torch.where(opposite > limits, limits, opposite)], dim=1)
