"""How the processes of a distributed run find each other, also after a restart, and what to do if they cannot."""

from __future__ import annotations

import os

import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from detdistill.errors import RunError
from detdistill.processes import by_srun, restarts


class ElasticDDP(DDPStrategy):
    """DDP whose processes find each other after a restart, too."""

    def setup_distributed(self) -> None:
        """Connect the processes."""
        if restarts() and not dist.is_initialized():
            self.set_world_ranks()
            meet_again(self)
        super().setup_distributed()


class ElasticSharding(ModelParallelStrategy):
    """FSDP over all processes, which find each other after a restart, too. Checkpoints are whole files."""

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def set_world_ranks(self) -> None:
        """Number this process; Lightning connects the processes right after it."""
        super().set_world_ranks()
        if restarts() and not dist.is_initialized():
            meet_again(self)


def meet_again(strategy: ElasticDDP | ElasticSharding) -> None:
    """Connect restarted processes in a part of torchrun's store that belongs to this restart.

    With a static address (``--master-port``), torchrun keeps its store over restarts, and in it the addresses of the processes
    that have ended. torch 2.15 then waits for these and fails.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    assert strategy.cluster_environment is not None
    assert strategy._timeout is not None
    address, port = strategy.cluster_environment.main_address, strategy.cluster_environment.main_port
    store = dist.TCPStore(address, port, strategy.world_size, is_master=False, timeout=strategy._timeout)
    dist.init_process_group(
        "nccl" if strategy.root_device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"detdistill/restart {restarts()}", store),
        rank=strategy.global_rank,
        world_size=strategy.world_size,
        timeout=strategy._timeout,
        device_id=strategy.root_device if strategy.root_device.type != "cpu" else None,
    )


def launcher() -> ClusterEnvironment | None:
    """Who numbers the processes, where Lightning's guess may be wrong: in a Slurm job, srun only if it has started several."""
    if "SLURM_NTASKS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    return SLURMEnvironment(auto_requeue=False) if by_srun() else LightningEnvironment()


def unreachable(error: dist.DistNetworkError | dist.DistStoreError) -> RunError:
    """The error of processes that cannot find each other, with its remedy."""
    address, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", "?")
    if "EADDRINUSE" in str(error) or "already in use" in str(error):
        return RunError(f"port {port} of {address} is in use; set the environment variable MASTER_PORT to a free port")
    reason = str(error).strip().splitlines()[0]
    return RunError(
        f"the process at {address}, port {port}, cannot be reached: {reason}; check that MASTER_ADDR and MASTER_PORT are the "
        "same on all machines, that the first machine's process runs, and that no firewall is in between"
    )
