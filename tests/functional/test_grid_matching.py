"""Anchors of a hand-made grid: overlaps and matches are those of the whole matrix, of which only a part is computed."""

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from detdistill.functional.grid_matching import best_anchors, grids, large_overlaps, match_by_overlap

SHAPES = {8: (6, 8), 16: (3, 4)}
"""Rows and columns of each stride, for an image of 64 x 48 pixels."""
SIDES = ((2.0, 2.0), (3.0, 1.5), (1.0, 4.0))
"""Width and height of the anchors of a cell, in strides."""


def anchors():
    """Priors [P, 4], levels, cells and numbers of the anchors, in the order level, row, column, number."""
    priors, places = [], []
    for level, (stride, (rows, columns)) in enumerate(SHAPES.items()):
        for row in range(rows):
            for column in range(columns):
                for number, (width, height) in enumerate(SIDES):
                    x, y = (column + 0.5) * stride, (row + 0.5) * stride
                    half_x, half_y = width * stride / 2, height * stride / 2
                    priors.append([x - half_x, y - half_y, x + half_x, y + half_y])
                    places.append([level, row, column, number])
    place = torch.tensor(places)
    return torch.tensor(priors), place[:, 0], place[:, 1:3], place[:, 3]


PRIORS, *PLACES = anchors()
IMAGE = torch.tensor([64.0, 48.0, 64.0, 48.0])
CLIPPED = PRIORS.clamp(min=0).minimum(IMAGE)  # still a grid, whose outer rows and columns are smaller


def boxes_of(kind):
    if kind == "whole pixels":  # many ties, also with the sides of anchors
        return torch.tensor([[0.0, 0, 16, 16], [8, 8, 40, 24], [8, 8, 40, 24], [30, 0, 34, 48], [4, 4, 20, 20], [0, 0, 64, 48]])
    generator = torch.Generator().manual_seed(0)
    low, high = {"all sizes": (2.0, 40.0), "small": (0.5, 3.0)}[kind]
    sides = low * (high / low) ** torch.rand(40, 2, generator=generator)
    corners = torch.rand(40, 2, generator=generator) * (torch.tensor([64.0, 48.0]) - sides)
    return torch.cat([corners, corners + sides], dim=1)


def test_a_grid_is_described_by_the_sides_of_its_rows_and_columns():
    first, second = grids(PRIORS, *PLACES)
    assert (first.start, second.start) == (0, 6 * 8 * 3)
    assert (first.sides_x.shape, first.sides_y.shape) == ((2, 3, 8), (2, 3, 6))
    # The second anchor is 48 x 24 pixels; the last column and row of stride 16 have their middles at 56 and 40.
    assert second.sides_x[:, 1, 3].tolist() == [56 - 24, 56 + 24]
    assert second.sides_y[:, 1, 2].tolist() == [40 - 12, 40 + 12]


@pytest.mark.parametrize("side", range(4))
def test_a_moved_or_a_missing_anchor_is_no_grid(side):
    moved = PRIORS.clone()
    moved[100, side] += 0.5
    assert grids(moved, *PLACES) is None
    assert grids(PRIORS[:-1], *(place[:-1] for place in PLACES)) is None


@pytest.mark.parametrize("scale", [1, 1 / 8, 1 / 64])  # powers of 2, which change no digit of an overlap
@pytest.mark.parametrize("threshold", [0.3, 1 / 3, 0.7])  # a square and itself one step of half its side away overlap by 1/3
@pytest.mark.parametrize("kind", ["all sizes", "small", "whole pixels"])
@pytest.mark.parametrize("clipped", [False, True])
def test_large_overlaps_are_those_of_the_matrix(clipped, kind, threshold, scale):
    boxes, priors = scale * boxes_of(kind), scale * (CLIPPED if clipped else PRIORS)
    matrix = box_iou(boxes, priors)
    found = large_overlaps(boxes, grids(priors, *PLACES), threshold)
    assert torch.equal(found.iou, matrix[found.box, found.anchor])
    assert torch.equal(found.largest, matrix.amax(dim=1))
    pairs = set(zip(found.box.tolist(), found.anchor.tolist(), strict=True))
    assert len(pairs) == len(found.box)
    wanted = (matrix >= threshold) | (matrix == matrix.amax(dim=1, keepdim=True))
    assert pairs >= {tuple(pair) for pair in torch.nonzero(wanted).tolist()}
    assert clipped or len(pairs) == int(wanted.sum())  # of anchors of one size the largest overlap is known at once
    assert torch.equal(best_anchors(found, len(priors)), matrix.argmax(dim=1))


@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.3, 0.7), (0.5, 0.5)])
@pytest.mark.parametrize("kind", ["all sizes", "small", "whole pixels"])
def test_matches_are_torchvisions(kind, low, high, keep_best):
    boxes = boxes_of(kind)
    expected = Matcher(high, low, allow_low_quality_matches=keep_best)(box_iou(boxes, PRIORS))
    found = large_overlaps(boxes, grids(PRIORS, *PLACES), low)
    assert torch.equal(match_by_overlap(boxes, PRIORS, found, low, high, keep_best), expected)


@pytest.mark.parametrize("outside", [[900.0, 0.0, 910.0, 10.0], [0.0, 900.0, 10.0, 910.0], [0.0, 0.0, float("nan"), 10.0]])
def test_without_an_overlap_of_each_box_there_is_no_result(outside):
    boxes = torch.cat([boxes_of("whole pixels"), torch.tensor([outside])])
    assert large_overlaps(boxes, grids(PRIORS, *PLACES), 0.3) is None
