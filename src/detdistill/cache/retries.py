"""Errors of stores behind a network: which of them can pass, how long they are tried again, and what they say in words."""

from __future__ import annotations

import errno
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

from detdistill.errors import DetdistillWarning, RunError

ATTEMPTS = 8
"""Largest number of times that an operation on a store is tried."""
FIRST_WAIT = 0.5
"""Seconds before the second attempt; each further wait is twice as long. Half of each wait is drawn at random, so that the
processes of a run do not all come back at the same time."""
LONGEST_WAIT = 30.0
"""Longest wait in seconds between two attempts."""
LONGEST_TRIAL = 120.0
"""No further attempt begins when an operation has taken this many seconds."""

PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP answers after which a request may succeed unchanged."""
PASSING_ERRNO = frozenset(
    {
        errno.ETIMEDOUT,
        errno.ECONNRESET,
        errno.ECONNREFUSED,
        errno.ECONNABORTED,
        errno.EPIPE,
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
    }
    | {errno.EBUSY, errno.EAGAIN}
)
PASSING_WORDS = ("HTTP error", "timed out", "timeout", "error sending request", "connection closed", "Connection reset")
PASSING_CODES = frozenset(
    {"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "Throttling", "XMinioServerNotInitialized"}
)
FULL_CODES = frozenset({"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "EntityTooLarge"})
REGION_CODES = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "TemporaryRedirect"}
)
KEY_CODES = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"})
_chance = random.Random()  # of its own: a network that fails must not change the random numbers of a run
T = TypeVar("T")


class CacheError(RunError):
    """A cache cannot be used or made; the message names the file, the reason and what to do."""


class StoreError(OSError):
    """An operation on a store failed for good.

    ``str`` gives the operation, the URL, the reason and what to do; ``strerror`` the last two of them.
    """

    def __init__(self, what: str, reason: str, advice: str) -> None:
        """Keep the parts of the message.

        Args:
            what: operation and masked URL, e.g. ``read s3://bucket/cache/cache.json``.
            reason: what the store or the network said.
            advice: what to do, as the rest of a sentence after ``;``.
        """
        super().__init__(errno.EIO, f"{reason}; {advice}")
        self.what, self.reason, self.advice = what, reason, advice

    def __str__(self) -> str:
        return f"cannot {self.what}: {self.reason}; {self.advice}"


class ShortReadError(ConnectionError):
    """Fewer bytes arrived than the store had announced."""


def masked(text: str) -> str:
    """Hide the passwords and keys of all URLs in a text.

    >>> masked("s3://me:pass/word@host/folder?token=abc&part=1")
    's3://me:***@host/folder?token=***&part=1'
    """
    text = re.sub(r"(?<=://)([^/@:\s]*):[^@\s]*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&][\w-]*(?:token|key|secret|password|signature|sig)[\w-]*=)[^&\s]+", r"\1***", text)


def patiently(what: str, operation: Callable[[], T]) -> T:
    """Run an operation on a store; try again, with growing waits, while its error is one that can pass.

    Args:
        what: operation and masked URL for the message, e.g. ``read s3://bucket/cache/cache.json``.
        operation: the operation; it may be repeated.

    Raises:
        FileNotFoundError, FileExistsError: the store says so; never tried again.
        StoreError: the error cannot pass, or it did not within ``ATTEMPTS`` and ``LONGEST_TRIAL``.
    """
    started, attempt = time.monotonic(), 0
    while True:
        attempt += 1
        try:
            return operation()
        except Exception as error:  # each file system has its own errors, e.g. ftplib's, botocore's and obstore's
            if isinstance(error, StoreError) or (
                isinstance(error, (FileNotFoundError, NotADirectoryError)) and not no_bucket(error)
            ):
                raise
            if isinstance(error, FileExistsError):
                raise
            seconds = time.monotonic() - started
            if not can_pass(error):
                raise StoreError(what, reason_of(error), advice_for(error)) from error
            if attempt >= ATTEMPTS or seconds >= LONGEST_TRIAL:
                tried = f"{reason_of(error)} (tried {attempt} times in {seconds:.0f} s)"
                raise StoreError(what, tried, advice_for(error)) from error
            if attempt == 3:
                text = f"cannot {what}: {reason_of(error)}; trying again for up to {LONGEST_TRIAL:.0f} seconds"
                warnings.warn(text, DetdistillWarning, stacklevel=3)
            time.sleep(wait_before(attempt + 1))


def wait_before(attempt: int) -> float:
    """Seconds to wait before an attempt, the second being 2: exponential, half of it drawn at random."""
    longest = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 2))
    return longest * (1 + _chance.random()) / 2


def can_pass(error: BaseException) -> bool:
    """Whether the same operation may succeed later: a timeout, a lost connection, or a busy server."""
    if code_of(error) in PASSING_CODES:
        return True
    if (status := status_of(error)) is not None:
        return status in PASSING_STATUS
    for one in _chain(error):
        if isinstance(one, (TimeoutError, ConnectionError)):
            return True
        if isinstance(one, OSError) and one.errno in PASSING_ERRNO:
            return True
        if isinstance(one, (PermissionError, ValueError, TypeError, AttributeError)):
            return False
        if any(word in _first_line(one) for word in PASSING_WORDS):
            return True
    # aiohttp's and botocore's errors of the connection; neither package is imported for their sake.
    names = {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
    return not names.isdisjoint({"ClientConnectionError", "ClientPayloadError", "HTTPClientError", "EndpointConnectionError"})


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an error of obstore, botocore, aiohttp or requests; None: it has none."""
    for one in _chain(error):
        answer = getattr(one, "response", None)
        found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
        found = found or getattr(answer, "status_code", None) or getattr(one, "status", None)
        if isinstance(found, int):
            return found
        if match := re.search(r"status code: (\d{3})\b", str(one)):
            return int(match[1])
    return None


