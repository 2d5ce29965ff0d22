"""Folders with atomic writes of whole files, on the local disk or at an fsspec URL (s3://, gs://, memory://)."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from detdistill.errors import DetdistillWarning, RunError


class CacheError(RunError):
    """A cache cannot be used or made; the message names the file, the reason and what to do."""


class Storage(Protocol):
    """Operations that a cache needs on its folder. Names of files may contain one ``/``."""

    url: str

    def sizes(self, folder: str) -> dict[str, int]:
        """Size in bytes of each finished file of a sub-folder, by name; empty if there is no such folder.

        Raises:
            OSError: the folder cannot be read.
        """
        ...

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytearray:
        """Read the bytes ``start`` to ``end`` of a file (None: to its end); fewer if the file is shorter.

        Raises:
            FileNotFoundError: no such file.
        """
        ...

    def write(self, name: str, *content: bytes) -> None:
        """Write a file from its parts, atomically: after an error or a kill, no part of it is visible."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file; a missing file is no error."""
        ...

    def clean(self, folder: str, start: str) -> None:
        """Remove what killed writers left in a sub-folder: temporary files that begin with ``start`` or are old."""
        ...

    def free_bytes(self) -> int | None:
        """Free space in bytes; None if unknown."""
        ...


SECRET_URL = "DETDISTILL_CACHE_URL"
"""Environment variable with the whole URL of a cache whose password is hidden in ``config.yaml`` (``user:***@host``)."""
OLD = 24 * 3600
"""Age in seconds from which a temporary file belongs to no running writer."""


def masked(text: str) -> str:
    """Hide the passwords and keys of all URLs in a text.

    >>> masked("s3://me:pass/word@host/folder?token=abc&part=1")
    's3://me:***@host/folder?token=***&part=1'
    """
    text = re.sub(r"(?<=://)([^/@:\s]*):[^@\s]*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&][\w-]*(?:token|key|secret|password|signature|sig)[\w-]*=)[^&\s]+", r"\1***", text)


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

    def write(self, name: str, *content: bytes) -> None:
        """Write a temporary file beside the final one, flush it to the disk, then rename it."""
        final = self.path / name
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with temporary.open("wb") as file:
                file.writelines(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def remove(self, name: str) -> None:
        """See ``Storage``."""
        (self.path / name).unlink(missing_ok=True)

    def clean(self, folder: str, start: str) -> None:
        """See ``Storage``."""
        with contextlib.suppress(OSError):
            for path in (self.path / folder).glob("*.tmp"):
                if path.name.startswith(start) or time.time() - path.stat().st_mtime > OLD:
                    path.unlink(missing_ok=True)

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

        self.url = masked(url)
        if "***" in url:
            url = os.environ.get(SECRET_URL, "")
            if masked(url) != self.url:
                raise CacheError(f"cache {self.url}: its password is not stored; give the whole URL, or set {SECRET_URL} to it")
        elif self.url != url:
            warnings.warn(
                f"the password in {self.url} is hidden in all files of the run; better give it to the storage by its own "
                "environment variables or configuration files",
                DetdistillWarning,
                stacklevel=2,
            )
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except Exception as error:  # each file system has its own errors, e.g. ftplib's and botocore's
            raise CacheError(f"cache {self.url}: {_reason(error)}") from error

    def sizes(self, folder: str) -> dict[str, int]:
        """See ``Storage``."""
        self._files.invalidate_cache()
        try:
            with _reached():
                found = self._files.ls(f"{self._root}/{folder}", detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in found if entry["type"] == "file"}

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytearray:
        """See ``Storage``."""
        with _reached():
            return bytearray(self._files.cat_file(f"{self._root}/{name}", start=start, end=end))

    def write(self, name: str, *content: bytes) -> None:
        """See ``Storage``."""
        path = f"{self._root}/{name}"
        with _reached():
            self._files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            self._files.pipe_file(path, content[0] if len(content) == 1 else b"".join(content))

    def remove(self, name: str) -> None:
        """See ``Storage``."""
        with _reached():
            if self._files.exists(f"{self._root}/{name}"):
                self._files.rm_file(f"{self._root}/{name}")

    def clean(self, folder: str, start: str) -> None:
        """Nothing to do: an upload is visible only when it is complete."""

    def free_bytes(self) -> int | None:
        """None: unknown."""
        return None


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """Context in which the errors of a remote file system that are not OSErrors become one.

    Raises:
        OSError: with the reason, without passwords.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """What an error says, in one line and without passwords."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return masked(" ".join(said.split())) or type(error).__name__
