"""Backbone, feature pyramid and pixel statistics of a checkpoint as the description from which ours are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from detdistill.detectors.mmdet.shared.checkpoint import Checkpoint, numbers
from detdistill.detectors.mmdet.shared.options import MMDetOptions
from detdistill.errors import ModelError

Style = Literal["pytorch", "caffe"]
RGB = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
"""Mean and deviation, in 0..255, of the weights of torchvision."""
BGR = ([103.53, 116.28, 123.675], [1.0, 1.0, 1.0])
"""Mean and deviation of the weights for Caffe, blue first."""
RESNETS: dict[tuple[Any, ...], str] = {
    ("basic", 2, 2, 2, 2, 1): "resnet18",
    ("basic", 3, 4, 6, 3, 1): "resnet34",
    ("bottleneck", 3, 4, 6, 3, 1): "resnet50",
    ("bottleneck", 3, 4, 23, 3, 1): "resnet101",
    ("bottleneck", 3, 8, 36, 3, 1): "resnet152",
    ("bottleneck", 3, 4, 6, 3, 32): "resnext50_32x4d",
    ("bottleneck", 3, 4, 23, 3, 32): "resnext101_32x4d",
    ("bottleneck", 3, 4, 23, 3, 64): "resnext101_64x4d",
}
"""timm's name of a backbone by kind of block, blocks of each stage, and groups of the 3x3 convolutions."""
NAMES = (
    (r"backbone\.(.+)", r"backbone.body.\1"),
    (r"neck\.lateral_convs\.(\d+)\.conv\.(.+)", r"backbone.fpn.inner_blocks.\1.0.\2"),
    (r"neck\.lateral_convs\.(\d+)\.gn\.(.+)", r"backbone.fpn.inner_blocks.\1.1.\2"),
)
"""Names of backbone and pyramid in a checkpoint, and ours. Those of the pyramid's outputs depend on its levels."""


@dataclass(frozen=True)
class Body:
    """Backbone and pyramid."""

    backbone: str
    """timm's name."""
    description: dict[str, Any]
    """A call of ``TimmPyramid``."""
    names: tuple[tuple[str, str], ...]
    """Patterns of names of the checkpoint, and ours."""
    strides: tuple[int, ...]
    """Of all levels."""
    maps: int
    """Number of levels that are maps of the backbone."""
    mean: list[float]
    """Mean of the pixels, RGB in 0..1."""
    std: list[float]
    blue_first: bool
    """The weights read blue, green, red."""


def style_of(checkpoint: Checkpoint, options: MMDetOptions) -> Style:
    """Where the backbone subsamples, and which statistics its pixels have, if the configuration does not say that itself.

    Raises:
        ModelError: the file has no configuration, and no option says it.
    """
    if options.style is not None:
        return options.style
    if not checkpoint.model:
        raise ModelError(
            f"{checkpoint.path}: has no configuration inside, so it does not say how its backbone was trained; add style=pytorch "
            "(torchvision's weights, RGB) or style=caffe (Detectron's, BGR)"
        )
    return "caffe" if checkpoint.model.at("backbone").get("style", "pytorch") == "caffe" else "pytorch"


def statistics(checkpoint: Checkpoint, options: MMDetOptions) -> tuple[list[float], list[float], bool]:
    """Mean and deviation of the pixels (RGB in 0..1), and whether the weights read blue first.

    They are those of the options, else of ``data_preprocessor`` (version 3) or ``img_norm_cfg`` (version 2) of the
    configuration, else those of the style.

    Raises:
        ModelError: they are no three numbers, or unknown.
    """
    three, two = checkpoint.model.at("data_preprocessor"), checkpoint.config.at("img_norm_cfg")
    said = three if "mean" in three else two
    usual: tuple[Any, Any] = (None, None)
    if "mean" not in said and (options.mean is None or options.std is None):
        usual = BGR if style_of(checkpoint, options) == "caffe" else RGB
    flag = three.get("bgr_to_rgb", False) if said is three else said.get("to_rgb", True)
    blue_first = not flag if said else usual is BGR
    blue_first = options.bgr if options.bgr is not None else blue_first
    found = []
    for given, name, default in zip((options.mean, options.std), ("mean", "std"), usual, strict=True):
        values = list(given) if given is not None else said.get(name, default)
        if not isinstance(values, list) or len(values) != 3 or not all(isinstance(value, (int, float)) for value in values):
            raise ModelError(f"{checkpoint.path}: {name}={values} of its pixels are no three numbers; give {name}=R-G-B")
        found.append([value / 255 for value in (reversed(values) if blue_first else values)])
    return found[0], found[1], blue_first


