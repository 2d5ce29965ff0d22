"""FGD: imitate foreground and background separately, weighted by the teacher's attention, and the relation between cells.

Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, arXiv 2111.11837.

Shape letters: B images, C channels of the teacher, H x W cells of one level, G boxes of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from detdistill.detectors.contract import Detector, Teacher
from detdistill.functional.attention import attentions, channel_parts
from detdistill.functional.cells import floor_ceil_cells, floor_ceil_span
from detdistill.functional.level_maps import check_maps
from detdistill.functional.masks import maximum_over_boxes
from detdistill.functional.precision import full_precision
from detdistill.methods.shared.align import LevelAdapters, PairedMaps, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.structures import Batch, Clock, Losses, Observation
from detdistill.values import Positive, Weight


class FGDTerms(NamedTuple):
    """The four unweighted losses of one level, [] each: sums over channels and cells, divided by B."""

    foreground: Tensor
    background: Tensor
    attention: Tensor
    relation: Tensor


def fgd_masks(
    boxes_xyxy: Sequence[Tensor], image_hw: Sequence[tuple[float, float]], map_hw: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Weights of foreground and background cells (Eq. 2 to 4): each box, and the background, sums to about 1.

    The weight of a foreground cell is 1 / (rows * columns) of the smallest box region that covers it
    (``floor_ceil_span``, before it is clipped to the map). The weight of a background cell is 1 / (number of background
    cells). Every box counts on every level.

    Args:
        boxes_xyxy: B tensors [G, 4] in pixels. In an image without boxes all cells are background.
        image_hw: B pairs: height and width in pixels of the area that the map covers.
        map_hw: rows and columns of the map.

    Returns:
        Weights of the foreground and of the background, [B, H, W] each, in the boxes' dtype, at least float32.

    Example:
        >>> foreground, background = fgd_masks([torch.tensor([[0.0, 0.0, 7.0, 7.0]])], [(32, 32)], (4, 4))
        >>> foreground[0, :2, :2].tolist(), round(background.sum().item(), 6)
        ([[0.25, 0.25], [0.25, 0.25]], 1.0)
    """
    foreground = torch.stack([_smallest_region(boxes, size, map_hw) for boxes, size in zip(boxes_xyxy, image_hw, strict=True)])
    background = (foreground == 0).to(foreground.dtype)
    return foreground, background / background.sum(dim=(1, 2), keepdim=True).clamp(min=1)


def _smallest_region(boxes: Tensor, image_hw: tuple[float, float], map_hw: tuple[int, int]) -> Tensor:
    """[H, W] for each cell 1 / area of the smallest region of boxes [G, 4] that covers it; 0 if none does."""
    span, cells = floor_ceil_span(boxes, image_hw, map_hw), floor_ceil_cells(boxes, image_hw, map_hw)
    wmin, hmin, wmax, hmax = span[:, :, None].to(torch.promote_types(boxes.dtype, torch.float32)).unbind(1)
    value = 1 / (hmax + 1 - hmin) / (wmax + 1 - wmin)  # [G, 1]
    down, across = (torch.where(inside, value, value.new_zeros(())) for inside in cells)
    return maximum_over_boxes(down, across, torch.minimum)  # the value inside both ranges, else 0


def fgd_terms(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    background: Tensor,
    student_context: Tensor,
    teacher_context: Tensor,
    temperature: float = 0.5,
) -> FGDTerms:
    """The unweighted losses of one level (Eq. 5 to 11).

    Let ``D = (student - teacher)^2 * spatial attention * channel attention``, with both attentions of the teacher. All
    losses are sums over images, channels and cells, divided by B:

    - foreground: ``sum D * foreground``;
    - background: ``sum D * background``;
    - attention: L1 distance between the spatial attentions of student and teacher, plus that between their channel
      attentions (gradient flows through the student's);
    - relation: ``sum ((student + student_context) - (teacher + teacher_context))^2``.

    Args:
        student: [B, C, H, W] in the teacher's channels; gradient flows.
        teacher: [B, C, H, W], treated as constant.
        foreground: [B, H, W] weights of foreground cells (``fgd_masks``).
        background: [B, H, W] weights of background cells.
        student_context: [B, C] output of the student's ``ContextBlock``, or [B, C, H, W] of another block that gives each cell
            its own; gradient flows to the block.
        teacher_context: the same of the teacher's block.
        temperature: of both attentions.
    """
    check_maps("fgd_terms", student, teacher)
    fixed = teacher.detach()
    images = student.shape[0]
    cells, channels = attentions(fixed, temperature)
    own_cells, own_channels = attentions(student, temperature)
    shift = (student_context - teacher_context).to(channels.dtype)
    by_cell = shift.ndim == 4
    given = torch.zeros_like(channels) if by_cell else shift
    squares, relation = cast(tuple[Tensor, Tensor], _Squares.apply(student, fixed, channels, given))
    if by_cell:
        relation = (student - fixed + shift).square().sum()
    weighted = squares.view_as(cells) * cells
    attention = (own_cells - cells).abs().sum() + (own_channels - channels).abs().sum()
    return FGDTerms(
        foreground=(weighted * foreground).sum() / images,
        background=(weighted * background).sum() / images,
        attention=attention / images,
        relation=relation / images,
    )


