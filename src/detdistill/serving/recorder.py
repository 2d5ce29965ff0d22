"""A cache that a served teacher writes on the way: each view once, and read instead of taught from then on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from detdistill.cache.encoding import Encoded
from detdistill.cache.knowledge import KnowledgeCache
from detdistill.cache.shards import ShardWriter, source_of
from detdistill.cache.storage import CacheError
from detdistill.data.records import DetectionSet
from detdistill.data.views import Sight


class Recorder:
    """Writes what was taught into a cache, and finds what is there. Several threads may use it at the same time."""

    def __init__(
        self,
        cache: KnowledgeCache,
        sights: Sequence[Sight],
        data: DetectionSet,
        writer: str,
        shard_records: int,
        say: Callable[[str], None],
    ) -> None:
        """Continue a cache; nothing is written yet.

        Args:
            cache: the cache, created or found.
            sights: all views of the cache.
            data: the images.
            writer: name of this writer, see ``ShardWriter``.
            shard_records: largest number of records in a shard.
            say: tells the user, once, that the cache is finished or cannot be written.

        Raises:
            OSError: the folder cannot be read or cleaned.
        """
        self.cache, self.data, self.say = cache, data, say
        self.index_of = {sight.key: sight.index for sight in sights}
        """Index of the image of each view; students may ask for these views only."""
        self._writer: ShardWriter | None = ShardWriter(cache.folder, cache.about.fingerprint, writer, shard_records)
        self._fresh: dict[str, Encoded] = {}
        """Records that are not in a finished shard yet."""
        self._sources: dict[Path, tuple[int, int]] = {}
        self._damaged = False
        self._finished = not cache.index.missing(self.index_of)
        self._lock = threading.Lock()

    @property
    def records(self) -> int:
        """Number of records in finished shards."""
        return len(self.cache.index.places)

    def read(self, key: str) -> Encoded | None:
        """The record of a view; None: there is none, or it is damaged, which is said once."""
        with self._lock:
            if (fresh := self._fresh.get(key)) is not None:
                return fresh
            if key not in self.cache.index.places:
                return None
        try:
            layout, data = self.cache.index.read(key)
        except CacheError as error:
            if not self._damaged:
                self._damaged = True
                self.say(f"{error}; until then the teacher answers")
            return None
        return Encoded(layout, bytes(data))

    def add(self, key: str, record: Encoded) -> None:
        """Keep a record, and write a shard when it is full. After an error of the disk nothing more is written."""
        with self._lock:
            if self._writer is None or key in self._fresh or key in self.cache.index.places:
                return
            try:
                self._fresh[key] = record
                before = self._writer.written
                self._writer.add(key, record, self._source(key))
                if len(self.cache.index.places) + len(self._fresh) == len(self.index_of):
                    self._writer.flush()
                if self._writer.written != before:
                    self._written()
            except (OSError, CacheError) as error:
                self._give_up(error)

    def close(self) -> None:
        """Write the records that wait."""
        with self._lock:
            if self._writer is None:
                return
            try:
                self._writer.flush()
                self._written()
            except (OSError, CacheError) as error:
                self._give_up(error)

    def _source(self, key: str) -> tuple[int, int] | None:
        """Time of change and crc32 of the image file of a view; None: it cannot be read now."""
        path = self.data.records[self.index_of[key]].path
        if path not in self._sources:
            with contextlib.suppress(OSError):
                self._sources[path] = source_of(path)
        return self._sources.get(path)

    def _written(self) -> None:
        """Find the records of the shard that was just finished."""
        self.cache.index.refresh()
        self._fresh = {key: record for key, record in self._fresh.items() if key not in self.cache.index.places}
        if not self._finished and not self.cache.index.missing(self.index_of):
            self._finished = True
            self.say(f"{self.cache.folder.url} is finished: {self.records} records; students may use it with --cache now")

    def _give_up(self, error: OSError | CacheError) -> None:
        self._writer, self._fresh = None, {}
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        self.say(
            f"cannot write to {self.cache.folder.url}: {reason}; the teacher goes on without writing, "
            f"{self.records} records are kept: make space and start `detdistill teach` again to write the others"
        )
