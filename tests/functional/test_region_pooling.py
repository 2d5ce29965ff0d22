"""RoIAlign with a gradient of its own, against torchvision's."""

import pytest
import torch
from torchvision.ops import roi_align

from detdistill.functional.region_pooling import pool_rois


def regions(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Regions of two images of 72 x 104 pixels: inside, across the border, beyond it, without area, and turned over."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(count, 2, generator=generator) * 120 - 10
    sides = torch.rand(count, 2, generator=generator) ** 2 * 150 - 2
    images = torch.randint(0, 2, (count, 1), generator=generator)
    special = torch.tensor([[0.0, 200, 200, 300, 300], [1, 8, 8, 8, 8], [1, -50, -50, 150, 150], [0, 0, 0, 104, 72]])
    return torch.cat([torch.cat([images, corners, corners + sides], dim=1), special]).to(dtype)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_equal_torchvisions(dtype, samples, aligned):
    maps = torch.rand(2, 5, 9, 13, dtype=dtype, generator=torch.Generator().manual_seed(1))
    rois = regions(40, dtype)
    weights = torch.rand(len(rois), 5, 7, 7, dtype=dtype, generator=torch.Generator().manual_seed(2))
    found = []
    for pool in (pool_rois, roi_align):
        given = maps.clone().requires_grad_()
        pooled = pool(given, rois, 7, 0.125, samples, aligned)
        (pooled * weights).sum().backward()
        found.append((pooled.detach(), given.grad))
    (mine, gradient), (theirs, expected) = found
    assert torch.equal(mine, theirs)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(gradient, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_a_region_that_covers_one_cell_gives_its_gradient_to_it():
    maps = torch.zeros(1, 1, 3, 3, requires_grad=True)
    pool_rois(maps, torch.tensor([[0.0, 8, 16, 16, 24]]), 1, 0.125, 1, True).backward()
    assert maps.grad is not None
    assert torch.equal(torch.nonzero(maps.grad), torch.tensor([[0, 0, 2, 1]]))
    assert float(maps.grad.sum()) == 1


def test_the_gradient_is_the_same_piece_by_piece(monkeypatch):
    gradients = []
    for largest in (2**22, 1):
        monkeypatch.setattr("detdistill.functional.region_pooling.LARGEST_PIECE", largest)
        maps = torch.rand(2, 3, 9, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        pool_rois(maps, regions(20, torch.float64), 7, 0.125, 0, True).square().sum().backward()
        assert maps.grad is not None
        gradients.append(maps.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


def test_no_regions_leave_a_gradient_of_zero():
    maps = torch.rand(1, 2, 3, 3, requires_grad=True)
    pooled = pool_rois(maps, torch.zeros(0, 5), 7, 0.125, 2, True)
    assert pooled.shape == (0, 2, 7, 7)
    pooled.sum().backward()
    assert maps.grad is not None
    assert not maps.grad.any()