class _Squares(torch.autograd.Function):
    """Squares of the difference of two maps: summed over channels with weights [B, C], and of the shifted difference, summed.

    Some channels are computed at a time, forward and backward, so nothing of a map's size is kept but the maps themselves.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, channels: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        mine, theirs = student.flatten(2), teacher.flatten(2)
        weighted = channels.new_zeros(len(mine), mine.shape[2])
        sums, relation = torch.empty_like(channels), channels.new_zeros(())
        for part in channel_parts(student):
            gap = (mine[:, part] - theirs[:, part]).to(channels.dtype)
            weighted += (channels[:, None, part] @ gap.square())[:, 0]
            sums[:, part] = gap.sum(dim=2)
            relation += gap.add_(shift[:, part, None]).square_().sum()
        ctx.save_for_backward(student, teacher, channels, shift, sums)
        return weighted, relation

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_weighted: Tensor, of_relation: Tensor) -> tuple[Tensor, None, None, Tensor]:
        student, teacher, channels, shift, sums = ctx.saved_tensors
        mine, theirs = student.flatten(2), teacher.flatten(2)
        result = torch.empty_like(mine)
        for part in channel_parts(student):
            gap = (mine[:, part] - theirs[:, part]).to(channels.dtype)
            factor = (2 * channels[:, part, None] * of_weighted[:, None]).add_(2 * of_relation)
            result[:, part] = gap.mul_(factor).add_(2 * of_relation * shift[:, part, None])
        return result.view_as(student), None, None, 2 * of_relation * (sums + mine.shape[2] * shift)


def fgd_loss(
    terms: FGDTerms, foreground: float = 1e-3, background: float = 5e-4, attention: float = 5e-4, relation: float = 5e-6
) -> Tensor:
    """Weighted sum of the four losses (Eq. 12), []; the paper calls the weights alpha, beta, gamma and lambda."""
    return foreground * terms.foreground + background * terms.background + attention * terms.attention + relation * terms.relation


class ContextBlock(nn.Module):
    """A global context vector that is added to every cell (GcBlock of Eq. 10, without its residual).

    The cells are pooled with a learned softmax, then pass a bottleneck of half the channels. The last convolution is
    initialised to zero, so the first outputs are zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 2)
        self.mask = nn.Conv2d(channels, 1, 1)
        nn.init.kaiming_normal_(self.mask.weight)
        nn.init.zeros_(self.mask.bias)  # type: ignore[arg-type]
        self.transform = nn.Sequential(
            nn.Conv2d(channels, inner, 1), nn.LayerNorm([inner, 1, 1]), nn.ReLU(inplace=True), nn.Conv2d(inner, channels, 1)
        )
        for parameter in self.transform[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, maps: Tensor) -> Tensor:
        """Compute the vectors [B, C] to add to every cell of maps [B, C, H, W]."""
        attention = self.mask(maps).flatten(1).softmax(dim=1)
        context = torch.einsum("bcn,bn->bc", maps.flatten(2), attention)
        added: Tensor = self.transform(context[:, :, None, None])
        return added[:, :, 0, 0]


_PROFILES = {
    "one_stage": (1e-3, 5e-4, 5e-4, 5e-6),
    "two_stage": (5e-5, 2.5e-5, 5e-5, 5e-7),
    "anchor_free": (1.6e-3, 8e-4, 8e-4, 8e-6),
}


