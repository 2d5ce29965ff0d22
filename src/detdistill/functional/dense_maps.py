"""Convert dense predictions to maps and back, and pair the predictions of two detectors by level, cell and anchor.

``Dense`` lists its P predictions in any order, each with its level, cell and anchor. Methods that compare head outputs with
feature maps need them as ``[B, A * R, H, W]`` for one level. Methods that compare two heads need the teacher's prediction for
each of the student's; order and padding of the two may differ.

Shape letters: B images, P predictions of an image, A anchors of a cell, R numbers of a prediction, H x W cells of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from detdistill.errors import DetdistillError
from detdistill.structures import Dense


def only_parts(prediction: Dense, *parts: Literal["deltas", "priors_xyxy", "quality"]) -> Dense:
    """The prediction with its logits, boxes and the named parts. A cache of it holds no other numbers.

    Args:
        prediction: predictions of B images.
        parts: the parts to keep besides logits and boxes.

    Returns:
        A prediction whose other parts are empty: ``deltas`` and ``priors_xyxy`` [B, P, 0], ``quality`` None.

    Example:
        >>> place = torch.zeros(1, dtype=torch.int64)
        >>> numbers = torch.zeros(1, 1, 4)
        >>> dense = Dense(numbers, numbers, numbers, numbers, place, torch.zeros(1, 2), place)
        >>> small = only_parts(dense, "priors_xyxy")
        >>> small.deltas.shape[-1], small.boxes_xyxy.shape[-1], small.priors_xyxy.shape[-1]
        (0, 4, 4)
    """
    return replace(
        prediction,
        deltas=prediction.deltas if "deltas" in parts else prediction.deltas[..., :0],
        priors_xyxy=prediction.priors_xyxy if "priors_xyxy" in parts else prediction.priors_xyxy[..., :0],
        quality=prediction.quality if "quality" in parts else None,
        own=None,
    )


def prediction_grid(prediction: Dense, level: int) -> Tensor:
    """Index along P of the prediction of each anchor and cell of one level.

    Args:
        prediction: predictions in any order.
        level: number of the level in ``prediction.levels``.

    Returns:
        [A, H, W] int64.

    Raises:
        DetdistillError: the level has no predictions, or not one for each anchor of each cell.
    """
    index = torch.nonzero(prediction.levels == level).flatten()
    if len(index) == 0:
        raise DetdistillError(f"there are no predictions on level {level}; levels: {sorted(set(prediction.levels.tolist()))}")
    places = torch.cat([prediction.anchors[index, None], prediction.cells[index]], dim=1)  # [P_l, 3] anchor, row, column
    count, height, width = (places.amax(dim=0) + 1).tolist()
    grid = torch.full((count * height * width,), -1, dtype=torch.int64, device=index.device)
    grid[(places[:, 0] * height + places[:, 1]) * width + places[:, 2]] = index
    if len(index) != len(grid) or bool((grid < 0).any()):
        raise DetdistillError(
            f"level {level} has {len(index)} predictions, not one for each of {count} anchors on {height} x {width} cells"
        )
    return grid.view(count, height, width)


def to_map(values: Tensor, prediction: Dense, level: int) -> Tensor:
    """Arrange numbers of each prediction as a map of one level.

    Args:
        values: [B, P, R] or [B, P], such as logits, class scores, boxes, or a weight for each prediction; gradient flows.
        prediction: gives level, cell and anchor of each prediction.
        level: number of the level in ``prediction.levels``.

    Returns:
        [B, A * R, H, W] for values [B, P, R]; the channel of anchor a and number r is ``a * R + r``. [B, A, H, W] for values
        [B, P]; a maximum over its channels is the maximum over the anchors of a cell.

    Raises:
        DetdistillError: as ``prediction_grid``.

    Example:
        >>> cells, one = torch.tensor([[0, 1], [0, 0]]), torch.zeros(2, dtype=torch.int64)  # the right cell comes first
        >>> logits, boxes = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.zeros(1, 2, 4)
        >>> to_map(logits, Dense(logits, boxes, boxes, boxes, levels=one, cells=cells, anchors=one), level=0).tolist()
        [[[[3.0, 1.0]], [[4.0, 2.0]]]]
    """
    grid = prediction_grid(prediction, level)
    laid = values[:, grid]  # [B, A, H, W, R] or [B, A, H, W]
    return laid if values.ndim == 2 else laid.permute(0, 1, 4, 2, 3).flatten(1, 2)


def from_map(level_map: Tensor, prediction: Dense, level: int) -> Tensor:
    """The inverse of ``to_map``: the numbers of each prediction of one level, in the order of ``prediction``.

    Args:
        level_map: [B, A * R, H, W]; gradient flows.
        prediction: gives level, cell and anchor of each prediction.
        level: number of the level in ``prediction.levels``.

    Returns:
        [B, P_l, R] for the P_l predictions with ``prediction.levels == level``.

    Raises:
        DetdistillError: as ``prediction_grid``, or the map does not fit the level's cells and anchors.
    """
    count, height, width = prediction_grid(prediction, level).shape
    channels = level_map.shape[1]
    if level_map.shape[2:] != (height, width) or channels % count:
        raise DetdistillError(
            f"level {level} has {count} anchors on {height} x {width} cells; a map of {channels} channels on "
            f"{level_map.shape[2]} x {level_map.shape[3]} cells does not belong to it"
        )
    here = prediction.levels == level
    (rows, columns), anchors = prediction.cells[here].unbind(1), prediction.anchors[here]
    by_anchor = level_map.reshape(len(level_map), count, -1, height, width).permute(0, 1, 3, 4, 2)  # [B, A, H, W, R]
    return by_anchor[:, anchors, rows, columns]


def at_cells(level_map: Tensor, prediction: Dense, level: int) -> Tensor:
    """Values of a map at the cell of each prediction of one level; all anchors of a cell get the same values.

    Args:
        level_map: [B, C, H, W], such as a mask with C = 1, or features; gradient flows.
        prediction: gives level, cell and anchor of each prediction.
        level: number of the level in ``prediction.levels``.

    Returns:
        [B, P_l, C] for the P_l predictions of this level, in the order of ``prediction``; P_l may be 0.
    """
    rows, columns = prediction.cells[prediction.levels == level].unbind(1)
    return level_map[:, :, rows, columns].transpose(1, 2)


@dataclass(frozen=True)
class Partners:
    """For each prediction of a student, the teacher's prediction at the same level, cell and anchor (its partner)."""

    index: Tensor
    """[P] int64 index of the partner among the teacher's predictions; 0 if there is no partner."""
    mask: Tensor
    """[B, P] bool, False if there is no partner, or if the prediction or its partner is padding."""

    def take(self, values: Tensor) -> Tensor:
        """The teacher's numbers [B, P_teacher, ...] in the student's order: [B, P, ...], 0 where ``mask`` is False."""
        taken = values[:, self.index]
        mask = self.mask.view(*self.mask.shape, *[1] * (taken.ndim - 2))
        return torch.where(mask, taken, taken.new_zeros(()))


