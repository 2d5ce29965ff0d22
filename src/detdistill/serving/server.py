"""The server of a teacher: a thread for each student's connection, and one for the teacher."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from types import TracebackType
from typing import Self

from detdistill.cache.encoding import Encoded, encode
from detdistill.cache.fill import Lecture
from detdistill.cache.knowledge import keys_of
from detdistill.serving.listener import Listener, Refused
from detdistill.serving.messages import Description, packed_answer, some_of, unpacked_keys, unpacked_question
from detdistill.serving.passes import Passes, Stopping
from detdistill.serving.recorder import Recorder
from detdistill.structures import Batch

ENDING = 10.0
"""Seconds that a server which ends gives the questions it is working on."""


class TeacherServer:
    """A teacher that answers students until it is stopped."""

    def __init__(
        self,
        listener: Listener,
        description: Description,
        lecture: Lecture,
        *,
        stages: Mapping[str, bytes] | None = None,
        recorder: Recorder | None = None,
        batch: int = 16,
        queue: int = 8,
        token: str | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Put a teacher behind a socket; ``start`` opens it.

        Args:
            listener: the bound socket.
            description: what is taught.
            lecture: the methods with the teacher.
            stages: results of the methods' earlier stages, by the names that a cache would give them.
            recorder: writes a cache on the way; None: nothing is kept.
            batch: largest number of images in a pass of the teacher.
            queue: largest number of questions that are worked on or wait.
            token: word that students must send; None: none.
            say: shows the user a line.
        """
        self.listener, self.description, self.lecture = listener, description, lecture
        self.stages, self.recorder, self.token, self.say = dict(stages or {}), recorder, token, say
        self.passes = Passes(lecture.teach, batch)
        self.queue = queue
        self.places = threading.BoundedSemaphore(queue)
        self.read_records = 0
        """Number of answered images that were read from the cache."""
        self._accepting = threading.Thread(target=listener.serve_forever, args=(0.1,), name="listener", daemon=True)
        self._ended = threading.Event()
        listener.teaching = self

    @property
    def url(self) -> str:
        """Address for ``distill --served``."""
        return self.listener.url

    def start(self) -> Self:
        """Answer from now on, in threads of their own."""
        self.passes.start()
        self.listener.server_activate()
        self._accepting.start()
        return self

    def stop(self) -> None:
        """Finish the pass that is running, close all connections and write the records that wait; may be called twice."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._accepting.is_alive():
            self.listener.shutdown()
        self.passes.stop()
        self._let_finish()
        if self.recorder is not None:
            self.recorder.close()
        for connection in list(self.listener.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.listener.server_close()

    def _let_finish(self) -> None:
        """Give the questions that are worked on a few seconds, so that what the teacher has said is written."""
        end = time.monotonic() + ENDING
        for _ in range(self.queue):
            self.places.acquire(timeout=max(0.0, end - time.monotonic()))

    def wait(self) -> None:
        """Wait for Ctrl-C, SIGTERM or ``stop`` in another thread, then stop."""
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, lambda number, frame: _interrupt()) if main else None
        try:
            while not self._ended.wait(0.5):
                pass
        except KeyboardInterrupt:
            pass
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)
            self.stop()

    def in_words(self) -> str:
        """The work done so far: images, passes, and records that were read, in words."""
        read = "" if self.recorder is None else f", {self.read_records} read from {self.recorder.cache.folder.url}"
        return f"{self.passes.images} images taught in {self.passes.passes} passes{read}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def __repr__(self) -> str:
        """Teacher, method and address."""
        return f"TeacherServer({self.description.about.spec.name} teaches {self.description.about.method} at {self.url})"

    # ---------------------------------------------------------------------------------------------------- the answers

    def read(self, content: bytes) -> list[bytes]:
        """Answer a question for records by their keys.

        Raises:
            Refused: a record is not there, or the views are not those of the cache.
            ValueError: the question is malformed.
        """
        keys, data = unpacked_keys(content)
        self._check(keys, data)
        records = [None if self.recorder is None else self.recorder.read(key) for key in keys]
        found = [record for record in records if record is not None]
        if len(found) < len(keys):
            raise Refused(HTTPStatus.NOT_FOUND, f"{len(keys) - len(found)} of {len(keys)} records are not there; send the images")
        self.read_records += len(found)
        return packed_answer(keys, found)

    def teach(self, content: bytes) -> list[bytes]:
        """Answer a question about images: from the cache where it has them, else by the teacher.

        Raises:
            Refused: the teacher failed, or the views are not those of the cache.
            Stopping: the server ends.
            ValueError: the question is malformed.
        """
        groups, data = unpacked_question(content, len(self.description.classes))
        keys = [key for group in groups for key in keys_of(group)]
        self._check(keys, data)
        known = {} if self.recorder is None else {key: found for key in keys if (found := self.recorder.read(key)) is not None}
        self.read_records += len(known)
        asked = [(batch, self.passes.ask(batch)) for group in groups if (batch := _without(group, known)) is not None]
        for batch, parts in asked:
            try:
                said = [pieces for part in parts for pieces in part.result()]
            except Stopping:
                raise
            except Exception as error:  # whatever the teacher raised
                reason = " ".join(str(error).split()) or type(error).__name__
                self.say(f"the teacher failed on images {list(batch.ids)}: {reason}")
                raise Refused(HTTPStatus.INTERNAL_SERVER_ERROR, f"the teacher failed on these images: {reason[:300]}") from error
            for key, pieces in zip(keys_of(batch), said, strict=True):
                known[key] = self._recorded(key, encode(pieces, self.description.about.store))
        return packed_answer(keys, [known[key] for key in keys])

    def _recorded(self, key: str, record: Encoded) -> Encoded:
        if self.recorder is not None:
            self.recorder.add(key, record)
        return record

    def _check(self, keys: list[str], data: str) -> None:
        """Refuse students whose views do not belong into the cache."""
        if self.recorder is None:
            return
        if data != self.description.about.data_fingerprint:
            raise Refused(HTTPStatus.CONFLICT, "the cache that is written holds other training images or boxes")
        if strange := [key for key in keys if key not in self.recorder.index_of]:
            raise Refused(HTTPStatus.CONFLICT, f"the cache that is written has no view {strange[0][:100]!r}")


def _interrupt() -> None:
    raise KeyboardInterrupt


def _without(batch: Batch, known: Mapping[str, Encoded]) -> Batch | None:
    """The images of a batch of one canvas that have no record yet; None: all have."""
    missing = [index for index, key in enumerate(keys_of(batch)) if key not in known]
    return some_of(batch, missing) if missing else None
