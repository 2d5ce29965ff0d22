import pytest
import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher, Tower
from detdistill.errors import ModelError
from detdistill.structures import WHOLE_TOWER, Assignment, Look
from tests.detectors.dense.shared import (
    EMPTY,
    assert_detections_equal,
    assert_losses_and_gradients_equal,
    library_targets,
    randomize_outputs,
    target,
    unequal_batch,
)

NAME = "fcos:resnet10t,channels=16-32-64-128,stem=16,neck=64,levels=3-5,convs=2,score=0.01"


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return build_detector(NAME, ["a", "b", "c"])


def test_losses_and_gradients_equal_torchvision(detector):
    losses = assert_losses_and_gradients_equal(detector, unequal_batch())
    assert all(float(term.detach()) > 0 for term in losses.terms.values())


def test_without_any_box_all_is_background(detector):
    losses = assert_losses_and_gradients_equal(detector, unequal_batch(EMPTY))
    assert float(losses.terms["bbox_regression"].detach()) == 0
    assert float(losses.terms["classification"].detach()) > 0


def test_detections_equal_torchvision(detector):
    assert_detections_equal(randomize_outputs(detector), unequal_batch())


def test_parameters_and_levels(detector):
    assert detector.spec.strides == (8, 16, 32)
    assert detector.spec.channels == (64, 64, 64)
    assert detector.tower_depth == 2
    assert sum(parameter.numel() for parameter in detector.parameters()) == 595_429


def test_assignment_is_centre_sampling(detector):
    """By hand, in one image: box 20..60 (40 px) goes to the finest level, points within 1.5 strides of (40, 40)."""
    batch = unequal_batch((target([[20, 20, 60, 60]], [0]), *EMPTY[1:]))
    prediction = detector(batch).prediction
    matched = detector.assign(prediction, batch).matched
    index = torch.nonzero(matched[0] == 0).flatten()
    points = (prediction.priors_xyxy[0, index, :2] + prediction.priors_xyxy[0, index, 2:]) / 2
    # largest distance to a side must be below 8 strides (64) on the finest level and above 4 strides on the next (64)
    assert prediction.levels[index].unique().tolist() == [0]
    assert sorted(map(tuple, points.tolist())) == [(x, y) for x in (32.0, 40.0, 48.0) for y in (32.0, 40.0, 48.0)]
    assert bool((matched[1:] == -1).all())


def test_crowd_boxes_are_no_targets_but_keep_their_number(detector):
    batch = unequal_batch()
    matched = detector.assign(detector(batch).prediction, batch).matched
    assert matched[1].unique().tolist() == [-1, 1]


def test_own_assignment_given_back_changes_nothing(detector):
    batch = unequal_batch()
    prediction = detector(batch).prediction
    own = detector.loss(prediction, batch).terms
    given = detector.loss(prediction, batch, detector.assign(prediction, batch)).terms
    for name, term in own.items():
        torch.testing.assert_close(given[name], term, rtol=1e-6, atol=1e-6)


def test_foreign_assignment_goes_through_the_librarys_formula(detector):
    """Matches moved to other points inside their boxes: equal to the head's own ``compute_loss`` with these matches."""
    batch = unequal_batch((target([[0, 0, 127, 99], [20, 20, 90, 80]], [0, 2]), *EMPTY[1:]))
    prediction = detector(batch).prediction
    matched = torch.full(prediction.logits.shape[:2], -1)
    matched[0, [18, 56, 52]] = torch.tensor([0, 1, 0])
    mine = detector.loss(prediction, batch, Assignment(matched)).terms
    own = prediction.own
    theirs = detector.model.head.compute_loss(library_targets(batch), own.outputs, list(own.anchors), list(matched))
    for name, term in theirs.items():
        torch.testing.assert_close(mine[name], term, rtol=1e-6, atol=1e-6)


def test_foreign_weights_ignored_and_normalizer(detector):
    batch = unequal_batch()
    prediction = detector(batch).prediction
    own = detector.assign(prediction, batch)
    plain = detector.loss(prediction, batch, own).terms
    positives = (own.matched >= 0).sum()
    doubled = detector.loss(prediction, batch, Assignment(own.matched, normalizer=positives / 2)).terms
    weighted = detector.loss(prediction, batch, Assignment(own.matched, weights=torch.full(own.matched.shape, 2.0))).terms
    for name, term in plain.items():
        torch.testing.assert_close(doubled[name], 2 * term)
        torch.testing.assert_close(weighted[name], 2 * term)
    ignored = detector.loss(prediction, batch, own.as_ignored(own.matched == -1)).terms
    assert float(ignored["classification"].detach()) < float(plain["classification"].detach())
    assert torch.equal(ignored["bbox_regression"], plain["bbox_regression"])


def test_positive_outside_its_box_is_finite(detector):
    batch = unequal_batch((target([[100, 80, 120, 95]], [0]), *EMPTY[1:]))
    prediction = detector(batch).prediction
    matched = torch.full(prediction.logits.shape[:2], -1)
    matched[0, 0] = 0
    losses = detector.loss(prediction, batch, Assignment(matched))
    losses.total().backward()
    assert torch.isfinite(losses.total().detach())
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)


