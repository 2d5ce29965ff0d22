"""Processes of Python that begin with everything imported: forks of the process that starts them.

A new interpreter imports torch, Lightning and timm for many seconds before it does what a test is about. With the fixture
``forked_python``, ``subprocess`` starts ``python -m``, ``python -c`` and scripts as forks, in the test and in all that it calls.
All else is real: an own process, a child of the one that starts it, with its own arguments, environment, streams and exit code.
A test that is about a new interpreter (what is imported, what an import changes) does without, and so does one test of a
distributed run from the command line.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import importlib
import logging
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn


class Forked(subprocess.Popen):
    """``subprocess.Popen`` that forks this process for commands of this Python; all other commands are run as ever."""

    def __init__(self, args: Any, *rest: Any, **settings: Any) -> None:
        """Start a command.

        Args:
            args: the command; a list whose first item is ``sys.executable`` is forked.
            rest: as ``subprocess.Popen`` has them.
            settings: likewise.
        """
        if not isinstance(args, str | os.PathLike) and args[0] == sys.executable:
            words = [os.fspath(word) for word in args[1:]]
            settings["preexec_fn"] = functools.partial(_run, words, settings.get("env"))  # never returns: nothing is executed
        super().__init__(args, *rest, **settings)


def _run(words: Sequence[str], environment: Mapping[str, str] | None) -> NoReturn:
    """In the new process, whose streams are in place: do what ``python WORDS`` does, and end."""
    code = 1
    try:
        _begin(environment)
        code = _exit_code(words)
        threading._shutdown()  # type: ignore[attr-defined]
        multiprocessing.util._exit_function()  # type: ignore[attr-defined]
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _begin(environment: Mapping[str, str] | None) -> None:
    """Forget what belongs to the process that was forked: open files, streams, environment, signals, warnings, logs."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in [int(name) for name in os.listdir("/dev/fd")]:
        if number > 2 and number != nothing:
            with contextlib.suppress(OSError):
                os.fstat(number)  # the listing's own is closed again
                os.dup2(nothing, number, inheritable=False)  # not closed: objects of before still hold the number
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode, closefd=False) for number, mode in enumerate("rww"))  # noqa: SIM115
    sys.stderr.reconfigure(line_buffering=True)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None  # found anew, from TMPDIR
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    faulthandler.disable()
    importlib.reload(warnings)
    logging.root.handlers.clear()
    for logger in list(logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stderr  # setStream would flush the old one, which a captured test has closed
    multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]
    gc.enable()


def _exit_code(words: Sequence[str]) -> int:
    """Run a module, a text or a script; the exit code."""
    try:
        kind, *rest = words
        if kind == "-m":
            sys.argv = ["-m", *rest[1:]]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
        else:
            sys.argv = list(words)
            sys.path.insert(0, str(Path(kind).parent))
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
