"""Interface of a cache for training and the command line: its description, its missing records, and reading knowledge."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from detdistill.cache.absent_teacher import AbsentTeacher
from detdistill.cache.encoding import Store, decode
from detdistill.cache.identity import Knowledge, digest, in_words, knowledge_of, views_lacking
from detdistill.cache.shards import ShardIndex, read_sealed, sealed, source_of
from detdistill.cache.storage import CacheError, Storage, StoreError, storage
from detdistill.data.views import key_of
from detdistill.detectors.contract import DetectorSpec, Teacher
from detdistill.methods.shared.contract import Composition, Method, Source
from detdistill.structures import Batch, Taught, TaughtTogether

FORMAT = 1
ABOUT = "cache.json"


@dataclass(frozen=True)
class About:
    """Content of ``cache.json``: teacher, methods, data, views and number format of the cache."""

    teacher: str
    """Teacher as given on the command line."""
    teacher_fingerprint: str
    teacher_parameters: int
    spec: DetectorSpec
    method: str
    """Methods as given on the command line."""
    student: str | None
    """Student as given on the command line. None: the teacher's architecture with shuffled weights was used instead."""
    knowledge: tuple[Knowledge, ...]
    """Kinds of knowledge, in the order of a record's parts."""
    stages: tuple[str, ...]
    """Fingerprints of the methods' earlier stages, on which the knowledge depends; their results are in ``stages/``."""
    data: str
    """Data set as given on the command line."""
    data_fingerprint: str
    views: dict[str, Any]
    store: Store
    precision: str
    """Precision of the teacher's forward pass: ``32`` or ``bf16``."""
    records: int
    """Number of records of the complete cache, one for each view of each image."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines the content of the records."""
        parts = dataclasses.asdict(self)
        for name in ("teacher", "teacher_parameters", "spec", "method", "student", "data", "records"):
            del parts[name]
        return digest({"format": FORMAT, **parts})

    def differences(self, other: About) -> list[str]:
        """Describe in words where the identity of ``other`` differs from this one; empty if it is the same."""
        same_stages = self.stages == other.stages
        checks = {
            "teacher (other weights or classes)": self.teacher_fingerprint == other.teacher_fingerprint,
            "methods (it holds " + listed(self.knowledge) + ")": self.knowledge == other.knowledge and same_stages,
            "training data": self.data_fingerprint == other.data_fingerprint,
            f"views (it has {_views(self.views)})": self.views == other.views,
            f"store ({self.store})": self.store == other.store,
            f"precision ({self.precision})": self.precision == other.precision,
        }
        return [name for name, equal in checks.items() if not equal]

    def as_plain(self) -> dict[str, Any]:
        """The description as plain values for JSON, with the version of the format."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @staticmethod
    def from_plain(content: Mapping[str, Any]) -> About:
        """Rebuild a description from ``as_plain`` without its ``format``.

        Raises:
            TypeError: fields are missing or unknown.
        """
        values = dict(content)
        spec = DetectorSpec.from_plain(values.pop("spec"))
        values |= {name: tuple(values[name]) for name in ("knowledge", "stages")}
        return About(spec=spec, **values)


def listed(knowledge: Sequence[Knowledge]) -> str:
    """Kinds of knowledge in words, for messages."""
    return " + ".join(map(in_words, knowledge))


def _views(views: dict[str, Any]) -> str:
    flips = {(False,): "unflipped", (True,): "flipped", (False, True): "unflipped and flipped"}[tuple(views["flips"])]
    scales = "" if views["scales"] == [1.0] else f", scales {','.join(f'{scale:g}' for scale in views['scales'])}"
    larger = f", teacher_size {views['teacher_size']}" if "teacher_size" in views else ""
    return f"{views['resize']} {views['size']}, {flips}{scales}{larger}"


class Readable(Protocol):
    """Files by name, as ``Storage`` reads them."""

    @property
    def url(self) -> str:
        """Where the files are, for messages."""
        ...

    def read(self, name: str) -> bytes | bytearray:
        """Content of a file.

        Raises:
            FileNotFoundError: no such file.
        """
        ...


class KnowledgeSource(Protocol):
    """Source of a teacher's knowledge for a run that has no teacher in its own process: a cache, or a served teacher."""

    @property
    def about(self) -> About:
        """Description of the teacher and of its knowledge."""
        ...

    @property
    def folder(self) -> Readable:
        """Where the results of methods' earlier stages are."""
        ...

    @property
    def ahead(self) -> Callable[[Batch], None] | None:
        """Asks for the knowledge about a batch before it is needed; None: there is nothing to ask, because it is read from disk.

        A source with this function is shown the images, so it needs those of ``teacher_size``.
        """
        ...

    def teacher(self) -> AbsentTeacher:
        """The stand-in with which methods are built if no teacher is loaded."""
        ...

    def source(self, methods: str, root: Method[Any]) -> Source:
        """Make the function that returns a batch's knowledge."""
        ...


