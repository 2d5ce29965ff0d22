import pytest
import torch

from detdistill.functional.assign import max_iou_assign, pairwise_iou, point_assign
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


def test_the_union_of_tiny_boxes_is_at_least_a_millionth_of_a_pixel():
    tiny = boxes((0, 0, 1e-3, 1e-3), (0, 0, 1e-3, 0.5e-3))
    assert_golden(pairwise_iou(tiny, tiny), torch.tensor([[1.0, 0.5], [0.5, 0.5]], dtype=torch.float64))


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


@pytest.mark.parametrize(("count", "name"), [(1, "out_point_assigned"), (3, "out_point_assigned_pos3")])
def test_points_equal_mmdet(count, name):
    golden = Golden("_reppoints")
    points = golden["out_points"]
    images = len(golden["in_image_sizes"])
    for image in range(images):
        matched = point_assign(points[:, :2], points[:, 2], golden[f"in_boxes_{image}"], golden.meta["point_base_scale"], count)
        assert torch.equal(released_numbers(matched), golden[f"{name}_{image}"])


def test_points_by_hand():
    points = boxes((0, 0, 8, 0), (8, 0, 8, 0), (16, 0, 8, 0), (0, 0, 16, 0), (16, 0, 16, 0))
    xy, strides = points[:, :2], points[:, 2]
    # 32 x 32 is made for stride 8, 64 x 64 for 16; 4 px and 4000 px go to the ends
    for side, point in ((32, 1), (64, 3), (4, 1), (4000, 3)):
        matched = point_assign(xy, strides, boxes((7 - side / 2, -side / 2, 7 + side / 2, side / 2)))
        assert torch.nonzero(matched == 0).flatten().tolist() == [point]
    near, far = (-8, -16, 23, 16), (-10, -16, 22, 16)  # centres 7.5 and 6: both want the point at 8
    assert point_assign(xy, strides, boxes(far, near)).tolist() == [-1, 1, -1, -1, -1]
    assert point_assign(xy, strides, boxes(near, near)).tolist() == [-1, 0, -1, -1, -1]  # the first one on ties
    assert point_assign(xy, strides, boxes(near), count=9).tolist() == [0, 0, 0, -1, -1]  # a level has only so many
    assert point_assign(xy, strides, boxes()).tolist() == [-1] * 5
    assert point_assign(xy[:1], strides[:1], boxes(near)).tolist() == [0]  # a single point
    assert point_assign(xy[:0], strides[:0], boxes(near)).tolist() == []
