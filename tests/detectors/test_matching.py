"""Anchors are matched without the matrix of all overlaps; the matches are equal to torchvision's."""

from dataclasses import replace

import pytest
import torch
from torchvision.models.detection._utils import Matcher, SSDMatcher
from torchvision.ops import box_iou

from detdistill.detectors.build import build_detector
from detdistill.detectors.probe import probe_batch
from detdistill.detectors.torchvision import matching
from detdistill.detectors.torchvision.matching import match_anchors
from detdistill.functional.grid_matching import grids, large_overlaps

TINY = "resnet10t,channels=8-16-32-64,stem=8,neck=32"
MATCHERS = {
    "retinanet": Matcher(0.5, 0.4, allow_low_quality_matches=True),
    "rpn": Matcher(0.7, 0.3, allow_low_quality_matches=True),
    "plain": Matcher(0.5, 0.5),
    "ssd": SSDMatcher(0.5),
}
SIZE = 256


@pytest.fixture(scope="module")
def dense_of():
    made = {}

    def prediction(name):
        if name not in made:
            detector = build_detector(f"{name}:{TINY.replace(',neck=32', '') if name == 'ssd' else TINY}", ["a", "b"]).eval()
            batch = probe_batch(size=SIZE)
            with torch.no_grad():
                made[name] = detector.predict(detector.features(batch), batch)
            made[name] = made[name] if name != "faster_rcnn" else made[name].first
        return made[name]

    return prediction


def boxes_of(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    low, high = {"all": (4.0, 250.0), "tiny": (0.5, 6.0), "whole pixels": (4.0, 120.0), "twins": (8.0, 64.0)}[kind]
    sides = low * (high / low) ** torch.rand(60, 2, generator=generator)
    corner = torch.rand(60, 2, generator=generator) * (SIZE - sides)
    boxes = torch.cat([corner, corner + sides], dim=1)
    if kind == "whole pixels":
        boxes = (boxes / 8).round() * 8 + torch.tensor([0.0, 0.0, 8.0, 8.0])
    return torch.cat([boxes[:30], boxes[:30]]) if kind == "twins" else boxes


@pytest.mark.parametrize("kind", ["all", "tiny", "whole pixels", "twins"])
@pytest.mark.parametrize("rule", MATCHERS)
@pytest.mark.parametrize("name", ["retinanet", "ssd", "faster_rcnn"])
def test_matches_are_equal_to_those_of_the_whole_matrix(name, rule, kind, dense_of, monkeypatch):
    monkeypatch.setattr(matching, "FEW_PAIRS", 0)
    dense, boxes = dense_of(name), boxes_of(kind)
    expected = MATCHERS[rule](box_iou(boxes, dense.priors_xyxy[0]))
    assert (expected >= 0).any() or (rule, kind) == ("plain", "tiny")
    assert torch.equal(match_anchors(MATCHERS[rule], boxes, dense, 0), expected)


def test_a_box_outside_all_anchors_is_left_to_torchvision(dense_of, monkeypatch):
    monkeypatch.setattr(matching, "FEW_PAIRS", 0)
    dense, boxes = dense_of("retinanet"), torch.cat([boxes_of("all"), torch.tensor([[9000.0, 9000, 9010, 9010]])])
    matcher = MATCHERS["retinanet"]
    assert large_overlaps(boxes, levels_of(dense), 0.4) is None
    assert torch.equal(match_anchors(matcher, boxes, dense, 0), matcher(box_iou(boxes, dense.priors_xyxy[0])))


def test_anchors_off_the_grid_are_left_to_torchvision(dense_of, monkeypatch):
    monkeypatch.setattr(matching, "FEW_PAIRS", 0)
    dense = dense_of("retinanet")
    priors = dense.priors_xyxy.clone()
    priors[:, 100] += 1
    moved, matcher, boxes = replace(dense, priors_xyxy=priors), MATCHERS["retinanet"], boxes_of("all")
    assert levels_of(moved) is None
    assert torch.equal(match_anchors(matcher, boxes, moved, 0), matcher(box_iou(boxes, priors[0])))


def levels_of(dense):
    return grids(dense.priors_xyxy[0], dense.levels, dense.cells, dense.anchors)
