import dataclasses

import pytest
import torch

from detdistill.functional.boxes import paired_iou
from detdistill.losses import ssd_det_bag, ssd_det_focal, ssd_det_merge, ssd_det_random_boxes
from detdistill.methods.shared.needs import PairError
from detdistill.methods.ssd_det import Refiner, SSDDet, Weights
from detdistill.structures import Batch, Clock, Features, Target, View
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method, run_stage, without_boxes
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

NOW = Clock(3, 10)

# ------------------------------------------------------------------------------------------------------------- golden


def rows(golden, prefix):
    found = []
    while f"{prefix}_{len(found)}" in golden:
        found.append(golden[f"{prefix}_{len(found)}"])
    return found


def released(golden):
    """The refiner of the file, its features and the result of the file's boxes."""
    meta, parameters = golden.meta, golden.parameters("param_")
    student = [level.requires_grad_() for level in golden.levels("in_student")]
    labels = [label.reshape(-1) for label in rows(golden, "in_labels_from0")]
    refiner = Refiner(
        len(parameters["cls2_bias"]),
        student[0].shape[1],
        width=len(parameters["fc1_bias"]),
        pooled=meta["roi_size"],
        base=meta["finest_scale"],
        ratios=meta["base_ratios"],
        shift=meta["shake"][0],
        topk=meta["topk"],
        negative_iou=meta["iou_negative"],
        weights=Weights(**meta["weights"]),
    )
    refiner.load_state_dict({".".join(name.rsplit("_", 1)): tensor for name, tensor in parameters.items()})
    size = torch.tensor([meta["image_size_hw"]] * len(labels))
    boxes = [some.reshape(-1, 4) for some in rows(golden, "in_boxes")]
    features = Features(tuple(student), tuple(meta["strides"]))
    return refiner, student, refiner(features, boxes, labels, size, rows(golden, "in_negative_boxes"))


@pytest.fixture(scope="module")
def golden():
    return Golden("ssd_det")


@pytest.fixture(scope="module")
def result(golden):
    return released(golden)


def test_boxes_equal_the_released_code(golden, result):
    _, _, found = result
    for bag, name in zip(found.bags, ("out_bag", "out_bag_after_position", "out_bag_stage2"), strict=True):
        assert_golden(bag.flatten(0, 1), torch.cat(rows(golden, name)))
    assert torch.equal(found.valid.flatten(), torch.cat(rows(golden, "out_bag_valid")).flatten().bool())
    assert_golden(found.first_xyxy, torch.cat(rows(golden, "out_refined_stage1")))
    assert_golden(found.boxes_xyxy, torch.cat(rows(golden, "out_refined_stage2")))


def test_scores_equal_the_released_code(golden, result):
    _, _, found = result
    assert_golden(found.scores[0], golden["out_bag_score_stage1"])
    assert_golden(found.scores[1], golden["out_bag_score_stage2"])
    assert_golden(found.identity, golden["out_identity_score"])


def test_losses_and_gradients_equal_the_released_code(golden, result):
    _, student, found = result
    for name, term in found.losses.items():
        assert_golden(term, golden[f"out_loss_{name}"])
    total = torch.stack(list(found.losses.values())).sum()
    assert_golden(total, golden["out_total"])
    gradients = torch.autograd.grad(total, student, retain_graph=True)
    for actual, expected in zip(gradients, golden.levels("grad_student"), strict=True):
        assert_golden(actual, expected)
    for name, term in found.losses.items():
        reached = torch.autograd.grad(term, student, retain_graph=True, allow_unused=True)
        assert any(gradient is not None and bool(gradient.any()) for gradient in reached), name
    assert not found.boxes_xyxy.requires_grad
    assert not found.first_xyxy.requires_grad
    assert not found.scores[0].requires_grad


