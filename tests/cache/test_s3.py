"""Folders in a bucket of a real S3 server, also behind a network that fails."""

import os
import sys

import pytest

from detdistill.cache import retries, s3
from detdistill.cache.storage import CacheError, S3Folder, StoreError, storage
from detdistill.errors import DetdistillWarning
from tests.s3_server import BUCKET, first, network, objects, prefix_of, server, unfinished_uploads, url  # noqa: F401

PART = 5 * 1024 * 1024
"""The smallest part that S3 takes."""


def test_a_folder_in_a_bucket(url):  # noqa: F811
    folder = storage(url)
    assert isinstance(folder, S3Folder)
    assert folder.sizes("shards") == {}
    folder.write("a.json", b"12", b"345")
    folder.write("shards/b", b"678")
    assert folder.sizes("") == {"a.json": 5}
    assert folder.sizes("shards") == {"b": 3}
    assert folder.read("a.json") == b"12345"
    assert folder.read("a.json", 1, 3) == b"23"
    assert folder.read("a.json", 3) == b"45"
    assert folder.read("a.json", 3, 99) == b"45"
    assert folder.read("a.json", 7, 9) == folder.read("a.json", 2, 2) == b""
    folder.remove("a.json")
    folder.remove("a.json")
    with pytest.raises(FileNotFoundError):
        folder.read("a.json")


# ----------------------------------------------------------------------------------------------------- a failing network


@pytest.mark.parametrize("fault", [500, 503, 429, "drop", "cut"])
def test_a_read_that_fails_twice_is_repeated(url, network, fault):  # noqa: F811
    folder = storage(url)
    content = os.urandom(100_000)
    folder.write("a", content)
    network.fault = first(2, fault)
    assert folder.read("a") == content
    network.fault = first(2, fault)
    assert folder.read("a", 10, 60_000) == content[10:60_000]
    network.fault = first(2, fault)
    assert folder.sizes("") == {"a": 100_000}


@pytest.mark.parametrize("fault", [500, 503, 429, "drop", "lost"])
def test_a_write_that_fails_twice_is_repeated(url, network, fault):  # noqa: F811
    folder = storage(url)
    network.fault = first(2, fault)
    folder.write("a", b"1", b"23")
    network.fault = first(2, fault)
    folder.remove("b")
    network.fault = lambda asked: None
    assert folder.read("a") == b"123"


def test_an_error_that_stays_ends_in_one_line(url, network, monkeypatch):  # noqa: F811
    network.fault = lambda asked: 503
    monkeypatch.setattr(retries, "ATTEMPTS", 4)
    monkeypatch.setattr(s3, "REPEATS", 1)
    folder, wanted = (
        storage(url),
        rf"^cannot write {url}/a: the store answers 503 \(tried 4 times in \d+ s\); check the network and",
    )
    with pytest.warns(DetdistillWarning, match="trying again"), pytest.raises(StoreError, match=wanted) as told:
        folder.write("a", b"1")
    assert "\n" not in str(told.value)
    assert len(network.asked) == 4 * (1 + s3.REPEATS)


def test_the_waits_grow_and_have_a_bound(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.5)
    for attempt, longest in ((2, 0.5), (3, 1.0), (4, 2.0), (9, 30.0), (40, 30.0)):
        waits = {retries.wait_before(attempt) for _ in range(20)}
        assert all(longest / 2 <= wait <= longest for wait in waits)
        assert len(waits) > 1, "processes do not come back together"


def parts(asked):
    return asked.method == "PUT" and "partNumber" in asked.path


@pytest.fixture
def in_parts(monkeypatch):
    """Files of more than 5 MiB are sent in parts, each tried three times."""
    monkeypatch.setattr(s3, "PART_BYTES", PART)
    monkeypatch.setattr(s3, "REPEATS", 2)
    return [os.urandom(1000), os.urandom(3 * PART), b"end"]


def test_a_part_that_fails_is_sent_again_alone(url, server, network, in_parts):  # noqa: F811
    folder = storage(url)
    network.fault = first(2, 503, parts)
    folder.write("a", *in_parts)
    sent = [asked.path for asked in network.asked if parts(asked)]
    assert len(sent) == 4 + 2
    assert len(set(sent)) == 4, "one upload, of which two requests were repeated"
    assert folder.read("a") == b"".join(in_parts)
    assert unfinished_uploads(server, prefix_of(url)) == []


