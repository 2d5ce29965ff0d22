from dataclasses import replace

import pytest
import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.load import load_detector
from detdistill.detectors.save import save_student
from detdistill.errors import DataError, ModelError
from detdistill.structures import Assignment, Regions
from tests.detectors.two_stage.shared import assert_same_training, library_images, make_batch, own_losses

SMALL = "mask_rcnn:resnet10t,channels=8-16-16-16,stem=8,neck=16,levels=3-5,proposals=60,rois=24,mlp=32,score=0,dets=20"
SIZES = [(128, 128), (96, 120), (120, 100)]
BOXES = [[[10, 12, 50, 60, 0], [70, 20, 120, 55, 1], [30, 70, 64, 110, 0]], [], [[5, 60, 98, 120, 1]]]


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return build_detector(SMALL, ("a", "b")).train()


@pytest.fixture
def batch():
    return make_batch(SIZES, BOXES)


def test_losses_and_gradients_are_the_librarys(detector, batch):
    assert detector.spec.needs_masks
    prediction = assert_same_training(detector, batch)
    assert set(detector.loss(prediction, batch).terms) == {
        "loss_objectness",
        "loss_rpn_box_reg",
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
    }


def test_losses_without_any_box_are_the_librarys(detector):
    prediction = assert_same_training(detector, make_batch(SIZES, [[], [], []]))
    assert len(prediction.boxes_xyxy) == 72


def test_images_without_boxes_need_no_masks(detector, batch):
    terms = own_losses(detector, batch)[0]
    empty = replace(batch.targets[1], masks=None)
    without = own_losses(detector, batch.with_targets([batch.targets[0], empty, batch.targets[2]]))[0]
    assert torch.equal(terms["loss_mask"], without["loss_mask"])


def test_crowd_boxes_are_left_out(detector, batch):
    crowd = replace(batch.targets[0], crowd=torch.tensor([True, False, False]))
    assert_same_training(detector, batch.with_targets([crowd, *batch.targets[1:]]))


def test_foreign_assignment_chooses_the_masks(detector, batch):
    """Only the region that IS box 1 of image 0 counts; an empty mask there costs what a full one saves."""
    prediction = own_losses(detector, batch)[2]
    [region] = torch.nonzero((prediction.origin.image == 0) & (prediction.origin.ground_truth == 1)).flatten().tolist()
    matched = torch.full_like(prediction.origin.image, -1)
    matched[region] = 1
    loss = detector.loss(prediction, batch, Assignment(matched)).terms["loss_mask"]
    heads = detector.model.roi_heads
    pooled = detector._pool(
        heads.mask_roi_pool, prediction.own, [prediction.boxes_xyxy[[region]], *[torch.zeros(0, 4)] * 2], batch
    )
    logits = heads.mask_predictor(heads.mask_head(pooled))[0, 2]  # class 1 of ours, 2 of theirs
    filled, empty = (
        batch.with_targets([replace(batch.targets[0], masks=torch.full_like(batch.targets[0].masks, value)), *batch.targets[1:]])
        for value in (True, False)
    )
    full = detector.loss(prediction, filled, Assignment(matched)).terms["loss_mask"]
    none = detector.loss(prediction, empty, Assignment(matched)).terms["loss_mask"]
    # binary cross-entropy: log(1 + exp(-x)) - log(1 + exp(x)) = -x
    torch.testing.assert_close(full - none, -logits.mean(), rtol=1e-3, atol=1e-6)
    assert min(float(full), float(none)) - 1e-6 <= float(loss) <= max(float(full), float(none)) + 1e-6


def test_detections_are_the_librarys_boxes(detector, batch):
    detector.eval()
    with torch.no_grad():
        expected = detector.model(library_images(batch))
        found = detector.detect(detector(batch).prediction, batch)
    for mine, theirs in zip(found, expected, strict=True):
        assert len(mine) == 20
        assert torch.equal(mine.boxes_xyxy, theirs["boxes"])
        assert torch.equal(mine.scores, theirs["scores"])
        assert torch.equal(mine.labels, theirs["labels"] - 1)


def test_data_without_masks_is_refused_by_name(detector, batch):
    bare = batch.with_targets([replace(target, masks=None) for target in batch.targets])
    with pytest.raises(
        DataError, match="needs instance masks, but image 0 has none; use data with segmentations, or the detector faster_rcnn"
    ):
        own_losses(detector, bare)


def test_a_cut_prediction_has_no_mask_loss(detector, batch):
    prediction = own_losses(detector, batch)[2]
    stacked = Regions.stack(prediction.split(3))
    with pytest.raises(ModelError, match=r"needs an unchanged prediction"):
        detector.loss(stacked, batch)


def test_fresh_head_learns_masks(detector, batch):
    head = detector.copy_head(fresh=True)
    kept = detector.model.roi_heads.mask_head.state_dict()
    assert all(
        not torch.equal(value, kept[name])
        for name, value in head.model.roi_heads.mask_head.state_dict().items()
        if "weight" in name
    )
    prediction = head.predict(detector.features(batch), batch)
    head.loss(prediction, batch).terms["loss_mask"].backward()
    assert head.model.roi_heads.mask_predictor.mask_fcn_logits.weight.grad.abs().sum() > 0


def test_saved_and_loaded_detector_detects_the_same(detector, batch, tmp_path):
    detector.eval()
    loaded = load_detector(save_student(detector, tmp_path / "student")).eval()
    assert loaded.spec == detector.spec
    with torch.no_grad():
        expected = detector.detect(detector(batch).prediction, batch)
        found = loaded.detect(loaded(batch).prediction, batch)
    for mine, other in zip(expected, found, strict=True):
        assert torch.equal(mine.boxes_xyxy, other.boxes_xyxy)
        assert torch.equal(mine.scores, other.scores)
        assert torch.equal(mine.labels, other.labels)


def test_a_copied_region_head_needs_no_masks(detector, batch):
    head = detector.copy_region_head()
    bare = batch.with_targets([replace(target, masks=None) for target in batch.targets])
    boxes = [target.boxes_xyxy for target in batch.targets]
    found = head.regions(detector.features(batch), boxes, bare)
    assert torch.equal(found.logits, detector.regions(detector.features(batch), boxes, batch).logits)
    losses = head.loss(found, bare)
    assert list(losses.terms) == ["loss_classifier", "loss_box_reg"]
    losses.total().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert not {id(parameter) for parameter in detector.parameters()} & {id(parameter) for parameter in head.parameters()}
    assert detector.model.roi_heads.has_mask()
    assert not head.spec.needs_masks
    features = detector.features(batch)
    assert len(head.regions(features.take([0]), boxes, bare).logits) == len(torch.cat(boxes))  # a pyramid of fewer levels
