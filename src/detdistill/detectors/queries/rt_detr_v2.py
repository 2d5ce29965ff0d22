"""RT-DETRv2: transformers' model, run stage by stage.

Lv et al., "RT-DETRv2: Improved Baseline with Bag-of-Freebies for Real-Time Detection Transformer", arXiv 2407.17140, as in
``transformers.models.rt_detr_v2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection

from detdistill.detectors.queries.shared import rt_detr as family
from detdistill.detectors.queries.shared import transformers_detector as shared
from detdistill.detectors.queries.shared import transformers_files as files
from detdistill.detectors.queries.shared import transformers_models as models
from detdistill.detectors.queries.shared.options import DetrSelectionOptions

MODEL_TYPE = "rt_detr_v2"
OPTIONS = family.HybridOptions

TINY = "resnet10t,channels=8-16-32-64,stem=8,dim=32,heads=4,ffn=64,queries=10,encoder=1,decoder=2"
"""The smallest useful model, for ``probe``."""


def build(backbone: str, classes: Sequence[str], options: family.HybridOptions) -> RTDetrV2Detector:
    """A fresh RT-DETRv2 on a timm backbone: levels 3-5, 300 queries, 1 encoder and 6 decoder layers, 100 denoising queries.

    Raises:
        ModelError: the options do not fit the backbone or each other.
    """
    arguments = family.family_arguments(MODEL_TYPE, backbone, options)
    arguments["decoder_n_levels"] = arguments["num_feature_levels"]
    config = RTDetrV2Config(**arguments, **models.label_maps(classes))
    model = models.fresh_model(RTDetrV2ForObjectDetection, config, RTDetrV2Detector.backbone_modules, backbone, options)
    name = options.name or f"{MODEL_TYPE}:{backbone}"
    return RTDetrV2Detector(family.unit_norms(model), name, **models.statistics(backbone, options), **models.selection(options))


def load_pretrained(
    source: str, classes: Sequence[str] | None, name: str, options: DetrSelectionOptions
) -> shared.TransformersDetector:
    """An RT-DETRv2 from a folder or the hub; see ``hf``."""
    return files.load_pretrained(RTDetrV2Detector, source, classes, name, options)


def load_exported(folder: Path, classes: Sequence[str], name: str) -> shared.TransformersDetector:
    """Load an exported student folder; see ``transformers_files.load_exported``."""
    return files.load_exported(RTDetrV2Detector, folder, classes, name)


class RTDetrV2Detector(family.RefiningDetector):
    """RT-DETRv2: RT-DETR with a different point sampling in the decoder's deformable attention."""

    model_class = RTDetrV2ForObjectDetection
