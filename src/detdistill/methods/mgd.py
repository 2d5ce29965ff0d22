"""MGD: a small network generates the teacher's whole map from a student map with most cells dropped.

Yang et al., "Masked Generative Distillation", ECCV 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.contract import Detector, Teacher
from detdistill.functional.level_maps import paired_levels
from detdistill.functional.precision import full_precision
from detdistill.functional.similarity import mean_cosine
from detdistill.methods.shared.align import pair_levels, resize_like
from detdistill.methods.shared.contract import Method
from detdistill.structures import Batch, Clock, Losses, Observation
from detdistill.values import Fraction, Weight


def mgd_keep(uniform: Tensor, dropped: float = 0.65) -> Tensor:
    """Mask of the cells to keep: each cell is dropped with probability ``dropped``.

    ``dropped`` is lambda in the paper and in its code (with 0.65 about a third of the cells is kept).

    Args:
        uniform: uniform random numbers from 0 to 1: [B, 1, H, W] drops cells, [B, C, 1, 1] drops channels.
        dropped: probability, 0 to 1.

    Returns:
        bool, of the shape of ``uniform``; True where the map is kept.

    Example:
        >>> mgd_keep(torch.tensor([0.1, 0.3, 0.4, 0.9]), dropped=0.65).tolist()
        [True, True, False, False]
    """
    return uniform <= 1 - dropped


def mgd_loss(generated: Sequence[Tensor], teacher: Sequence[Tensor], weight: float = 2e-5) -> Tensor:
    """Squared difference, summed over channels and ALL cells (dropped and kept alike), divided by B, summed over levels (eq. 4).

    Args:
        generated: L maps [B, C, H, W], outputs of ``MGDGeneration``; gradient flows.
        teacher: L maps of the same shapes, treated as constant.
        weight: factor of every level's loss, alpha in the paper. As the loss is a sum, its scale depends on channels and image
            size; the published values belong to 256 channels and 800 x 1333 pixels.

    Returns:
        [] the loss.

    Example:
        >>> float(mgd_loss([torch.ones(2, 3, 2, 2)], [torch.zeros(2, 3, 2, 2)], weight=0.5))
        6.0
    """
    pairs = paired_levels("mgd_loss", generated, teacher)
    losses = [F.mse_loss(mine, theirs.detach(), reduction="sum") / len(mine) for mine, theirs in pairs]
    return weight * sum(losses[1:], losses[0])


class MGDGeneration(nn.Module):
    """Generator of one level: 1x1 convolution, mask, 3x3 convolution, ReLU, 3x3 convolution."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        """Build the layers; with equal channels ``align``, the 1x1 convolution, is left out."""
        super().__init__()
        self.align = nn.Conv2d(student_channels, teacher_channels, 1) if student_channels != teacher_channels else nn.Identity()
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(inplace=True),  # neither convolution reads what it overwrites
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def forward(self, student: Tensor, keep: Tensor) -> Tensor:
        """Generate the teacher's map.

        Args:
            student: [B, Cs, H, W].
            keep: [B, 1, H, W] or [B, Ct, 1, 1] bool (``mgd_keep``). Kept values are not rescaled.

        Returns:
            [B, Ct, H, W].
        """
        generated: Tensor = self.generation(self.align(student) * keep)
        return generated


class MGD(Method[Observation]):
    """MGD between the necks' maps; levels are paired by stride."""

    slug = "mgd"
    title = "Masked Generative Distillation (ECCV 2022)"
    bibtex = """@inproceedings{yang2022mgd,
  title={Masked Generative Distillation},
  author={Yang, Zhendong and Li, Zhe and Shao, Mingqi and Shi, Dachuan and Yuan, Zehuan and Yuan, Chun},
  booktitle={European Conference on Computer Vision},
  year={2022}
}"""

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        weight: Weight = 2e-5,
        dropped: Fraction = 0.65,
        drop_channels: bool = False,
        levels: Sequence[int] | None = None,
    ) -> None:
        """Pair the levels and build one generator for each pair.

        A student map of another size is resized to the teacher's before cells are dropped (not in the paper).

        Args:
            teacher: any detector.
            student: any detector.
            weight: factor of every level's loss (alpha); 2e-5 for one-stage and 5e-7 for two-stage students.
            dropped: share of the cells to drop (lambda); 0.65 for one-stage and 0.45 for two-stage students.
            drop_channels: drop whole channels instead of cells (mmrazor's option for classification).
            levels: indices of the student levels to use; None: all that have a partner.

        Raises:
            MethodError: a hyper-parameter is out of range.
            PairError: no common level.
        """
        super().__init__(teacher, student)
        self.weight, self.dropped, self.drop_channels = weight, dropped, drop_channels
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        self.generators = nn.ModuleList(MGDGeneration(pair.student_channels, pair.teacher_channels) for pair in self.pairs)

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Compute the term ``mgd``; the monitor ``cosine`` is the mean cosine of generated and teacher's maps.

        Every call drops cells, also in eval mode. The random numbers come from the global generator of the maps' device.
        """
        theirs, generated, losses = [taught.features.maps[pair.teacher] for pair in self.pairs], [], []
        with full_precision(batch.images.device):
            for pair, generator, fixed in zip(self.pairs, self.generators, theirs, strict=True):
                mine = resize_like(seen.features.maps[pair.student], fixed)
                images, channels, height, width = fixed.shape
                shape = (images, channels, 1, 1) if self.drop_channels else (images, 1, height, width)
                generated.append(generator(mine, mgd_keep(torch.rand(shape, device=mine.device), self.dropped)))
                # Level by level, so that the backward pass holds the gradient of one generated map at a time.
                losses.append(mgd_loss(generated[-1:], [fixed], self.weight))
            return Losses({"mgd": torch.stack(losses).sum()}, {"cosine": mean_cosine(generated, theirs)})
