"""FGFI: imitate the teacher's features only near objects, in the cells whose anchors overlap an object well.

Wang, Yuan, Zhang, Feng, "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR 2019, arXiv 1906.03609, in two
forms: the authors' released code for a detector with a single map (``official``), and the form for pyramids that the released
code of DeFeat (Guo et al., CVPR 2021) contains and later papers compare with (``fpn``).

Shape letters: B images, C channels of the teacher, H x W cells of one level, A anchors of a cell, G boxes of an image, N cells.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.contract import PREDICTION, Detector, Teacher
from detdistill.functional.cells import anchors_near_boxes, level_of_box
from detdistill.functional.counting import divisor_over_ranks
from detdistill.functional.dense_maps import prediction_grid
from detdistill.functional.precision import full_precision
from detdistill.methods.shared.align import LevelAdapters, pair_levels
from detdistill.methods.shared.contract import Method
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Batch, Clock, Dense, Features, Losses, MaskedCells, Observation, Regions, Taught
from detdistill.values import Fraction, Index, Weight

Form = Literal["official", "fpn"]


@torch.no_grad()
def fgfi_masks(
    anchors_xyxy: Sequence[Tensor], boxes_xyxy: Sequence[Tensor], psi: float = 0.5, form: Form = "fpn", all_levels: bool = False
) -> list[Tensor]:
    """The cells near objects on each level (section 3.2 of the paper).

    A box selects the cells that have an anchor with an IoU above ``psi`` times the largest IoU of the box with any anchor of the
    level. A cell is near if any box selects it. A box that overlaps no anchor selects no cell. Boxes without area select none.

    Args:
        anchors_xyxy: L tensors [H, W, A, 4] in pixels, anchors across the image's border included.
        boxes_xyxy: B tensors [G, 4] in pixels.
        psi: 0: all cells with an anchor that overlaps a box; 1: none.
        form: ``official``: widths and heights are ``x2 - x1 + 1`` and every box counts on every level. ``fpn``: without the
            + 1, and each box counts only on the level of its size (``cells.level_of_box``).
        all_levels: with ``fpn``, every box counts on every level.

    Returns:
        L masks [B, H, W], bool; all False for an image without boxes.

    Example:
        >>> anchors = torch.tensor([[0.0, 0.0, 8.0, 8.0], [8.0, 0.0, 16.0, 8.0]]).view(1, 2, 1, 4)
        >>> fgfi_masks([anchors], [torch.tensor([[2.0, 0.0, 9.0, 8.0]]), torch.zeros(0, 4)])[0].tolist()
        [[[True, False]], [[False, False]]]
    """
    masks: list[list[Tensor]] = [[] for _ in anchors_xyxy]
    for boxes in boxes_xyxy:
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)]
        one_level = form == "fpn" and not all_levels
        of_box = level_of_box(boxes, len(anchors_xyxy)) if one_level else None
        for level, anchors in enumerate(anchors_xyxy):
            mine = boxes if of_box is None else boxes[of_box == level]
            near = anchors_near_boxes(anchors.flatten(0, 2), mine.to(anchors.device), psi, plus_one=form == "official")
            masks[level].append(near.view(anchors.shape[:3]).any(dim=2))
    return [torch.stack(images) for images in masks]


def fgfi_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    masks: Sequence[Tensor],
    weight: float | None = None,
    form: Form = "fpn",
) -> Tensor:
    """Squared difference of the maps in the near cells.

    With N near cells of a level in the whole batch and D the sum of the squared differences over these cells and all channels:

    - ``official`` (equation 2 of the paper): ``weight * D / (2 * N)``, summed over levels;
    - ``fpn``: ``weight * D / (2 * N * C)``, averaged over levels.

    So they differ by the factor C: ``official`` with weight 0.01 and 512 channels is ``fpn`` with weight 5.12. A level without
    near cells gives 0; the official code divides 0 by 0 if a batch has no boxes.

    Args:
        student: L maps [B, C, H, W] after the adapter; gradient flows.
        teacher: L maps of the same shapes, treated as constant.
        masks: L masks [B, H, W], bool (``fgfi_masks``).
        weight: None: the released weight of the form, 0.01 or 3.
        form: divisor and reduction over levels.

    Returns:
        [] the loss.

    Example:
        >>> ones, mask = torch.ones(1, 2, 1, 2), torch.tensor([[[True, False]]])
        >>> float(fgfi_loss([ones], [0 * ones], [mask], 1.0, "official")), float(fgfi_loss([ones], [0 * ones], [mask], 1.0))
        (1.0, 0.5)
    """
    rows = [[level.movedim(1, -1)[mask] for level, mask in zip(side, masks, strict=True)] for side in (student, teacher)]
    return _loss_of_rows(rows[0], rows[1], weight, form)


def _loss_of_rows(student: Sequence[Tensor], teacher: Sequence[Tensor], weight: float | None, form: Form) -> Tensor:
    """``fgfi_loss`` of the vectors [N, C] of the near cells of each level."""
    factor = _RELEASED_WEIGHTS[form] if weight is None else weight
    losses = []
    for mine, theirs in zip(student, teacher, strict=True):
        count = mine.numel() if form == "fpn" else len(mine)
        losses.append(F.mse_loss(mine, theirs.detach(), reduction="sum") / divisor_over_ranks(2 * count, mine))
    total = torch.stack(losses)
    return factor * (total.mean() if form == "fpn" else total.sum())


_RELEASED_WEIGHTS: dict[Form, float] = {"official": 0.01, "fpn": 3.0}
_RELEASED_WARM_STEPS: dict[Form, int] = {"official": 400, "fpn": 0}


def fgfi_virtual_anchors(strides: Sequence[int], shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Anchors for detectors that have none, as RPN or RetinaNet would have them on the same pyramid; not in the paper.

    A pyramid that begins below stride 8 gets one side of 8 strides, as RPN; others get sides of 4, 5.04 and 6.35 strides, as
    RetinaNet. Each has the ratios (height to width) 0.5, 1 and 2. Anchors are centred on the top left corner of their cell, as
    in mmdet 2.

    Args:
        strides: stride of each level in pixels.
        shapes: rows and columns of each level.

    Returns:
        L tensors [H, W, A, 4] in pixels.

    Example:
        >>> fgfi_virtual_anchors([4], [(1, 2)])[0][0, 1, 1].tolist()  # the square anchor of the second cell
        [-12.0, -16.0, 20.0, 16.0]
    """
    sides = [8.0] if strides[0] < 8 else [4 * 2 ** (step / 3) for step in range(3)]
    halves = torch.tensor([[side / 2 / ratio**0.5, side / 2 * ratio**0.5] for side in sides for ratio in (0.5, 1.0, 2.0)])
    anchors = []
    for stride, (height, width) in zip(strides, shapes, strict=True):
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centers = torch.stack([columns, rows], dim=-1)[:, :, None]
        anchors.append(stride * torch.cat([centers - halves, centers + halves], dim=-1))
    return anchors


