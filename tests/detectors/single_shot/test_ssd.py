from dataclasses import replace

import pytest
import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import HasBackboneFeatures, HasCopies
from detdistill.detectors.inherit import inherit_head
from detdistill.detectors.single_shot import ssd
from detdistill.errors import ModelError
from detdistill.structures import IGNORED, Assignment, Features, Target
from tests.detectors.single_shot.shared import (
    assert_same_detections,
    assert_same_training,
    detections_of_the_export,
    library_images,
    library_targets,
    make_batch,
)

TINY = ssd.SSDOptions(channels=(8, 16, 16, 24), stem=8, neck=16, levels=(3, 6), score=0.3, name="ssd:tiny")
CLASSES = ("a", "b")
BOXES = [[[10.0, 12.0, 60.0, 50.0, 1.0], [70.0, 8.0, 110.0, 90.0, 0.0]], [[30.0, 40.0, 44.0, 60.0, 1.0]]]


def tiny(seed=0, classes=CLASSES, options=TINY):
    torch.manual_seed(seed)
    return ssd.build("resnet10t", classes, options)


def mixed_batch(boxes=BOXES):
    return make_batch([(128, 96), (112, 128)], boxes, (128, 128))


def test_spec_says_what_features_are():
    detector = tiny()
    spec = detector.spec
    assert (spec.family, spec.softmax, spec.fixed_size_hw, spec.name) == ("dense", True, None, "ssd:tiny")
    assert (spec.channels, spec.strides) == ((16, 16, 24, 16), (8, 16, 32, 64))
    features = detector.features(mixed_batch())
    assert features.channels == spec.channels
    assert [level.shape[-1] for level in features.maps] == [16, 8, 4, 2]
    # Image 1 is 112 pixels high: 14 rows of stride 8 are valid.
    assert features.padding[0][1, :, 0].sum() == 2
    assert isinstance(detector, HasBackboneFeatures)
    assert isinstance(detector, HasCopies)


@pytest.mark.parametrize(
    ("sizes", "boxes", "size_hw"),
    [
        ([(128, 128), (128, 128)], BOXES, (128, 128)),
        ([(128, 96), (112, 128)], BOXES, (128, 128)),
        ([(96, 144), (90, 141)], [BOXES[1], BOXES[1]], (96, 144)),
        ([(128, 128), (128, 128)], [[], BOXES[0]], (128, 128)),
        ([(128, 128)], [[]], (128, 128)),
    ],
    ids=["square", "mixed sizes", "wide", "one image without boxes", "no boxes at all"],
)
def test_training_and_detections_equal_the_library(sizes, boxes, size_hw):
    detector, batch = tiny(), make_batch(sizes, boxes, size_hw)
    losses = assert_same_training(detector, batch)
    if not any(boxes):
        assert float(losses["bbox_regression"].detach()) == 0.0
    assert_same_detections(detector, batch)


@pytest.mark.slow
def test_vgg16_equals_the_library():
    torch.manual_seed(0)
    detector = ssd.build("vgg16", CLASSES, ssd.VGGOptions(score=0.2, dets=20))
    with torch.no_grad():
        # Random VGG maps are so large that many scores would be exactly 1, and equal scores have no order.
        for parameter in detector.model.head.parameters():
            parameter.mul_(0.1)
    spec = detector.spec
    assert (spec.fixed_size_hw, spec.name) == ((300, 300), "ssd:vgg16")
    assert spec.strides == (8, 16, 30, 60, 100, 300)
    assert spec.channels == (512, 1024, 512, 256, 256, 256)
    batch = make_batch([(300, 300)], [BOXES[0]], (300, 300))
    assert_same_training(detector, batch)
    assert_same_detections(detector, batch)
    assert_backbone_and_neck_make_the_features(detector, batch)
    parts = detector.parts()
    below, above = (
        {".".join(name.split(".")[:4]) for name in parts.names(detector, side)} for side in (parts.backbone, parts.neck)
    )
    assert above == {f"model.backbone.extra.{number}" for number in range(1, 5)}
    assert {name for name in below if "features" not in name} == {"model.backbone.extra.0", "model.backbone.scale_weight"}
    with pytest.raises(ModelError, match="ssd:vgg16 needs images of 300x300, but got 128x128; set --size 300"):
        detector.features(mixed_batch())