def resnet_of(checkpoint: Checkpoint, options: MMDetOptions) -> tuple[str, dict[str, Any]]:
    """Timm's name of the backbone, and the arguments by which it is built.

    Raises:
        ModelError: it is no ResNet or ResNeXt, or of a form that timm does not build.
    """
    said = checkpoint.model.at("backbone")
    kind = said.get("type", "ResNet")
    if kind not in ("ResNet", "ResNeXt") or "backbone.layer1.0.conv1.weight" not in checkpoint.state:
        other = kind if kind not in ("ResNet", "ResNeXt") else "another network"
        raise ModelError(f"{checkpoint.path}: its backbone is {other}; ResNet and ResNeXt can be loaded")
    for name, usual in (("strides", [1, 2, 2, 2]), ("dilations", [1, 1, 1, 1]), ("num_stages", 4)):
        if said.get(name, usual) != usual:
            raise ModelError(f"{checkpoint.path}: its backbone has {name}={said.get(name)}; only {usual} can be loaded")
    if any(".conv2_offset." in name or ".conv_offset." in name for name in checkpoint.state if name.startswith("backbone.")):
        raise ModelError(f"{checkpoint.path}: its backbone has deformable convolutions, which cannot be loaded")
    if "backbone.conv1.weight" not in checkpoint.state or "backbone.bn1.running_mean" not in checkpoint.state:
        raise ModelError(f"{checkpoint.path}: its backbone has another stem or norm than a ResNet with BatchNorm")
    blocks = [checkpoint.count(f"backbone.layer{stage}.#.") for stage in (1, 2, 3, 4)]
    basic = "backbone.layer1.0.conv3.weight" not in checkpoint.state
    inner = checkpoint.shape("backbone.layer1.0.conv2.weight")
    groups = inner[0] // inner[1]
    backbone = RESNETS.get(("basic" if basic else "bottleneck", *blocks, groups))
    if backbone is None:
        raise ModelError(
            f"{checkpoint.path}: its backbone (blocks {blocks}, groups {groups}) is none of {', '.join(RESNETS.values())}"
        )
    arguments: dict[str, Any] = {}
    stem = checkpoint.shape("backbone.conv1.weight")[0]
    last = "conv2" if basic else "conv3"
    widths = [checkpoint.shape(f"backbone.layer{stage}.0.{last}.weight")[0] // (1 if basic else 4) for stage in (1, 2, 3, 4)]
    if widths != [64, 128, 256, 512]:
        arguments["channels"] = widths
    if stem != 64:
        arguments["plain_stem"] = stem
    if not basic and style_of(checkpoint, options) == "caffe":
        arguments["caffe"] = True
    return backbone, arguments


def frozen_norms(checkpoint: Checkpoint, options: MMDetOptions) -> Literal["bn", "frozen"]:
    """Whether BatchNorm is constant in training, as ``norm_eval`` of the configuration says (by default it is there)."""
    if options.norm is not None:
        return options.norm
    return "frozen" if checkpoint.model.at("backbone").get("norm_eval", True) else "bn"


def pyramid_of(checkpoint: Checkpoint, options: MMDetOptions, usual: Literal["linear", "conv", "input", "pool"]) -> Body:
    """Backbone and feature pyramid.

    Args:
        checkpoint: the checkpoint.
        options: of the model string.
        usual: how the released configurations of the detector make the levels above the backbone's, for files without one.

    Raises:
        ModelError: backbone or pyramid are of a kind that cannot be built.
    """
    backbone, arguments = resnet_of(checkpoint, options)
    said = checkpoint.model.at("neck")
    if said.get("type", "FPN") != "FPN" or "neck.lateral_convs.0.conv.weight" not in checkpoint.state:
        raise ModelError(f"{checkpoint.path}: its neck is {said.get('type', 'no FPN')}; FPN can be loaded")
    maps = checkpoint.count("neck.lateral_convs.#.")
    convolutions = sorted(numbers(checkpoint.state, "neck.fpn_convs.#."))
    first = 6 - maps
    above = len(convolutions) - maps
    top = _top(checkpoint, usual) if above else "pool"
    levels = int(said.get("num_outs", maps + (above or usual == "pool")))
    if (above and levels != maps + above) or (not above and levels > maps + 1):
        raise ModelError(
            f"{checkpoint.path}: its FPN has {levels} levels with {len(convolutions)} convolutions, which cannot be built"
        )
    added = list(range(6, first + levels))
    grouped = "neck.lateral_convs.0.gn.weight" in checkpoint.state
    names = list(NAMES)
    for number in convolutions:
        place = f"layer_blocks.{number}.0" if number < maps else f"extra_blocks.p{first + number}" + (".0" if grouped else "")
        names.append((rf"neck\.fpn_convs\.{number}\.conv\.(.+)", rf"backbone.fpn.{place}.\1"))
        names.append((rf"neck\.fpn_convs\.{number}\.gn\.(.+)", rf"backbone.fpn.{place[:-2]}.1.\1"))
    mean, std, blue_first = statistics(checkpoint, options)
    description = {
        "call": "TimmPyramid",
        "name": backbone,
        "indices": list(range(5 - maps, 5)),
        "out_channels": checkpoint.shape("neck.lateral_convs.0.conv.weight")[0],
        "extra": added,
        "top": top,
        "norm": frozen_norms(checkpoint, options),
        **({"neck_norm": "gn"} if grouped else {}),
        **arguments,
    }
    strides = tuple(2**level for level in range(first, first + levels))
    return Body(backbone, description, tuple(names), strides, maps, mean, std, blue_first)


def _top(checkpoint: Checkpoint, usual: str) -> str:
    """How the levels above the backbone's are made; see ``TimmPyramid``.

    Raises:
        ModelError: in a way that the pyramid cannot.
    """
    said = checkpoint.model.at("neck")
    if not said:
        return usual
    source, relu = said.get("add_extra_convs", False), bool(said.get("relu_before_extra_convs", False))
    if source is True:
        source = "on_input" if said.get("extra_convs_on_inputs", True) else "on_output"  # as MMDetection 2 reads it
    found = {("on_input", False): "input", ("on_output", False): "linear", ("on_output", True): "conv"}.get((source, relu))
    if found is None:
        raise ModelError(
            f"{checkpoint.path}: its FPN adds levels {source} with relu_before_extra_convs={relu}, which cannot be built"
        )
    return found
