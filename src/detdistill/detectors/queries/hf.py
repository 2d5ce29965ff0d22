"""Any DETR of transformers with its weights, hf:NAME_OR_FOLDER, from the hub or a save_pretrained folder.

    hf:facebook/detr-resnet-50            a name of the hub (or of its cache on this machine)
    hf:path/to/folder,score=0.3           a folder; options: score, dets

The config's ``model_type`` says which adapter reads it: every adapter of this folder that names one as ``MODEL_TYPE``.
Weights come from safetensors files only. Classes are the config's; the model's own names are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detdistill.detectors.adapters import adapter, adapters_with
from detdistill.detectors.contract import Detector
from detdistill.detectors.options import ModelName, read_options
from detdistill.detectors.queries.shared import transformers_files as files
from detdistill.detectors.queries.shared.options import DetrSelectionOptions
from detdistill.errors import ModelError

TINY = None
"""It loads models of other kinds; there is none of its own to try."""


@dataclass(frozen=True, kw_only=True)
class HFOptions(DetrSelectionOptions):
    """Options of a model with weights; all else is in its config."""

    commas_in_backbone = True


OPTIONS = HFOptions


def build(backbone: str, classes: Sequence[str], options: HFOptions) -> Detector:
    """As ``load``: such a model string always brings its weights."""
    return load(backbone, classes, options)


def load(backbone: str, classes: Sequence[str] | None, options: HFOptions) -> Detector:
    """The detector of a folder or of a name of the hub.

    Args:
        backbone: folder or name.
        classes: as many as the detector must have; None: any.
        options: ``score`` and ``dets``.

    Raises:
        ModelError: there is no such thing, it is no detector known here, or its files are missing or broken.
    """
    name = options.name or f"hf:{backbone}"
    if not Path(backbone).is_dir():  # then it has no commas, and what stands behind one is an option, unknown
        given = dict(piece.split("=", 1) for piece in backbone.split(",")[1:] if "=" in piece)
        read_options(HFOptions, ModelName(name, "hf", backbone, given))
    config = files.read_config(backbone)
    known = adapters_with("MODEL_TYPE")
    if config.model_type not in known:
        raise ModelError(
            f"{backbone}: its config.json says model_type {config.model_type!r}; detectors that can be loaded: {', '.join(known)}"
        )
    detector: Detector = adapter(known[config.model_type]).load_pretrained(backbone, classes, name, options)
    return detector
