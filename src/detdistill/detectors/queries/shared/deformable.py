"""What the adapters of DETRs with deformable attention share: flat memory, dense attention maps, losses of a set of queries.

Shape letters: B images, L decoder layers, N queries, D width, K classes, S cells of all levels, M matched pairs of the batch.
Boxes are cxcywh in parts of the *frame*: what the model's own coordinates are relative to. For Deformable DETR that is the
valid image; for the RT-DETR family, which knows no padding, the whole padded tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.torchvision.targets import whole_indices
from detdistill.structures import IGNORED, NEGATIVE, Batch, Movable, map_tensors

Shapes = tuple[tuple[int, int], ...]
"""Height and width of each level."""


# ------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory:
    """The maps that the decoder reads, in a row, with what the library's layers want to know about them."""

    tokens: Tensor
    """[B, S, D]."""
    shapes: Shapes
    sizes: Tensor
    """[levels, 2] the same as a tensor."""
    starts: Tensor
    """[levels] index of each level's first token."""

    def where(self) -> dict[str, Any]:
        """Keyword arguments of the library's attention layers."""
        return {"spatial_shapes": self.sizes, "spatial_shapes_list": list(self.shapes), "level_start_index": self.starts}


def flatten(maps: Sequence[Tensor]) -> Memory:
    """Maps [B, D, H, W] as tokens, level after level, row after row."""
    shapes = tuple((int(level.shape[-2]), int(level.shape[-1])) for level in maps)
    sizes = torch.tensor(shapes, dtype=torch.long, device=maps[0].device)
    starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))
    return Memory(torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1), shapes, sizes, starts)


