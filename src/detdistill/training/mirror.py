"""Run folders at URLs: a run works in a local folder, which is sent to the URL after each checkpoint and fetched to continue.

At the URL, ``files.json`` lists the files of the run with their checksums. Changed files are sent under new names first, then the
list is replaced by one operation, then the former files are removed. So the URL shows a whole run at any moment, and of two
runs that write to it, the one that replaced the list last goes on; the other ends at its next checkpoint. No clocks are compared.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from detdistill.cache.shards import sealed, unsealed
from detdistill.cache.storage import RunStorage, StoreError, is_url, masked, run_storage, url_of
from detdistill.errors import RunError
from detdistill.files import checksum, write_atomically
from detdistill.kept import cache_directory
from detdistill.processes import number_of_processes
from detdistill.settings import TrainSettings
from detdistill.training.lock import LOCK

MARKER = "files.json"
"""The list of a run's files at its URL."""
PIECE = 64 * 1024 * 1024
"""Bytes that are fetched by one request."""
S = TypeVar("S", bound=TrainSettings)


@dataclass(frozen=True)
class Listed:
    """Content of ``files.json``."""

    generation: int
    """Number of times that the list was written."""
    writer: str
    """The run that wrote it: a random name."""
    where: str
    """Process, host and time of its clock, in words."""
    files: Mapping[str, tuple[str, str]]
    """By name: name of the object, and the checksum of its content (``files.checksum``)."""

    def packed(self) -> bytes:
        """The content of the file."""
        content = {"generation": self.generation, "writer": self.writer, "where": self.where}
        return sealed({**content, "files": {name: list(entry) for name, entry in self.files.items()}})


def listed(folder: RunStorage) -> tuple[Listed, str] | None:
    """The list at a URL and its tag; None: there is none.

    Raises:
        CacheError: it is damaged.
        OSError: it cannot be read.
    """
    try:
        content, tag = folder.read_tagged(MARKER)
    except (FileNotFoundError, NotADirectoryError):
        return None
    found = unsealed(content, f"{folder.url}/{MARKER}")
    files = {name: (entry[0], entry[1]) for name, entry in found["files"].items()}
    return Listed(found["generation"], found["writer"], found["where"], files), tag


class Mirror:
    """Sends a local run folder to a URL."""

    def __init__(self, folder: RunStorage, local: Path, known: tuple[Listed, str] | None) -> None:
        """Claim the URL for this run; nothing else is sent yet.

        Args:
            folder: the folder at the URL.
            local: the local folder.
            known: the list at the URL as it was fetched, and its tag; None: a new run.

        Raises:
            RunError: another run has written there meanwhile, or the store cannot be reached.
        """
        self.folder, self.local = folder, local
        self.writer = uuid.uuid4().hex[:8]
        self._tag: str | None
        before, self._tag = known if known is not None else (Listed(0, "", "", {}), None)
        self.list = before
        self._write(before.files)

    def _write(self, files: Mapping[str, tuple[str, str]]) -> None:
        """Replace the list at the URL.

        Raises:
            RunError: another run has replaced it since.
            OSError: the store cannot be reached.
        """
        where = f"process {os.getpid()} on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S')} by its clock"
        new = Listed(self.list.generation + 1, self.writer, where, files)
        tag = self.folder.exchange(MARKER, new.packed(), self._tag)
        if tag is None:
            raise self._taken_over()
        self.list, self._tag = new, tag
        note = note_of(self.local)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, lambda temporary: temporary.write_bytes(new.packed()))

    def _taken_over(self) -> RunError:
        found = listed(self.folder)
        who = found[0].where if found is not None else "somebody who removed its list of files"
        return RunError(
            f"{self.folder.url} was taken over by another run ({who}), so this one ends; what it has trained lies in {self.local}"
        )

    def push(self, last: bool = False) -> None:
        """Send what has changed.

        Args:
            last: the run is finished; all files get their own names.

        Raises:
            RunError: another run writes to the URL.
            OSError: the store cannot be reached or is full; what it shows is the run as it was last sent.
        """
        now = {name: checksum(self.local / name) for name in local_files(self.local)}
        before = self.list.files
        files: dict[str, tuple[str, str]] = {}
        current = listed(self.folder)
        if current is None or current[0].writer != self.writer:
            raise self._taken_over()
        for name, content in now.items():
            entry = before.get(name)
            if entry is not None and entry[1] == content and (entry[0] == name or not last):
                files[name] = entry
                continue
            plain = entry is None or (last and entry[0] != name)
            files[name] = self._send(name, name if plain else f"{name}~{uuid.uuid4().hex[:8]}", content)
        if files == before:
            return
        self._write(files)
        for gone in {entry[0] for entry in before.values()} - {entry[0] for entry in files.values()}:
            self.folder.remove(gone)
        if last and any(entry[0] != name for name, entry in files.items()):
            self.push(last=True)

    def _send(self, name: str, stored: str, content: str) -> tuple[str, str]:
        """Send a file; its entry in the list. Small files may still be written to, so what is sent is read once."""
        path = self.local / name
        if int(content.split()[0]) > PIECE:
            self.folder.send(stored, path)
            return stored, content
        data = path.read_bytes()
        self.folder.write(stored, data)
        return stored, f"{len(data)} {zlib.crc32(data):08x}"


