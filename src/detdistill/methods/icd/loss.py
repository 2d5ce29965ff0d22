"""Losses of ICD and the queries they need: objects of the image and invented ones, attention to objects, values of cells.

Shape letters: B images, N queries of an image, S cells of all levels, M heads, D channels of a head, K classes, G objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from detdistill.functional.counting import mean_over_ranks
from detdistill.functional.precision import at_least_float32

Form = Literal["mse", "mse_batch", "l1", "smooth_l1", "l2"]
Norm = Literal["both", "teacher", "none"]
CHUNK = 2**22
"""Largest number of attention weights that are computed at once."""
LEAST_MASS = 1e-6
"""Smallest divisor where a loss is divided by a sum of weights or by a number of queries."""


# ------------------------------------------------------------------------------------------------------------- queries


class BoxPrior(NamedTuple):
    """Where invented objects are drawn from: classes and sizes of boxes in a data set."""

    frequencies: Tensor
    """[K] relative frequency of each class, above 0."""
    mean_wh: Tensor
    """[K, 2] mean width and height, as fractions of the image."""
    std_wh: Tensor
    """[K, 2] standard deviations."""


class ICDQueries(NamedTuple):
    """Queries of a batch; the real objects of an image come first, padding last."""

    labels: Tensor
    """[B, N] class; 0 for padding."""
    points_xy01: Tensor
    """[B, N, 2] the point that stands for the object, as fractions of the image; 0 for padding."""
    sides01: Tensor
    """[B, N, 4] distances from the point to the left, top, right and bottom side, as fractions of the image; 0 for padding."""
    real: Tensor
    """[B, N] bool: the object is in the image."""
    padded: Tensor
    """[B, N] bool: no query, only the end of a shorter list."""

    @property
    def sizes01(self) -> Tensor:
        """[B, N, 2] width and height of the boxes, as fractions of the image."""
        return self.sides01[..., :2] + self.sides01[..., 2:]


def icd_queries(
    boxes_xyxy: Sequence[Tensor],
    labels: Sequence[Tensor],
    sizes_hw: Tensor,
    prior: BoxPrior,
    ratio: float = 5.0,
    most: int = 300,
    jitter: float = 0.3,
    generator: torch.Generator | None = None,
) -> ICDQueries:
    """Draw the queries of a batch: every object of an image, and objects that are not there.

    An image with g objects gets ``min(max(1, int((ratio + 1) g)), max(most, g))`` queries, so an image without objects has one
    invented object. Its class is drawn by frequency, its centre uniformly and clipped to 0.03..0.97, its size from a normal
    distribution that is clipped to two standard deviations and to 0.002..0.7; the box is clipped to the image. The point of a
    query is its box's centre, moved by up to ``jitter`` times width and height in each direction.

    Args:
        boxes_xyxy: B tensors [G_b, 4] in pixels.
        labels: B tensors [G_b] int64.
        sizes_hw: [B, 2] valid height and width of each image.
        prior: distribution of the invented objects.
        ratio: number of invented objects for each real one.
        most: largest number of queries of an image with fewer objects.
        jitter: largest movement of a point, as a fraction of its box's sides.
        generator: random generator of the CPU (equal seeds draw the same on any device); None: torch's global one.

    Returns:
        The queries, in the boxes' dtype, at least float32; N is the largest number of any image.
    """
    found = []
    for boxes, classes, size_hw in zip(boxes_xyxy, labels, sizes_hw, strict=True):
        count = min(max(1, int(len(boxes) * (ratio + 1))), max(most, len(boxes)))
        invented, their_classes = _invented(count - len(boxes), prior, generator)
        real = at_least_float32(boxes)
        real = real / size_hw.flip(0).repeat(2).to(real)
        corners = torch.cat([real, invented.to(real)])
        moved = (torch.rand(count, 2, generator=generator) - 0.5).to(real) * (2 * jitter)
        points = (corners[:, :2] + corners[:, 2:]) / 2 + moved * (corners[:, 2:] - corners[:, :2])
        sides = torch.cat([points - corners[:, :2], corners[:, 2:] - points], dim=1)
        is_real = torch.arange(count, device=real.device) < len(boxes)
        is_query = torch.ones_like(is_real)
        found.append((torch.cat([classes, their_classes.to(classes)]), points, sides, is_real, is_query))
    classes, points, sides, real, is_query = (pad_sequence(list(part), batch_first=True) for part in zip(*found, strict=True))
    return ICDQueries(classes, points, sides, real, ~is_query)


def _invented(count: int, prior: BoxPrior, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Boxes [count, 4] as fractions of the image, and their classes [count], on the CPU."""
    if count == 0:
        return torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    classes = torch.multinomial(prior.frequencies.cpu().float(), count, replacement=True, generator=generator)
    mean, std = prior.mean_wh.cpu().float()[classes], prior.std_wh.cpu().float()[classes]
    noise = torch.randn(count, 2, generator=generator).clamp(-2, 2)
    half = (mean + noise * std).clamp(2e-3, 0.7) / 2
    center = torch.rand(count, 2, generator=generator).clamp(0.03, 0.97)
    return torch.cat([center - half, center + half], dim=1).clamp(0, 1), classes


