"""A teacher that is served to students."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from detdistill.api.shared import device_of, load_splits, not_these_digits, settings_of
from detdistill.api.teachers import load_teacher, one_teacher
from detdistill.errors import RunError
from detdistill.settings import TeachSettings

if TYPE_CHECKING:
    from detdistill.api.shared import Model
    from detdistill.progress import Progress
    from detdistill.serving.server import TeacherServer

LISTEN = "127.0.0.1:8765"
"""Default address: this machine only."""


def teach(
    teacher: Model,
    method: str = "pkd",
    listen: str = LISTEN,
    *,
    data: str | None = None,
    student: str | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> TeacherServer:
    """Serve a teacher to students, which learn with ``distill(None, ..., served=URL)`` in other processes or on other machines.

    The server answers in threads of its own from the moment this function returns.

    Args:
        teacher: see ``distill``.
        method: one method or several joined by ``+``; a student may use some of them.
        listen: ``HOST:PORT``; port 0: a free one. Connections are not encrypted; if ``DETDISTILL_TOKEN`` is set in the
            environment, students must have the same.
        data: the students' data, see ``train``, whose classes they have; None: they have the teacher's classes.
        student: model string of the students, for methods that need it; None: an untrained detector of the teacher's
            architecture.
        out: folder or URL of a cache that is written on the way, and continued; needs ``data``, and students whose views are
            those of ``settings``.
        progress: display of the progress; None: a new one on stderr.
        settings: fields of ``TeachSettings``; with ``out``, give size, resize, max_size, flip, scales and teacher_size the values
            of the runs.

    Returns:
        The server: its ``url``, ``stop`` and ``wait``; it may be used in ``with``, which stops it at the end.

    Raises:
        DetdistillError: e.g. the port is taken, or ``out`` is a cache of another teacher; one line with what to do.

    Example:
        with teach("runs/teacher", "pkd", "127.0.0.1:0") as server:
            distill(None, "fcos:resnet18", "coco/data.yaml", "pkd", served=server.url, colour=0.3)
    """
    wanted = settings_of(TeachSettings, {"method": method, **settings})
    from detdistill.progress import Progress
    from detdistill.training.from_cache import why_live_teacher
    from detdistill.training.machine import check_machine

    _check(wanted, student)
    check_machine(wanted)
    teacher_name, source = one_teacher(teacher, wanted.method, "teach")
    if teacher_name is None or source is None:
        raise RunError("teach: there is nobody to teach; give --teacher")
    with progress or Progress() as shown:
        from detdistill.serving.listener import Listener
        from detdistill.training.serve import serve_teacher

        if reason := why_live_teacher(wanted.method):
            shown.say(f"{reason}; so its students need --teacher too", "yellow")
        listener = Listener(listen)
        try:
            given = None if data is None else (data, load_splits(data, wanted.strict, shown, wanted.rescan))
            with not_these_digits(data or ""):
                loaded = _loaded(source, given, wanted)
            place = None if out is None else str(out)
            found = (teacher_name, loaded), given, student, place
            return serve_teacher(listener, *found, wanted, device_of(wanted.device), shown)
        except BaseException:
            listener.server_close()
            raise


def _check(settings: TeachSettings, student: object) -> None:
    """Check that one process can teach the methods.

    Raises:
        RunError: a method has no teacher, the student is no model string, or there are several devices.
        MethodError: ``teacher_size`` with a method that compares what depends on the size of the images.
    """
    from detdistill.methods.shared.compose import check_teacher_size, parse_methods
    from detdistill.methods.shared.contract import Method

    for kind, values in parse_methods(settings.method):
        if kind.needs(**values).teacher is None and kind.teach is Method.teach:
            raise RunError(f"teach: {kind.slug} learns from no teacher; leave it out here, students may add it")
    if settings.teacher_size is not None:
        check_teacher_size(settings.method)
    if not (student is None or isinstance(student, str)):
        raise RunError(f"student: a served teacher needs a model string here, not a {type(student).__name__}")
    if settings.devices * settings.nodes > 1:
        raise RunError("devices: a served teacher is one process; start one for each device, each with a --listen of its own")


def _loaded(source: Any, data: Any, settings: TeachSettings) -> Any:
    """The teacher, whose classes are compared with those of the data, if there are any."""
    from detdistill.given import open_detector

    return open_detector(source) if data is None else load_teacher(source, data[1], settings.other_classes)