def local_files(folder: Path) -> list[str]:
    """Names of the files of a run that are sent, relative to its folder; temporary files and the lock are not."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name for name in names if not name.endswith((".tmp", LOCK)) and not any(p.startswith(".") for p in name.split("/"))]


def fetch(folder: RunStorage, local: Path, wanted: Callable[[str], bool] = lambda name: True) -> tuple[Listed, str] | None:
    """Fetch the files of a run that the local folder lacks or has with another content.

    Args:
        folder: the folder at the URL.
        local: the local folder; files that are not in the list are left alone.
        wanted: which files.

    Returns:
        The list at the URL and its tag; None: there is none.

    Raises:
        RunError: the list or a file is damaged, missing or cannot be read.
    """
    for attempt in range(3):
        try:
            if (found := listed(folder)) is None:
                return None
            for name, (stored, content) in found[0].files.items():
                path = local / safe_name(name)
                if wanted(name) and not (path.is_file() and checksum(path) == content):
                    fetch_file(folder, stored, path, int(content.split()[0]), content)
        except FileNotFoundError as error:  # the run has just replaced it
            if attempt == 2:
                raise RunError(f"{folder.url}: a file of its {MARKER} is missing; send the run again by --resume true") from error
            continue
        except OSError as error:
            raise RunError(str(error)) from error
        return found
    raise AssertionError


def fetch_file(folder: RunStorage, stored: str, path: Path, size: int, content: str | None = None) -> None:
    """Fetch a file piece by piece, and compare its length and its checksum; a second time if they differ.

    Args:
        folder: the folder at the URL.
        stored: name of the object.
        path: the local file.
        size: its length in bytes.
        content: its checksum; None: unknown.

    Raises:
        RunError: it differs both times.
        OSError: it cannot be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        for _ in range(2):
            crc, arrived = 0, 0
            with temporary.open("wb") as file:
                while arrived < size and (piece := folder.read(stored, arrived, min(size, arrived + PIECE))):
                    file.write(piece)
                    crc, arrived = zlib.crc32(piece, crc), arrived + len(piece)
            if arrived == size and content in (None, f"{arrived} {crc:08x}"):
                os.replace(temporary, path)
                return
    finally:
        temporary.unlink(missing_ok=True)
    raise RunError(f"{folder.url}/{stored} is damaged: it differs from its checksum in {MARKER}; send the run again")


def safe_name(name: str) -> str:
    """A name from a list that somebody else may have written.

    Raises:
        RunError: it leads out of the folder.
    """
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
        raise RunError(f"{MARKER} names a file outside of the run: {name!r}")
    return name


def working_folder(url: str) -> Path:
    """The local folder of the run at a URL, in the user's cache folder; its last part is that of the URL."""
    url = url_of(url).rstrip("/")
    return cache_directory() / "runs" / f"{zlib.crc32(masked(url).encode()):08x}" / (url.rsplit("/", 1)[-1] or "run")


