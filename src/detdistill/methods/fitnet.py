"""FitNet: the student's maps should equal the teacher's.

Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, in the three forms that detector papers use as a baseline:

- ``plain``: mean squared difference (most papers);
- ``normalized``: each image's map is scaled to unit length first (mmrazor and United-Perception);
- ``modified``: foreground cells only, and an adapter with deformable attention over all levels (Lao et al., "UniKD", ICCV 2023).

Results called "FitNet" differ between papers because form, levels and weight differ, so state all three with a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.contract import Detector, Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.counting import mean_over_ranks
from detdistill.functional.deformable import Cells, DeformableEncoder
from detdistill.functional.level_maps import paired_levels
from detdistill.functional.masks import foreground_mask
from detdistill.functional.precision import full_precision
from detdistill.functional.similarity import mean_cosine
from detdistill.methods.shared.align import LevelAdapters, LevelPair, pair_levels, resize_like
from detdistill.methods.shared.contract import Method, Stage
from detdistill.methods.shared.hyper_parameters import MethodError
from detdistill.structures import Batch, Clock, Features, Losses, Observation
from detdistill.values import Index, Weight


def fitnet_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weight: float = 1.0, reduction: str = "mean", half: bool = False
) -> Tensor:
    """Squared difference of the maps, summed over levels.

    Args:
        student: L maps [B, C, H, W], already in the teacher's channels; gradient flows. Maps of another size are
            resized to the teacher's.
        teacher: L maps [B, C, H, W], treated as constant.
        weight: factor of every level's loss.
        reduction: of the squared differences. ``mean``: over images, channels and cells; ``batch``: sum divided by B;
            ``dist``: square root of the sum (for equal maps its gradient is 0; mmrazor's is NaN). Values of the three differ
            by factors up to millions, so each needs its own weight.
        half: multiply by 1/2, as in the 2015 paper (equation 3).

    Returns:
        [] the loss.

    Example:
        >>> import torch
        >>> float(fitnet_loss([torch.ones(1, 2, 2, 2)], [torch.zeros(1, 2, 2, 2)]))
        1.0
    """
    factor = weight / 2 if half else weight
    pairs = paired_levels("fitnet_loss", student, teacher, any_size=True)
    return factor * _added([_reduce(resize_like(mine, theirs), theirs.detach(), reduction) for mine, theirs in pairs])


def fitnet_normalized_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: float = 1.0,
    reduction: str = "batch",
    mean_over_levels: bool = False,
) -> Tensor:
    """Squared difference of maps scaled to unit length: 2 - 2 cos(student, teacher) for each image and level, 0 to 4.

    Args:
        student: as in ``fitnet_loss``.
        teacher: as in ``fitnet_loss``.
        weight: factor of every level's loss.
        reduction: as in ``fitnet_loss``; both released codes use ``batch``.
        mean_over_levels: take the mean over levels (United-Perception); False: the sum (mmrazor).

    Returns:
        [] the loss.

    Example:
        >>> import torch
        >>> maps = torch.arange(8.0).reshape(1, 2, 2, 2)
        >>> round(float(fitnet_normalized_loss([maps], [-3 * maps])), 6)
        4.0
    """
    losses = []
    for mine, theirs in paired_levels("fitnet_normalized_loss", student, teacher, any_size=True):
        losses.append(_reduce(_unit_length(resize_like(mine, theirs)), _unit_length(theirs.detach()), reduction))
    return weight * _added(losses) / (len(losses) if mean_over_levels else 1)


def fitnet_modified_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], foreground: Sequence[Tensor], weight: float = 1.0
) -> Tensor:
    """Mean squared difference over the foreground cells of each level, summed over levels (UniKD, section 4.1).

    UniKD states only that the foreground is that of FGD. The division by channels times foreground cells, without FGD's
    weights by box size, is our choice. Without any foreground cell the loss is 0 and still connected to the student.

    Args:
        student: as in ``fitnet_loss``.
        teacher: as in ``fitnet_loss``.
        foreground: L masks [B, H, W] bool at the teacher's size (``detdistill.functional.masks.foreground_mask``).
        weight: factor of every level's loss.

    Returns:
        [] the loss.
    """
    pairs = paired_levels("fitnet_modified_loss", student, teacher, any_size=True)
    losses = []
    for (mine, theirs), mask in zip(pairs, foreground, strict=True):
        squares = (resize_like(mine, theirs) - theirs.detach()).square() * mask[:, None]
        losses.append(squares.sum() / (theirs.shape[1] * mean_over_ranks(mask.sum(), least=1)))
    return weight * _added(losses)


def _reduce(student: Tensor, teacher: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return F.mse_loss(student, teacher)
    if reduction == "batch":
        return F.mse_loss(student, teacher, reduction="sum") / len(student)
    if reduction == "dist":
        distance: Tensor = torch.linalg.vector_norm(student - teacher)  # its gradient at zero is zero
        return distance
    raise DetdistillError(f"fitnet: reduction={reduction!r} is not one of mean, batch, dist")


def _unit_length(maps: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C*H*W], each image divided by its Euclidean norm; an all-zero map stays zero."""
    flat = maps.flatten(1)
    norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    # No epsilon, as in the released codes. For zero maps the divisor is 1: a tiny one would make the gradient enormous.
    unit: Tensor = flat / norm.masked_fill(norm == 0, 1.0)
    return unit


def _added(losses: Sequence[Tensor]) -> Tensor:
    return sum(losses[1:], losses[0])


class FitNetAttentionAdapter(nn.Module):
    """UniKD's stronger adapter: a 1x1 convolution for each level, then deformable self-attention over all levels together.

    The paper only names "fully connected layers and deformable self-attention layers". We use the encoder layers of
    Deformable DETR: at most 8 heads (a number that divides the channels), 4 points, a feed-forward part 4 times as wide.
    """

    def __init__(self, pairs: Sequence[LevelPair], layers: int = 2) -> None:
        """Build the layers.

        Args:
            pairs: the paired levels. If the teacher's channels differ between levels, attention runs at the largest
                number, and another 1x1 convolution reduces the output of the narrower levels.
            layers: number of attention layers; with 0 only the convolutions are left.
        """
        super().__init__()
        width = max(pair.teacher_channels for pair in pairs)
        self.project = LevelAdapters([replace(pair, teacher_channels=width) for pair in pairs], always=True)
        self.attention = DeformableEncoder(width, len(pairs), layers)
        self.leave = LevelAdapters([replace(pair, student_channels=width) for pair in pairs])

    def forward(self, maps: Sequence[Tensor], padding: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Adapt student maps [B, Cs, h, w], with masks [B, h, w] of their padded cells, to [B, Ct, h, w]."""
        adapted: list[Tensor] = self.leave(self.attention(Cells.of(self.project(maps), padding)).maps())
        return adapted


class FitNet(Method[Observation]):
    """FitNet between the necks' maps; levels are paired by stride."""

    slug = "fitnet"
    title = "FitNets: Hints for Thin Deep Nets (ICLR 2015); modified as in UniKD (ICCV 2023)"
    bibtex = """@inproceedings{romero2015fitnets,
  title={FitNets: Hints for Thin Deep Nets},
  author={Romero, Adriana and Ballas, Nicolas and Ebrahimi Kahou, Samira and Chassang, Antoine and
    Gatta, Carlo and Bengio, Yoshua},
  booktitle={International Conference on Learning Representations},
  year={2015}
}"""

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        variant: Literal["plain", "normalized", "modified"] = "plain",
        weight: Weight = 1.0,
        levels: Sequence[int] | None = None,
        reduction: Literal["mean", "batch", "dist"] | None = None,
        half: bool = False,
        mean_over_levels: bool = False,
        always_adapt: bool = False,
        attention_layers: Index = 2,
        warm_iters: Index = 0,
        hint_share: Weight = 0.0,
    ) -> None:
        """Pair the levels and build the adapters.

        Args:
            teacher: any detector.
            student: any detector.
            variant: form of the loss. ``plain``: mean squared difference; ``normalized``: each image's map is scaled to unit
                length first; ``modified``: foreground cells only, with deformable attention over all levels in the adapter.
            weight: factor of every level's loss (1 is our choice for ``plain`` and ``modified``).
            levels: indices of the student levels to use; None: all that have a partner.
            reduction: of the squared differences. ``mean`` over images, channels and cells; ``batch``: sum divided by the images;
                ``dist``: square root of the sum. None: ``mean`` for plain, ``batch`` for normalized. ``modified`` has none.
            half: multiply the loss by 1/2, as in the 2015 paper; ``plain`` only.
            mean_over_levels: take the mean over levels (United-Perception) instead of the sum; ``normalized`` only.
            always_adapt: add a 1x1 convolution for equal channels too (``modified`` always has one).
            attention_layers: number of deformable attention layers in the adapter of ``modified``.
            warm_iters: steps over which the weight rises linearly from 0 (United-Perception).
            hint_share: 0: train on this loss and the detection loss together. Above 0: two stages, as in the 2015 paper: first
                on this loss alone, for ``hint_share`` times the run's epochs, then on the detection loss alone.

        Raises:
            MethodError: a hyper-parameter is out of range or does not belong to the variant.
            PairError: no common level.
        """
        super().__init__(teacher, student)
        foreign = {
            "reduction": variant == "modified" and reduction is not None,
            "half": variant != "plain" and half,
            "mean_over_levels": variant != "normalized" and mean_over_levels,
        }
        for name, given in foreign.items():
            if given:
                raise MethodError(f"{self.slug}: {name} means nothing to variant {variant!r}; leave it out")
        self.variant, self.weight = variant, weight
        self.reduction = reduction or ("batch" if variant == "normalized" else "mean")
        self.halved, self.mean_over_levels = half, mean_over_levels
        self.warm_iters, self.hint_share = warm_iters, hint_share
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        self.adapters: nn.Module
        if variant == "modified":
            self.adapters = FitNetAttentionAdapter(self.pairs, attention_layers)
        else:
            self.adapters = LevelAdapters(self.pairs, always=always_adapt)

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Compute the term ``fitnet``; no term if ``hint_share`` is above 0, because the hint stage has used it already."""
        return Losses({}) if self.hint_share > 0 else self.hint(seen, taught, batch, clock)

    def hint(self, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Compute the loss of the chosen variant; the monitor ``cosine`` is the mean cosine of the compared maps."""
        theirs = [taught.features.maps[pair.teacher] for pair in self.pairs]
        with full_precision(batch.images.device):
            mine = self._adapt(seen.features.take([pair.student for pair in self.pairs]))
            mine = [resize_like(level, fixed) for level, fixed in zip(mine, theirs, strict=True)]
            if self.variant == "plain":
                loss = fitnet_loss(mine, theirs, self.weight, self.reduction, self.halved)
            elif self.variant == "normalized":
                loss = fitnet_normalized_loss(mine, theirs, self.weight, self.reduction, self.mean_over_levels)
            else:
                loss = fitnet_modified_loss(mine, theirs, self._foreground(theirs, batch), self.weight)
            return Losses({"fitnet": loss * clock.warm_up(self.warm_iters)}, {"cosine": mean_cosine(mine, theirs)})

    def _adapt(self, features: Features) -> list[Tensor]:
        adapted: list[Tensor]
        if isinstance(self.adapters, FitNetAttentionAdapter):
            adapted = self.adapters(features.maps, features.padding)
        else:
            adapted = self.adapters(features.maps)
        return adapted

    @staticmethod
    def _foreground(maps: Sequence[Tensor], batch: Batch) -> list[Tensor]:
        """Foreground masks [B, H, W], one for each map. Maps cover the padded images, so boxes are scaled by the padded size."""
        boxes = [target.without_crowd().boxes_xyxy for target in batch.targets]
        sizes = [batch.padding_hw] * len(batch)
        return [foreground_mask(boxes, sizes, (level.shape[2], level.shape[3])) for level in maps]

    def stages(self, student: Detector) -> tuple[Stage, ...]:
        """Return the stage ``distill``; with ``hint_share`` above 0 the stage ``hint`` before it."""
        last = super().stages(student)
        if self.hint_share == 0:
            return last

        def step(batch: Batch, taught: Observation, clock: Clock) -> Losses:
            return self.hint(student(batch).float(), taught.float(), batch, clock).as_distilled()

        trains = (student, self)
        hints = Stage("hint", step, lambda clock: trains, evaluates=None, learns_from=self, share=self.hint_share)
        return (hints, *last)
