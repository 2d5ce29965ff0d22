import pytest
import torch
from torch import nn
from torchvision.models.detection import retinanet_resnet50_fpn

from detdistill.detectors.backbones import pyramid_description, scale_channels
from detdistill.detectors.options import ModelOptions, parse_model
from detdistill.detectors.standalone import TimmPyramid, make
from detdistill.errors import ModelError


def pyramid(text, levels=(3, 7), top="conv"):
    model = parse_model(f"fcos:{text}")
    return make(pyramid_description(model.backbone, model.options, levels, top))


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
    assert pyramid("resnet18,width=0.25").channels == (32, 64, 128)
    assert [scale_channels(64, width) for width in (0.05, 0.5, 0.7)] == [8, 32, 48]


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
    pyramid_description("resnet10t", ModelOptions(), (3, 5))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet10x", r"unknown backbone 'resnet10x' \(did you mean 'resnet10t'\?\)"),
        ("mobilenetv3_small_050,width=0.5", "width needs a model of timm's resnet family"),
        ("resnet10t,channels=16-32", "channels= with four numbers"),
        ("resnet10t,channels=16-32-64-128,width=0.5", "either width= or channels="),
        ("resnet18,stem=16", "needs a deep stem"),
        ("resnet10t,width=0.5,pretrained=true", "its weights would not fit"),
        ("resnet10t,levels=6-7", "has maps of stride 2, 4, 8, 16, 32; levels=6-7 must begin at one of them"),
        ("vit_tiny_patch16_224,levels=3-5", "has maps of stride 16"),
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
