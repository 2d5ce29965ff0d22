"""UniKD's loss, and the random boxes of its positional queries. The method and its source are in ``method.py``.

Shape letters: B images, N queries of each kind, C channels, L levels of the teacher, G boxes of an image, K classes.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou, clip_boxes_to_image

from detdistill.functional.boxes import paired_iou
from detdistill.functional.counting import mean_over_ranks

Kind = Literal["content", "positional"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TRIES = 20
"""Number of draws of a jittered box; if all fail, the box itself is used."""
ROUNDS = 50
"""Number of draws of background boxes around the objects; further draws are uniform over the image."""


def unikd_loss(student: Tensor, teacher: Tensor, positive: Tensor) -> Tensor:
    """Mean squared difference of the positive embeddings plus that of the negative embeddings (Eq. 8).

    Both means are over all images of the batch (our choice). A mean over no embeddings is 0.

    Args:
        student: [B, N, C] embeddings; gradient flows.
        teacher: [B, N, C] embeddings, treated as constant.
        positive: [B, N] bool: the query belongs to an object.

    Returns:
        [] the loss, unweighted.

    Example:
        >>> import torch
        >>> one, zero = torch.ones(1, 4, 3), torch.zeros(1, 4, 3)
        >>> float(unikd_loss(one, zero, torch.tensor([[True, False, False, False]])))
        2.0
    """
    squares = (student - teacher.detach()).square().mean(dim=-1)
    near, far = mean_over_ranks(torch.stack([positive.sum(), (~positive).sum()]), least=1)
    return (squares * positive).sum() / near + (squares * ~positive).sum() / far


def unikd_boxes(
    boxes_xyxy: Tensor, size_hw: tuple[int, int], count: int, generator: torch.Generator, alpha: float = 0.6, beta: float = 0.4
) -> tuple[Tensor, int]:
    """Draw a jittered copy of each object's box, then background boxes near the objects (Eq. 3).

    Jitter moves the centre by up to 15 % of the sides and scales each side by a factor from e^-0.25 to e^0.25. Background
    boxes are object boxes whose centres are moved by up to twice the sides and whose sides are scaled by a factor from 1/e
    to e. Without objects, background boxes lie anywhere in the image.

    Args:
        boxes_xyxy: [G, 4] boxes of the objects in pixels. If G >= N, the N - 1 largest are kept.
        size_hw: height and width in pixels of the valid image.
        count: N, at least 2.
        generator: random number generator on the CPU.
        alpha: a jittered box overlaps its object by an IoU above this.
        beta: a background box overlaps every object by an IoU below this.

    Returns:
        [N, 4] boxes in pixels (xyxy) inside the image, and the number of jittered boxes. The jittered boxes come first, in
        the order of the objects.
    """
    boxes = boxes_xyxy.detach().cpu().float()
    height, width = size_hw
    limit = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    if len(boxes) >= count:
        largest = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).topk(count - 1).indices
        boxes = boxes[largest.sort().values]
    near = _jittered(boxes, size_hw, alpha, generator)
    far = [near[:0]]
    missing = count - len(near)
    for turn in range(2 * ROUNDS):
        drawn = 4 * missing + 16
        around = len(boxes) > 0 and turn < ROUNDS
        tried = _scattered(boxes, size_hw, drawn, generator) if around else _anywhere(size_hw, drawn, generator)
        if len(boxes):
            tried = tried[box_iou(tried, boxes).amax(dim=1) < beta]
        far.append(tried[:missing])
        missing -= len(far[-1])
        if missing == 0:
            break
    if missing:  # an object that fills the image leaves little else: a tiny box in a corner
        far.append(torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(missing, 4))
    return torch.cat([near, *far]), len(near)


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def _moved(boxes: Tensor, size_hw: tuple[int, int], shift: float, scale: float, generator: torch.Generator) -> Tensor:
    """Boxes [..., 4], centres moved by up to ``shift`` sides, sides scaled by up to ``e^scale``, clipped to the image."""
    center_size = box_convert(boxes, "xyxy", "cxcywh")
    centers = center_size[..., :2] + _uniform(generator, -shift, shift, *boxes.shape[:-1], 2) * center_size[..., 2:]
    sides = center_size[..., 2:] * _uniform(generator, -scale, scale, *boxes.shape[:-1], 2).exp()
    return clip_boxes_to_image(box_convert(torch.cat([centers, sides], dim=-1), "cxcywh", "xyxy"), size_hw)


def _jittered(boxes: Tensor, size_hw: tuple[int, int], alpha: float, generator: torch.Generator) -> Tensor:
    """Take for each box the first of ``TRIES`` draws with enough overlap; the box itself if no draw has it."""
    tried = _moved(boxes.expand(TRIES, -1, -1), size_hw, 0.15, 0.25, generator)
    good = paired_iou(tried, boxes.expand_as(tried)) > alpha  # [TRIES, G]
    first = tried.gather(0, good.int().argmax(dim=0)[None, :, None].expand(1, -1, 4))[0]
    return torch.where(good.any(dim=0)[:, None], first, boxes)


def _scattered(boxes: Tensor, size_hw: tuple[int, int], count: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randint(len(boxes), (count,), generator=generator)
    tried = _moved(boxes[chosen], size_hw, 2.0, 1.0, generator)
    return tried[(tried[:, 2:] - tried[:, :2] >= 4).all(dim=1)]


def _anywhere(size_hw: tuple[int, int], count: int, generator: torch.Generator) -> Tensor:
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([size_hw[1], size_hw[0]])
    boxes = corners.flatten(1)
    return boxes[(boxes[:, 2:] - boxes[:, :2] >= min(4, min(size_hw) / 2)).all(dim=1)]
