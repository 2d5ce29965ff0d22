"""Load detectors of transformers' DETR families from ``save_pretrained`` folders and the hub (safetensors only)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.utils import cached_file

from detdistill.detectors.adapters import read_model
from detdistill.detectors.options import ModelOptions
from detdistill.detectors.queries.shared.options import DetrSelectionOptions
from detdistill.detectors.queries.shared.transformers_detector import TransformersDetector, class_names
from detdistill.detectors.queries.shared.transformers_models import label_maps, quiet, ready_model, selection
from detdistill.detectors.torchvision.pretrained import hub_answers
from detdistill.errors import ClassCountError, DetdistillWarning, ModelError

NO_CLASS = "N/A"
"""Class name of unused category ids in hub models that have one output for each of COCO's 90 ids."""


def load_pretrained(
    detector_class: type[TransformersDetector],
    source: str | Path,
    classes: Sequence[str] | None,
    name: str,
    options: DetrSelectionOptions,
) -> TransformersDetector:
    """Load a detector with its weights from a ``save_pretrained`` folder or the hub (safetensors only).

    Args:
        detector_class: the family's adapter.
        source: the folder, or the model's name on the hub. Outputs of classes called ``N/A`` (COCO's unused ids) are removed.
        classes: the detector must have this many classes; None: any number. The detector keeps its own class names.
        name: name of the detector.
        options: options of the model string.

    Raises:
        ClassCountError: the detector has another number of classes.
        ModelError: files are missing or broken, hold another kind of model, or need a package that is not installed.
    """
    config = read_config(source)
    if getattr(config, "use_focal_loss", True) is False:
        raise ModelError(
            f"{source}: its config says use_focal_loss: false (softmax classes), which this adapter does not support; "
            "train with use_focal_loss: true"
        )
    own = [label for label in class_names(config) if label != NO_CLASS]
    if classes is not None and len(own) != len(classes):
        raise ClassCountError(f"{source}: has {len(own)} classes ({few(own)}), but {len(classes)} are wanted ({few(classes)})")
    with quiet():
        try:
            model, info = detector_class.model_class.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,  # a folder of half precision would be loaded as such
                use_safetensors=True,
                local_files_only=is_offline(source),
                ignore_mismatched_sizes=True,  # they are named below
                output_loading_info=True,
            )
        except Exception as error:  # the library raises OSError, ImportError, SafetensorError, RuntimeError, ValueError
            raise ModelError(f"{source}: {reason_of(error)}") from error
    lost = [*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])]
    if lost:
        kind = detector_class.model_class.__name__
        raise ModelError(f"{source}: {len(lost)} tensors of a {kind} are missing or of another shape, e.g. {sorted(lost)[0]}")
    drop_unused_classes(model, detector_class.class_outputs)
    model = ready_model(model, detector_class.backbone_modules)
    return detector_class(model, name, **read_statistics(source, detector_class.image_processor), **selection(options))


def drop_unused_classes(model: Any, class_outputs: Sequence[str]) -> None:
    """Remove the outputs of classes called ``N/A`` from a model.

    Sigmoid scores do not change. Softmax scores are renormalised over the remaining classes and the background.
    """
    names = class_names(model.config)
    kept = [index for index, label in enumerate(names) if label != NO_CLASS]
    if len(kept) == len(names):
        return
    present = dict(model.named_modules(remove_duplicate=False))
    for part in class_outputs:
        for layer in present[part].modules() if part in present else ():
            if isinstance(layer, nn.Linear) and layer.out_features >= len(names):
                rows = [*kept, *range(len(names), layer.out_features)]  # the background stays
                layer.weight = nn.Parameter(layer.weight.detach()[rows])
                layer.bias = nn.Parameter(layer.bias.detach()[rows])
                layer.out_features = len(rows)
    for key, value in label_maps([names[index] for index in kept]).items():
        setattr(model.config, key, value)
    model.tie_weights()  # restore the sharing of outputs between decoder layers


def load_exported(
    detector_class: type[TransformersDetector], folder: Path, classes: Sequence[str], name: str
) -> TransformersDetector:
    """Load a student folder that ``export`` wrote.

    Args:
        detector_class: the family's adapter.
        folder: the student folder.
        classes: class names from ``student.json``.
        name: the student's name. If it is a model string, its options apply; otherwise the defaults.

    Raises:
        ModelError: as ``load_pretrained``.
    """
    try:
        _, options = read_model(name)
    except ModelError:
        options = ModelOptions()
    if not isinstance(options, DetrSelectionOptions):  # the student has been renamed
        options = DetrSelectionOptions()
    return load_pretrained(detector_class, folder, classes, name, options)


def read_config(source: str | Path) -> Any:
    """Read the library's config from a folder or the hub.

    Raises:
        ModelError: there is no config, or it cannot be read.
    """
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{source}: no config.json in this folder; give a folder that save_pretrained wrote")
    if not path.is_dir() and (path.is_absolute() or str(source).startswith(".") or len(path.parts) > 2):
        raise ModelError(f"{source}: no such folder")  # names on the hub have one slash at most
    with quiet():
        try:
            return AutoConfig.from_pretrained(source, local_files_only=is_offline(source), trust_remote_code=False)
        except Exception as error:  # OSError, ValueError, KeyError, the hub's and the validator's own
            raise ModelError(f"{source}: {reason_of(error)}") from error


def read_statistics(source: str | Path, image_processor: str) -> dict[str, Any]:
    """Mean and standard deviation of images from ``preprocessor_config.json``.

    Without such a file (``model.save_pretrained`` alone writes none), the defaults of the family's image processor apply, and
    a ``DetdistillWarning`` says so.

    Args:
        source: folder, or name on the hub.
        image_processor: name of the library's class.

    Raises:
        ModelError: the file cannot be read as JSON.
    """
    with quiet():
        found = cached_file(
            str(source),
            "preprocessor_config.json",
            local_files_only=is_offline(source),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if found is None:
        content = vars(getattr(transformers, image_processor)())
        normalised = "normalises images" if content.get("do_normalize") else "does not normalise images"
        message = f"{source}: no preprocessor_config.json; assumed the defaults of {image_processor}, which {normalised}"
        warnings.warn(message, DetdistillWarning, stacklevel=2)
        return _statistics(content)
    try:
        content = json.loads(Path(found).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{found}: cannot be read as JSON: {error}") from error
    return _statistics(content)


def _statistics(content: Mapping[str, Any]) -> dict[str, Any]:
    if content.get("do_normalize") is False:
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    given = {"mean": content.get("image_mean"), "std": content.get("image_std")}
    return {key: tuple(value) for key, value in given.items() if value}


def is_offline(source: str | Path) -> bool:
    """True for a folder, and when the hub does not answer within 5 s (the library would retry for minutes)."""
    return Path(source).is_dir() or not hub_answers()


def reason_of(error: Exception) -> str:
    """One line that says why the library failed; names a missing package."""
    if isinstance(error, ImportError):
        package = getattr(error, "name", None)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"the package {package} is missing; install it" if package else f"a package is missing: {lines[0]}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OSError) and lines and ("connect" in lines[0] or "cached" in lines[0]):
        return "not a folder, and the hub cannot be reached to look the name up; give a folder that save_pretrained wrote"
    return lines[0] if lines else type(error).__name__


def few(names: Sequence[str]) -> str:
    """The first four names of a list, with ``...`` for the rest."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
