"""Local copies of runs, students and files at URLs, kept in the user's cache folder and fetched again only where they differ."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

from detdistill.cache.storage import RunStorage, is_url, masked, run_storage, url_of
from detdistill.errors import RunError
from detdistill.files import write_atomically
from detdistill.kept import cache_directory
from detdistill.training.mirror import MARKER, fetch, fetch_file, listed, safe_name

DEEP = ("checkpoints", "tensorboard")
"""Folders of a run that are fetched only if the URL names them."""
TAGS = "fetched.json"
"""Beside a copy without a list of its own: size and tag of each file at the URL, as it was fetched."""


def kept_copy(name: str | Path) -> str:
    """The local copy of what is at a URL; other names and paths as they are.

    Args:
        name: URL of a run folder, of a folder or file inside of it (``student``, ``checkpoints/best.ckpt``, ``model.onnx``), of a
            folder that holds runs, or of a student folder that was copied there.

    Returns:
        Path of the copy. Checkpoints and event files are copied only if the URL names them.

    Raises:
        RunError: nothing is there, a file is damaged, or the store cannot be reached.
    """
    if not is_url(str(name)):
        return str(name)
    url = url_of(str(name)).rstrip("/")
    try:
        root, inside = _root(url)
        folder, local = run_storage(root), _place(root)
        if fetch(folder, local, _asked(inside)) is None:
            _fetch_tree(folder, local, _asked(inside))
    except OSError as error:
        raise RunError(str(error)) from error
    path = local / inside if inside else local
    if not path.exists():
        raise RunError(f"{masked(url)}: nothing is there; check the URL")
    return str(path)


def _root(url: str) -> tuple[str, str]:
    """The URL of the run around a URL, and the rest; without a list of files, the URL or the folder of the file itself.

    Raises:
        OSError: the store cannot be reached.
    """
    parts = url.split("/")
    for depth in range(3):
        above = "/".join(parts[: len(parts) - depth])
        if above.endswith(("/", ":")) or "://" not in above:
            break
        if listed(run_storage(above)) is not None:
            return above, "/".join(parts[len(parts) - depth :])
    is_file = parts[-1] in run_storage("/".join(parts[:-1])).sizes("") if len(parts) > 4 else False
    return ("/".join(parts[:-1]), parts[-1]) if is_file else (url, "")


def _place(root: str) -> Path:
    return cache_directory() / "fetched" / f"{zlib.crc32(masked(root).encode()):08x}" / (root.rsplit("/", 1)[-1] or "run")


def _asked(inside: str) -> Callable[[str], bool]:
    """Which files of a folder are fetched for a place in it."""

    def asked(name: str) -> bool:
        parts = name.split("/")
        return inside.startswith(DEEP) or not any(part in DEEP for part in parts[:-1])

    return asked


def _fetch_tree(folder: RunStorage, local: Path, asked: Callable[[str], bool]) -> None:
    """Fetch a folder that has no list of its own; runs inside of it by theirs, other files by size and tag.

    Raises:
        RunError: a file is damaged.
        OSError: the store cannot be reached.
    """
    there = folder.tree()
    runs = [name.removesuffix(f"/{MARKER}") for name in there if name.endswith(f"/{MARKER}")]
    for run in runs:
        fetch(run_storage(f"{folder.url}/{run}"), local / safe_name(run), asked)
    tags = local.with_name(f"{local.name}.{TAGS}")
    try:
        known = dict(json.loads(tags.read_bytes()))
    except (OSError, ValueError, TypeError):
        known = {}
    for name, (size, tag) in there.items():
        if not asked(name) or any(name.startswith(f"{run}/") for run in runs):
            continue
        path = local / safe_name(name)
        if known.get(name) != [size, tag] or not path.is_file() or path.stat().st_size != size:
            fetch_file(folder, name, path, size)
    local.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: list(entry) for name, entry in there.items() if asked(name)})
    write_atomically(tags, lambda temporary: temporary.write_text(text, encoding="utf-8"))
