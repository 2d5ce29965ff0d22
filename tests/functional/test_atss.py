import statistics

import pytest
import torch

from detdistill.detectors.student_files.models.dense import square_anchors
from detdistill.functional.assign import pairwise_iou
from detdistill.functional.atss import atss_assign, atss_thresholds
from detdistill.functional.boxes import centerness_target
from tests.golden import Golden, assert_golden


def pyramid(golden):
    shapes = [tuple(level.shape[-2:]) for level in golden.levels("in_cls")]
    anchors = square_anchors(shapes, golden["in_strides"].tolist(), golden.meta["octave_base_scale"], golden["out_anchors"])
    levels = torch.cat([torch.full((height * width,), level) for level, (height, width) in enumerate(shapes)])
    return anchors, levels


def test_assignment_equals_the_released_code():
    golden = Golden("_atss")
    anchors, levels = pyramid(golden)
    assert torch.equal(anchors, golden["out_anchors"])
    for image, boxes in enumerate(golden.levels("in_boxes")):
        matched, iou = atss_assign(anchors, levels, boxes.reshape(-1, 4), golden.meta["topk"])
        expected = golden[f"out_assigned_gt_{image}"] - 1
        assert torch.equal(matched, expected)
        positive = expected >= 0
        assert_golden(iou[positive], golden[f"out_assigned_iou_{image}"][positive])
        assert not iou[~positive].any()
        central = centerness_target(anchors[positive, :2] / 2 + anchors[positive, 2:] / 2, boxes[matched[positive]])
        assert_golden(central, golden[f"out_centerness_target_{image}"])


def grid(side, stride=8, levels=1):
    shapes = [(side >> level, side >> level) for level in range(levels)]
    strides = [stride << level for level in range(levels)]
    numbers = torch.cat([torch.full((height * width,), level) for level, (height, width) in enumerate(shapes)])
    return square_anchors(shapes, strides, 4, torch.zeros(())), numbers


def test_one_box_by_hand():
    """An anchor of the fitting size at the centre of the box has IoU 1, its neighbours less: it alone is above the rest."""
    anchors, levels = grid(16, levels=3)
    matched, iou = atss_assign(anchors, levels, torch.tensor([[48.0, 48.0, 80.0, 80.0]]), 9)
    assert matched[8 * 16 + 8] == 0
    assert iou[8 * 16 + 8] == 1
    positive = torch.nonzero(matched == 0).flatten()
    overlaps = pairwise_iou(anchors, torch.tensor([[48.0, 48.0, 80.0, 80.0]]))[:, 0]
    candidates = torch.cat(
        [
            mine[(anchors[mine].view(-1, 2, 2).mean(dim=1) - 64).norm(dim=1).argsort(stable=True)[:9]]
            for mine in (torch.nonzero(levels == level).flatten() for level in range(3))
        ]
    )
    threshold = overlaps[candidates].mean() + overlaps[candidates].std()
    assert set(positive.tolist()) == {int(index) for index in candidates if overlaps[index] >= threshold}


def test_an_anchor_of_two_boxes_goes_to_the_nearer_fit():
    anchors, levels = grid(16, levels=2)
    boxes = torch.tensor([[48.0, 48.0, 80.0, 80.0], [46.0, 46.0, 84.0, 84.0]])
    matched, iou = atss_assign(anchors, levels, boxes, 9)
    assert matched[8 * 16 + 8] == 0
    swapped, same = atss_assign(anchors, levels, boxes.flip(0), 9)
    assert swapped[8 * 16 + 8] == 1
    assert torch.equal(iou, same)
    twins, _ = atss_assign(anchors, levels, boxes[[0, 0]], 9)
    assert set(twins.tolist()) == {-1, 0}


SQUARES = torch.tensor([[4.0, 4, 12, 12], [36, 4, 44, 12], [68, 4, 76, 12], [100, 4, 108, 12]])
LEVEL = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("end", [False, True])
def test_the_centre_of_a_positive_lies_inside_by_more_than_a_hundredth(end, axis):
    """Of four anchors only the first overlaps the box, by about a half; its centre is at 8."""
    for depth, expected in ((0.005, -1), (0.015, 0), (-3.0, -1)):
        box = torch.tensor([4.0, 4.0, 12.0, 12.0])
        box[axis], box[axis + 2] = (0.0, 8 + depth) if end else (8 - depth, 16.0)
        assert atss_assign(SQUARES, LEVEL, box[None], 9)[0].tolist() == [expected, -1, -1, -1]


@pytest.mark.parametrize("count", [2, 3])
def test_the_threshold_by_hand(count):
    """The box has its centre at (24, 10), and those of the three nearest anchors are at (24, 4), (20, 20) and (36, 15)."""
    anchors = [[8, 20, 12, 40], [-16, 0, 64, 8], [16, 16, 24, 24], [34, 13, 38, 17], [37, 10, 41, 14], [4, 0, 8, 4], [3, 1, 7, 5]]
    box, levels = torch.tensor([[16.0, 0.0, 32.0, 20.0]]), torch.zeros(7, dtype=torch.int64)
    overlaps = [128 / (640 + 320 - 128), 32 / (64 + 320 - 32), 0.0][:count]
    threshold = atss_thresholds(torch.tensor(anchors).float(), levels, box, count)
    assert float(threshold) == pytest.approx(statistics.mean(overlaps) + statistics.stdev(overlaps))


def test_the_union_of_tiny_boxes_is_at_least_a_millionth_of_a_pixel():
    box = torch.tensor([[0.0, 0.0, 1e-3, 0.5e-3]])
    assert float(atss_thresholds(box, LEVEL[:1], box, candidates=1)) == pytest.approx(0.5)


@pytest.mark.parametrize("count", [0, 1])
def test_few_anchors_and_no_boxes(count):
    anchors, levels = grid(16)
    matched, iou = atss_assign(anchors, levels, torch.zeros(0, 4), 9)
    assert bool((matched == -1).all())
    assert not iou.any()
    matched, _ = atss_assign(anchors[:count], levels[:count], torch.tensor([[-10.0, -10.0, 10.0, 10.0]]), 9)
    assert matched.tolist() == [0] * count
