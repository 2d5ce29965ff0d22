"""Attention over the whole map and inside patches, and GLAMD's losses of features and dense predictions.

Jang, Shin, Kim, Woo, Bae, "GLAMD: Global and Local Attention Mask Distillation for Object Detectors", ECCV 2022. The formulas
are those of the released code; the paper's text was not available.

Shape letters: B images, C channels of the teacher, H x W cells of one level, h x w patches of a map, P predictions of an image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.functional.boxes import paired_iou
from detdistill.functional.soft_targets import soft_binary_rows


class GLAMDAttention(NamedTuple):
    """Attention of one level, the mean of student and teacher; constant."""

    cells: Tensor
    """[B, H, W] over the cells of the map; the mean over cells is 1."""
    local_cells: Tensor
    """[B, H, W] over the cells of each patch; the mean over the cells of a patch is 1."""
    channels: Tensor | None
    """[B, C] over channels, of the means over the map; None: all 1 (two-stage form)."""
    local_channels: Tensor | None
    """[B, C, h, w] over channels, of the means over each patch; None: all 1."""

    def mask(self) -> Tensor:
        """[B, H, W] the mean of both attentions over cells, which weights the predictions."""
        return (self.cells + self.local_cells) / 2


class GLAMDTerms(NamedTuple):
    """The unweighted losses of one level, [] each. They are norms over the batch and grow with its square root."""

    feature: Tensor
    channel: Tensor
    spatial: Tensor


@torch.no_grad()
def glamd_attention(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 0.1,
    patch: int = 7,
    channels_of: Tensor | None = None,
    channel_mask: bool = True,
    padding: Tensor | None = None,
) -> GLAMDAttention:
    """Attention of one level over the map and inside its patches, averaged over student and teacher; no gradient.

    Over cells: the number of cells times the softmax of the mean over channels of ``|maps| / temperature``. Over channels: C
    times the softmax of the mean over cells of ``|maps| / temperature``. Patches of ``patch`` x ``patch`` cells do not overlap
    and begin at the top left; those at the right and lower edge may be smaller.

    Args:
        student: [B, any channels, H, W].
        teacher: [B, C, H, W].
        temperature: of all softmaxes.
        patch: side of a patch in cells.
        channels_of: [B, C, H, W] map that the student's channel attention is taken of, if ``student`` has other channels.
        channel_mask: compute the attention over channels.
        padding: [B, H, W] bool, cells that show only padding; they get no attention. None: no such cell.
    """
    both = [maps if padding is None else maps.masked_fill(padding[:, None], 0.0) for maps in (student, teacher)]
    strengths = [torch.linalg.vector_norm(maps, ord=1, dim=1) / maps.shape[1] / temperature for maps in both]
    whole = max(student.shape[-2:])
    cells, local_cells = (
        torch.stack([_softmax_in_patches(strength, size, padding) for strength in strengths]).mean(dim=0)
        for size in (whole, patch)
    )
    if not channel_mask:
        return GLAMDAttention(cells, local_cells, None, None)
    if channels_of is not None:
        both[0] = channels_of if padding is None else channels_of.masked_fill(padding[:, None], 0.0)
    magnitudes = [maps.abs() for maps in both]
    channels, local_channels = (
        torch.stack([_channels_in_patches(maps, size, temperature, padding) for maps in magnitudes]).mean(dim=0)
        for size in (whole, patch)
    )
    return GLAMDAttention(cells, local_cells, channels[:, :, 0, 0], local_channels)


def glamd_feature_loss(
    adapted: Tensor, teacher: Tensor, attention: GLAMDAttention, patch: int = 7, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Distances weighted by attention: over the map, and the sum over patches of the distance in each patch.

    Both are ``sqrt(sum (adapted - teacher)^2 * cells * channels)`` over images, channels and cells, with the attention of
    the map or of the patch. For equal maps the gradient is zero, not NaN.

    Args:
        adapted: [B, C, H, W] the student's map after its adapter; gradient flows.
        teacher: [B, C, H, W], treated as constant.
        attention: ``glamd_attention`` of the level.
        patch: side of a patch in cells.
        eps: added to each patch's sum before the root; 0 in the released one-stage form, 1e-10 in the two-stage form.

    Returns:
        The loss over the map and the loss over patches, [] each.
    """
    squared = (adapted - teacher.detach()).square()
    if attention.channels is None or attention.local_channels is None:
        squared = squared.sum(dim=1, keepdim=True)
    per_channel = torch.einsum("bchw,bhw->bc", squared, attention.cells)
    in_patches = _patch_sums(squared * attention.local_cells[:, None], patch)  # [B, C or 1, h, w]
    if attention.channels is not None and attention.local_channels is not None:
        per_channel, in_patches = per_channel * attention.channels, in_patches * attention.local_channels
    return _root(per_channel.sum()), _root(in_patches.sum(dim=(0, 1)) + eps).sum()


