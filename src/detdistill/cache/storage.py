"""Folders with atomic writes of whole files, on the local disk or at an fsspec URL (s3://, gs://, memory://)."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Protocol

from detdistill.errors import RunError


class CacheError(RunError):
    """A cache cannot be used or made; the message names the file, the reason and what to do."""


class Storage(Protocol):
    """Operations that a cache needs on its folder. Names of files may contain one ``/``."""

    url: str

    def sizes(self, folder: str) -> dict[str, int]:
        """Size in bytes of each finished file of a sub-folder, by name; empty if there is no such folder."""
        ...

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytearray:
        """Read the bytes ``start`` to ``end`` of a file (None: to its end); fewer if the file is shorter.

        Raises:
            FileNotFoundError: no such file.
        """
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically: after an error or a kill, no part of it is visible."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file; a missing file is no error."""
        ...

    def free_bytes(self) -> int | None:
        """Free space in bytes; None if unknown."""
        ...


def storage(url: str) -> Storage:
    """The folder at a path or URL; nothing is created yet.

    Raises:
        CacheError: the URL's protocol is unknown or its package is not installed.
    """
    # A URL that went through Path has lost one of its two slashes.
    url = re.sub(r"^([a-z][a-z0-9+.-]+):/(?!/)", r"\1://", str(url))
    if "://" not in url or url.startswith("file://"):
        return LocalFolder(Path(url.removeprefix("file://")))
    return RemoteFolder(url)


class LocalFolder:
    """A local folder (or one on a mounted network disk)."""

    def __init__(self, path: Path) -> None:
        self.path, self.url = path, str(path)

    def sizes(self, folder: str) -> dict[str, int]:
        """See ``Storage``."""
        try:
            with os.scandir(self.path / folder) as entries:
                return {e.name: e.stat().st_size for e in entries if e.is_file() and not e.name.endswith(".tmp")}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytearray:
        """See ``Storage``."""
        with open(self.path / name, "rb", buffering=0) as file:
            if end is None:
                end = os.fstat(file.fileno()).st_size
            file.seek(start)
            content = bytearray(max(0, end - start))
            view, done = memoryview(content), 0
            while done < len(content) and (count := file.readinto(view[done:])):
                done += count
        view.release()
        del content[done:]
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a temporary file beside the final one, flush it to the disk, then rename it."""
        final = self.path / name
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def remove(self, name: str) -> None:
        """See ``Storage``."""
        (self.path / name).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        """Free space in bytes on the disk that holds (or will hold) the folder."""
        existing = self.path.absolute()
        while not existing.exists():
            existing = existing.parent
        return shutil.disk_usage(existing).free


class RemoteFolder:
    """A folder at an fsspec URL. Each ``write`` is a single upload; object stores show it only when it is complete."""

    def __init__(self, url: str) -> None:
        import fsspec  # imported here: most caches are local

        self.url = url
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise CacheError(f"cache {url}: {error}") from error

    def sizes(self, folder: str) -> dict[str, int]:
        """See ``Storage``."""
        self._files.invalidate_cache()
        try:
            found = self._files.ls(f"{self._root}/{folder}", detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in found if entry["type"] == "file"}

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytearray:
        """See ``Storage``."""
        return bytearray(self._files.cat_file(f"{self._root}/{name}", start=start, end=end))

    def write(self, name: str, content: bytes) -> None:
        """See ``Storage``."""
        path = f"{self._root}/{name}"
        self._files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        self._files.pipe_file(path, content)

    def remove(self, name: str) -> None:
        """See ``Storage``."""
        if self._files.exists(f"{self._root}/{name}"):
            self._files.rm_file(f"{self._root}/{name}")

    def free_bytes(self) -> int | None:
        """None: unknown."""
        return None