def test_positives_are_differentiable_and_in_place(detector):
    batch = unequal_batch()
    prediction = detector(batch).prediction
    assignment = detector.assign(prediction, batch)
    positives = detector.positives(prediction, assignment, batch)
    assert len(positives) == int((assignment.matched >= 0).sum()) > 5
    assert torch.equal(positives.targets_xyxy[0], batch.targets[0].boxes_xyxy[positives.ground_truth[0]])
    positives.boxes_xyxy.sum().backward()
    assert float(detector.model.head.regression_head.bbox_reg.bias.grad.abs().sum()) > 0


def test_tower_can_be_left_and_resumed_at_every_depth(detector):
    batch = unequal_batch()
    features = detector.features(batch)
    whole = detector.predict(features, batch)
    for depth in range(3):
        resumed = detector.finish(detector.tower(features, upto=depth), batch)
        assert torch.equal(resumed.logits, whole.logits)
        assert torch.equal(resumed.boxes_xyxy, whole.boxes_xyxy)
        assert torch.equal(resumed.quality, whole.quality)
    half = detector.tower(features, upto=1)
    mixed = detector.finish(Tower(half.classification, detector.tower(features, 1).regression, 1, half.strides), batch)
    assert torch.equal(mixed.logits, whole.logits)
    library = detector.model.head(list(features.maps))
    assert torch.equal(library["cls_logits"][..., 1:], whole.logits)
    assert torch.equal(library["bbox_regression"], whole.deltas)


def test_backbone_features_and_neck_copy(detector):
    batch = unequal_batch()
    detector.eval()
    bottom = detector.backbone_features(batch)
    assert bottom.channels == (32, 64, 128)
    assert bottom.strides == (8, 16, 32)
    features = detector.features(batch)
    copied = detector.copy_neck()(bottom)
    for mine, theirs, padding, other in zip(copied.maps, features.maps, copied.padding, features.padding, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(padding, other)
    assert not torch.equal(detector.copy_neck(fresh=True)(bottom).maps[0], features.maps[0])
    # image 2 is 64 x 64 in a tensor of 128 x 128: on stride 32, cells 0 and 1 show the image
    assert features.padding[2][2].tolist() == [[False, False, True, True]] * 2 + [[True] * 4] * 2


def test_head_copy_runs_alone_on_its_own_parameters(detector):
    batch = unequal_batch()
    detector.requires_grad_(False)
    features = detector.features(batch)
    head = detector.copy_head()
    assert {name.split(".")[1] for name, _ in head.named_parameters()} == {"head"}
    prediction = head.predict(features, batch)
    assert torch.equal(prediction.logits, detector.predict(features, batch).logits)
    head.loss(prediction, batch, head.assign(prediction, batch)).total().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    fresh = detector.copy_head(fresh=True)
    bias = fresh.model.head.classification_head.cls_logits.bias
    torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 0.01))
    assert not torch.equal(fresh.predict(features, batch).logits, prediction.logits)


def test_mixed_precision_keeps_boxes_in_float32(detector):
    batch = unequal_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = detector(batch).prediction
        losses = detector.loss(prediction, batch)
    assert prediction.boxes_xyxy.dtype == torch.float32
    assert prediction.priors_xyxy[0, -1].tolist() == [80.0, 80.0, 112.0, 112.0]
    assert torch.isfinite(losses.total().detach())


def test_neck_must_fit_group_norm():
    with pytest.raises(ModelError, match="neck=40 must be a multiple of 32"):
        build_detector("fcos:resnet10t,neck=40", ["a"])


def test_split_prediction_says_what_it_lacks(detector):
    batch = unequal_batch()
    prediction = detector(batch).prediction.split(3)[0]
    with pytest.raises(ValueError, match="has no raw outputs; call predict again"):
        detector.detect(prediction, batch)


def test_no_detections_at_all(detector):
    batch = unequal_batch()
    detector.eval().model.score_thresh = 0.9
    found = detector.detect(detector(batch).prediction, batch)
    assert [len(one) for one in found] == [0, 0, 0]
    assert found[0].boxes_xyxy.shape == (0, 4)
    assert found[0].origin.cell.shape == (0, 2)


@torch.no_grad()
def test_a_teachers_pass_folds_its_norms_and_nobody_else_notices(detector):
    norms = [module for module in detector.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        for tensor, least in ((norm.weight, 0.5), (norm.bias, -0.2), (norm.running_mean, -0.2), (norm.running_var, 0.5)):
            tensor.uniform_(least, least + 1)
    teacher, batch = Teacher(detector).fold_norms(), unequal_batch()
    before, head = teacher.fingerprint, teacher.detector.copy_head()
    look = Look(backbone=True, towers=(WHOLE_TOWER,), prediction=True)
    seen, own = teacher.observe(batch, look), detector.observe(batch, look)
    assert len(teacher._folded.pairs) == len(norms) == 15
    pairs = [*zip(seen.features.maps, own.features.maps, strict=True)]
    pairs += zip(seen.backbone_features.maps, own.backbone_features.maps, strict=True)
    pairs += zip(seen.tower().classification, own.tower().classification, strict=True)
    assert all(found.is_contiguous() for found, _ in pairs)
    for found, expected in [*pairs, (seen.prediction.logits, own.prediction.logits)]:
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert Teacher(detector).fingerprint == before
    after = teacher.detector.copy_head()
    assert torch.equal(after.predict(own.features, batch).logits, head.predict(own.features, batch).logits)
