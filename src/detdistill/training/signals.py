"""How processes that work together end together.

A run with ``--devices 2`` or ``--jobs 2`` has several processes. Each waits for the others in every step, so one that ends alone
would leave the rest waiting for ever, or training unseen. Here a signal to any of them, and the death of any of them, ends all.
Files are written under temporary names and renamed, so a process may end at any moment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import lightning as L

from detdistill.processes import SIGNALS, is_main_process

CONTINUE = "--resume true continues from the last checkpoint"
GRACE = 2.0
"""Seconds in which a process may say by itself why it ends, after another one has ended."""


class EndTogether(L.Callback):
    """Ends all processes of a distributed run when one of them gets a signal or ends."""

    def __init__(self) -> None:
        """Nothing is watched before the training starts."""
        self.before: dict[signal.Signals, Callable[..., Any] | int | None] = {}
        self.ended = threading.Event()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Handle signals, and in the process that started the others, watch them.

        Lightning's own handler of SIGTERM waits for the other processes, which wait for this one.
        """
        if trainer.world_size == 1:
            return
        workers: Sequence[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", None) or ()
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, lambda got, _: _end(workers, got)) for number in SIGNALS}
        threading.Thread(target=self._watch, args=(workers,), name="workers", daemon=True).start()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Stop watching: from now on, each process ends in its own time."""
        self.ended.set()
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _watch(self, workers: Sequence[subprocess.Popen[bytes]]) -> None:
        """End this process and all workers after one of them has ended."""
        while not self.ended.wait(0.2):
            for rank, worker in enumerate(workers, start=1):
                code = worker.poll()
                if code:
                    time.sleep(GRACE)
                    if not self.ended.is_set():
                        _end(workers, code, f"process {rank} of the run")
                    return


def wait_for_the_end() -> None:
    """After an error between processes: time for the process that knows its cause to say it and to end this one."""
    time.sleep(2 * GRACE)


def _end(workers: Sequence[subprocess.Popen[bytes]], code: int, who: str = "") -> NoReturn:
    """Say one line, end the workers and this process.

    Args:
        workers: processes that this one has started.
        code: number of the signal that this process got, or the exit code of ``who`` (negative: killed by a signal).
        who: the process that has ended; empty: this one got a signal.
    """
    number = abs(code) if not who or code < 0 else code - 128 if code > 128 else 0
    name = signal.Signals(number).name if number in set(signal.Signals) else f"exit code {code}"
    if is_main_process():
        with contextlib.suppress(OSError):
            sys.stderr.write(f"\ndetdistill: {who + ' ' if who else ''}stopped by {name}; {CONTINUE}\n")
            sys.stderr.flush()
    for worker in workers:
        with contextlib.suppress(OSError):
            worker.kill()
    os._exit(128 + number if number else 1)
