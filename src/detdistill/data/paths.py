"""Find the images that an annotation file lists, though the folders have been moved, renamed or come from another system.

A listed path is matched by its end: leading parts are left out until the rest exists below the data's folder. How many are
left out is decided once for all paths of a file with the same first part, by the longest rest that exists; so a picture that
is missing is never replaced by one of the same name in another folder.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote

MOST_FOLDERS = 5000
"""At most this many folders are searched below the data's folder."""
MANY_FOLDERS = 20
"""From this number on, the files of all folders are put into one table."""


class Folders:
    """Names of the files in folders; each folder is listed once, which is quicker than a question for every file."""

    def __init__(self) -> None:
        self._files: dict[str, dict[str, str]] = {}
        self._plain: dict[str, dict[str, str]] = {}

    def find(self, folder: str, name: str) -> str | None:
        """Path of a file; its name may differ in Unicode normalisation and percent encoding. None: there is no such file."""
        files = self.files(folder)
        if name in files:
            return files[name]
        if folder not in self._plain:
            plain = [plain_name(each) for each in files]
            twice = {each for each, count in Counter(plain).items() if count > 1}
            self._plain[folder] = {each: path for each, path in zip(plain, files.values(), strict=True) if each not in twice}
        return self._plain[folder].get(plain_name(name))

    def files(self, folder: str) -> dict[str, str]:
        """Paths by name."""
        if folder not in self._files:
            try:
                with os.scandir(folder) as entries:
                    self._files[folder] = {entry.name: entry.path for entry in entries if not entry.is_dir()}
            except (OSError, ValueError):  # no folder, or a zero byte in its name
                self._files[folder] = {}
        return self._files[folder]


def plain_name(name: str) -> str:
    """A file name without percent encoding and in composed Unicode (NFC)."""
    return unicodedata.normalize("NFC", unquote(name) if "%" in name else name)


def match_listed(
    names: Sequence[str], first: Sequence[Path], then: Sequence[Path], deeper: Callable[[], Sequence[Path]]
) -> list[Path | None]:
    """Find listed files.

    Args:
        names: paths as listed: relative or absolute, with slashes or backslashes, with a drive letter or as an address.
        first: folders from which a path may start; if a file exists in several, the first one wins.
        then: further folders. A file that is in two of them is not found, because it is not known which one is meant.
        deeper: lists folders that are searched like ``then``, but only for paths that are in none of the others.

    Returns:
        For each name the file, or None if it is missing or not the only one.
    """
    parts = [split_parts(name) for name in names]
    groups: dict[str, list[int]] = {}
    for index, each in enumerate(parts):
        groups.setdefault(each[0] if len(each) > 1 else "", []).append(index)
    found: list[Path | None] = [None] * len(names)
    search = _Search(first, then)
    left = _match_groups(groups, parts, search, found)
    if left:
        search = _Search(first, [*then, *deeper()])
        left = _match_groups(left, parts, search, found)
    alone = []
    for index in (index for group, each in left.items() if group for index in each):
        if os.path.isabs(names[index]) and _is(os.path.isfile, names[index]):
            found[index] = Path(names[index])
        else:
            alone.append(index)
    _match_base_names(alone, parts, search, found)
    return found


def _match_groups(
    groups: dict[str, list[int]], parts: list[list[str]], search: _Search, found: list[Path | None]
) -> dict[str, list[int]]:
    """Find the files of each group with the fewest leading parts left out that find any.

    Returns:
        The groups of which no file was found; of names without folders (group ``""``), those that were not found.
    """
    left: dict[str, list[int]] = {}
    for key, group in groups.items():
        hits: dict[int, str] = {}
        for dropped in range(max(1, max(len(parts[index]) for index in group) - 1)):
            hits = {index: path for index in group if (path := search.find(parts[index][dropped:], dropped))}
            if hits:
                break
        for index, path in hits.items():
            found[index] = Path(path)
        if not hits or (not key and len(hits) < len(group)):
            left[key] = [index for index in group if index not in hits]
    return left


