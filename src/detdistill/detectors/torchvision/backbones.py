"""Timm backbones with torchvision's feature pyramid: turn model options into the description that the loading script reads."""

from __future__ import annotations

import functools
import json
from typing import Any, Literal

import timm
import torch
from torch import nn

from detdistill.detectors.student_files.load_student import SimplePyramid, TimmPyramid, timm_features
from detdistill.detectors.torchvision.options import BackboneOptions
from detdistill.detectors.torchvision.pretrained import pretrained_features
from detdistill.errors import ModelError, nearest

PLAIN_VITS = ("vision_transformer", "deit", "eva")
"""timm modules of transformers whose maps all have the same stride: they get a ``SimplePyramid``."""
RESNETS = ("resnet",)
"""timm modules whose models take ``channels=`` and ``stem_width=``."""
NOT_IN_TIMM = {
    "uniformer": "UniFormer is neither in timm nor in transformers; take swin_tiny_patch4_window7_224 or convnext_tiny"
}
"""Prefixes of well-known backbone names that timm does not have, and the advice for the error message."""


def pyramid_description(
    backbone: str,
    options: BackboneOptions,
    levels: tuple[int, int],
    neck: int,
    top: Literal["conv", "linear", "input", "pool"] = "conv",
    below: bool = False,
) -> dict[str, Any]:
    """Compute the ``backbone`` entry of a model's description: a call of ``TimmPyramid``.

    Args:
        backbone: name of a timm model.
        options: backbone options of the model string.
        levels: first and last pyramid level; level l has stride 2^l.
        neck: channels of every level.
        top: how the levels above the backbone's deepest map are computed, see ``TimmPyramid``; ``pool`` can add one level only
            (torchvision's two-stage models).
        below: also compute the backbone's map below the pyramid, of half the first stride, if it has one.

    Raises:
        ModelError: the backbone is unknown or does not support these levels, channels or stem.
    """
    first, last = levels
    timm_options = timm_description(backbone, options)
    body = probe(backbone, timm_options)
    deepest = {
        reduction: index for index, reduction in zip(body.feature_info.out_indices, body.feature_info.reduction(), strict=True)
    }
    wanted = {2**level: level for level in range(first, last + 1)}
    indices = [index for reduction, index in sorted(deepest.items()) if reduction in wanted]
    if not indices or 2**first not in deepest:
        strides = ", ".join(map(str, sorted(deepest)))
        raise ModelError(
            f"backbone {backbone} has maps of stride {strides}; levels={first}-{last} must begin at one of these strides"
        )
    highest = max(level for stride, level in wanted.items() if stride in deepest)
    extra = list(range(highest + 1, last + 1))
    if top == "pool" and len(extra) > 1:
        raise ModelError(f"backbone {backbone}: levels={first}-{last} ends too high; one level above {highest} can be added")
    finer = [deepest[2 ** (first - 1)]] if below and 2 ** (first - 1) in deepest else []
    return {
        "call": "TimmPyramid",
        "name": backbone,
        "indices": finer + indices,
        "out_channels": neck,
        "extra": extra,
        "top": top,
        "norm": options.norm,
        **({"below": len(finer)} if finer else {}),
        **timm_options,
    }


