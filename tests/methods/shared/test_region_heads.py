"""The region head that methods train beside a student: its regions, layers and loss."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from detdistill.functional.region_heads import RegionHead, RegionOutput, region_loss
from detdistill.functional.regions import SampledRegions
from detdistill.methods.shared.region_heads import AnchorLinear, regions_of_dense
from detdistill.structures import Features, Origin
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


def sampled(batch, boxes, matched):
    return SampledRegions(boxes, [Origin.given([len(mine)]) for mine in boxes], matched)


@pytest.mark.parametrize("classes", [2, 1])
def test_the_loss_by_hand(classes):
    """One positive in the second image, three regions."""
    batch = tiny_batch(2)
    target = replace(batch.targets[1], boxes_xyxy=torch.tensor([[10.0, 10.0, 30.0, 30.0]]), labels=torch.tensor([1]))
    batch = batch.with_targets([batch.targets[0], replace(target, crowd=torch.tensor([False]))])
    boxes = [torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([[10.0, 10.0, 30.0, 20.0], [0.0, 0.0, 9.0, 9.0]])]
    regions = sampled(batch, boxes, [torch.tensor([-1]), torch.tensor([0, -1])])
    logits, deltas = torch.randn(3, 3), torch.zeros(3, classes, 4)
    loss = region_loss(RegionOutput(logits, deltas, logits, logits), regions, batch)
    entropy = F.cross_entropy(logits, torch.tensor([2, 1, 2]))
    distance = (10 * 0.5 + 5 * torch.tensor(2.0).log()) / 3  # half a height down, twice as high
    torch.testing.assert_close(loss, entropy + distance)


def test_no_region_is_zero_and_connected():
    batch, head = without_boxes(tiny_batch(2), range(2)), RegionHead(4, 2, width=8, branches=2)
    features = Features((torch.randn(2, 4, 8, 8, requires_grad=True),), (8,))
    empty = [torch.zeros(0, 4)] * 2
    output = head.predict(features, empty)
    loss = region_loss(output, sampled(batch, empty, [torch.zeros(0, dtype=torch.int64)] * 2), batch)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


@pytest.mark.parametrize("branches", [1, 2])
def test_shapes_and_branches(branches):
    torch.manual_seed(0)
    head = RegionHead(4, 3, width=8, branches=branches)
    features = Features(tuple(torch.randn(2, 4, 16 // 2**level, 16 // 2**level) for level in range(5)), (8, 16, 32, 64, 128))
    boxes = [torch.tensor([[0.0, 0.0, 40.0, 40.0], [8.0, 8.0, 8.0, 20.0]]), torch.tensor([[-4.0, 0.0, 128.0, 128.0]])]
    output = head.predict(features, boxes)
    assert output.logits.shape == (3, 4)
    assert output.deltas.shape == (3, 3 if branches == 1 else 1, 4)
    assert (output.class_hidden is output.box_hidden) == (branches == 1)
    assert all(bool(torch.isfinite(part).all()) for part in output)
    assert (output.class_hidden >= 0).all()
    alone = Features(tuple(level[1:] for level in features.maps), features.strides)
    torch.testing.assert_close(head.predict(alone, boxes[1:]).logits, output.logits[2:])


def test_each_anchor_has_its_own_layer():
    psi, rows = AnchorLinear(3, 4, 5), torch.randn(6, 3)
    anchor = torch.tensor([4, 0, 0, 2, 4, 1])
    every = psi.layer(rows).unflatten(1, (5, 4))
    torch.testing.assert_close(psi(rows, anchor), every[torch.arange(6), anchor])
    assert psi(rows[:0], anchor[:0]).shape == (0, 4)
