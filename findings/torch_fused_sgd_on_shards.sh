#!/usr/bin/env bash
# torch 2.13.0: fused SGD cannot step weights that are sharded by `fully_shard`; fused AdamW can.
#
# Expected: `torch.optim.SGD(fused=True)` and `AdamW(fused=True)` both step the parameters of a module after `fully_shard`, as both
# do without it. Seen, on a CPU with two processes (gloo): AdamW steps, SGD raises NotImplementedError for the missing sharding
# strategy of `aten._fused_sgd_`, at the first step and not when the optimizer is built. Detectors are mostly trained with SGD.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat > "$folder/sharded.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

KINDS = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}


def stepped(module: torch.nn.Module, kind: str) -> str:
    optimizer = KINDS[kind](module.parameters(), lr=0.1, fused=True)
    module(torch.ones(1, 3, 8, 8)).sum().backward()
    try:
        optimizer.step()
    except NotImplementedError as error:
        return f"NotImplementedError: {error}"
    return "steps"


def work(rank: int, place: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for kind in KINDS:
        whole = torch.nn.Conv2d(3, 4, 3)
        sharded = torch.nn.Conv2d(3, 4, 3)
        fully_shard(sharded, mesh=mesh)
        found[kind] = (stepped(whole, kind), stepped(sharded, kind))
    if rank == 0:
        for kind, (alone, shards) in found.items():
            print(f"torch {torch.__version__}, fused {kind}: whole weights: {alone}; shards: {shards}")
    assert found["AdamW"] == ("steps", "steps"), "changed"
    assert found["SGD"][0] == "steps" and "_fused_sgd_" in found["SGD"][1], "changed"
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
PYTHON
"$folder/venv/bin/python" "$folder/sharded.py" "$folder/store"
echo "as found"
