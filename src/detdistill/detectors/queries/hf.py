"""Any DETR of transformers with its weights, or a backbone that teaches: hf:NAME_OR_FOLDER, from the hub or a saved folder.

    hf:facebook/detr-resnet-50            a model on the hub (or in the hub's cache on this machine)
    hf:path/to/folder,score=0.3           a folder; options: score, dets
    hf:facebook/dinov2-small,stride=8     a backbone, which can only teach methods on maps; option: stride

The config's ``model_type`` selects the adapter: the adapter of this folder that has the same ``MODEL_TYPE``. Models that are no
detectors are loaded as backbones (``transformers_backbones``), if the library has them as such.
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
from detdistill.detectors.queries.shared.transformers_backbones import is_backbone, load_backbone
from detdistill.detectors.torchvision.maps_only import refuse_student
from detdistill.errors import ModelError
from detdistill.values import Count

TINY = None
"""No tiny model for ``probe``: this adapter only loads models of the other adapters."""


@dataclass(frozen=True, kw_only=True)
class HFOptions(DetrSelectionOptions):
    """Options of a model loaded with its weights; everything else is in its config."""

    commas_in_backbone = True

    stride: Count | None = None
    """Pixels of the student's image that one patch of a plain ViT sees, which sets the ViT's own resolution (backbones only)."""


OPTIONS = HFOptions


def build(backbone: str, classes: Sequence[str], options: HFOptions) -> Detector:
    """Same as ``load``: an ``hf`` model always comes with its weights.

    Raises:
        ModelError: see ``load``; also if the model is a backbone without a head.
    """
    if (detector := load(backbone, classes, options)).spec.family == "features":
        refuse_student(detector.spec.name)
    return detector


def load(backbone: str, classes: Sequence[str] | None, options: HFOptions) -> Detector:
    """Load a detector, or a backbone as a teacher of maps, from a ``save_pretrained`` folder or from the hub.

    Args:
        backbone: the folder, or the model's name on the hub.
        classes: the detector must have this many classes; None: any number. The detector keeps its own class names.
        options: ``score`` and ``dets``; for backbones ``stride``.

    Raises:
        ModelError: no such folder or model, no adapter for its ``model_type``, files are missing or broken, or ``stride`` is
            given for a detector.
    """
    name = options.name or f"hf:{backbone}"
    if not Path(backbone).is_dir():  # hub names contain no commas: text after one is an option, and here an unknown one
        given = dict(piece.split("=", 1) for piece in backbone.split(",")[1:] if "=" in piece)
        read_options(HFOptions, ModelName(name, "hf", backbone, given))
    config = files.read_config(backbone)
    known = adapters_with("MODEL_TYPE")
    if config.model_type not in known and is_backbone(config):
        return load_backbone(backbone, config, name, options.stride)
    if config.model_type not in known:
        raise ModelError(
            f"{backbone}: its config.json says model_type {config.model_type!r}; detectors that can be loaded: "
            f"{', '.join(known)}; backbones: dinov2, dinov3_vit and others that transformers runs by AutoBackbone"
        )
    if options.stride is not None:
        raise ModelError(f"model {name!r}: stride= is for backbones that teach; {config.model_type} is a detector")
    detector: Detector = adapter(known[config.model_type]).load_pretrained(backbone, classes, name, options)
    return detector
