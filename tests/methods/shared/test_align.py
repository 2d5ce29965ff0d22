"""Two pyramids brought together: hand-made strides, sizes and channels."""

import pytest
import torch
from torch import nn

from detdistill.detectors.contract import DetectorSpec
from detdistill.functional.dense_maps import find_partners
from detdistill.methods.shared.align import (
    ConvolutionAdapters,
    LevelAdapters,
    LevelPair,
    PairedMaps,
    check_same_anchors,
    pair_levels,
    resize_like,
)
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Dense, Features


def spec(strides, channels=None, name="some"):
    return DetectorSpec(name, "dense", ("a",), tuple(channels or [4] * len(strides)), tuple(strides))


def indices(student, teacher, levels=None):
    return [(pair.student, pair.teacher) for pair in pair_levels("m", spec(student), spec(teacher), levels)]


# ------------------------------------------------------------------------------------------------------- pair_levels


@pytest.mark.parametrize(
    ("student", "teacher", "wanted"),
    [
        ((8, 16, 32), (8, 16, 32), [(0, 0), (1, 1), (2, 2)]),
        ((8, 16, 32), (4, 8, 16, 32, 64), [(0, 1), (1, 2), (2, 3)]),
        ((4, 8, 16, 32, 64), (8, 16, 32), [(1, 0), (2, 1), (3, 2)]),
        # The nearest stride on a logarithmic scale: 11 is nearer to 8 than to 16 (factors 1.375 and 1.45).
        ((11,), (8, 16), [(0, 0)]),
        ((12,), (8, 16), [(0, 1)]),
        # Within a factor of 1.5, the factor itself included; beyond it there is no partner.
        ((11,), (8, 32), [(0, 0)]),
        ((8, 13), (8, 32), [(0, 0)]),
        # Of two student levels with one nearest teacher level the finer one gets it; the other has no partner.
        ((8, 10), (9,), [(0, 0)]),
        ((16, 16), (16, 64), [(0, 0)]),
        ((8, 10, 16), (8, 16), [(0, 0), (2, 1)]),
    ],
)
def test_levels_are_paired_by_the_nearest_stride_each_teacher_level_once(student, teacher, wanted):
    assert indices(student, teacher) == wanted


def test_a_pair_knows_the_channels_of_both_sides():
    pairs = pair_levels("m", spec((8, 16), (3, 5)), spec((16, 8), (7, 11)))
    assert pairs == (LevelPair(0, 1, 3, 11), LevelPair(1, 0, 5, 7))


def test_levels_chooses_in_its_own_order_and_counts_from_the_end():
    assert indices((8, 16, 32), (8, 16, 32), [2, 0]) == [(2, 2), (0, 0)]
    assert indices((8, 16, 32), (8, 16, 32), [-1]) == [(2, 2)]


def test_levels_without_a_partner_are_refused_by_name():
    with pytest.raises(PairError) as refusal:
        pair_levels("m", spec((8, 16, 64)), spec((8, 16)), [0, 2])
    assert str(refusal.value) == "m: levels=[0, 2]: student level 2 has no partner; levels with one: [0, 1] (strides [8, 16])"
    with pytest.raises(PairError, match=r"^m: no common level: student x has strides \(64,\), teacher y has \(8, 16\);"):
        pair_levels("m", spec((64,), name="x"), spec((8, 16), name="y"))


# -------------------------------------------------------------------------------------------------------- resize_like


def test_resizing_interpolates_between_centres_of_cells():
    """A row 0, 4 at twice its width: cell centres lie at 1/4 and 3/4 of the way, ends are held (corners not aligned)."""
    row = torch.tensor([[[[0.0, 4.0]]]])
    assert resize_like(row, torch.zeros(1, 1, 1, 4))[0, 0, 0].tolist() == [0.0, 1.0, 3.0, 4.0]
    column = row.transpose(2, 3)
    assert resize_like(column, torch.zeros(1, 1, 4, 1))[0, 0, :, 0].tolist() == [0.0, 1.0, 3.0, 4.0]


def test_resizing_to_half_takes_the_mean_of_two_neighbours():
    row = torch.tensor([[[[1.0, 3.0, 5.0, 9.0]]]])
    assert resize_like(row, torch.zeros(1, 7, 1, 2))[0, 0, 0].tolist() == [2.0, 7.0]


def test_a_map_of_the_right_size_is_itself_also_when_only_one_side_differs():
    level = torch.rand(1, 2, 3, 4)
    assert resize_like(level, torch.zeros(1, 9, 3, 4)) is level
    assert resize_like(level, torch.zeros(1, 9, 3, 5)).shape == (1, 2, 3, 5)
    assert resize_like(level, torch.zeros(1, 9, 6, 4)).shape == (1, 2, 6, 4)


# ------------------------------------------------------------------------------------------------------ LevelAdapters

PAIRS = (LevelPair(0, 0, 2, 3), LevelPair(1, 1, 3, 3), LevelPair(2, 2, 2, 3))


def test_only_channels_that_differ_have_a_convolution_unless_all_should():
    adapters = LevelAdapters(PAIRS)
    assert [type(adapter) for adapter in adapters] == [nn.Conv2d, nn.Identity, nn.Conv2d]
    assert sorted(dict(adapters.named_parameters())) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert [type(adapter) for adapter in LevelAdapters(PAIRS, always=True)] == [nn.Conv2d] * 3


