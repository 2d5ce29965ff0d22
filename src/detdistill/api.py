"""Python functions behind the commands of the command line. Heavy modules are imported only when a function runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from detdistill.errors import RunError, nearest
from detdistill.settings import CacheSettings, DistillSettings, TrainSettings, renamed

if TYPE_CHECKING:
    from detdistill.cache.forecast import Forecast
    from detdistill.compare import Gain
    from detdistill.data.inspect import DataReport
    from detdistill.data.records import DataSplits, Defect, SplitName
    from detdistill.detectors.contract import Detector
    from detdistill.evaluation import Scores
    from detdistill.export.bench import Timing
    from detdistill.export.run import Exported
    from detdistill.progress import Progress
    from detdistill.training.run import Run


@dataclass(frozen=True)
class Distilled:
    """Result of ``distill``."""

    folder: Path
    """The run folder; with ``baseline`` or ``seeds``, the folder that contains the run folders."""
    runs: tuple[Path, ...]
    """The run folders."""
    report: Path
    """Path of the HTML report; with ``report=False`` the file is not written."""
    gains: tuple[Gain, ...] = ()
    """Gains of the distilled runs over their baselines; empty without ``baseline``."""
    teacher_scores: Scores | None = None
    """Scores of the teacher on the validation images; None: not evaluated."""


def train(
    model: str,
    data: str = "digits",
    *,
    role: str = "train",
    progress: Progress | None = None,
    **settings: Any,
) -> Run:
    """Train a detector without a teacher: a teacher or a baseline.

    Args:
        model: e.g. ``fcos:resnet18`` (detector:timm backbone, options after commas) or ``torchvision:retinanet_resnet50_fpn_v2``.
        data: COCO JSON or folder, YOLO data.yaml, VOC folder, Roboflow export, or ``digits``.
        role: role of the run in reports: train, teacher or baseline.
        progress: display of the progress; None: a new one on stderr.
        settings: fields of ``TrainSettings``.

    Returns:
        The finished run: folder, summary, scores and trained detector.

    Raises:
        DetdistillError: one line that says what is wrong and what to do.
    """
    wanted = _settings(TrainSettings, settings)
    from detdistill.progress import Progress
    from detdistill.training.machine import is_main_process
    from detdistill.training.plan import Plan
    from detdistill.training.run import run
    from detdistill.training.session import open_session

    _check_start(model, wanted)
    with progress or Progress(quiet=not is_main_process()) as shown:
        splits = _load(data, wanted.strict, shown)
        result = run(open_session(Plan(model, data, wanted, role=role, title=role), splits), shown)
        if wanted.report:
            _report([result.folder], result.folder / "report.html", shown)
    return result


def distill(
    teacher: str | None,
    student: str,
    data: str = "digits",
    method: str = "pkd",
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Distilled:
    """Distil a teacher into a student; with ``baseline=True``, also measure the gain over the student trained alone.

    Args:
        teacher: a run folder, a checkpoint, ``torchvision:NAME,weights=...``, or another model string. May be None with
            ``cache`` (unless the method or ``inherit`` needs the teacher itself), and for methods without a teacher.
        student: a model string such as ``fcos:resnet18``.
        data: see ``train``.
        method: one method or several joined by ``+``: ``pkd``, ``fgd,temperature=0.8+pkd``.
        progress: display of the progress; None: a new one on stderr.
        settings: fields of ``DistillSettings``, e.g. ``epochs=24, baseline=True, seeds=(0, 1, 2)``.

    Raises:
        DetdistillError: one line that says what is wrong and what to do.

    Example:
        result = distill("runs/teacher", "fcos:resnet18,width=0.5", "coco/data.yaml", "pkd", baseline=True, seeds=(0, 1, 2))
        print(result.gains[0].verdict, result.report)
    """
    wanted = _settings(DistillSettings, {"method": method, **settings})
    from detdistill.methods.shared.compose import parse_methods
    from detdistill.progress import Progress

    methods = parse_methods(wanted.method)  # reports a misspelt method before anything else
    needing = [kind.slug for kind, given in methods if kind.needs(**given).teacher is not None]
    if teacher is None and wanted.cache is None and needing:
        raise RunError(f"teacher: {', '.join(needing)} needs a teacher (--teacher) or a cache of its outputs (--cache)")
    if teacher is None and wanted.inherit:
        raise RunError("inherit: it copies weights of the teacher; give --teacher")
    _check_start(student, wanted)
    from detdistill.detectors.contract import Teacher
    from detdistill.training.experiment import run_experiment
    from detdistill.training.from_cache import open_cache, why_live_teacher
    from detdistill.training.machine import is_main_process
    from detdistill.training.plan import Plan, view_settings
    from detdistill.training.run import run
    from detdistill.training.session import open_session
    from detdistill.training.teacher_scores import note_teacher, score_teacher

    reason = why_live_teacher(wanted.method)
    live_too = wanted.inherit or bool(reason)
    if teacher is None and reason:
        raise RunError(f"{reason}; give --teacher too")
    with progress or Progress(quiet=not is_main_process()) as shown:
        splits = _load(data, wanted.strict, shown)
        live = None if teacher is None else Teacher(_load_teacher(teacher, splits, wanted.other_classes))
        _compare_sizes(teacher, wanted, shown)
        knowledge = None
        if wanted.cache is not None:
            knowledge = open_cache(wanted.cache, wanted.method, splits, view_settings(wanted), live)
            how = "the teacher is loaded too, for its modules" if live_too else "no teacher is run"
            shown.say(f"learning from {knowledge.folder.url}; {how}")
        plan = Plan(student, data, wanted, role="distilled", teacher=teacher, title=f"distil ({wanted.method})")
        # Raises PairError for a pair that cannot work, before a baseline is trained.
        session = open_session(plan, splits, live if knowledge is None or live_too else None, knowledge, shown)
        finished = wanted.resume and wanted.out is not None and (wanted.out / "summary.json").exists()
        score = wanted.score_teacher and is_main_process() and not finished
        scores = score_teacher(live, splits, wanted, shown) if score and live is not None else None
        if not wanted.baseline and not wanted.seeds:
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
    teacher: str,
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
    wanted = _settings(CacheSettings, {"method": method, **settings})
    from detdistill.methods.shared.compose import parse_methods
    from detdistill.progress import Progress
    from detdistill.training.machine import check_machine, is_main_process

    parse_methods(wanted.method)
    check_machine(wanted)
    with progress or Progress(quiet=not is_main_process()) as shown:
        from detdistill.training.fill_cache import make_cache

        splits = _load(data, wanted.strict, shown)
        loaded = _load_teacher(teacher, splits, wanted.other_classes)
        _compare_sizes(teacher, wanted, shown)
        return Cached(*make_cache(str(out), (teacher, loaded), (data, splits), student, wanted, _device(wanted.device), shown))


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
            splits = _load(data or known_data, False, shown)
            return _load_teacher(teacher, splits, True), splits

        return check_cache(str(out), None if teacher is None else live, records, _device(device), shown)


def evaluate(
    model: str, data: str = "digits", *, split: str = "val", batch: int = 8, progress: Progress | None = None, **settings: Any
) -> Scores:
    """Compute the 12 COCO numbers, the AP of each class, and the loss of AP50 by kind of error.

    Args:
        model: a run folder, a ``student/`` folder, a model string with weights, or a file that ``export`` wrote.
        data: see ``train``.
        split: val, test or train.
        batch: images per forward pass.
        progress: display of the progress; None: a new one on stderr.
        settings: the fields size, resize, max_size, device, workers and strict of ``TrainSettings``. For a run folder, the first
            three default to the run's values.

    Raises:
        DetdistillError: one line that says what is wrong and what to do.
    """
    from detdistill.data.discover import load_split
    from detdistill.evaluation import evaluate as evaluate_detector
    from detdistill.progress import Progress
    from detdistill.training.plan import view_settings

    wanted = _settings(TrainSettings, {**_image_settings(model), **settings})
    with progress or Progress() as shown:
        if split not in ("train", "val", "test"):
            raise RunError(f"no split {split!r}; use val, test or train")
        chosen, notes = load_split(data, cast("SplitName", split), strict=wanted.strict)
        _tell(data, notes, chosen.defects, shown)
        device = _device(wanted.device)
        detector = _detector(model, chosen.classes, device)
        bar = shown.bar(f"evaluate on {split}", len(chosen.records))
        return evaluate_detector(
            detector,
            chosen,
            view_settings(wanted),
            batch_size=batch,
            device=device,
            workers=wanted.workers,
            progress=bar.follow,
            errors=True,
        )


def predict(
    model: str,
    images: Path,
    out: Path,
    *,
    score: float = 0.3,
    size: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Path:
    """Draw a detector's boxes on images.

    Args:
        model: as for ``evaluate``.
        images: an image or a folder of images.
        out: folder for the drawn images and ``detections.json``; created if missing.
        score: boxes with a lower score are neither drawn nor written; 0..1.
        size: side of the detector's input images in pixels; None: the size of the model's run.
        device: auto, cpu or cuda.
        progress: display of the progress; None: a new one on stderr.

    Returns:
        ``out``.

    Raises:
        DetdistillError: one line that says what is wrong and what to do.
    """
    from detdistill.evaluation.predict import predict_folder
    from detdistill.progress import Progress
    from detdistill.training.plan import view_settings

    chosen = _image_settings(model)
    if size is not None:
        chosen["size"] = size
    settings = view_settings(_settings(TrainSettings, chosen))
    with progress or Progress() as shown:
        detector = _detector(model, None, _device(device)).eval().to(_device(device))
        bar = shown.bar("predict", 1)
        return predict_folder(detector, Path(images), Path(out), settings, score=score, bar=bar)


def export(
    model: str,
    out: str | Path,
    data: str | None = None,
    *,
    format: str = "onnx",
    int8: bool = False,
    nms: bool = False,
    dynamic: Sequence[str] | None = None,
    opset: int | None = None,
    calibration: int = 64,
    batch: int = 8,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Exported:
    """Write a detector into a file for another runtime, read the file back, and compare it with the detector in torch.

    Args:
        model: see ``evaluate``; no exported file.
        out: the file: ``.onnx``, ``.xml`` (openvino), ``.torchscript`` or ``.pt2``. ``export.json`` is written beside it.
        data: images for the proof (val split) and for int8 (train split), see ``train``; None: the file is compared on noise,
            and there is no AP.
        format: onnx, openvino, torchscript or pt2.
        int8: also write the int8 form, ``model.int8.onnx``.
        nms: put the choice of detections and NMS into the file (dense heads; one image at a time).
        dynamic: what may vary, of ``batch`` and ``size``; None: all that the detector allows.
        opset: of ONNX; None: the smallest that suffices.
        calibration: number of training images for int8.
        batch: images per forward pass of the evaluations.
        overwrite: replace files that exist.
        progress: display of the progress; None: a new one on stderr.
        settings: the fields size, resize, max_size and strict of ``TrainSettings``; for a run folder they default to the run's.

    Returns:
        The files, and for torch and each file AP, the largest differences and the time. ``passed`` is False if a file lost more
        than 0.1 points of AP, or 1.0 with int8.

    Raises:
        DetdistillError: one line that says what is wrong and what to do.
    """
    from detdistill.data.discover import load_split
    from detdistill.detectors.load import load_detector
    from detdistill.export.run import Wanted, check_wanted, export_detector
    from detdistill.export.runtimes import is_file
    from detdistill.progress import Progress
    from detdistill.training.plan import view_settings

    free = None if dynamic is None else tuple(dynamic)
    wanted = Wanted(Path(out), format, int8, nms, free, opset, calibration, batch, overwrite=overwrite)
    check_wanted(wanted)
    if is_file(model):
        raise RunError(f"model: {model} is an exported file; export the run or the student folder that it was made of")
    given = {name: value for name, value in settings.items() if value is not None}
    chosen = _settings(TrainSettings, {**_image_settings_of(model), **given})
    with progress or Progress() as shown:
        sets = {}
        for split in ("val", *(("train",) if int8 else ())) if data is not None else ():
            sets[split], notes = load_split(str(data), cast("SplitName", split), strict=chosen.strict)
            _tell(str(data), notes, sets[split].defects, shown)
        detector = load_detector(model, sets["val"].classes if sets and ":" in model else None)
        return export_detector(detector, wanted, view_settings(chosen), sets.get("val"), sets.get("train"), shown)


def push(model: str | Path, to: str, *, private: bool = True, message: str = "Upload by detdistill") -> str:
    """Upload a student folder or an exported file to the Hugging Face hub.

    Args:
        model: a run folder (its ``student/``), a student folder, or a file that ``export`` wrote (with ``export.json``).
        to: ``hub:NAME`` or ``hub:OWNER/NAME``; the repository is created if it does not exist.
        private: a new repository is private.
        message: message of the commit.

    Returns:
        Address of the commit.

    Raises:
        RunError: there is nothing to upload, no token, no network, or no permission.
    """
    from detdistill.export.push import push as upload

    return upload(Path(model), to, private=private, message=message)


def bench(
    models: Sequence[str],
    data: str | None = None,
    *,
    batch: int = 1,
    rounds: int = 30,
    threads: int = 1,
    device: str = "cpu",
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Timing]:
    """Measure the time of several models from pixels to detections, in turns, on the same images.

    Args:
        models: see ``evaluate``; also model strings without weights.
        data: images of the val split; None: noise.
        batch: images at a time.
        rounds: how often each model runs; the median counts.
        threads: threads of torch and of the runtimes.
        device: auto, cpu or cuda.
        progress: display of the progress; None: a new one on stderr.
        settings: the fields size, resize, max_size and strict of ``TrainSettings``; they default to those of the first model.

    Raises:
        DetdistillError: one line that says what is wrong and what to do.
    """
    import torch

    from detdistill.data.discover import load_split
    from detdistill.export.bench import interleaved
    from detdistill.export.run import first_batch, random_batch
    from detdistill.progress import Progress
    from detdistill.training.plan import view_settings

    if not models:
        raise RunError("bench: no models; give --model with one or more")
    for name, value in (("batch", batch), ("rounds", rounds), ("threads", threads)):
        if value < 1:
            raise RunError(f"{name}: {value} must be 1 or more")
    given = {name: value for name, value in settings.items() if value is not None}
    chosen = _settings(TrainSettings, {**_image_settings(models[0]), **given})
    where, before = _device(device), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with progress or Progress() as shown:
            view, images, classes = view_settings(chosen), None, None
            if data is not None:
                images, notes = load_split(data, "val", strict=chosen.strict)
                _tell(data, notes, images.defects, shown)
                classes = images.classes
            opened = {name: _detector(name, classes if ":" in name else None, where, True).eval().to(where) for name in models}
            given_batch = random_batch(batch, view.size) if images is None else first_batch(images, view, batch)
            bar = shown.bar("bench", rounds)
            return interleaved(opened, given_batch.to(where), rounds, bar.update)
    finally:
        torch.set_num_threads(before)


def compare(
    runs: Sequence[Path | str], *, metric: str = "AP", allow_unequal: bool = False, out: Path | None = None
) -> list[Gain]:
    """Pair baselines and distilled runs by seed, and compute mean gain, 95 % interval and verdict.

    Args:
        runs: run folders, or folders that contain them.
        metric: one of the 12 COCO numbers.
        allow_unequal: compare runs whose budgets differ.
        out: also write the result to this JSON file.

    Raises:
        RunError: the metric is unknown, no runs can be paired, or the budgets differ.
    """
    import json

    from detdistill.compare import compare_runs, gains_json

    gains = compare_runs(runs, metric=metric, allow_unequal=allow_unequal)
    if out is not None:
        write(out, json.dumps(gains_json(gains), indent=2) + "\n")
    return gains


def report(runs: Sequence[Path | str], *, out: Path | None = None) -> Path:
    """Write one self-contained HTML page about runs.

    Args:
        runs: run folders, or folders that contain them.
        out: path of the page; None: ``report.html`` in the first folder.

    Returns:
        Path of the page.

    Raises:
        RunError: the folders contain no finished run.
    """
    from detdistill.compare import expand
    from detdistill.report.page import build_report

    page = out if out is not None else Path(runs[0]) / "report.html"
    return build_report(expand(runs), page)


def inspect_data(data: str, *, strict: bool = False, deep: bool = False) -> DataReport:
    """Report counts, sizes, class balance and every defect of a data set.

    Args:
        data: see ``train``.
        strict: raise an error at the first defect instead of reporting it.
        deep: decode every image.

    Raises:
        DataError: the data cannot be read, or have a defect and ``strict`` is given.
    """
    from detdistill.data.inspect import inspect_data as inspect

    return inspect(data, strict=strict, deep=deep)


# ------------------------------------------------------------------------------------------------------------ helpers


def _settings(kind: type[Any], given: dict[str, Any]) -> Any:
    names = [field.name for field in dataclasses.fields(kind)]
    given = renamed(given)
    for name in given:
        if name not in names:
            raise RunError(f"no setting {name!r}{nearest(name, names)}; settings: {', '.join(names)}")
    for name, wanted in (("out", Path), ("stages", str), ("cache", str)):
        if isinstance(given.get(name), str | Path):
            given = {**given, name: wanted(given[name])}
    return kind(**given)


def _check_start(model: str, settings: TrainSettings) -> None:
    """Check before the data are read: the model string must be valid, and the run folder must be free."""
    from detdistill.detectors.adapters import read_model
    from detdistill.training.folder import new_folder
    from detdistill.training.machine import is_main_process

    read_model(model)
    if settings.out is not None and not settings.resume and is_main_process():
        new_folder(settings.out, "")


def write(path: Path, text: str) -> None:
    """Write a text file; its folder is created if missing.

    Raises:
        RunError: the file cannot be written.
    """
    from detdistill.training.folder import write_text

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; make space or give another --out") from error


def _load(data: str, strict: bool, progress: Progress) -> DataSplits:
    from detdistill.data.discover import load_data

    splits = load_data(data, strict=strict)
    _tell(data, splits.notes, splits.defects, progress)
    if not any((~record.crowd).any() for record in splits.val.records):
        progress.say(
            f"WARNING: no image of the val split of {data} has an object to be found: AP is undefined (shown "
            "as -), and no checkpoint is better than another. Are labels missing? Give a val split with objects.",
            "bold red",
        )
    return splits


def _tell(data: str, notes: Sequence[str], defects: Sequence[Defect], progress: Progress) -> None:
    """Show the notes and the number of defects that were found when the data were read."""
    for note in notes:
        progress.say(note, "dim")
    if defects:
        kinds: dict[str, int] = {}
        for defect in defects:
            kinds[defect.kind] = kinds.get(defect.kind, 0) + 1
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        progress.say(f"{len(defects)} defects in {data}: {counted}; see `detdistill data inspect {data}`", "yellow")


def _load_teacher(teacher: str, splits: DataSplits, other_classes: bool) -> Detector:
    """Load the teacher. Classes are matched by name, so it may have further classes, in any order.

    Raises:
        ClassNameError: the teacher lacks a class of the data, and ``other_classes`` is False.
    """
    from detdistill.detectors.load import load_detector
    from detdistill.errors import ClassCountError, ClassNameError, name_list

    wanted = splits.train.classes
    try:
        detector = load_detector(teacher, wanted)
    except ClassCountError:
        detector = load_detector(teacher)
    known = detector.spec.classes
    unknown = [name for name in wanted if name not in known]
    if not unknown or other_classes:
        return detector
    surplus = [name for name in known if name not in wanted]
    plain = {name.strip().lower(): name for name in surplus}
    spelling = next(((name, plain[name.strip().lower()]) for name in unknown if name.strip().lower() in plain), None)
    raise ClassNameError(
        f"teacher {teacher} has {len(known)} classes ({name_list(known, surplus)}), "
        f"but {len(wanted) if len(wanted) != len(known) else 'others'} are wanted ({name_list(wanted, unknown)}); "
        f"it does not know {name_list(unknown)}"
        f"{f' (it spells {spelling[0]!r} as {spelling[1]!r})' if spelling else ''}"
        f"; --other_classes true lets such a teacher serve methods on features"
    )


def _compare_sizes(teacher: str | None, settings: TrainSettings, progress: Progress) -> None:
    """Say so if the teacher was trained on images of another size than it will be shown: its AP may be far lower there."""
    trained = {} if teacher is None else _image_settings_of(teacher)
    differing = [name for name, value in trained.items() if value != getattr(settings, name)]
    if differing:
        then = ", ".join(f"{name} {trained[name]}" for name in differing)
        now = ", ".join(f"{name} {getattr(settings, name)}" for name in differing)
        progress.say(f"the teacher was trained with {then} and is shown images with {now}: it may detect less there", "yellow")


def _report(runs: Sequence[Path], page: Path, progress: Progress) -> None:
    from detdistill.report.page import build_report
    from detdistill.training.machine import is_main_process

    if is_main_process():
        build_report(runs, page, progress=progress)


def _detector(model: str, classes: Sequence[str] | None, device: str, fresh: bool = False) -> Detector:
    """Load a detector or open an exported file; with ``fresh``, a model string without weights is built with random ones."""
    from detdistill.detectors.load import load_detector
    from detdistill.export.file_detector import load_file
    from detdistill.export.runtimes import is_file

    if is_file(model):
        return load_file(model, classes, device)
    if fresh and ":" in model and classes is None:
        from detdistill.detectors.build import build_detector

        if "weights=" not in model and not model.startswith("hf:"):
            return build_detector(model, [f"class {number}" for number in range(80)])
    return load_detector(model, classes)


def _image_settings(model: str) -> dict[str, Any]:
    """Image settings of a model: those in an exported file, or of the run that trained it."""
    from detdistill.export.runtimes import SUFFIXES

    path = Path(model)
    if path.suffix not in SUFFIXES or not path.is_file():
        return _image_settings_of(model)
    from detdistill.export.runtimes import open_file

    about, _ = open_file(path)
    return {"size": about.size, "resize": about.resize, "max_size": about.max_size}


def _image_settings_of(model: str) -> dict[str, Any]:
    """Image settings of the run that trained a model; empty if the model is not in a run folder."""
    import yaml

    folder = Path(model)
    for candidate in (folder, folder.parent, folder.parent.parent):
        path = candidate / "config.yaml"
        if folder.exists() and path.exists():
            try:
                config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise RunError(f"{path} cannot be read: {error}") from error
            return {key: config[key] for key in ("size", "resize", "max_size") if key in config}
    return {}


def _device(name: str) -> str:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("device: cuda is not available here; use --device cpu")
    return name
