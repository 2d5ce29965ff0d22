"""The regions of the region head that methods train beside a student, and its adapters."""

from dataclasses import replace

import pytest
import torch

from detdistill.methods.shared.region_heads import AnchorLinear, regions_of_dense
from detdistill.structures import Dense, Target
from tests.methods.contract_checks import without_boxes
from tests.tiny import TinyDense, tiny_batch

SAMPLING = {"nms": 0.7, "after": 5000, "count": 5000, "positive_fraction": 1.0}


def test_regions_keep_their_origin_and_hold_the_ground_truth():
    student, batch = TinyDense(seed=1), tiny_batch(2)
    prediction = student(batch).prediction
    found = regions_of_dense(prediction, batch, **SAMPLING | {"count": 16})
    for image, (boxes, origin, matched, target) in enumerate(zip(*found, batch.targets, strict=True)):
        assert len(boxes) == len(matched) <= 16
        own = origin.level >= 0
        assert set(origin.ground_truth[~own].tolist()) <= set(range(len(target)))
        assert (matched[~own] == origin.ground_truth[~own]).all()
        for box, place in zip(boxes[own], torch.nonzero(own).flatten(), strict=True):
            same = (prediction.levels == origin.level[place]) & (prediction.cells == origin.cell[place]).all(dim=1)
            height, width = batch.sizes[image].tolist()
            limit = torch.tensor([width, height, width, height])
            source = torch.minimum(prediction.boxes_xyxy[image, same][0].clamp(min=0), limit)
            torch.testing.assert_close(box, source)


def test_fewer_regions_than_asked_and_none():
    student, batch = TinyDense(seed=1), without_boxes(tiny_batch(2), range(2))
    prediction = student(batch).prediction
    assert all(0 < len(boxes) < 5000 for boxes in regions_of_dense(prediction, batch, **SAMPLING).boxes_xyxy)
    point = replace(prediction, boxes_xyxy=torch.full_like(prediction.boxes_xyxy, 7.0))
    assert [len(boxes) for boxes in regions_of_dense(point, batch, **SAMPLING).boxes_xyxy] == [0, 0]


def squares():
    """50 x 50 predictions of one level: pixels side by side, whose scores fall row by row."""
    cells = torch.cartesian_prod(torch.arange(50), torch.arange(50))
    boxes = torch.cat([cells.flip(1), cells.flip(1) + 1], dim=1)[None].float()
    level = torch.zeros(2500, dtype=torch.int64)
    return Dense(torch.linspace(3, -3, 2500)[None, :, None], boxes, boxes, boxes, level, cells, level)


@pytest.mark.parametrize(
    ("limits", "positives", "regions"),
    [
        ({}, 5, 2002),  # the 2000 best of a level enter NMS
        ({"before": 20}, 3, 22),
        ({"after": 20}, 3, 22),
        ({"count": 8, "positive_fraction": 0.5}, 4, 8),
        ({"iou": 0.6}, 3, 2002),
    ],
)
def test_each_step_has_its_limit(limits, positives, regions):
    """One box is the eleventh square, the other covers half each the 31st and 32nd; both are regions, too."""
    boxes = torch.tensor([[10.0, 0.0, 11.0, 1.0], [30.0, 0.0, 32.0, 1.0]])
    target = Target(boxes, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool))
    (matched,) = regions_of_dense(squares(), tiny_batch(1).with_targets([target]), **SAMPLING | limits).matched
    assert (int((matched >= 0).sum()), len(matched)) == (positives, regions)


def test_each_anchor_has_its_own_layer():
    psi, rows = AnchorLinear(3, 4, 5), torch.randn(6, 3)
    anchor = torch.tensor([4, 0, 0, 2, 4, 1])
    every = psi.layer(rows).unflatten(1, (5, 4))
    torch.testing.assert_close(psi(rows, anchor), every[torch.arange(6), anchor])
    assert psi(rows[:0], anchor[:0]).shape == (0, 4)
