"""Arithmetic inside ``full_precision``, and the types that ``at_least_float32`` changes."""

import pytest
import torch

from detdistill.functional.precision import at_least_float32, full_precision


def test_autocast_is_off_inside_and_on_again_afterwards():
    layer, rows = torch.nn.Linear(2, 2), torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision(torch.device("cpu")):
            assert layer(rows).dtype == torch.float32
            assert (rows.double() @ rows.double().T).dtype == torch.float64
        assert layer(rows).dtype == torch.bfloat16


def test_a_device_may_be_named_with_its_number():
    with torch.autocast("cpu", torch.bfloat16), full_precision("cpu:0"):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(dtype):
    assert at_least_float32(torch.tensor([1.5], dtype=dtype)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.int8, torch.int64])
def test_tensors_of_other_types_are_returned_as_they_are(dtype):
    tensor = torch.ones(2, dtype=dtype)
    assert at_least_float32(tensor) is tensor
