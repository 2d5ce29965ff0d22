"""What a run needs to know of a cache of knowledge before it learns from it."""

from __future__ import annotations

from detdistill.cache.identity import views_of
from detdistill.cache.knowledge import KnowledgeCache
from detdistill.data.records import DataSplits
from detdistill.data.transforms import ViewSettings
from detdistill.data.views import sights
from detdistill.detectors.contract import Teacher
from detdistill.methods.shared.compose import parse_methods
from detdistill.methods.shared.contract import Method, Stage
from detdistill.training.stage_results import cached_stage_file, load_result, reusable


def open_cache(url: str, method: str, splits: DataSplits, views: ViewSettings, teacher: Teacher | None) -> KnowledgeCache:
    """The cache, if it holds all that a run will ask.

    Args:
        url: folder or fsspec URL.
        method: the run's.
        splits: the run's data.
        views: how the run makes images.
        teacher: the live one, if the run named one.

    Raises:
        CacheError: no cache, a damaged or unfinished one, or one of something else; in one line.
    """
    cache = KnowledgeCache.open(url)
    cache.check(method, splits.train.fingerprint, views_of(views), teacher)
    cache.check_complete(sight.key for sight in sights(splits.train, views))
    return cache


def why_live_teacher(method: str) -> str:
    """Why a method needs the teacher itself when it learns, beside what a cache holds; empty: it does not."""
    reasons = [(kind.slug, kind.needs(**settings).why_live()) for kind, settings in parse_methods(method)]
    return "; ".join(f"{slug}: {reason}" for slug, reason in reasons if reason)


def stage_from_cache(cache: KnowledgeCache, stage: Stage, method: Method) -> bool:
    """Whether the result of an earlier stage was in the cache, and is now in the method."""
    return reusable(stage, method) and load_result(cache.folder, cached_stage_file(stage), stage)