def test_an_adapter_is_a_linear_map_of_each_cell():
    adapters = LevelAdapters(PAIRS)
    maps = [torch.rand(1, 2, 2, 2), torch.rand(1, 3, 1, 1), torch.rand(1, 2, 1, 1)]
    found = adapters(maps)
    weight, bias = adapters[0].weight[:, :, 0, 0], adapters[0].bias
    torch.testing.assert_close(found[0][0, :, 1, 0], weight @ maps[0][0, :, 1, 0] + bias)
    assert found[1] is maps[1]


def test_a_wider_kernel_keeps_the_size_and_sees_its_neighbours():
    (adapter,) = adapters = LevelAdapters(PAIRS[:1], kernel=3)
    nn.init.ones_(adapter.weight), nn.init.zeros_(adapter.bias)
    (found,) = adapters([torch.ones(1, 2, 3, 4)])
    assert found.shape == (1, 3, 3, 4)
    assert found[0, 0].tolist() == [[8.0, 12, 12, 8], [12, 18, 18, 12], [8, 12, 12, 8]]  # 2 channels times cells inside


def test_a_shared_adapter_serves_all_pairs_of_equal_channels():
    adapters = LevelAdapters((*PAIRS, LevelPair(3, 3, 5, 3)), shared=True)
    assert adapters[0] is adapters[2]
    assert adapters[3] is not adapters[0]
    assert len({id(parameter) for parameter in adapters.parameters()}) == 4
    assert LevelAdapters(PAIRS)[0] is not LevelAdapters(PAIRS)[2]


def test_initialisation_and_activation_are_the_callers():
    def minus_one(convolution):
        nn.init.constant_(convolution.weight, -1.0)
        nn.init.zeros_(convolution.bias)

    adapters = LevelAdapters(PAIRS[:1], activation=nn.ReLU, initialize=minus_one)
    assert adapters([torch.ones(1, 2, 1, 1)])[0].flatten().tolist() == [0.0, 0.0, 0.0]
    assert LevelAdapters(PAIRS[:1], initialize=minus_one)([torch.ones(1, 2, 1, 1)])[0].flatten().tolist() == [-2.0] * 3


# --------------------------------------------------------------------------------------------------------- PairedMaps


def test_paired_maps_come_level_by_level_in_the_teachers_channels_and_size():
    pairs = (LevelPair(1, 0, 2, 3),)
    adapters = LevelAdapters(pairs)
    student = Features((torch.zeros(1, 9, 8, 8), torch.rand(1, 2, 2, 2)), (8, 16))
    teacher = Features((torch.rand(1, 3, 4, 4), torch.rand(1, 3, 2, 2)), (16, 32))
    (mine,), (theirs,) = PairedMaps(pairs, adapters, resize=True)(student, teacher)
    assert theirs is teacher.maps[0]
    torch.testing.assert_close(mine, resize_like(adapters[0](student.maps[1]), theirs))
    (mine,), _ = PairedMaps(pairs, adapters)(student, teacher)
    torch.testing.assert_close(mine, adapters[0](student.maps[1]))
    mine.sum().backward()
    assert adapters[0].weight.grad is not None


# ------------------------------------------------------------------------------------------------------------ anchors


def two_cells(sides, anchors):
    """Square anchors of the given sides, centred on two cells of stride 8 in the second row."""
    count = len(sides) * 2
    column, anchor = torch.arange(2).repeat_interleave(len(sides)), torch.tensor(anchors).repeat(2)
    center = torch.stack([column * 8.0, torch.full((count,), 8.0)], dim=1)
    half = torch.tensor(sides).repeat(2)[:, None] / 2
    priors = torch.cat([center - half, center + half], dim=1)[None]
    cells = torch.stack([torch.ones_like(column), column], dim=1)
    return Dense(torch.zeros(1, count, 1), priors, priors, priors, torch.zeros_like(column), cells, anchor)


def test_several_anchors_must_be_the_same():
    student, other = two_cells([8.0, 16.0], [0, 1]), two_cells([8.0, 12.0], [0, 1])
    check_same_anchors("m", student, student, find_partners(student, student))
    turned = two_cells([16.0, 8.0], [1, 0])  # the order does not matter
    check_same_anchors("m", student, turned, find_partners(student, turned))
    with pytest.raises(PairError, match=r"^m: .* anchor 1 of level 0 has 16x16 pixels in the student and 12x12 in the teacher"):
        check_same_anchors("m", student, other, find_partners(student, other))


def test_a_single_anchor_may_differ():
    student, other = two_cells([8.0], [0]), two_cells([12.0], [0])
    check_same_anchors("m", student, other, find_partners(student, other))


def test_one_convolution_adapter_for_each_width():
    adapters = ConvolutionAdapters([4, 6, 4])
    maps = adapters([torch.ones(1, 4, 2, 2), torch.ones(1, 6, 1, 1), torch.ones(1, 4, 1, 1)])
    assert [tuple(level.shape) for level in maps] == [(1, 4, 2, 2), (1, 6, 1, 1), (1, 4, 1, 1)]
    assert list(adapters) == ["4", "6"]
    assert len(list(adapters.parameters())) == 2 * 3 * 2  # weights and biases of three convolutions each
