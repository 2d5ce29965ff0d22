"""AdaMixer: a query-based detector that decodes the backbone's maps directly, without encoder and feature pyramid.

Gao et al., "AdaMixer: A Fast-Converging Query-Based Object Detector", CVPR 2022.

A query is a content vector and a position ``xyzr``: centre (x, y) in pixels, ``z = log2 sqrt(w h)`` and ``r = log2(h / w)``
of its box. Each stage lets the queries attend to each other, samples the maps as one 3-D space (x, y, scale), mixes the
samples by weights made from the query, and moves the query.

Shape letters: B images, L levels, N queries, D channels, K classes, G groups, c = D/G channels of a group, P sampled
points and O mixed points of a group, S stages.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import clip_boxes_to_image


class AdaMixer(nn.Module):
    """Backbone, channel mapper (``neck``), initial queries (``generator``) and stages."""

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        channels: int = 256,
        num_queries: int = 100,
        num_stages: int = 6,
        heads: int = 8,
        feedforward: int = 2048,
        groups: int = 4,
        points: int = 32,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        score_thresh: float = 0.0,
        detections_per_img: int = 100,
    ) -> None:
        """Build with random weights.

        Args:
            backbone: maps images to an ordered dictionary of maps; its ``out_channels`` and ``strides`` list each map's.
            num_classes: K, without a background.
            channels: D, a multiple of 32 (the neck's norm has 32 groups) and of ``heads`` and ``groups``.
            num_queries: N.
            num_stages: S.
            heads: of the self-attention.
            feedforward: inner width of the feed-forward layers.
            groups: G.
            points: P; four times as many come out of the mixing.
            image_mean: that images are normalised by.
            image_std: likewise.
            score_thresh: detections must score higher.
            detections_per_img: at most.
        """
        super().__init__()
        self.transform = GeneralizedRCNNTransform(800, 1333, list(image_mean), list(image_std))
        self.backbone = backbone
        self.strides = tuple(backbone.strides)
        self.neck = ChannelMapper(backbone.out_channels, channels)
        self.generator = QueryGenerator(num_queries, channels)
        self.stages = nn.ModuleList(Stage(channels, num_classes, heads, feedforward, groups, points) for _ in range(num_stages))
        self.score_thresh = score_thresh
        self.detections_per_img = detections_per_img

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Detect in images [3, H, W] of 0..1: ``boxes`` [M, 4] in pixels, ``scores`` [M], ``labels`` [M] from 1; best first."""
        original = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, _ = self.transform(images)
        maps = tuple(self.neck(self.backbone(batch.tensors)).values())
        sizes = torch.tensor(batch.image_sizes, device=batch.tensors.device)
        content, reference = self.generator(len(images), batch.tensors.dtype)
        outputs = self.decode(maps, self.strides, content, reference, sizes)[-1]
        results = [
            {"boxes": boxes, "scores": scores, "labels": labels + 1}
            for boxes, scores, labels, _ in self.select(outputs[0], outputs[1], sizes)
        ]
        return cast(list[dict[str, Tensor]], self.transform.postprocess(results, batch.image_sizes, original))

    def decode(
        self, maps: Sequence[Tensor], strides: Sequence[int], content: Tensor, reference: Tensor, sizes: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Run all stages.

        Args:
            maps: L neck maps [B, D, H_l, W_l].
            strides: of the maps.
            content: [B, N, D].
            reference: [B, N, 4] boxes to start from, cxcywh in parts of the valid image.
            sizes: [B, 2] valid height and width in pixels.

        Returns:
            For each stage logits [B, N, K], boxes [B, N, 4] (as ``reference``, differentiable) and content [B, N, D].
        """
        size = sizes.to(reference.dtype)[:, None]
        xyzr = to_xyzr(reference * size[..., [1, 0, 1, 0]])
        maps = [level.to(xyzr.dtype) for level in maps]  # positions and sampling in full precision under autocast
        outputs = []
        for stage in self.stages:
            logits, refined, content = stage(maps, strides, content, xyzr)
            outputs.append((logits, to_cxcywh(refined) / size[..., [1, 0, 1, 0]], content))
            xyzr = refined.detach()  # as in the paper's code: each stage's boxes train that stage only
        return outputs

    def select(self, logits: Tensor, boxes_cxcywh01: Tensor, sizes: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The best pairs of query and class, without suppression.

        Args:
            logits: [B, N, K].
            boxes_cxcywh01: [B, N, 4].
            sizes: [B, 2] valid height and width.

        Returns:
            For each image boxes [M, 4] in pixels, clipped, scores [M], classes [M] 0 .. K-1 and query indices [M].
        """
        results = []
        for image, size in enumerate(sizes.tolist()):
            scores = logits[image].sigmoid().flatten()
            scores, best = scores.topk(min(self.detections_per_img, scores.numel()))
            best, scores = best[scores > self.score_thresh], scores[scores > self.score_thresh]
            query, label = best // logits.shape[-1], best % logits.shape[-1]
            height, width = size
            corners = to_corners(boxes_cxcywh01[image, query]) * boxes_cxcywh01.new_tensor([width, height, width, height])
            results.append((clip_boxes_to_image(corners, (height, width)), scores, label, query))
        return results

    def reset_head(self) -> None:
        """Fresh initial queries and stages."""
        self.generator.reset_parameters()
        for stage in self.stages:
            cast(Stage, stage).reset_parameters()


# ---------------------------------------------------------------------------------------------------------- boxes


def to_xyzr(boxes_cxcywh: Tensor) -> Tensor:
    """[..., 4] positions of boxes in pixels; sides are at least a millionth of a pixel."""
    sides = boxes_cxcywh[..., 2:].clamp(min=1e-6)
    width, height = sides.unbind(dim=-1)
    return torch.cat([boxes_cxcywh[..., :2], torch.stack([(width * height).log2() / 2, (height / width).log2()], dim=-1)], dim=-1)


def to_cxcywh(xyzr: Tensor) -> Tensor:
    """[..., 4] boxes of positions, in pixels: ``w = 2^(z - r/2)``, ``h = 2^(z + r/2)``."""
    z, r = xyzr[..., 2:3], xyzr[..., 3:4]
    return torch.cat([xyzr[..., :2], torch.exp2(z - r / 2), torch.exp2(z + r / 2)], dim=-1)


def to_corners(boxes_cxcywh: Tensor) -> Tensor:
    """[..., 4] xyxy."""
    center, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([center - half, center + half], dim=-1)


# ---------------------------------------------------------------------------------------------------------- parts


class ChannelMapper(nn.Module):
    """Every map to the same number of channels by a 1x1 convolution of its own; one GroupNorm shared by all maps.

    The norm's statistics are taken over the whole map, padding included, as in the paper's code.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        self.norm = nn.GroupNorm(32, out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform weights."""
        for convolution in self.convolutions:
            nn.init.xavier_uniform_(cast(Tensor, convolution.weight))
            nn.init.zeros_(cast(Tensor, convolution.bias))
        self.norm.reset_parameters()

    def forward(self, maps: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
        """Maps [B, C_l, H_l, W_l] to [B, D, H_l, W_l]."""
        pairs = zip(maps.items(), self.convolutions, strict=True)
        return OrderedDict((name, self.norm(convolution(level))) for (name, level), convolution in pairs)


class QueryGenerator(nn.Module):
    """The initial queries: learned contents, all starting from the whole image (section 3.4)."""

    def __init__(self, queries: int, channels: int) -> None:
        super().__init__()
        self.content = nn.Parameter(torch.empty(queries, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Contents of unit variance."""
        nn.init.normal_(self.content)

    def forward(self, images: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Contents [B, N, D] and boxes [B, N, 4], cxcywh in parts of the image."""
        content = F.layer_norm(self.content, self.content.shape[-1:]).to(dtype).expand(images, -1, -1)
        whole = torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=dtype, device=content.device)
        return content, whole.expand(images, content.shape[1], 4)


class Stage(nn.Module):
    """One decoder stage (section 3.4, figure 4)."""

    def __init__(
        self,
        channels: int,
        num_classes: int,
        heads: int,
        feedforward: int,
        groups: int,
        points: int,
        mixed_points: int | None = None,
        temperature: float = 2.0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.attention = PositionAwareAttention(channels, heads)
        self.attention_norm = nn.LayerNorm(channels)
        self.sampling = Sampling(channels, groups, points)
        self.mixing = Mixing(channels, groups, points, mixed_points or 4 * points)
        self.mixing_norm = nn.LayerNorm(channels)
        self.feedforward = nn.Sequential(nn.Linear(channels, feedforward), nn.ReLU(), nn.Linear(feedforward, channels))
        self.feedforward_norm = nn.LayerNorm(channels)
        self.class_tower = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels), nn.ReLU())
        self.classifier = nn.Linear(channels, num_classes)
        self.position_tower = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels), nn.ReLU())
        self.position_delta = nn.Linear(channels, 4)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform; scores start at 0.01, positions stay where they are."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        self.attention.reset_parameters()
        self.sampling.reset_parameters()
        self.mixing.reset_parameters()
        nn.init.constant_(self.classifier.bias, -math.log(0.99 / 0.01))
        nn.init.zeros_(self.position_delta.weight)
        nn.init.zeros_(self.position_delta.bias)

    def forward(
        self, maps: Sequence[Tensor], strides: Sequence[int], content: Tensor, xyzr: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode once.

        Args:
            maps: L maps [B, D, H_l, W_l].
            strides: of the maps.
            content: [B, N, D].
            xyzr: [B, N, 4].

        Returns:
            Logits [B, N, K], refined positions [B, N, 4], new content [B, N, D]; the first two in ``xyzr``'s precision.
        """
        content = self.attention_norm(self.attention(content, xyzr))
        samples = sample(maps, strides, self.sampling(content, xyzr), self.temperature)
        content = self.mixing_norm(content + self.mixing(samples, content))
        content = self.feedforward_norm(content + self.feedforward(content))
        logits = self.classifier(self.class_tower(content)).to(xyzr.dtype)
        delta = self.position_delta(self.position_tower(content)).to(xyzr.dtype)
        center = xyzr[..., :2] + delta[..., :2] * torch.exp2(xyzr[..., 2:3])
        return logits, torch.cat([center, xyzr[..., 2:] + delta[..., 2:]], dim=-1), content


class PositionAwareAttention(nn.Module):
    """Self-attention between queries that know where they are (section 3.4): queries inside of each other's box see each other.

    To head h's logit for i and j is added ``tau_h * ln(area(i and j) / area(i) + 1e-7)``.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project_in = nn.Linear(channels, 3 * channels)
        self.project_out = nn.Linear(channels, channels)
        self.tau = nn.Parameter(torch.empty(heads))

    def reset_parameters(self) -> None:
        """``tau`` between 0 and 4, no biases."""
        nn.init.uniform_(self.tau, 0.0, 4.0)
        nn.init.zeros_(self.project_in.bias)
        nn.init.zeros_(self.project_out.bias)

    def forward(self, content: Tensor, xyzr: Tensor) -> Tensor:
        """[B, N, D] of content [B, N, D] and position [B, N, 4]; the residual is added."""
        inputs = content + position_embedding(xyzr, content.shape[-1])
        query, key, value = self.project_in(inputs).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, h, N, d]
        bias = self.tau[:, None, None] * self.overlap(xyzr)[:, None]
        # Not torch's fused attention: it takes other kernels without gradients, and results would differ in the last bits.
        attended = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1]) + bias).softmax(dim=-1) @ value
        return cast(Tensor, inputs + self.project_out(attended.transpose(1, 2).flatten(2)))

    @staticmethod
    @torch.no_grad()
    def overlap(xyzr: Tensor) -> Tensor:
        """[B, N, N] the logarithm of the part of box i that box j covers."""
        boxes = to_corners(to_cxcywh(xyzr))
        corner = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
        opposite = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
        shared = (opposite - corner).clamp(min=0).prod(dim=-1)
        area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1).clamp(min=1e-6)
        return (shared / area[:, :, None] + 1e-7).log()


