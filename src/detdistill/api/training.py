"""Training a detector, distilling a teacher into a student, and caches of a teacher's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from detdistill.api.reading import compare
from detdistill.api.shared import (
    device_of,
    load_splits,
    local_only,
    not_these_digits,
    settings_of,
)
from detdistill.api.teachers import (
    compare_sizes,
    load_teacher,
    load_teachers,
    one_teacher,
    read_teachers,
    score_teachers,
    with_trained_self,
)
from detdistill.errors import RunError
from detdistill.results import Distilled
from detdistill.settings import CacheSettings, DistillSettings, TrainSettings

if TYPE_CHECKING:
    from detdistill.api.shared import Model
    from detdistill.cache.forecast import Forecast
    from detdistill.compare import Gain
    from detdistill.data.records import DataSplits
    from detdistill.detectors.contract import Detector, Teacher
    from detdistill.evaluation import Scores
    from detdistill.progress import Progress
    from detdistill.training.plan import Plan
    from detdistill.training.run import Run
    from detdistill.training.self_teacher import OwnAverage
    from detdistill.training.session import Session


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
    from detdistill.training.mirror import at_url, sender
    from detdistill.training.plan import Plan
    from detdistill.training.run import run
    from detdistill.training.session import open_session

    wanted = after_restart(wanted)
    name, build = student_of(model, "model")
    with progress or Progress(quiet=not is_main_process()) as shown, at_url(wanted, shown.say) as (wanted, mirror):
        _check_start(name, build, wanted, alone=True)
        splits = load_splits(data, wanted.strict, shown, wanted.rescan, wanted.held_out)
        plan = Plan(name, data, wanted, role=role, title=role, build=build)
        result = run(open_session(plan, splits, progress=shown), shown, sender(mirror, shown.say))
        if wanted.report:
            _report([result.folder], result.folder / "report.html", shown)
    return result


def distill(
    teacher: Model | Mapping[str, Model] | None,
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
            ``inherit`` needs the teacher itself), and for methods without a teacher. Several as ``a=RUN1,b=RUN2`` or as a dict.
            ``self:ema`` is the student's own moving average, ``self:trained`` the student's own model, trained alone first.
        student: a model string such as ``fcos:resnet18``. Or a model of your own: a detector (see ``wrap``; each run trains a
            copy of it), or a function that builds one (each run calls it under its seed); see ``own_student``.
        data: see ``train``.
        method: one method or several joined by ``+``: ``pkd``, ``fgd,temperature=0.8+pkd``. With several teachers
            ``pkd@a+fkd@b``, or one after the other ``pkd@a>pkd@b``.
        progress: display of the progress; None: a new one on stderr.
        settings: fields of ``DistillSettings``, e.g. ``epochs=24, baseline=True, seeds=(0, 1, 2)``.

    Raises:
        DetdistillError: one line that says what is wrong and what to do.

    Example:
        result = distill("runs/teacher", "fcos:resnet18,width=0.5", "coco/data.yaml", "pkd", baseline=True, seeds=(0, 1, 2))
        print(result.gains[0], result.report)
    """
    wanted = settings_of(DistillSettings, {"method": method, **settings})
    from detdistill.given import student_of
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
    teacher_name, sources = read_teachers(teacher, wanted)
    student_name, build = student_of(student)
    from detdistill.training.folder import after_restart

    wanted = after_restart(wanted)
    several = wanted.baseline or bool(wanted.seeds)
    if several:
        local_only(wanted.out, "several runs (--baseline, --seeds) work in one local folder; give each run a URL of its own, or")
    from detdistill.processes import is_main_process
    from detdistill.training.from_cache import why_live_teacher
    from detdistill.training.mirror import at_url, sender
    from detdistill.training.own_models import check_one_process
    from detdistill.training.plan import Plan

    reason = why_live_teacher(wanted.method)
    if not sources and reason:
        raise RunError(f"{reason}; give --teacher too")
    if several:
        own = [text for text in sources.values() if not isinstance(text, str)]
        check_one_process((teacher_name if own else None, student_name), max(wanted.jobs, wanted.devices * wanted.nodes))
    with progress or Progress(quiet=not is_main_process()) as shown, at_url(wanted, shown.say) as (wanted, mirror):
        _check_start(student_name, build, wanted, alone=not several)
        splits = load_splits(data, wanted.strict, shown, wanted.rescan, wanted.held_out)

        def trained(folder: Path, given: dict[str, Any]) -> Path:
            return train(student, data, role="teacher", progress=shown, **given).folder

        teacher_name, sources = with_trained_self(teacher_name, sources, wanted, trained)
        with not_these_digits(data):
            live = load_teachers(sources, splits, wanted)
        for source in sources.values():
            compare_sizes(source, wanted, shown)
        title = f"distil ({wanted.method})"
        plan = Plan(student_name, data, wanted, role="distilled", teacher=teacher_name, title=title, build=build)
        session = _session(plan, splits, live, bool(reason), shown)
        finished = wanted.resume and wanted.out is not None and (wanted.out / "summary.json").exists()
        score = wanted.score_teacher and is_main_process() and not finished
        scores = score_teachers(live, sources, splits, wanted, shown) if score else {}
        saved = sender(mirror, shown.say)
        return _alone(session, scores, shown, saved) if not several else _experiment(session, scores, shown)