def code_of(error: BaseException) -> str:
    """S3's word for an error, ``NoSuchBucket`` for example; empty if there is none."""
    for one in _chain(error):
        answer = getattr(one, "response", None)
        code = str(answer.get("Error", {}).get("Code") or "") if isinstance(answer, dict) else ""
        if code and not code.isdigit():
            return code
        if match := re.search(r"<Code>(\w+)</Code>", str(one)):
            return match[1]
    return ""


def no_bucket(error: BaseException) -> bool:
    """Whether not only a file but the whole bucket is missing."""
    return code_of(error) == "NoSuchBucket"


def reason_of(error: BaseException) -> str:
    """The reason of an error, in one line and without passwords."""
    code, status = code_of(error), status_of(error)
    if code == "NoSuchBucket":
        return "there is no such bucket"
    if code == "RequestTimeTooSkewed":
        return "the clock of this machine differs too much from the store's (RequestTimeTooSkewed)"
    if _is_full(error):
        return f"the store is full ({code or status or 'no space left'})"
    if _other_region(error):
        return f"the bucket is in another region ({code or 'redirected'})"
    if status is not None:
        return f"the store answers {status}" + (f" {code}" if code else "")
    if isinstance(error, OSError) and error.strerror:
        return masked(error.strerror)
    said = _first_line(error).removeprefix("Generic S3 error: ")
    if isinstance(error, ShortReadError):
        return said
    if match := re.search(r"HTTP error: (.*)", said):  # before it come the URL and the time, which vary
        said = match[1]
    return masked(" ".join(said.split()))[:300] or type(error).__name__


def advice_for(error: BaseException) -> str:
    """The remedy for an error, as the rest of a sentence."""
    code, status = code_of(error), status_of(error)
    if code == "NoSuchBucket":
        return "make the bucket, or correct the URL"
    if code == "RequestTimeTooSkewed":
        return "set the clock (by NTP) and run the same command again"
    if _is_full(error):
        return "make space there and run the same command again"
    if _other_region(error):
        return "set AWS_REGION to the bucket's region"
    if code in KEY_CODES or status in (401, 403) or isinstance(error, PermissionError):
        return "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, and what they permit"
    if can_pass(error):
        return "check the network and AWS_ENDPOINT_URL, and run the same command again"
    return "check the URL and run the same command again"


def _is_full(error: BaseException) -> bool:
    numbers = {one.errno for one in _chain(error) if isinstance(one, OSError)}
    return status_of(error) == 507 or code_of(error) in FULL_CODES or not numbers.isdisjoint({errno.ENOSPC, errno.EDQUOT})


def _other_region(error: BaseException) -> bool:
    return code_of(error) in REGION_CODES or "incorrectly configured region" in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it."""
    one: BaseException | None = error
    for _ in range(8):
        if one is None:
            return
        yield one
        one = one.__cause__ or one.__context__