def _initialize(convolution: nn.Conv2d) -> None:
    """The released initialisation: a normal draw, cut off by the remainder of division by 2, times 1e-4."""
    with torch.no_grad():
        convolution.weight.normal_().fmod_(2).mul_(1e-4)


@dataclass(frozen=True)
class FGFITaught(Taught):
    """The teacher's features in the cells near objects: a small part of its maps, so a cache of them is small."""

    near: tuple[MaskedCells, ...]
    """The near cells of each level of the teacher."""


class FGFI(Method[FGFITaught]):
    """FGFI between the necks' maps; levels are paired by stride, crowd boxes are not objects.

    The anchors are the teacher's own, so that a cache of its near cells does not depend on the student. In the papers' pairs the
    student has the same anchors. A teacher without anchors (FCOS, DETR) gets virtual ones, which is an extension.

    With ``fpn`` a box counts on the level of its size among ALL levels of the teacher. If the student has no partner for that
    level, the box selects no cells; use ``all_levels`` for such pairs.
    """

    slug = "fgfi"
    title = "Distilling Object Detectors with Fine-grained Feature Imitation (CVPR 2019)"
    bibtex = """@inproceedings{wang2019fgfi,
  title={Distilling Object Detectors with Fine-grained Feature Imitation},
  author={Wang, Tao and Yuan, Li and Zhang, Xiaopeng and Feng, Jiashi},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2019}
}"""
    teach_settings = ("form", "psi", "all_levels", "anchors")

    def __init__(
        self,
        teacher: Teacher,
        student: Detector,
        *,
        form: Literal["official", "fpn"] | None = None,
        weight: Weight | None = None,
        psi: Fraction = 0.5,
        warm_steps: Index | None = None,
        all_levels: bool = False,
        anchors: Literal["own", "virtual"] | None = None,
        relu: bool | None = None,
        levels: Sequence[int] | None = None,
    ) -> None:
        """Pair the levels; each pair has a 3x3 convolution on the student, for equal channels, too.

        Args:
            teacher: any detector.
            student: any detector.
            form: ``official``: the authors' code for a single map; ``fpn``: the form for pyramids of DeFeat's code (see
                ``fgfi_loss`` and ``fgfi_masks``). None: ``official`` for a teacher with one level, else ``fpn``.
            weight: factor of the loss; None: 0.01 for ``official``, 3 for ``fpn``, as released.
            psi: a cell is near a box if an anchor's IoU is above this fraction of the box's largest IoU.
            warm_steps: number of first steps in which the loss is multiplied by 0; None: 400 for ``official``, 0 for ``fpn``.
            all_levels: with ``fpn``, every box counts on every level, and not only on the level of its size.
            anchors: ``own``: the teacher's (of the first stage in two-stage detectors); ``virtual``: those of
                ``fgfi_virtual_anchors``. None: ``own`` if the teacher has anchors, ``virtual`` if it has points or queries.
            relu: put a ReLU behind the convolutions, for teacher maps without negative values. None: as released, True for
                ``official``, False for ``fpn``.
            levels: indices of the student levels to use; None: all that have a partner.

        Raises:
            PairError: no common level, or ``anchors`` is ``own`` and the teacher has no dense predictions.
        """
        super().__init__(teacher, student)
        self.form: Form = form or ("official" if len(teacher.spec.strides) == 1 else "fpn")
        self.weight, self.psi, self.all_levels, self.anchors = weight, psi, all_levels, anchors
        self.warm_steps = _RELEASED_WARM_STEPS[self.form] if warm_steps is None else warm_steps
        self.pairs = pair_levels(self.slug, student.spec, teacher.spec, levels)
        if anchors == "own" and not teacher.spec.anchors:
            raise PairError(f"{self.slug}: the teacher {teacher.spec.name} has no anchors; use anchors=virtual")
        activated = self.form == "official" if relu is None else relu
        self.adapters = LevelAdapters(
            self.pairs, always=True, kernel=3, activation=nn.ReLU if activated else None, initialize=_initialize
        )
        self._known_anchors: OrderedDict[Any, list[Tensor]] = OrderedDict()

    @torch.no_grad()
    def teach(self, batch: Batch) -> FGFITaught:
        """Take the teacher's features in the near cells of all its levels."""
        features = self.teacher.observe(batch).features
        boxes = [target.without_crowd().boxes_xyxy for target in batch.targets]
        masks = fgfi_masks(self._anchors(features, batch), boxes, self.psi, self.form, self.all_levels)
        return FGFITaught(tuple(MaskedCells.of(level, mask) for level, mask in zip(features.maps, masks, strict=True)))

    def _anchors(self, features: Features, batch: Batch) -> list[Tensor]:
        """Anchors [H, W, A, 4] of each level. They depend on the padded size only, so the last sizes are remembered."""
        key = (*batch.padding_hw, batch.images.device)
        if key not in self._known_anchors:
            anchors = self._own_anchors(batch) if self.anchors != "virtual" and self.teacher.spec.anchors else None
            if anchors is None:
                shapes = [(level.shape[2], level.shape[3]) for level in features.maps]
                anchors = [level.to(batch.images.device) for level in fgfi_virtual_anchors(features.strides, shapes)]
            self._known_anchors[key] = anchors
            if len(self._known_anchors) > _REMEMBERED_SIZES:
                self._known_anchors.popitem(last=False)
        return self._known_anchors[key]

    def _own_anchors(self, batch: Batch) -> list[Tensor] | None:
        """The teacher's anchors; None if they are points (squares of one stride) and may be replaced."""
        prediction = self.teacher.observe(batch, PREDICTION).prediction
        dense = prediction.first if isinstance(prediction, Regions) else prediction
        if not isinstance(dense, Dense):
            return None
        strides = dense.priors_xyxy.new_tensor(self.teacher.spec.strides)[dense.levels]
        priors = dense.priors_xyxy[0]
        if self.anchors is None and torch.allclose(priors[:, 2:] - priors[:, :2], strides[:, None]):
            return None
        return [priors[prediction_grid(dense, level)].movedim(0, 2) for level in range(len(self.teacher.spec.strides))]

    def learn(self, student: Detector, seen: Observation, taught: FGFITaught, batch: Batch, clock: Clock) -> Losses:
        """Compute the term ``fgfi``; the monitor ``near_cells`` is the number of near cells of an image."""
        near = [taught.near[pair.teacher] for pair in self.pairs]
        with full_precision(batch.images.device):
            adapted = self.adapters([seen.features.maps[pair.student] for pair in self.pairs])
            mine = [cells.pick(level) for cells, level in zip(near, adapted, strict=True)]
            loss = _loss_of_rows(mine, [cells.values for cells in near], self.weight, self.form)
        warm = 0.0 if clock.step < self.warm_steps else 1.0
        count = cast(Tensor, sum(loss.new_tensor(len(cells)) for cells in near)) / len(batch)
        return Losses({"fgfi": warm * loss}, {"near_cells": count})


_REMEMBERED_SIZES = 16
"""Number of padded sizes for which the anchors are kept in memory."""
