"""Opening a cache of knowledge for a run, and reading the results of earlier stages from it."""

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
    """Open a cache, and check that it has all knowledge that a run needs.

    Args:
        url: folder or fsspec URL.
        method: method string of the run.
        splits: data of the run.
        views: image settings of the run.
        teacher: the loaded teacher, if the run has one.

    Raises:
        CacheError: there is no cache, it is damaged or unfinished, or it was made for other data (or
            images that changed since), views, knowledge or teacher.
    """
    cache = KnowledgeCache.open(url)
    cache.check(method, splits.train.fingerprint, views_of(views), teacher)
    wanted = sights(splits.train, views)
    cache.check_complete(sight.key for sight in wanted)
    cache.check_sources((sight.key, splits.train.records[sight.index].path) for sight in wanted)
    return cache


def why_live_teacher(method: str) -> str:
    """Reason why a method needs the teacher itself besides a cache; empty if the cache is enough."""
    reasons = [(kind.slug, kind.needs(**settings).why_live()) for kind, settings in parse_methods(method)]
    return "; ".join(f"{slug}: {reason}" for slug, reason in reasons if reason)


def stage_from_cache(cache: KnowledgeCache, stage: Stage, method: Method) -> bool:
    """Load the result of an earlier stage from the cache into the method; return whether there was one."""
    return reusable(stage, method) and load_result(cache.folder, cached_stage_file(stage), stage)
