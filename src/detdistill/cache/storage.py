"""Folders with atomic writes of whole files: on the local disk, in an S3 bucket, or at any other URL that fsspec knows."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Protocol

from detdistill.cache.local import LocalFolder
from detdistill.cache.remote import SECRET_URL, RemoteFolder
from detdistill.cache.retries import CacheError, StoreError, masked
from detdistill.cache.s3 import S3Folder

__all__ = [
    "SECRET_URL",
    "CacheError",
    "LocalFolder",
    "RemoteFolder",
    "S3Folder",
    "Storage",
    "StoreError",
    "is_url",
    "masked",
    "storage",
]


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


class RunStorage(Storage, Protocol):
    """Operations that a run folder at a URL needs besides."""

    def send(self, name: str, path: Path) -> None:
        """Write a file with the content of a local one, atomically."""
        ...

    def tree(self) -> dict[str, tuple[int, str]]:
        """Size in bytes, and a tag that changes with the content, of all files in the folder and its sub-folders, by name."""
        ...

    def read_tagged(self, name: str) -> tuple[bytearray, str]:
        """Read a small file, and its tag for ``exchange``.

        Raises:
            FileNotFoundError: no such file.
        """
        ...

    def exchange(self, name: str, content: bytes, tag: str | None) -> str | None:
        """Replace the file that has a tag (None: write it if there is none); its new tag, or None: it has another tag."""
        ...


def is_url(text: str) -> bool:
    """Whether a text names a folder behind a network (or in memory), not a local path.

    A ``Path`` of a URL has one slash only; a model string may have one too (``ultralytics:/home/me/best.pt``).

    >>> is_url("s3://bucket/x"), is_url("s3:/bucket/x"), is_url("runs/x"), is_url("file:///runs/x"), is_url("mmdet:/models/x.pth")
    (True, True, False, False, False)
    """
    found = re.match(r"^(?!hf:|file:)([a-z][a-z0-9+.-]+):(/+)", text)
    if found is None or len(found[2]) > 1:
        return found is not None
    from fsspec.registry import known_implementations

    return found[1] in known_implementations


def url_of(text: str) -> str:
    """A URL with the second slash that it loses as a ``Path``."""
    return re.sub(r"^([a-z][a-z0-9+.-]+):/(?!/)", r"\1://", text)


def run_storage(url: str) -> RunStorage:
    """The run folder at a URL.

    Raises:
        CacheError: see ``storage``.
    """
    found = storage(url)
    if isinstance(found, LocalFolder):
        raise CacheError(f"{url} is a local folder, not a URL")
    return found


def storage(url: str) -> LocalFolder | S3Folder | RemoteFolder:
    """The folder at a path or URL; nothing is created yet, and no network is used.

    Raises:
        CacheError: the URL's protocol is unknown, its package is not installed, or there are no credentials for it.
    """
    url = url_of(str(url))
    if not is_url(url):
        return LocalFolder(Path(url.removeprefix("file://")))
    if url.startswith(("s3://", "s3a://")) and (importlib.util.find_spec("obstore") or not importlib.util.find_spec("s3fs")):
        return S3Folder(url)
    return RemoteFolder(url)
