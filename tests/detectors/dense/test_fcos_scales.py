"""FCOS with scales: points, distances, assignment and losses by hand; ``tests/detectors/mmdet`` has results of mmdet."""

import pytest
import torch
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from detdistill.detectors.build import build_detector
from detdistill.structures import Assignment
from tests.detectors.dense.shared import EMPTY, target, unequal_batch

NAME = "fcos_scales:resnet10t,channels=8-16-32-64,stem=8,neck=32,levels=3-5,convs=1"


def built(more=""):
    torch.manual_seed(0)
    return build_detector(NAME + more, ["a", "b", "c"])


def test_points_lie_in_the_middle_of_their_cells():
    prediction = built()(unequal_batch()).prediction
    centers = (prediction.priors_xyxy[0, :, :2] + prediction.priors_xyxy[0, :, 2:]) / 2
    strides = torch.tensor([8.0, 16.0, 32.0])[prediction.levels]
    expected = (prediction.cells.flip(1) + 0.5) * strides[:, None]
    assert torch.equal(centers, expected)


@pytest.mark.parametrize("form", ["relu", "exp"])
def test_distances_of_both_forms(form):
    """A constant output x with the scales 1, 2, 3: relu gives x scale strides, exp gives exp(x scale) pixels."""
    detector = built(f",distances={form}")
    head = detector.model.head.regression_head
    with torch.no_grad():
        head.bbox_reg.weight.zero_()
        head.bbox_reg.bias.copy_(torch.tensor([0.5, -0.5, 1.0, 0.25]))
        for number, scale in enumerate(head.scales):
            scale.fill_(number + 1.0)
        prediction = detector(unequal_batch()).prediction
    strides = torch.tensor([8.0, 16.0, 32.0])[prediction.levels]
    raw = torch.tensor([0.5, -0.5, 1.0, 0.25]) * (prediction.levels + 1)[:, None]
    pixels = raw.exp() if form == "exp" else raw.clamp(min=0) * strides[:, None]
    points = ((prediction.priors_xyxy[0, :, :2] + prediction.priors_xyxy[0, :, 2:]) / 2).repeat(1, 2)
    expected = points + pixels * torch.tensor([-1.0, -1.0, 1.0, 1.0])
    torch.testing.assert_close(prediction.boxes_xyxy[0], expected, rtol=1e-6, atol=1e-4)


def test_the_centerness_reads_the_tower_that_the_option_names():
    batch, changed = unequal_batch(), {}
    for tower in ("boxes", "classes"):
        detector = built(f",centerness={tower}").eval()
        with torch.no_grad():
            before = detector(batch).prediction.quality
            for side in (detector.model.head.classification_head, detector.model.head.regression_head):
                kept = side.conv[0][0].weight.clone()
                side.conv[0][0].weight.mul_(-1)
                changed[tower, side] = not torch.equal(detector(batch).prediction.quality, before)
                side.conv[0][0].weight.copy_(kept)
    assert list(changed.values()) == [False, True, True, False]


def test_assignment_is_centre_sampling_without_padding():
    """Box 20..60: on the finest level, points (8 i + 4) within 12 pixels of (40, 40); the padding of an image is ignored."""
    batch = unequal_batch((target([[20, 20, 60, 60]], [0]), *EMPTY[1:]))
    detector = built()
    prediction = detector(batch).prediction
    matched = detector.assign(prediction, batch).matched
    index = torch.nonzero(matched[0] == 0).flatten()
    points = (prediction.priors_xyxy[0, index, :2] + prediction.priors_xyxy[0, index, 2:]) / 2
    assert prediction.levels[index].unique().tolist() == [0]
    assert sorted(map(tuple, points.tolist())) == [(x, y) for x in (36.0, 44.0) for y in (36.0, 44.0)]
    assert torch.equal(matched[1:] == -2, ~detector.valid(prediction, batch)[1:])


def test_losses_by_hand():
    batch = unequal_batch((target([[20, 20, 60, 60]], [1]), *EMPTY[1:]))
    detector = built().train()
    prediction = detector(batch).prediction
    assignment = detector.assign(prediction, batch)
    losses = detector.loss(prediction, batch).terms
    positive, valid = assignment.matched >= 0, assignment.matched != -2
    wanted = torch.zeros_like(prediction.logits)
    wanted[..., 1][positive] = 1
    focal = sigmoid_focal_loss(prediction.logits, wanted)[valid].sum()
    points = (prediction.priors_xyxy[positive][:, :2] + prediction.priors_xyxy[positive][:, 2:]) / 2
    left, top, right, bottom = (points - 20).unbind(1)[0], (points - 20).unbind(1)[1], 60 - points[:, 0], 60 - points[:, 1]
    central = (
        torch.minimum(left, right) / torch.maximum(left, right) * torch.minimum(top, bottom) / torch.maximum(top, bottom)
    ).sqrt()
    boxes = torch.tensor([[20.0, 20, 60, 60]]).expand(len(points), 4)
    overlap = generalized_box_iou_loss(prediction.boxes_xyxy[positive], boxes)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(prediction.quality[positive], central, reduction="sum")
    # the numbers of positives of the images are 4, 0 and 0, and each image counts at least 1 (see number_of_positives)
    count = 6
    torch.testing.assert_close(losses["classification"], focal / count, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["bbox_regression"], (overlap * central).sum() / central.sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["centerness"], entropy / count, rtol=1e-5, atol=0)


def test_a_given_assignment_is_used():
    batch, detector = unequal_batch(), built().train()
    prediction = detector(batch).prediction
    nothing = Assignment(torch.full_like(detector.assign(prediction, batch).matched, -1), normalizer=torch.tensor(2.0))
    losses = detector.loss(prediction, batch, nothing).terms
    assert float(losses["bbox_regression"].detach()) == float(losses["centerness"].detach()) == 0
    focal = sigmoid_focal_loss(prediction.logits, torch.zeros_like(prediction.logits)).sum()
    torch.testing.assert_close(losses["classification"], focal / 2, rtol=1e-5, atol=0)
