"""Where jobs run: ``--on local``, ``--on ray`` or ``--on ray://HOST:PORT``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from detdistill.jobs.contract import Runner
from detdistill.jobs.local import local_runner

LOCAL = "local"


@contextlib.contextmanager
def runner_on(on: str, say: Callable[[str], None]) -> Iterator[Runner]:
    """A runner, as long as it is needed.

    Args:
        on: ``local``; ``ray``, the cluster of this machine or of the environment variable ``RAY_ADDRESS``; or ``ray://HOST:PORT``.
        say: shows a line, e.g. when a worker was lost.

    Raises:
        RunError: Ray is not installed, or there is no cluster.
    """
    if on == LOCAL:
        with local_runner() as runner:
            yield runner
        return
    from detdistill.jobs.on_ray import ray_runner

    with ray_runner(on, say) as cluster:
        yield cluster
