"""The machine: checks of its hardware, random seeds, versions."""

from __future__ import annotations

import os
import platform
import random
import sys
import warnings

import numpy as np
import torch

from detdistill.errors import DetdistillWarning, RunError, counted
from detdistill.jobs.versions import versions as versions
from detdistill.processes import by_srun, number_of_processes
from detdistill.settings import TrainSettings


def check_machine(settings: TrainSettings) -> None:
    """Check that this machine can do what the settings require, before anything is trained.

    Nothing is checked for runs that take place elsewhere (``on``); their machine does it.

    Raises:
        RunError: it cannot; the message names the setting.
    """
    if getattr(settings, "on", "local") != "local":
        return
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RunError("device: cuda is not available here; use --device cpu")
    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    if on_gpu and settings.devices > torch.cuda.device_count():
        raise RunError(f"devices: {settings.devices} GPUs are required, but this machine has {torch.cuda.device_count()}")
    if not on_gpu and settings.precision == "16":
        raise RunError("precision: 16 needs a GPU; use bf16 or 32")
    if not on_gpu and settings.precision == "bf16" and not has_bf16():
        text = "precision: this CPU has no instructions for bf16, so it is far slower than 32; use --precision 32"
        warnings.warn(text, DetdistillWarning, stacklevel=2)
    world, wanted = number_of_processes(), settings.devices * settings.nodes
    if world > 1 and world != wanted:  # each process would train alone, all in the same folder
        raise RunError(
            f"devices: {world} processes were started, but --devices times --nodes is {wanted}; give --devices (processes of a "
            "machine) and --nodes (machines)"
        )
    if by_srun():
        _check_srun(settings)


def _check_srun(settings: TrainSettings) -> None:
    """Compare the numbers of Slurm's variables with the settings.

    Raises:
        RunError: they differ, or srun was not told how many processes each machine gets.
    """
    each = os.environ.get("SLURM_NTASKS_PER_NODE")
    if each is None:
        raise RunError("devices: start srun with --ntasks-per-node, the same number as --devices")
    if int(each) != settings.devices:
        raise RunError(f"devices: srun has started {each} processes on each machine, but --devices is {settings.devices}")
    machines = os.environ.get("SLURM_NNODES", str(settings.nodes))
    if int(machines) != settings.nodes:
        raise RunError(f"nodes: srun has started processes on {machines} machines, but --nodes is {settings.nodes}")


def check_interactive(settings: TrainSettings) -> None:
    """Check that a single run on several devices is not started from a notebook or an interactive session.

    The further processes are started with the same script, which such a session does not have.

    Raises:
        RunError: it is.
    """
    interactive = getattr(sys.modules.get("__main__"), "__file__", None) is None
    if settings.devices * settings.nodes > 1 and interactive and number_of_processes() == 1:
        raise RunError(
            f"devices: {settings.devices} processes cannot be started from a notebook or an interactive session; use devices=1, "
            "a script or the command line"
        )


def has_bf16() -> bool:
    """Whether the CPU computes in bf16 at least as quickly as in float32.

    PyTorch's kernels for it need AVX-512; on older CPUs it is emulated, and a convolution takes about ten times as long.
    """
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")


def seed_everything(seed: int) -> None:
    """Seed the random generators of torch, numpy and python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries below may still use the global generator
    random.seed(seed)


def hardware() -> str:
    """The GPUs, or the CPU with its number of threads, in one line."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {counted(torch.get_num_threads(), 'thread')}"
