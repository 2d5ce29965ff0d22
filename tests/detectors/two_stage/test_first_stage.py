"""The first stage is a prediction like any other: it is assigned and trained by itself, under anybody's assignment."""

import math

import pytest
import torch

from detdistill.detectors.probe import tiny_detector
from detdistill.structures import IGNORED, NEGATIVE, Assignment
from tests.detectors.two_stage.shared import criterion_losses, make_batch
from tests.tiny import iou

NAMES = ["faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"]
SIZES = [(128, 128), (96, 112)]
BOXES = [[[8, 10, 60, 70, 0], [50, 40, 120, 110, 1], [100, 4, 124, 30, 1]], [[4, 4, 90, 80, 1]]]
BETA = 1 / 9
"""Of torchvision's smooth L1 losses."""
ALL = pytest.mark.parametrize("name", NAMES)


def trained(name, boxes=BOXES, seed=5):
    """A detector whose first stage has an opinion, a batch, and what it predicts in training."""
    detector = tiny_detector(name)
    generator = torch.Generator().manual_seed(0)
    for layer in (detector.model.rpn.head.cls_logits, detector.model.rpn.head.bbox_pred):
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator) * 0.2
    batch = make_batch(SIZES, boxes)
    torch.manual_seed(seed)
    return detector, batch, detector.predict(detector.features(batch), batch)


