"""The command by which Lightning starts the further processes of a distributed run.

Lightning repeats the command of this process. If that is somebody's script, every worker would run the whole script again: all
calls before this one, and the code after it. A worker must run this run alone.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def workers_run(folder: Path, distilled: bool, resuming: bool) -> Iterator[None]:
    """Context in which Lightning starts workers by ``python -m detdistill`` with the settings of a run folder.

    Args:
        folder: the run folder, whose ``config.yaml`` holds the settings.
        distilled: the command is ``distill``, else ``train``.
        resuming: the run continues from its last checkpoint.
    """
    import __main__

    before = sys.argv, __main__.__spec__
    verb = "distill" if distilled else "train"
    settings = ["--config", str(folder / "config.yaml"), "--out", str(folder), "--resume", str(resuming).lower()]
    sys.argv = ["detdistill", verb, *settings]
    __main__.__spec__ = importlib.util.find_spec("detdistill.__main__")
    try:
        yield
    finally:
        sys.argv, __main__.__spec__ = before
