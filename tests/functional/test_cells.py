import math

import pytest
import torch

from detdistill.functional.cells import (
    BoxCells,
    anchors_near_boxes,
    center_cells,
    floor_ceil_cells,
    floor_ceil_span,
    index_cells,
    level_of_box,
    points_inside,
    truncated_cells,
    truncated_span,
)
from tests.golden import Golden

STRIDE, MAP, IMAGE = 8, (6, 9), (48, 72)
RULES = {
    "floor_ceil": lambda boxes: floor_ceil_cells(boxes, IMAGE, MAP),
    "truncated": lambda boxes: truncated_cells(boxes, STRIDE, MAP),
    "center": lambda boxes: center_cells(boxes, STRIDE, MAP),
    "index": lambda boxes: index_cells(boxes, IMAGE, MAP),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def boxes(*rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype).reshape(-1, 4)


def many_boxes(count, seed=0, height=48, width=72):
    """Boxes inside the image, some of less than a cell, some with sides on the grid."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.tensor([width, height, width, height], dtype=torch.float64)
    corners = torch.rand(count, 4, generator=generator, dtype=torch.float64) * limits
    corners[::3] = (corners[::3] / 4).round() * 4
    corners[::4, 2:] = corners[::4, :2] + 3
    some = torch.cat([torch.minimum(corners[:, :2], corners[:, 2:]), torch.maximum(corners[:, :2], corners[:, 2:])], dim=1)
    return torch.minimum(some, limits)


def listed(cells):
    """The cells of each box as (row, column)."""
    return [[tuple(cell) for cell in torch.nonzero(region).tolist()] for region in cells.regions()]


def images(golden):
    found = []
    while f"in_boxes_{len(found)}" in golden:
        found.append(golden[f"in_boxes_{len(found)}"].reshape(-1, 4))
    return found


# ----------------------------------------------------------------------------------------------- one box, four answers


def test_the_rules_differ_on_one_box():
    """Columns of stride 8 (centres 4, 12, 20, 28 ...) under a box from 10 to 28, rows under one from 8 to 16."""
    box = boxes((10, 8, 28, 16))
    rows = {name: torch.nonzero(rule(box).rows[0]).flatten().tolist() for name, rule in RULES.items()}
    columns = {name: torch.nonzero(rule(box).columns[0]).flatten().tolist() for name, rule in RULES.items()}
    assert columns == {"floor_ceil": [1, 2, 3, 4], "truncated": [1, 2], "center": [1, 2], "index": [2, 3]}
    assert rows == {"floor_ceil": [1, 2], "truncated": [1], "center": [1], "index": [1, 2]}


def test_the_rules_differ_on_a_box_smaller_than_a_cell():
    box = boxes((9, 9, 12, 12))
    assert {name: listed(rule(box))[0] for name, rule in RULES.items()} == {
        "floor_ceil": [(1, 1), (1, 2), (2, 1), (2, 2)],
        "truncated": [(1, 1)],
        "center": [],  # the centre (12, 12) lies on a side
        "index": [],
    }


@each_rule
def test_no_boxes(rule):
    cells = rule(boxes())
    assert cells.regions().shape == (0, *MAP)
    assert torch.equal(cells.union(), torch.zeros(MAP, dtype=torch.bool))
    assert cells.counts().tolist() == []


@each_rule
def test_one_box_over_everything(rule):
    assert bool(rule(boxes((0, 0, IMAGE[1], IMAGE[0]))).union().all())


@each_rule
def test_union_and_counts_of_a_crowd_are_those_of_its_regions(rule):
    cells = rule(many_boxes(300))
    assert torch.equal(cells.union(), cells.regions().any(dim=0))
    assert torch.equal(cells.counts(), cells.regions().sum(dim=(1, 2)))
    assert torch.equal(rule(many_boxes(300)[:5]).union(), cells.regions()[:5].any(dim=0))


@each_rule
def test_a_step_of_one_stride_moves_the_cells_by_one(rule):
    some = many_boxes(40, seed=1) * torch.tensor([0.5, 0.5, 0.5, 0.5])
    before, after = rule(some), rule(some + torch.tensor([STRIDE, 0, STRIDE, 0]))
    assert torch.equal(before.columns[:, :-1], after.columns[:, 1:])
    assert torch.equal(before.rows, after.rows)


@each_rule
def test_float32_gives_the_same_cells_and_half_precision_computes_in_float32(rule):
    some = many_boxes(50, seed=2).mul(4).round().div(4)  # quarters of a pixel are exact in half precision
    expected = rule(some)
    for dtype in (torch.float32, torch.float16):
        found = rule(some.to(dtype))
        assert torch.equal(found.rows, expected.rows)
        assert torch.equal(found.columns, expected.columns)


def test_a_map_of_one_cell():
    everything, corner, point = boxes((0, 0, 32, 32)), boxes((20, 20, 31, 31)), boxes((3, 3, 3, 3))
    found = {
        "floor_ceil": [bool(floor_ceil_cells(box, (32, 32), (1, 1)).union()) for box in (everything, corner, point)],
        "truncated": [bool(truncated_cells(box, 32, (1, 1)).union()) for box in (everything, corner, point)],
        "center": [bool(center_cells(box, 32, (1, 1)).union()) for box in (everything, corner, point)],
        "index": [bool(index_cells(box, (32, 32), (1, 1)).union()) for box in (everything, corner, point)],
    }
    assert found == {
        "floor_ceil": [True, True, True],
        "truncated": [True, True, True],
        "center": [True, False, False],
        "index": [True, False, False],
    }


def test_union_survives_autocast():
    some = boxes(*[(0, 0, 8, 8)] * 300, (16, 16, 17, 17))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        union = center_cells(some, STRIDE, MAP).union()
        assert torch.equal(truncated_cells(some, STRIDE, MAP).union(), truncated_cells(some, STRIDE, MAP).regions().any(dim=0))
    assert torch.nonzero(union).tolist() == [[0, 0]]


# ------------------------------------------------------------------------------------------------------------------ FGD


def test_floor_of_the_start_and_ceil_of_the_end_both_inclusive():
    span = floor_ceil_span(boxes((9, 17, 23, 40), (8, 8, 16, 16)), (64, 96), (8, 12))
    assert span.tolist() == [[1, 2, 3, 5], [1, 1, 2, 2]]  # a grid-aligned box of one cell covers 2 x 2
    cells = floor_ceil_cells(boxes((8, 8, 16, 16)), (64, 96), (8, 12))
    assert listed(cells) == [[(1, 1), (1, 2), (2, 1), (2, 2)]]


def test_floor_ceil_beyond_the_edges():
    span = floor_ceil_span(boxes((-20, -1, 10, 70)), (64, 96), (8, 12))
    assert span.tolist() == [[0, 0, 2, 9]]  # the end is not clipped, the cells are
    assert int(floor_ceil_cells(boxes((-20, -1, 10, 70)), (64, 96), (8, 12)).counts()) == 8 * 3


# --------------------------------------------------------------------------------------------------------- DeFeat, TADF


def sliced(box, stride, height, width):
    """The rule in plain numbers, for a box inside the image."""
    left, top, right, bottom = (int(number / stride) for number in box.tolist())
    right, bottom = min(right, width), min(bottom, height)
    if left == right or top == bottom:
        return [(min(top, height - 1), min(left, width - 1))]
    return [(row, column) for row in range(top, bottom) for column in range(left, right)]


@pytest.mark.parametrize("stride", [4, 8, 24])
def test_truncated_equals_slices_in_plain_numbers(stride):
    some = many_boxes(200, seed=3)
    height, width = math.ceil(48 / stride), math.ceil(72 / stride)
    expected = [sliced(box, stride, height, width) for box in some]
    assert listed(truncated_cells(some, stride, (height, width))) == expected
    assert all(expected)  # a box inside the image always has a cell


def test_truncated_at_and_beyond_the_edges():
    some = boxes(
        (72, 10, 72, 20),  # on the right edge: the single cell is the last one
        (70, 48, 80, 60),  # starts on the bottom edge
        (-20, 10, 20, 20),  # starts left of the image
        (-20, 10, -3, 20),  # ends less than a stride left of the image
        (100, 0, 200, 4),  # far beyond, less than a cell high
        (-100, 0, -50, 40),  # far beyond on the left
        (30, 20, 10, 40),  # no box
    )
    assert listed(truncated_cells(some, STRIDE, MAP)) == [[(1, 8)], [(5, 8)], [(1, 0), (1, 1)], [(1, 0)], [], [], []]


def test_truncated_span_is_towards_zero_and_on_the_map():
    assert truncated_span(boxes((-7, -9, 15.9, 16), (9, 8, 80, 47)), STRIDE, MAP).tolist() == [[0, 0, 1, 2], [1, 1, 9, 5]]


def test_truncated_on_its_level_equals_the_released_code_of_defeat():
    golden = Golden("defeat")
    expected, strides = golden.levels("out_mask"), golden["in_strides"].tolist()
    for image, some in enumerate(images(golden)):
        levels = level_of_box(some, len(expected))
        for level, (masks, stride) in enumerate(zip(expected, strides, strict=True)):
            cells = truncated_cells(some[levels == level], stride, tuple(masks.shape[1:]))
            assert torch.equal(cells.union(), masks[image].bool())
        mask = golden["out_backbone_mask"][image].bool()
        assert torch.equal(truncated_cells(some, strides[0], tuple(mask.shape)).union(), mask)


# -------------------------------------------------------------------------------------------------------------- PGD, LD


@pytest.mark.parametrize("offset", [0.5, 0.0])
def test_center_cells_are_the_points_of_a_map_inside_the_box(offset):
    some = many_boxes(60, seed=4)
    rows, columns = torch.arange(6, dtype=torch.float64) + offset, torch.arange(9, dtype=torch.float64) + offset
    points = torch.cartesian_prod(rows, columns).flip(1) * STRIDE
    inside = points_inside(points, some).T.view(-1, *MAP)
    assert torch.equal(center_cells(some, STRIDE, MAP, offset).regions(), inside)
    assert 0 < int(inside.sum()) < inside.numel()


def test_inside_is_strict_on_each_of_the_four_sides():
    box = boxes((10, 20, 30, 50))
    points = torch.tensor([[10, 30], [30, 30], [20, 20], [20, 50], [10.5, 20.5], [9, 30]], dtype=torch.float64)
    assert points_inside(points, box).flatten().tolist() == [False, False, False, False, True, False]
    assert points_inside(points, box, margin=0.5).flatten().tolist() == [False] * 6
    assert points_inside(points, boxes()).shape == (6, 0)


def test_x_is_compared_with_x():
    """PGD's code for FCOS reads points as (y, x)."""
    assert points_inside(torch.tensor([[50.0, 5.0]]), boxes((40, 0, 60, 10), (0, 40, 10, 60))).tolist() == [[True, False]]


def test_background_equals_the_released_code_of_pgd():
    golden = Golden("pgd")
    points = torch.cat(golden.levels("in_points"))
    anchors = golden["in_anchors"]
    centers = (anchors[:, :2] + anchors[:, 2:]) * 0.5
    for image, some in enumerate(images(golden)):
        for places, expected in ((points, "out_fixed_back"), (centers, "out_anchor_back")):
            background = ~points_inside(places, some, margin=1e-10).any(dim=1)
            assert torch.equal(background.to(torch.float64), golden[f"{expected}_{image}"])
    strides, sizes = golden["in_strides"].tolist(), [level.shape[2:] for level in golden.levels("in_pred_cls")]
    first = [torch.nonzero(center_cells(some, strides[0], tuple(sizes[0]), margin=1e-10).union()) for some in images(golden)]
    for image, found in enumerate(first):
        background = golden[f"out_fixed_back_{image}"][: sizes[0].numel()].view(sizes[0])
        assert torch.equal(found, torch.nonzero(background == 0))


def test_regions_equal_the_released_code_of_ld():
    golden = Golden("ld")
    anchors, counts = torch.cat(golden.levels("out_anchors")), [len(level) for level in golden.levels("out_anchors")]
    for image, some in enumerate(images(golden)):
        if len(some) == 0:
            continue
        inside = points_inside((anchors[:, :2] + anchors[:, 2:]) / 2, some).any(dim=1)
        near = anchors_near_boxes(anchors, some)
        for level, (is_inside, is_near) in enumerate(zip(inside.split(counts), near.split(counts), strict=True)):
            assert torch.equal(is_inside, golden[f"out_insidegt_{level}"][image].bool())
            assert torch.equal(is_near, golden[f"out_finegrained_{level}"][image].bool())


# ------------------------------------------------------------------------------------------------------------------ LGD


def test_index_by_hand():
    """On a map of stride 8 a box from 8 to 24 is 1 to 3: columns 1, 2 and 3, ends inclusive; from 9 to 23 only column 2."""
    some = boxes((8, 0, 24, 47), (9, 0, 23, 47), (8, 3, 24, 3))
    cells = index_cells(some, IMAGE, MAP)
    assert [torch.nonzero(columns).flatten().tolist() for columns in cells.columns] == [[1, 2, 3], [2], [1, 2, 3]]
    assert cells.counts().tolist() == [18, 6, 0]  # the last has no height


def test_index_equals_the_released_code_of_lgd():
    golden = Golden("lgd")
    height, width = golden.meta["image_size_hw"]
    for variant in ("ctx", "noctx"):
        for image, some in enumerate(images(golden)):
            if len(some) == 0:
                continue
            if variant == "ctx":
                some = torch.cat([some, some.new_tensor([[0, 0, width, height]])])
            clamped = torch.minimum(some.clamp(min=0), some.new_tensor([width - 1, height - 1] * 2))
            level = 0
            while (name := f"out_{variant}_mask_level{level}_image{image}") in golden:
                expected = golden[name].bool()
                assert torch.equal(index_cells(clamped, (height, width), tuple(expected.shape[1:])).regions(), expected)
                level += 1
            assert level == len(golden.levels("in_student"))


# ----------------------------------------------------------------------------------------------------------------- FGFI


def test_anchors_near_boxes_equal_the_released_code_of_fgfi():
    golden = Golden("fgfi")
    anchors, psi = golden["in_anchors"], golden.meta["hyperparameters"]["psi"]
    for image, some in enumerate(images(golden)):
        one_by_one = [anchors_near_boxes(anchors.flatten(0, 2), box[None], psi, plus_one=True) for box in some]
        counts = torch.stack(
            [near.view(anchors.shape[:3]).sum(dim=2) for near in one_by_one] or [torch.zeros(anchors.shape[:2])]
        ).sum(dim=0)
        assert torch.equal(counts.long(), golden["out_anchor_count_0"][image])
        near = anchors_near_boxes(anchors.flatten(0, 2), some, psi, plus_one=True).view(anchors.shape[:3]).any(dim=2)
        assert torch.equal(near, golden["out_mask_0"][image, 0].bool())


def test_anchors_near_boxes_on_their_level_equal_the_released_code_of_defeat():
    golden = Golden("fgfi_fpn")
    expected = golden.levels("out_mask")
    for image, some in enumerate(images(golden)):
        levels = level_of_box(some, len(expected))
        for level, (masks, anchors) in enumerate(zip(expected, golden.levels("in_anchors"), strict=True)):
            near = anchors_near_boxes(anchors.flatten(0, 2), some[levels == level], golden.meta["phi"])
            assert torch.equal(near.view(anchors.shape[:3]).any(dim=2), masks[image].bool())


def test_anchors_near_boxes_by_hand():
    anchors = boxes((0, 0, 10, 10), (5, 0, 15, 10), (10, 0, 20, 10), (40, 0, 50, 10))
    box = boxes((0, 0, 10, 10))  # IoU 1, 1/3, 0, 0
    assert anchors_near_boxes(anchors, box, 0.33).tolist() == [True, True, False, False]
    assert anchors_near_boxes(anchors, box, 0.34).tolist() == [True, False, False, False]
    assert anchors_near_boxes(anchors, box, 0.0).tolist() == [True, True, False, False]
    assert anchors_near_boxes(anchors, box, 1.0).tolist() == [False] * 4
    # With one pixel more, the third anchor shares a column of 11 pixels with the box: IoU 11 / (2 * 121 - 11).
    assert anchors_near_boxes(anchors, box, 0.0, plus_one=True).tolist() == [True, True, True, False]
    assert anchors_near_boxes(anchors, boxes((100, 100, 120, 120), (3, 3, 3, 3)), 0.0).tolist() == [False] * 4
    assert anchors_near_boxes(anchors, boxes()).tolist() == [False] * 4
    assert anchors_near_boxes(boxes(), box).tolist() == []


def test_anchors_near_a_crowd_are_those_near_each(monkeypatch):
    anchors, some = many_boxes(500, seed=5), many_boxes(70, seed=6)
    expected = torch.stack([anchors_near_boxes(anchors, box[None]) for box in some]).any(dim=0)
    monkeypatch.setattr("detdistill.functional.cells.CHUNK", 3500)  # seven boxes at a time
    assert torch.equal(anchors_near_boxes(anchors, some), expected)
    assert 0 < int(expected.sum()) < 500


# ------------------------------------------------------------------------------------------------------------ the level


def square(side):
    return (3.0, 5.0, 3.0 + side, 5.0 + side)


def test_level_by_hand():
    sides = boxes(*[square(side) for side in (1, 55, 56, 110, 111, 112, 223, 895, 896, 4000)])
    assert level_of_box(sides, 5).tolist() == [0, 0, 0, 0, 1, 1, 2, 4, 4, 4]
    assert level_of_box(sides, 5, plus_one=False).tolist() == [0, 0, 0, 0, 0, 1, 1, 3, 4, 4]
    assert level_of_box(sides, 1).tolist() == [0] * 10
    assert level_of_box(sides, 5, base=28).tolist() == [0, 1, 1, 1, 2, 2, 3, 4, 4, 4]
    assert level_of_box(boxes(), 5).tolist() == []
    # 1e-6 of the base is forgiven.
    assert level_of_box(boxes(square(112 - 5e-5), square(112 - 6e-5)), 5, plus_one=False).tolist() == [1, 0]


def test_level_is_of_the_area_and_empty_boxes_are_on_the_finest():
    assert level_of_box(boxes((0, 0, 27, 447)), 5).tolist() == [1]  # 28 x 448 pixels as 112 x 112
    assert level_of_box(boxes((9, 9, 9, 9), (9, 9, 0, 0), (9, 0, 0, 900)), 5).tolist() == [0, 0, 0]
    assert level_of_box(boxes(square(300.0)).half(), 5).tolist() == [2]


def test_level_equals_the_released_code_of_defeat_and_of_united_perception():
    golden = Golden("tadf")
    for image, some in enumerate(images(golden)):
        assert torch.equal(level_of_box(some, len(golden["in_strides"])), golden[f"out_level_{image}"])
    golden = Golden("mimic")
    kind = "teacher" if golden.meta["teacher_proposal"] else "student"
    proposals = golden[f"in_{kind}_proposals"][:, 1:5]
    assert torch.equal(level_of_box(proposals, len(golden["in_strides"])), golden["out_level_of_roi"])


def test_cells_are_a_pair_that_can_be_built_by_hand():
    cells = BoxCells(torch.tensor([[True, False], [True, True]]), torch.tensor([[False, True, True], [True, False, False]]))
    assert listed(cells) == [[(0, 1), (0, 2)], [(0, 0), (1, 0)]]
    assert cells.union().tolist() == [[True, True, True], [True, False, False]]
    assert cells.counts().tolist() == [2, 2]