class KnowledgeCache:
    """A cache on disk; use ``create`` to write and ``open`` to read."""

    ahead = None
    """Nothing is asked ahead: see ``KnowledgeSource``."""

    def __init__(self, folder: Storage, about: About) -> None:
        """Read the manifests of the shards; called by ``create`` and ``open``.

        Raises:
            CacheError: a manifest is damaged, or a shard is missing or truncated.
        """
        self.folder, self.about = folder, about
        self.index = ShardIndex(folder, about.fingerprint)

    @classmethod
    def create(cls, url: str, about: About) -> KnowledgeCache:
        """Create a cache, or continue an existing cache of the same identity.

        Raises:
            CacheError: the folder holds another cache or other files, or cannot be written.
        """
        folder = storage(url)
        there = found_about(folder)
        if there is None:
            if _names(folder):
                raise CacheError(f"{folder.url} holds other files and no cache; give an empty or a new folder")
            write(folder, ABOUT, sealed(about.as_plain()))
            return cls(folder, about)
        if differing := there.differences(about):
            raise CacheError(f"{folder.url} is a cache of other {'; other '.join(differing)}; give another folder")
        return cls(folder, there)

    @classmethod
    def open(cls, url: str) -> KnowledgeCache:
        """Open a cache for reading.

        Raises:
            CacheError: there is no cache at ``url``, or it is damaged.
        """
        folder = storage(url)
        about = found_about(folder)
        if about is None:
            served = "; if `detdistill teach` answers there, give --served" if folder.url.startswith("http") else ""
            raise CacheError(
                f"{folder.url} is no cache (it has no {ABOUT}); make one with `detdistill cache --out {folder.url}`{served}"
            )
        return cls(folder, about)

    # ------------------------------------------------------------------------------------------------ for a run

    def check(self, method: str, data_fingerprint: str, views: dict[str, Any], teacher: Teacher | None) -> None:
        """Check that a run can use this cache.

        Args:
            method: methods of the run, as text.
            data_fingerprint: fingerprint of the run's training data.
            views: views of the run, from ``views_of``.
            teacher: teacher of the run; None if the run has none.

        Raises:
            CacheError: the cache does not fit; the message lists all reasons in one line.
        """
        about, wrong = self.about, []
        if teacher is not None and teacher.fingerprint != about.teacher_fingerprint:
            wrong.append(f"it was made by another teacher (weights of {about.teacher} at that time)")
        lacking = [one for one in knowledge_of(method) if one not in about.knowledge]
        if lacking:
            wrong.append(f"{method} learns from {listed(lacking)}, it holds {listed(about.knowledge)}")
        if data_fingerprint != about.data_fingerprint:
            wrong.append(f"it was made of other training images or boxes ({about.data} at that time)")
        if missing := views_lacking(about.views, views):
            wrong.append(f"the run would draw {'; '.join(missing)}")
        if wrong:
            raise CacheError(f"cache {self.folder.url} does not fit: {'; '.join(wrong)}")

    def check_complete(self, keys: Iterable[str]) -> None:
        """Check that the cache has a record for every key.

        Raises:
            CacheError: records are missing; the message gives their number.
        """
        wanted = list(keys)
        if missing := self.index.missing(wanted):
            raise CacheError(
                f"cache {self.folder.url} is unfinished: {len(missing)} of {len(wanted)} records are missing "
                f"(the first: image {missing[0]}); run the same `detdistill cache` again, it goes on where it stopped"
            )

    def check_sources(self, images: Iterable[tuple[str, Path]]) -> None:
        """Check that the image files are those that the records were made from.

        A file with the time of change that it had then is not read again.

        Args:
            images: key and file of each view of the run.

        Raises:
            CacheError: files have another content now; the message names the first and gives their number.
        """
        changed: dict[Path, bool] = {}
        for key, path in images:
            place = self.index.places.get(key)
            if place is None or place.source is None or path in changed:
                continue
            time_then, crc_then = place.source
            changed[path] = path.stat().st_mtime_ns != time_then and source_of(path)[1] != crc_then
        if wrong := [path for path, differs in changed.items() if differs]:
            raise CacheError(
                f"cache {self.folder.url} does not fit: {len(wrong)} of {len(changed)} images changed since it was made "
                f"(the first: {wrong[0]}); restore them, or make the cache again in a new folder"
            )

    def teacher(self) -> AbsentTeacher:
        """The stand-in with which methods are built if no teacher is loaded."""
        return AbsentTeacher(self.about.spec, self.about.teacher_fingerprint)

    def source(self, methods: str, root: Method[Any]) -> Source:
        """Make the function that reads a batch's knowledge from this cache.

        Args:
            methods: the text that ``root`` was built from.
            root: the method of the run.

        Returns:
            Function of a method (``root`` or a member of the composition) and a batch. It returns the knowledge for this
            method, stacked over the images of the batch, and raises ``CacheError`` if a record is missing or damaged.
        """
        chosen_of = chooser(self.about, methods, root)
        readers = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="cache")

        def source(method: Method[Any], batch: Batch) -> Taught | None:
            def read(key: str) -> Taught:
                return chosen_of(method, self.read(key))

            pieces = list(readers.map(read, keys_of(batch)))
            return type(pieces[0]).stack(pieces).to(batch.images.device, non_blocking=True)

        return source

    def read(self, key: str) -> tuple[Taught, ...]:
        """Read the record of one view.

        Returns:
            One part for each kind in ``about.knowledge``.

        Raises:
            CacheError: the record is missing or damaged.
        """
        try:
            layout, data = self.index.read(key)
        except KeyError as error:
            raise CacheError(
                f"cache {self.folder.url} has no record of image {key}; run the same `detdistill cache` again"
            ) from error
        try:
            parts: tuple[Taught, ...] = decode(layout, data)
        except ValueError as error:
            raise CacheError(f"cache {self.folder.url}, image {key}: {error}") from error
        return parts