def find_partners(student: Dense, teacher: Dense, levels: Sequence[tuple[int, int]] | None = None) -> Partners:
    """Pair the predictions of two detectors that have the same level, cell and anchor.

    The order of the predictions and the padding of the images may differ, because cells are counted from the top left corner.
    The geometry of the anchors or points is not compared.

    Args:
        student: P predictions of B images.
        teacher: predictions of the same images.
        levels: pairs (student's level, teacher's level); other levels have no partner. None: levels of equal number are paired.

    Returns:
        The partner of each of the student's predictions.

    Example:
        >>> def row(*columns):
        ...     places = torch.tensor([[0, column] for column in columns])
        ...     logits, boxes = torch.tensor(columns).view(1, -1, 1) * 10.0, torch.zeros(1, len(columns), 4)
        ...     return Dense(logits, boxes, boxes, boxes, levels=places[:, 0], cells=places, anchors=places[:, 0])
        >>> student, teacher = row(0, 1, 2, 3), row(2, 1, 0)
        >>> partners = find_partners(student, teacher)
        >>> partners.take(teacher.logits).flatten().tolist(), partners.mask.tolist()
        ([0.0, 10.0, 20.0, 0.0], [[True, True, True, False]])
    """
    theirs = teacher.levels
    if levels is not None:
        renamed = torch.full_like(theirs, -1)
        for mine, other in levels:
            renamed = torch.where(theirs == other, mine, renamed)
        theirs = renamed
    places = [
        torch.stack([levels_of, *dense.cells.unbind(1), dense.anchors], dim=1)
        for levels_of, dense in ((student.levels, student), (theirs, teacher))
    ]
    spread = torch.cat(places).amax(dim=0) + 1

    def number(place: Tensor) -> Tensor:
        """A number for each place; below 0 for places without a level."""
        return ((place[:, 0] * spread[1] + place[:, 1]) * spread[2] + place[:, 2]) * spread[3] + place[:, 3]

    wanted, offered = (number(place) for place in places)
    offered, order = offered.sort()
    nearest = torch.searchsorted(offered, wanted).clamp(max=max(0, len(offered) - 1))
    found = offered[nearest] == wanted
    index = torch.where(found, order[nearest], 0)
    mask = found.repeat(len(student.logits), 1)
    if student.padding is not None:
        mask = mask & ~student.padding
    if teacher.padding is not None:
        mask = mask & ~teacher.padding[:, index]
    return Partners(index, mask)
