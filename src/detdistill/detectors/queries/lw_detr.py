"""LW-DETR: transformers' model, run stage by stage, with its own ViT.

Chen et al., "LW-DETR: A Transformer Replacement to YOLO for Real-Time Detection", arXiv 2406.03459, as in
``transformers.models.lw_detr``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from detdistill.detectors.queries.shared import lw_detr as family
from detdistill.detectors.queries.shared import transformers_detector as shared
from detdistill.detectors.queries.shared import transformers_files as files
from detdistill.detectors.queries.shared import transformers_models as models
from detdistill.detectors.queries.shared.options import DetrSelectionOptions, QueryOptions, SamplingOptions
from detdistill.detectors.torchvision.options import LevelOptions, Levels
from detdistill.errors import ModelError
from detdistill.values import Count

try:
    from transformers import LwDetrConfig, LwDetrForObjectDetection, LwDetrViTConfig
except ImportError as error:
    raise ModelError("lw_detr needs a transformers that has LW-DETR (5.0 or later); upgrade it") from error

MODEL_TYPE = "lw_detr"
TINY = "vit_nano,levels=3-3,dim=32,heads=4,ffn=64,queries=10,decoder=2"
VITS = {"vit_nano": (64, 4), "vit_tiny": (192, 10), "vit_small": (384, 10), "vit_base": (768, 10)}
"""Width and number of layers of each backbone. ``vit_nano`` is not in the paper; it is meant for small data."""
SCALES = {3: 2.0, 4: 1.0, 5: 0.5}
"""The projector's scale factor for each level; the ViT's own map is level 4 (stride 16)."""


@dataclass(frozen=True, kw_only=True)
class LwDetrOptions(DetrSelectionOptions, SamplingOptions, QueryOptions, LevelOptions):
    """Options of LW-DETR. There are none of the backbone, and none of an encoder (the ViT is the encoder)."""

    levels: Levels = (4, 4)
    decoder: Count = 3
    points: Count = 2


OPTIONS = LwDetrOptions


def build(backbone: str, classes: Sequence[str], options: LwDetrOptions) -> LwDetrDetector:
    """A fresh LW-DETR on one of its own ViTs (``VITS``): level 4, 300 queries, 3 decoder layers, 13 groups.

    Raises:
        ModelError: the backbone is not in ``VITS``, or the options do not fit each other.
    """
    if backbone not in VITS:
        raise ModelError(f"{MODEL_TYPE}: unknown backbone {backbone}; take one of its own: {', '.join(VITS)}")
    width, heads = options.dim, options.heads
    if width % (2 * heads):
        raise ModelError(f"{MODEL_TYPE}: dim={width} must be a multiple of twice heads={heads}")
    first, last = options.levels
    if not 3 <= first <= last <= 5:
        raise ModelError(f"{MODEL_TYPE}: levels={first}-{last} must lie within 3-5; its ViT has stride 16")
    hidden, depth = VITS[backbone]
    vit: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": hidden // 16,
        "window_block_indices": [layer for layer in range(depth) if layer not in (2, 4, 5, 8)],  # of ten: 0 1 3 6 7 9
        "out_indices": [2, 4, 5, 9] if depth == 10 else [2, depth],
        "image_size": 1024,
    }
    config = LwDetrConfig(
        backbone_config=LwDetrViTConfig(**vit),
        projector_scale_factors=[SCALES[level] for level in range(first, last + 1)],
        d_model=width,
        decoder_layers=options.decoder,
        decoder_self_attention_heads=heads,
        decoder_cross_attention_heads=2 * heads,
        decoder_ffn_dim=options.ffn,
        decoder_n_points=options.points,
        num_queries=options.queries,
        auxiliary_loss=True,
        **models.label_maps(classes),
    )
    model = start_as_published(LwDetrForObjectDetection(config))
    return LwDetrDetector(model, options.name or f"{MODEL_TYPE}:{backbone}", **models.selection(options))


def load_pretrained(
    source: str, classes: Sequence[str] | None, name: str, options: DetrSelectionOptions
) -> shared.TransformersDetector:
    """An LW-DETR from a folder or the hub; see ``hf``."""
    return files.load_pretrained(LwDetrDetector, source, classes, name, options)


def load_exported(folder: Path, classes: Sequence[str], name: str) -> shared.TransformersDetector:
    """Load an exported student folder; see ``transformers_files.load_exported``."""
    return files.load_exported(LwDetrDetector, folder, classes, name)


@torch.no_grad()
def start_as_published(model: Any) -> Any:
    """Set the learned box offsets to zero, so that queries start at the boxes of their cells.

    transformers draws the offsets from a normal distribution.
    """
    model.model.reference_point_embed.weight.zero_()
    return model


class LwDetrDetector(family.GroupDetector):
    """LW-DETR. Features are the projector's maps."""

    model_class = LwDetrForObjectDetection

    @property
    def step(self) -> int:  # type: ignore[override]
        """Patch size times the number of windows along a side, in pixels."""
        vit = self.config.backbone_config
        return int(vit.patch_size * math.isqrt(vit.num_windows))

    def neck_strides(self) -> tuple[int, ...]:
        """The ViT's stride divided by each of the projector's scale factors."""
        return tuple(int(self.backbone_strides[0] / scale) for scale in self.config.projector_scale_factors)
