"""RF-DETR: transformers' model, run stage by stage, with its own DINOv2.

Robinson et al., "RF-DETR: Neural Architecture Search for Real-Time Detection Transformers", arXiv 2511.09554, as in
``transformers.models.rf_detr``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detdistill.detectors.options import ModelOptions
from detdistill.detectors.queries.shared import lw_detr as family
from detdistill.detectors.queries.shared import transformers_detector as shared
from detdistill.detectors.queries.shared import transformers_files as files
from detdistill.detectors.queries.shared.options import DetrSelectionOptions
from detdistill.errors import ModelError

try:
    from transformers import RfDetrForObjectDetection
except ImportError as error:
    raise ModelError("rf_detr needs a transformers that has RF-DETR (5.0 or later); upgrade it") from error

MODEL_TYPE = "rf_detr"
OPTIONS = ModelOptions
TINY = None
"""No tiny model for ``probe``: RF-DETR is only loaded, never built."""


def build(backbone: str, classes: Sequence[str], options: ModelOptions) -> RfDetrDetector:
    """Refuse to build: RF-DETR is only loaded with its weights, since it needs its pretrained DINOv2.

    Raises:
        ModelError: always; the message says how to load one.
    """
    raise ModelError(f"{MODEL_TYPE}:{backbone}: RF-DETR needs its pretrained weights; load it: hf:<name or folder of an RF-DETR>")


def load_pretrained(
    source: str, classes: Sequence[str] | None, name: str, options: DetrSelectionOptions
) -> shared.TransformersDetector:
    """An RF-DETR from a folder or the hub; see ``hf``."""
    return files.load_pretrained(RfDetrDetector, source, classes, name, options)


def load_exported(folder: Path, classes: Sequence[str], name: str) -> shared.TransformersDetector:
    """Load an exported student folder; see ``transformers_files.load_exported``."""
    return files.load_exported(RfDetrDetector, folder, classes, name)


class RfDetrDetector(family.GroupDetector):
    """RF-DETR. Features are the projector's one map."""

    model_class = RfDetrForObjectDetection
    image_processor = "RfDetrImageProcessor"

    @property
    def step(self) -> int:  # type: ignore[override]
        """Patch size times the number of windows along a side, in pixels."""
        vit = self.config.backbone_config
        return int(vit.patch_size * vit.num_windows)

    def neck_strides(self) -> tuple[int, ...]:
        """The stride of the DINOv2's maps."""
        return self.backbone_strides[:1]
