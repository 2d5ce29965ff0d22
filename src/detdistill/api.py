"""Python functions behind the commands of the command line. Heavy modules are imported only when a function runs."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from detdistill.errors import DetdistillWarning, RunError
from detdistill.results import Distilled
from detdistill.settings import CacheSettings, DistillSettings, TrainSettings, meant, renamed

if TYPE_CHECKING:
    from detdistill.cache.forecast import Forecast
    from detdistill.compare import Gain
    from detdistill.data.inspect import DataReport
    from detdistill.data.records import DataSplits, Defect, SplitName
    from detdistill.data.transforms import ViewSettings
    from detdistill.detectors.contract import Detector, Teacher
    from detdistill.evaluation import Scores
    from detdistill.evaluation.predict import Predicted
    from detdistill.export.bench import Timing
    from detdistill.export.run import Exported
    from detdistill.progress import Progress
    from detdistill.training.run import Run

    Model = str | Path | Run | Distilled | Detector | Teacher


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
    wanted = _settings(TrainSettings, settings)
    from detdistill.given import student_of
    from detdistill.progress import Progress
    from detdistill.training.machine import is_main_process
    from detdistill.training.plan import Plan
    from detdistill.training.run import run
    from detdistill.training.session import open_session

    name, build = student_of(model, "model")
    _check_start(name, build, wanted, alone=True)
    with progress or Progress(quiet=not is_main_process()) as shown:
        splits = _load(data, wanted.strict, shown)
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
    wanted = _settings(DistillSettings, {"method": method, **settings})
    from detdistill.given import student_of, teacher_of
    from detdistill.methods.shared.compose import parse_methods
    from detdistill.progress import Progress

    methods = parse_methods(wanted.method)  # reports a misspelt method before anything else
    needing = [kind.slug for kind, given in methods if kind.needs(**given).teacher is not None]
    if teacher is None and wanted.cache is None and needing:
        raise RunError(f"teacher: {', '.join(needing)} needs a teacher (--teacher) or a cache of its outputs (--cache)")
    if teacher is None and wanted.inherit:
        raise RunError("inherit: it copies weights of the teacher; give --teacher")
    teacher_name, teacher = teacher_of(teacher)
    student_name, build = student_of(student)
    several = wanted.baseline or bool(wanted.seeds)
    _check_start(student_name, build, wanted, alone=not several)
    from detdistill.detectors.contract import Teacher
    from detdistill.training.experiment import run_experiment
    from detdistill.training.from_cache import open_cache, why_live_teacher
    from detdistill.training.machine import is_main_process
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
        splits = _load(data, wanted.strict, shown)
        with _not_these_digits(data):
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
        scores = score_teacher(live, splits, wanted, shown) if score and live is not None else None
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
    wanted = _settings(CacheSettings, {"method": method, **settings})
    from detdistill.given import teacher_of
    from detdistill.methods.shared.compose import parse_methods
    from detdistill.progress import Progress
    from detdistill.training.machine import check_machine, is_main_process

    parse_methods(wanted.method)
    if not (student is None or isinstance(student, str)):
        raise RunError(f"student: a cache needs a model string here, not a {type(student).__name__}")
    check_machine(wanted)
    teacher_name, source = teacher_of(teacher)
    assert teacher_name is not None
    assert source is not None
    with progress or Progress(quiet=not is_main_process()) as shown:
        from detdistill.training.fill_cache import make_cache

        splits = _load(data, wanted.strict, shown)
        with _not_these_digits(data):
            loaded = _load_teacher(source, splits, wanted.other_classes)
        _compare_sizes(source, wanted, shown)
        return Cached(
            *make_cache(str(out), (teacher_name, loaded), (data, splits), student, wanted, _device(wanted.device), shown)
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
            splits = _load(data or known_data, False, shown)
            return _load_teacher(teacher, splits, True), splits

        return check_cache(str(out), None if teacher is None else live, records, _device(device), shown)


def evaluate(
    model: Model, data: str = "digits", *, split: str = "val", batch: int = 8, progress: Progress | None = None, **settings: Any
) -> Scores:
    """Compute the 12 COCO numbers, the AP of each class, and the loss of AP50 by kind of error.

    Args:
        model: a run folder, a ``student/`` folder, a model string with weights, a file that ``export`` wrote, a result of
            ``train``, of a ``distill`` of one run, or a detector in memory (also a wrapped one).
        data: see ``train``.
        split: val, test or train.
        batch: images per forward pass.
        progress: display of the progress; None: a new one on stderr.
        settings: the fields size, resize, max_size, device, workers and strict of ``TrainSettings``. The first three default
            to the values with which the model was trained, for run folders, student folders and checkpoints.

    Raises:
        DetdistillError: one line that says what is wrong and what to do.
    """
    from detdistill.data.discover import load_split
    from detdistill.evaluation import evaluate as evaluate_detector
    from detdistill.given import name_or_detector, open_detector
    from detdistill.progress import Progress
    from detdistill.training.plan import view_settings

    model = name_or_detector(model)
    with progress or Progress() as shown:
        wanted = _settings(TrainSettings, {**_known_image_settings(model, shown, settings), **settings})
        if split not in ("train", "val", "test"):
            raise RunError(f"no split {split!r}; use val, test or train")
        chosen, notes = load_split(data, cast("SplitName", split), strict=wanted.strict)
        _tell(data, notes, chosen.defects, shown)
        device = _device_for(model, wanted.device)
        with _not_these_digits(data):
            detector = open_detector(model, chosen.classes, device)
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
    model: Model,
    images: str | Path,
    out: str | Path | None = None,
    *,
    score: float = 0.3,
    size: int | None = None,
    device: str = "auto",
    batch: int | None = None,
    progress: Progress | None = None,
) -> Predicted:
    """Draw a detector's boxes on images, and write all of them into ``detections.json`` in COCO's form.

    Images that cannot be read are passed over and named in the result. ``detect`` returns boxes without writing anything.

    Args:
        model: as for ``evaluate``.
        images: an image, or a folder of images with its sub-folders.
        out: folder for the drawn images and ``detections.json`` (see ``predict_folder``); created if missing.
        score: boxes with a lower score are neither drawn nor written; 0..1.
        size: side of the detector's input images in pixels; None: the size with which the model was trained.
        device: auto, cpu or cuda. With a detector in memory, auto leaves it where it is.
        batch: images of one padded size per forward pass; None: 8 on a GPU, 1 on a CPU, where batches are slower.
        progress: display of the progress; None: a new one on stderr.

    Returns:
        The folder, the numbers of images and boxes, and a line for each image that could not be read.

    Raises:
        DetdistillError: no image can be read, or another error of the input; one line that says what is wrong and what to do.
    """
    if out is None:
        raise RunError("predict: give out, a folder for the drawn images; detdistill.detect(model, images) returns boxes alone")
    if not isinstance(images, str | Path):
        raise RunError(f"predict: reads an image file or a folder, not a {type(images).__name__}; use detdistill.detect for it")
    from detdistill.evaluation.predict import default_batch, default_threads, predict_folder
    from detdistill.functional.modes import evaluating
    from detdistill.progress import Progress

    _check_looking(score, batch)
    with progress or Progress() as shown:
        detector, settings = _ready(model, size, device, shown)
        bar = shown.bar("predict", 1)
        with evaluating(detector):
            found = predict_folder(
                detector,
                Path(images),
                Path(out),
                settings,
                score=score,
                bar=bar,
                batch=batch or default_batch(detector),
                threads=default_threads(),
            )
        if found.left_out:
            shown.say(found.left_out, "yellow")
        for line in found.unreadable:
            shown.say(line, "red")
        return found


def detect(
    model: Model,
    images: Any,
    *,
    score: float = 0.3,
    size: int | None = None,
    device: str = "auto",
    batch: int | None = None,
) -> Any:
    """Detect objects in images, from one call to boxes.

    Args:
        model: as for ``evaluate``. A loop over single images should load it once: ``model = detdistill.load_detector(...)``.
        images: an image: a path, a PIL image, an array [h, w, 3] of uint8 in RGB order (OpenCV reads BGR: ``image[..., ::-1]``),
            or a tensor [3, h, w], uint8 or floats in 0..1. Or a list of images, or the path of a folder.
        score: boxes with a lower score are left out; 0..1.
        size: side of the detector's input images in pixels; None: the size of the model's run, and 640 for a detector in memory.
        device: auto, cpu or cuda. With a detector in memory, auto leaves it where it is.
        batch: images of one padded size per forward pass; None: 8 on a GPU, 1 on a CPU, where batches are slower.

    Returns:
        ``NamedDetections`` in pixels of the image: ``boxes_xyxy``, ``scores``, ``labels``, ``names``. For a list, a list of them.
        For a folder, a dict from path to detections.

    Raises:
        DetdistillError: an image cannot be read, or is none; one line that says what is wrong and what to do.

    Example:
        found = detdistill.detect("runs/teacher", "street.jpg")
        print(found.names, found.scores, found.boxes_xyxy)
    """
    from detdistill.evaluation.image_files import find_images
    from detdistill.evaluation.predict import default_batch, detect_all
    from detdistill.functional.modes import evaluating

    _check_looking(score, batch)
    detector, settings = _ready(model, size, device)
    folder = isinstance(images, str | Path) and Path(images).is_dir()
    several = folder or isinstance(images, list | tuple)
    chosen = find_images(Path(images)).paths if folder else images if several else [images]
    with evaluating(detector):
        found = [one.above(score) for one in detect_all(detector, chosen, settings, batch=batch or default_batch(detector))]
    if folder:
        return dict(zip(chosen, found, strict=True))
    return found if several else found[0]


def export_student(
    model: str,
    out: str | Path,
    *,
    data: str | None = None,
    size: int | None = None,
    resize: str | None = None,
    max_size: int | None = None,
) -> Path:
    """Write a model into a folder like ``student/`` of a run, e.g. the best checkpoint of a run, also of an unfinished one.

    Args:
        model: a checkpoint, a run folder, a ``student/`` folder, or a model string with weights.
        out: the folder to write; it must not exist or be empty.
        data: the training data, whose class names a checkpoint of an unfinished run needs; None: the data of the run.
        size: image size that the folder will say; None: the one with which the model was trained.
        resize: as ``size``, for the resizing: letterbox, stretch or short_side.
        max_size: as ``size``, for the largest long side with short_side.

    Returns:
        ``out``.

    Raises:
        DetdistillError: one line that says what is wrong and what to do.
    """
    from safetensors import SafetensorError

    from detdistill.detectors.load import load_detector, trained_resizing
    from detdistill.detectors.save import save_student
    from detdistill.structures import Resizing
    from detdistill.training.plan import view_settings

    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists; give another --out")
    given = {"size": size, "resize": resize, "max_size": max_size}
    given = {name: value for name, value in given.items() if value is not None}
    trained = trained_resizing(model)
    if trained is None and "size" not in given and given:
        raise RunError(f"{model} does not say with which image size it was trained; give --size too")
    resizing = trained
    if given:
        settings = _settings(TrainSettings, {**(trained.plain() if trained else {}), **given})
        view_settings(settings).validate()
        resizing = Resizing.of(settings)
    detector = load_detector(model, _classes_of_unfinished(model, data))
    try:
        return save_student(detector.eval(), folder, resizing)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}; give another --out") from error


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
    with progress or Progress() as shown:
        chosen = _settings(TrainSettings, {**_known_image_settings(model, shown, given), **given})
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
    from detdistill.given import open_detector
    from detdistill.progress import Progress
    from detdistill.training.plan import view_settings

    if not models:
        raise RunError("bench: no models; give --model with one or more")
    for name, value in (("batch", batch), ("rounds", rounds), ("threads", threads)):
        if value < 1:
            raise RunError(f"{name}: {value} must be 1 or more")
    given = {name: value for name, value in settings.items() if value is not None}
    chosen = _settings(TrainSettings, {**_known_image_settings(models[0], None, given), **given})
    where, before = _device(device), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with progress or Progress() as shown:
            view, images, classes = view_settings(chosen), None, None
            if data is not None:
                images, notes = load_split(data, "val", strict=chosen.strict)
                _tell(data, notes, images.defects, shown)
                classes = images.classes
            opened = {name: open_detector(name, classes if ":" in name else None, where, fresh=True) for name in models}
            opened = {name: detector.eval().to(where) for name, detector in opened.items()}
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


@contextlib.contextmanager
def _not_these_digits(data: str) -> Iterator[None]:
    """Context in which other classes than those of the built-in digits are said to come from a missing ``data``."""
    from detdistill.errors import ClassCountError, ClassNameError

    try:
        yield
    except (ClassCountError, ClassNameError) as error:
        if data != "digits":
            raise
        where = str(error).partition(":")[0] if isinstance(error, ClassCountError) else "the teacher"
        text = f"data: without --data, the built-in digits are used, and {where} has other classes; give --data"
        raise type(error)(text) from error


def _settings(kind: type[Any], given: dict[str, Any]) -> Any:
    names = [field.name for field in dataclasses.fields(kind)]
    given = renamed(given)
    for name in given:
        if name not in names:
            raise RunError(f"no setting {name!r}{meant(name, names)}; settings: {', '.join(names)}")
    for name, wanted in (("out", Path), ("stages", str), ("cache", str)):
        if isinstance(given.get(name), str | Path):
            given = {**given, name: wanted(given[name])}
    return kind(**given)


def _check_start(model: str, build: Callable[[], Detector] | None, settings: TrainSettings, alone: bool) -> None:
    """Check before the data are read: the model string must be valid, the run folder free, and several processes possible."""
    from detdistill.detectors.adapters import read_model
    from detdistill.training.folder import new_folder
    from detdistill.training.machine import check_interactive, is_main_process

    if build is None:
        read_model(model)
    if alone:
        check_interactive(settings)
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


def _load_teacher(teacher: str | Detector, splits: DataSplits, other_classes: bool) -> Detector:
    """Load the teacher. Classes are matched by name, so it may have further classes, in any order.

    Raises:
        ClassNameError: the teacher lacks a class of the data, and ``other_classes`` is False.
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
    if not unknown or other_classes:
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
    given = {name: getattr(settings, name) for name in ("size", "resize", "max_size")}
    trained = {} if teacher is None else _known_image_settings(teacher, progress, given)
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


