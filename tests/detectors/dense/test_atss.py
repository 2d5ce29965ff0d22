import pytest
import torch

from detdistill.errors import ModelError
from tests.detectors.dense import own as own_dense
from tests.golden import Golden

OUTPUTS = {"cls": "cls_logits", "reg": "bbox_regression", "centerness": "bbox_ctrness"}
TERMS = {"cls": "classification", "bbox": "bbox_regression", "centerness": "centerness"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_and_gradients_equal_the_released_code(dtype):
    golden = Golden("_atss")
    detector, prediction, batch, leaves = own_dense.golden_prediction("atss", golden, OUTPUTS, dtype)
    assert torch.equal(prediction.priors_xyxy[0], golden["out_anchors"].to(dtype))
    matched = detector.assign(prediction, batch).matched
    for image in range(len(batch)):
        assert torch.equal(matched[image], golden[f"out_assigned_gt_{image}"] - 1)
    own_dense.assert_golden_losses(detector, prediction, batch, leaves, golden, TERMS, dtype)


def test_decoding_by_hand():
    detector = own_dense.fresh("atss")
    anchor = torch.tensor([[[0.0, 0.0, 64.0, 64.0]]])
    still = detector.decode(torch.zeros(1, 1, 4), anchor, torch.zeros(1, dtype=torch.int64))
    assert still.tolist() == anchor.tolist()
    moved = detector.decode(torch.tensor([[[5.0, -5.0, 0.0, 0.0]]]), anchor, torch.zeros(1, dtype=torch.int64))
    assert moved.tolist() == [[[32.0, -32.0, 96.0, 32.0]]]
    large = detector.decode(torch.tensor([[[0.0, 0.0, 1000.0, -1000.0]]]), anchor, torch.zeros(1, dtype=torch.int64))
    width, height = (large[0, 0, 2:] - large[0, 0, :2]).tolist()
    assert (width, height) == pytest.approx((64 * 62.5, 64 / 62.5))


def test_centerness_multiplies_after_the_threshold():
    detector, batch = own_dense.spread_out("atss"), own_dense.unequal_batch()
    detector.model.head.regression_head.bbox_ctrness.bias.data -= 3.0
    with torch.no_grad():
        found = detector.detect(detector(batch).prediction, batch)
    assert all(len(one) > 5 for one in found)
    assert min(float(one.scores.min()) for one in found) < detector.model.score_thresh


def test_structure():
    detector = own_dense.fresh("atss", options="resnet10t,channels=8-16-32-64,stem=8,neck=48,convs=1")
    assert detector.spec.strides == (8, 16, 32, 64, 128)
    assert detector.spec.channels == (48,) * 5
    assert not detector.spec.softmax
    assert detector.model.head.classification_head.conv[0][1].num_groups == 16  # 32 does not divide 48
    names = dict(detector.model.head.named_parameters())
    assert names["classification_head.cls_logits.weight"].shape == (3, 48, 3, 3)
    assert names["regression_head.bbox_reg.weight"].shape == (4, 48, 3, 3)
    assert names["regression_head.bbox_ctrness.weight"].shape == (1, 48, 3, 3)
    assert "classification_head.conv.0.0.bias" not in names
    assert sum(name.startswith("regression_head.scales") for name in names) == 5
    levels = list(detector.model.backbone(torch.rand(1, 3, 128, 128)).values())
    p7 = detector.model.backbone.fpn.extra_blocks.p7
    assert torch.equal(levels[4], p7(levels[3]))  # no ReLU between P6 and P7


def test_scales_are_of_their_level():
    detector, batch = own_dense.fresh("atss"), own_dense.unequal_batch()
    before = detector(batch).prediction
    detector.model.head.regression_head.scales[1].data.fill_(2.0)
    after = detector(batch).prediction
    middle = before.levels == 1
    torch.testing.assert_close(after.deltas[:, middle], 2 * before.deltas[:, middle])
    assert torch.equal(after.deltas[:, ~middle], before.deltas[:, ~middle])
    assert torch.equal(after.quality, before.quality)


def test_options_that_make_no_sense():
    with pytest.raises(ModelError, match="atss has no option 'rois'"):
        own_dense.fresh("atss", options="resnet10t,rois=5")


def test_the_model_is_for_inference_only():
    detector = own_dense.fresh("atss").train()
    with pytest.raises(RuntimeError, match=r"ATSS is for inference only; call \.eval\(\)"):
        detector.model([torch.rand(3, 64, 64)])


def test_detections_equal_the_models():
    own_dense.assert_detections_equal_the_models("atss")


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
    check("atss")
