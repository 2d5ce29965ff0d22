"""Builds a detector from the plain description stored beside it. Needs torch, torchvision, timm and safetensors only.

This file is copied as ``load_student.py`` into every exported folder, so it imports nothing of the library that made it:

    from load_student import load
    model = load("path/to/student")            # a torchvision detector in eval mode
    model([image])                             # image: [3, H, W] RGB, uint8 or 0..1, of any size; boxes in its pixels

A description is a tree of calls, ``{"call": "torchvision.models.detection.FCOS", "num_classes": 11, ...}``: a dotted name
of torchvision, a class of the folder ``models`` beside this file (``models.atss.ATSS``; copied along when it is needed), or
a function of this file, with its keyword arguments, which may be calls themselves.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import warnings
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from timm.layers import LayerNorm2d
from timm.models import FeatureInfo
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD, SSDFeatureExtractorVGG
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool
from torchvision.transforms.v2.functional import resize as resize_pixels


def load(folder: str | Path, resize: bool = True) -> nn.Module:
    """Load the detector of an exported folder (``model.json``, ``model.safetensors``), in eval mode.

    ``model.classes`` are the names of its labels: label ``i`` of torchvision (0 is the background) is ``classes[i]``.
    ``model.images`` is how images are resized for it (``size``, ``resize``, ``max_size``); None: the folder does not say.

    Args:
        folder: the folder.
        resize: the model resizes and pads images as the evaluation of its training did, and returns boxes in pixels of the
            given images. False: it takes images as they are. A folder that does not say the size also gives a model that
            takes images as they are, with a warning.
    """
    folder = Path(folder)
    check(folder)
    description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    model = build(description["model"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.classes, model.images = description["labels"], description.get("images")
    if resize and model.images is None:
        warnings.warn(f"{folder} does not say its image size: give images resized as in training", stacklevel=2)
    elif resize:
        model.transform = Resized(model.transform, **model.images)
    return model.eval()


def check(folder: Path) -> None:
    """Compare the files with ``checksums.json``, if it is there.

    Raises:
        ValueError: a file is damaged, or was changed after it was saved.
    """
    path = folder / "checksums.json"
    for name, wanted in (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}).items():
        content = (folder / name).read_bytes()
        if f"{len(content)} {zlib.crc32(content):08x}" != wanted:
            raise ValueError(f"{folder / name} differs from its checksum in {path.name}; copy the folder again")


def build(tree: Mapping[str, Any]) -> Any:
    """Build a freshly initialised detector from its description; images keep their size (see ``KeepSize``)."""
    model = make(tree)
    transform = getattr(model, "transform", None)
    if isinstance(transform, GeneralizedRCNNTransform) and transform.fixed_size is None:
        model.transform = KeepSize(model.transform)
    return model


def make(node: Any) -> Any:
    """Build the object that a description stands for: calls are made from the inside out; lists and numbers stay.

    Raises:
        ValueError: a call names neither a part of torchvision nor a function of this file.
    """
    if isinstance(node, Mapping):
        arguments = {key: make(value) for key, value in node.items() if key != "call"}
        if "call" not in node:
            return arguments
        return find(node["call"])(**arguments)
    if isinstance(node, (list, tuple)):
        return tuple(make(item) for item in node)
    return node


def find(name: str) -> Any:
    """The class or function that a call names.

    Raises:
        ValueError: it names neither a part of torchvision, nor a class of ``models``, nor a function of this file.
    """
    module, _, attribute = name.rpartition(".")
    if not module:
        if name not in CALLS:
            raise ValueError(f"{name!r} is unknown here; known: {', '.join(CALLS)}")
        return CALLS[name]
    package = module.split(".")[0]
    if package not in ("torchvision", "models"):
        raise ValueError(f"{name!r} is no part of torchvision or models; refusing to call it")
    return getattr(beside(module) if package == "models" else importlib.import_module(module), attribute)


def beside(module: str) -> ModuleType:
    """``models.<file>`` next to this file: a part of the library, or the copy in a student's folder."""
    if __package__:
        return importlib.import_module(f".{module}", __package__)
    folder = Path(__file__).resolve().parent / "models"
    # each student's folder under a name of its own: two of them in one process may hold different versions
    name = f"student_models_{zlib.crc32(str(folder).encode()):08x}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(name + module.removeprefix("models"))


