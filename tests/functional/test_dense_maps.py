from dataclasses import replace

import pytest
import torch

from detdistill.errors import DetdistillError
from detdistill.functional.dense_maps import Partners, at_cells, find_partners, from_map, only_parts, prediction_grid, to_map
from detdistill.structures import Dense


def places(sizes, anchors):
    """[P, 4] level, row, column, anchor of full maps, level by level, row by row."""
    rows = [
        (level, row, column, anchor)
        for level, (height, width) in enumerate(sizes)
        for row in range(height)
        for column in range(width)
        for anchor in range(anchors[level])
    ]
    return torch.tensor(rows)


def dense(place, images=2, classes=3, padding=None, seed=0):
    """Predictions at the given places; numbers of image b and class k are 1000 b + 100 k + the place as digits."""
    level, row, column, anchor = place.double().unbind(1)
    code = level + row / 10 + column / 100 + anchor / 1000
    image, number = torch.arange(images).double()[:, None, None], torch.arange(classes).double()
    logits = 1000 * image + 100 * number + code[None, :, None]
    boxes = code[None, :, None].expand(images, -1, 4)
    return Dense(logits, boxes, boxes, boxes, place[:, 0], place[:, 1:3], place[:, 3], padding=padding)


def shuffled(place, seed=0):
    return place[torch.randperm(len(place), generator=torch.Generator().manual_seed(seed))]


SIZES, ANCHORS = [(3, 4), (2, 2), (1, 1)], [2, 3, 1]


# ----------------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("order", ["in order", "shuffled"])
def test_each_number_is_at_its_cell_anchor_and_class(order):
    place = places(SIZES, ANCHORS)
    prediction = dense(place if order == "in order" else shuffled(place))
    for level, ((height, width), anchors) in enumerate(zip(SIZES, ANCHORS, strict=True)):
        found = to_map(prediction.logits, prediction, level)
        assert found.shape == (2, anchors * 3, height, width)
        for image, anchor, number, row, column in torch.cartesian_prod(
            *(torch.arange(n) for n in (2, anchors, 3, height, width))
        ).tolist():
            expected = 1000 * image + 100 * number + level + row / 10 + column / 100 + anchor / 1000
            assert float(found[image, anchor * 3 + number, row, column]) == pytest.approx(expected, abs=1e-12)


def test_one_number_for_each_prediction_is_a_map_of_anchors():
    prediction = dense(shuffled(places(SIZES, ANCHORS)))
    scores = prediction.logits[..., 1]
    for level in range(3):
        assert torch.equal(to_map(scores, prediction, level), to_map(scores[..., None], prediction, level))
    best = to_map(scores, prediction, 1).amax(dim=1)
    torch.testing.assert_close(best[0], torch.tensor([[101.002, 101.012], [101.102, 101.112]], dtype=torch.float64))


def test_boxes_and_flags_too():
    prediction = dense(shuffled(places(SIZES, ANCHORS)))
    assert torch.equal(
        to_map(prediction.boxes_xyxy, prediction, 0)[:, 5], to_map(prediction.boxes_xyxy[..., 1], prediction, 0)[:, 1]
    )
    top = prediction.cells[:, 0] == 0
    assert to_map(top.expand(2, -1), prediction, 0)[1, 1].tolist() == [[True] * 4, [False] * 4, [False] * 4]


def test_back_and_forth_is_the_identity_and_so_is_its_gradient():
    prediction = dense(shuffled(places(SIZES, ANCHORS), seed=3))
    for level in range(3):
        here = prediction.levels == level
        maps = to_map(prediction.logits, prediction, level)
        assert torch.equal(from_map(maps, prediction, level), prediction.logits[:, here])
        assert torch.equal(
            from_map(to_map(prediction.logits[..., 0], prediction, level), prediction, level)[..., 0],
            prediction.logits[:, here, 0],
        )
    logits = prediction.logits.clone().requires_grad_()
    weights = torch.randn(2, 9, 2, 2, dtype=torch.float64)
    (to_map(logits, prediction, 1) * weights).sum().backward()
    assert torch.equal(logits.grad[:, prediction.levels == 1], from_map(weights, prediction, 1))
    assert not logits.grad[:, prediction.levels != 1].any()


