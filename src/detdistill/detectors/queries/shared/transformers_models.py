"""Build new models of transformers' DETR families from the options of a model string, with working backbones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import timm
import torch
from huggingface_hub.utils import logging as hub_logging
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from transformers import PreTrainedConfig, ResNetConfig, RTDetrResNetConfig, SwinConfig, TimmBackboneConfig
from transformers.utils import logging as library_logging

from detdistill.detectors.queries.shared.options import DetrSelectionOptions
from detdistill.detectors.torchvision.backbones import image_statistics, probe, timm_description
from detdistill.detectors.torchvision.options import BackboneOptions
from detdistill.detectors.torchvision.pretrained import pretrained_features
from detdistill.errors import ModelError


def backbone_config(backbone: str, options: BackboneOptions, strides: Sequence[int]) -> PreTrainedConfig:
    """The library's config of a timm backbone that returns the maps of the given strides.

    A scaled resnet (``width``, ``channels``, ``stem``) becomes transformers' own ResNet of the same depths, widths and kind
    of block, because a ``TimmBackboneConfig`` cannot hold keyword arguments of timm. It becomes RT-DETR's ResNet (deep stem)
    if timm's stem is deep and either the blocks are bottlenecks or the stem is as wide as the first stage; otherwise it
    becomes the plain ResNet (7x7 stem). A Swin becomes transformers' own, because a ``TimmBackboneConfig`` cannot hold the
    argument by which timm's takes images of any size.

    Raises:
        ModelError: the backbone is unknown, cannot be scaled, lacks a stride, or needs timm options that transformers cannot
            store.
    """
    if timm.models.is_model_in_modules(backbone, ["swin_transformer"]):
        return swin_config(backbone, options, strides)
    timm_options = timm_description(backbone, options)
    scaled = timm_options.keys() & {"channels", "stem_width", "plain_stem"}
    if timm_options and not scaled:
        needed = ", ".join(timm_options)
        raise ModelError(f"backbone {backbone} needs timm's {needed}, which transformers cannot store; take a convolutional one")
    body = probe(backbone, timm_options)
    if str(getattr(body, "output_fmt", "NCHW")).upper().endswith("NHWC"):
        raise ModelError(f"backbone {backbone} puts its channels last, which transformers' detectors do not expect")
    index_of = dict(zip(body.feature_info.reduction(), body.feature_info.out_indices, strict=True))
    missing = [stride for stride in strides if stride not in index_of]
    if missing:
        known = ", ".join(map(str, index_of))
        raise ModelError(f"backbone {backbone} has maps of stride {known}, none of stride {missing[0]}, which the detector needs")
    if not scaled:
        return cast(Any, TimmBackboneConfig)(backbone=backbone, out_indices=[index_of[stride] for stride in strides])
    depths = [len(getattr(body, f"layer{stage}")) for stage in range(1, 5)]
    widths = [int(channels) for channels in body.feature_info.channels()[-4:]]
    bottleneck = hasattr(body.layer1[0], "conv3")
    stem = int(body.layer1[0].conv1.in_channels)
    deep = isinstance(body.conv1, nn.Sequential)
    config_class: Any = RTDetrResNetConfig if deep and (bottleneck or stem == widths[0]) else ResNetConfig
    return config_class(
        embedding_size=stem,
        hidden_sizes=widths,
        depths=depths,
        layer_type="bottleneck" if bottleneck else "basic",
        out_features=[f"stage{int(stride).bit_length() - 2}" for stride in strides],
    )


def swin_config(backbone: str, options: BackboneOptions, strides: Sequence[int]) -> PreTrainedConfig:
    """The library's own Swin with depths, widths, heads and window of timm's; it takes images of any size.

    Raises:
        ModelError: the backbone lacks a stride, or an option needs timm's weights or a resnet.
    """
    timm_description(backbone, options)  # refuses widths and channels
    if options.pretrained:
        raise ModelError(
            f"backbone {backbone}: under DETR families it is transformers' own Swin, into which timm's weights do not fit; leave "
            "out pretrained"
        )
    missing = [stride for stride in strides if stride not in (4, 8, 16, 32)]
    if missing:
        raise ModelError(
            f"backbone {backbone} has maps of stride 4, 8, 16, 32, none of stride {missing[0]}, which the detector needs"
        )
    with torch.device("meta"):
        model: Any = timm.create_model(backbone, pretrained=False)
    first = [stage.blocks[0].attn for stage in model.layers]
    return cast(Any, SwinConfig)(
        embed_dim=model.embed_dim,
        depths=[len(stage.blocks) for stage in model.layers],
        num_heads=[attention.num_heads for attention in first],
        window_size=first[0].window_size[0],
        out_features=[f"stage{int(stride).bit_length() - 2}" for stride in strides],
    )


def fresh_model(
    model_class: Callable[[Any], Any], config: Any, backbone_modules: Sequence[str], backbone: str, options: BackboneOptions
) -> Any:
    """A library model with random weights (with ``pretrained``: the backbone's from timm) whose parameters all train.

    Args:
        model_class: the library's ``...ForObjectDetection``.
        config: its config. ``backbone_norm`` is written into it, so that a saved model trains with the same norms later.
        backbone_modules: dotted names of the backbone inside the model.
        backbone: name of the timm model.
        options: options of the model string; ``norm`` and ``pretrained`` are read.

    Raises:
        ModelError: the library would break the backbone, or there are no pretrained weights.
    """
    config.backbone_norm = options.norm
    try:
        model = model_class(config)
    except ValueError as error:
        if "tie_weights_keys" not in str(error):
            raise
        raise ModelError(
            f"{config.model_type}: decoder=1 cannot be built: transformers shares outputs between decoder layers and fails "
            "with a single layer; use decoder=2 or more"
        ) from error
    body = backbone_body(model, backbone_modules)
    if config.backbone_config.model_type == "timm_backbone":
        refuse_lost_activations(body, backbone)
        if options.pretrained:
            load_timm_weights(body, backbone, config.backbone_config.out_indices, options.pretrained)
    return ready_model(model, backbone_modules)


def ready_model(model: Any, backbone_modules: Sequence[str]) -> Any:
    """Make all parameters trainable; if the config's ``backbone_norm`` is ``bn``, the backbone's BatchNorms train, too."""
    model.requires_grad_(True)
    if getattr(model.config, "backbone_norm", None) == "bn":
        for name in backbone_modules:
            trainable_norms(model.get_submodule(name))
    return model


def trainable_norms(module: nn.Module) -> None:
    """Replace the library's frozen norms by trainable BatchNorm with the same values and epsilon."""
    for name, child in list(module.named_children()):
        if is_constant_norm(child):
            constant = cast(Any, child)
            norm = nn.BatchNorm2d(len(constant.weight), eps=1e-5).to(constant.weight)
            values = {key: value for key, value in constant.state_dict().items() if key != "num_batches_tracked"}
            norm.load_state_dict(values, strict=False)
            setattr(module, name, norm)
        else:
            trainable_norms(child)


def is_constant_norm(module: nn.Module) -> bool:
    """True for the ``...FrozenBatchNorm2d`` by which transformers replaces BatchNorm in some families."""
    return type(module).__name__.endswith("FrozenBatchNorm2d") and type(module).__module__.startswith("transformers.")


def saved_state(model: Any) -> dict[str, Tensor]:
    """A model's state dict in the library's form: frozen norms have no ``num_batches_tracked`` there."""
    state = model.state_dict()
    if (
        getattr(model.config, "backbone_norm", None) != "bn"
        or getattr(model.config, "freeze_backbone_batch_norms", None) is False
    ):
        return dict(state)
    return {
        name: tensor for name, tensor in state.items() if not (".backbone." in name and name.endswith(".num_batches_tracked"))
    }


def backbone_body(model: Any, backbone_modules: Sequence[str]) -> Any:
    """The timm (or transformers) backbone inside the library's wrappers."""
    body = model.get_submodule(backbone_modules[0])
    while type(body).__module__.startswith("transformers."):
        inner = getattr(body, "model", None)
        inner = getattr(body, "_backbone", None) if inner is None else inner
        if inner is None:
            break
        body = inner
    return body


def refuse_lost_activations(body: nn.Module, backbone: str) -> None:
    """Refuse backbones whose norm layers include the activation: the library's frozen norms would drop it.

    Raises:
        ModelError: the backbone has such norms.
    """
    if any(isinstance(module, BatchNormAct2d) for module in probe(backbone, {}).modules()) and any(
        is_constant_norm(module) for module in body.modules()
    ):
        raise ModelError(
            f"backbone {backbone}: transformers would replace its norms and lose the activations in them; "
            "take a resnet, or rt_detr"
        )


def load_timm_weights(body: nn.Module, backbone: str, indices: Sequence[int], weights: bool | str = True) -> None:
    """Copy timm's pretrained weights into the backbone of a library model.

    Raises:
        ModelError: there are no pretrained weights, or they cannot be downloaded.
    """
    source = pretrained_features(backbone, indices, {}, weights)
    own = body.state_dict()
    body.load_state_dict({name: value for name, value in source.state_dict().items() if name in own})


def label_maps(classes: Sequence[str]) -> dict[str, Any]:
    """Arguments of a library config that set the class names."""
    return {"id2label": dict(enumerate(classes)), "label2id": {name: index for index, name in enumerate(classes)}}


def selection(options: DetrSelectionOptions) -> dict[str, Any]:
    """Arguments of ``TransformersDetector`` for the selection of detections."""
    return {"score": options.score, "dets": options.dets}


def statistics(backbone: str, options: BackboneOptions) -> dict[str, Any]:
    """Arguments of ``TransformersDetector`` for the normalisation of images."""
    mean, std = image_statistics(backbone, options)
    return {"mean": mean, "std": std}


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which the library prints no progress bars and no warnings."""
    verbosity, bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    hub_verbosity = hub_logging.get_verbosity()
    library_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        library_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            library_logging.enable_progress_bar()
