"""Shards: safetensors files of some hundred records each, with a manifest that lists the positions of the records.

The shard is written first, then its manifest, and readers ignore shards without a manifest. So a cache can be read while it
grows, several writers never write to the same file, and a killed process leaves at most one shard that is ignored.
"""

from __future__ import annotations

import json
import struct
import uuid
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detdistill.cache.encoding import Encoded, slots_of
from detdistill.cache.storage import CacheError, Storage

FOLDER = "shards"
RECORDS = 256
"""Largest number of records in a shard; a killed writer loses at most this many."""
MEGABYTES = 256
"""Approximate largest size of a shard, which is built in memory."""


def checksum(key: str, layout: str, data: bytes | bytearray | memoryview) -> int:
    """Compute the crc32 of a record: its key, its layout (types and shapes of the tensors) and its bytes."""
    return zlib.crc32(data, zlib.crc32(f"{key}\0{layout}\0".encode()))


def sealed(content: Mapping[str, Any]) -> bytes:
    """Encode plain values as JSON together with a checksum; ``unsealed`` checks it."""
    body = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f'{{"crc32":{zlib.crc32(body.encode())},"content":\n{body}}}\n'.encode()


def unsealed(text: bytes | bytearray, name: str) -> dict[str, Any]:
    """Decode the result of ``sealed`` and check it.

    Args:
        text: content of the file.
        name: name of the file for the error message.

    Raises:
        CacheError: the checksum is wrong.
    """
    try:
        whole = json.loads(text)
        content: dict[str, Any] = whole["content"]
        body = json.dumps(content, sort_keys=True, separators=(",", ":"))
        good = zlib.crc32(body.encode()) == whole["crc32"]
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise CacheError(f"{name} is damaged (its checksum is wrong); delete it and run the same `detdistill cache` again")
    return content


def read_sealed(folder: Storage, name: str) -> dict[str, Any]:
    """Read a file that ``sealed`` has encoded; a second time if its checksum is wrong, because a network may have cut it short.

    Raises:
        CacheError: the checksum is wrong both times.
        OSError: the file cannot be read.
    """
    path = f"{folder.url}/{name}"
    try:
        return unsealed(folder.read(name), path)
    except CacheError:
        return unsealed(folder.read(name), path)


