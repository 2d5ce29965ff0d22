"""VFM: the student's maps follow those of a vision foundation model, such as DINOv2 or DINOv3, at its own resolution.

A method of this library after two papers, for any student and any teacher of maps. The loss and its weights are AM-RADIO's:
Ranzinger et al., "AM-RADIO: Agglomerative Vision Foundation Model - Reduce All Domains Into One", CVPR 2024, section 3.4. Without
its second part, on the deepest map of a DETR's encoder, it is the form of the Deep Semantic Injector: Liao et al., "RT-DETRv4:
Painlessly Furthering Real-Time Object Detection with Vision Foundation Models", arXiv 2510.25257 (without its adaptive weight).

Shape letters: B images, C channels of the teacher, H and W cells of the teacher's map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.detectors.contract import Detector, DetectorSpec, Pyramid, Teacher
from detdistill.functional.counting import mean_over_ranks
from detdistill.functional.level_maps import check_maps
from detdistill.functional.precision import full_precision
from detdistill.methods.shared.align import LevelAdapters, LevelPair, PairedMaps
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.hyper_parameters import check_some
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.structures import Batch, Clock, Look, Losses, Observation
from detdistill.values import Weight


def vfm_cosine_loss(student: Tensor, teacher: Tensor, padding: Tensor | None = None) -> Tensor:
    """``1 - cos`` of the channels of each cell: [] mean over the cells of all images that are no padding.

    Args:
        student: [B, C, H, W]; gradient flows.
        teacher: [B, C, H, W], treated as constant.
        padding: [B, H, W] bool, True for cells that do not count; None: all count.

    Returns:
        [] the loss, between 0 and 2; 0 if no cell counts.

    Example:
        >>> import torch
        >>> maps = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
        >>> [round(float(vfm_cosine_loss(other, maps)), 4) for other in (2 * maps, -maps, maps.flip(1))]
        [0.0, 2.0, 0.04]
    """
    check_maps("vfm_cosine_loss", student, teacher)
    return _mean_of_cells(1 - F.cosine_similarity(student, teacher.detach(), dim=1), padding)


def vfm_smooth_loss(student: Tensor, teacher: Tensor, padding: Tensor | None = None) -> Tensor:
    """Smooth L1 distance (squared below 1): [] mean over channels, and over the cells of all images that are no padding.

    Args:
        student: [B, C, H, W]; gradient flows.
        teacher: [B, C, H, W], treated as constant.
        padding: [B, H, W] bool, True for cells that do not count; None: all count.

    Example:
        >>> import torch
        >>> maps = torch.zeros(1, 2, 1, 1)
        >>> float(vfm_smooth_loss(torch.tensor([1.0, 3.0]).view(1, 2, 1, 1), maps))
        1.5
    """
    check_maps("vfm_smooth_loss", student, teacher)
    return _mean_of_cells(F.smooth_l1_loss(student, teacher.detach(), reduction="none").mean(dim=1), padding)


def _mean_of_cells(values: Tensor, padding: Tensor | None) -> Tensor:
    counted = torch.ones_like(values) if padding is None else (~padding).to(values.dtype)
    return (values * counted).sum() / mean_over_ranks(counted.sum(), least=1)


def vfm_levels(
    student_strides: Sequence[int], teacher_strides: Sequence[int], levels: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Pairs of a student level and a teacher level, by nearest strides; unlike other methods', at any distance.

    Args:
        student_strides: stride of each level of the student, finest first.
        teacher_strides: stride of each level of the teacher, finest first.
        levels: student levels; each is paired with the nearest teacher level. None: each teacher level with the nearest student
            level.

    Example:
        >>> vfm_levels((8, 16, 32), (16,)), vfm_levels((8, 16, 32), (16,), levels=[2])
        ([(1, 0)], [(2, 0)])
    """
    if levels is not None:
        return [(level, _nearest(teacher_strides, student_strides[level])) for level in levels]
    return [(_nearest(student_strides, stride), index) for index, stride in enumerate(teacher_strides)]


def _nearest(strides: Sequence[int], stride: int) -> int:
    return min(range(len(strides)), key=lambda index: abs(math.log(strides[index] / stride)))


