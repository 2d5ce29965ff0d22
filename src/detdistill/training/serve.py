"""Putting a teacher behind a socket: build the methods, train their earlier stages, open the cache that is written on the way."""

from __future__ import annotations

import platform
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from detdistill.cache.fill import Lecture
from detdistill.cache.identity import views_of
from detdistill.cache.knowledge import About, KnowledgeCache, unwritable, write
from detdistill.data.records import DataSplits
from detdistill.data.views import sights
from detdistill.detectors.contract import Detector, Teacher
from detdistill.errors import RunError
from detdistill.methods.shared.contract import Method, Stage
from detdistill.progress import Progress
from detdistill.serving.listener import Listener
from detdistill.serving.messages import TOKEN, Description, token_from_environment
from detdistill.serving.recorder import Recorder
from detdistill.serving.server import TeacherServer
from detdistill.settings import TeachSettings
from detdistill.training.machine import seed_everything
from detdistill.training.plan import view_settings
from detdistill.training.run import prepare
from detdistill.training.stage_results import cached_stage_file, packed, reusable
from detdistill.training.teaching import about_teacher, learner_of, stages_session

HERE = ("127.0.0.1", "::1", "localhost")
"""Hosts that other machines cannot reach."""


def serve_teacher(
    listener: Listener,
    teacher: tuple[str, Detector],
    data: tuple[str, DataSplits] | None,
    student: str | None,
    out: str | None,
    settings: TeachSettings,
    device: str,
    progress: Progress,
) -> TeacherServer:
    """Start to serve a teacher.

    Args:
        listener: the bound socket.
        teacher: model string or path of the teacher, and the loaded teacher.
        data: path of the data, and the loaded data; None: the students have the teacher's classes.
        student: model string of the students; None: an untrained detector of the teacher's architecture.
        out: folder or fsspec URL of a cache to be written on the way; None: nothing is kept.
        settings: methods, number format and queue; with ``out`` also the views.
        device: device of the teacher.
        progress: display of the progress.

    Raises:
        CacheError: ``out`` is another cache or cannot be written, or the number of views is unlimited.
        PairError: the methods cannot be used with this teacher (and student).
        RunError: without data, where they are needed.
    """
    token = token_from_environment()
    if out is not None:
        if data is None:
            raise RunError("teach: a cache belongs to training images; give --data with --out")
        views_of(view_settings(settings))  # raises CacheError for an unlimited number of views, before anything else
    classes = teacher[1].spec.classes if data is None else data[1].train.classes
    if not classes:
        raise RunError(f"teach: teacher {teacher[1].spec.name} has no classes; give --data, whose classes the students have")
    frozen = Teacher(teacher[1]).fold_norms()
    seed_everything(settings.seed)
    learner, method = learner_of(frozen, student, classes, settings.method)
    stages = _stages(teacher[0], frozen, data, student, settings, learner, method, progress)
    lecture = Lecture(settings.method, method, device, settings.precision)
    about = replace(about_teacher(teacher[0], frozen, student, settings.method, lecture, stages), store=settings.store)
    recorder = None
    if out is not None and data is not None:
        recorder = _recorder(out, about, data, stages, settings, f"{platform.node()} {listener.url}", progress.say)
        about = recorder.cache.about
    server = TeacherServer(
        listener,
        Description(about, tuple(classes), recorder is not None),
        lecture,
        stages={cached_stage_file(stage): packed(stage) for stage in stages},
        recorder=recorder,
        batch=settings.batch,
        queue=settings.queue,
        token=token,
        say=progress.say,
    ).start()
    progress.say(f"{about.spec.name} teaches {settings.method} at {server.url}")
    if token is None and listener.server_name not in HERE:
        progress.say(f"other machines can reach it, and whoever does is answered: set {TOKEN} on both sides", "yellow")
    return server


def _stages(
    name: str,
    frozen: Teacher,
    data: tuple[str, DataSplits] | None,
    student: str | None,
    settings: TeachSettings,
    learner: Detector,
    method: Method,
    progress: Progress,
) -> Sequence[Stage]:
    """The earlier stages of the method on which its knowledge depends, trained or loaded.

    Raises:
        RunError: there are some, but no data to train them.
    """
    if data is not None:
        return prepare(stages_session(name, frozen, data, student, settings, learner, method), progress)
    if earlier := [stage.name for stage in method.stages(learner)[:-1] if reusable(stage, method)]:
        raise RunError(f"teach: {settings.method} trains {', '.join(earlier)} first, on the students' data; give --data")
    return ()


def _recorder(
    out: str,
    about: About,
    data: tuple[str, DataSplits],
    stages: Sequence[Stage],
    settings: TeachSettings,
    place: str,
    say: Callable[[str], None],
) -> Recorder:
    """Create or continue the cache that is written on the way; ``place`` tells this server from others that write into it."""
    views, train = view_settings(settings), data[1].train
    everything = sights(train, views)
    about = replace(about, data=data[0], data_fingerprint=train.fingerprint, views=views_of(views), records=len(everything))
    cache = KnowledgeCache.create(out, about)
    for stage in stages:
        write(cache.folder, cached_stage_file(stage), packed(stage))
    try:
        recorder = Recorder(cache, everything, train, f"served{zlib.crc32(place.encode()):08x}", settings.shard, say)
    except OSError as error:
        raise unwritable(cache.folder, error) from error
    say(f"{len(everything) - len(cache.index.missing(recorder.index_of))} of {len(everything)} records in {cache.folder.url}")
    return recorder
