"""Served teachers of this process: tiny detectors behind a socket of the loopback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from detdistill.cache.fill import Lecture
from detdistill.detectors.contract import Detector, Teacher
from detdistill.methods.shared.compose import build_method
from detdistill.serving.client import ServedTeacher
from detdistill.serving.listener import Listener
from detdistill.serving.messages import Description
from detdistill.serving.server import TeacherServer
from detdistill.structures import Batch
from detdistill.training.teaching import about_teacher
from tests.tiny import TinyDense, tiny_batch

CLASSES = ("circle", "square")


def lecture_of(text: str, teacher: Teacher, student: Detector) -> Lecture:
    torch.manual_seed(3)
    return Lecture(text, build_method(text, teacher, student))


@contextlib.contextmanager
def serving(
    text: str = "pkd",
    teacher: Teacher | None = None,
    student: Detector | None = None,
    listen: str = "127.0.0.1:0",
    **options: Any,
) -> Iterator[TeacherServer]:
    teacher = teacher or Teacher(TinyDense(seed=1))
    lecture = lecture_of(text, teacher, student or TinyDense(seed=2))
    about = replace(about_teacher("runs/teacher", teacher, None, text, lecture, ()), store=options.pop("store", "float32"))
    description = Description(about, options.pop("classes", teacher.spec.classes), False)
    with TeacherServer(Listener(listen), description, lecture, **options).start() as server:
        yield server


def connected(server: TeacherServer, timeout: float = 20.0, **options: Any) -> ServedTeacher:
    return ServedTeacher(server.url, timeout, **options)


def mixed_batch(count: int = 3, seed: int = 0) -> Batch:
    """Images of two canvases, each padded to the larger."""
    batch = tiny_batch(count, seed=seed)
    return replace(batch, canvases_hw=tuple((64, 64) if index % 2 == 0 else (48, 64) for index in range(count)))


def passes_of(lecture: Lecture) -> list[int]:
    """Note the number of images of each of the teacher's passes from now on."""
    seen: list[int] = []
    before = lecture.teach

    def teach(batch: Batch) -> Any:
        seen.append(len(batch))
        return before(batch)

    lecture.teach = teach  # type: ignore[method-assign]
    return seen


def ids(batches: Sequence[Batch]) -> list[int]:
    return [one for batch in batches for one in batch.ids]
