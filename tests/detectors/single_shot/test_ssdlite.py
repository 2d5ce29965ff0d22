import pytest
import torch
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from detdistill.detectors.adapters import wrap_torchvision
from detdistill.detectors.build import build_detector
from detdistill.detectors.load import load_detector
from detdistill.detectors.save import save_student
from detdistill.detectors.single_shot import ssdlite
from detdistill.errors import ModelError
from detdistill.structures import Features
from tests.detectors.single_shot.shared import (
    assert_same_detections,
    assert_same_training,
    detections_of_the_export,
    make_batch,
)

TINY = ssdlite.SSDLiteOptions(channels=(8, 16, 16, 24), stem=8, neck=16, levels=(3, 6), score=0.3, name="ssdlite:tiny")
CLASSES = ("a", "b")
BOXES = [[[10.0, 12.0, 60.0, 50.0, 1.0], [70.0, 8.0, 110.0, 90.0, 0.0]], [[30.0, 40.0, 44.0, 60.0, 1.0]]]


def tiny(seed=0):
    torch.manual_seed(seed)
    return ssdlite.build("resnet10t", CLASSES, TINY)


@pytest.mark.parametrize(
    ("sizes", "boxes", "size_hw"),
    [([(128, 96), (112, 128)], BOXES, (128, 128)), ([(96, 144), (96, 144)], [[], BOXES[1]], (96, 144))],
    ids=["mixed sizes", "one image without boxes"],
)
def test_training_and_detections_equal_the_library(sizes, boxes, size_hw):
    detector, batch = tiny(), make_batch(sizes, boxes, size_hw)
    assert (detector.spec.strides, detector.spec.softmax) == ((8, 16, 32, 64), True)
    assert detector.features(batch).channels == detector.spec.channels == (16, 16, 24, 16)
    assert_same_training(detector, batch)
    assert_same_detections(detector, batch)