def glamd_channel_loss(
    student: Tensor, teacher: Tensor, adapter: nn.Module, patch: int = 7, padding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Distances of the means over cells: over the map, and the mean over patches of the distance in each patch.

    Both are Euclidean norms over images and channels of ``mean(teacher) - adapter(mean(student))``. The means are signed. In
    patches 1e-6 is added to each difference, as PyTorch's ``PairwiseDistance`` does.

    Args:
        student: [B, channels of the student, H, W]; gradient flows.
        teacher: [B, C, H, W], treated as constant.
        adapter: maps vectors [..., channels of the student] to [..., C].
        patch: side of a patch in cells.
        padding: [B, H, W] bool, cells that are left out, and so are patches of such cells. None: no such cell.

    Returns:
        The loss over the map and the loss over patches, [] each.
    """
    fixed = teacher.detach()
    if padding is not None:
        student, fixed = (maps.masked_fill(padding[:, None], 0.0) for maps in (student, fixed))
    losses = []
    for size, shift in ((max(student.shape[-2:]), 0.0), (patch, 1e-6)):
        mine, theirs = (_patch_means(maps, size, padding).movedim(1, -1) for maps in (student, fixed))
        gap = theirs - adapter(mine) + shift  # [B, h, w, C]
        shown = (_patch_counts(fixed, size, padding) > 0).expand(gap.shape[:3])  # [B, h, w]
        distances = torch.linalg.vector_norm(gap.masked_fill(~shown[..., None], 0.0), dim=(0, 3))
        losses.append(distances.sum() / shown.any(dim=0).sum())
    return losses[0], losses[1]


def glamd_spatial_loss(student: Tensor, teacher: Tensor, adapter: nn.Module, padding: Tensor | None = None) -> Tensor:
    """Euclidean norm over images and cells of the difference of the means over channels, [].

    Args:
        student: [B, channels of the student, H, W]; gradient flows.
        teacher: [B, C, H, W], treated as constant.
        adapter: maps maps [B, 1, H, W] to maps of the same shape; applied to the student's mean.
        padding: [B, H, W] bool, cells that are left out. None: no such cell.
    """
    gap = teacher.detach().mean(dim=1, keepdim=True) - adapter(student.mean(dim=1, keepdim=True))
    distance: Tensor = torch.linalg.vector_norm(gap if padding is None else gap.masked_fill(padding[:, None], 0.0))
    return distance


def glamd_class_loss(student_logits: Tensor, teacher_logits: Tensor, weights: Tensor) -> Tensor:
    """Binary cross-entropy with the teacher's scores, ``sum weights * sum over classes of BCE``, [].

    It is not 0 at the teacher's scores, but its gradient is.

    Args:
        student_logits: [..., K] sigmoid logits (of a first stage: objectness, K = 1); gradient flows.
        teacher_logits: [..., K], treated as constant.
        weights: [...] weights of the predictions, for each level the mask (``GLAMDAttention.mask``) of a prediction's cell
            divided by the sum of the mask over images and cells. Neither anchors nor classes are in the denominator.

    Example:
        >>> glamd_class_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.tensor([[0.5, 0.5]]))  # 3 log 2
        tensor(2.0794)
    """
    return (soft_binary_rows(student_logits, teacher_logits) * weights).sum()


def glamd_box_loss(student_xyxy: Tensor, teacher_xyxy: Tensor, weights: Tensor) -> Tensor:
    """IoU loss between decoded boxes, ``sum weights * (1 - max(IoU, 1e-6))``, [].

    All predictions count, those of the background too.

    Args:
        student_xyxy: [..., 4] pixels, each box decoded with its own anchor; gradient flows. Disjoint boxes have no gradient.
        teacher_xyxy: [..., 4] pixels, treated as constant.
        weights: [...] weights of the predictions, for each level the mask of a prediction's cell divided by the number of
            predictions of the level in all images.

    Example:
        >>> box = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        >>> glamd_box_loss(box + torch.tensor([1.0, 0.0, 1.0, 0.0]), box, torch.ones(1))
        tensor(0.6667)
    """
    return (weights * (1 - paired_iou(student_xyxy, teacher_xyxy.detach()).clamp(min=1e-6))).sum()


class GLAMDLevel(nn.Module):
    """The adapters of one level, applied to the student."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.adapt_feature = nn.Conv2d(student_channels, teacher_channels, 1)
        self.adapt_channel = nn.Linear(student_channels, teacher_channels)
        self.adapt_spatial = nn.Conv2d(1, 1, 3, padding=1)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        temperature: float = 0.1,
        patch: int = 7,
        channel_mask: bool = True,
        eps: float = 0.0,
        padding: Tensor | None = None,
    ) -> tuple[GLAMDTerms, GLAMDAttention]:
        """Compute the losses of the features of one level, and the attention that weights its predictions.

        The feature loss and the channel loss are the means of their parts over the map and over patches.

        Args:
            student: [B, channels of the student, H, W]; gradient flows.
            teacher: [B, C, H, W], treated as constant.
            temperature: of the attention.
            patch: side of a patch in cells.
            channel_mask: weight channels by their attention in the feature loss.
            eps: as in ``glamd_feature_loss``.
            padding: [B, H, W] bool, cells that are left out. None: no such cell.
        """
        adapted = self.adapt_feature(student)
        channels_of = adapted if student.shape[1] != teacher.shape[1] else None
        attention = glamd_attention(student, teacher, temperature, patch, channels_of, channel_mask, padding)
        feature = glamd_feature_loss(adapted, teacher, attention, patch, eps)
        channel = glamd_channel_loss(student, teacher, self.adapt_channel, patch, padding)
        spatial = glamd_spatial_loss(student, teacher, self.adapt_spatial, padding)
        return GLAMDTerms((feature[0] + feature[1]) / 2, (channel[0] + channel[1]) / 2, spatial), attention


