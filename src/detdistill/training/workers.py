"""The command by which Lightning starts the further processes of a distributed run.

Lightning repeats the command of this process. If that is somebody's script, every worker would run the whole script again: all
calls before this one, and the code after it. A worker must run this run alone.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detdistill.cache.storage import SECRET_URL
from detdistill.processes import PARENT, with_parent
from detdistill.training.plan import Plan


@contextmanager
def workers_run(folder: Path, plan: Plan) -> Iterator[None]:
    """Context in which Lightning starts workers by ``python -m detdistill`` with the settings of a run folder.

    Args:
        folder: the run folder, whose ``config.yaml`` holds the settings.
        plan: the plan of the run.
    """
    import __main__

    before = sys.argv, __main__.__spec__
    environment = {name: os.environ.get(name) for name in (PARENT, SECRET_URL)}
    verb = "train" if plan.distilling is None else "distill"
    settings = ["--config", str(folder / "config.yaml"), "--out", str(folder), "--resume", str(plan.settings.resume).lower()]
    sys.argv = ["detdistill", verb, *settings]
    __main__.__spec__ = importlib.util.find_spec("detdistill.__main__")
    os.environ.update(with_parent())
    if plan.distilling is not None and plan.distilling.cache is not None:
        os.environ[SECRET_URL] = plan.distilling.cache  # config.yaml hides its password
    try:
        yield
    finally:
        sys.argv, __main__.__spec__ = before
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
