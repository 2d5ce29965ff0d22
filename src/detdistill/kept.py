"""Results that are kept in the user's cache folder, each with a key that says what it was computed from.

A kept result is used only if its key is equal to the key asked for. Files are written completely or not at all. A folder that
cannot be written, and a file that cannot be read, are the same as no result: it is computed again, in silence.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import zlib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from detdistill.files import write_atomically


def cache_directory() -> Path:
    """Folder for generated files: ``DETDISTILL_CACHE``, or ``detdistill`` in the user's cache directory."""
    given = os.environ.get("DETDISTILL_CACHE")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "detdistill"


def read_kept(name: str, key: str) -> Any | None:
    """The content kept under a name, or None: nothing is kept, it has another key, or it cannot be read."""
    try:
        kept = json.loads((cache_directory() / f"{name}.json").read_bytes())
        return kept["content"] if kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # RuntimeError: a user without a home folder
        return None


def keep(name: str, key: str, content: Any) -> None:
    """Keep a content, anything that JSON can hold, in place of what was kept under the name before.

    Args:
        name: name of the file without suffix; a folder before a slash is created.
        key: what the content was computed from.
        content: the content.
    """
    text = json.dumps({"key": key, "content": content})
    with suppress(OSError, RuntimeError):
        file = cache_directory() / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))


@functools.cache
def software() -> str:
    """The software that results depend on, as text: Python, the machine, this package's files and its requirements.

    The files count with their content, because an editable installation changes without a new version. A requirement that is
    not installed counts as that. All is read once in a process, as modules are.
    """
    crc = 0
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        crc = zlib.crc32(path.read_bytes(), zlib.crc32(path.name.encode(), crc))
    known = [platform.python_version(), platform.machine(), f"detdistill {crc:08x}"]
    names = sorted({_name(line) for line in requires("detdistill") or ()})
    return ", ".join(known + [f"{name} {_version(name)}" for name in names])


def _name(requirement: str) -> str:
    """The package's name of a requirement such as ``jsonargparse[signatures]>=4.40``."""
    end = next((place for place, char in enumerate(requirement) if not (char.isalnum() or char in "-_.")), len(requirement))
    return requirement[:end].lower()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
