"""Arithmetic inside ``full_precision``."""

import torch

from detdistill.functional.precision import full_precision


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
