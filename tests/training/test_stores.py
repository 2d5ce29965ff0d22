"""Caches and run folders in a bucket of a real S3 server, behind a network that fails."""

import pytest

from detdistill import api
from detdistill.cache.knowledge import KnowledgeCache
from detdistill.cache.storage import CacheError
from detdistill.progress import Progress
from tests.s3_server import BUCKET, first, network, objects, prefix_of, server, url  # noqa: F401
from tests.training import small
from tests.training.test_from_cache import VIEWS, cache, offline

# ruff: noqa: F811


def every(count, fault):
    """Every ``count``-th request fails."""
    return lambda asked: fault if asked.number % count == count - 1 else None


def test_a_cache_in_a_bucket_behind_a_failing_network(teacher, url, network, tmp_path):
    faults = iter([503, "drop", "lost", "cut", 500] * 1000)
    network.fault = lambda asked: next(faults) if asked.number % 3 == 2 else None
    made = cache(teacher, url)
    assert (made.folder if hasattr(made, "folder") else url, made.records, made.complete) == (url, VIEWS, True)
    assert "48 records" in api.verify_cache(url, progress=Progress(quiet=True))
    offline(url, tmp_path / "run")
    small.distill(teacher, tmp_path / "online", "pkd")
    assert small.rows(tmp_path / "run") == small.rows(tmp_path / "online"), "what a run with the teacher learns"


def test_an_unfinished_cache_in_a_bucket_is_continued(teacher, url, network, server):
    stored = lambda asked: asked.method == "PUT" and asked.path.endswith(".safetensors")  # noqa: E731
    seen = [0]

    def fault(asked):
        seen[0] += stored(asked)
        return 507 if stored(asked) and seen[0] > 2 else None

    network.fault = fault
    with pytest.raises(
        CacheError, match=rf"^cannot write to {url}: the store is full \(507\); finished records are kept: make space"
    ):
        cache(teacher, url)
    there = objects(server, prefix_of(url))
    assert len([name for name in there if name.endswith(".safetensors")]) == 2, "no half shard"
    with pytest.raises(CacheError, match=r"unfinished: 28 of 48 records are missing .*run the same `detdistill cache` again"):
        offline(url, "unused")
    network.fault = lambda asked: None
    assert cache(teacher, url).complete
    assert there < objects(server, prefix_of(url)), "what was there is kept"


def test_two_writers_in_one_bucket(teacher, url, tmp_path):
    made = cache(teacher, url, devices=2)
    assert (made.records, made.complete) == (VIEWS, True)
    names = KnowledgeCache.open(url).folder.sizes("shards")
    assert {name[:8] for name in names} == {"000of002", "001of002"}


def test_a_cache_in_a_bucket_that_is_missing(teacher, network):
    with pytest.raises(CacheError, match=r"s3://nowhere/x/cache.json cannot be read: there is no such bucket; make the bucket"):
        cache(teacher, "s3://nowhere/x")
    with pytest.raises(CacheError, match=rf"^s3://{BUCKET}/x is no cache \(it has no cache.json\); make one with"):
        KnowledgeCache.open(f"s3://{BUCKET}/x")
