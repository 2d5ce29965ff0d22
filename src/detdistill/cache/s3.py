"""A folder in a bucket of S3, or of a server with its interface (MinIO, Ceph, R2), by the package obstore."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from detdistill.cache.retries import CacheError, ShortReadError, masked, patiently, status_of

if TYPE_CHECKING:
    from obstore.store import S3Store

PART_BYTES = 8 * 1024 * 1024
"""Larger files are sent in parts of this size; a part that fails is sent again alone."""
PARTS_AT_ONCE = 4
REPEATS = 2
"""Times that obstore itself repeats a request (in a multipart upload: of one part) before the whole operation is repeated."""
CONNECT_SECONDS = 10
REQUEST_SECONDS = 120
"""Longest duration of a request: of one part of an upload, of one range of a read."""
CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_METADATA_ENDPOINT",
    "AWS_SKIP_SIGNATURE",
)
"""Environment variables one of which must be set; without them, obstore would ask the network for a role of the machine."""
T = TypeVar("T")


class S3Folder:
    """A folder (a prefix) in a bucket. Credentials, region and endpoint come from the environment (``AWS_...``) only."""

    def __init__(self, url: str) -> None:
        self.url = masked(url).rstrip("/")
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query:
            raise CacheError(
                f"{self.url}: keys and options in an s3:// URL are not used; set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
                "AWS_ENDPOINT_URL in the environment, and give s3://bucket/folder"
            )
        if not parts.netloc:
            raise CacheError(f"{self.url}: no bucket; give s3://bucket/folder")
        if not any(os.environ.get(name) for name in CREDENTIALS):
            raise CacheError(
                f"{self.url}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment "
                "(AWS_SKIP_SIGNATURE=true for a public bucket)"
            )
        self._store = _opened(parts.netloc, parts.path.strip("/"), self.url)

    def _patiently(self, verb: str, name: str, operation: Callable[[], T]) -> T:
        return patiently(f"{verb} {self.url}/{name}".rstrip("/"), operation)

    def sizes(self, folder: str) -> dict[str, int]:
        """See ``Storage``."""
        import obstore

        found = self._patiently("list", folder, lambda: obstore.list_with_delimiter(self._store, folder or None))
        return {one["path"].rsplit("/", 1)[-1]: one["size"] for one in found["objects"]}

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytearray:
        """See ``Storage``. What arrives is compared with the announced length, and read again if it is shorter."""
        import obstore

        def read() -> bytearray:
            if end is not None:
                asked: Any = {"range": (start, end)}
            else:
                asked = {"range": {"offset": start}} if start else {}
            try:
                answer = obstore.get(self._store, name, options=asked)
            except Exception as error:
                if status_of(error) == 416:  # the range begins behind the end of the file
                    return bytearray()
                raise
            content = bytearray(answer.bytes())
            first, last = answer.range
            if len(content) < last - first:
                raise ShortReadError(f"{len(content)} of {last - first} bytes arrived")
            return content

        return self._patiently("read", name, read) if end is None or end > start else bytearray()

    def write(self, name: str, *content: bytes) -> None:
        """See ``Storage``.

        A large file is sent in parts, which the store puts together when all have arrived: no part of it is ever visible. A part
        that fails is sent again alone, ``REPEATS`` times; after that, the upload is aborted and the whole file is sent again.
        """
        import obstore

        size = sum(map(len, content))

        def write() -> None:
            # Blocks of a large file are not joined, so that it is in memory once.
            file = content if size > PART_BYTES else b"".join(content)
            try:
                obstore.put(self._store, name, file, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)
            except FileNotFoundError as error:  # only the bucket can be missing
                raise RuntimeError(str(error)) from error
            if (arrived := obstore.head(self._store, name)["size"]) != size:
                raise ShortReadError(f"{arrived} of {size} bytes arrived")

        self._patiently("write", name, write)

    def send(self, name: str, path: Path) -> None:
        """See ``RunStorage``; in parts as ``write``, read from the disk."""
        import obstore

        size = path.stat().st_size

        def send() -> None:
            try:
                obstore.put(self._store, name, path, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)
            except FileNotFoundError as error:
                raise RuntimeError(str(error)) from error
            if (arrived := obstore.head(self._store, name)["size"]) != size:
                raise ShortReadError(f"{arrived} of {size} bytes arrived")

        self._patiently("write", name, send)

    def tree(self) -> dict[str, tuple[int, str]]:
        """See ``RunStorage``."""
        import obstore

        found = self._patiently("list", "", lambda: obstore.list(self._store).collect())
        return {one["path"]: (one["size"], str(one["e_tag"])) for one in found}

    def read_tagged(self, name: str) -> tuple[bytearray, str]:
        """See ``RunStorage``."""
        import obstore

        def read() -> tuple[bytearray, str]:
            answer = obstore.get(self._store, name)
            return bytearray(answer.bytes()), str(answer.meta["e_tag"])

        return self._patiently("read", name, read)

    def exchange(self, name: str, content: bytes, tag: str | None) -> str | None:
        """See ``RunStorage``; by the store itself (``If-Match``, ``If-None-Match``), so that of two writers one succeeds."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        def exchange() -> str | None:
            try:
                return str(obstore.put(self._store, name, content, mode="create" if tag is None else {"e_tag": tag})["e_tag"])
            except (AlreadyExistsError, PreconditionError):
                return None
            except FileNotFoundError as error:
                raise RuntimeError(str(error)) from error

        made = self._patiently("write", name, exchange)
        if made is None:  # perhaps by this very call, whose first answer was lost
            there, found = self.read_tagged(name)
            return found if there == content else None
        return made

    def remove(self, name: str) -> None:
        """See ``Storage``."""
        import obstore

        self._patiently("remove", name, lambda: obstore.delete(self._store, name))

    def clean(self, folder: str, start: str) -> None:
        """Nothing to do: an upload is visible only when it is complete."""

    def free_bytes(self) -> int | None:
        """None: unknown."""
        return None


def _opened(bucket: str, prefix: str, url: str) -> S3Store:
    """The store of a bucket, with the settings of the environment.

    Raises:
        CacheError: obstore is not installed, or a setting in the environment is wrong.
    """
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise CacheError(f"{url}: S3 needs the package obstore; pip install 'detdistill[s3]'") from error
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    config: Any = {"endpoint": endpoint} if endpoint else {}
    try:
        return S3Store(
            bucket,
            prefix=prefix or None,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": f"{CONNECT_SECONDS}s",
                "timeout": f"{REQUEST_SECONDS}s",
            },
            retry_config={"max_retries": REPEATS},
            config=config,
        )
    except Exception as error:  # obstore's errors have no common name for wrong settings
        raise CacheError(f"{url}: {str(error).splitlines()[0]}; check the variables AWS_...") from error
