"""SKD: the student's maps should have the local structure of the teacher's, measured by the structural similarity (SSIM).

De Rijk, Schneider, Cordts, Gavrila, "Structural Knowledge Distillation for Object Detection", NeurIPS 2022, arXiv 2211.13133.

No code was released; the paper uses the SSIM loss of kornia, which this equals. What the paper's descriptions leave open is ours:
the scope of the scaling to 0..1 (each image and level by itself), the weight 4 (the paper found 2 or 4 best), and the adapter's
bias and initialisation.

Shape letters: B images, C channels of the teacher, H x W cells of one level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from detdistill.detectors.contract import Detector, Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.precision import full_precision
from detdistill.functional.similarity import mean_cosine
from detdistill.methods.shared.align import LevelAdapters, PairedMaps, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import MethodError
from detdistill.structures import Batch, Clock, Losses, Observation
from detdistill.values import Limits, Positive, Weight

Scope = Literal["image", "tensor", "channel", "none"]

BAND = 32
"""Cells of a row that are blurred by one product."""
C1, C2 = 0.01**2, 0.03**2
"""Constants that keep the quotients of SSIM finite, for values between 0 and 1."""
CHUNK = {"cpu": 2**18}
"""Numbers of a map that are compared at a time, by kind of device: the temporary tensors stay small, and in a CPU's cache."""
LARGE_CHUNK = 2**23
"""The same for other devices, where each piece costs the start of its kernels."""


class _Similarity(NamedTuple):
    """How two maps are compared; see ``skd_ssim``."""

    window: int = 11
    sigma: float = 1.5
    luminance: bool = True
    contrast: bool = True
    structure: bool = True
    borders: bool = True


def skd_scaled(maps: Tensor, scope: Scope = "image") -> Tensor:
    """Maps scaled to 0..1, ``(x - min) / (max - min + 1e-6)``; gradient flows through minimum and maximum, too.

    Args:
        maps: [B, C, H, W].
        scope: what has one minimum and maximum: each ``image``, each ``channel`` of an image, or the whole ``tensor`` (then the
            result depends on the batch). ``none``: the maps are returned as they are.

    Returns:
        [B, C, H, W]; all 0 for a constant map.

    Example:
        >>> skd_scaled(torch.tensor([[[[1.0, 3.0, 2.0]]]])).round(decimals=3).tolist()
        [[[[0.0, 1.0, 0.5]]]]
    """
    if scope == "none":
        return maps
    over = {"image": (1, 2, 3), "channel": (2, 3), "tensor": (0, 1, 2, 3)}[scope]
    low, high = maps.amin(dim=over, keepdim=True), maps.amax(dim=over, keepdim=True)
    return (maps - low) / (high - low + 1e-6)


def skd_ssim(
    student: Tensor,
    teacher: Tensor,
    window: int = 11,
    sigma: float = 1.5,
    *,
    luminance: bool = True,
    contrast: bool = True,
    structure: bool = True,
    borders: bool = True,
) -> Tensor:
    """Structural similarity of each cell, between -1 and 1 (Wang et al., "Image Quality Assessment", 2004).

    With local means m, variances v and covariance c under a Gaussian window, the product of luminance
    ``(2 m_s m_t + C1) / (m_s^2 + m_t^2 + C1)``, contrast ``(2 sqrt(v_s v_t) + C2) / (v_s + v_t + C2)`` and structure
    ``(c + C2 / 2) / (sqrt(v_s v_t) + C2 / 2)``. Each can be left out (the paper's ablation). Maps are continued by reflection.

    Args:
        student: [..., H, W] between 0 and 1; gradient flows.
        teacher: the same shape, treated as constant.
        window: side of the window, odd. On a small map the largest odd side below twice the map's shorter side is used, so that
            the reflection exists (kornia fails there).
        sigma: standard deviation of the Gaussian, in cells.
        luminance: include the luminance.
        contrast: include the contrast.
        structure: include the structure.
        borders: False: leave out the cells whose window crosses the border; the map shrinks.

    Returns:
        [..., H, W].

    Example:
        >>> maps = torch.arange(6.0).reshape(1, 2, 3) / 6
        >>> skd_ssim(maps, maps).round(decimals=4).tolist()
        [[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]
    """
    height, width = student.shape[-2:]
    shorter = min(height, width)
    side = min(window, 2 * shorter - 1 if borders else shorter - (shorter + 1) % 2)
    down, across = (_blur_matrix(count, side, sigma, student) for count in (height, width))
    bands = [_bands(count, side // 2) for count in (height, width)]

    def mean(maps: Tensor) -> Tensor:
        rows = [maps[..., read] @ across[write, read].T for write, read in bands[1]]
        maps = rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)
        rows = [down[write, read] @ maps[..., read, :] for write, read in bands[0]]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-2)

    fixed = teacher.detach()
    mine, theirs = mean(student), mean(fixed)
    squares, product = mine.square() + theirs.square(), mine * theirs
    factors = []
    if luminance:
        factors.append((2 * product + C1, squares + C1))
    if contrast and structure:  # the product of both needs no root, and only the sum of the variances
        covariance, variances = mean(student * fixed) - product, mean(student.square() + fixed.square()) - squares
        factors.append((2 * covariance + C2, variances + C2))
    elif contrast or structure:
        mine_alone, theirs_alone = (mean(maps.square()) - center.square() for maps, center in ((student, mine), (fixed, theirs)))
        root = ((mine_alone * theirs_alone).clamp(min=0) + 1e-12).sqrt()
        if contrast:
            factors.append((2 * root + C2, mine_alone + theirs_alone + C2))
        else:
            factors.append((mean(student * fixed) - product + C2 / 2, root + C2 / 2))
    above, below = (math.prod(parts[1:], start=parts[0]) for parts in zip(*factors, strict=True))
    similarity = above / (below + 1e-12)
    if borders or side == 1:
        return similarity
    cut = side // 2
    return similarity[..., cut:-cut, cut:-cut]


