from dataclasses import dataclass

import pytest
import torch

from detdistill.structures import Assignment, Dense, Features, PerImage
from tests.methods.contract_checks import assert_same, tensors
from tests.tiny import TinyRegions, tiny_batch


def test_to_detach_and_float_reach_every_tensor_and_nothing_else():
    seen = TinyRegions()(tiny_batch(2))
    half = Features((torch.ones(1, 2, 3, 3, dtype=torch.bfloat16),), (8,), (torch.ones(1, 3, 3, dtype=torch.bool),)).float()
    assert half.maps[0].dtype == torch.float32
    assert half.padding[0].dtype == torch.bool
    assert half.strides == (8,)
    double = Features((torch.ones(1, 2, 3, 3, dtype=torch.float64),), (8,))
    assert double.float().maps[0].dtype == torch.float64
    assert seen.float().prediction.origin.level.dtype == torch.int64
    assert any(tensor.requires_grad for _, tensor in tensors(seen))
    constant = seen.detach()
    assert not any(tensor.requires_grad for _, tensor in tensors(constant))
    assert_same(constant, seen, "")
    assert {tensor.device.type for _, tensor in tensors(seen.to("meta"))} == {"meta"}
    moved = tiny_batch(2).to("meta")
    assert moved.targets[1].boxes_xyxy.device.type == "meta"
    assert moved.views == tiny_batch(2).views


def test_adapters_own_lists_are_detached_too():
    maps = torch.ones(1, requires_grad=True) * 2
    empty = torch.zeros(1, 0, dtype=torch.int64)
    dense = Dense(maps, maps, maps, maps, empty, empty, empty, own={"levels": [maps]})
    assert not dense.detach().own["levels"][0].requires_grad


def test_what_cannot_be_split_is_refused_not_copied():
    @dataclass(frozen=True)
    class Wrong(PerImage):
        assignment: Assignment

    with pytest.raises(TypeError, match="Assignment cannot be split"):
        Wrong(Assignment(torch.zeros(2, 3))).split(2)
