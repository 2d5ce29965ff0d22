"""RT-DETR: transformers' model, run stage by stage.

Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", CVPR 2024, as in ``transformers.models.rt_detr``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import RTDetrConfig, RTDetrForObjectDetection

from detdistill.detectors.queries.shared import rt_detr as family
from detdistill.detectors.queries.shared import transformers_detector as shared
from detdistill.detectors.queries.shared import transformers_files as files
from detdistill.detectors.queries.shared import transformers_models as models
from detdistill.detectors.queries.shared.options import DetrSelectionOptions

MODEL_TYPE = "rt_detr"
OPTIONS = family.HybridOptions

TINY = "resnet10t,channels=8-16-32-64,stem=8,dim=32,heads=4,ffn=64,queries=10,encoder=1,decoder=2"
"""The smallest useful model, for ``probe``."""


def build(backbone: str, classes: Sequence[str], options: family.HybridOptions) -> RTDetrDetector:
    """A fresh RT-DETR on a timm backbone: levels 3-5, 300 queries, 1 encoder and 6 decoder layers, 100 denoising queries.

    Raises:
        ModelError: the options do not fit the backbone or each other.
    """
    config = RTDetrConfig(**family.family_arguments(MODEL_TYPE, backbone, options), **models.label_maps(classes))
    model = models.fresh_model(RTDetrForObjectDetection, config, RTDetrDetector.backbone_modules, backbone, options)
    name = options.name or f"{MODEL_TYPE}:{backbone}"
    return RTDetrDetector(family.unit_norms(model), name, **models.statistics(backbone, options), **models.selection(options))


def load_pretrained(
    source: str, classes: Sequence[str] | None, name: str, options: DetrSelectionOptions
) -> shared.TransformersDetector:
    """An RT-DETR from a folder or the hub; see ``hf``."""
    return files.load_pretrained(RTDetrDetector, source, classes, name, options)


def load_exported(folder: Path, classes: Sequence[str], name: str) -> shared.TransformersDetector:
    """Load an exported student folder; see ``transformers_files.load_exported``."""
    return files.load_exported(RTDetrDetector, folder, classes, name)


class RTDetrDetector(family.RefiningDetector):
    """RT-DETR. Features are the hybrid encoder's maps; queries start at its best cells, and each layer refines their boxes."""

    model_class = RTDetrForObjectDetection
