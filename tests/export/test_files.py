"""Every detector's file gives the detections of the detector, for other numbers and sizes of images than it was traced with."""

import sys

import pytest
import torch

from detdistill.detectors.adapters import adapter_names
from detdistill.detectors.probe import has_tiny, tiny_detector
from detdistill.errors import ModelError
from detdistill.export.about import About
from detdistill.export.file_detector import FileDetector
from detdistill.export.graphs import Graph, graph_of
from detdistill.export.probe import probe_export
from detdistill.export.proof import Difference, largest_difference
from detdistill.export.run import example
from detdistill.export.selection import Rule, rule_of
from detdistill.export.write import check_opset, write
from detdistill.structures import Batch, Target, View

pytest.importorskip("onnxruntime")
SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "torchscript": ".torchscript", "pt2": ".pt2"}


def batch(sizes, height, width):
    """Noise in the valid part of each image, zeros in the padding."""
    images = torch.zeros(len(sizes), 3, height, width)
    noise = torch.Generator().manual_seed(len(sizes))
    for image, (h, w) in zip(images, sizes, strict=True):
        image[:, :h, :w] = torch.rand(3, h, w, generator=noise)
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    views = tuple(View(size, size) for size in sizes)
    return Batch(images, torch.tensor(sizes), (empty,) * len(sizes), tuple(range(len(sizes))), views)


def lively(name):
    """A tiny detector whose class scores differ and lie above the thresholds."""
    detector = tiny_detector(name).eval()
    noise = torch.Generator().manual_seed(1)
    for key, parameter in detector.named_parameters():
        if parameter.dim() == 1 and ("cls_logits" in key or "class_embed" in key):
            parameter.data.add_(2 + 0.3 * torch.randn(parameter.shape, generator=noise))
        if parameter.dim() == 4 and "cls_logits" in key:
            parameter.data.mul_(30)
    if name in ("ultralytics", "libreyolo"):
        spread_outputs(detector, noise)
    if name in ("fcos", "retinanet"):  # torchvision's heads have an output for the background, which training holds down
        detector.model.head.classification_head.cls_logits.bias.data[0::3] = -9
    return detector


@torch.no_grad()
def spread_outputs(detector, noise):
    """Give the output layers of a YOLO weights with which boxes and scores differ from cell to cell."""
    given = batch(((128, 128),), 128, 128)
    tower, head = detector.tower(detector.features(given)), detector.head
    if hasattr(head, "cls_preds"):
        sides = ((head.cls_preds, tower.classification, -1.0), (head.obj_preds, tower.regression, 0.0))
        sides = (*sides, (head.reg_preds, tower.regression, 0.0))
    else:
        last_of = [[branch[-1] for branch in side] for side in (head.cv3, head.cv2)]
        sides = ((last_of[0], tower.classification, -1.0), (last_of[1], tower.regression, 0.0))
    for layers, maps, least in sides:
        for inner, last in zip(maps, layers, strict=True):
            scale = inner.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-12)
            last.weight.copy_(torch.randn(last.weight.shape, generator=noise) / scale / inner.shape[1] ** 0.5)
            last.bias.copy_(least - last(inner).mean(dim=(0, 2, 3)) + last.bias)


def written(detector, path, kind="onnx", inside=False):
    graph = graph_of(detector, inside)
    rule = Rule("inside") if "labels" in graph.outputs else rule_of(detector)
    opset = check_opset(graph, None)
    about = About(detector.spec, rule, 128, "letterbox", None, (128, 128), graph.free, graph.outputs, kind, opset)
    write(graph, about, example(about), path)
    return FileDetector(path)


@torch.no_grad()
def assert_same_detections(detector, file, given):
    wanted = detector.detect(detector.predict(detector.features(given), given), given)
    found = file.detect(file.predict(file.features(given), given), given)
    for first, second in zip(wanted, found, strict=True):
        assert len(first) > 0
        # Random weights give scores that are nearly equal, whose order and suppression rounding decides: a tenth may differ.
        same = (first.labels[:, None] == second.labels) & ((first.scores[:, None] - second.scores).abs() < 1e-4)
        same &= (first.boxes_xyxy[:, None] - second.boxes_xyxy).abs().amax(dim=-1) < 0.01
        assert same.any(dim=1).float().mean() >= 0.9
        assert same.any(dim=0).float().mean() >= 0.9


BATCHES = {"traced": ([(128, 128), (96, 128)], 128, 128), "more images": ([(90, 128), (128, 70), (128, 128)], 128, 128)}
OTHER_SIZE = ([(128, 60), (160, 64)], 160, 64)


