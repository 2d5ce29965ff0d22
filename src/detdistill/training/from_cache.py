"""Opening a cache or a served teacher for a run, and reading the results of earlier stages from it."""

from __future__ import annotations

from collections.abc import Callable

from detdistill.cache.identity import views_of
from detdistill.cache.knowledge import KnowledgeCache, KnowledgeSource
from detdistill.data.records import DataSplits
from detdistill.data.transforms import ViewSettings
from detdistill.data.views import sights
from detdistill.detectors.contract import Teacher
from detdistill.methods.shared.compose import parse_methods
from detdistill.methods.shared.contract import Method, Stage
from detdistill.serving.client import ServedTeacher
from detdistill.serving.messages import token_from_environment
from detdistill.settings import DistillSettings
from detdistill.training.plan import view_settings
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


def open_served(
    settings: DistillSettings, splits: DataSplits, teacher: Teacher | None, say: Callable[[str], None]
) -> ServedTeacher:
    """Connect to the served teacher of a run, and check that it teaches what the run needs.

    Args:
        settings: of the run.
        splits: data of the run.
        teacher: the loaded teacher, if the run has one.
        say: shows the user a line, when the server has to be waited for.

    Raises:
        ServingError: nothing answers in time, or the teacher, its methods, its classes or the cache it writes do not fit.
        CacheError: the server writes a cache, and the run draws endlessly many views.
    """
    assert settings.served is not None
    served = ServedTeacher(settings.served, settings.timeout, token_from_environment(), say)
    served.check(settings.method, splits.train, view_settings(settings), teacher)
    return served


def open_knowledge(
    settings: DistillSettings, splits: DataSplits, teacher: Teacher | None, say: Callable[[str], None]
) -> KnowledgeSource | None:
    """The cache or the served teacher of a run; None: it has neither.

    Raises:
        RunError: see ``open_cache`` and ``open_served``.
    """
    if settings.served is not None:
        return open_served(settings, splits, teacher, say)
    if settings.cache is not None:
        return open_cache(settings.cache, settings.method, splits, view_settings(settings), teacher)
    return None


def why_live_teacher(method: str) -> str:
    """Reason why a method needs the teacher itself besides its knowledge; empty if a cache or a served teacher is enough."""
    reasons = [(kind.slug, kind.needs(**settings).why_live()) for kind, settings in parse_methods(method)]
    return "; ".join(f"{slug}: {reason}" for slug, reason in reasons if reason)


def stage_from_cache(cache: KnowledgeSource, stage: Stage, method: Method) -> bool:
    """Load the result of an earlier stage from the cache into the method; return whether there was one."""
    return reusable(stage, method) and load_result(cache.folder, cached_stage_file(stage), stage)
