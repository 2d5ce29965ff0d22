"""Batch norms of two processes equal one of a single process with all images, forward and backward."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from detdistill.errors import RunError
from detdistill.functional.modes import keeping_statistics
from detdistill.functional.synced_norm import backward_alone, synchronized


class Own(nn.BatchNorm2d):
    pass


def norms() -> dict[str, nn.Module]:
    """Norms whose weights, statistics and momentums are not the initial ones."""
    made = {
        "rows": nn.BatchNorm1d(3),
        "maps": nn.BatchNorm2d(3, momentum=None),
        "activated": BatchNormAct2d(3, act_layer=nn.SiLU),
        "plain": nn.BatchNorm2d(3, affine=False, eps=0.5),
        "untracked": nn.BatchNorm2d(3, track_running_stats=False),
    }
    generator = torch.Generator().manual_seed(0)
    for norm in made.values():
        for tensor in (*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())):
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return made


def inputs(name: str) -> Tensor:
    """[6, 3] or [6, 3, 4, 5] with a large mean, of which the first process has four."""
    shape = (6, 3) if name == "rows" else (6, 3, 4, 5)
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 10


def results(norm: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * weights).sum().backward()
    with keeping_statistics(norm):
        second = norm(x.detach())
    found = {"output": y.detach(), "input": x.grad, "again": second.detach()}
    found |= {f"gradient {key}": p.grad for key, p in norm.named_parameters()}
    return found | {f"buffer {key}": b.clone() for key, b in norm.named_buffers()}


def process(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine, found = slice(0, 4) if rank == 0 else slice(4, 6), {}
    for name, norm in norms().items():
        kind, x = type(norm), inputs(name)
        weights = torch.linspace(0, 1, x.numel()).view_as(x)
        with synchronized(norm, None):
            assert type(norm) is not kind
            assert isinstance(norm, kind)
            found[name] = results(norm, x[mine], weights[mine])
            with backward_alone():
                y = copy.deepcopy(norm)(x[mine].requires_grad_())
                if rank == 0:  # the other process does not answer
                    y.sum().backward()
        assert type(norm) is kind
    torch.save(found, Path(out, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path):
    mp.start_processes(process, (str(tmp_path / "store"), str(tmp_path)), nprocs=2, start_method="fork")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, norm in norms().items():
        x = inputs(name)
        alone = results(norm, x, torch.linspace(0, 1, x.numel()).view_as(x))
        for key, wanted in alone.items():
            first, second = (part[name][key] for part in parts)
            if key.startswith("gradient"):
                whole = first + second
            elif key.startswith("buffer"):
                assert torch.equal(first, second)
                whole = first
            else:
                whole = torch.cat([first, second])
            torch.testing.assert_close(whole, wanted, rtol=1e-5, atol=1e-5, msg=lambda text, at=(name, key): f"{at}: {text}")


def test_alone_nothing_changes_and_unknown_norms_are_refused():
    norm, x = nn.BatchNorm2d(3), inputs("maps")
    wanted = norm(x)
    with synchronized(norm):
        assert torch.equal(norm(x), wanted)
    network = nn.Sequential(norm, Own(3))
    with pytest.raises(RunError, match="sync_bn: batch norms of the class Own are not known; leave out --sync_bn"):
        synchronized(network).__enter__()
    assert type(norm) is nn.BatchNorm2d, "all are as before"
