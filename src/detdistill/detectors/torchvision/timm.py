"""Any backbone of timm as a teacher of feature maps, with its pretrained weights, e.g. timm:vit_small_patch14_dinov2.

    timm:vit_small_patch14_dinov2.lvd142m,stride=8      DINOv2; a patch sees 8 x 8 pixels of the student's image
    timm:vit_small_patch16_dinov3.lvd1689m              DINOv3; its weights have a licence of their own (dinov3-license)
    timm:tf_efficientnet_lite2,levels=3-5               a CNN: maps of strides 8, 16 and 32

Weights keep the licences under which they were published; timm names them (``timm.get_pretrained_cfg(NAME).license``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from detdistill.detectors.options import ModelOptions
from detdistill.detectors.torchvision.backbones import (
    image_statistics,
    patch_of,
    probe,
    random_features,
    timm_description,
)
from detdistill.detectors.torchvision.maps_only import MapsOnly, refuse_student
from detdistill.detectors.torchvision.options import BackboneOptions, Levels
from detdistill.detectors.torchvision.pretrained import pretrained_features
from detdistill.errors import ModelError
from detdistill.values import Count

TINY = None
"""None: it only loads backbones with their weights, and they predict nothing."""
LEVELS = (3, 5)


@dataclass(frozen=True, kw_only=True)
class TimmOptions(ModelOptions):
    """Options of a timm backbone that teaches."""

    pretrained: bool | str = True
    """The backbone's weights: `true` for timm's own, or a file of weights for this timm model (.safetensors or .pth); `false` for
    random ones."""
    levels: Levels = LEVELS
    """First and last level of the maps of a backbone with several strides; level l has stride 2^l."""
    stride: Count | None = None
    """Pixels of the student's image that one patch of a plain ViT sees, which sets the ViT's own resolution."""


OPTIONS = TimmOptions


def build(backbone: str, classes: Sequence[str], options: TimmOptions) -> MapsOnly:
    """Refuse to build a student.

    Raises:
        ModelError: always.
    """
    refuse_student(options.name or f"timm:{backbone}")


def load(backbone: str, classes: Sequence[str] | None, options: TimmOptions) -> MapsOnly:
    """Build the backbone with its weights; ``classes`` are ignored, since it has none.

    Raises:
        ModelError: timm has no such model, or not as features; its weights cannot be found; or an option does not fit it.
    """
    name = options.name or f"timm:{backbone}"
    own = BackboneOptions(pretrained=options.pretrained)
    given = timm_description(backbone, own)
    patch = patch_of(backbone)
    mean, std = image_statistics(backbone, own)
    if patch is not None:
        if options.levels != LEVELS:
            raise ModelError(f"model {name!r}: a plain ViT has one map; stride= sets how many pixels a patch sees, not levels=")
        del given["patch"]
        # Such models are used by their normalised last map; timm leaves the normalisation out by default.
        given["feature_cls"] = partial(FeatureGetterNet, norm=True)
        body = _features(backbone, (-1,), given, options.pretrained)
        return MapsOnly(body, _maps, name, patch=patch, stride=options.stride, mean=mean, std=std)
    if options.stride is not None:
        raise ModelError(f"model {name!r}: stride= is for plain ViTs; choose the maps of this backbone by levels=")
    info = probe(backbone, given).feature_info
    wanted = range(options.levels[0], options.levels[1] + 1)
    deepest = dict(zip(info.reduction(), info.out_indices, strict=True))
    indices = [index for reduction, index in sorted(deepest.items()) if reduction in {2**level for level in wanted}]
    if not indices:
        strides = ", ".join(map(str, sorted(deepest)))
        raise ModelError(f"model {name!r}: has maps of stride {strides}, none of them in levels={wanted[0]}-{wanted[-1]}")
    body = _features(backbone, indices, given, options.pretrained)
    return MapsOnly(body, _maps, name, mean=mean, std=std)


def _features(backbone: str, indices: Sequence[int], given: dict[str, Any], source: bool | str) -> nn.Module:
    """The backbone as features, with its weights; random ones do not change the random state of the run.

    Raises:
        ModelError: see ``pretrained_features``.
    """
    if source is False:
        module: nn.Module = random_features(backbone, {"out_indices": tuple(indices), **given})
        return module
    loaded: nn.Module = pretrained_features(backbone, indices, given, source)
    return loaded


def _maps(body: nn.Module, images: Tensor) -> list[Tensor]:
    """The maps [B, C, h, w], also of networks that put their channels last."""
    maps = body(images)
    if str(getattr(body, "output_fmt", None)).upper().endswith("NHWC"):
        return [level.permute(0, 3, 1, 2).contiguous() for level in maps]
    return list(maps)
