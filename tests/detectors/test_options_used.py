"""No option of a model string is silently ignored: each detector uses its own options and refuses those of others."""

import functools
import json

import pytest
import torch

from detdistill.detectors.adapters import adapter, adapter_names, read_model
from detdistill.detectors.build import build_detector
from detdistill.detectors.options import option_types
from detdistill.detectors.probe import has_tiny, tiny_name
from detdistill.errors import ModelError

OTHER = {
    "neck": "64",
    "levels": "3-4",
    "width": "0.5",
    "channels": "8-16-16-32",
    "stem": "16",
    "convs": "1",
    "norm": "frozen",
    "score": "0.77",
    "topk": "77",
    "dets": "7",
    "proposals": "33",
    "rois": "12",
    "mlp": "24",
    "refined": "55",
    "mimic": "0.5",
    "size": "512",
    "anchors": "2",
    "dim": "64",
    "queries": "7",
    "encoder": "2",
    "decoder": "3",
    "heads": "2",
    "ffn": "48",
    "groups": "1",
    "points": "3",
    "denoising": "5",
    "refine": "true",
    "two_stage": "true",
    "headnorm": "none",
    "weights": "COCO_V1",
    "iou": "0.33",
    "nms": "false",
    "depth": "1.5",
    "box": "3",
    "cls": "3",
    "dfl": "3",
    "l1": "3",
    "distances": "exp",
    "centerness": "classes",
    "stride": "8",
}
"""A value of each option that is neither its default nor that of the tiny models."""
NEEDED = {"nms": "ultralytics:yolo26n,width=0.0625"}
"""Detectors that have what an option turns off, instead of the tiny one."""
DOWNLOADS = {"pretrained", "weights"}
"""Options that want the network; ``test_build`` and ``test_hf`` try them."""
OF_FILES = {"detector", "style", "mean", "std", "bgr", "names"}
"""Options that say what a checkpoint of MMDetection does not; ``mmdet/test_mmdet`` tries them."""
OF_BACKBONE = [(name, backbone) for name in adapter_names() for backbone in getattr(adapter(name), "OPTIONS_OF_BACKBONE", {})]


def own_options(name, backbone=None):
    """The options of an adapter, with a backbone that has options of its own or with any other."""
    module = adapter(name)
    return set(option_types(module.OPTIONS_OF_BACKBONE[backbone] if backbone else module.OPTIONS))


def description(detector):
    """All that may differ between two detectors, without their weights and names."""
    model = detector.model
    plain = (int, float, str, tuple, type(None))
    visible = [{key: value for key, value in vars(part).items() if isinstance(value, plain)} for part in (detector, model)]
    config = model.config.to_dict() if hasattr(getattr(model, "config", None), "to_dict") else None
    spec = {key: value for key, value in vars(detector.spec).items() if key != "name"}
    options = {key: value for key, value in vars(getattr(detector, "options", None) or detector.spec).items() if key != "name"}
    return json.dumps([getattr(detector, "description", None), config, repr(model), spec, options, visible], default=str)


@functools.cache
def description_of(small):
    """The description of a detector by its model string."""
    return description(build_detector(small, ("a", "b")))


def without_use(small, options):
    """Options that leave a detector as it is, one by one in the place of those that the small one has."""
    ignored = []
    for option in sorted(options - DOWNLOADS):
        small = NEEDED.get(option, small)
        replaced = {"width", "channels", "stem"} if option == "width" else {option}
        kept = [part for part in small.split(",") if part.partition("=")[0] not in replaced]
        own = description_of(small)
        if description(build_detector(",".join([*kept, f"{option}={OTHER[option]}"]), ("a", "b"))) == own:
            ignored.append(option)
    return ignored


@pytest.fixture
def without_drawing_weights(monkeypatch):
    """Weights are not compared, and drawing them takes most of the time of building a detector."""
    for name in ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)


def test_every_option_is_tried():
    known = {option for name in adapter_names() for option in own_options(name)}
    known |= {option for name, backbone in OF_BACKBONE for option in own_options(name, backbone)}
    assert {*OTHER, *DOWNLOADS, *OF_FILES} == known


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in adapter_names() if has_tiny(name)])
def test_an_option_changes_the_detector(name, without_drawing_weights):
    assert without_use(tiny_name(name), own_options(name)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backbone"), OF_BACKBONE)
def test_an_option_changes_the_detector_with_a_backbone_that_has_its_own(name, backbone, without_drawing_weights):
    assert without_use(f"{name}:{backbone}", own_options(name, backbone)) == []


@pytest.mark.parametrize(("name", "backbone"), [*((name, None) for name in adapter_names() if name != "hf"), *OF_BACKBONE])
def test_options_of_others_are_refused(name, backbone):
    text, own = f"{name}:{backbone or 'resnet10t'}", own_options(name, backbone)
    for option, value in {**OTHER, "pretrained": "true"}.items():
        if option in own:
            read_model(f"{text},{option}={value}")
            continue
        with pytest.raises(ModelError, match=rf"^{name}[\w:]* has no option '{option}'.*; it has: [^\n]+$"):
            read_model(f"{text},{option}={value}")
