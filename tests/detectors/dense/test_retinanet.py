import copy

import pytest
import torch
from torchvision.models.detection import RetinaNet
from torchvision.ops import box_iou

from detdistill.detectors.adapters import wrap_torchvision
from detdistill.detectors.build import build_detector
from detdistill.detectors.dense.shared.heads import LONG_ROW
from detdistill.errors import ModelError
from detdistill.structures import Assignment
from tests.detectors.dense.shared import (
    EMPTY,
    FULL,
    assert_detections_equal,
    assert_losses_and_gradients_equal,
    library_images,
    library_targets,
    randomize_outputs,
    unequal_batch,
)

SMALL = "resnet10t,width=0.25,neck=32,convs=2,score=0.01"
NAME = f"retinanet:{SMALL}"


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


def test_detections_equal_torchvision(detector):
    assert_detections_equal(randomize_outputs(detector), unequal_batch())


def test_assignment_by_iou_with_a_band_that_is_ignored(detector):
    batch = unequal_batch()
    prediction = detector(batch).prediction
    matched = detector.assign(prediction, batch).matched
    for index, boxes in enumerate(entry["boxes"] for entry in library_targets(batch)[:2]):
        iou = box_iou(boxes, prediction.priors_xyxy[index])
        best, which = iou.max(dim=0)
        which = which + (index == 1)  # the crowd box of image 1 keeps its number 0
        forced = (iou == iou.max(dim=1, keepdim=True).values).any(dim=0)
        expected = torch.where(best >= 0.5, which, torch.where(best < 0.4, -1, -2))
        assert torch.equal(matched[index], torch.where(forced, which, expected))
    assert bool((matched[2] == -1).all())
    assert int((matched == -2).sum()) > 10


@pytest.mark.parametrize("loss_type", ["l1", "smooth_l1", "giou"])
def test_foreign_assignment_goes_through_the_librarys_formula(detector, loss_type):
    detector.model.head.regression_head._loss_type = loss_type
    batch = unequal_batch()
    prediction = detector(batch).prediction
    assignment = detector.assign(prediction, batch)
    own = detector.loss(prediction, batch).terms
    given = detector.loss(prediction, batch, assignment).terms
    weighted = detector.loss(prediction, batch, Assignment(assignment.matched, torch.full(assignment.matched.shape, 3.0))).terms
    for name, term in own.items():
        assert torch.equal(given[name], term)
        torch.testing.assert_close(weighted[name], 3 * term, rtol=1e-5, atol=1e-6)
    positives = (assignment.matched >= 0).sum(dim=1)
    normalized = detector.loss(prediction, batch, Assignment(assignment.matched, normalizer=torch.tensor(1.0))).terms
    alone = [
        detector.loss(prediction, batch, Assignment(assignment.matched, keep)).terms["bbox_regression"]
        for keep in torch.eye(3)[:, :, None].expand(3, 3, assignment.matched.shape[1])
    ]
    expected = sum(term * count * 3 for term, count in zip(alone, positives, strict=True))
    torch.testing.assert_close(normalized["bbox_regression"], expected, rtol=1e-5, atol=1e-5)


def test_tower_can_be_left_and_resumed_at_every_depth(detector):
    batch = unequal_batch()
    features = detector.features(batch)
    assert detector.tower_depth == 2
    library = detector.model.head(list(features.maps))
    for depth in range(3):
        resumed = detector.finish(detector.tower(features, upto=depth), batch)
        assert torch.equal(resumed.logits, library["cls_logits"][..., 1:])
        assert torch.equal(resumed.deltas, library["bbox_regression"])


def test_places_of_predictions(detector):
    """Level 3 of a 128 px tensor has 16 x 16 cells of 9 anchors around (8 * column, 8 * row)."""
    prediction = detector(unequal_batch()).prediction
    index = (5 * 16 + 3) * 9 + 4
    assert prediction.levels[index] == 0
    assert prediction.cells[index].tolist() == [5, 3]
    assert prediction.anchors[index] == 4
    box = prediction.priors_xyxy[0, index]
    assert ((box[:2] + box[2:]) / 2).tolist() == [24.0, 40.0]
    assert prediction.levels.bincount().tolist() == [2304, 576, 144, 36, 9]


