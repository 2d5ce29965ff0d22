"""A student's side of a served teacher: questions over one connection, asked ahead, and repeated until they are answered."""

from __future__ import annotations

import http.client
import random
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from detdistill.cache.absent_teacher import AbsentTeacher
from detdistill.cache.encoding import Encoded, decode
from detdistill.cache.identity import knowledge_of, views_lacking, views_of
from detdistill.cache.knowledge import About, chooser, keys_of, listed
from detdistill.cache.storage import masked
from detdistill.data.records import DetectionSet
from detdistill.data.transforms import ViewSettings
from detdistill.detectors.contract import Teacher
from detdistill.errors import name_list
from detdistill.methods.shared.contract import Method, Source
from detdistill.serving.messages import (
    CHECKSUM,
    DESCRIPTION,
    LARGEST_BODY,
    READ,
    TEACH,
    Description,
    ServingError,
    packed_keys,
    packed_question,
    unpacked_answer,
)
from detdistill.structures import Batch, Taught, View

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0
"""Seconds between tries: the first pause, which doubles up to the longest."""
KEPT = 4
"""Number of answers that were asked for ahead and are kept until they are needed."""


def read_url(url: str) -> str:
    """An address of a served teacher, without a slash at its end.

    Raises:
        ServingError: it is something else, or holds a password.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        good = parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/") and (parts.port or True)
    except ValueError:  # the port is no number
        good = False
    if parts.username or parts.password or parts.query:
        raise ServingError(
            f"served: {masked(url)} holds a user, a password or a query; set DETDISTILL_TOKEN on both sides instead"
        )
    if not good or parts.fragment:
        raise ServingError(
            f"served: {url!r} is no address of a served teacher; write http://HOST:PORT, as `detdistill teach` says"
        )
    return f"{parts.scheme}://{parts.netloc}"


@dataclass(frozen=True)
class _Asked:
    """A question about a batch whose answer is on its way."""

    ids: tuple[int, ...]
    views: tuple[View, ...]
    answer: Future[list[Encoded]]


@dataclass(frozen=True)
class ServedFolder:
    """Files of a served teacher: the results of the methods' earlier stages."""

    served: ServedTeacher

    @property
    def url(self) -> str:
        """Address of the server."""
        return self.served.url

    def read(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            FileNotFoundError: the server has no such file.
        """
        status, content = self.served.exchange("GET", f"/{name}", accepted=(HTTPStatus.NOT_FOUND,))
        if status == HTTPStatus.NOT_FOUND:
            raise FileNotFoundError(name)
        return content


class ServedTeacher:
    """A teacher in another process, on this machine or elsewhere."""

    def __init__(
        self, url: str, timeout: float, token: str | None = None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """Connect, and read what is taught.

        Args:
            url: ``http://HOST:PORT``.
            timeout: seconds for which a question is repeated until it is answered.
            token: word that the server demands.
            say: shows the user a line, when the server has to be waited for.

        Raises:
            ServingError: nothing answers within ``timeout``, something else answers, or the token is wrong.
        """
        self.url, self.timeout, self.token, self.say = read_url(url), timeout, token, say
        self._connection: http.client.HTTPConnection | None = None
        self._description: Description | None = None
        self._data = ""
        self._asked: deque[_Asked] = deque()
        self._line = threading.RLock()
        self._chance = random.Random()  # of its own: the global one belongs to the run, which must be reproducible
        self.exchange("GET", DESCRIPTION)

    @property
    def description(self) -> Description:
        """The server's description of what it teaches."""
        assert self._description is not None
        return self._description

    @property
    def about(self) -> About:
        """Teacher and knowledge, as a cache describes them."""
        return self.description.about

    @property
    def folder(self) -> ServedFolder:
        """Where the results of the methods' earlier stages are."""
        return ServedFolder(self)

    def teacher(self) -> AbsentTeacher:
        """The stand-in with which methods are built."""
        return AbsentTeacher(self.about.spec, self.about.teacher_fingerprint, served=True)

    def check(self, method: str, data: DetectionSet, views: ViewSettings, teacher: Teacher | None) -> None:
        """Check that a run can learn from this teacher.

        Args:
            method: methods of the run, as text.
            data: training images of the run.
            views: image settings of the run.
            teacher: teacher of the run; None if the run has none.

        Raises:
            ServingError: it cannot; the message lists all reasons in one line.
            CacheError: the server writes a cache, and the run draws endlessly many views.
        """
        about, wrong = self.about, []
        if teacher is not None and teacher.fingerprint != about.teacher_fingerprint:
            wrong.append(f"its teacher ({about.teacher}) is not that of --teacher")
        if lacking := [one for one in knowledge_of(method) if one not in about.knowledge]:
            wrong.append(
                f"{method} learns from {listed(lacking)}, it teaches {listed(about.knowledge)} (--method {about.method})"
            )
        if data.classes != self.description.classes:
            theirs, mine = self.description.classes, data.classes
            wrong.append(f"it teaches the classes {name_list(theirs)}, the data have {name_list(mine)} (start it with --data)")
        if self.description.recorded:
            if data.fingerprint != about.data_fingerprint:
                wrong.append(f"the cache it writes is of other training images or boxes ({about.data})")
            if missing := views_lacking(about.views, views_of(views)):
                wrong.append(f"the run would draw {'; '.join(missing).replace('the cache', 'the cache it writes')}")
        if wrong:
            raise ServingError(f"served teacher {self.url} does not fit: {'; '.join(wrong)}")
        self._data = data.fingerprint

    # ----------------------------------------------------------------------------------------------------- knowledge

    def ahead(self, batch: Batch) -> None:
        """Ask about a batch that will be needed soon; the answer is fetched by a thread and kept."""
        answer: Future[list[Encoded]] = Future()
        self._asked.append(_Asked(batch.ids, batch.views, answer))
        while len(self._asked) > KEPT:
            self._asked.popleft()
        threading.Thread(target=self._fulfil, args=(batch, answer), name="served teacher", daemon=True).start()

    def source(self, methods: str, root: Method[Any]) -> Source:
        """Make the function that asks for a batch's knowledge.

        Args:
            methods: the text that ``root`` was built from.
            root: the method of the run.

        Returns:
            Function of a method (``root`` or a member of the composition) and a batch. It returns the knowledge for this
            method, stacked over the images of the batch, and raises ``ServingError`` if there is no answer.
        """
        chosen_of = chooser(self.about, methods, root)

        def source(method: Method[Any], batch: Batch) -> Taught | None:
            pieces = [chosen_of(method, self._decoded(record)) for record in self._records(batch)]
            return type(pieces[0]).stack(pieces).to(batch.images.device, non_blocking=True)

        return source

    def _decoded(self, record: Encoded) -> tuple[Taught, ...]:
        try:
            parts: tuple[Taught, ...] = decode(record.layout, bytearray(record.data))
        except ValueError as error:
            raise ServingError(f"served teacher {self.url}: {error}") from error
        return parts

    def _records(self, batch: Batch) -> list[Encoded]:
        """The records of a batch: those asked for ahead, or asked for now."""
        while self._asked:
            asked = self._asked.popleft()
            if (asked.ids, asked.views) == (batch.ids, batch.views):
                return asked.answer.result()
        return self._ask(batch)

    def _fulfil(self, batch: Batch, answer: Future[list[Encoded]]) -> None:
        try:
            answer.set_result(self._ask(batch))
        except BaseException as error:  # raised again in the thread that needs the answer
            answer.set_exception(error)

    def _ask(self, batch: Batch) -> list[Encoded]:
        """Ask about a batch; if the server writes a cache, first whether the records are there, without the images."""
        groups = batch.by_canvas()
        order = [index for indices, _ in groups for index in indices]
        keys = [key for _, group in groups for key in keys_of(group)]
        found = self._read(keys) if self.description.recorded else None
        if found is None:
            found = self._taught([group for _, group in groups], keys)
        return [record for _, record in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]

    def _read(self, keys: Sequence[str]) -> list[Encoded] | None:
        """The records of these keys; None: some are not there yet."""
        status, content = self.exchange("POST", READ, packed_keys(keys, self._data), (HTTPStatus.NOT_FOUND,))
        return None if status == HTTPStatus.NOT_FOUND else self._unpacked(content, keys)

    def _taught(self, groups: Sequence[Batch], keys: Sequence[str]) -> list[Encoded]:
        question = packed_question(groups, self._data)
        if len(question) > LARGEST_BODY:
            raise ServingError(f"served teacher {self.url}: a batch of {len(question)} bytes is too large to send; lower --batch")
        return self._unpacked(self.exchange("POST", TEACH, question)[1], keys)

    def _unpacked(self, content: bytes, keys: Sequence[str]) -> list[Encoded]:
        try:
            return unpacked_answer(content, keys)
        except ValueError as error:
            raise ServingError(f"served teacher {self.url}: its answer cannot be read: {error}") from error

    # ------------------------------------------------------------------------------------------------------ requests

    def exchange(self, verb: str, path: str, body: bytes | None = None, accepted: Sequence[int] = ()) -> tuple[int, bytes]:
        """Send a request until it is answered, with growing pauses.

        Args:
            verb: GET or POST.
            path: page of the server.
            body: content of the request.
            accepted: statuses besides 200 that are an answer.

        Raises:
            ServingError: no answer within ``timeout``, a refusal, or the server is another one than before.
        """
        with self._line:
            end, pause, told = time.monotonic() + self.timeout, FIRST_PAUSE, False
            while True:
                reused, least = self._connection is not None, 0.0
                try:
                    status, content, wait = self._once(verb, path, body, end)
                except (OSError, http.client.HTTPException, UnicodeError) as error:
                    self.close()
                    reason = " ".join(str(error).split()) or type(error).__name__
                    if reused:  # the server has closed a connection that was idle, or is another process now
                        continue
                else:
                    if status == HTTPStatus.OK or status in accepted:
                        return status, content
                    if status != HTTPStatus.SERVICE_UNAVAILABLE:
                        raise self._refused(status, content)
                    reason, least = _line(content), wait
                delay = max(least, pause) * self._chance.uniform(0.75, 1.25)
                if time.monotonic() + delay > end:
                    raise ServingError(
                        f"served teacher {self.url}: no answer for {self.timeout:g} s ({reason}); start `detdistill teach` there "
                        f"or raise --timeout (a run that had begun continues with --resume true)"
                    )
                if not told and pause > 2 * FIRST_PAUSE:
                    told = True
                    self.say(f"waiting for the served teacher {self.url} ({reason})")
                time.sleep(delay)
                pause = min(2 * pause, LONGEST_PAUSE)

    def close(self) -> None:
        """Close the connection; the next request opens another one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _once(self, verb: str, path: str, body: bytes | None, end: float) -> tuple[int, bytes, float]:
        """Send a request once: status, content and seconds to wait."""
        if self._connection is None:
            self._connect(end)
        assert self._connection is not None
        sums = {} if body is None else {CHECKSUM: f"{zlib.crc32(body):08x}"}
        answer = self._send(self._connection, verb, path, body, sums, end)
        if self._connection.sock is None:  # closed by the server; the library would open the next one unchecked
            self._connection = None
        return answer

    def _connect(self, end: float) -> None:
        """Open a connection, and check that the teacher behind it is the one that the run has begun with."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=max(0.1, end - time.monotonic()))
        status, content, _ = self._send(connection, "GET", DESCRIPTION, None, {}, end)
        if status != HTTPStatus.OK:
            connection.close()
            if status == HTTPStatus.SERVICE_UNAVAILABLE:
                raise OSError(_line(content))
            raise self._refused(status, content)
        description = Description.unpacked(content, self.url)
        if self._description is not None and not _same(self._description, description):
            raise ServingError(
                f"served teacher {self.url}: it was started again with another teacher, method, store, classes or cache; start "
                "it as before, then continue with --resume true"
            )
        self._description, self._connection = description, connection

    def _send(
        self,
        connection: http.client.HTTPConnection,
        verb: str,
        path: str,
        body: bytes | None,
        headers: dict[str, str],
        end: float,
    ) -> tuple[int, bytes, float]:
        authorized = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        if connection.sock is not None:
            connection.sock.settimeout(max(0.1, end - time.monotonic()))
        connection.request(verb, path, body, {**headers, **authorized})
        response = connection.getresponse()
        content = response.read()
        wait = response.headers.get("Retry-After", "")
        return response.status, content, float(wait) if wait.isdigit() else 0.0

    def _refused(self, status: int, content: bytes) -> ServingError:
        return ServingError(f"served teacher {self.url} refuses ({status}): {_line(content)}")


def _line(content: bytes) -> str:
    """What a server says, as one line that every terminal can show."""
    text = content[:400].decode("utf-8", "replace")
    return " ".join("".join(char if char.isprintable() else " " for char in text).split()) or "without a reason"


def _same(before: Description, now: Description) -> bool:
    """Whether two descriptions are of servers that give the same answers."""
    return (before.about.fingerprint, before.classes, before.recorded) == (now.about.fingerprint, now.classes, now.recorded)
