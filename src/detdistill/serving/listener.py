"""HTTP on the standard library: the socket of a served teacher, and the requests of its students."""

from __future__ import annotations

import contextlib
import errno
import functools
import hmac
import http.server
import math
import socket
import zlib
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from detdistill.serving.messages import CHECKSUM, DESCRIPTION, LARGEST_BODY, READ, TEACH, TOKEN, ServingError
from detdistill.serving.passes import Stopping

if TYPE_CHECKING:
    from detdistill.serving.server import TeacherServer

IDLE = 120.0
"""Seconds without a byte after which a connection is closed; a student then connects again."""
PATIENCE = 2.0
"""Seconds for which a question waits for a free place before its student is told to come back."""
COME_BACK = 1
"""Seconds after which a student should ask again (``Retry-After``)."""
CONNECTIONS = 256
"""Largest number of open connections."""
_PART = 1 << 16


class Refused(Exception):
    """A request that is answered by a status and one line."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        """Keep both."""
        super().__init__(text)
        self.status, self.text = status, text


def read_address(listen: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``.

    Raises:
        ServingError: it is something else.
    """
    host, colon, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ServingError(f"listen: {listen!r} is not HOST:PORT; write e.g. 127.0.0.1:8765, or 0.0.0.0:8765 for other machines")
    return host, int(port)


class Listener(http.server.ThreadingHTTPServer):
    """The socket. It is bound when it is made; connections are refused until ``server_activate``."""

    daemon_threads = True
    request_queue_size = 64
    teaching: TeacherServer

    def __init__(self, listen: str) -> None:
        """Bind the socket.

        Args:
            listen: ``HOST:PORT``; port 0: a free one.

        Raises:
            ServingError: the port is taken, or this machine has no such address.
        """
        host, port = read_address(listen)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.address_family = found[0]
            super().__init__((host, port), Handler, bind_and_activate=False)
            self.server_bind()
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno == errno.EADDRINUSE:
                reason = f"port {port} is taken by another process; give another port"
            raise ServingError(f"listen: cannot listen at {listen}: {reason}") from error
        self.open: set[socket.socket] = set()
        """The students' connections."""

    def server_bind(self) -> None:
        """Bind, without asking a name server for this machine's name as the standard library does."""
        socket.socket.setsockopt(self.socket, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        """Where students find it."""
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"http://{host}:{self.server_port}"

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Take a connection only if there are not too many."""
        return len(self.open) < CONNECTIONS

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a student that went away is no error here, and its own end says why."""


class Handler(http.server.BaseHTTPRequestHandler):
    """The requests of one connection. Every mistake is answered by a status and one line."""

    server: Listener
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "detdistill", ""
    disable_nagle_algorithm = True
    timeout = IDLE

    def setup(self) -> None:
        """Note the connection, so that the server can close it."""
        self.server.open.add(self.request)
        super().setup()

    def finish(self) -> None:
        """Forget the connection."""
        self.server.open.discard(self.request)
        with contextlib.suppress(OSError):
            super().finish()

    def handle(self) -> None:
        """Answer until the student closes the connection, or is gone."""
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for each step of each student would hide the others."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is no HTTP by one line; the standard library would send a page."""
        self._say(code, message or HTTPStatus(code).phrase)

    def do_GET(self) -> None:
        """The description, or the result of an earlier stage."""
        teaching = self.server.teaching
        if not self._may():
            return
        if self.path == DESCRIPTION:
            self._answer(HTTPStatus.OK, [teaching.description.packed()], "application/json")
        elif self.path.removeprefix("/") in teaching.stages:  # a name among those in memory; no file is opened
            self._answer(HTTPStatus.OK, [teaching.stages[self.path.removeprefix("/")]])
        else:
            self._say(HTTPStatus.NOT_FOUND, "there is no such page")

    def do_POST(self) -> None:
        """Records of images."""
        teaching = self.server.teaching
        if not self._may():
            return
        answers = {READ: teaching.read, TEACH: teaching.teach}
        length = self.headers.get("Content-Length", "")
        if self.path not in answers:
            self._say(HTTPStatus.NOT_FOUND, "there is no such page")
        elif not (length.isascii() and length.isdigit() and len(length) < 20):
            self._say(HTTPStatus.LENGTH_REQUIRED, "a question needs its length (Content-Length)")
        elif int(length) > LARGEST_BODY:
            self._say(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"a question of {int(length)} bytes is larger than {LARGEST_BODY}; lower --batch or --size of the student",
            )
        elif not teaching.places.acquire(timeout=PATIENCE):
            self._skip(int(length))
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, "the teacher is busy", stay=True)
        else:
            try:
                reply = self._reply(answers[self.path], int(length))
            finally:  # before the answer is sent: a student that is slow, or gone, keeps no place
                teaching.places.release()
            reply()

    def _reply(self, answer: Callable[[bytes], list[bytes]], length: int) -> Callable[[], None]:
        """Read the question, and return what sends the answer."""
        content = self.rfile.read(length)
        if len(content) < length:  # the student is gone
            self.close_connection = True
            return lambda: None
        try:
            if self.headers.get(CHECKSUM) != f"{zlib.crc32(content):08x}":
                raise ValueError("its checksum is wrong")
            return functools.partial(self._answer, HTTPStatus.OK, answer(content))
        except Refused as refused:
            return functools.partial(self._say, refused.status, refused.text, stay=True)
        except Stopping:
            return functools.partial(self._say, HTTPStatus.SERVICE_UNAVAILABLE, "the server ends")
        except ValueError as error:
            text = f"the question is damaged or malformed: {error}"
            return functools.partial(self._say, HTTPStatus.BAD_REQUEST, text, stay=True)

    def _may(self) -> bool:
        """Whether the request has the token; if not, it is answered and the connection closed."""
        token = self.server.teaching.token
        if token is None or hmac.compare_digest(self.headers.get("Authorization", "").encode(), f"Bearer {token}".encode()):
            return True
        self._say(HTTPStatus.UNAUTHORIZED, f"the token is missing or wrong; set {TOKEN} to that of the server")
        return False

    def _skip(self, length: int) -> None:
        """Read a body that is not used, without keeping it, so that the connection can be used again."""
        while length > 0 and (part := self.rfile.read(min(length, _PART))):
            length -= len(part)

    def _say(self, status: int, text: str, stay: bool = False) -> None:
        """Answer by one line. Without ``stay`` the connection is closed, because the body was not read."""
        line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
        self._answer(status, [f"{line}\n".encode()], "text/plain; charset=utf-8", stay)

    def _answer(self, status: int, parts: list[bytes], kind: str = "application/octet-stream", stay: bool = True) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(sum(map(len, parts))))
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", str(math.ceil(COME_BACK)))
        if not stay:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        for part in parts:
            self.wfile.write(part)
