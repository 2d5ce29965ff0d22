"""Runs that log to tracking services, offline."""

from __future__ import annotations

from pathlib import Path

import pytest

from detdistill.errors import RunError
from tests.training import small


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ALLOW_FILE_STORE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


def logged(folder: Path, name: str) -> list[str]:
    """The rows of a metric in MLflow's folder."""
    (table,) = folder.rglob(f"metrics/{name}")
    return table.read_text().splitlines()


def test_mlflow_writes_into_the_run_folder(tmp_path: Path):
    small.train(tmp_path / "run", epochs=1, track=("mlflow",))
    assert len(logged(tmp_path / "run" / "mlruns", "val/AP")) == 1
    assert len(logged(tmp_path / "run" / "mlruns", "loss")) == small.STEPS // 2
    assert next((tmp_path / "run" / "mlruns").rglob("params/lr")).read_text() == "0.001"


def test_mlflow_heeds_its_environment_variables(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'elsewhere'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    small.train(tmp_path / "run", epochs=1, track=("mlflow",))
    assert not (tmp_path / "run" / "mlruns").exists()
    assert logged(tmp_path / "elsewhere", "val/AP")
    assert any("name: mine" in meta.read_text() for meta in (tmp_path / "elsewhere").rglob("meta.yaml"))


def test_a_service_that_cannot_be_used_refuses_the_run_in_one_line(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://user:SECRET@host/x")
    with pytest.raises(RunError, match=r"^--track mlflow: .*; leave out --track to train without it$") as caught:
        small.train(tmp_path / "run", epochs=1, track=("mlflow",))
    assert "\n" not in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert not (tmp_path / "run").exists(), "a refused run leaves no folder"


def test_wandb_offline(tmp_path: Path):
    import wandb

    small.train(tmp_path / "run", epochs=1, track=("wandb",))
    wandb.finish()
    (record,) = (tmp_path / "WANDB_DIR").rglob("run-*.wandb")
    content = record.read_bytes()
    assert b"val/AP" in content
    assert b"detdistill" in content
