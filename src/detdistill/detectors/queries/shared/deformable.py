"""Shared code of the DETR adapters with deformable attention: flat memory, dense attention maps, losses of a set of queries.

Shape letters: B images, L decoder layers, N queries, D width, K classes, S cells of all levels, M matched pairs of the batch.
Boxes are cxcywh as fractions of the *frame*, the reference of the model's coordinates. For Deformable DETR the frame is the
valid image. For the RT-DETR family, which ignores padding masks, the frame is the whole padded tensor.
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
    """Flattened maps for the decoder, with the shape arguments of transformers' layers."""

    tokens: Tensor
    """[B, S, D]."""
    shapes: Shapes
    sizes: Tensor
    """[levels, 2] ``shapes`` as a tensor."""
    starts: Tensor
    """[levels] index of each level's first token."""

    def where(self) -> dict[str, Any]:
        """Return the keyword arguments of transformers' attention layers."""
        return {"spatial_shapes": self.sizes, "spatial_shapes_list": list(self.shapes), "level_start_index": self.starts}


def flatten(maps: Sequence[Tensor]) -> Memory:
    """Flatten maps [B, D, H, W] to tokens, level after level, row after row."""
    shapes = tuple((int(level.shape[-2]), int(level.shape[-1])) for level in maps)
    sizes = torch.tensor(shapes, dtype=torch.long, device=maps[0].device)
    starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))
    return Memory(torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1), shapes, sizes, starts)