@ALL
def test_with_its_sampled_assignment_its_losses_are_its_part_of_the_whole_loss(name):
    detector, batch, prediction = trained(name)
    first, sampled = prediction.first, prediction.first_assignment
    alone = detector.loss(first, batch, sampled)
    whole = detector.loss(prediction, batch)
    assert set(alone.terms) == {"loss_objectness", "loss_rpn_box_reg"}
    for term, value in alone.terms.items():
        assert torch.equal(value, whole.terms[term])
    alone.total().backward()
    reached = {name.split(".")[1] for name, p in detector.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == {"backbone", "rpn"}
    if "cascade" not in name:  # of which torchvision has no model to compare with
        library, _ = criterion_losses(detector, batch, seed=5)
        for term, value in alone.terms.items():
            torch.testing.assert_close(value, library[term], rtol=1e-6, atol=1e-7)
    counted = sampled.matched != IGNORED
    assert counted.sum(dim=1).tolist() == [256, 256], "torchvision's number of anchors of an image"
    assert bool((sampled.matched[counted] >= NEGATIVE).all())


@ALL
def test_its_own_rule_by_hand(name):
    """IoU 0.7 is positive, below 0.3 negative; every box has at least the anchors that overlap it most."""
    detector, batch, prediction = trained(name)
    crowd = torch.tensor([True, False, False])
    first_target = batch.targets[0].__class__(batch.targets[0].boxes_xyxy, batch.targets[0].labels, crowd, batch.targets[0].masks)
    batch = batch.with_targets([first_target, batch.targets[1]])
    matched = detector.assign(prediction.first, batch).matched
    assert torch.equal(matched, detector.assign(prediction.first, batch).matched), "assign draws random numbers"
    for image, target in enumerate(batch.targets):
        usable = torch.nonzero(~target.crowd).flatten()
        overlaps = iou(target.boxes_xyxy[usable], prediction.first.priors_xyxy[image])  # [G, P]
        best, index = overlaps.max(dim=0)
        expected = torch.where(best >= 0.7, usable[index], torch.where(best < 0.3, NEGATIVE, IGNORED))
        for row in overlaps:
            closest = row == row.max()
            expected[closest] = usable[index[closest]]
        assert torch.equal(matched[image], expected)
        assert set(usable.tolist()) <= set(matched[image].tolist())
    assert not bool((matched[0] == 0).any()), "the crowd box"


@ALL
@pytest.mark.parametrize("normalizer", [None, 7.0])
def test_a_foreign_assignment_with_weights_and_ignored_anchors_by_hand(name, normalizer):
    detector, batch, prediction = trained(name)
    first = prediction.first
    matched = torch.full(first.logits.shape[:2], IGNORED)
    places = {(0, 40): 1, (0, 41): NEGATIVE, (1, 7): 0, (1, 90): NEGATIVE, (1, 91): NEGATIVE}
    weights = torch.full(matched.shape, 100.0)  # of ignored anchors: counts nowhere
    for number, (place, box) in enumerate(places.items(), start=1):
        matched[place], weights[place] = box, float(number)
    given = Assignment(matched, weights, None if normalizer is None else torch.tensor(normalizer))
    losses = detector.loss(first, batch, given).terms
    objectness = box_loss = 0.0
    for place, box in places.items():
        logit, weight = float(first.logits[place][0].detach()), float(weights[place])
        objectness += weight * math.log1p(math.exp(-logit if box >= 0 else logit))
        if box < 0:
            continue
        ax, ay, aw, ah = center_size(first.priors_xyxy[place])
        gx, gy, gw, gh = center_size(batch.targets[place[0]].boxes_xyxy[box])
        wanted = ((gx - ax) / aw, (gy - ay) / ah, math.log(gw / aw), math.log(gh / ah))
        for delta, target in zip(first.deltas[place].tolist(), wanted, strict=True):
            apart = abs(delta - target)
            box_loss += weight * (apart**2 / (2 * BETA) if apart < BETA else apart - BETA / 2)
    divisor = normalizer or len(places)
    assert float(losses["loss_objectness"].detach()) == pytest.approx(objectness / divisor, rel=1e-5)
    assert float(losses["loss_rpn_box_reg"].detach()) == pytest.approx(box_loss / divisor, rel=1e-5)
    # Without weights each anchor counts once, and the divisor is their number.
    plain = detector.loss(first, batch, Assignment(matched)).terms
    alike = detector.loss(first, batch, Assignment(matched, torch.ones(matched.shape))).terms
    for term, value in plain.items():
        torch.testing.assert_close(value, alike[term])


def center_size(box):
    x1, y1, x2, y2 = box.tolist()
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


@pytest.mark.parametrize("name", ["faster_rcnn", "cascade_rcnn"])
@pytest.mark.parametrize("weighted", [False, True])
def test_with_every_anchor_ignored_the_losses_are_zero_and_connected(name, weighted):
    detector, batch, prediction = trained(name)
    matched = torch.full(prediction.first.logits.shape[:2], IGNORED)
    losses = detector.loss(prediction.first, batch, Assignment(matched, torch.ones(matched.shape) if weighted else None))
    assert {term: float(value.detach()) for term, value in losses.terms.items()} == {"loss_objectness": 0, "loss_rpn_box_reg": 0}
    losses.total().backward()
    assert not detector.model.rpn.head.cls_logits.weight.grad.any()


def test_without_an_assignment_it_samples_anew():
    detector, batch, prediction = trained("faster_rcnn")
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(float(detector.loss(prediction.first, batch).terms["loss_objectness"].detach()))
    assert values[0] == values[1] != values[2]
    torch.manual_seed(1)
    sampled = detector._sample_anchors(prediction.first, batch)
    assert values[0] == float(detector.loss(prediction.first, batch, sampled).terms["loss_objectness"].detach())


@ALL
def test_without_boxes_everything_is_negative(name):
    detector, batch, prediction = trained(name, boxes=[[], []])
    assert bool((detector.assign(prediction.first, batch).matched == NEGATIVE).all())
    losses = detector.loss(prediction.first, batch, prediction.first_assignment).terms
    logits = prediction.first.logits[..., 0][prediction.first_assignment.matched == NEGATIVE]
    torch.testing.assert_close(losses["loss_objectness"], torch.nn.functional.softplus(logits).mean())
    assert float(losses["loss_rpn_box_reg"].detach()) == 0


@ALL
def test_its_sample_belongs_to_training_and_stays_with_the_batch(name):
    detector, batch, prediction = trained(name)
    assert prediction.first_assignment is not None
    pieces = prediction.detach().split(2)
    assert [piece.first_assignment for piece in pieces] == [None, None]
    assert pieces[1].first.logits.shape[0] == 1
    detector.eval()
    with torch.no_grad():
        found = detector.predict(detector.features(batch), batch)
        asked = detector.regions(detector.features(batch), [target.boxes_xyxy for target in batch.targets], batch)
    assert found.first is not None
    assert found.first_assignment is None
    assert (asked.first, asked.first_assignment) == (None, None)


@ALL
def test_a_foreign_assignment_of_regions_leaves_the_first_stages_sample(name):
    detector, batch, prediction = trained(name)
    whole = detector.loss(prediction, batch)
    assignment = Assignment(torch.full_like(prediction.origin.image, NEGATIVE))
    foreign = detector.loss(prediction, batch, assignment).terms
    for term in ("loss_objectness", "loss_rpn_box_reg"):
        assert torch.equal(foreign[term], whole.terms[term])