def keys_of(batch: Batch) -> list[str]:
    """The key of each image of a batch in a cache."""
    return [key_of(image, view.key) for image, view in zip(batch.ids, batch.views, strict=True)]


def chooser(about: About, methods: str, root: Method[Any]) -> Callable[[Method[Any], tuple[Taught, ...]], Taught]:
    """Make the function that takes a method's knowledge out of a record.

    Args:
        about: description of the records.
        methods: the text that ``root`` was built from.
        root: the method of the run.

    Returns:
        Function of a method (``root`` or a member of the composition) and the parts of a record.
    """
    places = [about.knowledge.index(one) for one in knowledge_of(methods)]

    def chosen_of(method: Method[Any], parts: tuple[Taught, ...]) -> Taught:
        members = root.methods if isinstance(root, Composition) else (root,)
        wanted = places if method is root else [places[members.index(method)]]
        chosen = tuple(parts[place] for place in wanted)
        return TaughtTogether(chosen) if isinstance(method, Composition) else chosen[0]

    return chosen_of


def _names(folder: Storage) -> list[str]:
    """Names of the files in a cache's folder.

    Raises:
        CacheError: the folder cannot be read.
    """
    try:
        return list(folder.sizes(""))
    except OSError as error:
        raise CacheError(f"{folder.url} cannot be read: {error.strerror or error}") from error


def found_about(folder: Storage) -> About | None:
    """Read ``cache.json``; None if the folder has none.

    Raises:
        CacheError: the file is damaged, cannot be read, or has another format version.
    """
    try:
        content = read_sealed(folder, ABOUT)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CacheError(f"{folder.url}/{ABOUT} cannot be read: {error.strerror or error}") from error
    if (version := content.pop("format")) != FORMAT:
        raise CacheError(f"{folder.url} is a cache of format {version}, this detdistill reads {FORMAT}; make it again")
    return About.from_plain(content)


def write(folder: Storage, name: str, content: bytes) -> None:
    """Write a file of the cache.

    Raises:
        CacheError: the file cannot be written.
    """
    try:
        folder.write(name, content)
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(folder: Storage, error: OSError) -> CacheError:
    """The error for a cache that cannot be written, e.g. because the disk is full."""
    advice = error.advice if isinstance(error, StoreError) else "make space and run the same command again"
    reason = error.reason if isinstance(error, StoreError) else error.strerror or error
    again = advice.replace("the same command", "the same `detdistill cache`")
    return CacheError(f"cannot write to {folder.url}: {reason}; finished records are kept: {again}")