def _session(
    plan: Plan, splits: DataSplits, live: Mapping[str, Teacher | OwnAverage], live_too: bool, shown: Progress
) -> Session:
    """The session of a distilled run: with a cache, the teacher runs only if the method or ``inherit`` needs it.

    Raises:
        PairError: the pair cannot work; this is found before a baseline is trained.
        CacheError: see ``open_cache``.
    """
    from detdistill.training.from_cache import open_cache
    from detdistill.training.plan import view_settings
    from detdistill.training.session import open_session

    settings = plan.settings
    assert isinstance(settings, DistillSettings)
    if settings.cache is None:
        return open_session(plan, splits, live, None, shown)
    live_too = live_too or settings.inherit
    teacher = cast("Teacher | None", next(iter(live.values()), None))  # ``read_teachers`` refuses others with a cache
    knowledge = open_cache(settings.cache, settings.method, splits, view_settings(settings), teacher)
    how = "the teacher is loaded too, for its modules" if live_too else "no teacher is run"
    shown.say(f"learning from {knowledge.folder.url}; {how}")
    return open_session(plan, splits, live if live_too else None, knowledge, shown)


def _alone(session: Session, scores: dict[str, Scores], shown: Progress, saved: Callable[[], None] | None) -> Distilled:
    """A single distilled run."""
    from detdistill.processes import is_main_process
    from detdistill.training.run import run
    from detdistill.training.teacher_scores import note_teachers, scores_of_all

    result = run(session, shown, saved)
    if scores and is_main_process():
        note_teachers(result.folder, scores)
    page = result.folder / "report.html"
    if session.plan.settings.report:
        _report([result.folder], page, shown)
    return Distilled(result.folder, (result.folder,), page, teacher_scores=scores_of_all(scores, session.splits.classes))


def _experiment(session: Session, scores: dict[str, Scores], shown: Progress) -> Distilled:
    """Runs with several seeds, with ``baseline`` also baselines, and their comparison."""
    from detdistill.compare import over_seeds
    from detdistill.training.experiment import run_experiment
    from detdistill.training.origin import note_in_card

    settings = session.plan.settings
    assert isinstance(settings, DistillSettings)
    experiment = run_experiment(session, scores, shown)
    gains: tuple[Gain, ...] = ()
    if settings.baseline:
        gains = tuple(compare(experiment.runs, out=experiment.folder / "compare.json"))
    for folder, seeds in over_seeds(experiment.runs, gains).items():
        note_in_card(folder, seeds=seeds)
    page = experiment.folder / "report.html"
    if settings.report:
        _report(experiment.runs, page, shown)
    return Distilled(experiment.folder, experiment.runs, page, gains, experiment.teacher_scores)


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
    teacher_name, source = one_teacher(teacher, wanted.method, "cache")
    if teacher_name is None or source is None:
        raise RunError("cache: it holds the outputs of a teacher; give --teacher")
    with progress or Progress(quiet=not is_main_process()) as shown:
        from detdistill.training.fill_cache import make_cache

        splits = load_splits(data, wanted.strict, shown, wanted.rescan)
        with not_these_digits(data):
            loaded = load_teacher(source, splits, wanted.other_classes)
        compare_sizes(source, wanted, shown)
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
            return load_teacher(teacher, splits, True), splits

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


def _report(runs: Sequence[Path], page: Path, progress: Progress) -> None:
    from detdistill.processes import is_main_process
    from detdistill.report.page import build_report

    if is_main_process():
        build_report(runs, page, progress=progress)