def test_the_value_of_a_cell_is_that_of_all_its_anchors():
    place = shuffled(places(SIZES, ANCHORS))
    prediction = dense(place)
    mask = torch.arange(2 * 2 * 12.0).view(2, 2, 3, 4)
    found = at_cells(mask, prediction, 0)
    mine = place[place[:, 0] == 0]
    assert found.shape == (2, 24, 2)
    for index, (_, row, column, _) in enumerate(mine.tolist()):
        assert torch.equal(found[:, index], mask[:, :, row, column])
    assert at_cells(mask, prediction, 9).shape == (2, 0, 2)


def test_grid_counts_along_all_predictions():
    place = shuffled(places(SIZES, ANCHORS), seed=1)
    grid = prediction_grid(dense(place), 1)
    for anchor, row, column in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(2)).tolist():
        assert place[grid[anchor, row, column]].tolist() == [1, row, column, anchor]


def test_a_map_with_padding_is_full():
    """Stacked predictions of images of different sizes have a prediction in every cell of the largest maps."""
    small, large = dense(places([(2, 3)], [2]), images=1), dense(places([(3, 2)], [2]), images=1)
    both = Dense.stack([small, large])
    found = to_map(both.logits[..., 0], both, 0)
    padding = to_map(both.padding, both, 0)
    assert padding[:, 0].tolist() == [[[False] * 3, [False] * 3, [True] * 3], [[False, False, True]] * 3]
    torch.testing.assert_close(found[0, 1, :2], to_map(small.logits[..., 0], small, 0)[0, 1])
    torch.testing.assert_close(found[1, 0, :, :2], to_map(large.logits[..., 0], large, 0)[0, 0])


def test_what_is_no_map_is_refused():
    place = places(SIZES, ANCHORS)
    with pytest.raises(DetdistillError, match=r"no predictions on level 3; levels: \[0, 1, 2\]"):
        to_map(dense(place).logits, dense(place), 3)
    with pytest.raises(DetdistillError, match=r"level 0 has 23 predictions, not one for each of 2 anchors on 3 x 4 cells"):
        to_map(dense(place[1:]).logits, dense(place[1:]), 0)
    twice = torch.cat([place[1:], place[1:2]])
    with pytest.raises(DetdistillError, match="level 0 has 24 predictions"):
        prediction_grid(dense(twice), 0)
    for wrong in (torch.zeros(2, 5, 3, 4), torch.zeros(2, 6, 3, 5)):
        with pytest.raises(DetdistillError, match="level 0 has 2 anchors on 3 x 4 cells; a map of"):
            from_map(wrong, dense(place), 0)


# ------------------------------------------------------------------------------------------------------------- partners


def test_partners_are_found_whatever_the_order():
    place = places(SIZES, ANCHORS)
    student, teacher = dense(shuffled(place, 1)), dense(shuffled(place, 2))
    partners = find_partners(student, teacher)
    assert bool(partners.mask.all())
    assert torch.equal(partners.take(teacher.logits), student.logits)
    assert torch.equal(partners.take(teacher.boxes_xyxy), student.boxes_xyxy)
    assert torch.equal(partners.take(teacher.logits[..., 2]), student.logits[..., 2])


@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_partners_on_another_canvas(wider):
    sizes = {"small": [(3, 4), (2, 2)], "large": [(4, 6), (2, 3)]}
    mine, theirs = ("large", "small") if wider == "student" else ("small", "large")
    student, teacher = dense(shuffled(places(sizes[mine], [2, 2]), 3)), dense(shuffled(places(sizes[theirs], [2, 2]), 4))
    partners = find_partners(student, teacher)
    limits = torch.tensor(sizes["small"])[student.levels]
    expected = (student.cells < limits).all(dim=1)
    assert torch.equal(partners.mask, expected.expand(2, -1))
    assert bool(expected.all()) == (wider == "teacher")
    taken = partners.take(teacher.logits)
    assert torch.equal(taken[:, expected], student.logits[:, expected])
    assert not taken[:, ~expected].any()


