"""DICOD's classification and localization losses; the method and its source are in ``method.py``.

Shape letters: B images, G objects of an image, M positives of the batch, K classes, S side of a crop, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.functional.counting import divisor_over_ranks
from detdistill.functional.soft_targets import binary_kl_divergence

Form = Literal["softmax", "binary", "normalized"]
TINY = 1e-10
"""Added to probabilities, as in the released code."""


def dicod_classification_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0, form: Form = "softmax", normalizer: float | None = None
) -> Tensor:
    """Section 3.1: temperature^2 times the mean over positives of KL(classifier || student).

    Forms of the divergence:

    - ``softmax``: over K + 1 classes; the classifier gives the background probability 0.
    - ``binary``: the two-way divergence of each class, averaged over the classes (equation 4; the paper exchanges both
      probabilities at the object's class, which does not change the value).
    - ``normalized``: sigmoids divided by their sum over the classes, then as ``softmax`` (only in the released code).

    1e-10 is added to both distributions, except for ``binary``, which uses exact logarithms of sigmoids.

    Args:
        logits: [M, K+1] with the background last (softmax), else [M, K]; gradient flows.
        teacher_logits: [M, K], treated as constant.
        temperature: T, divides both logits.
        form: form of the divergence, see above.
        normalizer: divisor of the sum over positives; None: M.

    Returns:
        [] the unweighted loss. Without positives, 0 that is connected to the graph.

    Example:
        >>> import torch
        >>> alike, nowhere = torch.tensor([[1.0, 2.0]]), torch.tensor([[-1e4]])
        >>> round(float(dicod_classification_loss(torch.cat([alike, nowhere], dim=1), alike)), 6)
        0.0
    """
    mine, theirs = logits / temperature, teacher_logits.detach() / temperature
    if form == "softmax":
        theirs = F.pad(theirs.softmax(dim=-1), (0, 1))
        divergence = _kl(theirs, mine.softmax(dim=-1)).sum(dim=-1)
    elif form == "normalized":
        theirs, mine = (side.sigmoid() / side.sigmoid().sum(dim=-1, keepdim=True) for side in (theirs, mine))
        divergence = _kl(theirs, mine).sum(dim=-1)
    else:
        divergence = binary_kl_divergence(mine, theirs).mean(dim=-1)
    return temperature**2 * divergence.sum() / (divisor_over_ranks(len(logits), logits) if normalizer is None else normalizer)


def _kl(theirs: Tensor, mine: Tensor) -> Tensor:
    return (theirs + TINY) * ((theirs + TINY).log() - (mine + TINY).log())


def dicod_pooled(maps: Sequence[Tensor], cells: int = 4) -> list[Tensor]:
    """Average crops and their feature maps over grids; entry i over a grid of ``cells * 2^i`` by ``cells * 2^i``.

    Args:
        maps: [M, C_i, H_i, W_i], the pixels first.
        cells: g, side of the first grid.
    """
    return [F.adaptive_avg_pool2d(level, cells * 2**index) for index, level in enumerate(maps)]


def dicod_localization_loss(
    predicted: Sequence[Tensor], truth: Sequence[Tensor], pixel_weight: float = 0.15, feature_weight: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Equations 7 and 10: L1 differences between the crops of predicted and true boxes; means over positives, channels, cells.

    Args:
        predicted: pooled crops of the predicted boxes, then their pooled feature maps (see ``dicod_pooled``), each [M, C_i,
            h_i, w_i]; gradient flows.
        truth: the same of the true boxes, treated as constant.
        pixel_weight: weight of the first entry (pixels).
        feature_weight: weight of the mean over the other entries; the released code uses one weight for both.

    Returns:
        The weighted pixel term [] and feature term []. Without positives, zeros that are connected to the graph.
    """
    apart = [
        (mine - fixed.detach()).abs().flatten(1).mean(dim=1).sum() / max(1, len(mine))
        for mine, fixed in zip(predicted, truth, strict=True)
    ]
    features = torch.stack(apart[1:]).mean() if len(apart) > 1 else apart[0] * 0
    return pixel_weight * apart[0], feature_weight * features


def dicod_sample(count: int, limit: int, generator: torch.Generator | None = None) -> Tensor:
    """A uniform random sample of at most ``limit`` of the indices below ``count``, in rising order.

    The expected mean over the sample is the mean over all indices.
    """
    if count <= limit:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:limit].sort().values
