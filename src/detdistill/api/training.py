"""Training a detector, distilling a teacher into a student, and caches of a teacher's outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from detdistill.errors import DetdistillError, RunError, StoppedError
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
    from detdistill.training.experiment import Experiment
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
            or a detector in memory (also a wrapped one), which is frozen. May be None with ``cache`` and ``served`` (unless the
            method or ``inherit`` needs the teacher itself), and for methods without a teacher. Several as ``a=RUN1,b=RUN2`` or
            as a dict.
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
    from detdistill.processes import is_main_process
    from detdistill.progress import Progress
    from detdistill.training.folder import after_restart
    from detdistill.training.mirror import at_url, sender

    _check_methods(teacher, wanted)
    wanted = after_restart(wanted)
    with progress or Progress(quiet=not is_main_process()) as shown, at_url(wanted, shown.say) as (wanted, mirror):
        session, scores = _opened(teacher, student, data, wanted, shown)
        if not _several(wanted):
            return _alone(session, scores, shown, sender(mirror, shown.say))
        from detdistill.training.experiment import run_experiment

        return _compared(run_experiment(session, scores, shown), wanted, shown)


def distill_each(
    teacher: Model | Mapping[str, Model] | None,
    student: str | Detector | Callable[[], Detector],
    data: str,
    variants: Mapping[str, Mapping[str, Any]],
    *,
    progress: Progress,
    failed: Callable[[str, DetdistillError], None] | None = None,
) -> dict[str, Distilled]:
    """Distil several times with different settings. With ``jobs`` or on Ray, the runs of all of them take place together.

    Args:
        teacher: see ``distill``.
        student: see ``distill``.
        data: see ``distill``.
        variants: by a short name, the fields of ``DistillSettings`` with ``baseline`` or ``seeds``; ``jobs`` and ``on`` of the
            first hold for all.
        progress: display of the progress.
        failed: takes the name and the error of a variant that failed, and the others go on; None: the error is raised.

    Returns:
        By name, the results of the variants that did not fail.

    Raises:
        DetdistillError: see ``distill``.
    """
    from detdistill.training.experiment import apart

    wanted = {name: settings_of(DistillSettings, dict(given)) for name, given in variants.items()}
    first = next(iter(wanted.values()))
    found: dict[str, Distilled] = {}
    if apart(first):
        return _distilled_together(teacher, student, data, wanted, progress, failed)
    for name, given in variants.items():
        if len(variants) > 1:
            progress.say(name)
        try:
            found[name] = distill(teacher, student, data, progress=progress, **given)
        except StoppedError:
            raise
        except DetdistillError as error:
            if failed is None:
                raise
            failed(name, error)
    return found


def _distilled_together(
    teacher: Model | Mapping[str, Model] | None,
    student: str | Detector | Callable[[], Detector],
    data: str,
    wanted: Mapping[str, DistillSettings],
    shown: Progress,
    failed: Callable[[str, DetdistillError], None] | None,
) -> dict[str, Distilled]:
    """The runs of all variants at the same time, after all variants have been checked."""
    from detdistill.training.experiment import Planned, planned, run_side_by_side

    first = next(iter(wanted.values()))
    ready: dict[str, Planned] = {}
    broken: set[str] = set()

    def note(name: str, error: DetdistillError) -> None:
        if failed is None:
            raise error
        broken.add(name)
        failed(name, error)

    with contextlib.ExitStack() as folders:
        for name, settings in wanted.items():
            shown.say(name)
            try:
                _check_methods(teacher, settings)
                session, scores = _opened(teacher, student, data, settings, shown)
                ready[name] = folders.enter_context(planned(session, scores))
            except DetdistillError as error:
                note(name, error)
        plans = {replace(plan, title=f"{name}: {plan.title}"): name for name, some in ready.items() for plan in some.waiting}
        inputs = next((some.inputs for some in ready.values()), {})
        run_side_by_side(
            list(plans),
            first,
            shown,
            inputs=inputs,
            failed=None if failed is None else lambda plan, error: note(plans[plan], error),
        )
        return {name: _compared(some.finished(), wanted[name], shown) for name, some in ready.items() if name not in broken}


def _check_methods(teacher: Model | Mapping[str, Model] | None, wanted: DistillSettings) -> None:
    """Check methods and settings that need a teacher; a misspelt method is reported before anything else.

    Raises:
        RunError: there is no teacher where one is needed.
        MethodError: no such method or hyper-parameter.
    """
    from detdistill.methods.shared.compose import check_teacher_size, parse_methods

    methods = parse_methods(wanted.method)
    if wanted.teacher_size is not None:
        check_teacher_size(wanted.method)
    needing = [kind.slug for kind, given in methods if kind.needs(**given).teacher is not None]
    if teacher is None and wanted.cache is None and wanted.served is None and needing:
        raise RunError(
            f"teacher: {', '.join(needing)} needs a teacher (--teacher), a cache of its outputs (--cache) or a served one "
            "(--served)"
        )
    if teacher is None and wanted.inherit:
        raise RunError("inherit: it copies weights of the teacher; give --teacher")
    if _several(wanted):
        local_only(wanted.out, "several runs (--baseline, --seeds) work in one local folder; give each run a URL of its own, or")
    if wanted.on != "local":
        local_only(wanted.out, "runs on a cluster work in a folder that all nodes share;")


def _several(wanted: DistillSettings) -> bool:
    """Whether there is more than one run, or one with a seed of a list."""
    return wanted.baseline or bool(wanted.seeds)


def _opened(
    teacher: Model | Mapping[str, Model] | None,
    student: str | Detector | Callable[[], Detector],
    data: str,
    wanted: DistillSettings,
    shown: Progress,
) -> tuple[Session, dict[str, Scores]]:
    """Read data and teachers, check that they fit the student, and evaluate the teachers.

    Raises:
        DetdistillError: see ``distill``.
    """
    from detdistill.given import student_of
    from detdistill.processes import is_main_process
    from detdistill.training.experiment import apart
    from detdistill.training.from_cache import why_live_teacher
    from detdistill.training.own_models import check_one_process
    from detdistill.training.plan import Plan

    teacher_name, sources = read_teachers(teacher, wanted)
    student_name, build = student_of(student)
    several = _several(wanted)
    elsewhere = wanted.on != "local"
    _check_start(student_name, build, wanted, alone=not (several or elsewhere))
    reason = why_live_teacher(wanted.method)
    if not sources and reason:
        raise RunError(f"{reason}; give --teacher too")
    if several or elsewhere:
        own = [text for text in sources.values() if not isinstance(text, str)]
        check_one_process((teacher_name if own else None, student_name), 2 if apart(wanted) else 1)
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
    return session, score_teachers(live, sources, splits, wanted, shown) if score else {}


def _session(
    plan: Plan, splits: DataSplits, live: Mapping[str, Teacher | OwnAverage], live_too: bool, shown: Progress
) -> Session:
    """The session of a distilled run: with a cache or a served teacher, another runs only if the method or ``inherit`` needs it.

    Raises:
        PairError: the pair cannot work; this is found before a baseline is trained.
        RunError: see ``open_knowledge``.
    """
    from detdistill.training.from_cache import open_knowledge
    from detdistill.training.session import open_session

    settings = plan.settings
    assert isinstance(settings, DistillSettings)
    live_too = live_too or settings.inherit
    only = next(iter(live.values()), None)  # ``read_teachers`` refuses others with a cache or a served teacher
    knowledge = open_knowledge(settings, splits, cast("Teacher | None", only), shown.say)
    if knowledge is None:
        return open_session(plan, splits, live, None, shown)
    how = "the teacher is loaded too, for its modules" if live_too else "no teacher is run"
    shown.say(f"learning from {knowledge.folder.url}; {how}")
    return open_session(plan, splits, live if live_too else None, knowledge, shown)


def _alone(session: Session, scores: dict[str, Scores], shown: Progress, saved: Callable[[], None] | None) -> Distilled:
    """A single distilled run."""
    from detdistill.processes import is_main_process
    from detdistill.training.experiment import run_elsewhere
    from detdistill.training.run import run
    from detdistill.training.teacher_scores import note_teachers, scores_of_all

    settings = session.plan.settings
    assert isinstance(settings, DistillSettings)
    folder = run(session, shown, saved).folder if settings.on == "local" else run_elsewhere(session, shown)
    if scores and is_main_process():
        note_teachers(folder, scores)
    page = folder / "report.html"
    if settings.report:
        _report([folder], page, shown)
    return Distilled(folder, (folder,), page, teacher_scores=scores_of_all(scores, session.splits.classes))


def _compared(experiment: Experiment, settings: DistillSettings, shown: Progress) -> Distilled:
    """The comparison of an experiment's runs: with several seeds, with ``baseline`` also baselines."""
    from detdistill.compare import over_seeds
    from detdistill.training.origin import note_in_card

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
        ahead = wanted.on != "local" and wanted.device == "cuda"  # this machine only looks ahead, and may have no GPU
        device = device_of("auto" if ahead else wanted.device)
        return Cached(*make_cache(str(out), (teacher_name, loaded), (data, splits), student, wanted, device, shown))


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
