"""Counts by hand, and two processes (gloo) that must agree with one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detdistill.functional.counting import (
    EPSILON,
    divisor_over_ranks,
    gather_over_ranks,
    label_weights,
    mean_over_ranks,
    number_objects,
    number_of_positives,
    positives_per_level,
    share_over_ranks,
    sum_over_ranks,
)
from detdistill.structures import Assignment

MATCHED = torch.tensor([[0, 0, 1, -1, -2], [-1, -1, -1, -1, -1], [-2, 7, -1, -1, -1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_image_counts_at_least_one_positive(dtype):
    count = number_of_positives(Assignment(MATCHED), torch.ones((), dtype=dtype))
    assert count.dtype == dtype
    assert count.item() == torch.tensor(5.0, dtype=dtype).add(EPSILON).item()
    nothing = number_of_positives(Assignment(torch.full((3, 4), -1)), torch.ones((), dtype=torch.float64))
    assert nothing.item() == 3 + 2.0**-23


def test_positives_of_levels_in_any_order():
    levels = torch.tensor([2, 0, 2, 1, 0])
    assert positives_per_level(Assignment(MATCHED), levels, 4).tolist() == [2, 0, 2, 0]
    assert positives_per_level(Assignment(MATCHED[:0]), levels, 3).tolist() == [0, 0, 0]
    assert positives_per_level(Assignment(MATCHED[:, :0]), levels[:0], 2).tolist() == [0, 0]


def test_label_weights():
    plain = label_weights(Assignment(MATCHED), torch.ones((), dtype=torch.float64))
    assert plain.dtype == torch.float64
    assert plain.tolist() == [[1, 1, 1, 1, 0], [1] * 5, [0, 1, 1, 1, 1]]
    given = torch.arange(15.0).view(3, 5)
    weighted = label_weights(Assignment(MATCHED, weights=given), torch.ones((), dtype=torch.float64))
    assert weighted.dtype == torch.float64
    assert weighted.tolist() == [[0, 1, 2, 3, 0], [5, 6, 7, 8, 9], [0, 11, 12, 13, 14]]
    assert given[0, 4] == 4  # the assignment stays as it was
    regions = label_weights(Assignment(torch.tensor([-2, 0, -1])), torch.ones(()))
    assert regions.tolist() == [0, 1, 1]


def test_objects_are_numbered_by_image_and_box():
    image, ground_truth = torch.tensor([1, 0, 1, 2, 0, 1]), torch.tensor([3, 3, 0, 0, 3, 3])
    numbers, count = number_objects(image, ground_truth)
    assert count == 4
    assert numbers.tolist() == [2, 0, 1, 3, 0, 2]
    none = torch.zeros(0, dtype=torch.int64)
    numbers, count = number_objects(none, none)
    assert (numbers.tolist(), count) == ([], 0)


def test_alone_nothing_changes_and_nothing_has_a_graph():
    value = torch.tensor([3.0, 4.0], requires_grad=True)
    for found in (sum_over_ranks(value), mean_over_ranks(value), gather_over_ranks(value)):
        assert found.tolist() == [3.0, 4.0]
        assert not found.requires_grad
    assert share_over_ranks(value) == 1.0
    assert [divisor_over_ranks(count, value) for count in (0, 1, 5)] == [1, 1, 5]
    changed = sum_over_ranks(value)
    changed += 1
    assert value.tolist() == [3.0, 4.0]


def _one_of_three(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    value = torch.tensor([1.0, 10.0]) * (rank + 1)
    rows = torch.arange(2.0 * rank).view(rank, 2) + 100 * rank  # process 0 has none
    found = {
        "sum": sum_over_ranks(value),
        "mean": mean_over_ranks(value),
        "own": value,
        "count": sum_over_ranks(torch.tensor(rank)),
        "positives": number_of_positives(Assignment(MATCHED[rank : rank + 1]), value),
        "gathered": gather_over_ranks(rows),
        "no divisor": divisor_over_ranks(0, value),
        "divisor": divisor_over_ranks(2 * rank, value),
        "share": share_over_ranks(torch.tensor(2.0 * rank, requires_grad=True)),
        "share of few": share_over_ranks(torch.tensor(0.125 * rank), least=0.25),
    }
    torch.save(found, Path(out, f"{rank}.pt"))
    dist.destroy_process_group()


def test_three_processes(tmp_path):
    mp.start_processes(_one_of_three, (str(tmp_path / "store"), str(tmp_path)), nprocs=3, start_method="fork")
    first = [[100.0, 101.0]]
    second = [[200.0, 201.0], [202.0, 203.0]]
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["sum"].tolist() == [6.0, 60.0]
        assert found["mean"].tolist() == [2.0, 20.0]
        assert found["own"].tolist() == [1.0 + rank, 10.0 + 10 * rank]
        assert found["count"].tolist() == 3
        # three images in one process: 5 / 3 of them, on average
        assert found["positives"].item() == pytest.approx(5 / 3 + EPSILON, rel=1e-6)
        assert found["no divisor"].item() == pytest.approx(1 / 3)  # gradients are averaged: as one process that divides by 1
        assert found["divisor"].item() == 2  # of the counts 0, 2, 4
        assert found["share"].item() == max(2 * rank, 1) / 2
        assert not found["share"].requires_grad
        assert found["share of few"].item() == pytest.approx(0.25 / (0.375 / 3))
        assert found["gathered"].tolist() == (second + first if rank == 2 else first + second)