def test_mobilenet_equals_the_library_and_its_parts_make_the_whole():
    torch.manual_seed(0)
    detector = ssdlite.build("mobilenet_v3_large", CLASSES, ssdlite.SSDLiteSelectionOptions(score=0.3))
    spec = detector.spec
    assert (spec.fixed_size_hw, spec.name) == ((320, 320), "ssdlite:mobilenet_v3_large")
    assert spec.strides == (16, 32, 64, 107, 160, 320)
    assert spec.channels == (672, 480, 512, 256, 256, 128)
    assert (spec.mean, spec.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    batch = make_batch([(320, 320)] * 2, BOXES, (320, 320))
    assert_same_training(detector, batch)
    assert_same_detections(detector, batch)
    with torch.no_grad():
        made = detector.copy_neck().eval()(detector.backbone_features(batch))
        for mine, theirs in zip(made.maps, detector.features(batch).maps, strict=True):
            assert torch.equal(mine, theirs)


def test_a_model_of_the_library_finds_its_adapter():
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    detector = wrap_torchvision(model, CLASSES, "torchvision:ssdlite320_mobilenet_v3_large")
    assert detector.model is model
    assert detector.spec.fixed_size_hw == (320, 320)


def test_smaller_images_are_worked_at_their_own_size():
    detector = ssdlite.build("mobilenet_v3_large", CLASSES, ssdlite.SSDLiteSelectionOptions()).eval()
    batch = make_batch([(128, 192)], [[]], (128, 192))
    with torch.no_grad():
        prediction = detector(batch).prediction
    first = prediction.priors_xyxy[0, prediction.levels == 0]
    # 8 x 12 cells; the first box of the first one is a fifth of the image around (8, 8).
    assert len(first) == 8 * 12 * 6
    torch.testing.assert_close(first[0], torch.tensor([8 - 19.2, 8 - 12.8, 8 + 19.2, 8 + 12.8]))


def test_class_rows_are_those_of_the_output_layers():
    detector = tiny()
    prefix = "model.head.classification_head.module_list.1."
    # Six boxes of a cell, three outputs each, the background first.
    assert detector.class_rows(f"{prefix}1.bias").tolist() == [[1, 4, 7, 10, 13, 16], [2, 5, 8, 11, 14, 17]]
    assert detector.class_rows(f"{prefix}0.0.weight") is None
    assert detector.class_rows("model.head.regression_head.module_list.1.1.bias") is None


def test_fresh_copies_are_drawn_as_torchvision_draws_them():
    detector = tiny()
    batch = make_batch([(128, 128)], [BOXES[0]], (128, 128))
    features = detector.features(batch)
    features = Features(tuple(level.detach() for level in features.maps), features.strides)
    head, neck = detector.copy_head(fresh=True), detector.copy_neck(fresh=True)
    weights = torch.cat([m.weight.detach().flatten() for m in head.modules() if isinstance(m, torch.nn.Conv2d)])
    assert float(weights.std()) == pytest.approx(0.03, rel=0.05)
    head.loss(head.predict(features, batch), batch).total().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert all(parameter.grad is None for parameter in detector.parameters())
    mine = detector.copy_neck()
    assert not torch.equal(neck(features.take([0, 1, 2])).maps[3], mine(features.take([0, 1, 2])).maps[3])


@pytest.mark.slow
def test_export_alone_gives_the_same_detections(tmp_path):
    detector = tiny()
    batch = make_batch([(96, 128)], [[]], (96, 128))
    with torch.no_grad():
        mine = detector.eval().detect(detector(batch).prediction, batch)[0]
    alone = detections_of_the_export(detector, batch.images[0], tmp_path)
    assert len(mine) > 0
    assert torch.equal(alone["boxes"], mine.boxes_xyxy)
    assert torch.equal(alone["scores"], mine.scores)
    assert torch.equal(alone["labels"], mine.labels + 1)


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="ssdlite:mobilenet_v3_large has no option 'pretrained'"):
        build_detector("ssdlite:mobilenet_v3_large,pretrained=true", CLASSES)
    with pytest.raises(ModelError, match="ssdlite:resnet10t has no option 'weights'"):
        build_detector("ssdlite:resnet10t,weights=COCO_V1", CLASSES)


@pytest.mark.parametrize("name", ["ssdlite:mobilenet_v3_large,score=0.3", "ssdlite:lcnet_050,neck=16,levels=3-6,score=0.3"])
def test_saved_students_load_as_they_were(tmp_path, name):
    torch.manual_seed(0)
    detector = build_detector(name, CLASSES).eval()
    loaded = load_detector(save_student(detector, tmp_path)).eval()
    assert loaded.spec == detector.spec
    batch = make_batch([(128, 128)], [[]], (128, 128))
    with torch.no_grad():
        mine = detector.detect(detector(batch).prediction, batch)[0]
        theirs = loaded.detect(loaded(batch).prediction, batch)[0]
    assert len(mine) > 0
    assert torch.equal(mine.boxes_xyxy, theirs.boxes_xyxy)
    assert torch.equal(mine.scores, theirs.scores)


@pytest.mark.parametrize(("name", "blocks"), [("ssd:resnet10t,levels=3-5", 0), ("ssdlite:resnet10t,levels=3-5", 1)])
def test_towers_can_be_left_and_resumed_at_every_depth(name, blocks):
    torch.manual_seed(0)
    detector = build_detector(f"{name},channels=8-16-16-24,stem=8,neck=16", CLASSES).eval()
    batch = make_batch([(128, 96), (112, 128)], [BOXES[0], []], (128, 128))
    features = detector.features(batch)
    assert detector.tower_depth == blocks
    library = detector.model.head(list(features.maps))
    for depth in range(blocks + 1):
        resumed = detector.finish(detector.tower(features, upto=depth), batch)
        assert torch.equal(resumed.logits, torch.cat([library["cls_logits"][..., 1:], library["cls_logits"][..., :1]], dim=-1))
        assert torch.equal(resumed.deltas, library["bbox_regression"])
