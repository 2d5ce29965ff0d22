from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training import small


@pytest.fixture(autouse=True)
def one_thread():
    """Forked processes cannot use threads that were started before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a teacher that was trained for an epoch."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    small.train(folder, role="teacher", epochs=1, seed=5)
    return folder
