"""Processes that this one starts (they end when it ends, and a signal to it ends them), and its place among those of a run.

The processes of a distributed run are started by this package, by torchrun or by Slurm's srun; their environment numbers them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from detdistill.errors import StoppedError

PARENT = "DETDISTILL_PARENT"
"""Environment variable with the id of the process that started this one and without which it must not go on."""
ATTEMPT = "DETDISTILL_ATTEMPT"
"""Environment variable with the number of times a cluster has started the command of this process before."""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
"""Signals by which users and schedulers end a process; Windows has no SIGHUP."""


def by_srun() -> bool:
    """Whether srun has started this process as one of several; a batch script itself has some of its variables, too."""
    number = os.environ.get("SLURM_NTASKS", "1")
    return number.isdigit() and int(number) > 1 and "SLURM_STEP_ID" in os.environ and not _numbered()


def _numbered() -> bool:
    """Whether torchrun or this package has numbered this process; inside of a Slurm job this comes first."""
    return bool({"RANK", "LOCAL_RANK"} & set(os.environ))


def number_of_processes() -> int:
    """Number of processes of the distributed run to which this one belongs; 1: nobody has started others with it yet."""
    return int(os.environ["SLURM_NTASKS"] if by_srun() else os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Number of this process among those of its machine."""
    return int(os.environ.get("SLURM_LOCALID", 0) if by_srun() else os.environ.get("LOCAL_RANK", 0))


def is_main_process() -> bool:
    """True in a single process and in the first process of a distributed run."""
    if by_srun():
        return int(os.environ.get("SLURM_PROCID", 0)) == 0
    if "RANK" in os.environ:
        return int(os.environ["RANK"]) == 0
    return local_rank() == 0 and int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", 0))) == 0


def restarts() -> int:
    """How often torchrun has started this process again (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def attempt() -> int:
    """How often a cluster has started this command before; each time its worker, or the worker's machine, was lost."""
    given = os.environ.get(ATTEMPT, "0")
    return int(given) if given.isdigit() else 0


def launch() -> str | None:
    """The name that torchrun gives to the launch of this process, also after a restart; None: torchrun has not started it.

    Without ``--rdzv-id`` all launches have the name "none".
    """
    return os.environ.get("TORCHELASTIC_RUN_ID")


def with_parent() -> dict[str, str]:
    """The environment of a process that must end when this process ends."""
    return {**os.environ, PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """End this process soon after its parent, if the parent has asked for it by ``with_parent``.

    The request is taken out of the environment: processes that this one starts have another parent.
    """
    asked = os.environ.pop(PARENT, "")
    if not asked.isdigit() or int(asked) == os.getpid():
        return
    parent = int(asked)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.3)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Context in which SIGTERM and SIGHUP raise a ``StoppedError``, so that the processes this one started can be ended."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise StoppedError(f"stopped by {signal.Signals(number).name}; --resume true continues with the runs that are left")

    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return
    before = {number: signal.signal(number, stop) for number in SIGNALS if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
