"""Atomic writing of files: a file is written completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write`` with a temporary path in the same folder, then rename the file to ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