def timm_description(backbone: str, options: BackboneOptions) -> dict[str, Any]:
    """Compute the keyword arguments of ``load_student.timm_features`` for these options.

    ``plain_stem`` changes the 64 channels of a stem with one convolution. All other arguments are passed to
    ``timm.create_model``.

    Raises:
        ModelError: timm has no such model, or the model does not support these options.
    """
    if not timm.is_model(backbone):
        known = timm.list_models()
        for beginning, reason in NOT_IN_TIMM.items():
            if backbone.lower().startswith(beginning):
                raise ModelError(f"unknown backbone {backbone!r}: {reason}")
        raise ModelError(f"unknown backbone {backbone!r}{nearest(backbone, known)}; name one of timm's {len(known)} models")
    wanted: dict[str, Any] = {}
    if timm.models.is_model_in_modules(backbone, ["swin_transformer", "swin_transformer_v2"]):
        wanted["strict_img_size"] = False
    patch = patch_of(backbone)
    if patch is not None:
        wanted |= {"patch": patch, "dynamic_img_size": True}
    scaled = [name for name in ("width", "channels", "stem") if getattr(options, name) != getattr(BackboneOptions, name)]
    if not scaled:
        return wanted
    if not timm.models.is_model_in_modules(backbone, list(RESNETS)):
        raise ModelError(
            f"backbone {backbone}: {', '.join(scaled)} needs a model of timm's resnet family (resnet10t, resnet18, resnet50, "
            f"...); elsewhere choose a narrower model by name, e.g. mobilenetv3_small_050"
        )
    if options.pretrained:
        raise ModelError(f"backbone {backbone}: pretrained=true does not go with {', '.join(scaled)}; its weights would not fit")
    if options.channels is not None:
        if len(options.channels) != 4 or options.width != 1.0:
            raise ModelError(f"backbone {backbone}: give either width= or channels= with four numbers, such as 16-32-64-128")
        wanted["channels"] = list(options.channels)
    elif options.width != 1.0:
        wanted["channels"] = [scale_channels(channels, options.width) for channels in (64, 128, 256, 512)]
    deep_stem = isinstance(probe(backbone, {}).conv1, nn.Sequential)
    if options.stem is not None:
        if not deep_stem and options.stem % 2:
            raise ModelError(f"backbone {backbone}: stem={options.stem} must be an even number of channels")
        wanted["stem_width" if deep_stem else "plain_stem"] = options.stem
    elif options.width != 1.0:
        wanted["stem_width" if deep_stem else "plain_stem"] = scale_channels(32 if deep_stem else 64, options.width)
    return wanted


def patch_of(backbone: str) -> int | None:
    """Side of the patches of a plain ViT (ViT, DeiT, DINOv2, DINOv3, EVA) in pixels; None: another kind of model."""
    if not timm.models.is_model_in_modules(backbone, list(PLAIN_VITS)):
        return None
    with torch.device("meta"):
        patches = getattr(timm.create_model(backbone, pretrained=False), "patch_embed", None)
    sides = getattr(patches, "patch_size", None)
    if not isinstance(sides, tuple) or sides[0] != sides[1]:
        return None
    return int(sides[0])


def scale_channels(channels: int, width: float) -> int:
    """Multiply channels by ``width``, rounded to a multiple of 8, at least 8."""
    return max(8, round(channels * width / 8) * 8)


def probe(backbone: str, timm_options: dict[str, Any]) -> Any:
    """The backbone with all its feature maps and without values (device ``meta``), to read strides, channels and modules.

    Each is built once in a process, so it must not be changed.

    Raises:
        ModelError: as ``random_features``.
    """
    return _probed(backbone, json.dumps(timm_options))


@functools.lru_cache(maxsize=128)
def _probed(backbone: str, timm_options: str) -> Any:
    return random_features(backbone, json.loads(timm_options)).to("meta")


def random_features(backbone: str, timm_options: dict[str, Any]) -> Any:
    """Build the backbone with random weights; the random state stays unchanged.

    Args:
        backbone: name of a timm model.
        timm_options: see ``load_student.timm_features``; without ``out_indices``, it returns all its maps.

    Raises:
        ModelError: timm cannot build the model, or not as a feature extractor.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            return timm_features(backbone, **timm_options)
        except Exception as error:  # timm raises whatever a model's constructor does
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(f"backbone {backbone}: timm cannot build it as features: {reason}") from error


def load_pretrained(pyramid: TimmPyramid, description: dict[str, Any], source: bool | str = True) -> None:
    """Copy pretrained weights into a pyramid's backbone.

    Args:
        pyramid: the pyramid.
        description: the call that built it.
        source: see ``pretrained.pretrained_features``.

    Raises:
        ModelError: the backbone has no pretrained weights, they cannot be downloaded, or a file does not fit.
    """
    known = ("call", "name", "indices", "out_channels", "extra", "top", "norm", "below", "patch", "neck_norm")
    options = {key: value for key, value in description.items() if key not in known}
    vit = isinstance(pyramid.body, SimplePyramid)
    indices = (-1,) if vit else tuple(description["indices"])
    body = pretrained_features(description["name"], indices, options, source)
    (pyramid.body.vit if isinstance(pyramid.body, SimplePyramid) else pyramid.body).load_state_dict(body.state_dict())


def image_statistics(backbone: str, options: BackboneOptions) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation for image normalisation: those of the pretrained weights, else of ImageNet."""
    if options.pretrained:
        config = timm.get_pretrained_cfg(backbone)
        if config is not None:
            return list(config.mean), list(config.std)
    return [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