class VFM(Method[Observation]):
    """Maps of a foundation model for any student; the teacher is a backbone (``timm:NAME``, ``hf:NAME``) or any detector.

    The student's maps pass a 1x1 convolution, which is trained and not exported, and are resized to the teacher's grid. The
    teacher is shown what the student is shown, also mirrored, because the maps of a mirrored image are not the mirrored maps.
    """

    slug = "vfm"
    title = "Maps of vision foundation models (of this library; after AM-RADIO, CVPR 2024, and RT-DETRv4, arXiv 2025)"
    published = False
    bibtex = """@inproceedings{ranzinger2024amradio,
  title={AM-RADIO: Agglomerative Vision Foundation Model Reduce All Domains Into One},
  author={Ranzinger, Mike and Heinrich, Greg and Kautz, Jan and Molchanov, Pavlo},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2024}
}
@article{liao2025rtdetrv4,
  title={RT-DETRv4: Painlessly Furthering Real-Time Object Detection with Vision Foundation Models},
  author={Liao, Zijun and Zhao, Yian and Shan, Xin and Yan, Yu and Liu, Chang and Lu, Lei and Ji, Xiangyang and Chen, Jie},
  journal={arXiv preprint arXiv:2510.25257},
  year={2025}
}"""

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        weight: Weight = 1.0,
        cosine_weight: Weight = 0.9,
        smooth_weight: Weight = 0.1,
        maps: Literal["neck", "backbone"] = "neck",
        levels: Sequence[int] | None = None,
    ) -> None:
        """Pair the levels.

        Args:
            teacher: a backbone or any detector.
            student: any detector; with ``maps=backbone`` one that separates backbone and neck.
            weight: factor of both terms.
            cosine_weight: factor of 1 - cosine (AM-RADIO: 0.9; the form of RT-DETRv4: 1).
            smooth_weight: factor of the smooth L1 distance (AM-RADIO: 0.1; the form of RT-DETRv4: 0).
            maps: the student's maps: those of its neck (of DETRs: of the encoder), or of its backbone.
            levels: indices of the student levels that follow the teacher level of the nearest stride, e.g. ``-1`` for the
                deepest; None: for each teacher level the student level of the nearest stride.

        Raises:
            MethodError: a hyper-parameter is out of range, or all weights are 0.
            PairError: a level that the student lacks, or a student without backbone features with ``maps=backbone``.
        """
        super().__init__(teacher, student)
        check_some(self.slug, weight=weight)
        check_some(self.slug, cosine_weight=cosine_weight, smooth_weight=smooth_weight)
        self.weights = {"cosine": weight * cosine_weight, "smooth": weight * smooth_weight}
        self.maps = maps
        self.pairs = self._pair(student.spec, teacher.spec, levels)
        self.adapters = LevelAdapters(self.pairs, always=True)
        self.paired_maps = PairedMaps(self.pairs, self.adapters, resize=True)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        """Maps of any two networks; of the student those of the backbone, if it is that which follows."""
        return Needs(student=Look(backbone=settings["maps"] == "backbone"))

    def _pair(self, student: DetectorSpec, teacher: DetectorSpec, levels: Sequence[int] | None) -> tuple[LevelPair, ...]:
        """The levels that are compared.

        Raises:
            PairError: the student lacks one of ``levels``.
        """
        below = student.backbone if self.maps == "backbone" else Pyramid(student.channels, student.strides)
        assert below is not None  # ``needs`` was checked
        count = len(below.strides)
        chosen = None if levels is None else [level + count if level < 0 else level for level in levels]
        for given, level in zip(levels or (), chosen or (), strict=True):
            if not 0 <= level < count:
                raise PairError(
                    f"{self.slug}: levels={given}: the student {student.name} has {count} levels here, of strides {below.strides}"
                )
        found = vfm_levels(below.strides, teacher.strides, chosen)
        return tuple(LevelPair(mine, other, below.channels[mine], teacher.channels[other]) for mine, other in found)

    def learn(self, student: Detector, seen: Observation, taught: Observation, batch: Batch, clock: Clock) -> Losses:
        """Compute ``vfm_cosine`` and ``vfm_smooth``, each the sum over pairs of levels, without that of weight 0."""
        mine = seen.backbone_features if self.maps == "backbone" else seen.features
        assert mine is not None
        functions = {"cosine": vfm_cosine_loss, "smooth": vfm_smooth_loss}
        with full_precision(batch.images.device):
            maps, fixed = self.paired_maps(mine, taught.features)
            masks = [None if taught.features.padding is None else taught.features.padding[pair.teacher] for pair in self.pairs]
            terms = {}
            for name, weight in ((name, weight) for name, weight in self.weights.items() if weight):
                levels = [functions[name](*level) for level in zip(maps, fixed, masks, strict=True)]
                terms[f"vfm_{name}"] = weight * sum(levels[1:], levels[0])
        return Losses(terms)
