"""The teachers of a distillation: one, several by name, or one that is made from the student."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detdistill.api.shared import known_image_settings
from detdistill.errors import ClassCountError, ClassNameError, RunError, name_list
from detdistill.settings import DistillSettings, TrainSettings, as_plain

if TYPE_CHECKING:
    from detdistill.data.records import DataSplits
    from detdistill.detectors.contract import Detector, Teacher
    from detdistill.evaluation import Scores
    from detdistill.progress import Progress
    from detdistill.training.self_teacher import OwnAverage

Sources = dict[str, "str | Detector"]
"""What each teacher is made of: a path or model string, a detector, or ``self:...``; a single teacher has the empty name."""

OTHER_SEED = 1000
"""Added to the seed of a run for its ``self:trained`` teacher, which would otherwise be the baseline of that seed itself."""


def read_teachers(teacher: Any, settings: DistillSettings) -> tuple[str | None, Sources]:
    """The names of the teachers as text, and their sources, checked as far as possible before anything is loaded.

    Raises:
        DetdistillError: a teacher has no use, no name or no model, or cannot be used with these settings.
    """
    from detdistill.given import teachers_of
    from detdistill.methods.shared.catalogue import split_turns
    from detdistill.methods.shared.compose import match_teachers
    from detdistill.training.self_teacher import read_self

    text, sources = teachers_of(teacher, settings.method)
    match_teachers(settings.method, sources or [""])
    own = [source for source in sources.values() if is_self(source)]
    for source in own:
        read_self(str(source))
    if settings.cache is not None or settings.served is not None:
        flag = "cache" if settings.served is None else "served"
        what = (
            f"{own[0]} changes with the student" if own else "it holds the outputs of one teacher" if len(sources) > 1
            else "its outputs are those of one method at all times" if len(split_turns(settings.method)) > 1 else ""
        )  # fmt: skip
        if what:
            raise RunError(f"{flag}: {what}; leave out --{flag}, so that the teachers run with the student")
    if own and settings.inherit:
        raise RunError(f"inherit: {own[0]} is made from the student, so there is nothing to copy; leave out --inherit")
    return text, sources


def one_teacher(teacher: Any, method: str, what: str) -> tuple[str | None, str | Detector | None]:
    """Name and source of the teacher for what works with one fixed teacher.

    Raises:
        RunError: several teachers, one made from the student, or methods one after the other.
    """
    from detdistill.given import teachers_of
    from detdistill.methods.shared.catalogue import named_teachers, split_turns

    text, sources = teachers_of(teacher, method)
    if len(sources) > 1 or any(named_teachers(method)) or len(split_turns(method)) > 1 or any(map(is_self, sources.values())):
        raise RunError(f"{what}: it works with one trained teacher and methods without @ and >; run it for each of your teachers")
    return text, next(iter(sources.values()), None)


def is_self(source: Any) -> bool:
    """Whether a source stands for a teacher that is made from the student."""
    from detdistill.training.self_teacher import PREFIX

    return isinstance(source, str) and source.startswith(PREFIX)


def with_trained_self(
    text: str | None, sources: Sources, settings: DistillSettings, train: Callable[[Path, dict[str, Any]], Path]
) -> tuple[str | None, Sources]:
    """Train the teachers ``self:trained``, and put their run folders in their places.

    Args:
        text: the teachers' names, as in ``read_teachers``.
        sources: their sources.
        settings: of the run; its teacher is trained with the same ones under another seed.
        train: trains the student's model alone in a folder with given settings, and returns the folder.

    Raises:
        RunError: the run has several processes.
    """
    from detdistill.training.folder import new_folder
    from detdistill.training.self_teacher import read_self

    wanted = [name for name, source in sources.items() if is_self(source) and read_self(str(source)) is None]
    if not wanted:
        return text, sources
    if settings.devices * settings.nodes > 1:
        raise RunError(
            "teacher self:trained: with several processes, first run `detdistill train`, then give its folder as --teacher"
        )
    folder = new_folder(None, "self-teacher") if settings.out is None else settings.out.with_name(f"{settings.out.name}-teacher")
    plain = {name: getattr(settings, name) for name in as_plain(TrainSettings())}
    again = settings.resume and (folder / "config.yaml").exists()
    done = str(train(folder, {**plain, "out": folder, "resume": again, "report": False, "seed": settings.seed + OTHER_SEED}))
    found = {name: done if name in wanted else source for name, source in sources.items()}
    return ",".join(f"{name}={source}" if name else str(source) for name, source in found.items()), found


def load_teachers(sources: Sources, splits: DataSplits, settings: DistillSettings) -> dict[str, Teacher | OwnAverage]:
    """Load the teachers. Of several, and where not all images are labelled for all classes, each may know some classes only.

    Raises:
        ModelError: a teacher cannot be loaded, or has none of the wanted classes; the message names it.
    """
    from detdistill.detectors.contract import Teacher
    from detdistill.given import about_teacher
    from detdistill.training.self_teacher import read_self

    some = len(sources) > 1 or _partly_labelled(splits)
    loaded: dict[str, Teacher | OwnAverage] = {}
    for name, source in sources.items():
        with about_teacher(name):
            own = read_self(str(source)) if is_self(source) else None
            if own is not None:
                loaded[name] = own
                continue
            detector = load_teacher(source, splits, settings.other_classes or some)
            known = detector.spec.classes
            if known and not settings.other_classes and not set(known) & set(splits.classes):
                raise ClassNameError(
                    f"it knows none of the student's classes ({name_list(splits.classes)}), only {name_list(known)}; "
                    "--other_classes true lets such a teacher serve methods on features"
                )
            loaded[name] = Teacher(detector).fold_norms()
    return loaded


def score_teachers(
    teachers: Mapping[str, Teacher | OwnAverage],
    sources: Sources,
    splits: DataSplits,
    settings: DistillSettings,
    progress: Progress,
) -> dict[str, Scores]:
    """Score each teacher on the validation images, a specialist on its own classes and the images labelled for them."""
    from detdistill.data.joined import only_classes
    from detdistill.training.self_teacher import OwnAverage
    from detdistill.training.teacher_scores import score_teacher

    found: dict[str, Scores] = {}
    partly = _partly_labelled(splits)
    for name, teacher in teachers.items():
        if isinstance(teacher, OwnAverage):
            continue
        shared = [one for one in splits.classes if one in teacher.spec.classes]
        special = shared and len(shared) < len(splits.classes) and (name or partly)
        mine = dataclasses.replace(splits, val=only_classes(splits.val, shared)) if special else splits
        source = sources[name]
        scores = score_teacher(teacher, mine, settings, progress, source if isinstance(source, str) else None)
        if scores is not None:
            found[name] = scores
    return found


def _partly_labelled(splits: DataSplits) -> bool:
    """Whether training images are labelled for some of the classes only."""
    return any(record.labelled is not None for record in splits.train.records)


def load_teacher(teacher: str | Detector, splits: DataSplits, other_classes: bool) -> Detector:
    """Load the teacher. Classes are matched by name, so it may have further classes, in any order, or none (a backbone).

    Raises:
        ClassNameError: the teacher has classes, but lacks one of the data, and ``other_classes`` is False.
    """
    from detdistill.given import open_detector

    wanted = splits.train.classes
    try:
        detector = open_detector(teacher, wanted)
    except ClassCountError:
        detector = open_detector(teacher)
    known = detector.spec.classes
    unknown = [name for name in wanted if name not in known]
    if not known or not unknown or other_classes:
        return detector
    who = teacher if isinstance(teacher, str) else detector.spec.name
    surplus = [name for name in known if name not in wanted]
    plain = {name.strip().lower(): name for name in surplus}
    spelling = next(((name, plain[name.strip().lower()]) for name in unknown if name.strip().lower() in plain), None)
    raise ClassNameError(
        f"teacher {who} has {len(known)} classes ({name_list(known, surplus)}), "
        f"but {len(wanted) if len(wanted) != len(known) else 'others'} are wanted ({name_list(wanted, unknown)}); "
        f"it does not know {name_list(unknown)}"
        f"{f' (it spells {spelling[0]!r} as {spelling[1]!r})' if spelling else ''}"
        f"; --other_classes true lets such a teacher serve methods on features"
    )


def compare_sizes(teacher: str | Detector | None, settings: TrainSettings, progress: Progress) -> None:
    """Say so if the teacher was trained on images of another size than it will be shown: its AP may be far lower there."""
    from detdistill.training.plan import view_settings

    views = view_settings(settings).of_teacher
    given: dict[str, Any] = {name: getattr(views, name) for name in ("size", "resize", "max_size")}
    trained = {} if teacher is None else known_image_settings(teacher, progress, given)
    differing = [name for name, value in trained.items() if value != given[name]]
    if differing:
        then = ", ".join(f"{name} {trained[name]}" for name in differing)
        now = ", ".join(f"{name} {given[name]}" for name in differing)
        progress.say(f"the teacher was trained with {then} and is shown images with {now}: it may detect less there", "yellow")