class ShardWriter:
    """Collects records and writes a shard whenever a limit of records or megabytes is reached."""

    def __init__(
        self, folder: Storage, cache: str, writer: str = "0", max_records: int = RECORDS, max_megabytes: float = MEGABYTES
    ) -> None:
        """Remove unfinished shards of an earlier writer of the same name; nothing is written yet.

        Args:
            folder: the cache's folder.
            cache: fingerprint of the cache, stored in every manifest.
            writer: name of this writer.
            max_records: largest number of records in a shard.
            max_megabytes: approximate largest size of a shard.
        """
        self.folder, self.cache, self.writer = folder, cache, writer
        self.max_records, self.max_bytes = max_records, int(max_megabytes * 1e6)
        self._waiting: dict[str, Encoded] = {}
        self._bytes = 0
        self._session = uuid.uuid4().hex[:8]
        self._number = 0
        self.written = 0
        """Records in finished shards."""
        self._sources: dict[str, tuple[int, int]] = {}
        self._clean()

    def _clean(self) -> None:
        self.folder.clean("", "cache.json.")
        self.folder.clean(FOLDER, f"{self.writer}-")
        there = self.folder.sizes(FOLDER)
        for name in there:
            stem, _, kind = name.rpartition(".")
            if kind == "safetensors" and name.startswith(f"{self.writer}-") and f"{stem}.json" not in there:
                self.folder.remove(f"{FOLDER}/{name}")

    def add(self, key: str, record: Encoded, source: tuple[int, int] | None = None) -> None:
        """Add a record; write a shard if a limit is reached.

        Args:
            key: key of the record.
            record: its bytes.
            source: time of change and crc32 of the image file that it was made from (``source_of``).

        Raises:
            OSError: the shard cannot be written. Its records stay in memory, and the next call tries again.
        """
        self._waiting[key] = record
        if source is not None:
            self._sources[key] = source
        self._bytes += len(record.data)
        if len(self._waiting) >= self.max_records or self._bytes >= self.max_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the collected records as a shard.

        Raises:
            OSError: see ``add``.
        """
        if not self._waiting:
            return
        stem = f"{self.writer}-{self._session}-{self._number:05d}"
        blocks, places = shard_blocks(self._waiting)
        with ThreadPoolExecutor(1) as pool:  # checksums are computed while the disk is written
            writing = pool.submit(self.folder.write, f"{FOLDER}/{stem}.safetensors", *blocks)
            manifest = self._manifest(stem, sum(map(len, blocks)), places)
            writing.result()
        self.folder.write(f"{FOLDER}/{stem}.json", manifest)
        self.written += len(self._waiting)
        self._number += 1
        self._waiting, self._bytes, self._sources = {}, 0, {}

    def _manifest(self, stem: str, size: int, places: Mapping[str, tuple[int, int]]) -> bytes:
        layouts: dict[str, int] = {}
        records = {}
        for key, record in self._waiting.items():
            crc = checksum(key, record.layout, record.data)
            records[key] = [*places[key], crc, layouts.setdefault(record.layout, len(layouts))]
        manifest = {"cache": self.cache, "shard": stem, "bytes": size, "layouts": list(layouts), "records": records}
        manifest["sources"] = {key: self._sources[key] for key in self._waiting if key in self._sources}
        return sealed(manifest)


def source_of(path: Path) -> tuple[int, int]:
    """Time of change in nanoseconds and crc32 of a file.

    Raises:
        OSError: the file cannot be read.
    """
    return path.stat().st_mtime_ns, zlib.crc32(path.read_bytes())


def shard_blocks(records: Mapping[str, Encoded]) -> tuple[list[bytes], dict[str, tuple[int, int]]]:
    """Build a safetensors file in which the tensors of each record are contiguous.

    (The writer of safetensors sorts all tensors by type, which would spread a record over the file.)

    Returns:
        Parts of the file, among them the records' own bytes, so that a shard is in memory once; and for each key the first byte
        and the end of its record in the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "detdistill"}}
    blocks: list[bytes] = []
    offsets: dict[str, tuple[int, int]] = {}
    position = 0
    for key, record in records.items():
        start = position
        for slot in slots_of(record):
            end = position + slot.nbytes
            header[f"{key}:{slot.name}"] = {"dtype": slot.stored, "shape": list(slot.shape), "data_offsets": [position, end]}
            position = end
        offsets[key] = (start, position)
        blocks.append(record.data)
        if missing := -position % 8:  # so that the next record's tensors are aligned
            header[f"{key}:padding"] = {"dtype": "U8", "shape": [missing], "data_offsets": [position, position + missing]}
            blocks.append(bytes(missing))
            position += missing
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    before = 8 + len(text)
    places = {key: (before + start, before + end) for key, (start, end) in offsets.items()}
    return [struct.pack("<Q", len(text)), text, *blocks], places


@dataclass(frozen=True, slots=True)
class Place:
    """Position of a record: shard, first byte and end, with its checksum and layout."""

    shard: str
    start: int
    end: int
    crc: int
    layout: str
    source: tuple[int, int] | None
    """Time of change and crc32 of the image file that the record was made from; None: unknown (caches of earlier versions)."""


def _whole(key: str, place: Place, data: bytearray) -> bool:
    return len(data) == place.end - place.start and checksum(key, place.layout, data) == place.crc


