"""The run folder. It is never overwritten; every file is written under a temporary name and renamed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from detdistill.errors import RunError
from detdistill.settings import DistillSettings, names_where, renamed

INPUTS = "inputs.json"
"""Fingerprints of the data and the teacher with which a run started."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of the files of a run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of ``last.ckpt`` and ``best.ckpt``."""
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        """Folder of the trained student, in the format of its own library."""
        return self.path / "student"

    @property
    def metrics(self) -> Path:
        """The table of losses and scores: metrics.csv."""
        return self.path / "metrics.csv"

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        write_text(self.path / name, json.dumps(content, indent=2) + "\n")


def new_folder(out: Path | None, name: str) -> Path:
    """Path of the folder of a new run: ``out``, or one under ``runs/`` from ``name`` and the time. It is not created yet.

    Raises:
        RunError: the folder exists and is not empty, or cannot be read.
    """
    path = out if out is not None else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise RunError(f"cannot use {path} as run folder: {error.strerror}; give another --out") from error
    if taken:
        raise _exists(path)
    return path


def start_folder(path: Path, config: dict[str, Any]) -> RunFolder:
    """Create the folder of a new run and write its ``config.yaml``.

    Raises:
        RunError: the folder cannot be written, or another run has just created it.
    """
    folder = RunFolder(path)
    empty_before = path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        folder.checkpoints.mkdir()  # if two runs start at the same time, one of them fails here
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        write_text(path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    except OSError as error:
        shutil.rmtree(folder.checkpoints if empty_before else path, ignore_errors=True)
        raise _unwritable(path, error) from error
    return folder


def _exists(path: Path) -> RunError:
    return RunError(f"run folder {path} exists; give another --out, or --resume true to continue the run")


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot make the run folder {path}: {error.strerror}; give another --out")


def resume_folder(path: Path | None, config: dict[str, Any]) -> RunFolder:
    """Open the folder of a run to resume; its settings must equal ``config``.

    Raises:
        RunError: no folder is given, it contains no run, or a setting differs.
    """
    if path is None:
        raise RunError("--resume true needs --out with the run folder")
    if not (path / "config.yaml").exists():
        raise RunError(f"{path} contains no run to resume (no config.yaml); leave out --resume to start a new one")
    before = renamed(yaml.safe_load((path / "config.yaml").read_text()))
    free = names_where(DistillSettings, "run", False)
    differing = [key for key in config if key not in free and before.get(key) != config[key]]
    if differing:
        key = differing[0]
        raise RunError(
            f"cannot resume {path}: {key} was {before.get(key)!r} and is now {config[key]!r}; "
            f"use the same settings (--config {path / 'config.yaml'}) or a new --out"
        )
    return RunFolder(path)


def check_inputs(path: Path, now: Mapping[str, str | None]) -> None:
    """Compare the fingerprints of a run's data and teacher with those it started with (``inputs.json``).

    Args:
        path: the run folder; runs of earlier versions have no such file and are not checked.
        now: fingerprints by what they are of, ``training data`` for example; None: there is no such thing.

    Raises:
        RunError: one of them differs.
    """
    file = path / INPUTS
    if not file.is_file():
        return
    before = json.loads(file.read_text())
    changed = [name for name in now if name in before and before[name] != now[name]]
    if changed:
        raise RunError(
            f"cannot resume {path}: the {' and the '.join(changed)} changed since the run started; restore them, start a new run "
            "with another --out, or continue all the same with --allow_changes true"
        )


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
