"""The regions of the region head that methods train beside a student, and its adapters."""

from dataclasses import replace

import torch

from detdistill.methods.shared.region_heads import AnchorLinear, regions_of_dense
from tests.methods.contract_checks import without_boxes
from tests.tiny import TinyDense, tiny_batch


def test_regions_keep_their_origin_and_hold_the_ground_truth():
    student, batch = TinyDense(seed=1), tiny_batch(2)
    prediction = student(batch).prediction
    found = regions_of_dense(prediction, batch, count=16)
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
    assert all(0 < len(boxes) < 5000 for boxes in regions_of_dense(prediction, batch, count=5000).boxes_xyxy)
    point = replace(prediction, boxes_xyxy=torch.full_like(prediction.boxes_xyxy, 7.0))
    assert [len(boxes) for boxes in regions_of_dense(point, batch).boxes_xyxy] == [0, 0]


def test_each_anchor_has_its_own_layer():
    psi, rows = AnchorLinear(3, 4, 5), torch.randn(6, 3)
    anchor = torch.tensor([4, 0, 0, 2, 4, 1])
    every = psi.layer(rows).unflatten(1, (5, 4))
    torch.testing.assert_close(psi(rows, anchor), every[torch.arange(6), anchor])
    assert psi(rows[:0], anchor[:0]).shape == (0, 4)
