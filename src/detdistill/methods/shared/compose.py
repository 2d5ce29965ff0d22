"""Build methods from text such as ``fgd,temperature=0.8+pkd``, ``pkd@a+fkd@b`` or ``pkd@small>pkd@large``."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch

from detdistill.detectors.contract import Detector, Teacher
from detdistill.errors import DetdistillError
from detdistill.methods.shared.catalogue import (
    METHODS,
    check_slug,
    method_slugs,
    named_teachers,
    split_methods,
    split_turns,
)
from detdistill.methods.shared.contract import Composition, Method
from detdistill.methods.shared.hyper_parameters import MethodError, checked_settings, read_setting
from detdistill.methods.shared.needs import PairError, others_serving, why_not
from detdistill.methods.shared.progression import Progression


def method_class(slug: str) -> type[Method[Any]]:
    """The class of the method with a given slug.

    Raises:
        MethodError: there is no such method.
    """
    check_slug(slug)
    name = f"detdistill.methods.{slug}" + (".method" if (METHODS / slug).is_dir() else "")
    found = vars(importlib.import_module(name)).values()
    classes = [c for c in found if isinstance(c, type) and issubclass(c, Method) and c.__module__ == name]
    return next(c for c in classes if getattr(c, "slug", None) == slug)


def parse_methods(text: str) -> list[tuple[type[Method[Any]], dict[str, Any]]]:
    """The class of each method in ``text``, and the values of all of its hyper-parameters.

    Raises:
        MethodError: unknown method or hyper-parameter (with the nearest name), or a value of the wrong type.
    """
    parsed = []
    for slug, *settings in split_methods(text):
        found = method_class(slug)
        values: dict[str, Any] = {}
        for setting in settings:
            key, _, raw = setting.partition("=")
            if key in values:
                raise MethodError(f"{slug}: {key} is given twice")
            values[key] = read_setting(slug, found, key, raw)
        parsed.append((found, checked_settings(slug, found, values)))
    return parsed


def check_teacher_size(text: str) -> None:
    """Check that the teacher of all methods in ``text`` may see images of another size than the student.

    Raises:
        MethodError: a method compares what depends on the size of the images; or none of them has a teacher.
    """
    parsed = parse_methods(text)
    for kind, values in parsed:
        if reason := kind.needs(**values).why_one_size():
            raise MethodError(f"teacher_size: {kind.slug}: {reason}, so teacher and student must see images of one size")
    if all(kind.needs(**values).teacher is None for kind, values in parsed):
        raise MethodError(f"teacher_size: {text} has no teacher")


def match_teachers(text: str, names: Collection[str]) -> list[str]:
    """For each method in ``text``, the name of its teacher among ``names``; empty for methods without a teacher.

    Args:
        text: as for ``build_method``.
        names: names of the teachers; a single one may be empty, and a single one serves the methods without ``@``.

    Raises:
        MethodError: a name is unknown, a method does not say which of several teachers it means, or no method uses a teacher.
    """
    chosen = []
    for (kind, values), name in zip(parse_methods(text), named_teachers(text), strict=True):
        known = [one for one in names if one]
        if kind.needs(**values).teacher is None and not name:
            chosen.append("")
        elif name and name not in names:
            there = f"the teachers are {', '.join(known)}" if known else f"name it: --teacher {name}=RUN"
            raise MethodError(f"{kind.slug}@{name}: there is no teacher {name!r}; {there}")
        elif not name and len(names) > 1:
            raise MethodError(f"{kind.slug}: say which teacher it learns from: {' or '.join(f'{kind.slug}@{n}' for n in known)}")
        else:
            chosen.append(name or next(iter(names), ""))
    idle = [name for name in names if name and name not in chosen]
    if idle:
        raise MethodError(f"teacher {idle[0]}: no method learns from it; write e.g. pkd@{idle[0]}, or leave it out")
    return chosen


def build_method(text: str, teacher: Teacher | Detector | Mapping[str, Teacher] | None, student: Detector) -> Method[Any]:
    """Build the method of ``text``; several methods become a ``Composition``, one after the other a ``Progression``.

    Args:
        text: slugs joined by ``+``, each with ``,key=value`` settings; lists as ``levels=0/1/2``. ``pkd@a`` learns from the
            teacher named ``a``; ``pkd@a>pkd@b`` from one after the other.
        teacher: the frozen teacher; a detector is frozen here; several teachers by name. None for teacher-free methods.
        student: the detector that is trained.

    Raises:
        MethodError: see ``parse_methods`` and ``match_teachers``; also if teacher or student is no detector.
        PairError: teacher or student lacks something that the method needs; a named teacher is named.
    """
    if isinstance(teacher, Detector):
        teacher = Teacher(teacher)
    given = teacher if isinstance(teacher, Mapping) else {"": teacher}
    checks: list[tuple[str, Any, tuple[type, ...]]] = [("teacher", one, (Teacher, type(None))) for one in given.values()]
    for role, one, kinds in (*checks, ("student", student, (Detector,))):
        if not isinstance(one, kinds):
            what = f"a {type(one).__name__} is no detector"
            raise MethodError(f"build_method: {role}: {what}; load one by detdistill.load_detector(...), or wrap your own model")
    match_teachers(text, given)
    turns = [_together(part, given, student) for part in split_turns(text)]
    return turns[0] if len(turns) == 1 else Progression(turns, student)


def _together(text: str, teachers: Mapping[str, Teacher | None], student: Detector) -> Method[Any]:
    """The methods of a text without ``>``."""
    methods, names = [], []
    only = next(iter(teachers.values())) if len(teachers) == 1 else None
    for (found, values), name in zip(parse_methods(text), named_teachers(text), strict=True):
        build: Any = found  # constructors differ in their keyword arguments, which were checked by parse_methods
        teacher = teachers[name] if name else only
        try:
            methods.append(build(teacher, student, **values))
        except PairError as error:
            others = error.others or partial(others_serving, found.slug, teacher, student)
            raise PairError(f"teacher {name}: {error.reason}" if name else error.reason, others) from error
        names.append(f"{found.slug}@{name}" if name else found.slug)
    return methods[0] if len(methods) == 1 else Composition(methods, student, names)


def reasons_against(teacher: Teacher | None, student: Detector) -> dict[str, str]:
    """For each method, by slug, why it cannot be used with a pair with default hyper-parameters; empty if it can.

    Each method whose ``needs`` are met is built, because some compare more of both sides, such as the depths of decoders.
    """
    found = {}
    with torch.random.fork_rng(devices=[]):  # random weights of adapters must not change those of the caller's next modules
        for slug in method_slugs():
            kind: Any = method_class(slug)
            values = checked_settings(slug, kind, {})
            found[slug] = why_not(kind.needs(**values), teacher, student)
            if not found[slug]:
                try:
                    kind(teacher, student, **values)
                except DetdistillError as error:  # this looks for advice and must not fail itself
                    found[slug] = (error.reason if isinstance(error, PairError) else str(error)).removeprefix(f"{slug}: ")
    return found


def serving_methods(teacher: Teacher | None, student: Detector) -> list[str]:
    """Slugs of the methods that, with default hyper-parameters, can be used with a pair; see ``reasons_against``."""
    return [slug for slug, reason in reasons_against(teacher, student).items() if not reason]
