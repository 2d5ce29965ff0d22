"""Layers on maps of one cell, and equality with torch's on all others."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from detdistill.detectors.single_cells import accept_single_cells

NORMS = [lambda: nn.BatchNorm2d(8), lambda: BatchNormAct2d(8), lambda: nn.GroupNorm(8, 8), lambda: nn.GroupNorm(2, 8)]


def tolerant(norm):
    changed = nn.Sequential(copy.deepcopy(norm))
    accept_single_cells(changed)
    return changed


@pytest.mark.parametrize("build", NORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (1, 8, 3, 2)])
def test_all_else_is_torchs(build, training, shape):
    norm = build().train(training)
    changed = tolerant(norm)
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        assert torch.equal(changed(maps), norm(maps))
    assert changed[0].state_dict().keys() == norm.state_dict().keys()
    assert all(torch.equal(value, norm.state_dict()[name]) for name, value in changed[0].state_dict().items())


def test_one_value_per_channel_is_normalised_by_the_running_statistics():
    norm = nn.BatchNorm2d(2)
    norm.running_mean.copy_(torch.tensor([1.0, 2.0]))
    norm.running_var.copy_(torch.tensor([4.0, 9.0]))
    maps = torch.tensor([5.0, 8.0]).view(1, 2, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        copy.deepcopy(norm)(maps)
    changed = tolerant(norm)
    torch.testing.assert_close(changed(maps).flatten(), torch.tensor([2.0, 2.0]), rtol=1e-5, atol=1e-5)
    assert changed[0].running_mean.tolist() == [1.0, 2.0]
    assert int(changed[0].num_batches_tracked) == 0
    assert changed[0].training


def test_timms_norm_keeps_its_activation():
    changed = tolerant(BatchNormAct2d(2))
    maps = torch.tensor([-3.0, 5.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(changed(maps).flatten(), torch.tensor([0.0, 5.0]), rtol=1e-4, atol=1e-4)
    assert changed[0].training


def test_one_value_per_group_gives_the_bias():
    norm = nn.GroupNorm(2, 2)
    nn.init.constant_(norm.bias, 0.25)
    maps = torch.tensor([5.0, 8.0]).view(1, 2, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm(maps)
    assert tolerant(norm)(maps).flatten().tolist() == [0.25, 0.25]
    torch.testing.assert_close(norm(maps.expand(2, -1, -1, -1)).flatten(), torch.full((4,), 0.25), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_gradient_of_a_strided_convolution_is_that_of_float32(kernel):
    """torch's own is partly memory that nobody wrote to."""
    plain = nn.Conv2d(8, 8, kernel, stride=2, padding=kernel // 2)
    changed, maps = tolerant(plain)[0], torch.randn(1, 8, 1, 1, generator=torch.Generator().manual_seed(0))
    (expected,) = torch.autograd.grad(plain(maps).sum(), plain.weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = changed(maps)
    (gradient,) = torch.autograd.grad(found.sum(), changed.weight)
    torch.testing.assert_close(gradient, expected)
    wide = torch.randn(1, 8, 4, 4)
    assert torch.equal(changed(wide), plain(wide))
    with torch.autocast("cpu", torch.bfloat16):
        assert changed(wide).dtype == torch.bfloat16
