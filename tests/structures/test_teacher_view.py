"""The teacher's larger view of a batch: what is taught there, as if about the batch itself."""

import dataclasses

import torch

from detdistill.structures import Batch, Dense, Features, Observation, Origin, Regions, Tower
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


def test_maps_of_neck_backbone_and_towers_are_shrunk():
    batch = dataclasses.replace(tiny_batch(2, 32), enlarged=2.0)
    neck = features(8, 8)
    seen = Observation(neck, features(8, 8, channels=3), towers=(Tower(neck.maps, features(8, 8).maps, 2, (8,)),)).in_view_of(
        batch
    )
    assert seen.features.maps[0].shape == (2, 2, 4, 4)
    assert seen.backbone_features.maps[0].shape == (2, 3, 4, 4)
    assert torch.equal(seen.tower(2).classification[0], seen.features.maps[0])
    assert seen.tower(2).regression[0].shape == (2, 2, 4, 4)


def grid(rows, columns, level=0, anchors=1):
    """Cells, anchors and levels of one level, [P, 2], [P] and [P]."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns), torch.arange(anchors))
    return places[:, :2], places[:, 2], torch.full((len(places),), level)


def dense(*levels):
    """A prediction whose logits count all predictions, with boxes of the same number and anchors of the cell's number."""
    cells, anchors, level = (torch.cat(parts) for parts in zip(*levels, strict=True))
    number = torch.arange(len(cells), dtype=torch.float64)[None, :, None]
    priors = torch.cat([cells, cells + 1 + anchors[:, None]], dim=1)[None].double()
    return Dense(number, number.expand(-1, -1, 4), number.expand(-1, -1, 4), priors, level, cells, anchors, number[..., 0])


def test_dense_predictions_are_those_at_the_centres_of_the_larger_cells():
    """Cells of 1.5 cells: the centres 0.75, 2.25 and 3.75 lie in the cells 0, 2 and 3. Anchors are those of the cell itself."""
    large = dense(grid(5, 5), grid(3, 3, level=1, anchors=2))
    small = large.shrunk(1.5, (24, 20), (8, 16))
    first = [5 * row + column for row in (0, 2, 3) for column in (0, 2, 3)]
    second = [25 + 6 * row + 2 * column + anchor for row in (0, 2) for column in (0, 2) for anchor in (0, 1)]
    assert small.logits[0, :, 0].tolist() == first + second
    assert torch.equal(small.boxes_xyxy, small.logits.expand(-1, -1, 4) / 1.5)
    assert torch.equal(small.quality, small.logits[..., 0])
    cells, anchors, levels = (torch.cat(parts) for parts in zip(grid(3, 3), grid(2, 2, 1, 2), strict=True))
    assert torch.equal(small.cells, cells)
    assert torch.equal(small.anchors, anchors)
    assert torch.equal(small.levels, levels)
    assert torch.equal(small.priors_xyxy[0], torch.cat([cells, cells + 1 + anchors[:, None]], dim=1).double())
    assert small.deltas.shape == (1, 17, 0)  # they belong to other anchors


def test_predictions_keep_their_places_whatever_their_order():
    large = dense(grid(4, 4))
    mixed = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = Dense(
        *(part[:, mixed] for part in (large.logits, large.deltas, large.boxes_xyxy, large.priors_xyxy)),
        *(part[mixed] for part in (large.levels, large.cells, large.anchors)),
    )
    assert torch.equal(shuffled.shrunk(2.0, (16, 16), (8,)).logits, large.shrunk(2.0, (16, 16), (8,)).logits)


def test_regions_are_in_the_smaller_images_pixels():
    boxes = torch.tensor([[0.0, 6.0, 12.0, 18.0]])
    one, nowhere = torch.ones(1, dtype=torch.int64), -torch.ones(1, dtype=torch.int64)
    origin = Origin(0 * one, one, one[:, None].repeat(1, 2), one, nowhere)
    large = Regions(
        boxes, origin, torch.zeros(1, 3), torch.zeros(1, 2, 4), boxes[:, None].repeat(1, 2, 1), first=dense(grid(4, 4))
    )
    small = large.shrunk(2.0, (16, 16), (8,))
    assert small.boxes_xyxy.tolist() == [[0.0, 3.0, 6.0, 9.0]]
    assert small.refined_xyxy[0, 1].tolist() == [0.0, 3.0, 6.0, 9.0]
    assert small.first.logits.shape[1] == 4
    assert (small.origin.image.tolist(), small.origin.level.tolist(), small.origin.cell.tolist()) == ([0], [-1], [[-1, -1]])


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
