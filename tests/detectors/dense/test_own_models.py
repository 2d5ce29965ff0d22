"""Divisors of our own models over several processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detdistill.detectors.dense.shared.heads import OwnDenseDetector
from tests.detectors.dense import own as own_dense

KINDS = ("atss", "gfl", "paa")


def _confident(kind: str) -> OwnDenseDetector:
    """Sums of scores above 1, below which the divisor is 1 whatever the batch."""
    detector = own_dense.spread_out(kind)
    detector.model.head.classification_head.cls_logits.bias.data += 5.0
    return detector


def _loss_of_one_image(rank: int, kind: str, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    detector = _confident(kind)
    mine = own_dense.part(own_dense.equal_batch(), rank)
    with torch.no_grad():
        terms = detector.loss(detector(mine).prediction, mine).terms
    torch.save(dict(terms), Path(out, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_average_to_the_loss_of_one(kind, tmp_path):
    detector, batch = _confident(kind), own_dense.equal_batch()
    with torch.no_grad():
        alone = detector.loss(detector(batch).prediction, batch).terms
    arguments = (kind, str(tmp_path / "store"), str(tmp_path))
    mp.start_processes(_loss_of_one_image, arguments, nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, term in alone.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, term, rtol=1e-4, atol=1e-5)
        assert float(term) > 0