def test_negatives_equal_the_released_code(golden, result):
    refiner, _, found = result
    bags = found.bags[2].split([len(some) for some in rows(golden, "in_boxes")])
    pairs = zip(rows(golden, "in_negative_boxes"), bags, rows(golden, "out_negative_valid"), strict=True)
    for boxes, own, expected in pairs:
        assert torch.equal(refiner.negative(boxes, own.flatten(0, 1)), expected.bool())


# ------------------------------------------------------------------------------------------------------------ functions


def test_bag_begins_with_the_box_and_has_125():
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 5.0, 5.0]])
    bag = ssd_det_bag(boxes)
    assert bag.shape == (2, 125, 4)
    torch.testing.assert_close(bag[:, 0], boxes)
    torch.testing.assert_close(bag[0, 1], torch.tensor([6.0, 20.0, 26.0, 60.0]))  # left by a fifth of its width
    torch.testing.assert_close(bag[0, 5], torch.tensor([10.0, 16.0, 30.0, 64.0]))  # the height changes first
    assert ssd_det_bag(boxes[:0]).shape == (0, 125, 4)


def test_merged_box_lies_between_the_best():
    generator = torch.Generator().manual_seed(0)
    boxes, scores = torch.rand(6, 30, 4, generator=generator), torch.rand(6, 30, generator=generator)
    merged = ssd_det_merge(boxes, scores, 7)
    best = boxes.gather(1, scores.topk(7).indices[..., None].expand(-1, -1, 4))
    assert bool((merged >= best.amin(dim=1) - 1e-6).all())
    assert bool((merged <= best.amax(dim=1) + 1e-6).all())
    same = boxes[:, :1].expand(-1, 30, -1)
    torch.testing.assert_close(ssd_det_merge(same, scores), boxes[:, 0])
    torch.testing.assert_close(ssd_det_merge(boxes[:, :3], 0 * scores[:, :3]), boxes[:, :3].mean(dim=1))


