import pytest
import torch
from torchvision.ops import generalized_box_iou, generalized_box_iou_loss

from detdistill.functional.boxes import (
    boxes_from_distances,
    centerness_target,
    distances_to_sides,
    giou_loss,
    paired_giou,
    paired_iou,
    pairwise_giou,
    pairwise_iou,
)
from tests.golden import Golden, assert_golden


def some_boxes(count, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator, dtype=dtype) * 40
    return torch.cat([corners, corners + 1 + torch.rand(count, 2, generator=generator, dtype=dtype) * 40], dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_giou_equals_the_released_code(dtype):
    golden = Golden("_giou")
    target, weight = golden["in_target"].to(dtype), golden["in_weight"].to(dtype)
    boxes = golden["in_pred"].to(dtype).requires_grad_()
    loss = giou_loss(boxes, target)
    assert_golden(loss, golden["out_loss"].to(dtype))
    weighted = 2 * (loss * weight).sum() / (3.5 + torch.finfo(torch.float32).eps)
    assert_golden(weighted, golden["out_weighted"].to(dtype))
    weighted.backward()
    assert_golden(boxes.grad, golden["grad_student_pred"].to(dtype))
    assert_golden(pairwise_iou(boxes, target), golden["out_iou_matrix"].to(dtype))
    assert_golden(pairwise_giou(boxes, target), golden["out_giou_matrix"].to(dtype))


def test_boxes_of_some_pixels_equal_torchvision():
    first, second = some_boxes(20, 0), some_boxes(20, 1)
    torch.testing.assert_close(pairwise_giou(first, second), generalized_box_iou(first, second), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(giou_loss(first, second), generalized_box_iou_loss(first, second), rtol=1e-6, atol=1e-6)


def test_pairs_are_the_diagonal():
    first, second = some_boxes(7, 2), some_boxes(7, 3)
    assert torch.equal(paired_iou(first, second), pairwise_iou(first, second).diagonal())
    assert torch.equal(paired_giou(first, second), pairwise_giou(first, second).diagonal())
    torch.testing.assert_close(paired_giou(first, first), torch.ones(7, dtype=torch.float64))


def test_boxes_without_area_and_no_boxes_are_finite():
    point = torch.zeros(1, 4, requires_grad=True)
    loss = giou_loss(point, torch.tensor([[0.0, 0.0, 0.0, 0.0]]))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(point.grad).all()
    assert pairwise_giou(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)


def test_distances_lead_back_to_the_box():
    boxes, points = some_boxes(9, 4), torch.rand(9, 2, dtype=torch.float64) * 50
    torch.testing.assert_close(boxes_from_distances(points, distances_to_sides(points, boxes)), boxes)


def test_centerness_by_hand():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 20.0]]).expand(4, 4)
    points = torch.tensor([[5.0, 10.0], [2.0, 10.0], [2.0, 4.0], [10.0, 10.0]])
    torch.testing.assert_close(centerness_target(points, boxes), torch.tensor([1.0, 0.5, 0.25, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_boxes_of_half_precision_in_pixels(dtype):
    """Areas of such boxes overflow float16: 512 x 512 = 262144."""
    first, second = (torch.tensor([[0.0, 0.0, 512.0, 512.0]]), torch.tensor([[0.0, 0.0, 512.0, 1024.0]]))
    for found in (
        paired_iou(first.to(dtype), second.to(dtype)),
        pairwise_iou(first.to(dtype), second.to(dtype))[0],
        paired_giou(first.to(dtype), second.to(dtype)),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.tensor([0.5]))
