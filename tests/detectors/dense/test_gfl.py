import pytest
import torch

from detdistill.functional.focal import distribution_mean
from tests.detectors.dense import own as own_dense
from tests.golden import Golden, assert_golden

OUTPUTS = {"cls": "cls_logits", "reg": "bbox_regression"}
TERMS = {"cls": "classification", "bbox": "bbox_regression", "dfl": "distribution"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_and_gradients_equal_the_released_code(dtype):
    golden = Golden("_gfl")
    detector, prediction, batch, leaves = golden_prediction(golden, dtype)
    detector.beta = golden.meta["beta"]
    own_dense.assert_golden_losses(detector, prediction, batch, leaves, golden, TERMS, dtype)


def golden_prediction(golden, dtype):
    return own_dense.golden_prediction("gfl", golden, OUTPUTS, dtype, ["reg_max"])


def test_boxes_are_the_means_of_the_sides():
    golden = Golden("_gfl")
    _, prediction, batch, _ = golden_prediction(golden, torch.float64)
    strides = golden["in_strides"].double()
    for level, expected in enumerate(golden.levels("out_integral")):
        mine = prediction.levels == level
        centers = prediction.priors_xyxy[:, mine].view(len(batch), -1, 2, 2).mean(dim=2)
        boxes = prediction.boxes_xyxy[:, mine]
        sides = torch.cat([centers - boxes[..., :2], boxes[..., 2:] - centers], dim=-1) / strides[level]
        assert_golden(sides.flatten(0, 1), expected)


def test_deltas_are_distributions_and_quality_is_none():
    detector, batch = own_dense.fresh("gfl"), own_dense.unequal_batch()
    prediction = detector(batch).prediction
    assert prediction.deltas.shape == (*prediction.logits.shape[:2], 4 * 17)
    assert prediction.quality is None
    means = distribution_mean(prediction.deltas, 17)
    torch.testing.assert_close(means, torch.full_like(means, 8.0), rtol=0, atol=1.0)  # flat at the beginning
    boxes = prediction.boxes_xyxy[0, 0]
    torch.testing.assert_close(boxes, torch.tensor([-64.0, -64.0, 64.0, 64.0]), rtol=0, atol=8.0)


def test_quality_of_the_box_is_the_class_target():
    """The classification loss of a positive is least where the score equals its box's IoU."""
    detector, batch = own_dense.fresh("gfl"), own_dense.equal_batch()
    prediction = detector(batch).prediction
    assignment = detector.assign(prediction, batch)
    positives = detector.positives(prediction, assignment, batch)
    values = detector.loss_values(prediction, batch, assignment)["classification"]
    (gradient,) = torch.autograd.grad(values.sum(), prediction.logits)
    own = gradient[positives.image, positives.index, positives.labels]
    assert bool((own < 0).all())  # scores of 0.01 are below every IoU
    assert bool((gradient.sum(dim=(0, 1)) != 0).all())
    (none,) = torch.autograd.grad(values.sum(), prediction.deltas, allow_unused=True)
    assert none is None or not none.any()  # the IoU is a target, not a path for gradients


def test_detections_equal_the_models():
    own_dense.assert_detections_equal_the_models("gfl")


@pytest.mark.parametrize(
    "check",
    [
        own_dense.assert_towers_resume,
        own_dense.assert_copies_stand_alone,
        own_dense.assert_foreign_assignments_are_honoured,
        own_dense.assert_a_positive_outside_its_box_is_finite,
        own_dense.assert_no_boxes_are_no_trouble,
        own_dense.assert_padding_takes_no_part,
        own_dense.assert_a_batch_equals_its_images,
        own_dense.assert_mixed_precision,
        own_dense.assert_positives_are_differentiable,
        own_dense.assert_heads_are_inherited_by_class,
    ],
)
def test_contract(check):
    check("gfl")
