"""Processes of one distributed run, forked from the tests with the environment that torchrun or srun would give them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

import detdistill.detectors.dense.fcos
import detdistill.training.run
import detdistill.training.session  # noqa: F401 - imported here, forks need not import them again
from detdistill.errors import DetdistillError

PATIENCE = 300.0
"""Seconds after which a process hangs; some tests run on machines that are busy."""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def torchrun(rank: int, world: int, port: int, nodes: int = 1) -> dict[str, Any]:
    """The variables of a process that torchrun has started."""
    each = world // nodes
    return {
        "RANK": rank,
        "LOCAL_RANK": rank % each,
        "GROUP_RANK": rank // each,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": each,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": f"test-{port}",
        "TORCHELASTIC_RESTART_COUNT": 0,
    }


def srun(rank: int, world: int, port: int, nodes: int = 1) -> dict[str, Any]:
    """The variables of a process that srun has started."""
    each = world // nodes
    return {
        "SLURM_JOB_ID": 1,
        "SLURM_STEP_ID": 0,
        "SLURM_NTASKS": world,
        "SLURM_NTASKS_PER_NODE": each,
        "SLURM_NNODES": nodes,
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank % each,
        "SLURM_NODEID": rank // each,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


Environment = Callable[..., Mapping[str, Any]]


def together(
    world: int, action: Callable[[int], Any], environment: Environment = torchrun, port: int | None = None, **more: Any
) -> list[int | None]:
    """Run ``action(rank)`` in each of ``world`` processes; their exit codes, 2 after an error in the user's input.

    Such an error is written to stderr in one line, as the command line does.
    """
    chosen = free_port() if port is None else port

    def run(rank: int) -> None:
        for name in [name for name in os.environ if name.startswith(("SLURM", "PYTEST"))]:
            del os.environ[name]
        os.environ.update({name: str(value) for name, value in environment(rank, world, chosen, **more).items()})
        torch.set_num_threads(1)
        try:
            action(rank)
        except DetdistillError as error:
            sys.stderr.write(f"detdistill: {error}\n")
            sys.stderr.flush()
            os._exit(2)
        os._exit(0)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    hanging = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for rank in hanging:
        processes[rank].kill()
    assert not hanging, f"processes {hanging} of {world} hang"
    return [process.exitcode for process in processes]
