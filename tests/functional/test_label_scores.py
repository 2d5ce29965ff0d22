"""Boxes that a model labelled count as much as their score."""

from dataclasses import replace

import pytest
import torch

from detdistill.detectors.contract import PREDICTION
from detdistill.detectors.probe import tiny_detector
from detdistill.functional.label_scores import detection_loss, scores_of, weighted_by_score
from detdistill.structures import Assignment, Target
from tests.detectors.checks import batch_for

FAMILIES = {
    "fcos": "bbox_regression",
    "gfl": "bbox_regression",
    "retinanet": "bbox_regression",
    "ssd": "bbox_regression",
    "reppoints": "refined_points",
    "adamixer": "bbox_regression",
    "faster_rcnn": "loss_box_reg",
}
"""Detectors, and a term of each that only positives have."""


def scored(batch, score):
    return batch.with_targets([replace(target, scores=torch.full((len(target),), score)) for target in batch.targets])


@pytest.mark.parametrize("name", FAMILIES)
def test_boxes_count_as_much_as_their_score(name):
    torch.manual_seed(0)
    detector = tiny_detector(name).train()
    batch = batch_for(detector)
    prediction = detector(batch, PREDICTION).prediction
    assignment = detector.assign(prediction, batch)
    with torch.no_grad():
        plain = detector.loss(prediction, batch, assignment).terms
        full, half, none = (detection_loss(detector, prediction, scored(batch, score)).terms for score in (1.0, 0.5, 0.0))
    term = next(one for one in plain if FAMILIES[name] in one)
    assert float(plain[term]) > 0
    for one in plain:
        assert float(full[one]) == pytest.approx(float(plain[one]), rel=1e-5, abs=1e-7)
    assert float(half[term]) == pytest.approx(0.5 * float(plain[term]), rel=1e-5)
    assert float(none[term]) == 0
    # Without scores, it is the detector's own loss.
    torch.manual_seed(1)
    own = detector.loss(prediction, batch).total()
    torch.manual_seed(1)
    assert torch.equal(detection_loss(detector, prediction, batch).total(), own)


def test_scores_multiply_the_weights_of_each_family():
    torch.manual_seed(0)
    detector = tiny_detector("faster_rcnn").train()
    batch = batch_for(detector)
    found = detector(batch, PREDICTION).prediction
    batch = scored(batch, 0.5)
    matched = torch.where(torch.arange(len(found.boxes_xyxy)) % 2 == 0, 0, -1)
    image = found.origin.image
    usable = torch.tensor([len(target) > 0 for target in batch.targets])[image]
    given = Assignment(matched.masked_fill(~usable, -1), torch.full(matched.shape, 2.0))
    weights = weighted_by_score(given, found, batch).weights
    assert torch.equal(weights, torch.where(given.matched >= 0, 1.0, 2.0))


def test_boxes_without_scores_count_fully_beside_images_that_have_some():
    box, label, crowd = torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([0]), torch.tensor([False])
    targets = Target(box, label, crowd), Target(box, label, crowd, scores=torch.tensor([0.25]))
    matched = torch.tensor([[0, -1], [-2, 0]])
    assert scores_of(matched, torch.tensor([[0, 0], [1, 1]]), targets).tolist() == [[1.0, 1.0], [1.0, 0.25]]