def test_focal_is_finite_at_the_ends_and_zero_where_right():
    p = torch.tensor([0.0, 1.0, 0.5, 1.0], requires_grad=True)
    loss = ssd_det_focal(p, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    loss.sum().backward()
    torch.testing.assert_close(loss[:3].detach(), torch.tensor([0.0, 0.0, 0.25 * 0.693145]), rtol=1e-4, atol=1e-6)
    assert float(loss[3].detach()) == pytest.approx(13.8, abs=0.1)
    assert bool(torch.isfinite(p.grad).all())


def test_random_boxes_lie_around_the_image():
    boxes = ssd_det_random_boxes((40, 100), 300, torch.Generator().manual_seed(0))
    assert boxes.shape == (300, 4)
    assert bool((boxes[:, 2:] >= boxes[:, :2]).all())
    assert float(boxes[:, 0].min()) >= -20
    assert float(boxes[:, 2].max()) <= 120
    assert float(boxes[:, 3].max()) <= 48
    assert torch.equal(boxes, ssd_det_random_boxes((40, 100), 300, torch.Generator().manual_seed(0)))


# ----------------------------------------------------------------------------------------------------------- the method

SMALL = {"width": 8, "pooled": 2, "negatives": 20}


def build(student=None, **options):
    torch.manual_seed(0)
    student = student or TinyDense(seed=2)
    return SSDDet(None, student, **{**SMALL, **options}), student


def relabelled(method, student, batch, clock=NOW):
    return method.relabel(student, student.features(batch), batch, clock)


def test_contract():
    assert check_method(SSDDet, **SMALL) == ["dense 8", "regions 8", "queries 8"]


def test_a_student_with_levels_of_several_widths_is_refused():
    with pytest.raises(PairError, match=r"ssd_det: the levels of the student tinydense:patches have \(8, 16\) channels"):
        SSDDet(None, TinyDense(channels=(8, 16)))


def test_untrained_positions_return_the_bag():
    method, student = build()
    with torch.no_grad():
        for layer in (method.refiner.position1, method.refiner.position2):
            layer.weight.zero_()
    batch = tiny_batch(2)
    found = method.refiner(
        student.features(batch),
        [target.boxes_xyxy for target in batch.targets],
        [target.labels for target in batch.targets],
        batch.sizes,
        method.random_boxes(batch, NOW),
    )
    torch.testing.assert_close(found.bags[1], found.bags[0])
    torch.testing.assert_close(found.bags[2], found.bags[0])
    assert bool(((found.scores[0] >= 0) & (found.scores[0] <= 1)).all())


@pytest.mark.parametrize("kind", [TinyDense, TinyRegions, TinyQueries])
def test_the_detector_is_trained_on_the_refined_boxes(kind):
    method, student = build(kind(seed=2))
    batch = tiny_batch(3)
    changed, losses = relabelled(method, student, batch)
    step = method.step(student, batch, None, NOW)
    prediction = student.predict(student.features(batch), changed)
    own = student.loss(prediction, changed).terms
    for name, term in own.items():
        torch.testing.assert_close(step.terms[name], (1.0 if name == "rpn_box" else 4.0) * term)
    assert step.distilled == set(losses.terms) == {"position_1", "mil_1", "position_2", "mil_2", "negative", "identity"}
    for old, new in zip(batch.targets, changed.targets, strict=True):
        assert torch.equal(old.labels, new.labels)
        assert not torch.equal(old.boxes_xyxy, new.boxes_xyxy)
        assert float(paired_iou(old.boxes_xyxy, new.boxes_xyxy).min()) > 0.5  # an untrained refiner stays near


def test_every_term_reaches_the_features():
    method, student = build()
    _, losses = relabelled(method, student, tiny_batch(3))
    for name, term in losses.terms.items():
        gradients = torch.autograd.grad(
            term, [conv.weight for conv in student.levels.convs], retain_graph=True, allow_unused=True
        )
        assert any(gradient is not None and bool(gradient.any()) for gradient in gradients), name


def test_weights_of_zero_leave_terms_out():
    method, student = build(position_weight=0.0, identity_weight=0.0, mil_1_weight=0.0, detector_weight=0.0)
    losses = method.step(student, tiny_batch(2), None, NOW)
    assert set(losses.terms) == {"mil_2", "negative"}


@pytest.mark.parametrize("options", [{"with_identity": False}, {"resample_stage2": True}, {"topk": 200}])
def test_variants(options):
    method, student = build(**options)
    losses = run_stage(method.stages(student)[0], student, method, tiny_batch(2))
    assert ("identity" in losses.terms) == options.get("with_identity", True)
    assert all(p.grad is not None for p in method.parameters())
    assert bool(torch.isfinite(losses.total().detach()))


def test_the_order_of_objects_does_not_matter():
    method, student = build()
    batch = tiny_batch(3)
    turned = batch.with_targets([Target(t.boxes_xyxy.flip(0), t.labels.flip(0), t.crowd.flip(0)) for t in batch.targets])
    (first, losses), (second, others) = (relabelled(method, student, one) for one in (batch, turned))
    for mine, theirs in zip(first.targets, second.targets, strict=True):
        torch.testing.assert_close(mine.boxes_xyxy, theirs.boxes_xyxy.flip(0), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(losses.total(), others.total(), rtol=1e-4, atol=1e-4)


def test_an_image_is_refined_as_if_alone():
    method, student = build()
    batch = tiny_batch(3)
    whole, _ = relabelled(method, student, batch)
    for image in range(3):
        alone, _ = relabelled(method, student, batch._on_canvas([image], batch.padding_hw))
        torch.testing.assert_close(alone.targets[0].boxes_xyxy, whole.targets[image].boxes_xyxy, rtol=1e-4, atol=1e-3)


def test_crowds_and_images_without_boxes_stay():
    method, student = build()
    batch = without_boxes(tiny_batch(3), range(1))
    target = batch.targets[2]
    crowd = torch.zeros_like(target.crowd)
    crowd[0] = True
    batch = batch.with_targets([*batch.targets[:2], dataclasses.replace(target, crowd=crowd)])
    changed, losses = relabelled(method, student, batch)
    assert len(changed.targets[0]) == 0
    assert torch.equal(changed.targets[2].boxes_xyxy[0], target.boxes_xyxy[0])
    assert bool(torch.isfinite(losses.total().detach()))


def test_a_batch_without_objects_trains_the_detector_only():
    method, student = build()
    batch = tiny_batch(2, boxes=False)
    changed, losses = relabelled(method, student, batch)
    assert changed is batch
    assert {name: float(term.detach()) for name, term in losses.terms.items()} == {"refiner": 0.0}
    run_stage(method.stages(student)[0], student, method, batch, NOW)
    assert all(not p.grad.any() for p in method.parameters())
    assert bool(student.head.logits.weight.grad.any())


AWKWARD = {
    "whole": torch.tensor([[0.0, 0.0, 64.0, 64.0]]),
    "border": torch.tensor([[-8.0, 0.0, 3.0, 64.0], [60.0, 60.0, 64.0, 70.0]]),
    "outside": torch.tensor([[70.0, 70.0, 90.0, 90.0]]),
    "flat": torch.tensor([[5.0, 5.0, 5.0, 9.0], [3.0, 3.0, 3.0, 3.0]]),
}


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("strides", [(8, 16), (64, 128)], ids=["cells", "one cell"])
def test_awkward_boxes_are_finite(name, strides):
    method, student = build(TinyDense(strides=strides, seed=2) if strides[0] == 8 else TinyDense(strides=(32, 64), seed=2))
    boxes = AWKWARD[name]
    target = Target(boxes, torch.zeros(len(boxes), dtype=torch.int64), torch.zeros(len(boxes), dtype=torch.bool))
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    batch = Batch(image, torch.tensor([[64, 64]]), (target,), (1,), (View((64, 64), (64, 64)),))
    changed, _ = relabelled(method, student, batch)
    assert bool(torch.isfinite(changed.targets[0].boxes_xyxy).all())
    losses = run_stage(method.stages(student)[0], student, method, batch, NOW)
    assert all(bool(torch.isfinite(term.detach())) for term in losses.terms.values())
    assert all(bool(torch.isfinite(p.grad).all()) for p in (*student.parameters(), *method.parameters()) if p.grad is not None)


def test_an_invalid_box_is_not_merged():
    """Boxes of the neighbourhood that lie outside the image do not take part in stage 1."""
    method, student = build()
    boxes = torch.tensor([[0.0, 20.0, 12.0, 40.0]])
    batch = tiny_batch(1)
    batch = batch.with_targets([Target(boxes, torch.tensor([0]), torch.tensor([False]))])
    found = method.refiner(student.features(batch), [boxes], [torch.tensor([0])], batch.sizes, method.random_boxes(batch, NOW))
    assert 7 < int(found.valid.sum()) < 125
    kept = found.bags[1][found.valid]
    assert float(found.first_xyxy[0, 0]) >= float(kept[:, 0].min().clamp(min=0)) - 1e-4


def test_background_differs_between_steps_and_not_between_calls():
    method, _ = build()
    batch = tiny_batch(2)
    first, again = method.random_boxes(batch, NOW), method.random_boxes(batch, NOW)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, again, strict=True))
    assert not torch.equal(first[0], method.random_boxes(batch, Clock(4, 10))[0])


def test_levels_beyond_stride_32_are_not_pooled():
    method, _ = build(TinyDense(channels=(8,) * 4, strides=(16, 32, 64, 128)))
    assert method.levels == [0, 1]
    assert method.refiner.base == 14 * 16
    assert build(TinyDense(strides=(64, 128)))[0].levels == [0]