def unflatten(tokens: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    """Invert ``flatten``."""
    levels = tokens.split([height * width for height, width in shapes], dim=1)
    images, _, width = tokens.shape
    pairs = zip(levels, shapes, strict=True)
    return tuple(level.transpose(1, 2).reshape(images, width, *shape).contiguous() for level, shape in pairs)


@contextmanager
def still_statistics(*modules: nn.Module) -> Iterator[None]:
    """Context in which BatchNorm keeps its running statistics, so that a second pass over a batch does not count twice."""
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
    """Attention of the decoder layers, in order; filled by ``watched``."""

    cross: list[tuple[Tensor, Tensor]]
    """Weights and points of each layer's cross-attention, see ``dense_attention``."""
    among: list[Tensor]
    """Self-attention of the queries in each layer, [B, heads, N, N]."""
    dense: Callable[[Tensor, Tensor], Tensor] | None = None
    """Converts weights and points to maps; the same for all layers."""

    @property
    def attention(self) -> Tensor | None:
        """Cross-attention of all layers over all cells, [L, B, heads, N, S]; None: nothing was recorded."""
        if self.dense is None:
            return None
        weights, points = (torch.stack(parts) for parts in zip(*self.cross, strict=True))
        return self.dense(weights, points)

    @property
    def self_attention(self) -> Tensor | None:
        """Stack the self-attention of all layers, [L, B, heads, N, N]; None: nothing was recorded."""
        return torch.stack(self.among) if self.among else None


@contextmanager
def watched(layers: Sequence[Any], wanted: bool, queries: slice = slice(None)) -> Iterator[Looks]:
    """Record the attention of decoder layers while they run; deformable attention is recorded as dense maps.

    Args:
        layers: decoder layers.
        wanted: False: record nothing.
        queries: range of the decoded queries to record. These queries must attend to each other only.
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
    """Recompute the sampling points, which transformers does not return."""
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
    looks.cross.append((weights, points))
    looks.dense = partial(dense_attention, shapes=shapes, counts=counts, nearest=method == "discrete")


def _note_among(
    looks: Looks, queries: slice, module: Any, arguments: tuple[Any, ...], given: dict[str, Any], result: Any
) -> None:
    """Recompute the self-attention: transformers' fused forms do not return it, and the plain form rounds differently."""
    hidden, position, mask = given.get("hidden_states"), given.get("position_embeddings"), given.get("attention_mask")
    hidden = arguments[0] if hidden is None else hidden
    hidden = (hidden if position is None else hidden + position)[:, queries]
    asking, keys = (
        layer(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for layer in (module.q_proj, module.k_proj)
    )
    scores = asking @ keys.transpose(2, 3) * module.scaling
    looks.among.append((scores if mask is None else scores + mask[..., queries, queries]).softmax(dim=-1))


def point_counts(attention: Any) -> list[int]:
    """Return the number of sampling points of a deformable attention module, for each level."""
    listed = getattr(attention, "num_points_list", None) or getattr(attention, "n_points_list", None)
    return list(listed) if listed else [int(attention.n_points)] * int(attention.n_levels)


def dense_attention(weights: Tensor, points: Tensor, shapes: Shapes, counts: Sequence[int], nearest: bool = False) -> Tensor:
    """Convert deformable attention to dense attention maps over all cells: ``map @ value`` equals the module's result.

    The weight of each sampling point is distributed to the four cells of bilinear sampling by their interpolation weights.
    Parts outside the map are dropped, which equals zero padding.

    Args:
        weights: [..., N, heads, points] attention weights.
        points: [..., N, heads, points, 2] x and y as fractions (0..1) of each level's map.
        shapes: height and width of each level.
        counts: number of points on each level.
        nearest: True: each point reads its nearest cell, clamped to the map (RT-DETRv2's ``discrete`` sampling).

    Returns:
        [..., heads, N, S], levels in order, row after row.
    """
    start, index, shares = 0, [], []
    # All points are added into one tensor of maps: these are so large that each copy of them counts.
    for (height, width), weight, point in zip(
        shapes, weights.split(list(counts), -1), points.split(list(counts), -2), strict=True
    ):
        size = torch.tensor([width, height], device=point.device, dtype=point.dtype)
        if nearest:
            cell = (point * size + 0.5).to(torch.int64)
            index.append(start + cell[..., 1].clamp(0, height - 1) * width + cell[..., 0].clamp(0, width - 1))
            shares.append(weight)
        else:
            for places, share in _corners(point * size - 0.5, (height, width)):
                index.append(start + places)
                shares.append((weight * share).to(weight.dtype))
        start += height * width
    dense = weights.new_zeros(*weights.shape[:-1], start)
    return dense.scatter_add_(-1, torch.cat(index, dim=-1), torch.cat(shares, dim=-1)).transpose(-3, -2)


def _corners(point: Tensor, size_hw: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Index and share of the four cells around each point [..., 2], x and y in cells; a share is 0 outside the map."""
    height, width = size_hw
    corner = point.floor()
    part = point - corner
    for right in (0, 1):
        for below in (0, 1):
            x, y = corner[..., 0].long() + right, corner[..., 1].long() + below
            share = (part[..., 0] if right else 1 - part[..., 0]) * (part[..., 1] if below else 1 - part[..., 1])
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            yield y.clamp(0, height - 1) * width + x.clamp(0, width - 1), share * inside


# ---------------------------------------------------------------------------------------------------- sets and losses


@dataclass(frozen=True)
class Outputs(Movable):
    """Predictions of one set of queries for the losses: of a decoder layer, the encoder, or the denoising queries."""

    logits: Tensor
    """[B, N, K] sigmoid logits."""
    boxes: Tensor
    """[B, N, 4] cxcywh as fractions of the frame."""

    def take(self, start: int, stop: int | None) -> Self:
        """Select a range of the queries."""
        return map_tensors(self, lambda tensor: tensor[:, start:stop])


@dataclass(frozen=True)
class Pairs(Movable):
    """Matched pairs of queries and ground-truth boxes, with their weights."""

    image: Tensor
    """[M] index of the image of each pair."""
    query: Tensor
    """[M]."""
    labels: Tensor
    """[M]."""
    boxes: Tensor
    """[M, 4] cxcywh as fractions of the frame."""
    weights: Tensor
    """[M]."""
    counted: Tensor
    """[B, N] weight of each query; 0 for ignored queries."""


@torch.no_grad()
def hungarian(matcher: Callable[..., Any], outputs: Outputs, labels: Sequence[dict[str, Tensor]], batch: Batch) -> Tensor:
    """Convert transformers' matching to indices [B, N] of the ground-truth boxes (crowd boxes counted); -1: no box.

    All are -1 if a prediction is not finite, on which transformers' matcher fails.
    """
    matched = torch.full(outputs.logits.shape[:2], NEGATIVE, device=outputs.logits.device)
    if not any(len(label["boxes"]) for label in labels):  # the matcher of transformers fails on a batch without boxes
        return matched
    if not (bool(torch.isfinite(outputs.boxes).all()) and bool(torch.isfinite(outputs.logits).all())):
        return matched
    found = matcher({"logits": outputs.logits, "pred_boxes": outputs.boxes}, list(labels))
    for image, ((queries, boxes), target) in enumerate(zip(found, batch.targets, strict=True)):
        matched[image, queries.to(matched.device)] = boxes.to(matched.device)
        matched[image] = whole_indices(matched[image], target)
    return matched


def pairs_of(matched: Tensor, weights: Tensor | None, labels: Sequence[dict[str, Tensor]], dtype: torch.dtype) -> Pairs:
    """List the matched pairs of queries and ground-truth boxes.

    Args:
        matched: [B, N] index of the ground-truth box, -1 or -2 (``Assignment.matched`` of one layer).
        weights: [B, N] weights; None: all 1.
        labels: all boxes of each image, crowd boxes included.
        dtype: dtype of the boxes.
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
    """Convert boxes from cxcywh to xyxy."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], dim=-1)


def overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Compute IoU [M] and generalized IoU [M] of paired boxes [M, 4] (cxcywh)."""
    first, second = corners(first), corners(second)
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (first, second)]
    inside = (torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])).clamp(min=0)
    around = (torch.maximum(first[:, 2:], second[:, 2:]) - torch.minimum(first[:, :2], second[:, :2])).clamp(min=0)
    intersection, hull = inside[:, 0] * inside[:, 1], around[:, 0] * around[:, 1]
    union = areas[0] + areas[1] - intersection
    iou = intersection / union
    return iou, iou - (hull - union) / hull