class ShardIndex:
    """Index of all records in finished shards, by key."""

    def __init__(self, folder: Storage, cache: str) -> None:
        """Read all manifests.

        Args:
            folder: the cache's folder.
            cache: fingerprint of the cache.

        Raises:
            CacheError: see ``refresh``.
        """
        self.folder, self.cache = folder, cache
        self.places: dict[str, Place] = {}
        self._known: set[str] = set()
        self._layouts: dict[str, str] = {}
        self.refresh()

    def refresh(self) -> None:
        """Add the shards that were finished since the last call.

        Raises:
            CacheError: a manifest is damaged or belongs to another cache, or its shard is missing or truncated.
        """
        try:
            there = self.folder.sizes(FOLDER)
        except OSError as error:
            raise CacheError(f"{self.folder.url}/{FOLDER} cannot be read: {error.strerror or error}") from error
        for name in sorted(there):
            if not name.endswith(".json") or name in self._known:
                continue
            self._take(name, there)
            self._known.add(name)

    def _take(self, name: str, there: Mapping[str, int]) -> None:
        path = f"{self.folder.url}/{FOLDER}/{name}"
        try:
            manifest = read_sealed(self.folder, f"{FOLDER}/{name}")
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error.strerror or error}") from error
        shard = name.removesuffix(".json") + ".safetensors"
        if manifest["cache"] != self.cache:
            raise CacheError(f"{path} belongs to another cache; remove it and its shard")
        if (stem := manifest.get("shard", name.removesuffix(".json"))) != name.removesuffix(".json"):
            raise CacheError(f"{path} describes {stem}.safetensors, so it was renamed or swapped; rename it to {stem}.json")
        if there.get(shard) != manifest["bytes"]:
            found = f"has {there[shard]} of {manifest['bytes']} bytes" if shard in there else "is missing"
            raise CacheError(
                f"{self.folder.url}/{FOLDER}/{shard} {found}; delete {name} there and run the same `detdistill cache` again"
            )
        layouts = [self._layouts.setdefault(layout, layout) for layout in manifest["layouts"]]
        sources = manifest.get("sources", {})
        for key, (start, end, crc, layout) in manifest["records"].items():
            source = tuple(sources[key]) if key in sources else None
            self.places.setdefault(key, Place(shard, start, end, crc, layouts[layout], source))

    def read(self, key: str) -> tuple[str, bytearray]:
        """Read the layout and bytes of a record and check them.

        Raises:
            KeyError: no such record.
            CacheError: the shard is missing or cannot be read, or the record's checksum is wrong.
        """
        place = self.places[key]
        path = f"{self.folder.url}/{FOLDER}/{place.shard}"
        try:
            data = self._bytes_of(place)
            if not _whole(key, place, data):
                data = self._bytes_of(place)  # a network may have cut it short or mixed it up
        except FileNotFoundError as error:
            raise CacheError(f"{path} is missing; delete its .json and run the same `detdistill cache` again") from error
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error.strerror or error}") from error
        if not _whole(key, place, data):
            if not self._holds(place.shard, key):
                raise CacheError(f"{path} holds other records than its .json lists, so it was renamed or swapped; undo that")
            raise CacheError(
                f"{path}: the record of image {key} is damaged (its checksum is wrong); "
                f"delete this shard and its .json and run the same `detdistill cache` again"
            )
        return place.layout, data

    def _bytes_of(self, place: Place) -> bytearray:
        return self.folder.read(f"{FOLDER}/{place.shard}", place.start, place.end)

    def _holds(self, shard: str, key: str) -> bool:
        """Whether a shard's own header lists a record; True if the header cannot be read."""
        try:
            (length,) = struct.unpack("<Q", self.folder.read(f"{FOLDER}/{shard}", 0, 8))
            header = json.loads(self.folder.read(f"{FOLDER}/{shard}", 8, 8 + min(length, 1 << 28)))
            return any(name.startswith(f"{key}:") for name in header)
        except (OSError, ValueError, TypeError, struct.error):
            return True

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that have no record."""
        return [key for key in keys if key not in self.places]