def test_anchors_start_where_asked():
    small = build_detector(f"{NAME},anchors=1.5", ["a"])
    assert [tuple(sides) for sides in small.model.anchor_generator.sizes[:2]] == [(12, 15, 19), (24, 30, 38)]
    with pytest.raises(ModelError, match="strides of 8 pixels are less than a pixel"):
        build_detector(f"{NAME},anchors=0.1", ["a"])
    with pytest.raises(ModelError, match="fcos has no option 'anchors'"):
        build_detector("fcos:resnet10t,anchors=2", ["a"])


def test_head_copy_and_class_rows(detector):
    batch = unequal_batch()
    features = detector.features(batch)
    head = detector.copy_head()
    assert torch.equal(head.predict(features, batch).logits, detector.predict(features, batch).logits)
    fresh = detector.copy_head(fresh=True)
    assert not torch.equal(fresh.predict(features, batch).logits, detector.predict(features, batch).logits)
    name = "model.head.classification_head.cls_logits.weight"
    rows = detector.class_rows(name)
    assert rows.shape == (3, 9)
    assert rows[1].tolist() == [2 + 4 * anchor for anchor in range(9)]
    assert detector.class_rows("model.head.regression_head.bbox_reg.weight") is None


def test_columns_of_another_numbering(detector):
    """A model with more outputs than classes: only ours are shown, and detections of the others are dropped."""
    randomize_outputs(detector)
    narrow = wrap_torchvision(detector.model, ["c", "a"], "narrow", columns=[3, 1]).eval()
    detector.eval()
    batch = unequal_batch()
    with torch.no_grad():
        all_logits = detector(batch).prediction.logits
        prediction = narrow(batch).prediction
        assert torch.equal(prediction.logits, all_logits[..., [2, 0]])
        mine, theirs = narrow.detect(prediction, batch)[0], detector.detect(detector(batch).prediction, batch)[0]
    kept = theirs.labels != 1
    assert torch.equal(mine.boxes_xyxy, theirs.boxes_xyxy[kept])
    assert torch.equal(mine.labels, 1 - theirs.labels[kept] // 2)


def test_too_many_convolutions():
    with pytest.raises(ModelError, match="convs=5 is too many"):
        build_detector("retinanet:resnet10t,convs=5", ["a"])


def test_foreign_head_is_refused(detector):
    model = RetinaNet(detector.model.backbone, 4, head=torch.nn.Identity(), anchor_generator=detector.model.anchor_generator)
    with pytest.raises(ModelError, match="only torchvision's RetinaNetHead"):
        wrap_torchvision(model, ["a", "b", "c"], "odd")


@pytest.mark.parametrize("targets", [FULL, EMPTY], ids=["full", "empty"])
def test_with_many_classes_losses_and_gradients_equal_torchvision_to_the_sixth_digit(targets):
    torch.manual_seed(0)
    detector = randomize_outputs(build_detector(f"retinanet:{SMALL}", [str(label) for label in range(LONG_ROW)])).train()
    batch = unequal_batch(targets)
    prediction = detector(batch).prediction
    assert torch.equal(prediction.logits, prediction.own.outputs["cls_logits"][..., 1:])
    assert prediction.logits.data_ptr() == prediction.own.outputs["cls_logits"].data_ptr() + 4  # a view
    library = copy.deepcopy(detector.model)
    losses = detector.loss(prediction, batch)
    theirs = library(library_images(batch), library_targets(batch))
    for name, value in theirs.items():
        torch.testing.assert_close(losses.terms[name], value, rtol=1e-6, atol=1e-6)
    losses.total().backward()
    sum(theirs.values()).backward()
    for mine, other in zip(detector.model.parameters(), library.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-6)
