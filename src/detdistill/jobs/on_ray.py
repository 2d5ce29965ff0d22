"""Jobs as tasks of a Ray cluster.

A task starts the same command as ``local`` does, on the node that Ray chose, and waits for it. So a run on Ray and a run on this
machine are the same thing, and this process needs no state in Ray: runs are followed by their folders, which all nodes share.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import yaml

from detdistill.errors import RunError
from detdistill.jobs.contract import Job, Started
from detdistill.jobs.on_node import Order, work
from detdistill.jobs.versions import versions_of_all

ATTEMPTS = 4
"""How often a job is started at most: once, and again each time its worker was lost."""
REACHED = 5.0
"""Seconds in which the cluster's port must answer. Ray itself waits for half a minute, or for minutes."""
HEALTHY = 15.0
"""Seconds in which Ray at that port must say that it is healthy; this includes the start of a process that asks."""
ENDED = 5.0
"""Seconds in which a cancelled task may end its command, before Ray ends its worker."""


@contextlib.contextmanager
def ray_runner(on: str, say: Callable[[str], None]) -> Iterator[RayRunner]:
    """A runner on a cluster; a connection that is there already (``ray.init`` of the caller) is used and stays open.

    Args:
        on: ``ray`` or ``ray://HOST:PORT``.
        say: shows a line.

    Raises:
        RunError: Ray is not installed, there is no cluster, or it has another version of Ray or Python.
    """
    ray = import_ray(on)
    mine = not ray.is_initialized()
    if mine:
        _connect(ray, on)
    try:
        yield RayRunner(ray, say)
    finally:
        if mine:
            ray.shutdown()


def import_ray(on: str) -> ModuleType:
    """The package ``ray``, which does not send the working folder to the nodes.

    Below ``uv run``, Ray would pack the working folder, with the data in it, send it to all nodes and make an environment there;
    above 512 MiB it refuses. Here nodes share the folder and have their environment already. Who sets the variable decides.

    Raises:
        RunError: Ray is not installed.
    """
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # Ray reads it when it is imported
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise RunError(f"on: {on} needs the package ray: pip install 'detdistill[ray]'") from error


def _connect(ray: ModuleType, on: str) -> None:
    """Connect to the cluster of ``on``.

    Raises:
        RunError: there is none, or it refuses this process.
    """
    address = _address() if on == "ray" else on
    if address is None:
        raise RunError(
            "on: no Ray cluster runs on this machine; start one with `ray start --head`, or give --on ray://HOST:10001"
        )
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        with socket.create_connection((parts.hostname, parts.port or 0), timeout=REACHED):
            pass
    except OSError as error:
        raise RunError(
            f"on: no Ray cluster answers at {address} ({error.strerror or error}); `ray status` there says whether it runs"
            + (", and 10001 is the usual port" if "://" in address else "")
        ) from error
    if "://" not in address and not _is_ray(address):
        raise RunError(
            f"on: what answers at {address} is no Ray cluster, or a broken one; RAY_ADDRESS is HOST:6379 or ray://HOST:10001"
        )
    for left in (2, 1, 0):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
            return
        except Exception as error:  # Ray raises many kinds: other versions, no Ray at the port, a broken cluster
            # For each client, the cluster forks a process, which dies now and then in gRPC's handlers of forks.
            if left and "Starting Ray client server failed" in str(error):
                time.sleep(1)
                continue
            raise RunError(f"on: cannot use the Ray cluster at {address}: {_in_one_line(error)}") from error


