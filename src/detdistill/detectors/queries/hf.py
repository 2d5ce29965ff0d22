"""Any DETR of transformers with its weights, hf:NAME_OR_FOLDER, from the hub or a save_pretrained folder.

    hf:facebook/detr-resnet-50            a model on the hub (or in the hub's cache on this machine)
    hf:path/to/folder,score=0.3           a folder; options: score, dets

The config's ``model_type`` selects the adapter: the adapter of this folder that has the same ``MODEL_TYPE``.
Weights are read from safetensors files only. The class names are those of the config.
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
"""No tiny model for ``probe``: this adapter only loads models of the other adapters."""


@dataclass(frozen=True, kw_only=True)
class HFOptions(DetrSelectionOptions):
    """Options of a model loaded with its weights; everything else is in its config."""

    commas_in_backbone = True


OPTIONS = HFOptions


def build(backbone: str, classes: Sequence[str], options: HFOptions) -> Detector:
    """Same as ``load``: an ``hf`` model always comes with its weights."""
    return load(backbone, classes, options)


def load(backbone: str, classes: Sequence[str] | None, options: HFOptions) -> Detector:
    """Load a detector from a ``save_pretrained`` folder or from the hub.

    Args:
        backbone: the folder, or the model's name on the hub.
        classes: the detector must have this many classes; None: any number. The detector keeps its own class names.
        options: ``score`` and ``dets``.

    Raises:
        ModelError: no such folder or model, no adapter for its ``model_type``, or files are missing or broken.
    """
    name = options.name or f"hf:{backbone}"
    if not Path(backbone).is_dir():  # hub names contain no commas: text after one is an option, and here an unknown one
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
