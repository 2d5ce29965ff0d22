"""The run folder. It is never overwritten; every file is written under a temporary name and renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from detdistill.cache.storage import is_url, masked, url_of
from detdistill.errors import RunError
from detdistill.processes import launch, restarts
from detdistill.settings import DistillSettings, TrainSettings, as_plain, names_where, renamed
from detdistill.training.lock import locked

INPUTS = "inputs.json"
"""Fingerprints of the data and the teacher with which a run started."""
LAUNCH = "launch.json"
"""Name of torchrun's launch that trains in the folder; processes that it starts again continue the run."""
S = TypeVar("S", bound=TrainSettings)


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

    def discard(self, folder_too: bool) -> None:
        """Remove a run in which nothing was trained, so that the same command can start it again.

        Nothing is removed if there is a checkpoint or a row of losses.

        Args:
            folder_too: remove the folder itself, because the run has created it.
        """
        with contextlib.suppress(OSError):
            trained = self.metrics.exists() and len(self.metrics.read_text(encoding="utf-8").splitlines()) > 1
            if trained or (self.checkpoints.exists() and any(self.checkpoints.iterdir())):
                return
        for entry in (self.path,) if folder_too else tuple(self.path.iterdir()):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        write_text(self.path / name, json.dumps(content, indent=2) + "\n")


def new_folder(out: Path | None, name: str) -> Path:
    """Path of the folder of a new run: ``out``, or one under ``runs/`` from ``name`` and the time. It is not created yet.

    Raises:
        RunError: the folder exists and is not empty, or cannot be read.
    """
    if out is not None and is_url(str(out)):
        raise RunError(
            f"out: {masked(url_of(str(out)))} is a URL, which only single runs of train and distill write to; give a folder"
        )
    path = out if out is not None else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        taken = path.exists() and (not path.is_dir() or any(not _left_over(entry) for entry in path.iterdir()))
    except OSError as error:
        raise RunError(f"cannot use {path} as run folder: {error.strerror}; give another --out") from error
    if taken:
        raise _exists(path)
    return path


def start_folder(path: Path, config: dict[str, Any]) -> RunFolder:
    """Create the folder of a new run. It is a run from the moment it has its ``config.yaml``, which appears whole.

    Raises:
        RunError: the folder cannot be written, or another run has just created it.
    """
    folder, there_before, mine = RunFolder(path), path.exists(), False
    try:
        path.mkdir(parents=True, exist_ok=True)
        _write_first(path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        mine = True
        folder.checkpoints.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        if mine:
            (path / "config.yaml").unlink(missing_ok=True)
        if not there_before:
            with contextlib.suppress(OSError):  # another process may have started its run in it meanwhile
                path.rmdir()
        raise _unwritable(path, error) from error
    return folder


def note_launch(folder: RunFolder) -> None:
    """Write which launch of torchrun trains in a folder. A full disk is reported where results are written."""
    if (name := launch()) is not None:
        with contextlib.suppress(OSError):
            folder.write_json(LAUNCH, {"launch": name})


def forget_launch(path: Path) -> None:
    """Make sure that the processes of this launch do not continue, when they are started again, what an earlier one began.

    Nothing happens if a process is training in the folder.
    """
    if launch() is not None and not restarts() and (path / LAUNCH).exists():
        with contextlib.suppress(RunError, OSError), locked(path):
            (path / LAUNCH).unlink(missing_ok=True)


def after_restart(settings: S) -> S:
    """The settings of a run, with ``resume`` if torchrun has started its processes again after one of them had died.

    Only a run that the same launch has begun is continued; in any other folder the new processes report what the first did.
    """
    if settings.resume or settings.out is None or not restarts():
        return settings
    try:
        mine = json.loads((settings.out / LAUNCH).read_text(encoding="utf-8")).get("launch") == launch()
    except (OSError, ValueError, AttributeError):
        return settings
    return replace(settings, resume=True) if mine and not (settings.out / "summary.json").exists() else settings


def _write_first(path: Path, text: str) -> None:
    """Write a file that must not exist, whole or not at all.

    Raises:
        FileExistsError: it exists; of two processes that write it at the same time, one gets this error.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, path)  # unlike a rename, it fails if the file exists
        except FileExistsError:
            raise
        except OSError:  # some disks have no links
            if path.exists():  # the process that was first has also removed the temporary file of this one
                raise FileExistsError(path) from None
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for entry in path.parent.iterdir():
        if _left_over(entry):
            entry.unlink(missing_ok=True)


def _left_over(path: Path) -> bool:
    """True for the temporary file of a process that was killed while it started a run."""
    return path.name.startswith(".config.yaml.")


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
    before = _config_of(path / "config.yaml")
    free = names_where(DistillSettings, "run", False)
    differing = [key for key in config if key not in free and before.get(key) != config[key]]
    if differing:
        key = differing[0]
        raise RunError(
            f"cannot resume {path}: {key} was {before.get(key)!r} and is now {config[key]!r}; "
            f"use the same settings (--config {path / 'config.yaml'}) or a new --out"
        )
    folder = RunFolder(path)
    try:
        folder.checkpoints.mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    return folder


def _config_of(path: Path) -> dict[str, Any]:
    """The settings of a run, with today's names.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"{path} cannot be read: {' '.join(str(error).split())}; start a new run with another --out") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no settings; start a new run with another --out")
    return {**as_plain(DistillSettings()), **renamed(content)}  # a setting that did not exist yet had today's default


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
    try:
        before = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{file} cannot be read: {error}; continue without this comparison with --allow_changes true") from error
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