def split_parts(name: str) -> list[str]:
    """The folders and the name of a listed path, without drive, scheme and ``.``."""
    text = name.replace("\\", "/")
    text = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://", "/", text)
    return [part for part in re.sub(r"^[A-Za-z]:/", "/", text).split("/") if part not in ("", ".")] or [""]


def _match_base_names(alone: list[int], parts: list[list[str]], search: _Search, found: list[Path | None]) -> None:
    """Find files by their name alone: only if one file and one listed path have that name."""
    taken = {str(path) for path in found if path is not None}
    counts = Counter(parts[index][-1] for index in alone)
    for index in alone:
        path = search.only(parts[index][-1])
        if path is not None and counts[parts[index][-1]] == 1 and path not in taken:
            found[index] = Path(path)


class _Search:
    def __init__(self, first: Iterable[Path], then: Iterable[Path]) -> None:
        self.first = list(dict.fromkeys(map(str, first)))
        self.then = [place for place in dict.fromkeys(map(str, then)) if place not in self.first]
        self.folders = Folders()
        self._below: dict[str, tuple[list[str], list[str]]] = {}
        self._lone: dict[str, str | None] | None = None

    def find(self, parts: list[str], dropped: int) -> str | None:
        """A path that ends in all of these parts, below a folder; a lone name only where nothing was left out before it."""
        if not parts or (dropped and len(parts) == 1):
            return None
        first, then = self._places("/".join(parts[:-1]))
        for place in first:
            if (path := self.folders.find(place, parts[-1])) is not None:
                return path
        if len(parts) == 1 and len(then) > MANY_FOLDERS:
            return self._lone_files().get(parts[-1])
        return self._only(then, parts[-1])

    def only(self, name: str) -> str | None:
        """The one file of this name in all folders."""
        return self._only([*self.first, *self.then], name)

    def _only(self, places: Iterable[str], name: str) -> str | None:
        paths = {path for place in places if (path := self.folders.find(place, name)) is not None}
        return paths.pop() if len(paths) == 1 else None

    def _places(self, below: str) -> tuple[list[str], list[str]]:
        """The folders ``below`` the first and the further folders that exist."""
        if below not in self._below:
            both = []
            for places in (self.first, self.then):
                joined = [os.path.normpath(os.path.join(place, below)) for place in places] if below else places
                both.append([place for place in dict.fromkeys(joined) if not below or _is(os.path.isdir, place)])
            self._below[below] = both[0], [place for place in both[1] if place not in both[0]]
        return self._below[below]

    def _lone_files(self) -> dict[str, str | None]:
        """Paths by name, None for a name that occurs twice: asking thousands of folders for every name would take minutes."""
        if self._lone is None:
            self._lone = {}
            for place in self.then:
                for name, path in self.folders.files(place).items():
                    self._lone[name] = None if name in self._lone else path
        return self._lone


def _is(kind: Callable[[str], bool], path: str) -> bool:
    try:
        return kind(path)
    except ValueError:  # a zero byte
        return False


def folders_below(base: Path, depth: int) -> list[Path]:
    """The folders at most ``depth`` levels below a folder, sorted level by level; hidden ones are left out."""
    level, found = [base], list[Path]()
    for _ in range(depth):
        below = []
        for place in level:
            try:
                with os.scandir(place) as entries:
                    below += sorted(Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir())
            except OSError:
                continue
        seen = {os.path.realpath(place) for place in (base, *found)}
        level = [place for place in below if not (place.is_symlink() and os.path.realpath(place) in seen)]
        found += level
        if len(found) > MOST_FOLDERS:
            break
    return found[:MOST_FOLDERS]


def outside(paths: Sequence[Path], root: Path) -> list[Path]:
    """Those files that lie outside the data's folder, by ``..``, an absolute path or a link."""
    inside = os.path.realpath(root)
    folders: dict[str, tuple[str, set[str]]] = {}
    found = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            try:
                with os.scandir(folder) as entries:
                    links = {entry.name for entry in entries if entry.is_symlink()}
            except OSError:
                links = set()
            folders[folder] = os.path.realpath(folder), links
        real, links = folders[folder]
        if name in links:
            real = os.path.dirname(os.path.realpath(path))
        if real != inside and not real.startswith(inside.rstrip(os.sep) + os.sep):
            found.append(path)
    return found
