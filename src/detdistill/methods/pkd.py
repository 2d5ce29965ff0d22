"""PKD: each channel of the student's maps should correlate with the teacher's channel; scale and offset are free.

Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient", NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.detectors.contract import Detector, Teacher
from detdistill.functional.level_maps import paired_levels
from detdistill.functional.precision import full_precision
from detdistill.methods.shared.align import LevelAdapters, PairedMaps, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.structures import Batch, Clock, Losses, Observation
from detdistill.values import Weight

EPS = 1e-6
"""Added to the standard deviation of a channel, so that a constant channel becomes all zeros."""


class _StandardizedDistance(torch.autograd.Function):
    """Half the mean squared difference of two maps whose channels are standardised over batch and positions.

    With z = (x - mean) / (std + EPS), the gradient is a combination of the two centred maps with one pair of factors for each
    channel. So no map is kept for the backward pass but the inputs; autograd would keep six.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        mine, theirs = student.flatten(2), teacher.flatten(2)  # [B, C, N]
        means = tuple(maps.mean(dim=2).mean(dim=0)[:, None] for maps in (mine, theirs))  # rows of equal length: the mean of all
        mine, theirs = mine - means[0], theirs - means[1]
        rows = max(1, mine.shape[0] * mine.shape[2] - 1)  # unbiased, as torch.std
        stds = tuple((_dot(maps, maps) / rows).sqrt() for maps in (mine, theirs))
        scales = tuple(1 / (std + EPS) for std in stds)
        correlation = _dot(mine, theirs) * scales[0] * scales[1] / rows
        shrunk = stds[0] * scales[0]  # std of z: 1, less what EPS takes
        along = torch.where(stds[0] > 0, (shrunk.square() - correlation) / shrunk, 0)
        ctx.save_for_backward(student, teacher, *means, scales[0].square() * (1 - along), scales[0] * scales[1])
        difference = mine.mul_(scales[0][:, None]).sub_(theirs.mul_(scales[1][:, None]))
        return _dot(difference, difference).sum() / (2 * student.numel())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        student, teacher, my_mean, their_mean, mine, theirs = ctx.saved_tensors
        grad = grad / student.numel()
        # The maps are centred before they are multiplied: the factors of a nearly constant channel are huge.
        result = (student - my_mean[..., None]).mul_((mine * grad)[:, None, None])
        return result.addcmul_(teacher - their_mean[..., None], (theirs * grad)[:, None, None], value=-1), None


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """[B, C, N] -> [C]: sum of the products of each channel."""
    return torch.einsum("bcn,bcn->bc", first, second).sum(dim=0)


def pkd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], weight: float = 6.0, resize_student: bool = True) -> Tensor:
    """Half the mean squared difference of standardised maps, summed over levels (section 3.2: 1 - Pearson correlation).

    Each level gives ``weight * (M - 1) / M * (1 - mean over channels of the Pearson correlation)`` with M = B*H*W, so
    between 0 and ``2 * weight``. Mean and standard deviation are those of the local batch; padded cells and images without
    boxes count like all others. Maps are resized if height or width differs; the released code compares heights only.

    Args:
        student: maps [B, C, h, w]; gradient flows, also through mean and standard deviation.
        teacher: maps [B, C, H, W], treated as constant.
        weight: factor of every level's loss.
        resize_student: resize student maps to the teacher's size; False: resize teacher maps to the student's size.

    Returns:
        [] the loss.

    Example:
        >>> import torch
        >>> maps = torch.arange(24.0).reshape(1, 2, 3, 4)
        >>> round(float(pkd_loss([maps], [10 * maps + 1])), 6)
        0.0
    """
    losses = []
    for mine, theirs in paired_levels("pkd_loss", student, teacher, any_size=True):
        fixed = theirs.detach()
        if mine.shape[-2:] != fixed.shape[-2:]:
            if resize_student:
                mine = F.interpolate(mine, size=fixed.shape[-2:], mode="bilinear", align_corners=False)
            else:
                fixed = F.interpolate(fixed, size=mine.shape[-2:], mode="bilinear", align_corners=False)
        losses.append(weight * cast(Tensor, _StandardizedDistance.apply(mine, fixed)))
    return sum(losses[1:], losses[0])


class PKD(Method[Observation]):
    """PKD between the necks' maps; levels are paired by stride."""

    slug = "pkd"
    title = "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient (NeurIPS 2022)"
    bibtex = """@inproceedings{cao2022pkd,
  title={PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient},
  author={Cao, Weihan and Zhang, Yifan and Gao, Jianfei and Cheng, Anda and Cheng, Ke and Cheng, Jian},
  booktitle={Advances in Neural Information Processing Systems},
  year={2022}
}"""

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        weight: Weight = 6.0,
        levels: Sequence[int] | None = None,
        resize_student: bool = True,
    ) -> None:
        """Pair the levels; channels that differ get a 1x1 convolution on the student (not in the paper).

        Args:
            teacher: any detector.
            student: any detector.
            weight: factor of every level's loss; the paper uses 6 for two-stage and 10 for one-stage students.
            levels: indices of the student levels to use; None: all that have a partner (the paper leaves the last out).
            resize_student: resize student maps to the teacher's size; False: resize teacher maps to the student's size.
        """
        super().__init__(teacher, student)
        self.weight, self.resize_student = weight, resize_student
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        self.adapters = LevelAdapters(self.pairs)
        self.paired_maps = PairedMaps(self.pairs, self.adapters)

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Compute the term ``pkd``."""
        with full_precision(batch.images.device):
            mine, theirs = self.paired_maps(seen.features, taught.features)
            return Losses({"pkd": pkd_loss(mine, theirs, self.weight, self.resize_student)})
