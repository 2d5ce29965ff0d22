"""The losses of ScaleKD. Their divergences are our choices, because no text of the paper that names them was to be had.

Shape letters: B images, P dense predictions of an image, M positives and R regions of the whole batch, K classes, D channels,
H x W cells of a map.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.functional.boxes import giou_loss
from detdistill.functional.counting import divisor_over_ranks, share_over_ranks
from detdistill.functional.soft_targets import kl_divergence, soft_binary_rows


def scalekd_feature_loss(student: Tensor, teacher: Tensor, padding: Tensor | None = None) -> Tensor:
    """Squared distance of scale-decoupled features, averaged over images, channels and cells that are not padding.

    Args:
        student: [B, D, H, W]; gradient flows.
        teacher: [B, D, H, W]; gradient flows, because the modules that compute it may be trained. Detach it if they are not.
        padding: [B, H, W] bool, True for cells that are left out; None: none.

    Returns:
        [] the loss.

    Example:
        >>> import torch
        >>> float(scalekd_feature_loss(torch.full((1, 2, 3, 3), 2.0), torch.zeros(1, 2, 3, 3)))
        4.0
    """
    cells = torch.tensor(float(student[:, 0].numel()), device=student.device) if padding is None else (~padding).sum().float()
    share = share_over_ranks(cells)  # also without padding: other processes may have some
    if padding is None:
        return F.mse_loss(student, teacher) * share
    difference = (student - teacher).masked_fill(padding[:, None], 0.0)
    return difference.square().sum() / cells.clamp(min=1) * share / student.shape[1]


def scalekd_class_loss(
    student_logits: Tensor,
    assistant_logits: Tensor,
    divisor: Tensor | float,
    *,
    softmax: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Class imitation of dense predictions: binary cross-entropy with the assistant's scores, summed over predictions.

    The smallest value is the entropy of the assistant's scores, not 0; the gradient is 0 there.

    Args:
        student_logits: [B, P, K] sigmoid logits, or [B, P, K+1] softmax logits; gradient flows.
        assistant_logits: the same shape, treated as constant.
        divisor: number of positives.
        softmax: KL divergence of softmaxes instead of the cross-entropy.
        mask: [B, P] bool, False for predictions that are left out; None: none.

    Returns:
        [] the loss.

    Example:
        >>> import torch
        >>> round(float(scalekd_class_loss(torch.zeros(1, 4, 1), torch.zeros(1, 4, 1), divisor=2)), 4)
        1.3863
    """
    fixed = assistant_logits.detach()
    if softmax:
        found = kl_divergence(student_logits, fixed)
    else:
        found = soft_binary_rows(student_logits, fixed)
    if mask is not None:
        found = found.masked_fill(~mask, 0.0)
    return found.sum() / divisor


def scalekd_region_class_loss(student_logits: Tensor, assistant_logits: Tensor) -> Tensor:
    """Class imitation of regions: the mean over regions of the KL divergence of softmaxes.

    Args:
        student_logits: [R, K+1]; gradient flows.
        assistant_logits: [R, K+1], treated as constant.

    Returns:
        [] the loss; 0, connected to the student, if there are no regions.
    """
    return kl_divergence(student_logits, assistant_logits).sum() / divisor_over_ranks(len(student_logits), student_logits)


def scalekd_box_loss(student: Tensor, assistant: Tensor, kind: Literal["smooth_l1", "giou"] = "smooth_l1") -> Tensor:
    """Box imitation: the mean over positives of the smooth L1 or of the GIoU loss.

    Args:
        student: [M, n] box deltas as the detector encodes them, or for ``giou`` decoded boxes [M, 4]; gradient flows.
        assistant: the same shape, treated as constant.
        kind: ``smooth_l1`` (beta 1, averaged over the n numbers, too) or ``giou``.

    Returns:
        [] the loss; 0, connected to the student, if there are no positives.

    Example:
        >>> import torch
        >>> float(scalekd_box_loss(torch.full((2, 4), 3.0), torch.zeros(2, 4)))
        2.5
    """
    fixed = assistant.detach()
    if kind == "giou":
        return giou_loss(student, fixed).sum() / divisor_over_ranks(len(student), student)
    return F.smooth_l1_loss(student, fixed, reduction="sum") / divisor_over_ranks(student.numel(), student)