@pytest.mark.slow
def test_ssd512_with_vgg16_is_the_papers_and_its_export_loads_alone(tmp_path):
    torch.manual_seed(0)
    detector = ssd.build("vgg16", CLASSES, ssd.VGGOptions(score=0.2, dets=20, size=512, name="ssd:vgg16,size=512"))
    with torch.no_grad():
        for parameter in detector.model.head.parameters():
            parameter.mul_(0.1)  # as for SSD300
    spec = detector.spec
    assert (spec.fixed_size_hw, spec.name) == ((512, 512), "ssd:vgg16,size=512")
    assert spec.strides == (8, 16, 32, 64, 128, 256, 512)
    assert spec.channels == (512, 1024, 512, 256, 256, 256, 256)
    batch = make_batch([(512, 512)], [BOXES[0]], (512, 512))
    with torch.no_grad():  # gradients are those of SSD300's test: the code is the same
        prediction = detector(batch).prediction  # VGG has no BatchNorm: training and evaluation see the same maps
        expected = detector.train().model(library_images(batch), library_targets(batch))
        losses = detector.loss(prediction, batch).terms
        (mine,), (theirs,) = detector.detect(prediction, batch), detector.eval().model(library_images(batch))
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], value) for name, value in expected.items())
    assert len(mine) > 0
    assert torch.equal(mine.boxes_xyxy, theirs["boxes"])
    assert torch.equal(mine.scores, theirs["scores"])
    assert torch.equal(mine.labels + 1, theirs["labels"])
    # Grids of 64, 32, 16, 8, 4, 2 and 1 cells, with 4, 6, 6, 6, 6, 4 and 4 boxes: 24564, as in the paper (table 7).
    grids, anchors = (64, 32, 16, 8, 4, 2, 1), (4, 6, 6, 6, 6, 4, 4)
    assert prediction.levels.bincount().tolist() == [side**2 * count for side, count in zip(grids, anchors, strict=True)]
    assert len(prediction.levels) == 24564
    first_of_level = [int((prediction.levels == level).float().argmax()) for level in range(7)]
    boxes = prediction.priors_xyxy[0, first_of_level]
    scales = torch.tensor([0.04, 0.1, 0.26, 0.42, 0.58, 0.74, 0.9]) * 512
    torch.testing.assert_close(boxes[:, 2] - boxes[:, 0], scales)
    torch.testing.assert_close(boxes[:, 0] + scales / 2, torch.tensor([4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]))
    alone = detections_of_the_export(detector, batch.images[0], tmp_path)
    assert torch.equal(alone["boxes"], mine.boxes_xyxy)
    assert torch.equal(alone["scores"], mine.scores)


def test_the_size_of_an_ssd_is_300_or_512():
    with pytest.raises(ModelError, match=r"model 'ssd:vgg16,size=400': size='400' is not one of 300, 512$"):
        build_detector("ssd:vgg16,size=400", CLASSES)
    with pytest.raises(ModelError, match="ssd:resnet10t has no option 'size'"):
        build_detector("ssd:resnet10t,size=512", CLASSES)
    with pytest.raises(ModelError, match="fcos has no option 'size'"):
        build_detector("fcos:resnet10t,size=512", CLASSES)


def assert_backbone_and_neck_make_the_features(detector, batch):
    with torch.no_grad():
        features = detector.eval().features(batch)
        made = detector.copy_neck().eval()(detector.backbone_features(batch))
    assert made.strides == features.strides
    for mine, theirs in zip(made.maps, features.maps, strict=True):
        assert torch.equal(mine, theirs)
    if features.padding is None:
        assert made.padding is None
    else:
        for mine, theirs in zip(made.padding, features.padding, strict=True):
            assert torch.equal(mine, theirs)


def test_backbone_features_and_neck_make_the_features():
    assert_backbone_and_neck_make_the_features(tiny(), mixed_batch())


def test_logits_have_the_background_last():
    detector, batch = tiny(), mixed_batch()
    maps = detector.features(batch)
    raw = detector.model.head(list(maps.maps))["cls_logits"]
    assert torch.equal(detector.predict(maps, batch).logits, raw[..., [1, 2, 0]])


def test_unused_outputs_count_as_background():
    detector, batch = tiny(classes=("a", "b", "c")), mixed_batch()
    fewer = ssd.wrap_model(detector.model, ("c", "a"), "ssd:coco", columns=[3, 1])
    everything = detector(batch).prediction.logits.softmax(dim=-1)
    mine = fewer(batch).prediction.logits.softmax(dim=-1)
    torch.testing.assert_close(mine[..., :2], everything[..., [2, 0]])
    torch.testing.assert_close(mine[..., 2], everything[..., [1, 3]].sum(dim=-1))


def test_priors_lie_where_levels_and_cells_say():
    prediction = tiny()(mixed_batch()).prediction
    centers = (prediction.priors_xyxy[0, :, :2] + prediction.priors_xyxy[0, :, 2:]) / 2
    strides = torch.tensor([8.0, 16.0, 32.0, 64.0])[prediction.levels]
    assert torch.allclose(centers, (prediction.cells.flip(1) + 0.5) * strides[:, None], atol=1e-3)
    assert prediction.anchors.bincount().tolist() == [340, 340, 340, 340, 64, 64]


