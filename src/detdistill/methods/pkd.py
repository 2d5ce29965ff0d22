"""PKD: each channel of the student's maps should correlate with the teacher's channel; scale and offset are free.

Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient", NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from detdistill.detectors.contract import Detector, Teacher
from detdistill.functional.level_maps import paired_levels
from detdistill.functional.precision import full_precision
from detdistill.methods.shared.align import LevelAdapters, PairedMaps, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.structures import Batch, Clock, Losses, Observation
from detdistill.values import Weight


def standardize_channels(maps: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale each channel to zero mean and unit (unbiased) standard deviation over batch and positions together.

    Args:
        maps: [B, C, H, W].
        eps: added to the standard deviation, so that a constant channel becomes all zeros.
    """
    mean = maps.mean(dim=(0, 2, 3), keepdim=True)
    std = maps.std(dim=(0, 2, 3), keepdim=True)
    return (maps - mean) / (std + eps)


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
        difference = standardize_channels(mine) - standardize_channels(fixed)
        losses.append(weight * 0.5 * difference.square().mean())
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
