"""Atomic writing of files (a file is written completely or not at all), and checksums beside files of weights."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER_CHECKSUMS = "checksums.json"
"""Name of the file with the checksums of all weights and descriptions of a folder."""
BLOCK = 1 << 20


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write`` with a temporary path in the same folder, then rename the file to ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def json_by_entry(document: Mapping[str, Any]) -> str:
    r"""A JSON document with a line for each entry of its lists, as of a COCO file: to be read by people, and fast to write.

    >>> print(json_by_entry({"info": {}, "images": [{"id": 1}, {"id": 2}]}), end="")
    {
    "info": {},
    "images": [
     {"id": 1},
     {"id": 2}
    ]
    }
    """
    parts = []
    for key, value in document.items():
        rows = ",\n ".join(map(json.dumps, value)) if isinstance(value, list | tuple) else ""
        parts.append(f"{json.dumps(key)}: " + (f"[\n {rows}\n]" if rows else json.dumps(value)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def checksum(path: Path) -> str:
    """Size in bytes and crc32 of a file, e.g. ``1024 0badcafe``; about 2.5 GB a second.

    Raises:
        OSError: the file cannot be read.
    """
    crc, size = 0, 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return f"{size} {crc:08x}"


def checksum_file(path: Path) -> Path:
    """The file beside ``path`` that holds its checksum."""
    return path.with_name(path.name + ".crc32")


def replace_with_checksum(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path`` and write the checksum beside it; a process may be killed at any moment.

    Two files cannot be renamed at once. So the checksum file first holds the new and the old checksum, then the file is renamed,
    then the old checksum is dropped: at every moment the file agrees with one of the lines.

    Raises:
        OSError: a file cannot be read or written; the previous file and its checksum are kept.
    """
    beside, new = checksum_file(path), checksum(temporary)
    old = [line for line in _lines(beside) if line != new] if path.exists() else []
    write_atomically(beside, lambda file: file.write_text("\n".join([new, *old]) + "\n"))
    os.replace(temporary, path)
    if old:
        write_atomically(beside, lambda file: file.write_text(new + "\n"))


def damage(path: Path) -> str:
    """Compare a file with the checksum beside it.

    Without a checksum file (files of earlier versions), the checksums inside a zip file are compared; torch writes zip files.

    Returns:
        What is wrong, in words; empty if the file is whole.

    Raises:
        OSError: the file cannot be read.
    """
    known = _lines(checksum_file(path))
    if known:
        found = checksum(path)
        if found in known:
            return ""
        sizes = [line.split()[0] for line in known]
        size = found.split()[0]
        if size not in sizes:
            return f"it has {size} bytes and should have {sizes[0]}"
        return f"its content differs from the checksum in {checksum_file(path).name}"
    if not zipfile.is_zipfile(path):
        return ""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError) as error:
        return str(error)
    return "" if wrong is None else f"{wrong} in it differs from its checksum"


def seal_folder(folder: Path, suffixes: Iterable[str] = (".json", ".safetensors")) -> None:
    """Write ``checksums.json``: the checksums of all files of a folder whose names end in one of ``suffixes``.

    Raises:
        OSError: a file cannot be read or written.
    """
    wanted = tuple(suffixes)
    paths = sorted(path for path in folder.iterdir() if path.suffix in wanted and path.name != FOLDER_CHECKSUMS)
    text = json.dumps({path.name: checksum(path) for path in paths}, indent=2) + "\n"
    write_atomically(folder / FOLDER_CHECKSUMS, lambda path: path.write_text(text, encoding="utf-8"))


def unseal_folder(folder: Path) -> None:
    """Remove ``checksums.json`` before the files of a folder are replaced one by one."""
    (folder / FOLDER_CHECKSUMS).unlink(missing_ok=True)


def folder_damage(folder: Path) -> str:
    """Compare the files of a folder with its ``checksums.json``.

    Returns:
        The first file that differs and how, in words; empty if all are whole, or if there are no checksums (folders of earlier
        versions and of other programs).
    """
    try:
        known = json.loads((folder / FOLDER_CHECKSUMS).read_text(encoding="utf-8"))
        wanted = {str(name): str(value) for name, value in known.items()}
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError, AttributeError) as error:
        return f"{FOLDER_CHECKSUMS} cannot be read ({error})"
    for name, value in wanted.items():
        try:
            found = checksum(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        if found != value:
            return f"{name} differs from its checksum in {FOLDER_CHECKSUMS}"
    return ""


def _lines(path: Path) -> list[str]:
    """The lines of a checksum file; empty if there is none."""
    try:
        return [line for line in path.read_text(encoding="ascii", errors="replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return []