def test_own_assignment_as_a_value_gives_the_same_loss():
    detector, batch = tiny(), mixed_batch()
    prediction = detector(batch).prediction
    own = detector.loss(prediction, batch)
    assignment = detector.assign(prediction, batch)
    positives = detector.positives(prediction, assignment, batch)
    assert set(positives.ground_truth[positives.image == 0].tolist()) == {0, 1}
    assert positives.logits.shape == (len(positives), 3)
    given = detector.loss(prediction, batch, assignment)
    # With weights the loss is computed here, not in the library: ones must change nothing.
    weighted = detector.loss(prediction, batch, Assignment(assignment.matched, torch.ones(assignment.matched.shape)))
    for name, value in own.terms.items():
        assert torch.equal(given.terms[name], value)
        torch.testing.assert_close(weighted.terms[name], value, rtol=1e-5, atol=1e-6)
    double = Assignment(assignment.matched, torch.full(assignment.matched.shape, 2.0), torch.tensor(len(positives) * 4.0))
    torch.testing.assert_close(detector.loss(prediction, batch, double).total(), own.total() / 2)


def test_foreign_assignment_is_followed_and_ignored_predictions_get_no_gradient():
    detector, batch = tiny(), mixed_batch()
    prediction = detector(batch).prediction
    matched = torch.full(prediction.logits.shape[:2], -1)
    matched[0, 7] = 1
    matched[1, ::3] = IGNORED
    matched[1, 7] = 0
    gradient = torch.autograd.grad(detector.loss(prediction, batch, Assignment(matched)).total(), prediction.logits)[0]
    touched = gradient.abs().sum(dim=-1) > 0
    # One positive and its three hardest negatives in each image.
    assert touched.sum(dim=1).tolist() == [4, 4]
    assert touched[0, 7]
    assert touched[1, 7]
    assert not touched[1, ::3].any()
    # Class 0 of box 1 (image 0) and class 1 of box 0 (image 1) are pulled up.
    assert gradient[0, 7, 0] < 0
    assert gradient[1, 7, 1] < 0


def test_crowd_and_empty_boxes_are_left_out_and_indices_stay():
    detector = tiny()
    batch = mixed_batch()
    first = batch.targets[0]
    boxes = torch.cat([torch.tensor([[0.0, 0.0, 90.0, 90.0], [5.0, 5.0, 5.0, 9.0]]), first.boxes_xyxy])
    crowded = Target(boxes, torch.tensor([0, 0, *first.labels]), torch.tensor([True, False, False, False]))
    prediction = detector(batch).prediction
    plain = detector.assign(prediction, batch)
    shifted = detector.assign(prediction, batch.with_targets([crowded, batch.targets[1]]))
    assert torch.equal(shifted.matched[0], torch.where(plain.matched[0] >= 0, plain.matched[0] + 2, -1))
    assert torch.equal(shifted.matched[1], plain.matched[1])


def test_copied_head_gives_the_same_and_a_fresh_one_another():
    detector, batch = tiny(), mixed_batch()
    features = detector.features(batch)
    features = Features(tuple(level.detach() for level in features.maps), features.strides, features.padding)
    head, fresh = detector.copy_head(), detector.copy_head(fresh=True)
    mine = detector.predict(features, batch)
    assert torch.equal(head.predict(features, batch).logits, mine.logits)
    head.loss(head.predict(features, batch), batch).total().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert all(parameter.grad is None for parameter in detector.parameters())
    assert not torch.equal(fresh.predict(features, batch).logits, mine.logits)
    assert all(float(module.bias.detach().abs().max()) == 0 for module in fresh.modules() if isinstance(module, torch.nn.Conv2d))
    assert sum(parameter.numel() for parameter in head.parameters()) == sum(p.numel() for p in detector.model.head.parameters())


def test_head_is_inherited_by_class_name():
    student = tiny(seed=1, classes=("b", "z"), options=replace(TINY, stem=16))
    teacher = tiny(seed=2, classes=("a", "b"))
    inherited = inherit_head(student, teacher)
    assert inherited.skipped == ()
    assert not any(name.startswith("model.backbone.body") for name in inherited.copied)
    batch = mixed_batch()
    features = teacher.features(batch)
    mine, theirs = student.predict(features, batch).logits, teacher.predict(features, batch).logits
    assert torch.equal(mine[..., [0, 2]], theirs[..., [1, 2]])
    assert torch.equal(student.predict(features, batch).deltas, teacher.predict(features, batch).deltas)


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="ssd:resnet10t has no option 'convs'"):
        build_detector("ssd:resnet10t,convs=2", CLASSES)
    with pytest.raises(ModelError, match=r"ssd:vgg16 has no option 'levels'; it has: score, dets, topk, size, pretrained$"):
        build_detector("ssd:vgg16,levels=3-5", CLASSES)
    model = tiny().model
    model.backbone = torch.nn.Sequential()
    with pytest.raises(ModelError, match="the backbone is a Sequential"):
        ssd.wrap_model(model, CLASSES, "mine")