def _blur_matrix(count: int, side: int, sigma: float, like: Tensor) -> Tensor:
    """[count, count] matrix that blurs ``count`` cells in a row with a Gaussian window, continued by reflection."""
    offsets = torch.arange(side, device=like.device) - side // 2
    taps = torch.exp(-offsets.to(like.dtype).square() / (2 * sigma**2))
    cells = torch.arange(count, device=like.device)[:, None] + offsets  # [count, side]
    cells = cells.abs()
    cells = (count - 1) - ((count - 1) - cells).abs()
    return like.new_zeros(count, count).scatter_add_(1, cells, (taps / taps.sum()).expand(count, side))


def _bands(count: int, reach: int) -> list[tuple[slice, slice]]:
    """Pieces of a row of cells, and the cells that each reads: most of a blur matrix is 0 and need not be multiplied."""
    pieces = max(1, round(count / BAND))
    ends = [count * piece // pieces for piece in range(pieces + 1)]
    return [(slice(a, b), slice(max(0, a - reach), min(count, b + reach))) for a, b in pairwise(ends)]


def skd_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: float = 4.0,
    *,
    scope: Scope = "image",
    window: int = 11,
    sigma: float = 1.5,
    luminance: bool = True,
    contrast: bool = True,
    structure: bool = True,
    borders: bool = True,
) -> Tensor:
    """Dissimilarity ``(1 - SSIM) / 2``, bounded to 0..1: mean over images, channels and cells, sum over levels.

    Both sides are scaled to 0..1 first, so the loss does not see a positive factor or an offset of a map. A large level counts as
    much as a small one. No boxes or masks are used.

    Args:
        student: L maps [B, C, H, W] after the adapter; gradient flows.
        teacher: L maps of the same shapes, treated as constant.
        weight: factor of every level's loss.
        scope: of the scaling, see ``skd_scaled``.
        window: see ``skd_ssim``.
        sigma: see ``skd_ssim``.
        luminance: see ``skd_ssim``.
        contrast: see ``skd_ssim``.
        structure: see ``skd_ssim``.
        borders: see ``skd_ssim``.

    Returns:
        [] the loss, between 0 and ``weight * L``.

    Raises:
        DetdistillError: the shapes of a level differ, or ``window`` is not odd.

    Example:
        >>> maps = torch.arange(12.0).reshape(1, 1, 3, 4)
        >>> round(float(skd_loss([maps], [5 * maps + 3])), 5), float(skd_loss([maps], [-maps])) > 2
        (0.0, True)
    """
    if window % 2 == 0:
        raise DetdistillError(f"skd: window={window} is not odd")
    how = _Similarity(window, sigma, luminance, contrast, structure, borders)
    levels = []
    for level, (mine, theirs) in enumerate(zip(student, teacher, strict=True)):
        if mine.shape != theirs.shape:
            shapes = f"student map {tuple(mine.shape)} and teacher map {tuple(theirs.shape)}"
            raise DetdistillError(f"skd: level {level}: {shapes} differ; adapt and resize the student's map first")
        scaled = skd_scaled(mine, scope), skd_scaled(theirs.detach(), scope)
        levels.append(cast(Tensor, _MeanDissimilarity.apply(*scaled, how)))
    return weight * torch.stack(levels).sum()


