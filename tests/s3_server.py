"""A real S3 server (moto's) on loopback, and a proxy before it that loses connections, cuts answers short and answers 503.

moto needs botocore, which holds python-dateutil below the pinned version; so it is started from an environment of its own:
``DETDISTILL_MOTO_SERVER``, ``.moto/`` in the repository (``.ci/run`` makes it), or whatever ``moto_server`` is on the path.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NoReturn

import pytest

from detdistill.cache import retries, s3

ROOT = Path(__file__).resolve().parent.parent
BUCKET = "detdistill"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _without(reason: str) -> NoReturn:
    """Skip the test, except in CI, where nobody would see it."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def s3_server() -> Iterator[int]:
    """Start moto's server with one bucket; its port. The test is skipped where there is none."""
    candidates = (os.environ.get("DETDISTILL_MOTO_SERVER"), str(ROOT / ".moto/bin/moto_server"), shutil.which("moto_server"))
    program = next((one for one in candidates if one and Path(one).exists()), None)
    if program is None:
        _without("no moto_server; CONTRIBUTING.md says how to install it")
    port = _free_port()
    server = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if server.poll() is not None:
                _without(f"{program} does not start")
            try:
                request(port, "PUT", f"/{BUCKET}")
                break
            except OSError:
                time.sleep(0.05)
        yield port
    finally:
        server.kill()
        server.wait()


def request(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body of an answer of the server itself."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def objects(port: int, prefix: str) -> set[str]:
    """Keys of all objects below a prefix."""
    _, text = request(port, "GET", f"/{BUCKET}?list-type=2&prefix={prefix}")
    return set(re.findall(r"<Key>([^<]*)</Key>", text.decode()))


def unfinished_uploads(port: int, prefix: str) -> list[str]:
    """Keys below a prefix of the multipart uploads that were neither completed nor aborted."""
    _, text = request(port, "GET", f"/{BUCKET}?uploads")
    return [key for key in re.findall(r"<Key>([^<]*)</Key>", text.decode()) if key.startswith(prefix)]


Fault = Callable[["Asked"], object]


@dataclass
class Asked:
    """A request at the proxy."""

    method: str
    path: str
    length: int
    number: int
    """How many requests came before."""


@dataclass
class Proxy:
    """Passes requests on to a server, except where ``fault`` says otherwise.

    ``fault`` returns None (pass on), a status (answer it), a status and a body, ``"drop"`` (close the connection without an
    answer), ``"lost"`` (pass on, but lose the answer), ``"cut"`` (send half of the answer's body) or a number of seconds to wait.
    """

    server: int
    fault: Fault = lambda asked: None
    asked: list[Asked] = field(default_factory=list)
    port: int = 0

    @contextmanager
    def running(self) -> Iterator[Proxy]:
        handler = type("Handler", (_Handler,), {"proxy": self})
        front = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        front.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that went away, a server that was ended
        self.port = front.server_address[1]
        threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield self
        finally:
            front.shutdown()
            front.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = Asked(self.command, self.path, len(body), len(self.proxy.asked))
        self.proxy.asked.append(asked)
        fault = self.proxy.fault(asked)
        if isinstance(fault, float):
            time.sleep(fault)
        if isinstance(fault, (int, tuple)):
            status, content = fault if isinstance(fault, tuple) else (fault, b"")
            self._answer(status, [], content, len(content))
            return
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        back = http.client.HTTPConnection("127.0.0.1", self.proxy.server, timeout=20)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "transfer-encoding")}
        back.request(self.command, self.path, body, headers)
        answer = back.getresponse()
        content = answer.read()
        back.close()
        if fault == "lost":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        length = int(answer.headers.get("Content-Length") or len(content)) if self.command == "HEAD" else len(content)
        passed = [
            (name, value)
            for name, value in answer.headers.items()
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server")
        ]
        self._answer(answer.status, passed, content[: len(content) // 2] if fault == "cut" else content, length)
        if fault == "cut":
            self.close_connection = True

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """Port of the server."""
    with s3_server() as port:
        yield port


@pytest.fixture
def network(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy before the server, with the environment that leads to it and short waits."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with Proxy(server).running() as proxy:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "HUSH")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
        monkeypatch.setattr(retries, "ATTEMPTS", 3)
        monkeypatch.setattr(s3, "REPEATS", 0)
        yield proxy


@pytest.fixture
def url(network: Proxy) -> str:
    """A folder of its own in the bucket."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}"


def prefix_of(url: str) -> str:
    """The part of a URL behind the bucket."""
    return url.removeprefix(f"s3://{BUCKET}/")


def first(count: int, fault: object, wanted: Callable[[Asked], bool] = lambda asked: True) -> Fault:
    """The first ``count`` requests that are ``wanted`` fail."""
    left = [count]

    def decide(asked: Asked) -> object:
        if left[0] > 0 and wanted(asked):
            left[0] -= 1
            return fault
        return None

    return decide
