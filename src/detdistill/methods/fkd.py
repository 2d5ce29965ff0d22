"""FKD: imitate cells and channels where teacher or student have high attention, and the relations between cells.

Zhang, Ma, "Improve Object Detection with Feature-based Knowledge Distillation: Towards Accurate and Efficient Detectors",
ICLR 2021; extended as "Structured Knowledge Distillation for Accurate and Efficient Object Detection", TPAMI 2023. Also
known as FBKD. No code of the TPAMI version was available; this is the form of MMRazor and of the ICLR code.

Shape letters: B images, C channels, H x W cells of one level, N = H*W, M pooled cells, D inner channels of a relation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from detdistill.detectors.contract import Detector, Teacher
from detdistill.functional.attention import attentions, channel_attention, spatial_attention
from detdistill.functional.level_maps import check_maps
from detdistill.functional.precision import full_precision
from detdistill.functional.relations import NonLocalBlock
from detdistill.methods.shared.align import LevelAdapters, PairedMaps, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import MethodError, check_some
from detdistill.structures import Batch, Clock, Losses, Observation
from detdistill.values import Count, Positive, Weight


class FKDTerms(NamedTuple):
    """The four unweighted losses of one level, [] each: Euclidean norms over the whole batch, not divided by anything."""

    feature: Tensor
    channel: Tensor
    spatial: Tensor
    relation: Tensor


def fkd_feature_loss(adapted: Tensor, teacher: Tensor, cells: Tensor, channels: Tensor | None = None) -> Tensor:
    """Attention-weighted distance, ``sqrt(sum (teacher - adapted)^2 * cells [* channels])`` over images, channels and cells.

    For equal maps the gradient is zero, not NaN.

    Args:
        adapted: [B, C, H, W] the student's map after its adapter; gradient flows.
        teacher: [B, C, H, W], treated as constant.
        cells: [B, H, W] spatial attention, treated as constant.
        channels: [B, C] channel attention, treated as constant; None (two-stage form): all channels count equally.
    """
    check_maps("fkd_feature_loss", adapted, teacher)
    squared = (teacher.detach() - adapted).square()
    if channels is None:
        per_cell = squared.sum(dim=1)
    else:
        per_cell = torch.einsum("bchw,bc->bhw", squared, channels.detach())
    total = (per_cell * cells.detach()).sum()
    agree = total == 0
    distance: Tensor = torch.where(agree, 0.0, torch.where(agree, 1.0, total).sqrt())
    return distance


def fkd_channel_loss(adapted: Tensor, teacher: Tensor) -> Tensor:
    """Euclidean distance between ``adapted`` [B, C] and the means over cells of ``teacher`` [B, C, H, W]."""
    return _norm(teacher.detach().mean(dim=(2, 3)) - adapted)


def fkd_spatial_loss(adapted: Tensor, teacher: Tensor) -> Tensor:
    """Euclidean distance between ``adapted`` [B, 1, H, W] and the means over channels of ``teacher`` [B, C, H, W]."""
    return _norm(teacher.detach().mean(dim=1, keepdim=True) - adapted)


def fkd_relation_loss(adapted: Tensor, teacher_relation: Tensor) -> Tensor:
    """Euclidean distance between two relation maps [B, C, H, W]; gradient flows to both (the teacher's block is trained)."""
    return _norm(teacher_relation - adapted)


def _norm(difference: Tensor) -> Tensor:
    """Euclidean norm, []. Its gradient at zero is zero, where that of a plain square root is NaN."""
    norm: Tensor = torch.linalg.vector_norm(difference)
    return norm


class FKDLevel(nn.Module):
    """The trainable modules of one level: four adapters of the student and a non-local block for each side."""

    def __init__(self, channels: int, reduction: int = 2, pool: int = 2) -> None:
        """Build the modules; see ``NonLocalBlock`` for ``reduction`` and ``pool``."""
        super().__init__()
        self.adapt_feature = nn.Conv2d(channels, channels, 1)
        self.adapt_channel = nn.Linear(channels, channels)
        self.adapt_spatial = nn.Conv2d(1, 1, 3, padding=1)
        self.adapt_relation = nn.Conv2d(channels, channels, 1)
        self.student_nonlocal = NonLocalBlock(channels, reduction, pool)
        self.teacher_nonlocal = NonLocalBlock(channels, reduction, pool)

    def forward(self, student: Tensor, teacher: Tensor, cells: Tensor, channels: Tensor | None = None) -> FKDTerms:
        """Compute the losses of one level.

        Args:
            student: [B, C, H, W] in the teacher's channels; gradient flows.
            teacher: [B, C, H, W], treated as constant; gradient flows to the teacher's non-local block.
            cells: [B, H, W] spatial attention (``fkd_attention``).
            channels: [B, C] channel attention, or None.
        """
        fixed = teacher.detach()
        return FKDTerms(
            feature=fkd_feature_loss(self.adapt_feature(student), fixed, cells, channels),
            channel=fkd_channel_loss(self.adapt_channel(student.mean(dim=(2, 3))), fixed),
            spatial=fkd_spatial_loss(self.adapt_spatial(student.mean(dim=1, keepdim=True)), fixed),
            relation=fkd_relation_loss(self.adapt_relation(self.student_nonlocal(student)), self.teacher_nonlocal(fixed)),
        )


@torch.no_grad()
def fkd_attention(
    student: Tensor, teacher: Tensor, spatial_temperature: float = 0.5, channel_temperature: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Mean of the student's and the teacher's attention: over cells [B, H, W], over channels [B, C] (section 3.1); no gradient.

    Args:
        student: [B, C, H, W].
        teacher: [B, C, H, W].
        spatial_temperature: of the softmax over cells.
        channel_temperature: of the softmax over channels.
    """
    check_maps("fkd_attention", student, teacher)
    if spatial_temperature == channel_temperature:
        both = zip(attentions(teacher, spatial_temperature), attentions(student, spatial_temperature), strict=True)
        cells, channels = ((theirs + mine) / 2 for theirs, mine in both)
        return cells, channels
    cells = (spatial_attention(teacher, spatial_temperature) + spatial_attention(student, spatial_temperature)) / 2
    channels = (channel_attention(teacher, channel_temperature) + channel_attention(student, channel_temperature)) / 2
    return cells, channels


def fkd_loss(
    terms: FKDTerms, feature: float = 7e-5, channel: float = 4e-3, spatial: float = 4e-3, relation: float = 7e-5
) -> Tensor:
    """Weighted sum of the four losses of one level, []; the default weights are those for two-stage detectors."""
    return feature * terms.feature + channel * terms.channel + spatial * terms.spatial + relation * terms.relation


class _Profile(NamedTuple):
    weights: tuple[float, float, float, float]
    temperature: float
    channel_mask: bool


_PROFILES = {
    "two_stage": _Profile((7e-5, 4e-3, 4e-3, 7e-5), 0.5, False),
    "one_stage": _Profile((4.2e-4, 2.4e-2, 2.4e-2, 4.2e-4), 0.1, True),
}


class FKD(Method[Observation]):
    """FKD between the necks' maps; levels are paired by stride.

    The norms are over the whole local batch, so a batch of twice the size multiplies the loss by sqrt(2). The published
    weights are for 2 images per device. Padded cells and images without boxes count like all others. The default ``pools``
    are the authors'; MMRazor's code pools keys and values twice (by 2 and by ``maxpool_stride``).
    """

    slug = "fkd"
    title = (
        "Improve Object Detection with Feature-based Knowledge Distillation: Towards Accurate and Efficient Detectors (ICLR 2021)"
    )
    bibtex = """@inproceedings{zhang2021fkd,
  title={Improve Object Detection with Feature-based Knowledge Distillation: Towards Accurate and Efficient Detectors},
  author={Zhang, Linfeng and Ma, Kaisheng},
  booktitle={International Conference on Learning Representations},
  year={2021}
}"""

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        profile: Literal["two_stage", "one_stage"] = "two_stage",
        feature_weight: Weight | None = None,
        channel_weight: Weight | None = None,
        spatial_weight: Weight | None = None,
        relation_weight: Weight | None = None,
        spatial_temperature: Positive | None = None,
        channel_temperature: Positive | None = None,
        channel_mask: bool | None = None,
        reductions: Sequence[Count] = (4, 4, 2, 2, 2),
        pools: Sequence[Count] = (8, 4, 2, 2, 2),
        levels: Sequence[int] | None = None,
    ) -> None:
        """Pair the levels; channels that differ get a 1x1 convolution on the student first (not in the paper).

        Args:
            teacher: any detector.
            student: any detector.
            profile: which released settings to use. Those for one-stage students have a smaller temperature and six times the
                weights.
            feature_weight: factor of the attention-weighted distance; None: the profile's.
            channel_weight: factor of the distance of the means over cells; None: the profile's.
            spatial_weight: factor of the distance of the means over channels; None: the profile's.
            relation_weight: factor of the distance of the non-local blocks' outputs; None: the profile's.
            spatial_temperature: of the attention over cells; None: the profile's.
            channel_temperature: of the attention over channels; None: the profile's.
            channel_mask: multiply by the channel attention too; None: only in the profile ``one_stage``, as released.
            reductions: factors by which the non-local blocks reduce the channels, one for each student level, finest first;
                the last value holds for all further levels.
            pools: sides, in cells, of the max-pooling of their keys and values, one for each student level like
                ``reductions``; 1: no pooling.
            levels: indices of the student levels to use; None: all that have a partner.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
        """
        super().__init__(teacher, student)
        published = _PROFILES[profile]
        given = zip((feature_weight, channel_weight, spatial_weight, relation_weight), published.weights, strict=True)
        self.weights = dict(zip(FKDTerms._fields, (other if mine is None else mine for mine, other in given), strict=True))
        check_some(self.slug, **{f"{name}_weight": weight for name, weight in self.weights.items()})
        self.temperatures = {
            "spatial_temperature": published.temperature if spatial_temperature is None else spatial_temperature,
            "channel_temperature": published.temperature if channel_temperature is None else channel_temperature,
        }
        self.channel_mask = published.channel_mask if channel_mask is None else channel_mask
        for name, values in (("reductions", reductions), ("pools", pools)):
            if not values:
                raise MethodError(f"{self.slug}: {name} is empty; give at least one number, which then serves all levels")
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        self.adapters = LevelAdapters(self.pairs)
        self.paired_maps = PairedMaps(self.pairs, self.adapters, resize=True)
        self.parts = nn.ModuleList(
            FKDLevel(pair.teacher_channels, _of_level(reductions, pair.student), _of_level(pools, pair.student))
            for pair in self.pairs
        )

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Terms ``fkd_feature``, ``fkd_channel``, ``fkd_spatial`` and ``fkd_relation``, summed over levels.

        Terms with weight 0 are left out.
        """
        levels = []
        with full_precision(batch.images.device):
            mine, theirs = self.paired_maps(seen.features, taught.features)
            for part, student_map, teacher_map in zip(self.parts, mine, theirs, strict=True):
                cells, channels = fkd_attention(student_map, teacher_map, **self.temperatures)
                levels.append(part(student_map, teacher_map, cells, channels if self.channel_mask else None))
        terms = dict(zip(FKDTerms._fields, map(torch.stack, zip(*levels, strict=True)), strict=True))
        return Losses({f"fkd_{name}": self.weights[name] * values.sum() for name, values in terms.items() if self.weights[name]})


def _of_level(values: Sequence[int], level: int) -> int:
    return values[min(level, len(values) - 1)]
