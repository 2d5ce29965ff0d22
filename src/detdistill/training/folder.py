"""The run folder: made once, never overwritten, every file written beside and renamed."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from detdistill.errors import RunError
from detdistill.settings import DistillSettings, names_where, renamed


@dataclass(frozen=True)
class RunFolder:
    """Where a run lives."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """``last.ckpt`` and ``best.ckpt``."""
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        """The detector in its own library's form."""
        return self.path / "student"

    @property
    def metrics(self) -> Path:
        """The table of losses and scores."""
        return self.path / "metrics.csv"

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """A JSON file, whole or not at all."""
        write_text(self.path / name, json.dumps(content, indent=2) + "\n")


def new_folder(out: Path | None, name: str) -> Path:
    """The folder a new run will use, which must not exist yet.

    Raises:
        RunError: it exists and holds something.
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
    """Make the folder of a new run and write its ``config.yaml``.

    Raises:
        RunError: it cannot be written, or another run has just taken it.
    """
    folder = RunFolder(path)
    empty_before = path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        folder.checkpoints.mkdir()  # of two runs that start together, one fails here
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
    return RunError(f"run folder {path} exists; give another --out, or --resume true to go on with it")


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot make the run folder {path}: {error.strerror}; give another --out")


def resume_folder(path: Path | None, config: dict[str, Any]) -> RunFolder:
    """The folder of a run that goes on; its settings must be those of this call.

    Raises:
        RunError: no folder given, nothing to resume in it, or a setting differs.
    """
    if path is None:
        raise RunError("--resume true needs --out with the run folder to go on with")
    if not (path / "config.yaml").exists():
        raise RunError(f"{path} holds no run to resume (no config.yaml); leave out --resume to start one")
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


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