def note_of(local: Path) -> Path:
    """The file beside a working folder with the list as it was last sent."""
    return local.with_name(f"{local.name}.{MARKER}")


@contextmanager
def at_url(settings: S, say: Callable[[str], object]) -> Iterator[tuple[S, Mirror | None]]:
    """Context of a run whose ``out`` may be a URL; it then works in a local folder.

    Args:
        settings: settings of the run.
        say: shows a line.

    Yields:
        The settings with the local folder as ``out``, and what sends it (None: ``out`` is no URL).

    Raises:
        RunError: the URL holds a run already, or none to resume; another run writes to it; or the store cannot be reached.
    """
    if settings.out is None or not is_url(str(settings.out)):
        yield settings, None
        return
    url = url_of(str(settings.out))
    if settings.nodes > 1 or number_of_processes() > 1:
        raise RunError(
            f"out: processes that torchrun or srun starts need a folder that all of them see, and {masked(url)} is a URL; use "
            "--devices alone, or a shared folder"
        )
    folder, local = run_storage(url), working_folder(url)
    known = _before(settings, folder, local)
    try:
        mirror = Mirror(folder, local, known)
    except OSError as error:
        raise RunError(str(error)) from error
    say(f"run folder {folder.url}; it works in {local}")
    if known is not None and known[0].files:
        who = known[0].where
        say(f"continuing a run that was last written by {who}; if that process still runs, it ends at its next checkpoint")
    try:
        yield replace(settings, out=local), mirror
    except BaseException:
        _withdraw(mirror)
        raise
    try:
        mirror.push(last=True)
    except OSError as error:
        raise RunError(f"{error}; the finished run lies in {local}, and --resume true sends it") from error
    say(f"the run is at {folder.url}")


def _before(settings: TrainSettings, folder: RunStorage, local: Path) -> tuple[Listed, str] | None:
    """Make the local folder ready: empty for a new run, else as it is at the URL.

    Raises:
        RunError: see ``at_url``.
    """
    try:
        found = listed(folder)
        if not settings.resume:
            # A list without files is the claim of a run that was killed before it had sent anything.
            if (found is not None and found[0].files) or set(folder.tree()) - {MARKER}:
                raise RunError(f"run folder {folder.url} exists; give another --out, or --resume true to continue the run")
            if (local / "config.yaml").exists():
                raise RunError(
                    f"a run for {folder.url} that was never sent lies in {local}; send it by --resume true, or delete it"
                )
            shutil.rmtree(local, ignore_errors=True)
            return found
    except OSError as error:
        raise RunError(str(error)) from error
    if found is None:
        if (local / "config.yaml").exists():
            return None  # it was never sent
        raise RunError(f"{folder.url} contains no run to resume (no {MARKER}); leave out --resume to start a new one")
    note = _noted(local) if (local / "config.yaml").exists() else None
    if note is not None and (note["generation"], note["writer"]) != (found[0].generation, found[0].writer):
        aside = local.with_name(f"{local.name}.before-{found[0].generation}")
        shutil.rmtree(aside, ignore_errors=True)
        local.rename(aside)  # the run was continued elsewhere; nothing is lost
        note = None
    return found if note is not None else fetch(folder, local)


def _noted(local: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(note_of(local).read_bytes())["content"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _withdraw(mirror: Mirror) -> None:
    """After an error: remove the claim of a run that has sent nothing, so that the same command can start it again."""
    if mirror.list.files or (mirror.local / "config.yaml").exists():
        return
    try:
        found = listed(mirror.folder)
        if found is not None and found[0].writer == mirror.writer:
            mirror.folder.remove(MARKER)
        shutil.rmtree(mirror.local, ignore_errors=True)
    except (OSError, RunError):
        return


def sender(mirror: Mirror | None, say: Callable[[str], object]) -> Callable[[], None] | None:
    """Make the function that a run calls after each checkpoint. A store that fails stops no training; the next call retries."""
    if mirror is None:
        return None

    def send() -> None:
        try:
            mirror.push()
        except StoreError as error:
            say(f"{error}; training goes on, and the next checkpoint is sent again")

    return send
