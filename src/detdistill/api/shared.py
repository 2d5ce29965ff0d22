"""Steps that several functions of the package share: settings, data, image sizes, devices."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detdistill.errors import DetdistillWarning, RunError, counted
from detdistill.results import Distilled
from detdistill.settings import TrainSettings, meant, renamed

if TYPE_CHECKING:
    from detdistill.data.records import DataSplits, Defect
    from detdistill.detectors.contract import Detector, Teacher
    from detdistill.progress import Progress
    from detdistill.training.run import Run

    Model = str | Path | Run | Distilled | Detector | Teacher


@contextlib.contextmanager
def not_these_digits(data: str) -> Iterator[None]:
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


def settings_of(kind: type[Any], given: dict[str, Any]) -> Any:
    """Settings of a kind from what a caller gave; paths are made paths.

    Raises:
        RunError: no such setting, or a value out of range.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    given = renamed(given)
    for name in given:
        if name not in names:
            raise RunError(f"no setting {name!r}{meant(name, names)}; settings: {', '.join(names)}")
    for name, wanted in (("out", Path), ("stages", str), ("cache", str)):
        if isinstance(given.get(name), str | Path):
            given = {**given, name: wanted(given[name])}
    return kind(**given)


def local_only(out: str | Path | None, why: str = "this is written to the local disk;") -> None:
    """Check that something is not to be written to a URL.

    Raises:
        RunError: it is.
    """
    from detdistill.cache.storage import is_url, masked, url_of

    if out is not None and is_url(str(out)):
        raise RunError(f"out: {masked(url_of(str(out)))} is a URL: {why} give a folder or file of this machine")


def write(path: Path, text: str) -> None:
    """Write a text file; its folder is created if missing.

    Raises:
        RunError: the file cannot be written.
    """
    from detdistill.training.folder import write_text

    local_only(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; make space or give another --out") from error


def load_splits(data: str, strict: bool, progress: Progress, rescan: bool = False, held_out: float | None = None) -> DataSplits:
    """Read a data set, and show its notes and defects, and that its validation split has no object.

    Raises:
        DataError: the data cannot be read, or have a defect and ``strict`` is given.
    """
    from detdistill.data.discover import load_data

    splits = load_data(data, strict=strict, rescan=rescan, held_out=held_out)
    tell(data, splits.notes, splits.defects, progress)
    if not any((~record.crowd).any() for record in splits.val.records):
        progress.say(
            f"WARNING: no image of the val split of {data} has an object to be found: AP is undefined (shown "
            "as -), and no checkpoint is better than another. Are labels missing? Give a val split with objects.",
            "bold red",
        )
    return splits


def tell(data: str, notes: Sequence[str], defects: Sequence[Defect], progress: Progress) -> None:
    """Show the notes and the number of defects that were found when the data were read."""
    for note in notes:
        progress.say(note, "dim")
    if defects:
        kinds: dict[str, int] = {}
        for defect in defects:
            kinds[defect.kind] = kinds.get(defect.kind, 0) + 1
        each = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        progress.say(
            f"{counted(len(defects), 'defect')} in {data}: {each}; see `detdistill data inspect {data}`",
            "yellow",
        )


def known_image_settings(
    model: str | Detector, progress: Progress | None = None, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Image settings with which a model was trained; empty for a detector in memory, and if its folder does not say.

    Args:
        model: path, model string or detector.
        progress: display of a line that says which size is assumed; None: a note on stderr.
        given: settings of the caller, which hold instead.
    """
    from detdistill.detectors.load import trained_resizing
    from detdistill.export.formats import is_file
    from detdistill.export.runtimes import open_file
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
        assumed = Resizing.of(settings_of(TrainSettings, dict(given or {})))
        _note(f"{model} does not say with which image size it was trained; it is shown images of {assumed}", progress)
    return {}


def image_settings(model: str | Detector, given: Mapping[str, Any], progress: Progress | None) -> TrainSettings:
    """Settings of the caller, and for what the caller leaves open the image settings with which the model was trained.

    A line says so if the caller wants another size or resizing than that of the training.

    Raises:
        RunError: no such setting, or a value out of range.
    """
    from detdistill.structures import Resizing

    known = known_image_settings(model, progress, given)
    wanted = settings_of(TrainSettings, {**known, **given})
    trained, shown = Resizing.from_plain(known), Resizing.of(wanted)
    if trained not in (None, shown):
        _note(f"{model} was trained with {trained}; it is shown images of {shown}", progress)
    return wanted


def _note(text: str, progress: Progress | None) -> None:
    if progress is None:
        warnings.warn(text, DetdistillWarning, stacklevel=4)
    else:
        progress.say(text, "yellow")


def device_for(model: str | Detector, name: str) -> str | None:
    """The device to run on; None: a detector in memory stays where it is."""
    return None if name == "auto" and not isinstance(model, str) else device_of(name)


def device_of(name: str) -> str:
    """``cpu`` or ``cuda`` for ``auto``, else the name.

    Raises:
        RunError: there is no such device here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("device: cuda is not available here; use --device cpu")
    return name
