"""What all tests share: one thread each, no network, and one place where the embedded data set is made."""

import os
import shutil
import subprocess
import tempfile

import pytest

# Before torch is imported. The tests run in two processes (-n 2), so one thread each is what two cores can carry.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"


def _seed_the_cpu_only() -> None:
    """Without an accelerator, ``torch.manual_seed`` formats the call stack for each kind of them, in every call."""
    import torch

    for kind in (torch.cuda, torch.xpu, torch.mtia):
        if not kind.is_available():
            kind.manual_seed_all = lambda seed: None


def pytest_configure(config: pytest.Config) -> None:
    """The first process makes a folder for ``digits``; the others inherit its environment, and find what is made there."""
    _seed_the_cpu_only()
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="detdistill-tests-")
        os.environ["DETDISTILL_CACHE"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture
def forked_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of Python that are started in this test, and those that they start, are forks (``tests/forked.py``)."""
    import detdistill.training.run  # noqa: F401 - imported here, forks need not import it again
    from tests.forked import Forked

    monkeypatch.setattr(subprocess, "Popen", Forked)