def box_losses(outputs: Outputs, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Sum L1 and 1 - GIoU over the pairs; without pairs, the result is a zero connected to the boxes' graph."""
    predicted = outputs.boxes[pairs.image, pairs.query]
    distance = (predicted - pairs.boxes).abs().sum(dim=-1)
    return (distance * pairs.weights).sum(), ((1 - overlaps(predicted, pairs.boxes)[1]) * pairs.weights).sum()


def focal_loss(outputs: Outputs, pairs: Pairs, alpha: float, gamma: float = 2.0) -> Tensor:
    """Sum the sigmoid focal loss over queries and classes (Lin et al., Eq. 5)."""
    wanted = torch.zeros_like(outputs.logits)
    wanted[pairs.image, pairs.query, pairs.labels] = 1.0
    probability = outputs.logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(outputs.logits, wanted, reduction="none")
    right = probability * wanted + (1 - probability) * (1 - wanted)
    share = alpha * wanted + (1 - alpha) * (1 - wanted)
    return ((share * (1 - right) ** gamma * entropy).sum(dim=-1) * pairs.counted).sum()


def varifocal_loss(outputs: Outputs, pairs: Pairs, alpha: float, gamma: float) -> Tensor:
    """Sum the varifocal loss over queries and classes; the target of the matched class is the IoU (Zhang et al., Eq. 2)."""
    iou = overlaps(outputs.boxes[pairs.image, pairs.query].detach(), pairs.boxes)[0]
    where = (pairs.image, pairs.query, pairs.labels)
    wanted, positive = torch.zeros_like(outputs.logits), torch.zeros_like(outputs.logits)
    wanted[where], positive[where] = iou.to(wanted.dtype), 1.0
    weight = alpha * outputs.logits.detach().sigmoid().pow(gamma) * (1 - positive) + wanted
    entropy = F.binary_cross_entropy_with_logits(outputs.logits, wanted, weight=weight, reduction="none")
    return (entropy.sum(dim=-1) * pairs.counted).sum()
