"""Processes that this one starts: they end when it ends, and a signal to it ends them."""

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
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
"""Signals by which users and schedulers end a process; Windows has no SIGHUP."""


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
