"""Sparse form of an assignment of dense predictions, as caches store it: only positive and ignored cells are listed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from detdistill.structures.base import SHARED, PerImage
from detdistill.structures.batch import Batch
from detdistill.structures.predictions import Dense
from detdistill.structures.targets import IGNORED, NEGATIVE, Assignment


@dataclass(frozen=True)
class AssignedCells(PerImage):
    """Positive and ignored predictions of each image by level, row, column and anchor; all others are negative.

    Levels, rows and columns do not depend on the padding of the batch, so the assignment can be applied to the prediction of
    any detector with the same strides and anchors. Cells beyond an image's valid size are not listed.

    Shape letters: B images, M listed predictions (images with fewer are filled up with -1 at the end), P predictions.
    """

    places: Tensor
    """[B, M, 4] int64 level, row, column and anchor; -1 where an image has fewer."""
    ground_truth: Tensor
    """[B, M] int64 index of the box within its image's ``Target``; -2 ignored; -1 filling."""
    weights: Tensor | None
    """[B, M] loss weights; None: all 1."""
    padding_ignored: Tensor
    """[B] bool. True: cells beyond the image's valid size are ignored. False: they are negative."""
    strides: tuple[int, ...] = field(metadata=SHARED)
    """Stride of each level in pixels."""

    @staticmethod
    def of(assignment: Assignment, prediction: Dense, batch: Batch, strides: Sequence[int]) -> AssignedCells:
        """Convert an assignment [B, P] of a dense prediction. ``normalizer`` is dropped, because it depends on the batch.

        Args:
            assignment: the weights of its negative predictions must be 1.
            prediction: the prediction that was assigned.
            batch: gives the valid sizes of the images.
            strides: stride of each level of the prediction, in pixels.
        """
        inside = cells_inside(prediction, batch, strides)
        padding_ignored = ((assignment.matched == IGNORED) & ~inside).any(dim=1)
        listed = (assignment.matched != NEGATIVE) & inside
        where = torch.stack([prediction.levels, *prediction.cells.unbind(dim=1), prediction.anchors], dim=1)

        def padded(rows: Sequence[Tensor], empty: float) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=empty)

        return AssignedCells(
            padded([where[mask] for mask in listed], -1),
            padded([row[mask] for row, mask in zip(assignment.matched, listed, strict=True)], NEGATIVE),
            None
            if assignment.weights is None
            else padded([row[mask] for row, mask in zip(assignment.weights, listed, strict=True)], 0.0),
            padding_ignored,
            tuple(strides),
        )

    @classmethod
    def stack(cls, pieces: Sequence[AssignedCells]) -> AssignedCells:
        """Join the pieces of ``split`` again; images with fewer cells are filled up with -1."""
        longest = max(piece.ground_truth.shape[1] for piece in pieces)

        def filled(values: Sequence[Tensor], empty: float) -> Tensor:
            rows = []
            for value in values:
                missing = longest - value.shape[1]
                rows.append(torch.cat([value, value.new_full((len(value), missing, *value.shape[2:]), empty)], dim=1))
            return torch.cat(rows)

        weights = [piece.weights for piece in pieces if piece.weights is not None]
        return AssignedCells(
            filled([piece.places for piece in pieces], -1),
            filled([piece.ground_truth for piece in pieces], NEGATIVE),
            filled(weights, 0.0) if len(weights) == len(pieces) else None,
            torch.cat([piece.padding_ignored for piece in pieces]),
            pieces[0].strides,
        )

    def with_strides(self, strides: Sequence[int]) -> AssignedCells:
        """The same cells for a detector whose levels have the given strides; cells on strides that it lacks are left out."""
        levels = torch.tensor([strides.index(stride) if stride in strides else -1 for stride in self.strides])
        level = levels.to(self.places.device)[self.places[..., 0].clamp(min=0)]
        there = (level >= 0) & (self.ground_truth != NEGATIVE)
        places = torch.cat([level[..., None], self.places[..., 1:]], dim=-1)
        return replace(
            self,
            places=torch.where(there[..., None], places, -1),
            ground_truth=torch.where(there, self.ground_truth, NEGATIVE),
            strides=tuple(strides),
        )

    def on(self, prediction: Dense, batch: Batch) -> Assignment:
        """Convert back to an assignment [B, P] of ``prediction``; listed cells that the prediction lacks are skipped."""
        count = len(batch)
        matched = torch.full(prediction.boxes_xyxy.shape[:2], NEGATIVE, dtype=torch.int64, device=prediction.cells.device)
        matched[self.padding_ignored[:, None] & ~cells_inside(prediction, batch, self.strides)] = IGNORED
        own = torch.stack([prediction.levels, *prediction.cells.unbind(dim=1), prediction.anchors], dim=1)
        spread = torch.cat([own, self.places.flatten(0, 1)]).amax(dim=0) + 1
        numbers, order = _number(own, spread).sort()
        wanted = _number(self.places, spread)  # [B, M]
        found = torch.searchsorted(numbers, wanted).clamp(max=len(numbers) - 1)
        there = (numbers[found] == wanted) & (self.ground_truth != NEGATIVE)
        image = torch.arange(count, device=matched.device)[:, None].expand_as(found)[there]
        index = order[found[there]]
        matched[image, index] = self.ground_truth[there]
        if self.weights is None:
            return Assignment(matched)
        weights = torch.ones_like(matched, dtype=self.weights.dtype)
        weights[image, index] = self.weights[there]
        return Assignment(matched, weights)


def _number(places: Tensor, spread: Tensor) -> Tensor:
    """A unique number for each place [..., 4] whose entries are below ``spread`` [4]."""
    level, row, column, anchor = places.unbind(dim=-1)
    return ((level * spread[1] + row) * spread[2] + column) * spread[3] + anchor


def cells_inside(prediction: Dense, batch: Batch, strides: Sequence[int]) -> Tensor:
    """[B, P] bool, True where the top left pixel of a prediction's cell lies inside the image's valid size.

    Args:
        prediction: gives level and cell of each prediction.
        batch: gives the valid sizes of the images.
        strides: stride of each level of the prediction, in pixels.
    """
    stride = torch.tensor(strides, device=prediction.levels.device)[prediction.levels]
    first = prediction.cells * stride[:, None]
    return (first[None] < batch.sizes[:, None].to(first.device)).all(dim=-1)
