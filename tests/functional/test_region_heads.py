"""The region head that is trained beside a one-stage head: layers, loss, levels."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from detdistill.functional.region_heads import RegionHead, RegionOutput, region_loss, staggered_levels
from detdistill.functional.regions import SampledRegions
from detdistill.structures import Features, Origin
from tests.methods.contract_checks import without_boxes
from tests.tiny import tiny_batch


def sampled(batch, boxes, matched):
    return SampledRegions(boxes, [Origin.given([len(mine)]) for mine in boxes], matched)


@pytest.mark.parametrize("classes", [2, 1])
def test_the_loss_by_hand(classes):
    """One positive in the second image, three regions."""
    batch = tiny_batch(2)
    target = replace(batch.targets[1], boxes_xyxy=torch.tensor([[10.0, 10.0, 30.0, 30.0]]), labels=torch.tensor([1]))
    batch = batch.with_targets([batch.targets[0], replace(target, crowd=torch.tensor([False]))])
    boxes = [torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([[6.0, 10.0, 14.0, 20.0], [0.0, 0.0, 9.0, 9.0]])]
    regions = sampled(batch, boxes, [torch.tensor([-1]), torch.tensor([0, -1])])
    logits, deltas = torch.randn(3, 3), torch.zeros(3, classes, 4)
    loss = region_loss(RegionOutput(logits, deltas, logits, logits), regions, batch)
    entropy = F.cross_entropy(logits, torch.tensor([2, 1, 2]))
    # 10 of 8 pixels to the right, 5 of 10 down, 2.5 times as wide, twice as high
    distance = (10 * 1.25 + 10 * 0.5 + 5 * math.log(2.5) + 5 * math.log(2)) / 3
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


def test_a_new_head_reads_seven_by_seven_cells_and_predicts_little():
    """Its outputs are drawn as in Faster R-CNN: deviations 0.01 of the classes and 0.001 of the deltas, no biases."""
    torch.manual_seed(0)
    head = RegionHead(3, 40, width=64)
    assert head.classification[1].in_features == 3 * 7 * 7
    assert float(head.logits.weight.std()) == pytest.approx(0.01, rel=0.1)
    assert float(head.deltas.weight.std()) == pytest.approx(0.001, rel=0.1)
    assert head.deltas.weight.shape == (4 * 40, 64)  # one branch, so each class has its own
    assert not head.logits.bias.any()
    assert not head.deltas.bias.any()


def test_two_samples_are_taken_along_each_side_of_a_bin():
    """Along 32 pixels they lie at 8 and 24: the first between the columns of 0 and 8, the second between two of 0."""
    head = RegionHead(1, 1, width=1, size=1)
    for layer in (head.classification[1], head.classification[3]):
        torch.nn.init.ones_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    features = Features((torch.tensor([0.0, 8.0, 0.0, 0.0]).expand(1, 1, 4, 4),), (8,))
    hidden = head.predict(features, [torch.tensor([[0.0, 0.0, 32.0, 32.0]])]).class_hidden
    assert hidden.tolist() == [[(4.0 + 0.0) / 2]]


def test_boxes_are_pooled_one_level_below_their_own():
    """Those of the finest level from that; inserted ground truth by its size: below 112 pixels the finest, below 224 the next."""
    boxes = torch.tensor([[0.0, 0.0, 300.0, 300.0]] * 3 + [[0.0, 0.0, 50.0, 50.0], [0.0, 0.0, 150.0, 150.0]])
    nowhere = torch.full((5,), -1)
    origin = Origin(
        torch.zeros(5, dtype=torch.int64), torch.tensor([0, 1, 4, -1, -1]), nowhere[:, None].repeat(1, 2), nowhere, nowhere
    )
    assert staggered_levels(boxes, origin, 5).tolist() == [0, 0, 3, 0, 1]