@torch.no_grad()
def position_embedding(xyzr: Tensor, channels: int) -> Tensor:
    """[B, N, D] sines and cosines of x/1000, y/1000, z and r, a quarter of the channels each."""
    count = channels // 4
    powers = 2 * torch.arange(count // 2, device=xyzr.device, dtype=xyzr.dtype) / count
    angles = (xyzr / xyzr.new_tensor([1000.0, 1000.0, 1.0, 1.0]))[..., None] / 10000**powers  # [B, N, 4, D/8]
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(2)


class Sampling(nn.Module):
    """Where each query looks: points of the space (x, y, z), offset from its position (section 3.2)."""

    def __init__(self, channels: int, groups: int, points: int) -> None:
        super().__init__()
        self.groups, self.points = groups, points
        self.offsets = nn.Linear(channels, groups * points * 3)

    def reset_parameters(self) -> None:
        """At first points spread over the box, one octave finer than it, whatever the content."""
        nn.init.zeros_(self.offsets.weight)
        with torch.no_grad():
            bias = self.offsets.bias.view(-1, 3)
            nn.init.uniform_(bias[:, :2], -0.5, 0.5)
            bias[:, 2] = -1.0

    def forward(self, content: Tensor, xyzr: Tensor) -> Tensor:
        """[B, N, G, P, 3] x and y in pixels and z."""
        offsets = self.offsets(content).to(xyzr.dtype).unflatten(-1, (self.groups, self.points, 3))
        box = to_cxcywh(xyzr)[:, :, None, None]
        center = box[..., :2] + offsets[..., :2] * box[..., 2:]
        return torch.cat([center, xyzr[:, :, None, None, 2:3] + offsets[..., 2:]], dim=-1)


def sample(maps: Sequence[Tensor], strides: Sequence[int], points: Tensor, temperature: float = 2.0) -> Tensor:
    """[B, N, G, P, c] bilinear samples of every map, weighted by how near the map's scale is to the point's z (equation 3).

    The weight of a level of stride s is the softmax over levels of ``-(z - log2 s)^2 / temperature``. Outside of a map is zero.

    Args:
        maps: L maps [B, D, H_l, W_l]; group g reads channels ``g c`` to ``(g+1) c``.
        strides: of the maps.
        points: [B, N, G, P, 3].
        temperature: how much neighbouring levels share; 2 in the paper.
    """
    images, queries, groups, count, _ = points.shape
    scales = points.new_tensor([math.log2(stride) for stride in strides])
    weights = (-(points[..., 2:] - scales).square() / temperature).softmax(dim=-1)  # [B, N, G, P, L]
    weights = weights.permute(4, 0, 2, 1, 3).reshape(len(scales), images * groups, 1, queries, count)
    places = points[..., :2].transpose(1, 2).reshape(images * groups, queries, count, 2)  # groups as images: one call a level
    samples: Tensor | int = 0
    for level, stride, weight in zip(maps, strides, weights, strict=True):
        extent = points.new_tensor([level.shape[-1] * stride, level.shape[-2] * stride])
        values = level.reshape(images * groups, -1, *level.shape[-2:])
        samples = samples + weight * F.grid_sample(values, places / extent * 2 - 1, align_corners=False)
    return cast(Tensor, samples).view(images, groups, -1, queries, count).permute(0, 3, 1, 4, 2)


class Mixing(nn.Module):
    """An MLP-mixer over each query's samples, whose two matrices the query itself makes (section 3.3)."""

    def __init__(self, channels: int, groups: int, points: int, mixed_points: int) -> None:
        super().__init__()
        self.groups, self.points, self.mixed_points = groups, points, mixed_points
        self.width = channels // groups
        self.matrices = nn.Linear(channels, groups * (self.width**2 + mixed_points * points))
        self.project_out = nn.Linear(groups * mixed_points * self.width, channels)

    def reset_parameters(self) -> None:
        """At first the same matrices for every query."""
        nn.init.zeros_(self.matrices.weight)

    def forward(self, samples: Tensor, content: Tensor) -> Tensor:
        """[B, N, D] of samples [B, N, G, P, c] and content [B, N, D]."""
        made = self.matrices(content).unflatten(-1, (self.groups, -1))
        channel_mixing, point_mixing = made.split([self.width**2, self.mixed_points * self.points], dim=-1)
        mixed = samples @ channel_mixing.unflatten(-1, (self.width, self.width))
        mixed = F.relu(F.layer_norm(mixed, (self.points, self.width)))
        mixed = point_mixing.unflatten(-1, (self.mixed_points, self.points)) @ mixed
        mixed = F.relu(F.layer_norm(mixed, (self.mixed_points, self.width)))  # [B, N, G, O, c]
        return cast(Tensor, self.project_out(mixed.flatten(2)))
