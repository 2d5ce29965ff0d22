from dataclasses import replace

import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import box_iou

from detdistill.detectors.build import build_detector
from detdistill.errors import DataError, ModelError
from detdistill.structures import Assignment, Regions
from tests.detectors.two_stage.cascade import assert_training_equals_the_reference, lively
from tests.detectors.two_stage.shared import library_images, make_batch, own_losses

SMALL = "cascade_mask_rcnn:resnet10t,channels=8-16-16-16,stem=8,neck=16,levels=3-5,proposals=60,rois=24,mlp=32,score=0,dets=20"
SIZES = [(128, 128), (96, 120), (120, 100)]
BOXES = [[[10, 12, 50, 60, 0], [70, 20, 120, 55, 1], [30, 70, 64, 110, 0]], [], [[5, 60, 98, 120, 1]]]


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return lively(build_detector(SMALL, ("a", "b"))).train()


@pytest.fixture
def batch():
    return make_batch(SIZES, BOXES)


def test_losses_and_gradients_are_those_of_torchvisions_parts(detector, batch):
    assert detector.spec.needs_masks
    prediction = assert_training_equals_the_reference(detector, batch)
    assert {f"loss_mask_stage{stage}" for stage in (1, 2, 3)} < set(detector.loss(prediction, batch).terms)


def test_losses_without_any_box(detector):
    prediction = assert_training_equals_the_reference(detector, make_batch(SIZES, [[], [], []]))
    assert len(prediction.boxes_xyxy) == 72


def test_foreign_assignment_chooses_the_last_stages_masks(detector, batch):
    terms, _, prediction = own_losses(detector, batch)
    matched = torch.full_like(prediction.origin.image, -1)
    foreign = detector.loss(prediction, batch, Assignment(matched)).terms
    assert float(foreign["loss_mask_stage3"].detach()) == 0
    for stage in (1, 2):
        assert torch.equal(foreign[f"loss_mask_stage{stage}"], terms[f"loss_mask_stage{stage}"])
    [region] = torch.nonzero((prediction.origin.image == 2) & (prediction.origin.ground_truth == 0)).flatten().tolist()
    matched[region] = 0
    losses = [
        detector.loss(
            prediction,
            batch.with_targets([*batch.targets[:2], replace(batch.targets[2], masks=torch.full((1, 128, 128), full))]),
            Assignment(matched),
        ).terms["loss_mask_stage3"]
        for full in (True, False)
    ]
    heads, box = detector.model.roi_heads, prediction.boxes_xyxy[[region]]
    pooled = detector._pool(heads.mask_roi_pool, prediction.own, [*[torch.zeros(0, 4)] * 2, box], batch)
    logits = heads.mask_predictor(heads.mask_head(pooled))[0, 2]  # class 1 of ours, 2 of theirs
    # binary cross-entropy: log(1 + exp(-x)) - log(1 + exp(x)) = -x
    torch.testing.assert_close(losses[0] - losses[1], -0.25 * logits.mean(), rtol=1e-3, atol=1e-6)


def test_detections_are_the_models_boxes_and_its_masks_the_mean(detector, batch):
    detector.eval()
    with torch.no_grad():
        expected = detector.model(library_images(batch))
        observed = detector(batch)
        found = detector.detect(observed.prediction, batch)
        heads = detector.model.roi_heads
        pooled = detector._pool(heads.mask_roi_pool, observed.features, [mine.boxes_xyxy for mine in found], batch)
        branches = [stage.mask_predictor(stage.mask_head(pooled)).sigmoid() for stage in heads.stages]
    labels = torch.cat([mine.labels for mine in found]) + 1
    masks = torch.stack(branches).mean(dim=0)[torch.arange(len(labels)), labels][:, None]
    for mine, theirs, mask, size in zip(found, expected, masks.split([len(mine) for mine in found]), SIZES, strict=True):
        assert len(mine) == 20
        assert torch.equal(mine.boxes_xyxy, theirs["boxes"])
        assert torch.equal(mine.scores, theirs["scores"])
        assert torch.equal(mine.labels, theirs["labels"] - 1)
        torch.testing.assert_close(theirs["masks"], paste_masks_in_image(mask, mine.boxes_xyxy, size), rtol=1e-5, atol=1e-6)
        assert float(theirs["masks"].max()) <= 1


def test_data_without_masks_is_refused_by_name(detector, batch):
    bare = batch.with_targets([replace(target, masks=None) for target in batch.targets])
    message = "needs instance masks, but image 0 has none; use data with segmentations, or the detector cascade_rcnn"
    with pytest.raises(DataError, match=message):
        own_losses(detector, bare)


def test_a_cut_prediction_has_no_mask_loss(detector, batch):
    stacked = Regions.stack(own_losses(detector, batch)[2].split(3))
    with pytest.raises(ModelError, match=r"needs an unchanged prediction"):
        detector.loss(stacked, batch)


def test_half_precision_losses_are_finite_and_fresh_heads_learn_masks(detector, batch):
    head = detector.copy_head(fresh=True)
    kept = dict(detector.model.roi_heads.named_parameters())
    for name, value in head.model.roi_heads.named_parameters():
        assert value.ndim == 1 or not torch.equal(value, kept[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = head.predict(detector.features(batch), batch)
        head.loss(prediction, batch).total().backward()
    for heads in head.model.roi_heads.stages:
        gradient = heads.mask_predictor.mask_fcn_logits.weight.grad
        assert torch.isfinite(gradient).all()
        assert float(gradient.abs().sum()) > 0


def test_overfits_boxes_and_masks():
    batch = make_batch([(128, 128)], [[[24, 28, 84, 90, 0], [80, 80, 124, 120, 1]]])
    torch.manual_seed(0)
    name = "cascade_mask_rcnn:resnet10t,channels=8-16-32-64,stem=8,neck=16,levels=3-5,proposals=40,rois=16,mlp=64,score=0.3"
    detector = build_detector(name, ("a", "b")).train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=4e-3)
    totals = []
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 5, (80 - step) / 30)
        loss = detector.loss(detector(batch).prediction, batch).total()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        totals.append(float(loss.detach()))
    assert sum(totals[-5:]) < 0.4 * sum(totals[:5])
    detector.eval()
    with torch.no_grad():
        [found] = detector.model(library_images(batch))
    overlap, index = box_iou(batch.targets[0].boxes_xyxy, found["boxes"]).max(dim=1)
    assert (overlap > 0.7).all()
    assert torch.equal(found["labels"][index] - 1, batch.targets[0].labels)
    masks, wanted = found["masks"][index, 0] > 0.5, batch.targets[0].masks
    assert ((masks & wanted).sum(dim=(1, 2)) / (masks | wanted).sum(dim=(1, 2)) > 0.6).all()