def test_anchors_that_the_teacher_does_not_have_are_without_a_partner():
    student, teacher = dense(places([(2, 2)], [3])), dense(places([(2, 2)], [2]))
    assert find_partners(student, teacher).mask[0].tolist() == [True, True, False] * 4
    assert bool(find_partners(teacher, student).mask.all())


def test_levels_are_paired_as_told():
    """A student of strides 8 to 32 and a teacher of 4 to 16: the student's level 0 is the teacher's 1."""
    student, teacher = dense(places([(2, 3), (1, 2), (1, 1)], [1] * 3)), dense(places([(4, 6), (2, 3), (1, 2)], [1] * 3))
    partners = find_partners(student, teacher, levels=[(0, 1), (1, 2)])
    assert partners.mask[0].tolist() == [True] * 8 + [False]
    torch.testing.assert_close(partners.take(teacher.logits)[:, :8], student.logits[:, :8] + 1)  # the level is one more
    # By equal numbers each has one, too: all of the teacher's maps are larger.
    assert bool(find_partners(student, teacher).mask.all())
    assert not find_partners(student, teacher, levels=[]).mask.any()


def test_padding_of_either_side_has_no_partner():
    place = places([(2, 2)], [1])
    mine = torch.tensor([[True, False, False, False], [False] * 4])
    theirs = torch.tensor([[False] * 4, [False, False, False, True]])
    partners = find_partners(dense(place, padding=mine), dense(place.flip(0), padding=theirs.flip(1)))
    assert partners.mask.tolist() == [[False, True, True, True], [True, True, True, False]]
    taken = partners.take(dense(place.flip(0)).logits)
    assert torch.equal(taken[partners.mask], dense(place).logits[partners.mask])
    assert not taken[~partners.mask].any()


def test_teachers_predictions_stacked_from_single_images():
    """As a cache gives them: each image on a canvas of its own, the student's batch on the largest of both sides."""
    parts = [dense(places([size], [2]), images=1) for size in ((2, 3), (3, 2))]
    student, teacher = dense(places([(4, 4)], [2])), Dense.stack(parts)
    partners = find_partners(student, teacher)
    for image, (height, width) in enumerate(((2, 3), (3, 2))):
        inside = (student.cells < torch.tensor([height, width])).all(dim=1)
        assert torch.equal(partners.mask[image], inside)
        taken = partners.take(teacher.logits)[image]
        assert torch.equal(taken[inside], student.logits[0, inside])  # each was image 0 of its own batch
        assert not taken[~inside].any()


def test_gradient_goes_back_to_the_partner_only_and_no_number_leaks():
    student, teacher = dense(places([(1, 3)], [1])), dense(places([(1, 2)], [1]).flip(0))
    values = torch.tensor([[torch.nan], [3.0]]).expand(2, 2, 1).clone().requires_grad_()
    partners = find_partners(student, teacher)
    taken = partners.take(values)
    assert taken[0, [0, 2], 0].tolist() == [3.0, 0.0]
    (taken * torch.tensor([[1.0], [10.0], [100.0]])).sum().backward()
    assert values.grad[0].flatten().tolist() == [10.0, 1.0]
    empty = Partners(torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool))
    assert empty.take(torch.full((2, 1, 4), torch.nan)).tolist() == [[[0.0] * 4] * 3] * 2


def test_only_parts_keeps_logits_boxes_and_what_is_named():
    whole = replace(dense(places(SIZES, ANCHORS)), quality=torch.ones(2, 1), own=object())
    small = only_parts(whole)
    assert small.logits is whole.logits
    assert small.boxes_xyxy is whole.boxes_xyxy
    assert small.deltas.shape == small.priors_xyxy.shape == (*whole.logits.shape[:2], 0)
    assert (small.quality, small.own) == (None, None)
    more = only_parts(whole, "deltas", "quality", "priors_xyxy")
    assert (more.deltas, more.quality, more.priors_xyxy) == (whole.deltas, whole.quality, whole.priors_xyxy)


def test_only_parts_of_images_with_unequal_maps_can_be_stacked():
    pieces = [only_parts(dense(places([size], [1]), images=1)) for size in ((2, 3), (3, 2))]
    assert Dense.stack(pieces).deltas.shape == (2, 9, 0)
