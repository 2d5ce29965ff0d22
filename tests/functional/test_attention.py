"""Attention of maps: hand-made values, sums, temperature, precision and gradients."""

import math

import pytest
import torch

from detdistill.functional import attention
from detdistill.functional.attention import channel_attention, spatial_attention


def test_spatial_attention_of_hand_made_maps():
    """Magnitudes of the cells, averaged over both channels, are 0 and 2: softmax(0, 2 / T) times 2 cells."""
    maps = torch.tensor([[[[0.0, -1.0]], [[0.0, 3.0]]]])
    large = math.exp(2 / 0.5)
    expected = torch.tensor([[[2 / (1 + large), 2 * large / (1 + large)]]])
    torch.testing.assert_close(spatial_attention(maps, temperature=0.5), expected)


def test_channel_attention_of_hand_made_maps():
    """Magnitudes of the channels, averaged over both cells, are 1 and 3: softmax(1 / T, 3 / T) times 2 channels."""
    maps = torch.tensor([[[[-2.0, 0.0]], [[3.0, -3.0]]]])
    small, large = math.exp(1 / 4), math.exp(3 / 4)
    expected = torch.tensor([[2 * small / (small + large), 2 * large / (small + large)]])
    torch.testing.assert_close(channel_attention(maps, temperature=4.0), expected)


def test_every_image_sums_to_its_cells_and_to_its_channels():
    maps = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(spatial_attention(maps, 0.3).sum(dim=(1, 2)), torch.full((3,), 24.0))
    torch.testing.assert_close(channel_attention(maps, 0.3).sum(dim=1), torch.full((3,), 5.0))


@pytest.mark.parametrize("attention", [spatial_attention, channel_attention])
def test_half_precision_is_computed_in_float32(attention):
    maps = 200 * torch.randn(1, 300, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    result = attention(maps, 0.1)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, attention(maps.float(), 0.1))
    assert attention(maps.double(), 0.1).dtype == torch.float64


@pytest.mark.parametrize("attention", [spatial_attention, channel_attention])
def test_gradients_agree_with_finite_differences(attention):
    maps = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda maps: attention(maps, 0.7), maps)


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_both_attentions_equal_each_alone_however_many_channels_are_taken_at_a_time(monkeypatch, chunk):
    monkeypatch.setitem(attention.CHUNK, "cpu", chunk)
    maps = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    cells, channels = attention.attentions(maps, 0.3)
    torch.testing.assert_close(cells, attention.spatial_attention(maps, 0.3))
    torch.testing.assert_close(channels, attention.channel_attention(maps, 0.3))
    assert torch.autograd.gradcheck(lambda given: attention.attentions(given, 0.3), [maps])
    assert attention.attentions(maps.half(), 0.3)[0].dtype == torch.float32