@pytest.mark.parametrize("fault", [503, "drop"])
def test_an_upload_that_fails_for_good_leaves_nothing(url, server, network, in_parts, fault, monkeypatch):  # noqa: F811
    monkeypatch.setattr(retries, "ATTEMPTS", 2)
    network.fault = lambda asked: fault if parts(asked) and "partNumber=3" in asked.path else None
    with pytest.raises(StoreError, match="cannot write "):
        storage(url).write("a", *in_parts)
    assert objects(server, prefix_of(url)) == set()
    assert unfinished_uploads(server, prefix_of(url)) == [], "both uploads were aborted"
    network.fault = lambda asked: fault if "partNumber=3" in asked.path or asked.method == "DELETE" else None
    with pytest.raises(StoreError, match="cannot write "):
        storage(url).write("a", *in_parts)
    assert objects(server, prefix_of(url)) == set(), "and where not even that arrives, nothing is visible"
    assert unfinished_uploads(server, prefix_of(url)) == [f"{prefix_of(url)}/a"] * 2, (
        "which a lifecycle rule of the bucket removes"
    )


def test_a_completion_whose_answer_is_lost_is_no_half_file(url, server, network, in_parts):  # noqa: F811
    network.fault = first(1, "lost", lambda asked: asked.method == "POST" and "uploadId" in asked.path)
    folder = storage(url)
    folder.write("a", *in_parts)
    assert folder.read("a") == b"".join(in_parts)
    assert unfinished_uploads(server, prefix_of(url)) == []


# ------------------------------------------------------------------------------------------------------------- bad input


def error_body(code):
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>m</Message></Error>".encode()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ((403, error_body("RequestTimeTooSkewed")), r"the clock of this machine differs too much .*; set the clock \(by NTP\)"),
        (
            (403, error_body("InvalidAccessKeyId")),
            r"the store answers 403 InvalidAccessKeyId; check AWS_ACCESS_KEY_ID, AWS_SECRET",
        ),
        ((403, b""), r"the store answers 403; check AWS_ACCESS_KEY_ID, AWS_SECRET"),
        (
            (400, error_body("AuthorizationHeaderMalformed")),
            r"the bucket is in another region .*; set AWS_REGION to the bucket's",
        ),
        ((301, error_body("PermanentRedirect")), r"the bucket is in another region .*; set AWS_REGION to the bucket's"),
        ((507, b""), r"the store is full \(507\); make space there and run the same command again"),
        ((400, error_body("EntityTooLarge")), r"the store is full \(EntityTooLarge\); make space"),
    ],
)
def test_errors_that_cannot_pass_are_not_repeated(url, network, fault, said):  # noqa: F811
    network.fault = lambda asked: fault
    folder = storage(url)
    for action in (lambda: folder.write("a", b"1"), lambda: folder.read("a"), lambda: folder.sizes("")):
        before = len(network.asked)
        with pytest.raises(StoreError, match=rf"^cannot \w+ {url}.*: {said}") as told:
            action()
        assert len(network.asked) == before + 1
        assert "\n" not in str(told.value)
        assert "HUSH" not in str(told.value)


def test_a_missing_bucket_is_named(network):  # noqa: F811
    folder = storage("s3://nowhere/x")
    for action in (lambda: folder.write("a", b"1"), lambda: folder.read("a"), lambda: folder.sizes("")):
        with pytest.raises(
            StoreError, match=r"^cannot \w+ s3://nowhere/x.*: there is no such bucket; make the bucket, or correct"
        ):
            action()


def test_a_wrong_endpoint_ends_in_one_line(url, monkeypatch):  # noqa: F811
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"tried 3 times in \d+ s\); check the network and AWS_ENDPOINT_URL") as told:
        storage(url).read("a")
    assert "\n" not in str(told.value)


def test_a_server_that_does_not_answer_is_not_waited_for_for_ever(url, network, monkeypatch):  # noqa: F811
    monkeypatch.setattr(s3, "REQUEST_SECONDS", 0.2)
    network.fault = first(9, 0.5)
    with pytest.raises(StoreError, match=r"tried 3 times in \d+ s\); check the network"):
        storage(url).read("a")


def test_credentials_come_from_the_environment(url, monkeypatch):  # noqa: F811
    with pytest.raises(
        CacheError, match=r"^s3://me:\*\*\*@b/x: keys and options in an s3:// URL are not used; set AWS_ACCESS_KEY_ID"
    ):
        storage("s3://me:HUSH@b/x")
    with pytest.raises(CacheError, match="no bucket; give s3://bucket/folder"):
        storage("s3:///x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(CacheError, match=rf"^{url}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        storage(url)


def test_the_missing_package_is_named(url, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(CacheError, match=rf"^{url}: S3 needs the package obstore; pip install 'detdistill\[s3\]'"):
        storage(url)