class KeepSize(GeneralizedRCNNTransform):
    """torchvision's transform without its resizing: the detector gets the pixels as they are, as in training."""

    def __init__(self, original: GeneralizedRCNNTransform) -> None:
        super().__init__(original.min_size, original.max_size, original.image_mean, original.image_std, original.size_divisible)

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Return image and target unchanged."""
        return image, target


class Resized(nn.Module):
    """torchvision's transform behind the resizing of evaluation: 8-bit pixels, bilinear with antialiasing, then padding.

    - ``letterbox``: the long side becomes ``size``; padded right and bottom to a square.
    - ``stretch``: both sides become ``size``.
    - ``short_side``: the short side becomes ``size``, unless the long side would become more than ``max_size``.

    Padded sides are multiples of 32. Boxes (and masks) come back in pixels of the given images. It can be scripted.
    """

    def __init__(self, plain: GeneralizedRCNNTransform, size: int, resize: str, max_size: int | None = None) -> None:
        """Resize before ``plain``, which then only normalises and stacks the images."""
        super().__init__()
        if resize not in ("letterbox", "stretch", "short_side"):
            raise ValueError(f"resize {resize!r} is unknown; known: letterbox, stretch, short_side")
        self.plain = KeepSize(plain)
        self.size, self.policy, self.longest = int(size), resize, int(max_size or 0)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        """Resize, normalise and stack images [3, H, W] (uint8, or float in 0..1) of any sizes; targets are resized too."""
        shown: list[Tensor] = []
        for image in images:
            shown.append(self.resized(image))
        if targets is not None:
            moved: list[dict[str, Tensor]] = []
            for index in range(len(targets)):
                moved.append(self.moved(targets[index], images[index], shown[index]))
            targets = moved
        batch, targets = self.plain(shown, targets)
        side = self.size if self.policy == "letterbox" else 0
        height, width = batch.tensors.shape[-2], batch.tensors.shape[-1]
        high, wide = self.padded(max(height, side)), self.padded(max(width, side))
        return ImageList(F.pad(batch.tensors, [0, wide - width, 0, high - height]), batch.image_sizes), targets

    def padded(self, side: int) -> int:
        """The next multiple of 32, then of the model's own ``size_divisible``."""
        side = (side + 31) // 32 * 32
        step = int(self.plain.size_divisible)
        return (side + step - 1) // step * step

    def resized_hw(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image after resizing, before padding."""
        if self.policy == "stretch":
            return self.size, self.size
        if self.policy == "letterbox":
            scale = self.size / max(height, width)
        else:
            scale = self.size / min(height, width)
            if self.longest > 0:
                scale = min(scale, self.longest / max(height, width))
        return max(1, int(round(height * scale))), max(1, int(round(width * scale)))  # noqa: RUF046 - TorchScript's is a float

    def resized(self, image: Tensor) -> Tensor:
        """The image [3, h, w] in 0..1. Pixels are rounded to 8 bits before and after resizing, as those of image files."""
        size = self.resized_hw(image.shape[-2], image.shape[-1])
        dtype = image.dtype if image.is_floating_point() else torch.float32
        if (image.shape[-2], image.shape[-1]) != size:
            if image.is_floating_point():
                image = (image * 255).round().clamp(0, 255).to(torch.uint8)
            image = resize_pixels(image, [size[0], size[1]], antialias=True)
        return image if image.is_floating_point() else image.to(dtype) / 255

    def moved(self, target: dict[str, Tensor], image: Tensor, shown: Tensor) -> dict[str, Tensor]:
        """The target of an image in pixels of the resized image."""
        result: dict[str, Tensor] = {}
        for key, value in target.items():
            result[key] = value  # noqa: PERF403 - TorchScript has no comprehension over a dictionary
        before, after = [image.shape[-2], image.shape[-1]], [shown.shape[-2], shown.shape[-1]]
        if before != after:
            result["boxes"] = resize_boxes(target["boxes"], before, after)
            if "masks" in target:
                result["masks"] = F.interpolate(target["masks"][:, None].float(), size=after)[:, 0].to(target["masks"].dtype)
        return result

    def postprocess(
        self, result: list[dict[str, Tensor]], image_shapes: list[tuple[int, int]], original_image_sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Detections in pixels of the given images."""
        return self.plain.postprocess(result, image_shapes, original_image_sizes)


def timm_features(
    name: str, plain_stem: int | None = None, patch: int | None = None, caffe: bool = False, **timm_options: Any
) -> Any:
    """A timm model as features, with random weights.

    Args:
        name: of the timm model.
        plain_stem: channels of a resnet's stem of one 7x7 convolution, which timm itself holds at 64; even.
        patch: side in pixels of a ViT's patches: its single map becomes a pyramid, see ``SimplePyramid``.
        caffe: a resnet of bottlenecks that subsamples in the first convolution of a stage, as He et al. (CVPR 2016) and their
            weights for Caffe do; else in its second.
        timm_options: for ``timm.create_model``.
    """
    if patch is not None:
        return SimplePyramid(name, patch, **timm_options)
    if caffe:
        resnet = timm_features(name, plain_stem, **timm_options)
        for stage in ("layer2", "layer3", "layer4"):
            if hasattr(resnet, stage):
                first = getattr(resnet, stage)[0]
                first.conv1.stride, first.conv2.stride = first.conv2.stride, (1, 1)
        return resnet
    if plain_stem is None:
        return timm.create_model(name, features_only=True, pretrained=False, **timm_options)
    # A deep stem may have any width: with one, timm gives all that follows the right one. Then the plain stem takes its place.
    deep: dict[str, Any] = {"stem_type": "deep", "stem_width": plain_stem // 2}
    body: Any = timm.create_model(name, features_only=True, pretrained=False, **deep, **timm_options)
    body.conv1 = nn.Conv2d(3, plain_stem, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(body.conv1.weight, mode="fan_out", nonlinearity="relu")
    return body


class SimplePyramid(nn.Module):
    """A plain ViT of timm as a backbone with four maps, made from its last one by up- and downsampling.

    Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022, section 3: the map of stride 16
    becomes strides 4 (two transposed convolutions), 8 (one), 16 (as it is) and 32 (max-pooling). A patch of 14 pixels counts as
    stride 16: images are shown to the network at 14/16 of their size.
    """

    output_fmt = "NCHW"

    def __init__(self, name: str, patch: int, out_indices: Sequence[int] | None = None, **timm_options: Any) -> None:
        """Build with random weights.

        Args:
            name: of the timm model.
            patch: side of its patches in pixels.
            out_indices: which of the four maps are returned; None: all.
            timm_options: for ``timm.create_model``.
        """
        super().__init__()
        vit: Any = timm.create_model(name, features_only=True, pretrained=False, out_indices=(-1,), **timm_options)
        self.vit = vit
        self.patch, self.stride = patch, 1 << round(math.log2(patch))
        width = vit.feature_info.channels()[-1]
        channels = (width // 4, width // 2, width, width)
        self.out_indices = tuple(range(4)) if out_indices is None else tuple(out_indices)
        blocks = (
            lambda: nn.Sequential(
                nn.ConvTranspose2d(width, width // 2, 2, stride=2),
                LayerNorm2d(width // 2),
                nn.GELU(),
                nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
            ),
            lambda: nn.ConvTranspose2d(width, width // 2, 2, stride=2),
            nn.Identity,
            lambda: nn.MaxPool2d(2),
        )
        self.levels = nn.ModuleList(blocks[index]() for index in self.out_indices)
        strides = [self.stride * 2**index // 4 for index in range(4)]
        about = [{"module": f"levels.{index}", "num_chs": channels[index], "reduction": strides[index]} for index in range(4)]
        self.feature_info = FeatureInfo(about, self.out_indices)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The maps [B, C_l, H_l, W_l], finest first."""
        rows, columns = (-(-side // self.stride) for side in images.shape[-2:])
        below, right = rows * self.stride - images.shape[-2], columns * self.stride - images.shape[-1]
        if below or right:
            images = F.pad(images, [0, right, 0, below])
        if self.patch != self.stride:
            size = [rows * self.patch, columns * self.patch]
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=self.patch < self.stride)
        last = self.vit(images)[-1]
        return [level(last) for level in self.levels]


def by_level(maps: list[Tensor]) -> dict[str, Tensor]:
    """Maps by the number of their level as text, finest first. A loop, because TorchScript has no such comprehension."""
    levels: dict[str, Tensor] = {}
    for index, level in enumerate(maps):
        levels[str(index)] = level
    return levels


class TimmPyramid(nn.Module):
    """A timm backbone (``body``) under torchvision's feature pyramid (``fpn``)."""

    def __init__(
        self,
        name: str,
        indices: Sequence[int],
        out_channels: int,
        extra: Sequence[int] = (),
        top: Literal["conv", "linear", "input", "pool"] = "conv",
        norm: Literal["bn", "frozen"] = "bn",
        below: int = 0,
        neck_norm: Literal["none", "gn"] = "none",
        **timm_options: Any,
    ) -> None:
        """Build with random weights.

        Args:
            name: of the timm model.
            indices: which of its maps are computed (timm's ``out_indices``); all but ``below`` of them enter the pyramid.
            out_channels: of every level.
            extra: numbers of the levels above the backbone's deepest, e.g. (6, 7) for P6 and P7.
            top: how they are made: stride-2 convolutions from the pyramid's highest level with a ReLU between them (``conv``)
                or without (``linear``), the same without ReLU from the backbone's deepest map (``input``), or torchvision's
                subsampling (``pool``: one level, without weights).
            norm: ``frozen`` turns the backbone's BatchNorm into constants.
            below: number of the finest of these maps that do not enter the pyramid (a detector's training reads them).
            neck_norm: ``gn`` puts GroupNorm behind every convolution of the pyramid, in place of its bias.
            timm_options: for ``timm_features``.
        """
        super().__init__()
        body = timm_features(name, out_indices=tuple(indices), **timm_options)
        self.body = freeze_batch_norm_2d(body) if norm == "frozen" else body
        self.below = below
        self.channels = tuple(body.feature_info.channels())
        self.reductions = tuple(body.feature_info.reduction())
        self.channels_last = str(getattr(body, "output_fmt", None)).upper().endswith("NHWC")
        blocks = None
        if extra:
            deepest = self.channels[-1] if top == "input" else None
            blocks = (
                LastLevelMaxPool() if top == "pool" else StridedLevels(out_channels, extra, deepest, top == "conv", neck_norm)
            )
        groups = group_norm if neck_norm == "gn" else None
        self.fpn = FeaturePyramidNetwork(list(self.channels[below:]), out_channels, extra_blocks=blocks, norm_layer=groups)
        self.out_channels = out_channels

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """The backbone's maps [B, C_l, H_l, W_l], finest first, also those below the pyramid."""
        return by_level(self.levels(images))

    def levels(self, images: Tensor) -> list[Tensor]:
        """The same as a list."""
        maps = self.body(images)
        if self.channels_last:  # swin and its relatives: [B, H, W, C]
            maps = [level.permute(0, 3, 1, 2).contiguous() for level in maps]
        return maps

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Levels [B, out_channels, H_l, W_l], finest first."""
        return self.fpn(by_level(self.levels(images)[self.below :]))


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, or of the greatest common divisor of 32 and the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


class StridedLevels(ExtraFPNBlock):
    """Any number of levels by stride-2 convolutions above the highest one (two: torchvision's ``LastLevelP6P7``)."""

    def __init__(
        self,
        channels: int,
        levels: Sequence[int],
        below: int | None = None,
        relu: bool = True,
        norm: Literal["none", "gn"] = "none",
    ) -> None:
        """Build with random weights.

        Args:
            channels: of the pyramid.
            levels: numbers of the levels to add.
            below: channels of the backbone's deepest map, if the first level is made from that; None: from the pyramid's.
            relu: a ReLU between two added levels.
            norm: ``gn`` puts GroupNorm behind each convolution, in place of its bias.
        """
        super().__init__()
        self.names = [f"p{level}" for level in levels]
        self.on_input = below is not None
        self.relu = relu
        for index, name in enumerate(self.names):
            wide = below if below is not None and index == 0 else channels
            convolution = nn.Conv2d(wide, channels, 3, 2, 1, bias=norm == "none")
            nn.init.kaiming_uniform_(convolution.weight, a=1)
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)
            self.add_module(name, convolution if norm == "none" else nn.Sequential(convolution, group_norm(channels)))

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Add the levels, each from the one below."""
        below = x[-1] if self.on_input else results[-1]
        for level in self.children():  # a form that torch.jit.script understands
            results.append(level(below))
            below = F.relu(results[-1]) if self.relu else results[-1]
        return results, names + self.names


class TimmLevels(nn.Module):
    """A timm backbone (``body``) and stride-2 blocks above it (``extra``): the maps that an SSD reads."""

    def __init__(
        self,
        name: str,
        indices: Sequence[int],
        out_channels: int,
        extra: Sequence[int] = (),
        norm: Literal["bn", "frozen"] = "bn",
        **timm_options: Any,
    ) -> None:
        """Build with random weights.

        Args:
            name: of the timm model.
            indices: which of its maps the head reads (timm's ``out_indices``).
            out_channels: of every added level.
            extra: numbers of the levels above the backbone's deepest, e.g. (6, 7, 8).
            norm: ``frozen`` turns the backbone's BatchNorm into constants.
            timm_options: for ``timm_features``.
        """
        super().__init__()
        body = timm_features(name, out_indices=tuple(indices), **timm_options)
        self.body = freeze_batch_norm_2d(body) if norm == "frozen" else body
        self.channels_last = str(getattr(body, "output_fmt", None)).upper().endswith("NHWC")
        channels = list(body.feature_info.channels())
        self.strides = (*body.feature_info.reduction(), *(2**level for level in extra))
        below = [channels[-1], *[out_channels] * len(extra)]
        self.extra = nn.ModuleList(self.block(width, out_channels) for width in below[: len(extra)])
        self.out_channels = channels + [out_channels] * len(extra)

    @staticmethod
    def block(below: int, channels: int) -> nn.Module:
        """An added level as in SSD: 1x1 to half the channels, then 3x3 of stride 2."""
        convolutions = nn.Conv2d(below, channels // 2, 1), nn.Conv2d(channels // 2, channels, 3, 2, 1)
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(cast(Tensor, convolution.bias))
        return nn.Sequential(convolutions[0], nn.ReLU(inplace=True), convolutions[1], nn.ReLU(inplace=True))

    def maps(self, images: Tensor) -> list[Tensor]:
        """The backbone's maps [B, C_l, H_l, W_l], finest first."""
        maps = self.body(images)
        if self.channels_last:  # swin and its relatives: [B, H, W, C]
            maps = [level.permute(0, 3, 1, 2).contiguous() for level in maps]
        return list(maps)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The backbone's maps and the added levels, finest first."""
        maps = self.maps(images)
        for block in self.extra:
            maps.append(block(maps[-1]))
        return by_level(maps)


class TimmLiteLevels(TimmLevels):
    """The same with SSDLite's depthwise blocks."""

    @staticmethod
    def block(below: int, channels: int) -> nn.Module:
        """An added level as in SSDLite: 1x1 to half the channels, depthwise 3x3 of stride 2, 1x1."""
        half = channels // 2
        layer = partial(Conv2dNormActivation, norm_layer=lite_norm, activation_layer=nn.ReLU6)
        block = nn.Sequential(
            layer(below, half, kernel_size=1),
            layer(half, half, kernel_size=3, stride=2, groups=half),
            layer(half, channels, kernel_size=1),
        )
        for part in block.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, mean=0.0, std=0.03)
        return block


lite_norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
"""BatchNorm as in torchvision's SSDLite."""


def single_shot(
    backbone: TimmLevels, anchor_generator: DefaultBoxGenerator, num_classes: int, lite: bool = False, **settings: Any
) -> SSD:
    """An SSD of torchvision with its own head or SSDLite's, on images that keep their size."""
    head = None
    if lite:
        boxes = anchor_generator.num_anchors_per_location()
        head = SSDLiteHead(backbone.out_channels, boxes, num_classes, lite_norm)
    model = SSD(backbone, anchor_generator, (300, 300), num_classes, head=head, **settings)
    model.transform = KeepSize(model.transform)  # whatever SSD was told about a size
    return model


def ssd512_vgg16(num_classes: int, **settings: Any) -> SSD:
    """SSD512 on VGG-16, with random weights: torchvision's parts, the paper's strides and default boxes.

    Grids of 64, 32, 16, 8, 4, 2 and 1 cells (Liu et al., ECCV 2016, section 3.1, and the authors' configuration for COCO).
    torchvision's extractor leaves out two of the strides at high resolution, which would end in grids of 6, 4 and 1.
    """
    backbone: Any = SSDFeatureExtractorVGG(torchvision.models.vgg16(weights=None).features, highres=True)
    for block in backbone.extra[3:5]:
        block[2].stride, block[2].padding = (2, 2), (1, 1)
    backbone.extra[5][2].padding = (1, 1)
    backbone.out_channels = [512, 1024, 512, 256, 256, 256, 256]
    boxes = DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2, 3], [2], [2]],
        scales=[0.04, 0.1, 0.26, 0.42, 0.58, 0.74, 0.9, 1.06],
        steps=[8, 16, 32, 64, 128, 256, 512],
    )
    # The statistics of VGG's own weights, as in torchvision's SSD300.
    normalization = {"image_mean": [0.48235, 0.45882, 0.40784], "image_std": [1.0 / 255.0] * 3}
    return SSD(backbone, boxes, (512, 512), num_classes, **{**normalization, **settings})


def retinanet_head(in_channels: int, num_anchors: int, num_classes: int, num_convs: int = 4) -> RetinaNetHead:
    """The RetinaNet head of torchvision, cut down to its first ``num_convs`` blocks on both sides."""
    head = RetinaNetHead(in_channels, num_anchors, num_classes)
    for side in (head.classification_head, head.regression_head):
        side.conv = side.conv[:num_convs]
    return head


def torchvision_model(name: str, num_classes: int, frozen_eps: float | None = None) -> nn.Module:
    """A detector of torchvision by name, with random weights.

    Args:
        name: as ``torchvision.models.get_model`` knows it.
        num_classes: outputs, the background among them.
        frozen_eps: constant BatchNorm with this epsilon, as most pretrained weights want it; None: BatchNorm trains.
    """
    model: nn.Module = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=num_classes)
    if frozen_eps is not None:
        freeze_norms(model, frozen_eps)
    return model


def freeze_norms(module: nn.Module, eps: float) -> None:
    """Turn every BatchNorm2d below a module into torchvision's constant one, as ``norm_layer=FrozenBatchNorm2d`` does."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features, eps=eps))
        else:
            freeze_norms(child, eps)


CALLS = {
    "TimmPyramid": TimmPyramid,
    "retinanet_head": retinanet_head,
    "torchvision_model": torchvision_model,
    "TimmLevels": TimmLevels,
    "TimmLiteLevels": TimmLiteLevels,
    "single_shot": single_shot,
    "ssd512_vgg16": ssd512_vgg16,
}
"""What a description may call beside torchvision."""


if __name__ == "__main__":
    student: Any = load(Path(__file__).parent)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    print(f"{type(student).__name__}, {parameters:,} parameters, labels: {', '.join(map(str, student.classes))}")
    print(f"images: {student.images or 'size unknown'}")
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}")
