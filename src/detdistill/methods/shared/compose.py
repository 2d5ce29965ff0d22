"""Build methods from text such as ``fgd,temperature=0.8+pkd``."""

from __future__ import annotations

import importlib
from typing import Any

from detdistill.detectors.contract import Detector, Teacher
from detdistill.methods.shared.catalogue import METHODS, check_slug, method_slugs, split_methods
from detdistill.methods.shared.contract import Composition, Method
from detdistill.methods.shared.hyper_parameters import MethodError, checked_settings, read_setting
from detdistill.methods.shared.needs import why_not


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
        needs = kind.needs(**values)
        reason = needs.why_one_size()
        own = needs.teacher is not None and kind.teach is not Method.teach
        if not reason and own and not kind.teaches_parts:
            reason = "what it stores of the teacher is in cells or pixels"
        if reason:
            raise MethodError(f"teacher_size: {kind.slug}: {reason}, so teacher and student must see images of one size")
    if all(kind.needs(**values).teacher is None for kind, values in parsed):
        raise MethodError(f"teacher_size: {text} has no teacher")


def build_method(text: str, teacher: Teacher | Detector | None, student: Detector) -> Method[Any]:
    """Build the method of ``text`` for a pair of detectors; several methods become a ``Composition``.

    Args:
        text: slugs joined by ``+``, each with ``,key=value`` settings; lists as ``levels=0/1/2``.
        teacher: the frozen teacher; a detector is frozen here. None for teacher-free methods.
        student: the detector that is trained.

    Raises:
        MethodError: see ``parse_methods``; also if teacher or student is no detector.
        PairError: teacher or student lacks something that the method needs.
    """
    if isinstance(teacher, Detector):
        teacher = Teacher(teacher)
    for role, given, kinds in (("teacher", teacher, (Teacher, type(None))), ("student", student, (Detector,))):
        if not isinstance(given, kinds):
            what = f"a {type(given).__name__} is no detector"
            raise MethodError(f"build_method: {role}: {what}; load one by detdistill.load_detector(...), or wrap your own model")
    methods = []
    for found, values in parse_methods(text):
        build: Any = found  # constructors differ in their keyword arguments, which were checked above
        methods.append(build(teacher, student, **values))
    return methods[0] if len(methods) == 1 else Composition(methods, student)


def serving_methods(teacher: Teacher | None, student: Detector) -> list[str]:
    """Slugs of the methods that, with default hyper-parameters, can be used with a pair."""
    found = []
    for slug in method_slugs():
        kind = method_class(slug)
        if not why_not(kind.needs(**checked_settings(slug, kind, {})), teacher, student):
            found.append(slug)
    return found
