"""Backbones of transformers (DINOv2, DINOv3, ConvNeXt, Swin, ResNet, ...) as teachers of feature maps (safetensors only)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING, MODEL_FOR_BACKBONE_MAPPING_NAMES

from detdistill.detectors.queries.shared.transformers_files import is_offline, read_statistics, reason_of
from detdistill.detectors.queries.shared.transformers_models import quiet
from detdistill.detectors.torchvision.maps_only import POWERS, MapsOnly
from detdistill.errors import ModelError

IMAGE_PROCESSOR = "DetrImageProcessor"
"""Its defaults, ImageNet's mean and deviation, apply to folders without ``preprocessor_config.json``."""


def is_backbone(config: Any) -> bool:
    """Whether a config of the library is that of a model which the library can run as a backbone."""
    return config.model_type in MODEL_FOR_BACKBONE_MAPPING_NAMES and config.model_type != "timm_backbone"


def load_backbone(source: str | Path, config: Any, name: str, stride: int | None) -> MapsOnly:
    """Load a backbone with its weights from a ``save_pretrained`` folder or the hub.

    Of a plain ViT (DINOv2, DINOv3) the teacher has the normalised last map; of other networks the last map of each stride from
    8 to 32.

    Args:
        source: the folder, or the model's name on the hub.
        config: the library's config of it.
        name: name of the detector.
        stride: pixels of the batch's images that a patch of a plain ViT sees; None: see ``MapsOnly``.

    Raises:
        ModelError: files are missing or broken, the model outputs no maps, or ``stride`` is given for another kind of network.
    """
    stages = [stage for stage in config.stage_names if stage != "stem"]
    config.out_features = stages
    model = _loaded(source, config)
    patch = getattr(config, "patch_size", None)
    side = 4 * patch if isinstance(patch, int) and patch >= POWERS[0] else 128
    strides = _strides(model, side, name)
    if isinstance(patch, int) and set(strides) == {patch}:
        model.config.out_features = stages[-1:]
        kept, patch_side = [0], patch
    else:
        if stride is not None:
            raise ModelError(f"model {name!r}: stride= is for plain ViTs")
        last = {one: index for index, one in enumerate(strides)}
        kept, patch_side = [last[one] for one in sorted(last) if one in POWERS], None
        if not kept:
            raise ModelError(f"model {name!r}: has maps of stride {', '.join(map(str, sorted(last)))}, none of 8, 16 or 32")

    def run(body: nn.Module, images: Tensor) -> list[Tensor]:
        maps: Sequence[Tensor] = body(images).feature_maps
        return [maps[index] for index in kept]

    statistics = read_statistics(source, IMAGE_PROCESSOR)
    return MapsOnly(model, run, name, patch=patch_side, stride=stride, **statistics)


def _loaded(source: str | Path, config: Any) -> Any:
    """The library's backbone with all of its weights.

    Raises:
        ModelError: files are missing or broken, or tensors are missing in them.
    """
    kind: Any = MODEL_FOR_BACKBONE_MAPPING[type(config)]
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, info = kind.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=is_offline(source),
                output_loading_info=True,
            )
        except Exception as error:  # the library raises OSError, ImportError, SafetensorError, RuntimeError, ValueError
            raise ModelError(f"{source}: {reason_of(error)}") from error
    # Norms of the stages' maps (ConvNeXt, Swin) belong to the backbone alone: no checkpoint has them, and they begin neutral.
    if lost := sorted(key for key in info["missing_keys"] if not key.startswith("hidden_states_norms.")):
        raise ModelError(f"{source}: {len(lost)} tensors of a {type(model).__name__} are missing, e.g. {lost[0]}")
    return model


@torch.no_grad()
def _strides(model: Any, side: int, name: str) -> list[int]:
    """The stride of each map, measured on an empty image.

    Raises:
        ModelError: the model outputs no maps.
    """
    try:
        maps = model.eval()(torch.zeros(1, 3, side, side)).feature_maps
        return [side // level.shape[-1] for level in maps]
    except Exception as error:  # libraries raise whatever a network does
        raise ModelError(f"model {name!r}: outputs no maps: {reason_of(error)}") from error
