"""A prediction of DETRs that is not finite in one of two processes: both compute their losses, and none waits for the other."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import detdistill.detectors.queries.deformable_detr
import detdistill.detectors.queries.deimv2
import detdistill.detectors.queries.detr
import detdistill.detectors.queries.rt_detr  # noqa: F401 - imported here, forks need not import them again
from detdistill.detectors.build import build_detector
from tests.tiny import tiny_batch

COMMON = "resnet10t,channels=8-8-16-16,stem=8,heads=2,ffn=16,queries=8,decoder=2"
MODELS = (f"detr:{COMMON},dim=16", f"deformable_detr:{COMMON},dim=32", f"rt_detr:{COMMON},dim=16", f"deimv2:{COMMON},dim=16")


def process(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=120)
    )
    found = {}
    for model in MODELS:
        torch.manual_seed(0)
        detector, batch = build_detector(model, ("a", "b")), tiny_batch(2, 128, seed=rank)
        prediction = detector(batch).prediction
        if rank == 1:
            prediction = replace(prediction, logits=prediction.logits * torch.nan)
        terms = detector.loss(prediction, batch).terms
        mine = torch.tensor(float(torch.stack([term.detach() for term in terms.values()]).sum()))
        both = [torch.zeros(()) for _ in range(2)]
        dist.all_gather(both, mine)  # would not match if a process had communicated more often
        found[model] = (torch.stack(both), sorted(terms))
    torch.save(found, Path(out, f"{rank}.pt"))
    dist.destroy_process_group()


def test_one_of_two_has_diverged(tmp_path: Path):
    mp.start_processes(process, (str(tmp_path / "store"), str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for model in MODELS:
        assert torch.isfinite(first[model][0]).tolist() == [True, False]
        assert torch.equal(first[model][0][0], second[model][0][0])
        assert second[model][1] == ["prediction"] != first[model][1]
