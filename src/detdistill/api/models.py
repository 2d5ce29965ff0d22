"""Using a trained detector: scores, boxes, student folders, files for other runtimes, latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from detdistill.api.shared import (
    device_for,
    device_of,
    image_settings,
    local_only,
    not_these_digits,
    settings_of,
    tell,
)
from detdistill.errors import RunError
from detdistill.settings import TrainSettings

if TYPE_CHECKING:
    from detdistill.api.shared import Model
    from detdistill.data.records import DetectionSet, SplitName
    from detdistill.data.transforms import ViewSettings
    from detdistill.detectors.contract import Detector
    from detdistill.evaluation import Scores
    from detdistill.evaluation.predict import Predicted
    from detdistill.export.bench import Timing
    from detdistill.export.run import Exported
    from detdistill.progress import Progress


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
        wanted = image_settings(model, settings, shown)
        if split not in ("train", "val", "test"):
            raise RunError(f"no split {split!r}; use val, test or train")
        chosen, notes = load_split(data, cast("SplitName", split), strict=wanted.strict)
        tell(data, notes, chosen.defects, shown)
        device = device_for(model, wanted.device)
        with not_these_digits(data):
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
    import torch

    from detdistill.evaluation.predict import default_batch, default_threads, predict_folder
    from detdistill.functional.modes import evaluating
    from detdistill.given import name_or_detector
    from detdistill.progress import Progress

    check_looking(score, batch)
    local_only(out)
    with progress or Progress() as shown:
        detector, settings = ready(model, size, device, shown)
        parameter = next(detector.parameters(), None)
        loaded = isinstance(name_or_detector(model), str)
        if loaded and parameter is not None and parameter.device.type == "cpu":
            detector = detector.to(
                memory_format=torch.channels_last
            )  # 0.8 to 1.0 of the time, by detector; not done to a caller's
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

    check_looking(score, batch)
    detector, settings = ready(model, size, device)
    folder = isinstance(images, str | Path) and Path(images).is_dir()
    several = folder or isinstance(images, list | tuple)
    chosen = find_images(Path(images)).paths if folder else images if several else [images]
    with evaluating(detector):
        found = [one.above(score) for one in detect_all(detector, chosen, settings, batch=batch or default_batch(detector))]
    if folder:
        return dict(zip(chosen, found, strict=True))
    return found if several else found[0]


def export_student(
    model: Model,
    out: str | Path,
    *,
    data: str | None = None,
    size: int | None = None,
    resize: str | None = None,
    max_size: int | None = None,
    pt: bool = False,
) -> Path:
    """Write a model into a folder like ``student/`` of a run, e.g. the best checkpoint of a run, also of an unfinished one.

    Args:
        model: a checkpoint, a run folder, a ``student/`` folder, a model string with weights, or a result of ``train`` or of a
            ``distill`` of one run.
        out: the folder to write; it must not exist or be empty.
        data: the training data, whose class names a checkpoint of an unfinished run needs; None: the data of the run.
        size: image size that the folder will say; None: the one with which the model was trained.
        resize: as ``size``, for the resizing: letterbox, stretch or short_side.
        max_size: as ``size``, for the largest long side with short_side.
        pt: also write ``best.pt``, which ``ultralytics.YOLO`` or ``libreyolo.LibreYOLO`` opens; for their detectors only.

    Returns:
        ``out``.

    Raises:
        DetdistillError: one line that says what is wrong and what to do.
    """
    from safetensors import SafetensorError

    from detdistill.detectors.load import load_detector, trained_resizing
    from detdistill.detectors.save import save_student
    from detdistill.files import seal_folder
    from detdistill.given import name_of
    from detdistill.structures import Resizing
    from detdistill.training.origin import known_origin
    from detdistill.training.plan import view_settings

    local_only(out)
    model, folder = name_of(model), Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists; give another --out")
    given = {"size": size, "resize": resize, "max_size": max_size}
    given = {name: value for name, value in given.items() if value is not None}
    trained = trained_resizing(model)
    if trained is None and "size" not in given and given:
        raise RunError(f"{model} does not say with which image size it was trained; give --size too")
    resizing = trained
    if given:
        settings = settings_of(TrainSettings, {**(trained.plain() if trained else {}), **given})
        view_settings(settings).validate()
        resizing = Resizing.of(settings)
    detector = load_detector(model, _classes_of_unfinished(model, data))
    save_pt = cast("Callable[[Path], None] | None", getattr(detector, "save_pt", None))
    if pt and save_pt is None:
        raise RunError(
            f"pt: {detector.spec.name} does not fit into a .pt file: only networks of ultralytics do, and those of libreyolo "
            "without width= and depth=; leave --pt out"
        )
    try:
        save_student(detector.eval(), folder, resizing, known_origin(model))
        if pt and save_pt is not None:
            save_pt(folder / "best.pt")
            seal_folder(folder)
        return folder
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}; give another --out") from error


def export(
    model: Model,
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
    from detdistill.detectors.load import load_detector
    from detdistill.export.formats import is_file
    from detdistill.export.run import Wanted, check_wanted, export_detector
    from detdistill.given import name_or_detector
    from detdistill.progress import Progress
    from detdistill.training.origin import known_origin
    from detdistill.training.plan import view_settings

    local_only(out)
    model = name_or_detector(model)
    free = None if dynamic is None else tuple(dynamic)
    wanted = Wanted(Path(out), format, int8, nms, free, opset, calibration, batch, overwrite=overwrite)
    check_wanted(wanted)
    if isinstance(model, str) and is_file(model):
        raise RunError(f"model: {model} is an exported file; export the run or the student folder that it was made of")
    given = {name: value for name, value in settings.items() if value is not None}
    with progress or Progress() as shown:
        chosen = image_settings(model, given, shown)
        sets = {} if data is None else _splits(str(data), ("val", "train") if int8 else ("val",), chosen.strict, shown)
        classes = _classes_for(model, sets["val"].classes if sets else None)
        detector = load_detector(model, classes) if isinstance(model, str) else model
        origin = known_origin(model) if isinstance(model, str) else None
        made = export_detector(detector, wanted, view_settings(chosen), sets.get("val"), sets.get("train"), shown, origin)
        if isinstance(model, str):
            _note_in_run(model, made, shown)
        return made


def _splits(data: str, names: Sequence[SplitName], strict: bool, progress: Progress) -> dict[SplitName, DetectionSet]:
    """The named parts of a data set; the defects of all are said in one line."""
    from detdistill.data.discover import load_split

    found, notes = {}, dict[str, None]()
    for name in names:
        found[name], more = load_split(data, name, strict=strict)
        notes |= dict.fromkeys(more)
    tell(data, list(notes), [defect for one in found.values() for defect in one.defects], progress)
    return found


def _note_in_run(model: str, made: Exported, progress: Progress) -> None:
    """If the model is a run or its student: add the table to the run's ``export.json`` and, if there is one, its report."""
    from detdistill.export.run import NOTES, note, read_notes
    from detdistill.report.page import build_report

    run = next((folder for folder in (Path(model), Path(model).parent) if (folder / "summary.json").is_file()), None)
    if run is None:
        return
    if (run / NOTES).resolve() != made.notes.resolve():
        note(run / NOTES, str(made.file), read_notes(made.notes)[made.file.name])
    if (run / "report.html").is_file():
        build_report([run], run / "report.html", progress=progress)


