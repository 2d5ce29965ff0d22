import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from detdistill.functional.boxes import paired_giou, paired_iou
from detdistill.functional.counting import EPSILON
from tests.detectors.dense import own as own_dense
from tests.detectors.dense.shared import SIZES, library_images, unequal_batch
from tests.golden import Golden, assert_golden

NAMES = {"cls": "cls_logits", "reg": "bbox_regression", "iou": "bbox_ctrness"}


class OneSide:
    """A file with arrays of two networks, seen as a file of one of them."""

    def __init__(self, golden, side):
        self.golden, self.side, self.meta = golden, side, golden.meta

    def __getitem__(self, name):
        return self.golden[name]

    def levels(self, prefix):
        return self.golden.levels(prefix if prefix in ("in_boxes", "in_labels") else f"{prefix}_{self.side}")


def golden_prediction(golden, side, dtype=torch.float64):
    return own_dense.golden_prediction("paa", OneSide(golden, side), NAMES, dtype)


@pytest.mark.parametrize("name", ["lad", "lad_solad"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_anchors_and_assignment_equal_the_released_code(name, dtype):
    golden = Golden(name)
    detector, prediction, batch, _ = golden_prediction(golden, "teacher", dtype)
    assert torch.equal(prediction.priors_xyxy[0], golden["out_anchors"].to(dtype))
    if "out_labels" in golden:
        matched = detector.assign(prediction, batch).matched
        labels = [torch.cat([target.labels, torch.tensor([golden.meta["num_classes"]])]) for target in batch.targets]
        assert torch.equal(torch.stack([mine[row] for mine, row in zip(labels, matched, strict=True)]), golden["out_labels"])


def test_losses_by_hand():
    golden = Golden("lad")
    detector, prediction, batch, _ = golden_prediction(golden, "student")
    assignment = detector.assign(prediction, batch)
    positives = detector.positives(prediction, assignment, batch)
    overlaps = paired_iou(positives.boxes_xyxy, positives.targets_xyxy).detach()
    boxes = 1.3 * ((1 - paired_giou(positives.boxes_xyxy, positives.targets_xyxy)) * overlaps).sum() / overlaps.sum()
    quality = prediction.quality[positives.image, positives.index]
    entropy = 0.5 * F.binary_cross_entropy_with_logits(quality, overlaps)
    found = detector.loss(prediction, batch).terms
    torch.testing.assert_close(found["bbox_regression"], boxes, rtol=1e-6, atol=0)
    torch.testing.assert_close(found["iou"], entropy, rtol=1e-6, atol=0)
    assert found.keys() == {"classification", "bbox_regression", "iou"}


def test_the_losses_of_the_released_lad_are_those_of_paa_without_the_weight():
    """Classes and the IoU branch: the same formulas, under the labels of the teacher."""
    golden = Golden("lad")
    teacher, theirs, batch, _ = golden_prediction(golden, "teacher")
    student, prediction, _, _ = golden_prediction(golden, "student")
    found = student.loss(prediction, batch, teacher.assign(theirs, batch)).terms
    assert_golden(found["classification"], golden["out_loss_cls"])
    assert_golden(found["iou"], golden["out_loss_iou"])


def test_other_predictions_are_assigned_otherwise():
    detector, batch = own_dense.spread_out("paa"), own_dense.equal_batch()
    prediction = detector(batch).prediction
    before = detector.assign(prediction, batch).matched
    prediction.logits.data[:, ::2] += 3.0
    assert not torch.equal(detector.assign(prediction, batch).matched, before)


def test_no_positive_anywhere():
    """Boxes that only one anchor of one level could take have no positives; the loss is finite."""
    detector, batch = own_dense.spread_out("paa"), own_dense.equal_batch(1)
    prediction = detector(batch).prediction
    assignment = detector.assign(prediction, batch)
    nobody = type(assignment)(assignment.matched.clamp(max=-1))
    losses = detector.loss(prediction, batch, nobody)
    losses.total().backward()
    assert float(losses.terms["bbox_regression"].detach()) == float(losses.terms["iou"].detach()) == 0
    ignored = detector.loss(detector(batch).prediction, batch, type(assignment)(torch.full_like(assignment.matched, -2)))
    assert float(ignored.total().detach()) == 0
    ignored.total().backward()


def test_divisors():
    """Classes are divided by at least one positive per image."""
    detector, batch = own_dense.spread_out("paa"), own_dense.equal_batch(2)
    prediction = detector(batch).prediction
    matched = torch.full(prediction.logits.shape[:2], -1)
    matched[0, 3] = 0
    values = detector.loss_values(prediction, batch, type(detector.assign(prediction, batch))(matched))
    score = prediction.logits[1].sigmoid()
    focal = (0.75 * score**2 * F.softplus(prediction.logits[1])).sum(dim=1)
    torch.testing.assert_close(values["classification"][1], focal / (2 + EPSILON))


def test_detections_equal_the_models_and_a_slow_selection():
    detector, batch = own_dense.spread_out("paa"), unequal_batch()
    with torch.no_grad():
        prediction = detector(batch).prediction
        mine = detector.detect(prediction, batch)
        theirs = detector.model(library_images(batch))
    for image, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        assert len(one) > 5
        torch.testing.assert_close(one.boxes_xyxy, other["boxes"], rtol=0, atol=1e-4)
        torch.testing.assert_close(one.scores, other["scores"], rtol=0, atol=1e-6)
        assert torch.equal(one.labels, other["labels"] - 1)
        boxes, scores, labels = slow_selection(detector, prediction, image, SIZES[image])
        torch.testing.assert_close(one.boxes_xyxy, boxes, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(one.scores, scores)
        assert torch.equal(one.labels, labels)


def slow_selection(detector, prediction, image, size):
    """Boxes, scores and labels; each box moved by one vote after the other."""
    rows = []
    scores = (prediction.logits[image].sigmoid() * prediction.quality[image, :, None].sigmoid()).sqrt()
    for level in range(int(prediction.levels.max()) + 1):
        mine = []
        for index in torch.nonzero(prediction.levels == level).flatten().tolist():
            row, column = (prediction.cells[index] * 8 * 2**level).tolist()
            if row < size[0] and column < size[1]:
                mine.append((float(scores[index].max()), index))
        rows += [index for _, index in sorted(mine, reverse=True)[: detector.model.topk_candidates]]
    pairs = [(index, label) for index in rows for label in range(3) if scores[index, label] > detector.model.score_thresh]
    index, labels = (torch.tensor(part) for part in zip(*pairs, strict=True))
    boxes, values = clip_boxes_to_image(prediction.boxes_xyxy[image, index], size), scores[index, labels]
    keep = batched_nms(boxes, values, labels, 0.6)[: detector.model.detections_per_img]
    voted = []
    for kept in keep.tolist():
        overlaps = box_iou(boxes[kept][None], boxes)[0]
        voters = (labels == labels[kept]) & (overlaps > 0.01)
        weights = torch.exp(-((1 - overlaps[voters]) ** 2) / 0.025) * values[voters]
        voted.append((boxes[voters] * weights[:, None]).sum(dim=0) / weights.sum())
    return torch.stack(voted), values[keep], labels[keep]


def test_candidates_of_a_level_are_limited():
    detector, batch = own_dense.spread_out("paa"), own_dense.equal_batch()
    detector.model.topk_candidates = 3
    with torch.no_grad():
        found = detector.detect(detector(batch).prediction, batch)
    places = {(int(level), *cell.tolist()) for level, cell in zip(found[0].origin.level, found[0].origin.cell, strict=True)}
    assert 0 < len(places) <= 9


def test_padding_takes_no_part():
    detector, batch = own_dense.fresh("paa"), unequal_batch()
    prediction = detector(batch).prediction
    assignment = detector.assign(prediction, batch)
    outside = ~detector.valid(prediction, batch)
    assert torch.equal(assignment.matched == -2, outside)
    assert assignment.matched[1].unique().tolist() == [-2, -1, 1]  # the crowd box of image 1 keeps its number 0
    values = detector.loss_values(prediction, batch, assignment)
    assert all(not value[outside].any() for value in values.values())


@pytest.mark.parametrize(
    "check",
    [
        own_dense.assert_towers_resume,
        own_dense.assert_copies_stand_alone,
        own_dense.assert_foreign_assignments_are_honoured,
        own_dense.assert_a_positive_outside_its_box_is_finite,
        own_dense.assert_no_boxes_are_no_trouble,
        own_dense.assert_a_batch_equals_its_images,
        own_dense.assert_mixed_precision,
        own_dense.assert_positives_are_differentiable,
        own_dense.assert_heads_are_inherited_by_class,
    ],
)
def test_contract(check):
    check("paa")