def unflatten(tokens: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    """The inverse of ``flatten``."""
    levels = tokens.split([height * width for height, width in shapes], dim=1)
    return tuple(level.transpose(1, 2).unflatten(2, shape).contiguous() for level, shape in zip(levels, shapes, strict=True))


@contextmanager
def still_statistics(*modules: nn.Module) -> Iterator[None]:
    """BatchNorm inside leaves its running statistics alone: a second pass over the same batch must not count twice."""
    norms = [norm for module in modules for norm in module.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


# ---------------------------------------------------------------------------------------------------------- attention


@dataclass
class Looks:
    """The attention of each decoder layer, in order, as ``watched`` fills it."""

    cross: list[Tensor]
    """Spread over all cells: [B, heads, N, S]."""
    among: list[Tensor]
    """Of the queries among themselves: [B, heads, N, N]."""

    @property
    def attention(self) -> Tensor | None:
        """[L, B, heads, N, S]; None if nothing was watched."""
        return torch.stack(self.cross) if self.cross else None

    @property
    def self_attention(self) -> Tensor | None:
        """[L, B, heads, N, N]; None if nothing was watched."""
        return torch.stack(self.among) if self.among else None


@contextmanager
def watched(layers: Sequence[Any], wanted: bool, queries: slice = slice(None)) -> Iterator[Looks]:
    """Note the attention of decoder layers while they run, deformable ones as dense maps; nothing when not ``wanted``.

    Args:
        layers: of the decoder.
        wanted: whether to note anything.
        queries: whose attention is noted, of those that are decoded together. They must attend to each other only.
    """
    looks = Looks([], [])
    hooks = []
    if wanted:
        for layer in layers:
            cross = layer.encoder_attn if hasattr(layer, "encoder_attn") else layer.cross_attn
            hooks.append(cross.register_forward_hook(partial(_note, looks, queries), with_kwargs=True))
            hooks.append(layer.self_attn.register_forward_hook(partial(_note_among, looks, queries), with_kwargs=True))
    try:
        yield looks
    finally:
        for hook in hooks:
            hook.remove()


def _note(looks: Looks, queries: slice, module: Any, arguments: tuple[Any, ...], given: dict[str, Any], result: Any) -> None:
    """Repeat how the library computes the sampling points (it does not return them) and spread the weights."""
    hidden, position, reference = given["hidden_states"], given.get("position_embeddings"), given["reference_points"]
    hidden = (hidden if position is None else hidden + position)[:, queries]
    shapes = tuple((int(height), int(width)) for height, width in given["spatial_shapes_list"])
    batch, count = hidden.shape[:2]
    heads, counts = int(module.n_heads), point_counts(module)
    offsets = module.sampling_offsets(hidden).reshape(batch, count, heads, sum(counts), 2)
    reference = (
        reference[:, queries]
        .expand(-1, -1, len(shapes), -1)[:, :, None]
        .repeat_interleave(torch.tensor(counts, device=hidden.device), dim=3, output_size=sum(counts))
    )  # [B, N, 1, points, 2 or 4]
    if reference.shape[-1] == 2:
        per_point = torch.tensor([shape[::-1] for shape, count in zip(shapes, counts, strict=True) for _ in range(count)])
        points = reference + offsets / per_point.to(offsets)
    else:
        share = torch.tensor([1 / count for count in counts for _ in range(count)]).to(offsets)[:, None]
        points = reference[..., :2] + offsets * share * reference[..., 2:] * getattr(module, "offset_scale", 0.5)
    method = getattr(module, "method", None) or getattr(module, "decoder_method", "default")
    weights = result[1][:, queries].reshape(batch, count, heads, sum(counts))
    looks.cross.append(dense_attention(weights, points, shapes, counts, nearest=method == "discrete"))


def _note_among(
    looks: Looks, queries: slice, module: Any, arguments: tuple[Any, ...], given: dict[str, Any], result: Any
) -> None:
    """Compute the self-attention once more: the library's fused forms return none, and its plain form rounds otherwise."""
    hidden, position, mask = given.get("hidden_states"), given.get("position_embeddings"), given.get("attention_mask")
    hidden = arguments[0] if hidden is None else hidden
    hidden = (hidden if position is None else hidden + position)[:, queries]
    asking, keys = (
        layer(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for layer in (module.q_proj, module.k_proj)
    )
    scores = asking @ keys.transpose(2, 3) * module.scaling
    looks.among.append((scores if mask is None else scores + mask[..., queries, queries]).softmax(dim=-1))


def point_counts(attention: Any) -> list[int]:
    """Sampling points of a deformable attention module on each level."""
    listed = getattr(attention, "num_points_list", None) or getattr(attention, "n_points_list", None)
    return list(listed) if listed else [int(attention.n_points)] * int(attention.n_levels)


def dense_attention(weights: Tensor, points: Tensor, shapes: Shapes, counts: Sequence[int], nearest: bool = False) -> Tensor:
    """Deformable attention as ordinary attention over all cells: ``map @ value`` is what the module computes.

    Each sampling point's weight goes to the four cells that bilinear sampling reads, in the shares it reads them; shares
    outside of the map are lost, as zero-padding loses them.

    Args:
        weights: [B, N, heads, points].
        points: [B, N, heads, points, 2] x and y in 0..1 of each level's map.
        shapes: of the levels.
        counts: points of each level.
        nearest: the points read their nearest cell, clamped to the map (RT-DETRv2's ``discrete`` sampling).

    Returns:
        [B, heads, N, S], levels in order, row after row.
    """
    maps = []
    for (height, width), weight, point in zip(shapes, weights.split(list(counts), 3), points.split(list(counts), 3), strict=True):
        dense = weight.new_zeros(*weight.shape[:3], height * width)
        size = torch.tensor([width, height], device=point.device, dtype=point.dtype)
        if nearest:
            cell = (point * size + 0.5).to(torch.int64)
            index = cell[..., 1].clamp(0, height - 1) * width + cell[..., 0].clamp(0, width - 1)
            maps.append(dense.scatter_add(3, index, weight))
            continue
        corner = (point * size - 0.5).floor()
        part = point * size - 0.5 - corner
        for right in (0, 1):
            for below in (0, 1):
                x, y = corner[..., 0].long() + right, corner[..., 1].long() + below
                share = (part[..., 0] if right else 1 - part[..., 0]) * (part[..., 1] if below else 1 - part[..., 1])
                inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
                index = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
                dense = dense.scatter_add(3, index, (weight * share * inside).to(dense.dtype))
        maps.append(dense)
    return torch.cat(maps, dim=3).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------- sets and losses


@dataclass(frozen=True)
class Outputs(Movable):
    """One set of predictions, as the library's criterion sees it: of a decoder layer, the encoder, or denoising queries."""

    logits: Tensor
    """[B, N, K] sigmoid logits."""
    boxes: Tensor
    """[B, N, 4] cxcywh as fractions of the frame."""

    def take(self, start: int, stop: int | None) -> Self:
        """A range of the queries."""
        return map_tensors(self, lambda tensor: tensor[:, start:stop])


@dataclass(frozen=True)
class Pairs(Movable):
    """An assignment of one set of queries, spelled out."""

    image: Tensor
    """[M] index of the image."""
    query: Tensor
    """[M]."""
    labels: Tensor
    """[M]."""
    boxes: Tensor
    """[M, 4] cxcywh as fractions of the frame."""
    weights: Tensor
    """[M]."""
    counted: Tensor
    """[B, N] weight of every query; 0 for ignored ones."""


@torch.no_grad()
def hungarian(matcher: Callable[..., Any], outputs: Outputs, labels: Sequence[dict[str, Tensor]], batch: Batch) -> Tensor:
    """The library's matching as a value: [B, N] index of the ground-truth box (crowd boxes counted), -1 for none."""
    matched = torch.full(outputs.logits.shape[:2], NEGATIVE, device=outputs.logits.device)
    if not any(len(label["boxes"]) for label in labels):  # the library's matcher cannot do without any box
        return matched
    found = matcher({"logits": outputs.logits, "pred_boxes": outputs.boxes}, list(labels))
    for image, ((queries, boxes), target) in enumerate(zip(found, batch.targets, strict=True)):
        matched[image, queries.to(matched.device)] = boxes.to(matched.device)
        matched[image] = whole_indices(matched[image], target)
    return matched


def pairs_of(matched: Tensor, weights: Tensor | None, labels: Sequence[dict[str, Tensor]], dtype: torch.dtype) -> Pairs:
    """Which query answers for which box.

    Args:
        matched: [B, N] index of the ground-truth box, -1 or -2 (``Assignment.matched`` of one layer).
        weights: [B, N] or None.
        labels: all boxes of each image, crowd boxes too.
        dtype: of the boxes.
    """
    image, query = torch.nonzero(matched >= 0, as_tuple=True)
    index = matched[image, query]
    classes, boxes = index.clone(), torch.zeros(len(index), 4, device=matched.device, dtype=dtype)
    for number, label in enumerate(labels):
        mine = image == number
        classes[mine] = label["class_labels"][index[mine]]
        boxes[mine] = label["boxes"][index[mine]].to(dtype)
    every = torch.ones(matched.shape, device=matched.device, dtype=dtype) if weights is None else weights.to(dtype)
    return Pairs(image, query, classes, boxes, every[image, query], every.masked_fill(matched == IGNORED, 0.0))


def corners(boxes: Tensor) -> Tensor:
    """Boxes cxcywh as xyxy."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], dim=-1)


def overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """IoU [M] and generalized IoU [M] of boxes [M, 4] (cxcywh), pair by pair."""
    first, second = corners(first), corners(second)
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (first, second)]
    inside = (torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])).clamp(min=0)
    around = (torch.maximum(first[:, 2:], second[:, 2:]) - torch.minimum(first[:, :2], second[:, :2])).clamp(min=0)
    intersection, hull = inside[:, 0] * inside[:, 1], around[:, 0] * around[:, 1]
    union = areas[0] + areas[1] - intersection
    iou = intersection / union
    return iou, iou - (hull - union) / hull


def box_losses(outputs: Outputs, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Sums over the pairs of L1 and of 1 - GIoU; a zero that is connected to the boxes without any pair."""
    predicted = outputs.boxes[pairs.image, pairs.query]
    distance = (predicted - pairs.boxes).abs().sum(dim=-1)
    return (distance * pairs.weights).sum(), ((1 - overlaps(predicted, pairs.boxes)[1]) * pairs.weights).sum()


def focal_loss(outputs: Outputs, pairs: Pairs, alpha: float, gamma: float = 2.0) -> Tensor:
    """Sum over queries and classes of the sigmoid focal loss (Lin et al., Eq. 5)."""
    wanted = torch.zeros_like(outputs.logits)
    wanted[pairs.image, pairs.query, pairs.labels] = 1.0
    probability = outputs.logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(outputs.logits, wanted, reduction="none")
    right = probability * wanted + (1 - probability) * (1 - wanted)
    share = alpha * wanted + (1 - alpha) * (1 - wanted)
    return ((share * (1 - right) ** gamma * entropy).sum(dim=-1) * pairs.counted).sum()


def varifocal_loss(outputs: Outputs, pairs: Pairs, alpha: float, gamma: float) -> Tensor:
    """Sum over queries and classes of the varifocal loss; the matched class wants the IoU (Zhang et al., Eq. 2)."""
    iou = overlaps(outputs.boxes[pairs.image, pairs.query].detach(), pairs.boxes)[0]
    where = (pairs.image, pairs.query, pairs.labels)
    wanted, positive = torch.zeros_like(outputs.logits), torch.zeros_like(outputs.logits)
    wanted[where], positive[where] = iou.to(wanted.dtype), 1.0
    weight = alpha * outputs.logits.detach().sigmoid().pow(gamma) * (1 - positive) + wanted
    entropy = F.binary_cross_entropy_with_logits(outputs.logits, wanted, weight=weight, reduction="none")
    return (entropy.sum(dim=-1) * pairs.counted).sum()