def push(model: Model, to: str, *, private: bool = True, message: str = "Upload by detdistill") -> str:
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
    from detdistill.given import name_of

    return upload(Path(name_of(model)), to, private=private, message=message)


def bench(
    models: Sequence[Model],
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
    from detdistill.given import name_or_detector, open_detector
    from detdistill.progress import Progress
    from detdistill.training.plan import view_settings

    if not models:
        raise RunError("bench: no models; give --model with one or more")
    for name, value in (("batch", batch), ("rounds", rounds), ("threads", threads)):
        if value < 1:
            raise RunError(f"{name}: {value} must be 1 or more")
    given = {name: value for name, value in settings.items() if value is not None}
    found = [name_or_detector(model) for model in models]
    chosen = image_settings(found[0], given, None)
    where, before = device_of(device), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with progress or Progress() as shown:
            view, images, classes = view_settings(chosen), None, None
            if data is not None:
                images, notes = load_split(data, "val", strict=chosen.strict)
                tell(data, notes, images.defects, shown)
                classes = images.classes
            opened = {
                model if isinstance(model, str) else model.spec.name: open_detector(
                    model, _classes_for(model, classes), where, fresh=True
                )
                for model in found
            }
            opened = {name: detector.eval().to(where) for name, detector in opened.items()}
            given_batch = random_batch(batch, view.size) if images is None else first_batch(images, view, batch)
            bar = shown.bar("bench", rounds)
            return interleaved(opened, given_batch.to(where), rounds, bar.update)
    finally:
        torch.set_num_threads(before)


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


def _classes_for(model: str | Detector, classes: Sequence[str] | None) -> Sequence[str] | None:
    """The classes with which a model is loaded: None for a path, whose model has its own."""
    return None if isinstance(model, str) and ":" not in model else classes


def check_looking(score: float, batch: int | None) -> None:
    """Check the arguments of ``predict`` and ``detect``."""
    if not 0 <= score <= 1:
        raise RunError(f"score: {score} is not between 0 and 1")
    if batch is not None and batch < 1:
        raise RunError(f"batch: {batch} is not at least 1")


def ready(model: Model, size: int | None, device: str, progress: Progress | None = None) -> tuple[Detector, ViewSettings]:
    """A detector on its device, and the image settings for it."""
    from detdistill.given import name_or_detector, open_detector
    from detdistill.training.plan import view_settings

    place = name_or_detector(model)
    given = {} if size is None else {"size": size}
    settings = view_settings(image_settings(place, given, progress))
    wanted = device_for(place, device)
    detector = open_detector(place, device=wanted)
    return detector if wanted is None else detector.to(wanted), settings
