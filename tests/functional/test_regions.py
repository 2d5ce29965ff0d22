"""Pooling on maps that say where each of their cells is; proposals and deltas beside torchvision's; sampling by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou, roi_align

from detdistill.errors import DetdistillError
from detdistill.functional.regions import (
    canonical_levels,
    decode_boxes,
    encode_boxes,
    features_at_origin,
    pool_boxes,
    pool_boxes_on_all_levels,
    propose,
    propose_by_class,
    sample_regions,
)
from detdistill.structures import Dense, Features, Origin, Target

STRIDES = (4, 8, 16, 32)


def squares(*sides):
    sides = torch.tensor(sides, dtype=torch.float64)[:, None]
    return torch.cat([0 * sides, 0 * sides, sides, sides], dim=1)


def places(images=2, height=128, width=160, strides=STRIDES, dtype=torch.float64):
    """A pyramid whose channels are x and y of each cell's centre in pixels, its level and its image."""
    maps = []
    for level, stride in enumerate(strides):
        y = (torch.arange(height // stride, dtype=dtype) + 0.5) * stride
        x = (torch.arange(width // stride, dtype=dtype) + 0.5) * stride
        one = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x)), torch.full((len(y), len(x)), level, dtype=dtype)])
        maps.append(torch.stack([torch.cat([one, torch.full_like(one[:1], image)]) for image in range(images)]))
    return Features(tuple(maps), tuple(strides))


def bin_centers(boxes, size):
    """[R, 2, S, S] x and y of the middle of each bin."""
    middles = (torch.arange(size, dtype=boxes.dtype) + 0.5) / size
    x, y = (boxes[:, axis, None] + (boxes[:, axis + 2] - boxes[:, axis])[:, None] * middles for axis in (0, 1))
    return torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=1)


# ------------------------------------------------------------------------------------------------------------ pooling


def test_canonical_levels_by_hand():
    boxes = squares(0, 20, 111.99, 112, 223.99, 224, 447.99, 448, 1e6)
    assert canonical_levels(boxes, STRIDES).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert canonical_levels(boxes, (8, 16, 32, 64, 128)).tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 4]
    assert canonical_levels(boxes.float(), STRIDES).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    thin = torch.tensor([[0.0, 0.0, 1000.0, 12.544], [0.0, 5.0, 1000.0, 3.0], [0.0, float("nan"), 1.0, 1.0]])
    assert canonical_levels(thin, STRIDES).tolist() == [1, 0, 0]  # sqrt(1000 * 12.544) = 112; no area; not a number
    assert canonical_levels(boxes[:0], STRIDES).tolist() == []
    almost = squares(224 * (1 - 0.5e-8), 224 * (1 - 1.5e-8))  # detectron2 adds 1e-8 to the ratio of the sides
    assert canonical_levels(almost, STRIDES).tolist() == [2, 1]


BOXES = (
    torch.tensor([[20.0, 20, 120, 110], [30, 40, 60, 90], [10, 8, 150, 120]], dtype=torch.float64),
    torch.tensor([[32.5, 41.25, 36, 44.5], [16, 16, 144, 112]], dtype=torch.float64),
)


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
def test_pooled_places_are_the_middles_of_the_bins_in_the_order_of_the_boxes(size, sampling_ratio):
    levels = torch.tensor([1, 0, 2, 0, 3])
    pooled = pool_boxes(places(), BOXES, size, levels, sampling_ratio=sampling_ratio)
    torch.testing.assert_close(pooled[:, :2], bin_centers(torch.cat(BOXES), size), rtol=0, atol=1e-9)
    assert (pooled[:, 2] - levels[:, None, None]).abs().max() < 1e-12
    assert (pooled[:, 3] - torch.tensor([0, 0, 0, 1, 1])[:, None, None]).abs().max() < 1e-12


def test_levels_are_canonical_by_default():
    pooled = pool_boxes(places(), (squares(40, 120), squares(130)), 2)
    assert pooled[:, 2].mean(dim=(1, 2)).tolist() == pytest.approx([0, 1, 1])
    assert pooled[:, 3].mean(dim=(1, 2)).tolist() == pytest.approx([0, 0, 1])


