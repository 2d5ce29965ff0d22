"""Matching costs and assignments of mmdet 3.3.0 (golden file ``_hungarian``), and what holds of every matching."""

import itertools

import pytest
import torch

from detdistill.functional.matching import focal_class_cost, giou_cost, hungarian, l1_cost
from tests.golden import Golden, assert_golden


@pytest.fixture
def golden():
    return Golden("_hungarian")


def costs(golden):
    """Class, L1 on cxcywh, L1 on xyxy and GIoU costs by the file's names."""
    height, width = golden["in_image_size"].tolist()
    boxes, targets = golden["in_pred_boxes"], golden["in_boxes_0"]
    scale = boxes.new_tensor([width, height, width, height])

    def centers(xyxy):
        return torch.cat([(xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]], dim=1)

    weights = golden.meta["weights"]
    return {
        "out_cost_class": weights["focal"] * focal_class_cost(golden["in_logits"], golden["in_labels_0"]),
        "out_cost_l1": weights["l1"] * l1_cost(centers(boxes) / scale, centers(targets) / scale),
        "out_cost_l1_xyxy": weights["l1"] * l1_cost(boxes / scale, targets / scale),
        "out_cost_giou": weights["giou"] * giou_cost(boxes, targets),
    }


def test_costs_equal_the_golden_file(golden):
    found = costs(golden)
    for name, cost in found.items():
        assert_golden(cost, golden[name])
    assert_golden(found["out_cost_class"] + found["out_cost_l1"] + found["out_cost_giou"], golden["out_cost"])


def test_assignments_equal_the_golden_file(golden):
    found = costs(golden)
    for l1, name in (("out_cost_l1", "out_assigned_gt"), ("out_cost_l1_xyxy", "out_assigned_gt_l1_xyxy")):
        matched = hungarian(found["out_cost_class"] + found[l1] + found["out_cost_giou"])
        assert (matched + 1).tolist() == golden[name].tolist()
    assert (hungarian(found["out_cost_l1"][:, :0]) + 1).tolist() == golden["out_assigned_gt_when_empty"].tolist()


def test_matching_is_the_cheapest_of_all():
    torch.manual_seed(0)
    cost = torch.randn(3, 5, 4)
    matched = hungarian(cost)
    for one, rows in zip(cost, matched, strict=True):
        assert sorted(rows.tolist()) == [-1, 0, 1, 2, 3]
        mine = sum(float(one[query, box]) for query, box in enumerate(rows.tolist()) if box >= 0)
        best = min(
            sum(float(one[query, box]) for box, query in enumerate(chosen)) for chosen in itertools.permutations(range(5), 4)
        )
        assert mine == pytest.approx(best, abs=1e-5)


def test_more_boxes_than_queries_leave_boxes_over():
    assert hungarian(torch.tensor([[3.0, 1.0, 2.0], [9.0, 0.0, 9.0]])).tolist() == [2, 1]


def test_costs_that_are_no_numbers_are_avoided():
    nan, inf = float("nan"), float("inf")
    assert hungarian(torch.tensor([[nan, 1.0], [0.0, inf], [-inf, nan]])).tolist() == [1, -1, 0]
    assert sorted(hungarian(torch.full((2, 1), nan)).tolist()) == [-1, 0]


def test_class_cost_of_extreme_logits_is_finite():
    cost = focal_class_cost(torch.tensor([[60.0, -60.0]]), torch.tensor([0, 1]))
    assert torch.isfinite(cost).all()
    assert float(cost[0, 0]) < 0 < float(cost[0, 1])
