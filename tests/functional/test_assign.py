import pytest
import torch

from detdistill.functional.assign import max_iou_assign, pairwise_iou
from tests.golden import Golden, assert_golden


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def released_numbers(matched):
    """The released code counts from 1, has 0 for negative and -1 for ignored."""
    return torch.where(matched >= 0, matched + 1, torch.where(matched == -1, 0, -1))


def test_equals_mmdet_with_low_quality_matches():
    golden = Golden("_cascade")
    matched = max_iou_assign(golden["in_assign_priors"], golden["in_assign_gt"], 0.5, 0.4, 0.0, low_quality=True)
    assert torch.equal(released_numbers(matched), golden["out_assigned_retina"])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_equals_mmdet_without_low_quality_matches(stage):
    golden = Golden("_cascade")
    threshold = golden.meta["iou_thresholds"][stage]
    matched = max_iou_assign(
        golden["in_assign_priors"], golden["in_assign_gt"], threshold, threshold, threshold, low_quality=False
    )
    assert torch.equal(released_numbers(matched), golden[f"out_assigned_stage{stage}"])


def test_iou_by_hand():
    assert_golden(
        pairwise_iou(boxes((0, 0, 10, 10), (5, 5, 5, 5)), boxes((5, 0, 15, 10), (5, 5, 5, 5), (20, 0, 30, 10))),
        torch.tensor([[50 / 150, 0, 0], [0, 0, 0]], dtype=torch.float64),
    )


def test_ties():
    twins = boxes((0, 0, 10, 10), (0, 0, 10, 10))
    assert max_iou_assign(twins, twins, 0.5, 0.4, low_quality=False).tolist() == [0, 0]  # the first ground truth
    assert max_iou_assign(twins, twins, 0.5, 0.4, low_quality=True).tolist() == [1, 1]  # the last one that claims


def test_low_quality_matches_take_all_equal_boxes_above_the_minimum():
    wall = boxes((0, 0, 10, 10), (10, 0, 20, 10), (40, 0, 50, 10))
    between = boxes((8, 0, 12, 10))  # IoU 20 / 120 with both
    assert max_iou_assign(wall, between, 0.5, 0.4).tolist() == [0, 0, -1]
    assert max_iou_assign(wall, between, 0.5, 0.4, min_positive=0.3).tolist() == [-1, -1, -1]
    assert max_iou_assign(wall, between, 0.5, 0.4, low_quality=False).tolist() == [-1, -1, -1]


def test_ground_truth_that_overlaps_nothing():
    wall, far = boxes((0, 0, 10, 10), (10, 0, 20, 10)), boxes((50, 50, 60, 60))
    assert max_iou_assign(wall, far, 0.5, 0.4).tolist() == [0, 0]  # as released
    assert max_iou_assign(wall, far, 0.5, 0.4, min_positive=1e-6).tolist() == [-1, -1]


def test_nothing_to_match():
    assert max_iou_assign(boxes((0, 0, 10, 10)), boxes(), 0.5, 0.4).tolist() == [-1]
    assert max_iou_assign(boxes(), boxes((0, 0, 10, 10)), 0.5, 0.4).tolist() == []
