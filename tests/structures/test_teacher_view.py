"""The teacher's larger view of a batch: what is taught there, as if about the batch itself."""

import dataclasses

import torch

from detdistill.structures import Batch, Features, Observation, TaughtTogether
from tests.tiny import tiny_batch


def features(*sides, stride=8, channels=2):
    generator = torch.Generator().manual_seed(0)
    return Features((torch.rand(2, channels, *sides, generator=generator, dtype=torch.float64),), (stride,))


def test_a_cell_is_the_mean_of_the_cells_in_it():
    large = features(8, 8)
    small = large.shrunk(2.0, (32, 32), torch.tensor([[32, 32], [32, 32]]))
    level = large.maps[0]
    expected = (level[..., ::2, ::2] + level[..., 1::2, ::2] + level[..., ::2, 1::2] + level[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(small.maps[0], expected)
    assert small.padding is None


def test_cells_keep_their_places_for_any_factor():
    """A map that rises by 1 in each pixel of the larger image rises by the factor in each pixel of the smaller one.

    The antialiasing filter of torch keeps a slope to 0.03 of a cell.
    """
    stride, factor = 8, 1.5
    rise = (torch.arange(12, dtype=torch.float64) + 0.5) * stride
    large = Features((rise.expand(1, 1, 12, 12),), (stride,))
    small = large.shrunk(factor, (64, 64), torch.tensor([[64, 64]])).maps[0]
    assert small.shape == (1, 1, 8, 8)
    places = (torch.arange(8, dtype=torch.float64) + 0.5) * stride
    torch.testing.assert_close(small[0, 0, 3, 1:-1], factor * places[1:-1], rtol=0, atol=0.03 * stride)


def test_cells_beyond_the_smaller_image_are_padding():
    """An image of 24 x 32 pixels on a canvas of 32; its teacher's canvas of 64 has no cell more."""
    small = features(8, 8).shrunk(2.0, (32, 32), torch.tensor([[24, 32], [32, 32]]))
    expected = torch.zeros(2, 4, 4, dtype=torch.bool)
    expected[0, 3] = True
    assert torch.equal(small.padding[0], expected)


def test_missing_cells_are_zero_and_surplus_cells_are_cut():
    small = features(6, 10).shrunk(2.0, (32, 32), torch.tensor([[24, 32], [24, 32]]))
    assert small.maps[0].shape == (2, 2, 4, 4)
    assert not small.maps[0][:, :, 3].any()
    assert bool(small.padding[0][:, 3].all())


def test_observations_and_compositions_are_shrunk():
    batch = dataclasses.replace(tiny_batch(2, 32), enlarged=2.0)
    seen = Observation(features(8, 8), features(8, 8, channels=3))
    together = TaughtTogether((seen, None)).in_view_of(batch)
    assert together.parts[1] is None
    assert together.parts[0].features.maps[0].shape == (2, 2, 4, 4)
    assert together.parts[0].backbone_features.maps[0].shape == (2, 3, 4, 4)


def larger(batch: Batch, factor: int) -> Batch:
    views = tuple(dataclasses.replace(v, size_hw=(factor * v.size_hw[0], factor * v.size_hw[1])) for v in batch.views)
    targets = tuple(dataclasses.replace(t, boxes_xyxy=factor * t.boxes_xyxy) for t in batch.targets)
    images = batch.images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return Batch(images, factor * batch.sizes, targets, batch.ids, views)


def test_groups_have_one_canvas_in_both_views():
    """Two images of one canvas here, whose canvases differ there."""
    batch = dataclasses.replace(tiny_batch(2, 64), canvases_hw=((64, 64), (64, 64)), enlarged=2.0)
    batch = dataclasses.replace(batch, large=dataclasses.replace(larger(batch, 2), canvases_hw=((128, 128), (96, 128))))
    groups = batch.by_canvas()
    assert [chosen for chosen, _ in groups] == [[0], [1]]
    assert [part.large.padding_hw for _, part in groups] == [(128, 128), (96, 128)]
    assert [part.padding_hw for _, part in groups] == [(64, 64), (64, 64)]
    assert all(part.enlarged == 2.0 for _, part in groups)
    same = dataclasses.replace(batch, large=larger(batch, 2))
    ((chosen, whole),) = same.by_canvas()
    assert chosen == [0, 1]
    assert whole is same
