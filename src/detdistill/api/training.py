"""Training a detector, distilling a teacher into a student, and caches of a teacher's outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detdistill.api.reading import compare
from detdistill.api.shared import (
    device_of,
    known_image_settings,
    load_splits,
    not_these_digits,
    settings_of,
)
from detdistill.errors import RunError
from detdistill.results import Distilled
from detdistill.settings import CacheSettings, DistillSettings, TrainSettings

if TYPE_CHECKING:
    from detdistill.api.shared import Model
    from detdistill.cache.forecast import Forecast
    from detdistill.compare import Gain
    from detdistill.data.records import DataSplits
    from detdistill.detectors.contract import Detector
    from detdistill.progress import Progress
    from detdistill.training.run import Run


def train(
    model: str | Detector | Callable[[], Detector],
    data: str = "digits",
    *,
    role: str = "train",
    progress: Progress | None = None,
    **settings: Any,
) -> Run:
    """Train a detector without a teacher: a teacher or a baseline.

    Args:
        model: e.g. ``fcos:resnet18`` (detector:timm backbone, options after commas) or ``torchvision:retinanet_resnet50_fpn_v2``.
            Or a model of your own: a detector (see ``wrap``), or a function that builds one; see ``own_student``.
        data: COCO JSON or folder, YOLO data.yaml, VOC folder, Roboflow export, or ``digits``.
        role: role of the run in reports: train, teacher or baseline.
        progress: display of the progress; None: a new one on stderr.
        settings: fields of ``TrainSettings``.

    Returns:
        The finished run: folder, summary, scores and trained detector.

    Raises:
        DetdistillError: one line that says what is wrong and what to do.
    """
    wanted = settings_of(TrainSettings, settings)
    from detdistill.given import student_of
    from detdistill.processes import is_main_process
    from detdistill.progress import Progress
    from detdistill.training.folder import after_restart
    from detdistill.training.plan import Plan
    from detdistill.training.run import run
    from detdistill.training.session import open_session

    wanted = after_restart(wanted)
    name, build = student_of(model, "model")
    _check_start(name, build, wanted, alone=True)
    with progress or Progress(quiet=not is_main_process()) as shown:
        splits = load_splits(data, wanted.strict, shown, wanted.rescan, wanted.held_out)
        plan = Plan(name, data, wanted, role=role, title=role, build=build)
        result = run(open_session(plan, splits, progress=shown), shown)
        if wanted.report:
            _report([result.folder], result.folder / "report.html", shown)
    return result


def distill(
    teacher: Model | None,
    student: str | Detector | Callable[[], Detector],
    data: str = "digits",
    method: str = "pkd",
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Distilled:
    """Distil a teacher into a student; with ``baseline=True``, also measure the gain over the student trained alone.

    Args:
        teacher: a run folder, a checkpoint, ``torchvision:NAME,weights=...``, or another model string; the result of ``train``;
            or a detector in memory (also a wrapped one), which is frozen. May be None with ``cache`` (unless the method or
            ``inherit`` needs the teacher itself), and for methods without a teacher.
        student: a model string such as ``fcos:resnet18``. Or a model of your own: a detector (see ``wrap``; each run trains a
            copy of it), or a function that builds one (each run calls it under its seed); see ``own_student``.
        data: see ``train``.
        method: one method or several joined by ``+``: ``pkd``, ``fgd,temperature=0.8+pkd``.
        progress: display of the progress; None: a new one on stderr.
        settings: fields of ``DistillSettings``, e.g. ``epochs=24, baseline=True, seeds=(0, 1, 2)``.

    Raises:
        DetdistillError: one line that says what is wrong and what to do.

    Example:
        result = distill("runs/teacher", "fcos:resnet18,width=0.5", "coco/data.yaml", "pkd", baseline=True, seeds=(0, 1, 2))
        print(result.gains[0], result.report)
    """
    wanted = settings_of(DistillSettings, {"method": method, **settings})
    from detdistill.given import student_of, teacher_of
    from detdistill.methods.shared.compose import check_teacher_size, parse_methods
    from detdistill.progress import Progress

    methods = parse_methods(wanted.method)  # reports a misspelt method before anything else
    if wanted.teacher_size is not None:
        check_teacher_size(wanted.method)
    needing = [kind.slug for kind, given in methods if kind.needs(**given).teacher is not None]
    if teacher is None and wanted.cache is None and needing:
        raise RunError(f"teacher: {', '.join(needing)} needs a teacher (--teacher) or a cache of its outputs (--cache)")
    if teacher is None and wanted.inherit:
        raise RunError("inherit: it copies weights of the teacher; give --teacher")
    teacher_name, teacher = teacher_of(teacher)
    student_name, build = student_of(student)
    from detdistill.training.folder import after_restart

    wanted = after_restart(wanted)
    several = wanted.baseline or bool(wanted.seeds)
    _check_start(student_name, build, wanted, alone=not several)
    from detdistill.compare import over_seeds
    from detdistill.detectors.contract import Teacher
    from detdistill.processes import is_main_process
    from detdistill.training.experiment import run_experiment
    from detdistill.training.from_cache import open_cache, why_live_teacher
    from detdistill.training.origin import note_in_card
    from detdistill.training.own_models import check_one_process
    from detdistill.training.plan import Plan, view_settings
    from detdistill.training.run import run
    from detdistill.training.session import open_session
    from detdistill.training.teacher_scores import note_teacher, score_teacher

    reason = why_live_teacher(wanted.method)
    live_too = wanted.inherit or bool(reason)
    if teacher is None and reason:
        raise RunError(f"{reason}; give --teacher too")
    if several:
        check_one_process((teacher_name, student_name), max(wanted.jobs, wanted.devices * wanted.nodes))
    with progress or Progress(quiet=not is_main_process()) as shown:
        splits = load_splits(data, wanted.strict, shown, wanted.rescan, wanted.held_out)
        with not_these_digits(data):
            live = None if teacher is None else Teacher(_load_teacher(teacher, splits, wanted.other_classes))
        _compare_sizes(teacher, wanted, shown)
        knowledge = None
        if wanted.cache is not None:
            knowledge = open_cache(wanted.cache, wanted.method, splits, view_settings(wanted), live)
            how = "the teacher is loaded too, for its modules" if live_too else "no teacher is run"
            shown.say(f"learning from {knowledge.folder.url}; {how}")
        title = f"distil ({wanted.method})"
        plan = Plan(student_name, data, wanted, role="distilled", teacher=teacher_name, title=title, build=build)
        # Raises PairError for a pair that cannot work, before a baseline is trained.
        session = open_session(plan, splits, live if knowledge is None or live_too else None, knowledge, shown)
        finished = wanted.resume and wanted.out is not None and (wanted.out / "summary.json").exists()
        score = wanted.score_teacher and is_main_process() and not finished
        source = teacher if isinstance(teacher, str) else None
        scores = score_teacher(live, splits, wanted, shown, source) if score and live is not None else None
        if not several:
            result = run(session, shown)
            if scores is not None and is_main_process():
                note_teacher(result.folder, scores)
            page = result.folder / "report.html"
            if wanted.report:
                _report([result.folder], page, shown)
            return Distilled(result.folder, (result.folder,), page, teacher_scores=scores)
        experiment = run_experiment(session, scores, shown)
        gains: tuple[Gain, ...] = ()
        if wanted.baseline:
            gains = tuple(compare(experiment.runs, out=experiment.folder / "compare.json"))
        for folder, seeds in over_seeds(experiment.runs, gains).items():
            note_in_card(folder, seeds=seeds)
        page = experiment.folder / "report.html"
        if wanted.report:
            _report(experiment.runs, page, shown)
        return Distilled(experiment.folder, experiment.runs, page, gains, scores)


@dataclass(frozen=True)
class Cached:
    """Result of ``cache``."""

    folder: str
    """Folder or URL of the cache."""
    records: int
    """Number of records in the cache, from all writers."""
    complete: bool
    """The cache has a record of every view."""
    store: str
    """Number format of the stored tensors."""
    forecast: Forecast
    """Forecast of size and time for the records that were missing at the start."""


def cache(
    teacher: Model,
    out: str | Path,
    data: str = "digits",
    method: str = "pkd",
    *,
    student: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Cached:
    """Store a teacher's outputs for all training images, for runs with ``cache=out``. An unfinished cache is continued.

    Args:
        teacher: see ``distill``.
        out: folder or fsspec URL (``s3://...``).
        data: see ``train``.
        method: method of the runs. A cache serves all methods with the same knowledge, e.g. the teacher's feature maps.
        student: student of the runs, for methods that need it and for the choice of the number format by its losses; None: an
            untrained detector of the teacher's architecture.
        progress: display of the progress; None: a new one on stderr.
        settings: fields of ``CacheSettings``; give size, resize, max_size, flip and scales the values of the runs.

    Raises:
        DetdistillError: e.g. no space, or ``out`` is a cache of another teacher; one line that says what is wrong and what to do.
    """
    wanted = settings_of(CacheSettings, {"method": method, **settings})
    from detdistill.given import teacher_of
    from detdistill.methods.shared.compose import check_teacher_size, parse_methods
    from detdistill.processes import is_main_process
    from detdistill.progress import Progress
    from detdistill.training.machine import check_machine

    parse_methods(wanted.method)
    if wanted.teacher_size is not None:
        check_teacher_size(wanted.method)
    if not (student is None or isinstance(student, str)):
        raise RunError(f"student: a cache needs a model string here, not a {type(student).__name__}")
    check_machine(wanted)
    teacher_name, source = teacher_of(teacher)
    assert teacher_name is not None
    assert source is not None
    with progress or Progress(quiet=not is_main_process()) as shown:
        from detdistill.training.fill_cache import make_cache

        splits = load_splits(data, wanted.strict, shown, wanted.rescan)
        with not_these_digits(data):
            loaded = _load_teacher(source, splits, wanted.other_classes)
        _compare_sizes(source, wanted, shown)
        return Cached(
            *make_cache(str(out), (teacher_name, loaded), (data, splits), student, wanted, device_of(wanted.device), shown)
        )


def verify_cache(
    out: str | Path,
    teacher: str | None = None,
    *,
    data: str | None = None,
    records: int = 20,
    device: str = "auto",
    progress: Progress | None = None,
) -> str:
    """Check every record's checksum; with a teacher, also compare some records with new outputs of the teacher.

    Args:
        out: folder or URL of the cache.
        teacher: see ``distill``; None: checksums only.
        data: the training data, if it has moved; None: the path in the cache's description.
        records: number of records to compare, chosen at random.
        device: device of the teacher: auto, cpu or cuda.
        progress: display of the progress; None: a new one on stderr.

    Returns:
        The findings, in one line.

    Raises:
        DetdistillError: a record is damaged (the message names it), or records differ from the teacher's outputs.
    """
    from detdistill.progress import Progress
    from detdistill.training.fill_cache import check_cache

    with progress or Progress() as shown:

        def live(known_data: str) -> tuple[Detector, DataSplits]:
            assert teacher is not None
            splits = load_splits(data or known_data, False, shown)
            return _load_teacher(teacher, splits, True), splits

        return check_cache(str(out), None if teacher is None else live, records, device_of(device), shown)


def _check_start(model: str, build: Callable[[], Detector] | None, settings: TrainSettings, alone: bool) -> None:
    """Check before the data are read: the model string must be valid, the run folder free, and several processes possible."""
    from detdistill.detectors.adapters import read_model
    from detdistill.processes import is_main_process
    from detdistill.training.folder import forget_launch, new_folder
    from detdistill.training.machine import check_interactive

    if build is None:
        read_model(model)
    if alone:
        check_interactive(settings)
    if settings.out is not None and not settings.resume and is_main_process():
        forget_launch(settings.out)
        new_folder(settings.out, "")


def _load_teacher(teacher: str | Detector, splits: DataSplits, other_classes: bool) -> Detector:
    """Load the teacher. Classes are matched by name, so it may have further classes, in any order, or none (a backbone).

    Raises:
        ClassNameError: the teacher has classes, but lacks one of the data, and ``other_classes`` is False.
    """
    from detdistill.errors import ClassCountError, ClassNameError, name_list
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


def _compare_sizes(teacher: str | Detector | None, settings: TrainSettings, progress: Progress) -> None:
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


def _report(runs: Sequence[Path], page: Path, progress: Progress) -> None:
    from detdistill.processes import is_main_process
    from detdistill.report.page import build_report

    if is_main_process():
        build_report(runs, page, progress=progress)
