import pytest
import torch

from detdistill.functional.cells import BoxCells
from detdistill.functional.masks import foreground_mask, union_mask
from tests.golden import Golden


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def test_union_is_by_image():
    first = BoxCells(torch.tensor([[True, False], [False, True]]), torch.tensor([[True, False, False], [False, True, True]]))
    none = BoxCells(torch.zeros(0, 2, dtype=torch.bool), torch.zeros(0, 3, dtype=torch.bool))
    assert union_mask([first, none]).int().tolist() == [[[1, 0, 0], [0, 1, 1]], [[0, 0, 0], [0, 0, 0]]]


def test_image_size_and_boxes_scale_together():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(6, 2, 2, generator=generator, dtype=torch.float64).sort(dim=1).values * 64
    some = corners.flatten(1)
    expected = foreground_mask([some], [(64, 64)], (5, 7))
    assert torch.equal(foreground_mask([some * 4], [(256, 256)], (5, 7)), expected)


def test_images_without_boxes_have_no_foreground():
    mask = foreground_mask([boxes(), boxes((0, 0, 1, 1))], [(32, 32), (32, 32)], (4, 4))
    assert mask.shape == (2, 4, 4)
    assert mask.sum(dim=(1, 2)).tolist() == [0, 4]


def test_equals_the_released_code_of_fgd():
    golden = Golden("fgd")
    images = []
    while f"in_boxes_{len(images)}" in golden:
        images.append(golden[f"in_boxes_{len(images)}"].reshape(-1, 4))
    sizes = [tuple(golden[f"in_image_size_{b}"].tolist()) for b in range(len(images))]
    expected = golden.levels("out_mask_fg")
    if not images or not expected:
        pytest.skip("no masks in this file")
    for mask in expected:
        assert torch.equal(foreground_mask(images, sizes, tuple(mask.shape[-2:])), mask > 0)