def _known_image_settings(
    model: str | Detector, progress: Progress | None = None, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Image settings with which a model was trained; empty for a detector in memory, and if its folder does not say.

    Args:
        model: path, model string or detector.
        progress: display of a line that says which size is assumed; None: a note on stderr.
        given: settings of the caller, which hold instead.
    """
    from detdistill.detectors.load import trained_resizing
    from detdistill.export.runtimes import is_file, open_file
    from detdistill.structures import Resizing

    if not isinstance(model, str):
        return {}
    if is_file(model):
        about, _ = open_file(Path(model))
        return {"size": about.size, "resize": about.resize, "max_size": about.max_size}
    trained = trained_resizing(model)
    if trained is not None:
        return trained.plain()
    if Path(model.removeprefix("hf:")).exists():
        assumed = Resizing.of(_settings(TrainSettings, dict(given or {})))
        text = f"{model} does not say with which image size it was trained; it is shown images of {assumed}"
        if progress is None:
            warnings.warn(text, DetdistillWarning, stacklevel=3)
        else:
            progress.say(text, "yellow")
    return {}


def _classes_of_unfinished(model: str, data: str | None) -> Sequence[str] | None:
    """Class names for the checkpoint of a run that is not finished, from its data; None: the model has its own."""
    import yaml

    from detdistill.data.discover import load_data

    run = Path(model).parent.parent
    if not Path(model).is_file() or (run / "student" / "student.json").is_file() or not (run / "config.yaml").is_file():
        return None
    if data is None:
        try:
            data = str(dict(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))["data"])
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            raise RunError(f"{run / 'config.yaml'} does not name the data ({error}); give --data") from error
    return load_data(data).train.classes


def _check_looking(score: float, batch: int | None) -> None:
    """Check the arguments of ``predict`` and ``detect``."""
    if not 0 <= score <= 1:
        raise RunError(f"score: {score} is not between 0 and 1")
    if batch is not None and batch < 1:
        raise RunError(f"batch: {batch} is not at least 1")


def _ready(model: Model, size: int | None, device: str, progress: Progress | None = None) -> tuple[Detector, ViewSettings]:
    """A detector on its device, and the image settings for it."""
    from detdistill.given import name_or_detector, open_detector
    from detdistill.training.plan import view_settings

    place = name_or_detector(model)
    given = {} if size is None else {"size": size}
    settings = view_settings(_settings(TrainSettings, {**_known_image_settings(place, progress, given), **given}))
    wanted = _device_for(place, device)
    detector = open_detector(place, device=wanted)
    return detector if wanted is None else detector.to(wanted), settings


def _device_for(model: str | Detector, name: str) -> str | None:
    """The device to run on; None: a detector in memory stays where it is."""
    return None if name == "auto" and not isinstance(model, str) else _device(name)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("device: cuda is not available here; use --device cpu")
    return name
