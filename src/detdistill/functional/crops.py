"""Objects cut out of images by a spatial transformer: differentiable with respect to the boxes.

Jaderberg et al., "Spatial Transformer Networks", NeurIPS 2015, with the affine map of an axis-aligned box.

Shape letters: B images, C channels, M boxes of the whole batch, S side of a crop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


def crop_boxes(images: Tensor, boxes_xyxy: Tensor, image: Tensor, size: int, sizes_hw: Sequence[Size] | None = None) -> Tensor:
    """Each box resampled to S x S: one bilinear sample in the middle of each of its S x S cells; the aspect is not kept.

    Equals ``torchvision.ops.roi_align`` with ``aligned=True, sampling_ratio=1`` inside the image, but the gradient flows into
    the boxes too. Beyond the image there are zeros. Large boxes are sampled, not averaged. One call of ``grid_sample`` for
    each image, so that no image is copied for each of its boxes. Coordinates are float32 or more, whatever autocast says.

    Args:
        images: [B, C, H, W].
        boxes_xyxy: [M, 4] pixels.
        image: [M] the image of each box.
        size: S.
        sizes_hw: valid height and width of each image; what lies beyond counts as zeros. None: all of ``images``.

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
    with torch.autocast(images.device.type, enabled=False):
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
    """Left and top at least 0, right and bottom at most the image's; no gradient on a side that was moved.

    A box wholly outside comes out with a side of 0 or less, which tells it from all others.

    Args:
        boxes_xyxy: [M, 4] pixels.
        image: [M] the image of each box.
        sizes_hw: valid height and width of each image.

    Example:
        >>> clamp_boxes(torch.tensor([[-2.0, 1.0, 9.0, 3.0], [9.0, 0.0, 12.0, 2.0]]), torch.tensor([0, 0]), [(4, 8)]).tolist()
        [[0.0, 1.0, 8.0, 3.0], [9.0, 0.0, 8.0, 2.0]]
    """
    limits = boxes_xyxy.new_tensor([[width, height] for height, width in sizes_hw]).reshape(-1, 2)[image]
    corner, opposite = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    # Not clamp and minimum: what gradient they give to a side that lies on the border depends on torch's version.
    return torch.cat([torch.where(corner < 0, 0.0, corner), torch.where(opposite > limits, limits, opposite)], dim=1)
