"""A folder on the local disk, with atomic writes of whole files."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from pathlib import Path

OLD = 24 * 3600
"""Age in seconds from which a temporary file belongs to no running writer."""


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