def _is_ray(address: str) -> bool:
    """Whether Ray answers at an address. Another process asks: ``ray.init`` would wait for minutes and then end this one."""
    try:
        command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
        return subprocess.run(command, capture_output=True, timeout=HEALTHY, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _address() -> str | None:
    """The cluster of ``RAY_ADDRESS`` or, as ``ray start`` has noted it, of this machine; None: there is none."""
    given = os.environ.get("RAY_ADDRESS", "")
    if given not in ("", "auto", "local"):
        return given
    folder = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if sys.platform == "linux" else None) or "/tmp"
    noted = Path(folder) / "ray" / "ray_current_cluster"
    try:
        return noted.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _in_one_line(error: BaseException) -> str:
    """What an error says, without the coloured marks and the tracebacks of Ray: its last line that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (" ".join(lines) if len(lines) < 6 else lines[-1]) or type(error).__name__


class RayRunner:
    """Starts jobs as tasks of a cluster."""

    def __init__(self, ray: ModuleType, say: Callable[[str], None]) -> None:
        """Made by ``ray_runner``."""
        self.ray, self.say = ray, say
        # Ray would repeat a task by itself, without the word that it is a repetition, so the command would not resume its run.
        self.task = ray.remote(max_retries=0)(work)

    def check(self, job: Job) -> None:
        """Check that a node of the cluster is large enough.

        Raises:
            RunError: none is.
        """
        nodes: list[dict[str, float]] = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if any(node.get("CPU", 0) >= job.cpus and node.get("GPU", 0) >= job.gpus for node in nodes):
            return
        largest = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)), default={})
        wanted, has = _counted(job.cpus, job.gpus), _counted(int(largest.get("CPU", 0)), int(largest.get("GPU", 0)))
        raise RunError(
            f"on: {job.title} needs {wanted} on one node, but the largest node of the Ray cluster has {has}; "
            "give smaller --devices or --threads, or add a node"
        )

    def start(self, job: Job) -> Started:
        """Submit a job; it waits until the cluster has room."""
        return RayJob(self, job)

    def at_once(self, jobs: int) -> int | None:
        """``--jobs`` if it is above 1; else the cluster decides."""
        return jobs if jobs > 1 else None

    def gpus(self, device: str, devices: int) -> int:
        """A GPU for each process, for ``cuda``, and for ``auto`` if the cluster has GPUs at all."""
        has = any(node["Resources"].get("GPU", 0) for node in self.ray.nodes() if node["Alive"])
        return devices if device == "cuda" or (device == "auto" and has) else 0


def _counted(cpus: int, gpus: int) -> str:
    cpu, gpu = f"{cpus} CPU{'s' if cpus != 1 else ''}", f"{gpus} GPU{'s' if gpus != 1 else ''}"
    return f"{cpu} and {gpu}" if gpus else cpu


class RayJob:
    """A job on the cluster; it is submitted again if its worker is lost."""

    def __init__(self, runner: RayRunner, job: Job) -> None:
        """Submit it."""
        self.runner, self.job = runner, job
        self.config = yaml.safe_dump(dict(job.config), sort_keys=False) if job.config else ""
        self.attempt = 0
        self.result: tuple[int, str] | None = None
        self.reference = self._submit()

    def _submit(self) -> Any:
        job = self.job
        order = Order(
            job.verb,
            self.config,
            job.words,
            dict(job.environment),
            str(Path.cwd()),
            None if job.folder is None else str(job.folder),
            self.attempt,
            versions_of_all(),
        )
        # A name of its own, because Ray shows names, while arguments, which may hold passwords, are in no log.
        return self.runner.task.options(num_cpus=job.cpus, num_gpus=job.gpus, name=f"detdistill {job.title}").remote(order)

    def poll(self) -> int | None:
        """The exit code; None: it waits for room or runs.

        Raises:
            RunError: its workers were lost ``ATTEMPTS`` times, no node is large enough any more, or the cluster is gone.
        """
        ray = self.runner.ray
        if self.result is not None:
            return self.result[0]
        try:
            done, _ = ray.wait([self.reference], timeout=0)
            found = ray.get(self.reference) if done else None
        except ray.exceptions.RayTaskError as error:
            found = (1, _of_the_task(error))
        except ray.exceptions.RayError as error:
            if not isinstance(error, _losses(ray)):
                raise RunError(f"{self.job.title}: {_in_one_line(error)}") from error
            self._again(type(error).__name__, error)
            return None
        except ConnectionError as error:
            raise RunError("on: the connection to the Ray cluster was lost; --resume true continues what is left") from error
        if found is None:
            return None
        if found[0] in (-9, 137):  # the kernel's out-of-memory killer, or a person: the node was lost for this run only
            self._again("its process was killed", None)
            return None
        self.result = found
        return self.result[0]

    def _again(self, reason: str, error: BaseException | None) -> None:
        """Submit the job again after its worker was lost."""
        self.attempt += 1
        if self.attempt >= ATTEMPTS:
            raise RunError(
                f"{self.job.title}: its worker was lost {ATTEMPTS} times ({reason}); --resume true continues what is left"
            ) from error
        self.runner.check(self.job)
        self.runner.say(f"{self.job.title}: its worker was lost ({reason}); started again, {self.attempt} of {ATTEMPTS - 1}")
        self.reference = self._submit()

    def last_line(self) -> str:
        """The last line of the command's output."""
        return self.result[1] if self.result is not None else ""

    def kill(self) -> None:
        """Cancel the task, which ends its command; a task that does not end in a few seconds loses its worker."""
        ray = self.runner.ray
        if self.result is not None:
            return
        with contextlib.suppress(Exception):  # the cluster may be gone, too
            ray.cancel(self.reference, force=False)
            if not ray.wait([self.reference], timeout=ENDED)[0]:
                ray.cancel(self.reference, force=True)
                time.sleep(0.5)  # a command ends soon after its worker


def _losses(ray: ModuleType) -> tuple[type[Exception], ...]:
    """Errors of Ray after which a job is started again: it did nothing wrong."""
    known = ray.exceptions
    return (
        known.WorkerCrashedError,
        known.NodeDiedError,
        known.LocalRayletDiedError,
        known.OutOfMemoryError,  # Ray ends a worker when its node's memory is nearly full
        known.ObjectLostError,
    )


def _of_the_task(error: Exception) -> str:
    """What the task itself, not its command, failed with; nearly always a node on which it cannot begin."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ModuleNotFoundError) or "No module named 'detdistill" in str(error):
        return "a node of the Ray cluster has no detdistill; install the same versions on all nodes"
    return _in_one_line(cause)
