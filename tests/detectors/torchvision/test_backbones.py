from dataclasses import dataclass

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import retinanet_resnet50_fpn

from detdistill.detectors.options import parse_model, read_options
from detdistill.detectors.student_files.load_student import TimmPyramid, make
from detdistill.detectors.torchvision.backbones import pyramid_description, scale_channels
from detdistill.detectors.torchvision.options import BackboneOptions, PyramidOptions
from detdistill.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class BothOptions(BackboneOptions, PyramidOptions):
    pass


def pyramid(text, levels=(3, 7), top="conv"):
    model = parse_model(f"any:{text}")
    options = read_options(BothOptions, model)
    chosen = options.levels if "levels" in model.given else levels
    return make(pyramid_description(model.backbone, options, chosen, options.neck, top))


def sizes(module, height=128, width=160):
    return [tuple(level.shape) for level in module.eval()(torch.zeros(1, 3, height, width)).values()]


def test_channels_and_stem_of_a_resnet():
    module = pyramid("resnet10t,channels=16-32-64-128,stem=16,neck=64,levels=3-5")
    assert module.channels == (32, 64, 128)
    assert module.reductions == (8, 16, 32)
    assert sizes(module) == [(1, 64, 16, 20), (1, 64, 8, 10), (1, 64, 4, 5)]
    assert module.body.conv1[-1].out_channels == 32  # timm's deep stem ends in twice stem_width


def test_width_scales_stages_and_deep_stems():
    half = pyramid("resnet10t,width=0.5,levels=2-5")
    assert half.channels == (32, 64, 128, 256)
    assert half.body.conv1[-1].out_channels == 32
    quarter = pyramid("resnet18,width=0.25")
    assert quarter.channels == (32, 64, 128)
    assert quarter.body.conv1.out_channels == 16
    assert quarter.body.layer1[0].downsample is None  # as at full width, where the stem's channels are the first stage's
    assert [scale_channels(64, width) for width in (0.05, 0.5, 0.7)] == [8, 32, 48]


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_quarter_width_resnet50_is_that_of_the_literature():
    """DICOD's student: every layer of ResNet-50 with a quarter of its channels (arXiv 2106.05209)."""
    module = pyramid("resnet50,width=0.25", levels=(2, 6), top="pool")
    body = module.body
    assert parameters(body) == 1_480_976
    assert (body.conv1.kernel_size, body.conv1.stride, body.conv1.out_channels) == ((7, 7), (2, 2), 16)
    assert (body.bn1.num_features, body.conv1.bias) == (16, None)
    stages = [body.layer1, body.layer2, body.layer3, body.layer4]
    assert [len(stage) for stage in stages] == [3, 4, 6, 3]
    assert [stage[0].conv1.in_channels for stage in stages] == [16, 64, 128, 256]
    assert [stage[0].conv2.out_channels for stage in stages] == [16, 32, 64, 128]
    assert [stage[1].conv2.stride for stage in stages] == [(1, 1)] * 4
    assert module.channels == (64, 128, 256, 512)
    assert sizes(module, 64, 96)[0] == (1, 256, 16, 24)
    # kaiming's deviation for 49 * 16 outgoing weights
    assert float(body.conv1.weight.detach().std()) == pytest.approx((2 / (49 * 16)) ** 0.5, rel=0.1)


def test_other_resnets_of_bottlenecks_scale_as_a_whole():
    for name in ("resnet26", "resnext50_32x4d"):
        whole, half = (pyramid(f"{name}{width},levels=2-5").body for width in ("", ",width=0.5"))
        assert half.conv1.out_channels == 32
        pairs = [(a.conv2, b.conv2) for a, b in ((whole.layer1[0], half.layer1[0]), (whole.layer4[0], half.layer4[0]))]
        assert all(2 * narrow.out_channels == wide.out_channels for wide, narrow in pairs)
        assert half.feature_info.channels() == [128, 256, 512, 1024]
    assert pyramid("resnet26,stem=24,levels=2-5").body.conv1.out_channels == 24


