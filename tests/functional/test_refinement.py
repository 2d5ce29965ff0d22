import torch

from detdistill.functional.refinement import refinement_assign


def grid(side, stride):
    rows, columns = torch.meshgrid(torch.arange(side) * stride, torch.arange(side) * stride, indexing="ij")
    return torch.stack([columns.flatten(), rows.flatten()], dim=1).float()


def pyramid():
    """Centres and levels of two levels of an image of 128 pixels, strides 8 and 16."""
    centers = [grid(16, 8), grid(8, 16)]
    levels = torch.cat([torch.full((len(one),), index) for index, one in enumerate(centers)])
    return torch.cat(centers), levels


def test_a_box_takes_the_centres_of_its_central_area_on_its_level():
    centers, levels = pyramid()
    boxes = torch.tensor([[16.0, 16.0, 72.0, 72.0], [0.0, 0.0, 100.0, 100.0]])  # sides 56 (level 0) and 100 (level 1)
    matched = refinement_assign(centers, levels, boxes, 32.0)
    for index, (box, level) in enumerate(zip(boxes.tolist(), (0, 1), strict=True)):
        reach = 0.15 * (box[2] - box[0])
        middle = (box[0] + box[2]) / 2
        expected = [
            place
            for place, (x, y) in enumerate(centers.tolist())
            if levels[place] == level and abs(x - middle) <= reach and abs(y - middle) <= reach
        ]
        assert torch.nonzero(matched == index).flatten().tolist() == expected
        assert expected


def test_sizes_beyond_the_pyramid_belong_to_its_ends_and_small_boxes_take_the_nearest_centre():
    centers, levels = pyramid()
    boxes = torch.tensor([[41.0, 41.0, 46.0, 45.0], [-500.0, -500.0, 600.0, 600.0]])
    matched = refinement_assign(centers, levels, boxes, 32.0)
    assert centers[matched == 0].tolist() == [[40.0, 40.0]]
    assert levels[matched == 0].tolist() == [0]
    assert set(levels[matched == 1].tolist()) == {1}


def test_an_anchor_of_two_boxes_takes_the_smaller_one():
    centers, levels = pyramid()
    boxes = torch.tensor([[10.0, 10.0, 70.0, 70.0], [20.0, 20.0, 60.0, 60.0]])
    matched = refinement_assign(centers, levels, boxes, 32.0)
    assert int(matched[(centers == 40.0).all(dim=1) & (levels == 0)]) == 1
    assert (matched == 0).any()


def test_no_box_and_a_box_without_area():
    centers, levels = pyramid()
    assert (refinement_assign(centers, levels, torch.zeros(0, 4), 32.0) == -1).all()
    point = torch.tensor([[40.0, 40.0, 40.0, 40.0]])
    assert int((refinement_assign(centers, levels, point, 32.0) == 0).sum()) == 1


def test_a_centre_on_the_border_of_the_central_area_is_inside():
    """A quarter of a box of 64 pixels, from 16 to 48; 56 is beyond."""
    centers = torch.tensor([[16.0, 16.0], [48.0, 32.0], [32.0, 56.0], [32.0, 8.0]])
    levels = torch.zeros(4, dtype=torch.int64)
    matched = refinement_assign(centers, levels, torch.tensor([[0.0, 0.0, 64.0, 64.0]]), 64.0, share=0.5)
    assert matched.tolist() == [0, 0, -1, -1]
