import pytest
import torch

from detdistill.functional.cells import BoxCells, level_of_box
from detdistill.functional.masks import (
    best_scores,
    foreground_mask,
    gaussian_mask,
    label_map,
    maximum_over_boxes,
    overlap_mask,
    score_mask,
    union_mask,
)
from detdistill.structures import Dense
from tests.golden import Golden, assert_golden


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


# -------------------------------------------------------------------------------------------------------- bells, planes


def images(golden):
    found = []
    while f"in_boxes_{len(found)}" in golden:
        found.append(golden[f"in_boxes_{len(found)}"].reshape(-1, 4))
    return found


def test_bell_by_hand():
    """A box of 4 x 2 cells from column 1, row 1: middles at 2 and 1 cells from its start, half sides of 2 and 1 cells."""
    mask = gaussian_mask([boxes((8, 8, 40, 24))], 8, (4, 6))[0]
    across = torch.tensor([1.0, 0.25, 0.0, 0.25], dtype=torch.float64)  # squared distances from the middle, in half sides
    down = torch.tensor([1.0, 0.0], dtype=torch.float64)
    expected = torch.zeros(4, 6, dtype=torch.float64)
    expected[1:3, 1:5] = torch.exp(-(down[:, None] + across) / 2)
    torch.testing.assert_close(mask, expected, rtol=1e-12, atol=0)
    wide = gaussian_mask([boxes((8, 8, 40, 24))], 8, (4, 6), variance=4.0)[0]
    torch.testing.assert_close(wide[1:3, 1:5], expected[1:3, 1:5].sqrt(), rtol=1e-12, atol=0)


def test_a_box_smaller_than_a_cell_has_one_in_one_cell():
    mask = gaussian_mask([boxes((9, 9, 12, 14), (17, 0, 22, 40))], 8, (4, 6))[0]
    assert torch.nonzero(mask).tolist() == [[0, 2], [1, 1]]
    assert mask.sum() == 2
    one_by_one = gaussian_mask([boxes((8, 8, 16, 16))], 8, (4, 6))[0]  # one cell, but the box fills it
    assert torch.nonzero(one_by_one).tolist() == [[1, 1]]
    assert float(one_by_one[1, 1]) == pytest.approx(float(torch.tensor(-1.0).exp()))


