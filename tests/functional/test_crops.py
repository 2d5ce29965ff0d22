import pytest
import torch
from torchvision.ops import roi_align

from detdistill.functional.crops import clamp_boxes, crop_boxes


@pytest.fixture
def images():
    return torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_whole_image_at_its_size_is_the_image(images):
    square = images[..., :20]
    boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0]] * 2, dtype=torch.float64)
    torch.testing.assert_close(crop_boxes(square, boxes, torch.tensor([0, 1]), 20), square, rtol=0, atol=1e-12)


def test_an_integer_box_at_its_size_shows_the_pixels(images):
    boxes = torch.tensor([[4.0, 3.0, 11.0, 10.0], [23.0, 0.0, 30.0, 7.0]])
    crops = crop_boxes(images.float(), boxes, torch.tensor([1, 0]), 7)
    torch.testing.assert_close(crops[0], images[1, :, 3:10, 4:11].float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(crops[1], images[0, :, 0:7, 23:30].float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 4, 9])
def test_inside_the_image_it_is_roi_align_with_one_sample(images, size):
    boxes = torch.tensor([[2.3, 3.1, 27.9, 18.2], [10.0, 5.0, 12.0, 6.0], [5.5, 1.5, 8.25, 16.0]], dtype=torch.float64)
    image = torch.tensor([1, 0, 1])
    expected = roi_align(images, torch.cat([image[:, None], boxes], dim=1), size, sampling_ratio=1, aligned=True)
    torch.testing.assert_close(crop_boxes(images, boxes, image, size), expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_boxes_equal_finite_differences(images):
    boxes = torch.tensor([[2.3, 3.1, 27.9, 18.2], [-3.7, 5.2, 12.4, 23.3]], dtype=torch.float64, requires_grad=True)
    image = torch.tensor([1, 0])
    assert torch.autograd.gradcheck(lambda b: crop_boxes(images, b, image, 3), boxes, eps=1e-7, atol=1e-5)


def test_beyond_the_valid_size_there_are_zeros(images):
    boxes = torch.tensor([[0.0, 0.0, 30.0, 20.0], [20.0, 10.0, 28.0, 18.0]], dtype=torch.float64)
    image = torch.tensor([0, 0])
    alone = crop_boxes(images[:1, :, :12, :18], boxes, image, 8)
    torch.testing.assert_close(crop_boxes(images, boxes, image, 8, [(12, 18), (20, 30)]), alone, rtol=0, atol=0)
    assert float(alone[1].abs().max()) == 0


def test_no_boxes(images):
    assert crop_boxes(images, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 5).shape == (0, 3, 5, 5)


def test_half_precision_keeps_coordinates(images):
    boxes, image = torch.tensor([[2.3, 3.1, 27.9, 18.2]]), torch.tensor([0])
    with torch.autocast("cpu", torch.bfloat16):
        crops = crop_boxes(images.float(), boxes, image, 6)
    assert torch.equal(crops, crop_boxes(images.float(), boxes, image, 6))


def test_clamped_sides_have_no_gradient_and_sides_on_the_border_have_one():
    boxes = torch.tensor([[-1.0, 0.0, 30.0, 21.0]], requires_grad=True)
    clamped = clamp_boxes(boxes, torch.tensor([1]), [(5, 5), (20, 30)])
    assert clamped.tolist() == [[0.0, 0.0, 30.0, 20.0]]
    clamped.sum().backward()
    assert boxes.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]
