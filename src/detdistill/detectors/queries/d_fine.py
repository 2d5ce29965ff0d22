"""D-FINE: transformers' model, run stage by stage.

Peng et al., "D-FINE: Redefine Regression Task of DETRs as Fine-grained Distribution Refinement", ICLR 2025, as in
``transformers.models.d_fine``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import DFineConfig, DFineForObjectDetection
from transformers.loss.loss_d_fine import DFineLoss

from detdistill.detectors.queries.shared import rt_detr as family
from detdistill.detectors.queries.shared import transformers_detector as shared
from detdistill.detectors.queries.shared import transformers_files as files
from detdistill.detectors.queries.shared import transformers_models as models
from detdistill.detectors.queries.shared.d_fine import FineDetector
from detdistill.detectors.queries.shared.options import DetrSelectionOptions

MODEL_TYPE = "d_fine"
OPTIONS = family.HybridOptions

TINY = "resnet10t,channels=8-16-32-64,stem=8,dim=32,heads=4,ffn=64,queries=10,encoder=1,decoder=2"
"""The smallest useful model, for ``probe``."""


def build(backbone: str, classes: Sequence[str], options: family.HybridOptions) -> DFineDetector:
    """A fresh D-FINE on a timm backbone: levels 3-5, 300 queries, 1 encoder and 6 decoder layers, 100 denoising queries.

    Raises:
        ModelError: the options do not fit the backbone or each other.
    """
    config = DFineConfig(**family.family_arguments(MODEL_TYPE, backbone, options), **models.label_maps(classes))
    model = models.fresh_model(DFineForObjectDetection, config, DFineDetector.backbone_modules, backbone, options)
    name = options.name or f"{MODEL_TYPE}:{backbone}"
    return DFineDetector(family.unit_norms(model), name, **models.statistics(backbone, options), **models.selection(options))


def load_pretrained(
    source: str, classes: Sequence[str] | None, name: str, options: DetrSelectionOptions
) -> shared.TransformersDetector:
    """A D-FINE from a folder or the hub; see ``hf``."""
    return files.load_pretrained(DFineDetector, source, classes, name, options)


def load_exported(folder: Path, classes: Sequence[str], name: str) -> shared.TransformersDetector:
    """Load an exported student folder; see ``transformers_files.load_exported``."""
    return files.load_exported(DFineDetector, folder, classes, name)


class DFineDetector(FineDetector):
    """D-FINE. ``Queries`` holds the outputs of every decoder layer, in eval mode too (the library: in training mode only)."""

    model_class = DFineForObjectDetection

    def criterion(self) -> DFineLoss:
        """The library's criterion."""
        return DFineLoss(self.config)