def test_bells_of_a_crowd_are_the_largest_of_each(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(40, 2, 2, generator=generator, dtype=torch.float64).sort(dim=1).values * 64
    some = corners.flatten(1)
    each = torch.stack([gaussian_mask([box[None]], 8, (8, 8))[0] for box in some])
    together = gaussian_mask([some, boxes(), some[:7]], 8, (8, 8))
    assert torch.equal(together[0], each.amax(dim=0))
    assert torch.equal(together[2], each[:7].amax(dim=0))
    assert not together[1].any()
    assert float(together.max()) <= 1
    monkeypatch.setattr("detdistill.functional.masks.CHUNK", 64 * 3)  # three boxes at a time
    assert torch.equal(gaussian_mask([some], 8, (8, 8))[0], together[0])


def test_bells_at_the_edges_and_on_a_map_of_one_cell():
    mask = gaussian_mask([boxes((48, 32, 48, 32), (100, 0, 200, 40), (0, 0, 0, 0))], 8, (4, 6))[0]
    assert torch.nonzero(mask).tolist() == [[0, 0], [3, 5]]
    assert gaussian_mask([boxes((3, 3, 20, 30))], 64, (1, 1)).tolist() == [[[1.0]]]
    assert gaussian_mask([torch.tensor([[8.0, 8.0, 40.0, 24.0]]).half()], 8, (4, 6)).dtype == torch.float32


def test_bells_on_their_level_equal_the_released_code_of_defeat():
    golden = Golden("tadf")
    for level, (expected, stride) in enumerate(zip(golden.levels("out_mask"), golden["in_strides"].tolist(), strict=True)):
        mine = [some[level_of_box(some, len(golden["in_strides"])) == level] for some in images(golden)]
        assert_golden(gaussian_mask(mine, stride, tuple(expected.shape[1:])), expected)


def test_planes_by_hand():
    """Class 0: two boxes that overlap; class 2: one of 4 x 2 pixels with its middle between pixels; class 1: none."""
    some = boxes((0, 0, 4, 4), (2, 2, 6, 6), (1, 1, 4, 3))
    planes = label_map([some, boxes()], [torch.tensor([0, 0, 2]), torch.tensor([], dtype=torch.int64)], (8, 8), 3)
    assert planes.shape == (2, 3, 8, 8)
    assert not planes[1].any()
    assert not planes[0, 1].any()
    row = [0.5, 0.75, 1.0, 0.75, 0.5]
    assert planes[0, 0, 2].tolist() == [*row[:4], 0.5, 0.5, 0.5, 0.0]  # the second box begins in row 2 with 0.5
    assert planes[0, 0, 3, 3] == 0.75  # both boxes have 0.75 there
    assert planes[0, 0, 4].tolist() == [0.5, 0.5, 0.5, 0.75, 1.0, 0.75, 0.5, 0.0]
    assert planes[0, 0, 7].tolist() == [0.0] * 8
    expected = torch.tensor([0, 0.5, 5 / 6, 5 / 6, 0.5, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(planes[0, 2, 2], expected)


def test_planes_take_the_largest_and_intensities_belong_to_boxes():
    generator = torch.Generator().manual_seed(1)
    corners = torch.randint(0, 20, (12, 2, 2), generator=generator).sort(dim=1).values.double()
    some, labels = corners.flatten(1) + torch.tensor([0, 0, 1.5, 2.5]), torch.randint(0, 4, (12,), generator=generator)
    factors = torch.rand(12, generator=generator, dtype=torch.float64)
    each = torch.stack([label_map([box[None]], [label[None]], (24, 24), 4)[0] for box, label in zip(some, labels, strict=True)])
    assert torch.equal(label_map([some], [labels], (24, 24), 4)[0], each.amax(dim=0))
    drawn = label_map([some], [labels], (24, 24), 4, intensity=[factors])[0]
    torch.testing.assert_close(drawn, (each * factors[:, None, None, None]).amax(dim=0), rtol=1e-15, atol=0)
    values = label_map([some], [labels], (24, 24), 4)
    assert bool(((values == 0) | ((values >= 0.5) & (values <= 1))).all())


def test_boxes_below_a_pixel_are_not_drawn():
    some = boxes((3, 3, 3, 9), (3, 3, 9, 3.5), (5, 5, 4, 9))
    assert not label_map([some], [torch.tensor([0, 0, 0])], (12, 12), 1).any()
    seen = boxes((1, 1, 9, 9))  # of the same class as those that are too small
    both = label_map([torch.cat([some, seen])], [torch.tensor([0, 0, 0, 0])], (12, 12), 1)
    assert torch.equal(both, label_map([seen], [torch.tensor([0])], (12, 12), 1))
    assert label_map([torch.tensor([[2.0, 2.0, 3.0, 3.0]]).half()], [torch.tensor([0])], (4, 4), 1).dtype == torch.float32


def test_planes_equal_the_released_code_of_labelenc():
    golden = Golden("labelenc")
    labels = [golden[f"in_labels_from1_{image}"].reshape(-1) - 1 for image in range(len(images(golden)))]
    expected = golden["out_box_map"]
    found = label_map(images(golden), labels, tuple(expected.shape[2:]), expected.shape[1])
    assert torch.equal(found > 0, expected > 0)
    assert_golden(found, expected)


# ---------------------------------------------------------------------------------------------------- from predictions


def dense_of_maps(maps, anchors, softmax=False, boxes=None):
    """Predictions whose maps [B, A * K, H, W] are given, in the order of the released codes: level, row, column, anchor."""
    logits, levels, cells, which = [], [], [], []
    for level, one in enumerate(maps):
        count, _, height, width = one.shape
        logits.append(
            one.view(count, anchors, -1, height, width).permute(0, 3, 4, 1, 2).reshape(count, height * width * anchors, -1)
        )
        grid = torch.cartesian_prod(torch.arange(height), torch.arange(width), torch.arange(anchors)).view(-1, 3)
        levels.append(torch.full((len(grid),), level))
        cells.append(grid[:, :2])
        which.append(grid[:, 2])
    row = torch.cat(logits, dim=1)
    corners = torch.zeros(*row.shape[:2], 4, dtype=row.dtype) if boxes is None else boxes
    return Dense(row, corners, corners, corners, torch.cat(levels), torch.cat(cells), torch.cat(which), softmax=softmax)


def test_score_mask_equals_the_released_code_of_frs():
    golden = Golden("frs")
    teacher = dense_of_maps(golden.levels("in_teacher_logits"), golden.meta["hyperparameters"]["anchors"])
    for level, expected in enumerate(golden.levels("out_mask")):
        assert_golden(score_mask(teacher, level), expected)


def test_score_mask_by_hand():
    logits = torch.tensor(
        [[[[0.0, -9.0]], [[-9.0, -9.0]], [[-1.0, 3.0]], [[2.0, -9.0]]]], requires_grad=True
    )  # 2 anchors, 2 classes
    mask = score_mask(dense_of_maps([logits], anchors=2), 0)
    torch.testing.assert_close(mask, torch.tensor([[[2.0, 3.0]]]).sigmoid())
    assert not mask.requires_grad
    background = dense_of_maps([torch.tensor([0.1, 0.4, 0.5, 0.25, 0.25, 0.5]).log().view(1, 6, 1, 1)], anchors=2, softmax=True)
    torch.testing.assert_close(score_mask(background, 0), torch.tensor([[[0.4]]]))
    assert score_mask(dense_of_maps([logits.detach().half()], anchors=2), 0).dtype == torch.float32


def test_best_scores_ignore_a_class_that_is_never_seen():
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    never = torch.cat([logits, torch.full((2, 5, 1), -50.0, dtype=torch.float64)], dim=-1)
    assert torch.equal(best_scores(logits), best_scores(never))
    assert torch.equal(best_scores(logits), logits.sigmoid().amax(dim=-1))


def test_padded_predictions_score_nothing():
    parts = [dense_of_maps([torch.ones(1, 2, 1, 3)], anchors=1), dense_of_maps([torch.ones(1, 2, 2, 1)], anchors=1)]
    mask = score_mask(Dense.stack(parts), 0)
    shown = torch.tensor([[[True] * 3, [False] * 3], [[True, False, False]] * 2])
    assert torch.equal(mask > 0.5, shown)
    assert float(mask[~shown].max()) < 1e-8


def test_overlap_mask_is_the_best_of_anchors_and_objects(monkeypatch):
    """Two anchors on 1 x 2 cells; the second image has no object."""
    found = boxes((0, 0, 10, 10), (0, 0, 10, 5), (20, 0, 30, 10), (50, 50, 60, 60)).expand(2, -1, -1).clone().requires_grad_()
    prediction = dense_of_maps([torch.zeros(2, 2, 1, 2, dtype=torch.float64)], anchors=2, boxes=found)
    objects = [boxes((0, 0, 10, 6), (25, 0, 35, 10), (200, 0, 210, 10)), boxes()]
    mask = overlap_mask(prediction, 0, objects)
    torch.testing.assert_close(mask, torch.tensor([[[5 / 6, 50 / 150]], [[0.0, 0.0]]], dtype=torch.float64))
    assert not mask.requires_grad
    monkeypatch.setattr("detdistill.functional.masks.CHUNK", 4)  # one object at a time
    assert torch.equal(overlap_mask(prediction, 0, objects), mask)


def test_maximum_over_no_boxes_is_zero():
    assert maximum_over_boxes(torch.zeros(0, 2), torch.zeros(0, 3), torch.mul).tolist() == [[0.0] * 3] * 2