@pytest.mark.parametrize("name", [name for name in adapter_names() if has_tiny(name) and name != "paa"])
def test_every_detector_as_onnx(name, tmp_path):
    detector = lively(name)
    file = written(detector, tmp_path / "model.onnx")
    for given in BATCHES.values():
        assert_same_detections(detector, file, batch(*given))
    if detector.spec.family == "dense" and name not in ("ssd", "ssdlite"):
        assert file.about.free == ("batch", "size")
        assert_same_detections(detector, file, batch(*OTHER_SIZE))
    else:
        assert file.about.free == (() if detector.spec.family == "regions" else ("batch",))
        with pytest.raises(ModelError, match="takes images of 128x128 pixels, but got 160x64; use --size 128"):
            file.predict(file.features(batch(*OTHER_SIZE)), batch(*OTHER_SIZE))


def test_score_voting_is_refused():
    with pytest.raises(ModelError, match=r"^paa:.*: it averages boxes after NMS \(score voting\)"):
        graph_of(tiny_detector("paa"))


@pytest.mark.parametrize("name", ["fcos", "atss", "mimicdet"])
def test_suppression_inside_the_file(name, tmp_path):
    detector = lively(name)
    file = written(detector, tmp_path / "model.onnx", inside=True)
    assert file.about.outputs == ("boxes", "scores", "labels")
    for given in (*BATCHES.values(), OTHER_SIZE):
        assert_same_detections(detector, file, batch(*given))


def test_nothing_found_inside_the_file(tmp_path):
    detector = lively("fcos")
    detector.model.head.classification_head.cls_logits.bias.data.fill_(-20)
    file = written(detector, tmp_path / "model.onnx", inside=True)
    given = batch(*OTHER_SIZE)
    assert [len(found) for found in file.detect(file.predict(file.features(given), given), given)] == [0, 0]


@pytest.mark.parametrize("name", ["ssd", "rt_detr"])
def test_suppression_inside_is_for_dense_heads(name):
    with pytest.raises(ModelError, match="leave out --nms"):
        graph_of(tiny_detector(name), inside=True)


@pytest.mark.parametrize("kind", ["torchscript", "openvino"])
@pytest.mark.parametrize("name", ["fcos", "rt_detr"])
def test_other_formats(kind, name, tmp_path):
    if kind == "openvino":
        pytest.importorskip("openvino")
    detector = lively(name)
    file = written(detector, tmp_path / f"model{SUFFIX[kind]}", kind)
    assert_same_detections(detector, file, batch(*BATCHES["more images"]))


@pytest.mark.slow
def test_pt2(tmp_path):
    detector = lively("rt_detr")
    file = written(detector, tmp_path / "model.pt2", "pt2")
    assert_same_detections(detector, file, batch(*BATCHES["more images"]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fcos", "any number and size of images"),
        ("rt_detr", "any number of images, fixed size"),
        ("faster_rcnn", "one image, fixed size"),
        ("paa", "no: it averages boxes after NMS (score voting), which no exported file does; export ATSS instead"),
    ],
)
def test_the_probe_says_what_may_vary(name, expected):
    detector = tiny_detector(name)
    assert probe_export(detector) == expected
    assert detector.training


def test_the_probe_finds_wrong_files_and_missing_packages(monkeypatch):
    from detdistill.export import probe

    detector = tiny_detector("fcos")
    monkeypatch.setattr(probe, "largest_difference", lambda *arguments: Difference(0.1, 0.0))
    assert probe_export(detector) == "no: boxes of the file differ by 0.1 pixels, scores by 0"
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert probe_export(detector) == "no: the package onnx is missing: pip install 'detdistill[export]'"


class ForgetsTheBatch(Graph):
    """A graph that writes the number of traced images into the file as a constant."""

    outputs = ("boxes", "scores")

    def forward(self, images, sizes):
        pooled = images.mean(dim=(2, 3))
        return torch.cat([pooled, pooled[:, :1]], dim=1).reshape(len(images), 1, 4), pooled[:, None]


def test_a_batch_size_that_became_a_constant_is_found(tmp_path):
    detector = tiny_detector("fcos").eval()
    graph = ForgetsTheBatch(detector)
    about = About(detector.spec, Rule("pair"), 64, "letterbox", None, (64, 64), ("batch",), graph.outputs, "onnx", 17)
    write(graph, about, example(about), tmp_path / "model.onnx")
    file = FileDetector(tmp_path / "model.onnx")
    assert largest_difference(graph, file, [batch([(64, 64)] * 2, 64, 64)]).scores < 1e-6
    with pytest.raises(ModelError, match=r"fails on images of shape 3x3x64x64"):
        largest_difference(graph, file, [batch([(64, 64)] * 3, 64, 64)])


def test_an_opset_that_is_too_old():
    with pytest.raises(ModelError, match=r"opset=17: reppoints.* needs an opset from 19 to 20"):
        check_opset(graph_of(tiny_detector("reppoints")), 17)