def test_every_cell_below_a_bin_is_a_sample_by_default():
    """Along 32 pixels they lie in the middles of the four columns; a single sample would lie between the second and third."""
    features = Features((torch.tensor([1.0, 0.0, 0.0, 7.0]).expand(1, 1, 4, 4),), (8,))
    boxes = [torch.tensor([[0.0, 0.0, 32.0, 32.0]])]
    for pooled in (pool_boxes(features, boxes, 1), *pool_boxes_on_all_levels(features, boxes, 1)):
        assert pooled.tolist() == [[[[2.0]]]]


def test_without_alignment_a_box_is_seen_half_a_cell_later():
    boxes = (BOXES[0][:1], BOXES[1][1:])
    levels = torch.tensor([1, 2])
    late = pool_boxes(places(), boxes, 3, levels, aligned=False)[:, :2] - pool_boxes(places(), boxes, 3, levels)[:, :2]
    torch.testing.assert_close(
        late, torch.tensor([4.0, 8.0], dtype=late.dtype).view(2, 1, 1, 1).expand_as(late), rtol=0, atol=1e-9
    )


def test_all_levels_are_each_level_alone():
    features = places()
    everywhere = pool_boxes_on_all_levels(features, BOXES, 3, sampling_ratio=2)
    assert len(everywhere) == 4
    for level, pooled in enumerate(everywhere):
        alone = pool_boxes(features, BOXES, 3, torch.full((5,), level), sampling_ratio=2)
        assert torch.equal(pooled, alone)
        rois = torch.cat([torch.tensor([0.0, 0, 0, 1, 1], dtype=torch.float64)[:, None], torch.cat(BOXES)], dim=1)
        expected = roi_align(features.maps[level], rois, 3, 1 / STRIDES[level], 2, True)
        assert torch.equal(pooled, expected)


def test_other_scales_than_the_strides():
    features = places(strides=(4, 8))
    halved = tuple(boxes / 2 for boxes in BOXES)
    found = pool_boxes_on_all_levels(features, halved, 3, scales=(0.5, 0.25))
    for pooled, expected in zip(found, pool_boxes_on_all_levels(features, BOXES, 3), strict=True):
        torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)


def test_gradient_reaches_the_cells_under_the_boxes_and_no_box():
    features = places(images=2)
    maps = tuple(level[:, :1].clone().requires_grad_() for level in features.maps)
    boxes = (torch.tensor([[40.0, 40, 72, 72]], dtype=torch.float64, requires_grad=True), torch.zeros(0, 4, dtype=torch.float64))
    pooled = pool_boxes(Features(maps, STRIDES), boxes, 4, torch.tensor([1]))
    pooled.sum().backward()
    assert maps[1].grad.sum().item() == pytest.approx(16)  # weights of each of 4 x 4 bins sum to 1
    inside = torch.zeros(16, 20, dtype=torch.bool)
    inside[5:9, 5:9] = True  # cells 5 to 8 lie between pixels 40 and 72
    assert float(maps[1].grad[0, 0, inside].min()) > 0
    assert float(maps[1].grad[0, 0, ~inside].abs().max()) == 0
    for level in (0, 2, 3):
        assert torch.equal(maps[level].grad, torch.zeros_like(maps[level]))
    assert float(maps[1].grad[1].abs().max()) == 0
    assert boxes[0].grad is None


