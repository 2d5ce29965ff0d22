"""Making and checking a cache: build the method, train its earlier stages, probe, forecast, fill."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from detdistill.cache.encoding import Store
from detdistill.cache.fill import Lecture, compare, fill, look
from detdistill.cache.forecast import Forecast, Probe, forecast
from detdistill.cache.identity import views_of
from detdistill.cache.knowledge import About, KnowledgeCache, found_about, write
from detdistill.cache.storage import CacheError, Storage, storage
from detdistill.data.records import DataSplits
from detdistill.data.transforms import ViewSettings
from detdistill.data.views import Sight, sights
from detdistill.detectors.contract import Detector, Teacher
from detdistill.jobs.contract import Job
from detdistill.jobs.local import local_runner
from detdistill.jobs.together import run_together
from detdistill.jobs.where import LOCAL, runner_on
from detdistill.methods.shared.contract import Stage
from detdistill.processes import by_srun, local_rank, number_of_processes, stopped_by_signals
from detdistill.progress import Bar, Progress
from detdistill.settings import CacheSettings, as_plain, names_where
from detdistill.training.from_cache import stage_from_cache
from detdistill.training.machine import seed_everything
from detdistill.training.plan import view_settings
from detdistill.training.run import prepare
from detdistill.training.stage_results import cached_stage_file, packed
from detdistill.training.teaching import about_teacher, learner_of, stages_session

TOLERANCES: dict[Store, float] = {"float32": 1e-3, "float16": 2e-3, "bfloat16": 1e-2, "int8": 1e-2, "int6": 4e-2}
"""Largest differences that ``verify`` accepts, as fractions of a tensor's largest value. Other hardware sums in another order,
so a stored number may be rounded differently."""


def make_cache(
    url: str,
    teacher: tuple[str, Detector],
    data: tuple[str, DataSplits],
    student: str | None,
    settings: CacheSettings,
    device: str,
    progress: Progress,
) -> tuple[str, int, bool, Store, Forecast]:
    """Make a cache, or complete an unfinished one.

    Args:
        url: folder or fsspec URL.
        teacher: model string or path of the teacher, and the loaded teacher.
        data: path of the data, and the loaded data.
        student: model string; None: an untrained detector of the teacher's architecture.
        settings: method, views and number format.
        device: device of the teacher.
        progress: display of the progress.

    Returns:
        Folder, number of records, whether the cache is complete, number format, and the forecast for the missing records.

    Raises:
        CacheError: unlimited number of views, another cache in the folder, no space, or a disk that cannot be written.
        PairError: the method cannot be used with this teacher (and student).
    """
    folder, views = storage(url), view_settings(settings)
    views_of(views)  # raises CacheError for an unlimited number of views, before anything else
    _check_launcher(settings)
    frozen = Teacher(teacher[1]).fold_norms()
    learner, lecture, stages = _lecture((teacher[0], frozen), data, student, settings, device, progress)
    train, everything = data[1].train, sights(data[1].train, views)
    rank, world = _rank(settings.devices)
    before = found_about(folder) if rank == 0 else _wait(folder)
    wanted = before.store if before is not None and settings.store == "auto" else settings.store
    about = replace(
        about_teacher(teacher[0], frozen, student, settings.method, lecture, stages),
        data=data[0],
        data_fingerprint=train.fingerprint,
        views=views_of(views),
        store="float32" if wanted == "auto" else wanted,
        records=len(everything),
    )
    cache = None if before is None else KnowledgeCache.create(url, about)  # raises CacheError if it is another cache
    missing = [sight for sight in everything if cache is None or sight.key not in cache.index.places]
    ahead = Forecast(0, {}, 0.0, None, {})
    if missing and rank == 0:
        probe = look(lecture, learner, train, views, missing, settings.batch, settings.probe)
        if wanted == "auto":
            about = replace(about, store=probe.choose())
        ahead = _checked_forecast(probe, missing, folder, about.store, world, progress)
    if settings.dry_run:
        return folder.url, len(everything) - len(missing), not missing, about.store, ahead
    cache = cache or KnowledgeCache.create(url, about)
    for stage in stages if rank == 0 else ():
        write(folder, cached_stage_file(stage), packed(stage))
    if missing:
        bar = progress.bar("cache", len(missing))
        names = {"teacher": teacher[0], "data": data[0], "student": student, "out": url}
        if settings.on == LOCAL:
            share = {"rank": rank, "world": world, "workers": settings.workers, "shard_records": settings.shard}
            with _others(settings, about.store, names):
                fill(cache, lecture, train, views, everything, settings.batch, bar=bar, **share)
        else:
            _fill_elsewhere(cache, settings, about.store, names, bar, progress)
        cache.index.refresh()
    left = len(cache.index.missing(sight.key for sight in everything))
    progress.say(f"{len(everything) - left} of {len(everything)} records in {folder.url}")
    return folder.url, len(everything) - left, not left, about.store, ahead


def _lecture(
    teacher: tuple[str, Teacher],
    data: tuple[str, DataSplits],
    student: str | None,
    settings: CacheSettings,
    device: str,
    progress: Progress,
) -> tuple[Detector, Lecture, tuple[Stage, ...]]:
    """A student for the method, the method with its teacher on a device, and its earlier stages, loaded or trained."""
    seed_everything(settings.seed)
    learner, method = learner_of(teacher[1], student, data[1].train.classes, settings.method)
    stages = prepare(stages_session(*teacher, data, student, settings, learner, method), progress)
    if device == "cuda" and _started_together():
        device = f"cuda:{local_rank()}"
    return learner, Lecture(settings.method, method, device, settings.precision), stages


def _checked_forecast(
    probe: Probe, missing: Sequence[Sight], folder: Storage, store: Store, writers: int, progress: Progress
) -> Forecast:
    """The forecast for the missing records, which is also said.

    Raises:
        CacheError: there is no space for them.
    """
    ahead = forecast(probe, (sight.canvas_hw for sight in missing), folder.free_bytes(), writers)
    for line in ahead.lines(store):
        progress.say(line)
    ahead.check(store, folder.url)
    return ahead


def _check_launcher(settings: CacheSettings) -> None:
    """Check that the processes are started by torchrun or srun where several machines need it, and not where Ray does it.

    Raises:
        CacheError: they are not, or they are.
    """
    if settings.nodes > 1 and not _started_together():
        raise CacheError("nodes: start the same command on every machine with torchrun or srun, which number the processes")
    if settings.on != LOCAL and _started_together():
        raise CacheError(f"on: {settings.on} starts the writers itself; leave out torchrun or srun, or --on")


def _wait(folder: Storage) -> About | None:
    """Wait for the description that the first of several processes writes; None: there is none after half an hour."""
    deadline = time.monotonic() + 1800
    while (about := found_about(folder)) is None and time.monotonic() < deadline:
        time.sleep(0.5)
    return about


def _rank(devices: int) -> tuple[int, int]:
    """Rank of this process and number of processes, as set by torchrun, srun or ``_others``; default: 0 of ``devices``."""
    if not _started_together():
        return 0, devices
    return int(os.environ["SLURM_PROCID"] if by_srun() else os.environ.get("RANK", 0)), number_of_processes()


def _started_together() -> bool:
    """Whether torchrun, srun or ``_others`` has started this process."""
    return "WORLD_SIZE" in os.environ or by_srun()


@contextlib.contextmanager
def _others(settings: CacheSettings, store: Store, names: dict[str, str | None]) -> Iterator[None]:
    """Start the further processes of ``devices``, unless torchrun has started them, and wait for them at the end.

    Raises:
        CacheError: a process failed; with the last line of its output.
    """
    if _started_together() or settings.devices == 1:
        yield
        return
    plain = _writer_settings(settings, store, names)
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(local_runner())
        writers = []
        for rank in range(1, settings.devices):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": settings.devices}
            job = Job(f"writer {rank} of {settings.devices}", "cache", plain, environment=_as_texts(numbers))
            writers.append((job.title, runner.start(job)))
            stack.callback(writers[-1][1].kill)
        with stopped_by_signals():
            yield
        for title, writer in writers:
            while (code := writer.poll()) is None:
                time.sleep(0.1)
            _Writer(title).ended(code, writer.last_line())


def _fill_elsewhere(
    cache: KnowledgeCache, settings: CacheSettings, store: Store, names: dict[str, str | None], bar: Bar, progress: Progress
) -> None:
    """Fill a cache by ``devices`` writers on a cluster. A writer that is lost is started again; it writes what is missing.

    Raises:
        CacheError: a writer failed; with the last line of its output.
        RunError: there is no cluster, or it has no room for a writer.
    """
    count = settings.devices
    # Each writer is on a machine of its own as far as it knows: it sees one GPU at most.
    plain = {**_writer_settings(settings, store, names), "devices": 1, "nodes": count}
    with runner_on(settings.on, progress.say) as runner:
        jobs = [
            Job(
                f"writer {rank} of {count}",
                "cache",
                plain,
                cpus=max(1, settings.threads),
                gpus=runner.gpus(settings.device, 1),
                environment=_as_texts({"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": count}),
            )
            for rank in range(count)
        ]
        run_together(jobs, runner, None, lambda index: _Writer(jobs[index].title, cache, bar))


class _Writer:
    """A writer, seen by the shards of all writers."""

    def __init__(self, title: str, cache: KnowledgeCache | None = None, bar: Bar | None = None) -> None:
        self.title, self.cache, self.bar, self.seen = title, cache, bar, time.monotonic()

    def look(self) -> None:
        """Show how many records there are, every two seconds."""
        if self.cache is None or self.bar is None or time.monotonic() - self.seen < 2:
            return
        self.seen = time.monotonic()
        self.cache.index.refresh()
        self.bar.update(self.bar.total - (self.cache.about.records - len(self.cache.index.places)))

    def ended(self, code: int, line: str) -> None:
        """Take the result.

        Raises:
            CacheError: the writer failed; with the last line of its output.
        """
        if code != 0:
            raise CacheError(f"{self.title} failed: {line or f'exit code {code}'}")


def _writer_settings(settings: CacheSettings, store: Store, names: dict[str, str | None]) -> dict[str, Any]:
    """The settings of a process that writes a part of the cache."""
    plain = {**as_plain(settings), "store": store, "on": LOCAL, **names}
    for name in ("dry_run", *(name for name in names_where(CacheSettings, "cache", False) if name not in names)):
        del plain[name]
    return plain


def _as_texts(numbers: dict[str, int]) -> dict[str, str]:
    return {name: str(value) for name, value in numbers.items()}


def check_cache(
    url: str, live: Callable[[str], tuple[Detector, DataSplits]] | None, records: int, device: str, progress: Progress
) -> str:
    """Read every record, and compare some with new outputs of the teacher; see ``api.verify_cache``.

    Args:
        url: folder or fsspec URL.
        live: loads teacher and data, given the path of the data in the cache's description; None: check the checksums only.
        records: number of records to compare.
        device: device of the teacher.
        progress: display of the progress.

    Returns:
        The findings, in one line.

    Raises:
        CacheError: a record is damaged or missing, or records differ from the teacher's outputs by more than ``TOLERANCES``.
    """
    cache = KnowledgeCache.open(url)
    keys = list(cache.index.places)
    bar = progress.bar("checksums", len(keys))
    for number, key in enumerate(keys, start=1):
        cache.read(key)
        bar.update(number)
    words = f"{len(keys)} of {cache.about.records} records, all checksums right"
    if len(keys) < cache.about.records:
        raise CacheError(f"cache {cache.folder.url} is unfinished: {words}; run the same `detdistill cache` again to complete it")
    if live is None:
        return words
    detector, splits = live(cache.about.data)
    frozen = Teacher(detector).fold_norms()
    views = _views(cache)
    cache.check(cache.about.method, splits.train.fingerprint, views_of(views), frozen)
    learner, method = learner_of(frozen, cache.about.student, splits.train.classes, cache.about.method)
    for stage in method.stages(learner)[:-1]:
        if stage.depends_on:
            stage_from_cache(cache, stage, method)
    known = [sight for sight in sights(splits.train, views) if sight.key in cache.index.places]
    chosen = random.Random().sample(known, min(records, len(known)))
    lecture = Lecture(cache.about.method, method, device, cache.about.precision)
    largest = compare(cache, lecture, splits.train, views, chosen)
    if largest > TOLERANCES[cache.about.store]:
        raise CacheError(
            f"cache {cache.folder.url} does not agree with the teacher: {len(chosen)} records differ by up to "
            f"{100 * largest:.2g} % of the largest value; make the cache again"
        )
    return f"{words}; {len(chosen)} compared with the teacher: largest difference {100 * largest:.2g} % of the largest value"


def _views(cache: KnowledgeCache) -> ViewSettings:
    views = cache.about.views
    flips = {(False,): 0.0, (True,): 1.0, (False, True): 0.5}[tuple(views["flips"])]
    scales = () if views["scales"] == [1.0] else tuple(views["scales"])
    return ViewSettings(
        size=views["size"],
        resize=views["resize"],
        max_size=views["max_size"],
        flip=flips,
        scales=scales,
        teacher_size=views.get("teacher_size"),
    )