class FGD(Method[Observation]):
    """FGD between the necks' maps; levels are paired by stride. Backbones and heads may differ; crowd boxes are not foreground.

    Two departures from the released code: the masks of padded images (see ``box_norm``), and boxes that begin outside the
    image. Such boxes are clamped to the image here; the code counts their negative cells from the map's far side.
    """

    slug = "fgd"
    title = "Focal and Global Knowledge Distillation for Detectors (CVPR 2022)"
    bibtex = """@inproceedings{yang2022fgd,
  title={Focal and Global Knowledge Distillation for Detectors},
  author={Yang, Zhendong and Li, Zhe and Jiang, Xiaohu and Gong, Yuan and Yuan, Zehuan and Zhao, Danpei and Yuan, Chun},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2022}
}"""

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        profile: Literal["one_stage", "two_stage", "anchor_free"] = "one_stage",
        foreground_weight: Weight | None = None,
        background_weight: Weight | None = None,
        attention_weight: Weight | None = None,
        relation_weight: Weight | None = None,
        temperature: Positive = 0.5,
        box_norm: Literal["padded", "image"] = "padded",
        levels: Sequence[int] | None = None,
    ) -> None:
        """Pair the levels; channels that differ get a 1x1 convolution on the student, as in the paper.

        Args:
            teacher: any detector.
            student: any detector.
            profile: which released weights to use: those for anchor-based one-stage, two-stage, or anchor-free students.
            foreground_weight: factor of the foreground loss (alpha); None: the profile's.
            background_weight: factor of the background loss (beta); None: the profile's.
            attention_weight: factor of the attention loss (gamma); None: the profile's, from the released configs (the paper
                prints 1e-3 and 8e-3).
            relation_weight: factor of the relation loss (lambda); None: the profile's.
            temperature: of the attention (the released FCOS config uses 0.8, the paper 0.5 everywhere).
            box_norm: the size in pixels that corresponds to a whole map when boxes are converted to cells. ``padded``: the
                size with padding, which is correct. ``image``: the size without padding, as in the released code; it
                stretches the masks of images that are smaller than their batch.
            levels: indices of the student levels to use; None: all that have a partner (the paper leaves out a pooled P6).

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
        """
        super().__init__(teacher, student)
        given = (foreground_weight, background_weight, attention_weight, relation_weight)
        published = zip(given, _PROFILES[profile], strict=True)
        self.weights = dict(zip(FGDTerms._fields, (other if mine is None else mine for mine, other in published), strict=True))
        check_some(self.slug, **{f"{name}_weight": weight for name, weight in self.weights.items()})
        self.temperature, self.box_norm = temperature, box_norm
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        self.adapters = LevelAdapters(self.pairs)
        self.paired_maps = PairedMaps(self.pairs, self.adapters, resize=True)
        self.student_context = nn.ModuleList(ContextBlock(pair.teacher_channels) for pair in self.pairs)
        self.teacher_context = nn.ModuleList(ContextBlock(pair.teacher_channels) for pair in self.pairs)

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Terms ``fgd_foreground``, ``fgd_background``, ``fgd_attention`` and ``fgd_relation``, summed over levels.

        Terms with weight 0 are left out.
        """
        boxes = [target.without_crowd().boxes_xyxy for target in batch.targets]
        sizes = [batch.padding_hw] * len(batch) if self.box_norm == "padded" else [(h, w) for h, w in batch.sizes.tolist()]
        levels = []
        with full_precision(batch.images.device):
            mine, theirs = self.paired_maps(seen.features, taught.features)
            for index, (student_map, teacher_map) in enumerate(zip(mine, theirs, strict=True)):
                foreground, background = fgd_masks(boxes, sizes, (teacher_map.shape[-2], teacher_map.shape[-1]))
                contexts = self.student_context[index](student_map), self.teacher_context[index](teacher_map.detach())
                levels.append(fgd_terms(student_map, teacher_map, foreground, background, *contexts, self.temperature))
        terms = dict(zip(FGDTerms._fields, map(torch.stack, zip(*levels, strict=True)), strict=True))
        return Losses({f"fgd_{name}": self.weights[name] * values.sum() for name, values in terms.items() if self.weights[name]})