class _MeanDissimilarity(torch.autograd.Function):
    """Mean of ``(1 - SSIM) / 2``. The gradient is computed together with the value, some channels at a time.

    So one tensor of the maps' size is kept for the backward pass; autograd would keep more than ten.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, how: _Similarity) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        mine, theirs = student.flatten(0, 1), teacher.flatten(0, 1)  # [B * C, H, W]
        gradient = torch.empty_like(mine, memory_format=torch.contiguous_format) if wanted else None
        total, count = student.new_zeros(()), 0
        rows = max(1, CHUNK.get(student.device.type, LARGE_CHUNK) // max(1, mine[0].numel()))
        for start in range(0, len(mine), rows):
            part = slice(start, start + rows)
            with torch.enable_grad(), full_precision(student.device):
                leaf = mine[part].detach().requires_grad_(wanted)
                similarity = skd_ssim(leaf, theirs[part], **how._asdict())
                value = ((1 - similarity) / 2).clamp(0, 1).sum()
            if gradient is not None:
                (gradient[part],) = torch.autograd.grad(value, leaf)
            total += value.detach()
            count += similarity.numel()
        if gradient is not None:
            ctx.save_for_backward(gradient.div_(count).view(student.shape))
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None


class SKD(Method[Observation]):
    """SKD between the necks' maps; levels are paired by stride. Boxes are not used, and padding counts like all cells."""

    slug = "skd"
    title = "Structural Knowledge Distillation for Object Detection (NeurIPS 2022)"
    bibtex = """@inproceedings{derijk2022skd,
  title={Structural Knowledge Distillation for Object Detection},
  author={de Rijk, Philip and Schneider, Lukas and Cordts, Marius and Gavrila, Dariu M.},
  booktitle={Advances in Neural Information Processing Systems},
  year={2022}
}"""

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        weight: Weight = 4.0,
        scope: Scope = "image",
        window: Annotated[int, Limits(1)] = 11,
        sigma: Positive = 1.5,
        luminance: bool = True,
        contrast: bool = True,
        structure: bool = True,
        adapt: Literal["unlike", "always", "never"] = "unlike",
        levels: Sequence[int] | None = None,
    ) -> None:
        """Pair the levels.

        Args:
            teacher: any detector.
            student: any detector.
            weight: factor of every level's loss; the paper found 2 or 4 best.
            scope: what is scaled to 0..1 together: each ``image`` of a level, each ``channel`` of an image, or the whole
                ``tensor``; ``none``: no scaling, for maps that lie in 0..1.
            window: side of the Gaussian window, odd; smaller on small maps.
            sigma: standard deviation of the window, in cells.
            luminance: include the luminance in the similarity.
            contrast: include the contrast.
            structure: include the structure.
            adapt: pairs with a 1x1 convolution on the student. ``unlike``: pairs of unlike channels, and all pairs if the
                detectors are of unlike kinds (the name before the colon). ``always``. ``never``: channels must be equal.
            levels: indices of the student levels to use; None: all that have a partner.

        Raises:
            MethodError: ``window`` is even, nothing is compared, or channels are unlike and ``adapt`` is ``never``.
            PairError: no common level.
        """
        super().__init__(teacher, student)
        if window % 2 == 0:
            raise MethodError(f"{self.slug}: window={window} is not odd")
        if not (luminance or contrast or structure):
            raise MethodError(f"{self.slug}: luminance, contrast, structure are all false; nothing would be compared")
        self.weight = weight
        self.options: dict[str, Any] = {"scope": scope, "window": window, "sigma": sigma}
        self.options |= {"luminance": luminance, "contrast": contrast, "structure": structure}
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        for pair in self.pairs:
            if adapt == "never" and pair.student_channels != pair.teacher_channels:
                raise MethodError(
                    f"{self.slug}: adapt=never, but the student has {pair.student_channels} channels at stride "
                    f"{student.spec.strides[pair.student]}, the teacher {pair.teacher_channels}; use adapt=unlike"
                )
        kinds = [spec.name.partition(":")[0] for spec in (student.spec, teacher.spec)]
        self.adapters = LevelAdapters(self.pairs, always=adapt == "always" or (adapt == "unlike" and kinds[0] != kinds[1]))
        self.paired_maps = PairedMaps(self.pairs, self.adapters, resize=True)

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Compute the term ``skd``; the monitor ``cosine`` is the mean cosine of the compared maps."""
        with full_precision(batch.images.device):
            mine, theirs = self.paired_maps(seen.features, taught.features)
            return Losses({"skd": skd_loss(mine, theirs, self.weight, **self.options)}, {"cosine": mean_cosine(mine, theirs)})
