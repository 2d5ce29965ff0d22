"""No option of a model string is silently ignored: each detector either uses it or refuses it."""

import json

import pytest

from detdistill.detectors.adapters import adapter_names
from detdistill.detectors.build import build_detector
from detdistill.detectors.options import READERS
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
}
"""A value of each option that is neither its default nor that of the tiny models."""
DOWNLOADS = {"pretrained"}


def description(detector):
    """All that may differ between two detectors, without their weights and names."""
    model = detector.model
    plain = (int, float, str, tuple, type(None))
    visible = [{key: value for key, value in vars(part).items() if isinstance(value, plain)} for part in (detector, model)]
    config = model.config.to_dict() if hasattr(model, "config") else None
    spec = {key: value for key, value in vars(detector.spec).items() if key != "name"}
    return json.dumps([getattr(detector, "description", None), config, repr(model), spec, visible], default=str)


def test_every_option_is_tried():
    assert {*OTHER, *DOWNLOADS} == set(READERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in adapter_names() if has_tiny(name)])
def test_an_option_changes_the_detector_or_is_refused(name):
    tiny = tiny_name(name)
    own = description(build_detector(tiny, ("a", "b")))
    ignored = []
    for option, value in OTHER.items():
        replaced = {"width", "channels", "stem"} if option == "width" else {option}
        kept = [part for part in tiny.split(",") if part.partition("=")[0] not in replaced]
        try:
            changed = build_detector(",".join([*kept, f"{option}={value}"]), ("a", "b"))
        except ModelError:
            continue
        if description(changed) == own:
            ignored.append(option)
    assert ignored == []