# ---------------------------------------------------------------------------------------------------------------- patches


def _softmax_in_patches(strength: Tensor, patch: int, padding: Tensor | None) -> Tensor:
    """[B, H, W] number of cells of a patch times the softmax of [B, H, W] over them; 0 in padding."""
    images, height, width = strength.shape
    rows, columns = -(-height // patch), -(-width // patch)
    if padding is not None:
        strength = strength.masked_fill(padding, -torch.inf)
    filled = F.pad(strength, (0, columns * patch - width, 0, rows * patch - height), value=-torch.inf)
    patches = filled.view(images, rows, patch, columns, patch).transpose(2, 3).flatten(3)  # [B, h, w, patch^2]
    counts = (patches != -torch.inf).sum(dim=-1, keepdim=True)
    attention = torch.where(counts > 0, counts * patches.softmax(dim=-1), 0.0)
    folded = attention.view(images, rows, columns, patch, patch).transpose(2, 3)
    return folded.reshape(images, rows * patch, columns * patch)[:, :height, :width]


def _channels_in_patches(magnitudes: Tensor, patch: int, temperature: float, padding: Tensor | None) -> Tensor:
    """[B, C, h, w] C times the softmax over channels of the means over patches of [B, C, H, W]."""
    return magnitudes.shape[1] * (_patch_means(magnitudes, patch, padding) / temperature).softmax(dim=1)


def _patch_sums(maps: Tensor, patch: int) -> Tensor:
    """[B, C, h, w] sums over patches of [B, C, H, W]."""
    return F.avg_pool2d(maps, patch, ceil_mode=True, divisor_override=1)


def _patch_counts(maps: Tensor, patch: int, padding: Tensor | None) -> Tensor:
    """Numbers of the cells of each patch that are not padding: [B, h, w], or [1, h, w] without padding."""
    cells = maps.new_ones(1, *maps.shape[-2:]) if padding is None else (~padding).to(maps.dtype)
    return _patch_sums(cells[:, None], patch)[:, 0]


def _patch_means(maps: Tensor, patch: int, padding: Tensor | None) -> Tensor:
    """[B, C, h, w] means over patches of [B, C, H, W], whose padded cells are 0; 0 for a patch of padding."""
    return _patch_sums(maps, patch) / _patch_counts(maps, patch, padding).clamp(min=1)[:, None]


def _root(total: Tensor) -> Tensor:
    """Square root with the gradient 0 at 0."""
    zero = total == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, total).sqrt())
