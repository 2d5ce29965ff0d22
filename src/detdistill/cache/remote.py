"""A folder at a URL that fsspec knows (gs://, az://, sftp://, memory://; s3:// where s3fs is installed and obstore is not)."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from detdistill.cache.retries import CacheError, ShortReadError, masked, patiently, reason_of
from detdistill.errors import DetdistillWarning

SECRET_URL = "DETDISTILL_CACHE_URL"
"""Environment variable with the whole URL of a cache whose password is hidden in ``config.yaml`` (``user:***@host``)."""
BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"})
"""Protocols whose folders are only prefixes: nothing is made for them, and a missing bucket is not created."""
T = TypeVar("T")


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
            raise CacheError(f"cache {self.url}: {reason_of(error)}") from error
        self._has_folders = url.partition("://")[0] not in BUCKETS

    def _patiently(self, verb: str, name: str, operation: Callable[[], T]) -> T:
        return patiently(f"{verb} {self.url}/{name}".rstrip("/"), operation)

    def sizes(self, folder: str) -> dict[str, int]:
        """See ``Storage``."""

        def list_folder() -> list[dict[str, object]]:
            self._files.invalidate_cache()
            found: list[dict[str, object]] = self._files.ls(f"{self._root}/{folder}".rstrip("/"), detail=True)
            return found

        try:
            found = self._patiently("list", folder, list_folder)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {str(one["name"]).rsplit("/", 1)[-1]: int(str(one["size"])) for one in found if one["type"] == "file"}

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytearray:
        """See ``Storage``. A whole file is compared with its announced size, and read again if it is shorter."""
        path = f"{self._root}/{name}"

        def read() -> bytearray:
            content = bytearray(self._files.cat_file(path, start=start or None, end=end))
            if end is None:
                self._files.invalidate_cache()
                if len(content) < (size := self._files.info(path)["size"] - start):
                    raise ShortReadError(f"{len(content)} of {size} bytes arrived")
            return content

        return self._patiently("read", name, read)

    def write(self, name: str, *content: bytes) -> None:
        """See ``Storage``. After an interruption the whole file is sent again."""
        path = f"{self._root}/{name}"

        def write() -> None:
            if self._has_folders:
                self._files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            self._files.pipe_file(path, content[0] if len(content) == 1 else b"".join(content))

        self._found_out("write", name, write)

    def _found_out(self, verb: str, name: str, operation: Callable[[], None]) -> None:
        """``_patiently``, for an operation to which a missing folder is an error as any other.

        Raises:
            StoreError: see ``patiently``.
        """

        def told() -> None:
            try:
                operation()
            except FileNotFoundError as error:
                raise RuntimeError(f"not found: {error}") from error

        self._patiently(verb, name, told)

    def send(self, name: str, path: Path) -> None:
        """See ``RunStorage``."""
        remote = f"{self._root}/{name}"

        def send() -> None:
            if self._has_folders:
                self._files.makedirs(remote.rsplit("/", 1)[0], exist_ok=True)
            self._files.put_file(str(path), remote)

        self._found_out("write", name, send)

    def tree(self) -> dict[str, tuple[int, str]]:
        """See ``RunStorage``."""

        def list_all() -> dict[str, dict[str, object]]:
            self._files.invalidate_cache()
            found: dict[str, dict[str, object]] = self._files.find(self._root, detail=True)
            return found

        found = self._patiently("list", "", list_all)
        start = len(self._root.rstrip("/")) + 1
        tags = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created")
        return {
            name[start:]: (int(str(one["size"])), str(next((one[tag] for tag in tags if one.get(tag)), "")))
            for name, one in found.items()
        }

    def read_tagged(self, name: str) -> tuple[bytearray, str]:
        """See ``RunStorage``; the tag is the content's checksum."""
        content = self.read(name)
        return content, f"{len(content)} {zlib.crc32(content):08x}"

    def exchange(self, name: str, content: bytes, tag: str | None) -> str | None:
        """See ``RunStorage``. Most protocols have no such operation: between the comparison and the write is a short while."""
        try:
            _, found = self.read_tagged(name)
        except FileNotFoundError:
            found = ""
        if found != (tag or ""):
            return None
        self.write(name, content)
        return f"{len(content)} {zlib.crc32(content):08x}"

    def remove(self, name: str) -> None:
        """See ``Storage``."""

        def remove() -> None:
            self._files.invalidate_cache()
            if self._files.exists(f"{self._root}/{name}"):
                self._files.rm_file(f"{self._root}/{name}")

        self._patiently("remove", name, remove)

    def clean(self, folder: str, start: str) -> None:
        """Nothing to do: an upload is visible only when it is complete."""

    def free_bytes(self) -> int | None:
        """None: unknown."""
        return None