SEEDS = {
    "resnet18": (64, 128, 256, 512),
    "resnet50": (256, 512, 1024, 2048),
    "resnet101": (256, 512, 1024, 2048),
    "resnext101_32x4d": (256, 512, 1024, 2048),
    "mobilenetv2_100": (24, 32, 96, 320),
    "convnext_tiny": (96, 192, 384, 768),
    "convnext_small": (96, 192, 384, 768),
    "swin_tiny_patch4_window7_224": (96, 192, 384, 768),
    "swin_small_patch4_window7_224": (96, 192, 384, 768),
}
"""Backbones that papers train with, and the channels of their maps of stride 4 to 32."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
def test_backbones_of_papers_under_both_kinds_of_pyramid(name):
    """Two-stage (levels 2-6) and dense (3-7): the maps are timm's own, at a padded size that Swin's windows do not divide."""
    torch.manual_seed(0)
    images = torch.rand(1, 3, 96, 160)
    two_stage = pyramid(f"{name},neck=32", levels=(2, 6), top="pool").eval()
    assert two_stage.channels == SEEDS[name]
    assert two_stage.reductions == (4, 8, 16, 32)
    wanted = {"strict_img_size": False} if name.startswith("swin") else {}
    library = timm.create_model(name, features_only=True, out_indices=two_stage.body.feature_info.out_indices, **wanted).eval()
    library.load_state_dict(two_stage.body.state_dict())
    dense = pyramid(f"{name},neck=32").eval()
    dense.body.load_state_dict(two_stage.body.state_dict(), strict=False)  # it may lack what only the finest map needs
    with torch.no_grad():
        own, theirs = list(two_stage.maps(images).values()), library(images)
        for mine, level in zip(own, theirs, strict=True):
            assert torch.equal(mine, level.permute(0, 3, 1, 2) if two_stage.channels_last else level)
        for mine, level in zip(dense.maps(images).values(), own[1:], strict=True):
            assert torch.equal(mine, level)
    cells = [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3)]
    assert sizes(two_stage, 96, 160) == [(1, 32, *shape) for shape in cells]
    assert sizes(dense, 96, 160) == [(1, 32, *shape) for shape in [*cells[1:], (1, 2)]]


def test_levels_above_the_backbone_are_named_as_torchvisions():
    module = pyramid("resnet10t,width=0.25")
    own = {name for name, _ in module.fpn.named_parameters() if "extra" in name}
    library = retinanet_resnet50_fpn(weights=None, weights_backbone=None).backbone.fpn
    assert own == {name for name, _ in library.named_parameters() if "extra" in name}
    assert list(module.eval()(torch.zeros(1, 3, 128, 128))) == ["0", "1", "2", "p6", "p7"]
    assert len(sizes(pyramid("resnet10t,width=0.25,levels=4-8"))) == 5


def test_the_top_level_of_two_stage_detectors_is_subsampled():
    module = pyramid("resnet10t,width=0.25", levels=(2, 6), top="pool").eval()
    levels = module(torch.rand(1, 3, 128, 128))
    assert list(levels) == ["0", "1", "2", "3", "pool"]
    assert torch.equal(levels["pool"], levels["3"][:, :, ::2, ::2])
    with pytest.raises(ModelError, match="one level above 5 can be added"):
        pyramid("resnet10t,levels=2-7", top="pool")


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("mobilenetv3_small_050", (16, 24, 288)),
        ("swin_tiny_patch4_window7_224", (192, 384, 768)),  # maps come as [B, H, W, C]
        ("convnext_atto", (80, 160, 320)),
    ],
)
def test_other_families(name, channels):
    module = pyramid(f"{name},neck=32,levels=3-5").eval()
    maps = module.maps(torch.zeros(1, 3, 64, 96))
    assert module.channels == channels
    assert [tuple(level.shape[1:]) for level in maps.values()] == [
        (count, 64 // stride, 96 // stride) for count, stride in zip(channels, (8, 16, 32), strict=True)
    ]


def test_batchnorm_trains_unless_frozen():
    train = pyramid("resnet10t,width=0.25")
    assert sum(isinstance(module, nn.BatchNorm2d) for module in train.body.modules()) == 14
    before = train.body.conv1[1].running_mean.clone()
    train.train()(torch.rand(2, 3, 64, 64))
    assert not torch.equal(before, train.body.conv1[1].running_mean)
    frozen = pyramid("resnet10t,width=0.25,norm=frozen")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.body.modules())


def test_asking_a_backbone_draws_no_random_numbers():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    pyramid_description("resnet10t", BackboneOptions(), (3, 5), 256)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet10x", r"unknown backbone 'resnet10x' \(did you mean 'resnet10t'\?\)"),
        ("mobilenetv3_small_050,width=0.5", "width needs a model of timm's resnet family"),
        ("resnet10t,channels=16-32", "channels= with four numbers"),
        ("resnet10t,channels=16-32-64-128,width=0.5", "either width= or channels="),
        ("resnet18,stem=15", "stem=15 must be an even number of channels"),
        ("uniformer_small", "unknown backbone 'uniformer_small': UniFormer is neither in timm nor in transformers; take swin"),
        ("resnet10t,width=0.5,pretrained=true", "its weights would not fit"),
        ("resnet10t,levels=6-7", "has maps of stride 2, 4, 8, 16, 32; levels=6-7 must begin at one of these strides"),
    ],
)
def test_what_does_not_fit_is_said(text, message):
    with pytest.raises(ModelError, match=message):
        pyramid(text)


def test_a_pyramid_is_torchvisions_form():
    module = pyramid("resnet10t,width=0.25")
    assert isinstance(module, TimmPyramid)
    assert module.out_channels == 256
    assert {name.split(".")[0] for name in module.state_dict()} == {"body", "fpn"}