def test_pooled_values_equal_finite_differences():
    maps = tuple(torch.randn(1, 2, 4 // step, 4 // step, dtype=torch.float64, requires_grad=True) for step in (1, 2))
    boxes = [torch.tensor([[1.0, 2.0, 11.0, 15.0], [-3.0, 3.0, 9.0, 20.0]], dtype=torch.float64)]
    levels = torch.tensor([0, 1])
    assert torch.autograd.gradcheck(lambda *level: pool_boxes(Features(level, (4, 8)), boxes, 2, levels), maps)


def test_no_boxes_give_nothing_with_a_graph():
    features = Features(tuple(level.requires_grad_() for level in places().maps), STRIDES)
    empty = (torch.zeros(0, 4), torch.zeros(0, 4))
    pooled = pool_boxes(features, empty, 7)
    assert pooled.shape == (0, 4, 7, 7)
    everywhere = pool_boxes_on_all_levels(features, empty, 7)
    (pooled.sum() + sum(level.sum() for level in everywhere)).backward()
    assert all(torch.equal(level.grad, torch.zeros_like(level)) for level in features.maps)


def test_boxes_without_area_beyond_the_map_or_not_finite():
    strange = torch.tensor(
        [
            [50.0, 50, 50, 50],
            [90, 90, 40, 40],
            [500, 500, 600, 600],
            [float("nan"), 0, 9, 9],
            [0, 0, float("inf"), 9],
            [4, 4, 60, 60],
        ],
        dtype=torch.float64,
    )
    for aligned in (True, False):
        for sampling_ratio in (0, 2):
            pooled = pool_boxes(places(), (strange, strange[:0]), 2, sampling_ratio=sampling_ratio, aligned=aligned)
            assert bool(pooled.isfinite().all())
    pooled = pool_boxes(places(), (strange, strange[:0]), 2)
    assert float(pooled[:5].abs().max()) == 0
    torch.testing.assert_close(pooled[5:, :2], bin_centers(strange[5:], 2), rtol=0, atol=1e-9)


def test_one_box_over_everything_and_a_map_of_one_cell():
    whole = torch.tensor([[0.0, 0, 160, 128]], dtype=torch.float64)
    # the mean of two samples of a bin's half, which the map's edge bounds: x at 40 and 120 without the edge's half cell
    pooled = pool_boxes(places(1), (whole,), 1, torch.tensor([0]))
    assert pooled[0, :2, 0, 0].tolist() == pytest.approx([80.0, 64.0])
    single = Features((torch.full((1, 1, 1, 1), 5.0),), (64,))
    assert pool_boxes(single, (torch.tensor([[0.0, 0, 64, 64], [10, 10, 20, 20]]),), 2).flatten().tolist() == [5.0] * 8


def test_crowded_image():
    generator = torch.Generator().manual_seed(0)
    corners = 16 + 60 * torch.rand(800, 2, generator=generator, dtype=torch.float64)
    boxes = torch.cat([corners, corners + 1 + 40 * torch.rand(800, 2, generator=generator, dtype=torch.float64)], dim=1)
    levels = torch.randint(0, 2, (800,), generator=generator)
    pooled = pool_boxes(places(1), (boxes,), 2, levels)
    torch.testing.assert_close(pooled[:, :2], bin_centers(boxes, 2), rtol=0, atol=1e-9)
    assert torch.equal(pooled[:, 2, 0, 0].round().long(), levels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_pooled_in_float32(dtype):
    maps = tuple(torch.randn(2, 3, 16 // step, 20 // step).to(dtype).requires_grad_() for step in (1, 2))
    boxes = [torch.tensor([[3.3, 4.7, 101.9, 120.2]]), torch.tensor([[0.0, 0.0, 160.0, 128.0]])]
    pooled = pool_boxes(Features(maps, (8, 16)), boxes, 3)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, pool_boxes(Features(tuple(level.float() for level in maps), (8, 16)), boxes, 3))
    pooled.sum().backward()
    assert maps[0].grad.dtype == dtype


@pytest.mark.parametrize("levels", [[0, 4], [0, -1], [0]])
def test_levels_that_do_not_exist_or_are_missing_are_refused(levels):
    with pytest.raises(DetdistillError, match="2 boxes need one level each, 0 to 3"):
        pool_boxes(places(1), [squares(30, 40)], 2, torch.tensor(levels))


def test_levels_of_other_channels_are_refused():
    features = Features((torch.zeros(1, 3, 4, 4), torch.zeros(1, 5, 2, 2)), (8, 16))
    with pytest.raises(DetdistillError, match=r"levels of \(3, 5\) channels"):
        pool_boxes(features, [torch.zeros(1, 4)], 2)
    assert [level.shape[1] for level in pool_boxes_on_all_levels(features, [torch.zeros(1, 4)], 2)] == [3, 5]


def origin_of(*rows):
    """Rows of image, level, row, column, anchor and ground truth."""
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 6)
    return Origin(table[:, 0], table[:, 1], table[:, 2:4], table[:, 4], table[:, 5])


def test_vectors_of_the_cells_that_boxes_came_from():
    maps = [level.requires_grad_() for level in places().maps]
    origin = origin_of(
        (1, 2, 3, 5, 0, -1), (0, -1, -1, -1, -1, 4), (0, 0, 31, 39, 2, -1), (1, 2, 0, 0, 0, -1), (0, 1, 7, 2, 0, -1)
    )
    vectors = features_at_origin(maps, origin)
    assert vectors.tolist() == [[88, 56, 2, 1], [158, 126, 0, 0], [8, 8, 2, 1], [20, 60, 1, 0]]
    vectors[:, 0].sum().backward()
    assert maps[2].grad[1, 0].nonzero().tolist() == [[0, 0], [3, 5]]
    assert float(maps[3].grad.abs().max()) == 0
    none = features_at_origin(maps, origin_of((0, -1, -1, -1, -1, 0)))
    assert none.shape == (0, 4)
    none.sum().backward()


# ---------------------------------------------------------------------------------------------------------- proposing


def random_dense(seed=0, classes=1, softmax=False, images=2, extent=100.0):
    """Boxes of 8 x 8 and 4 x 4 cells with three anchors each, in no order of levels."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor([0] * 192 + [1] * 48)
    cells = torch.cat([torch.cartesian_prod(torch.arange(n), torch.arange(n)).repeat_interleave(3, 0) for n in (8, 4)])
    anchors = torch.arange(240) % 3
    corners = extent * torch.rand(images, 240, 2, generator=generator) - 10
    boxes = torch.cat([corners, corners + 40 * torch.rand(images, 240, 2, generator=generator)], dim=2)
    logits = torch.randn(images, 240, classes + softmax, generator=generator)
    return Dense(logits, boxes, boxes, boxes, levels, cells, anchors, softmax=softmax)


SIZES = torch.tensor([[80, 96], [64, 70]])


def index_of(dense, origin):
    """Which prediction each proposal was."""
    table = torch.cat([dense.levels[:, None], dense.cells, dense.anchors[:, None]], dim=1)
    wanted = torch.cat([origin.level[:, None], origin.cell, origin.anchor[:, None]], dim=1)
    return (wanted[:, None] == table[None]).all(dim=2).float().argmax(dim=1)


def library_proposals(dense, before, nms, after):
    rpn = RegionProposalNetwork(None, None, 0.7, 0.3, 256, 0.5, {"testing": before}, {"testing": after}, nms).eval()
    shapes = [tuple(size) for size in SIZES.tolist()]
    return rpn.filter_proposals(dense.boxes_xyxy, dense.logits[..., 0], shapes, [192, 48])


@pytest.mark.parametrize("before", [20, 1000])
@pytest.mark.parametrize("after", [25, 1000])
def test_proposals_are_torchvisions(before, after):
    dense = random_dense()
    found = propose(dense, SIZES, before=before, nms=0.4, after=after)
    boxes, scores = library_proposals(dense, before, 0.4, after)
    for image in range(2):
        assert torch.equal(found.boxes_xyxy[image], boxes[image])
        torch.testing.assert_close(found.scores[image], scores[image])
        assert bool((found.origins[image].image == image).all())
        assert bool((found.origins[image].ground_truth == -1).all())
        index = index_of(dense, found.origins[image])
        assert torch.equal(dense.logits[image, index, 0].sigmoid(), found.scores[image])
        limits = SIZES[image].flip(0).repeat(2)
        assert torch.equal(dense.boxes_xyxy[image, index].clamp(min=0).minimum(limits), found.boxes_xyxy[image])


def test_order_of_predictions_does_not_matter():
    dense = random_dense(1)
    order = torch.randperm(240, generator=torch.Generator().manual_seed(2))
    mixed = Dense(
        *(part[:, order] for part in (dense.logits, *[dense.boxes_xyxy] * 3)),
        *(p[order] for p in (dense.levels, dense.cells, dense.anchors)),
    )
    first, second = propose(dense, SIZES, before=30), propose(mixed, SIZES, before=30)
    for image in range(2):
        assert torch.equal(first.boxes_xyxy[image], second.boxes_xyxy[image])
        assert torch.equal(first.origins[image].cell, second.origins[image].cell)


def test_the_best_class_ranks_and_softmax_leaves_the_background_out():
    dense = random_dense(3, classes=4)
    single = Dense(dense.logits.amax(-1, keepdim=True), *[dense.boxes_xyxy] * 3, dense.levels, dense.cells, dense.anchors)
    for mine, theirs in zip(propose(dense, SIZES), propose(single, SIZES), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True) if isinstance(a, torch.Tensor))
    dense = random_dense(3, classes=4, softmax=True)
    found = propose(dense, SIZES, scores=dense.logits.softmax(-1)[..., :4].amax(-1))
    for image in range(2):
        assert torch.equal(propose(dense, SIZES).boxes_xyxy[image], found.boxes_xyxy[image])
        assert torch.equal(propose(dense, SIZES).scores[image], found.scores[image])


def by_hand(boxes, scores, levels=None):
    boxes = torch.tensor(boxes)[None]
    count = boxes.shape[1]
    levels = torch.zeros(count, dtype=torch.int64) if levels is None else torch.tensor(levels)
    cells = torch.stack([torch.arange(count), torch.zeros(count, dtype=torch.int64)], dim=1)
    return Dense(
        torch.tensor(scores).view(1, count, 1), boxes, boxes, boxes, levels, cells, torch.zeros(count, dtype=torch.int64)
    )


def rows_of(found, image=0):
    return found.origins[image].cell[:, 0].tolist()


def test_limits_by_default():
    """2500 squares side by side, and pairs that overlap by 0.75, 0.625 and 0.4375."""
    corners, size = torch.cartesian_prod(torch.arange(50.0), torch.arange(50.0)), torch.tensor([[64, 64]])
    many = by_hand(torch.cat([corners, corners + 1], dim=1).tolist(), torch.linspace(3, -9, 2500).tolist())
    pairs = [[20.0 * i, 0, 20 * i + 8, height] for i, least in enumerate((6, 5, 3.5)) for height in (8, least)]
    near = by_hand(pairs, [6.0, 5, 4, 3, 2, 1])
    for function, before, after, kept in (
        (propose, 2000, 1000, [0, 2, 3, 4, 5]),
        (propose_by_class, 1000, 100, [0, 2, 4, 5]),
    ):
        assert rows_of(function(many, size, after=5000)) == list(range(before))
        assert rows_of(function(many, size)) == list(range(after))
        assert rows_of(function(near, size)) == kept


def test_levels_apart_or_as_one():
    equal = [[0.0, 0.0, 8.0, 8.0]] * 4
    dense = by_hand(equal, [0.1, 0.4, 0.3, 0.2], [0, 0, 1, 1])
    size = torch.tensor([[20, 20]])
    assert rows_of(propose(dense, size)) == [1, 2]
    assert rows_of(propose(dense, size, across_levels=True)) == [1]
    apart = by_hand([[4.0 * i, 0, 4 * i + 3, 3] for i in range(4)], [0.1, 0.4, 0.3, 0.2], [0, 0, 0, 1])
    assert rows_of(propose(apart, size, before=1)) == [1, 3]
    assert rows_of(propose(apart, size, before=3, across_levels=True)) == [1, 2, 3]
    assert rows_of(propose(apart, size, after=2)) == [1, 2]


def test_sides_must_be_longer_than_asked_after_clipping():
    dense = by_hand([[0.0, 0, 10, 30], [0, 0, 10.5, 30], [-5, 40, 6, 80], [30, 30, 30, 40], [60, 60, 90, 90]], [5.0, 4, 3, 2, 1])
    size = torch.tensor([[50, 50]])
    assert rows_of(propose(dense, size, nms=1.0)) == [0, 1, 2]  # neither without area nor beyond the image
    assert rows_of(propose(dense, size, nms=1.0, min_side=10.0)) == [1]


def test_saturated_scores_keep_their_order():
    dense = by_hand([[10.0 * i, 0, 10 * i + 5, 5] for i in range(3)], [31.0, 33.0, 32.0])
    found = propose(dense, torch.tensor([[50, 50]]))
    assert rows_of(found) == [1, 2, 0]
    assert found.scores[0].tolist() == [1.0, 1.0, 1.0]


def test_padding_nothing_left_and_boxes_that_are_no_numbers():
    boxes, size = [[0.0, 0, 5, 5], [10, 0, 15, 5], [20, 0, 25, 5]], torch.tensor([[50, 50]])
    dense = by_hand(boxes, [3.0, float("nan"), 1.0])
    assert rows_of(propose(dense, size)) == [0, 2]
    padded = replace(dense, padding=torch.tensor([[True, False, True]]))
    numberless = by_hand([[float("nan")] * 4] * 3, [3.0, 2, 1])
    nowhere = torch.zeros(0, dtype=torch.int64)
    empty = Dense(torch.zeros(1, 0, 1), *[torch.zeros(1, 0, 4)] * 3, nowhere, nowhere.view(0, 2), nowhere)
    for found in (propose(padded, size), propose_by_class(padded, size), propose(numberless, size), propose(empty, size)):
        assert found.boxes_xyxy[0].shape == (0, 4)
        assert found.scores[0].shape == (0,)
        assert len(found.origins[0].level) == 0


def test_proposals_have_no_graph():
    dense = random_dense()
    dense = replace(dense, logits=dense.logits.requires_grad_(), boxes_xyxy=dense.boxes_xyxy.clone().requires_grad_())
    for found in (propose(dense, SIZES), propose_by_class(dense, SIZES)):
        assert not any(tensor.requires_grad for tensor in [*found.boxes_xyxy, *found.scores])


@pytest.mark.parametrize(("before", "after", "min_score"), [(50, 1000, 0.0), (1000, 30, 0.5)])
def test_proposals_by_class_are_retinanets_detections(before, after, min_score):
    dense = random_dense(4, classes=3)
    found = propose_by_class(dense, SIZES, before=before, nms=0.3, after=after, min_score=min_score)
    library = SimpleNamespace(
        score_thresh=min_score,
        topk_candidates=before,
        nms_thresh=0.3,
        detections_per_img=10**6,  # its boxes without area count, ours do not: cut after leaving them out
        box_coder=SimpleNamespace(decode_single=lambda deltas, anchors: anchors),
    )
    outputs = {
        "cls_logits": list(dense.logits.split([192, 48], dim=1)),
        "bbox_regression": list(dense.deltas.split([192, 48], dim=1)),
    }
    anchors = [list(image.split([192, 48])) for image in dense.boxes_xyxy]
    expected = RetinaNet.postprocess_detections(library, outputs, anchors, [tuple(size) for size in SIZES.tolist()])
    for image, detections in enumerate(expected):
        sized = (detections["boxes"][:, 2:] > detections["boxes"][:, :2]).all(dim=1)
        assert torch.equal(found.boxes_xyxy[image], detections["boxes"][sized][:after])
        assert torch.equal(found.scores[image], detections["scores"][sized][:after])
        index = index_of(dense, found.origins[image])
        assert bool((dense.logits[image, index].sigmoid() == found.scores[image][:, None]).any(dim=1).all())


# ----------------------------------------------------------------------------------------------------------- sampling


def target(boxes, crowd=()):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    flags = torch.tensor([index in crowd for index in range(len(boxes))], dtype=torch.bool)
    return Target(boxes, torch.zeros(len(boxes), dtype=torch.int64), flags)


# IoU with (0, 0, 10, 10): 1, 0.5 exactly, 0.45, 0; and 0.8 with (50, 0, 60, 10)
GIVEN = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4.5], [20, 20, 30, 30], [50, 0, 60, 8]])
TRUTH = target([[0, 0, 10, 10], [0, 0, 90, 90], [50, 0, 60, 10], [70, 70, 70, 80]], crowd=(1,))


def given(boxes, image=0):
    return origin_of(*((image, 0, row, 0, 0, -1) for row in range(len(boxes))))


def test_all_regions_where_fewer_than_asked():
    sampled = sample_regions([GIVEN], [given(GIVEN)], [TRUTH], positive_fraction=1.0)
    boxes, origin, matched = (part[0] for part in sampled)
    # positives in order, then the inserted two (no crowd box, none without area), then negatives; whole indices
    assert matched.tolist() == [0, 0, 2, 0, 2, -1, -1]
    assert origin.cell[:, 0].tolist() == [0, 1, 4, -1, -1, 2, 3]
    assert origin.level.tolist() == [0, 0, 0, -1, -1, 0, 0]
    assert origin.ground_truth.tolist() == [-1, -1, -1, 0, 2, -1, -1]
    assert torch.equal(boxes, torch.cat([GIVEN[[0, 1, 4]], TRUTH.boxes_xyxy[[0, 2]], GIVEN[[2, 3]]]))
    plain = sample_regions([GIVEN], [given(GIVEN)], [TRUTH], positive_fraction=1.0, insert_ground_truth=False, iou=0.45)
    assert plain.matched[0].tolist() == [0, 0, 0, 2, -1]
    assert plain.origins[0].cell[:, 0].tolist() == [0, 1, 2, 4, 3]


def crowded(positives, negatives):
    boxes = torch.tensor([[0.0, 0, 10, 10]] * positives + [[40.0, 40, 50, 50]] * negatives).reshape(-1, 4)
    return boxes + 0.001 * torch.arange(len(boxes))[:, None]


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [(100, 100, (8, 24)), (3, 100, (3, 29)), (100, 10, (8, 10)), (0, 100, (0, 32)), (100, 0, (8, 0)), (0, 0, (0, 0))],
)
def test_shares(positives, negatives, expected):
    boxes = crowded(positives, negatives)
    truth = target([[0, 0, 10, 10]])
    sampled = sample_regions([boxes], [given(boxes)], [truth], count=32, insert_ground_truth=False)
    matched, rows = sampled.matched[0], sampled.origins[0].cell[:, 0]
    assert (int((matched >= 0).sum()), int((matched < 0).sum())) == expected
    assert len(rows.unique()) == sum(expected)
    assert all(part.tolist() == sorted(part.tolist()) for part in rows.split(expected))
    assert [part.tolist() for part in rows.split(expected)] == [part.sort().values.tolist() for part in rows.split(expected)]
    assert torch.equal(sampled.boxes_xyxy[0], boxes[rows])
    assert bool((box_iou(sampled.boxes_xyxy[0], truth.boxes_xyxy)[:, 0].ge(0.5) == (matched >= 0)).all())


def test_images_without_ground_truth_or_without_boxes():
    boxes = crowded(2, 3)
    nothing = torch.zeros(0, 4)
    sampled = sample_regions(
        [boxes, nothing, nothing, boxes],
        [given(boxes), given(nothing), given(nothing), given(boxes, 3)],
        [target([]), target([]), target([[0, 0, 0.5, 5]]), target([[0, 0, 90, 90]], crowd=(0,))],  # also thin boxes count
        count=4,
    )
    assert [matched.tolist() for matched in sampled.matched] == [[-1] * 4, [], [0], [-1] * 4]
    assert sampled.origins[2].image.tolist() == [2]
    assert sampled.origins[2].ground_truth.tolist() == [0]
    assert sampled.origins[3].image.tolist() == [3] * 4
    assert [len(boxes) for boxes in sampled.boxes_xyxy] == [4, 0, 1, 4]


def test_the_generator_decides():
    boxes, truth = crowded(60, 200), target([[0, 0, 10, 10]])

    def rows(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample_regions([boxes], [given(boxes)], [truth], count=40, generator=generator).origins[0].cell[:, 0].tolist()

    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    assert rows(1) == rows(1) != rows(2)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(5)
    first = sample_regions([boxes], [given(boxes)], [truth], count=40).origins[0].cell
    torch.manual_seed(5)
    assert torch.equal(first, sample_regions([boxes], [given(boxes)], [truth], count=40).origins[0].cell)


def test_every_region_is_as_likely_as_any_other():
    boxes, truth, generator = crowded(4, 6), target([[0, 0, 10, 10]]), torch.Generator().manual_seed(0)
    drawn = torch.zeros(10)
    for _ in range(600):
        sampled = sample_regions(
            [boxes], [given(boxes)], [truth], count=5, positive_fraction=0.4, insert_ground_truth=False, generator=generator
        )
        drawn[sampled.origins[0].cell[:, 0]] += 1
    torch.testing.assert_close(drawn / 600, torch.full((10,), 0.5), rtol=0, atol=0.08)  # 4 standard deviations


# ------------------------------------------------------------------------------------------------------------- coding


def some_boxes(seed, count=30, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    corners = 80 * torch.rand(count, 2, generator=generator, dtype=dtype)
    return torch.cat([corners, corners + 1 + 60 * torch.rand(count, 2, generator=generator, dtype=dtype)], dim=1)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (2.0, 3.0, 4.0, 5.0)])
def test_deltas_are_torchvisions_and_lead_back(weights):
    boxes, references = some_boxes(0), some_boxes(1)
    coder = BoxCoder(weights)
    deltas = encode_boxes(boxes, references, weights)
    torch.testing.assert_close(deltas, coder.encode_single(boxes, references), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(decode_boxes(deltas, references, weights), boxes, rtol=1e-12, atol=1e-12)
    other = 3 * torch.randn(30, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = coder.decode_single(other, references)
    torch.testing.assert_close(decode_boxes(other, references, weights), expected, rtol=1e-12, atol=1e-10)


def test_boxes_neither_grow_nor_shrink_without_bound():
    reference = torch.tensor([0.0, 0.0, 16.0, 16.0], dtype=torch.float64)
    grown = decode_boxes(torch.tensor([0.0, 0, 99, -99], dtype=torch.float64), reference)
    assert grown.tolist() == pytest.approx([-492, 8, 508, 8], abs=1e-9)
    bounded = decode_boxes(torch.tensor([0.0, 0, 99, -99], dtype=torch.float64), reference, bound_shrinking=True)
    assert bounded.tolist() == pytest.approx([-492, 8 - 0.128, 508, 8 + 0.128])


def test_deltas_of_each_class_share_their_region():
    regions, deltas = some_boxes(3, 5), torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    decoded = decode_boxes(deltas, regions[:, None], (10.0, 10.0, 5.0, 5.0))
    for label in range(7):
        assert torch.equal(decoded[:, label], decode_boxes(deltas[:, label], regions, (10.0, 10.0, 5.0, 5.0)))
    torch.testing.assert_close(encode_boxes(decoded, regions[:, None], (10.0, 10.0, 5.0, 5.0)), deltas, rtol=1e-9, atol=1e-9)


def test_gradients_of_codes_equal_finite_differences():
    boxes, references = some_boxes(5, 4).requires_grad_(), some_boxes(6, 4)
    assert torch.autograd.gradcheck(lambda b: encode_boxes(b, references, (10.0, 10.0, 5.0, 5.0)), boxes)
    deltas = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: decode_boxes(d, references, (10.0, 10.0, 5.0, 5.0)), deltas)


def test_collapsed_boxes_have_finite_deltas_and_none_have_none():
    point = torch.tensor([[5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 10.0, 10.0], [9.0, 9.0, 2.0, 2.0]], requires_grad=True)
    deltas = encode_boxes(point, point.detach().flip(0))
    assert bool(deltas.isfinite().all())
    deltas.sum().backward()
    assert bool(point.grad.isfinite().all())
    empty = torch.zeros(0, 4, requires_grad=True)
    (encode_boxes(empty, empty).sum() + decode_boxes(empty, empty).sum()).backward()
    assert empty.grad.shape == (0, 4)
