"""What users give as a model: names and paths, results of earlier calls, and detectors in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from detdistill.errors import ModelError
from detdistill.results import Distilled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detdistill.detectors.contract import Detector


def name_or_detector(model: Any, what: str = "model") -> str | Detector:
    """A model string or path as text, or the detector itself.

    Args:
        model: a model string, a path, the result of ``train`` or ``distill`` (then the path of its run folder), a ``Detector``
            (also a wrapped model), or a ``Teacher``.
        what: role of the model, for messages.

    Raises:
        ModelError: anything else, or a result with several runs.
    """
    if isinstance(model, str | Path):
        return str(model)
    if isinstance(model, Distilled):
        if len(model.runs) != 1:
            raise ModelError(f"{what}: this result has {len(model.runs)} runs; give one of its .runs, e.g. {model.runs[0]}")
        return str(model.runs[0])
    from torch import nn

    from detdistill.detectors.contract import Detector, Teacher
    from detdistill.training.run import Run

    if isinstance(model, Run):
        return str(model.folder)
    if isinstance(model, Teacher):
        return model.detector
    if isinstance(model, Detector):
        return model
    if isinstance(model, nn.Module):
        raise ModelError(f"{what}: a {type(model).__name__} is no detector yet; wrap it: detdistill.wrap(model, taps=[...], ...)")
    raise ModelError(
        f"{what}: a {type(model).__name__} is no model; give a model string, a path, a result of train or distill, or a detector"
    )


def open_detector(model: Any, classes: Sequence[str] | None = None) -> Detector:
    """The detector of a model as in ``name_or_detector``; names and paths are loaded.

    Args:
        model: see ``name_or_detector``.
        classes: class names for model strings without weights; a loaded detector must have as many.

    Raises:
        ModelError: see ``name_or_detector`` and ``load_detector``.
    """
    from detdistill.detectors.load import check_class_count, load_detector

    found = name_or_detector(model)
    if isinstance(found, str):
        return load_detector(found, classes)
    check_class_count(found.spec.name, found.spec.classes, classes)
    return found