# ----------------------------------------------------------------------------------------------------------- auxiliary


def icd_auxiliary_losses(outputs: Tensor, queries: ICDQueries) -> tuple[Tensor, Tensor]:
    """The auxiliary task that trains the decoder: is the object in the image, and where are its sides?

    - identification: binary cross-entropy of the first output, averaged over all queries of the batch;
    - localisation: the sigmoids of the other outputs against the distances to the sides, ``|difference| / width`` for left and
      right and ``|difference| / height`` for top and bottom, summed over the sides and averaged over the real objects.

    Args:
        outputs: [B, N, 5] logits: confidence, then left, top, right, bottom; gradient flows.
        queries: the queries that were decoded.

    Returns:
        Both losses, [] each; localisation is 0 for a batch without objects.
    """
    valid, real = (~queries.padded).to(outputs.dtype), queries.real.to(outputs.dtype)
    entropy = F.binary_cross_entropy_with_logits(outputs[..., 0], real, weight=valid, reduction="sum")
    scale = queries.sizes01.repeat(1, 1, 2).clamp(min=1e-7)
    apart = ((outputs[..., 1:].sigmoid() - queries.sides01).abs() / scale).sum(dim=-1)
    masses = mean_over_ranks(torch.stack([valid.sum(), real.sum()]), least=LEAST_MASS)
    return entropy / masses[0], (apart * real).sum() / masses[1]


# -------------------------------------------------------------------------------------------------------- distillation


@torch.no_grad()
def icd_value_weights(
    queries: Tensor, keys: Tensor, real: Tensor, padding: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Weight of each cell: the attention of the real objects to it, summed over the objects; no gradient.

    ``m[b, h, s] = sum over real objects n of softmax over cells (q_n . k_s / sqrt(D) / temperature)``. The weights of an image
    sum to its number of objects in each head. Attention is computed for a few objects at a time.

    Args:
        queries: [B, M, N, D].
        keys: [B, M, S, D].
        real: [B, N] bool.
        padding: [B, S] bool, True for cells that get no attention; None: no such cell.
        temperature: above 0.

    Returns:
        [B, M, S].

    Example:
        >>> queries, keys = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 5, 4)
        >>> icd_value_weights(queries, keys, torch.tensor([[True, False]]))
        tensor([[[0.2000, 0.2000, 0.2000, 0.2000, 0.2000]]])
    """
    images, heads, cells, width = keys.shape
    total = keys.new_zeros(images, heads, cells)
    chosen = torch.nonzero(real.any(dim=0)).flatten()
    for some in torch.split(chosen, max(1, CHUNK // (images * heads * cells))):
        if len(some) == 0:
            continue
        scores = (queries[:, :, some] / (width**0.5 * temperature)) @ keys.mT
        if padding is not None:
            scores = scores.masked_fill_(padding[:, None, None], -torch.inf)
        attention = scores.softmax(dim=-1)
        total += torch.einsum("bmns,bn->bms", attention, real[:, some].to(attention.dtype))
    return total


def icd_value_loss(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    form: Form = "mse",
    norm: Norm = "both",
    eps: float = 1e-5,
) -> Tensor:
    """Distance of the values of student and teacher, weighted by the attention of the objects.

    Values are normalised to mean 0 and variance 1 in each head. The released PyTorch code divides by the sum of the weights, in
    each image and head; the paper divides by the number of objects and heads.

    Args:
        student: [B, S, M, D] values; gradient flows.
        teacher: [B, S, M, D] values, treated as constant.
        weights: [B, M, S] weight of each cell (``icd_value_weights``), treated as constant.
        form: ``mse``: squared difference, divided by the sum of the weights in each image and head, then averaged; an image
            without objects counts as 0 there. All others divide once, by the sum of the weights in the batch: ``mse_batch``
            (released MegEngine code), ``l1``, ``smooth_l1``, and ``l2``, the root of ``mse_batch``.
        norm: which sides are normalised.
        eps: added to the variance; 1e-4 in the MegEngine code.

    Returns:
        [] mean over channels; 0 without objects.

    Example:
        >>> same = torch.randn(1, 3, 2, 4)
        >>> icd_value_loss(2 * same + 1, same, torch.ones(1, 2, 3), eps=1e-12).round(decimals=4).abs()
        tensor(0.)
    """
    fixed, width = teacher.detach(), (teacher.shape[-1],)
    if norm != "none":
        fixed = F.layer_norm(fixed, width, eps=eps)
    if norm == "both":
        student = F.layer_norm(student, width, eps=eps)
    distance = {"l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}.get(form, F.mse_loss)
    apart = distance(student, fixed, reduction="none").mean(dim=-1)  # [B, S, M]
    share = weights.detach().mT
    if form == "mse":
        return ((apart * share).sum(dim=1) / share.sum(dim=1).clamp(min=LEAST_MASS)).mean()
    total = (apart * share).sum() / mean_over_ranks(share.sum(), least=LEAST_MASS)
    if form != "l2":
        return total
    nothing = total == 0  # the root has no finite gradient there
    return torch.where(nothing, total, torch.where(nothing, 1.0, total).sqrt())
