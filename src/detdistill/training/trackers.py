"""Tracking services to which a run also logs its losses and scores: Weights & Biases and MLflow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from detdistill.cache.storage import masked
from detdistill.errors import RunError
from detdistill.processes import is_main_process


def tracker(service: str, folder: Path, config: dict[str, Any]) -> Logger:
    """The Lightning logger of a service, which is started at once, so that a run is refused before it trains.

    The services' own environment variables hold: ``WANDB_MODE``, ``WANDB_PROJECT`` (default ``detdistill``), ``WANDB_DIR``
    (default: the run folder) and others;
    ``MLFLOW_TRACKING_URI`` (default: the folder ``mlruns`` of the run) and ``MLFLOW_EXPERIMENT_NAME`` (default ``detdistill``).

    Args:
        service: ``wandb`` or ``mlflow``.
        folder: the run folder; its name is the name of the run.
        config: settings of the run, shown by the service.

    Raises:
        RunError: the service's package is not installed, or the service cannot be used.
    """
    try:
        logger = _wandb(folder, config) if service == "wandb" else _mlflow(folder, config)
        if is_main_process():
            logger.log_hyperparams(config)  # starts the service
    except ModuleNotFoundError as error:
        raise RunError(f"--track {service}: {error.name or service} is not installed; pip install detdistill[track]") from error
    except Exception as error:  # each service has its own errors
        reason = masked(" ".join(str(error).split()))[:300] or type(error).__name__
        raise RunError(f"--track {service}: {reason}; leave out --track to train without it") from error
    return logger


def _wandb(folder: Path, config: dict[str, Any]) -> Logger:
    import wandb  # noqa: F401 - Lightning's error does not say which package is missing
    from lightning.pytorch.loggers import WandbLogger

    project = os.environ.get("WANDB_PROJECT", "detdistill")
    return WandbLogger(project=project, name=folder.name, save_dir=os.environ.get("WANDB_DIR", folder), config=config)


def _mlflow(folder: Path, config: dict[str, Any]) -> Logger:
    import mlflow  # noqa: F401
    from lightning.pytorch.loggers import MLFlowLogger

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        # MLflow writes to a folder only if told to; without a server, the package has nothing else to write to.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = f"file:{(folder / 'mlruns').absolute()}"
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "detdistill")
    return MLFlowLogger(experiment_name=name, run_name=folder.name, tracking_uri=uri)
