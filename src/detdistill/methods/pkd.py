"""PKD: the student's maps should correlate with the teacher's, channel by channel; their scale is free.

Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient", NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from detdistill.detectors.contract import Detector, Teacher
from detdistill.functional.precision import full_precision
from detdistill.methods.shared.align import LevelAdapters, PairedMaps, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.structures import Batch, Clock, Losses, Observation
from detdistill.values import Weight


def standardize_channels(maps: Tensor, eps: float = 1e-6) -> Tensor:
    """Zero mean and unit (unbiased) deviation for each channel over batch and positions together.

    Args:
        maps: [B, C, H, W].
        eps: added to the deviation; a constant channel becomes all zeros.
    """
    mean = maps.mean(dim=(0, 2, 3), keepdim=True)
    std = maps.std(dim=(0, 2, 3), keepdim=True)
    return (maps - mean) / (std + eps)


def pkd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], weight: float = 6.0, resize_student: bool = True) -> Tensor:
    """Half the mean squared difference of standardised maps, summed over levels (section 3.2: 1 - Pearson correlation).

    For each level, ``weight * (M - 1) / M * (1 - mean over channels of their Pearson correlation)`` with M = B*H*W, so
    between 0 and ``2 * weight``. Statistics are those of the local batch; padding and images without boxes count as
    any other. Unlike the released code, widths are compared too before deciding to resize.

    Args:
        student: maps [B, C, h, w]; gradient flows, through mean and deviation too.
        teacher: maps [B, C, H, W], treated as constant.
        weight: of every level.
        resize_student: where sizes differ, resize the student's map to the teacher's size; False: the other way.

    Returns:
        [] the loss.

    Example:
        >>> import torch
        >>> maps = torch.arange(24.0).reshape(1, 2, 3, 4)
        >>> round(float(pkd_loss([maps], [10 * maps + 1])), 6)
        0.0
    """
    losses = []
    for mine, theirs in zip(student, teacher, strict=True):
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
    """PKD between necks, paired by stride."""

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
            weight: of every level; the paper uses 6 for two-stage and 10 for one-stage students.
            levels: student levels to use, as indices; None: all that have a partner (the paper leaves the last out).
            resize_student: where sizes differ, resize the student's map to the teacher's size; False: the other way.
        """
        super().__init__(teacher, student)
        self.weight, self.resize_student = weight, resize_student
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        self.adapters = LevelAdapters(self.pairs)
        self.paired_maps = PairedMaps(self.pairs, self.adapters)

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """One term, ``pkd``."""
        with full_precision(batch.images.device):
            mine, theirs = self.paired_maps(seen.features, taught.features)
            return Losses({"pkd": pkd_loss(mine, theirs, self.weight, self.resize_student)})
