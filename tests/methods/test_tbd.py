from dataclasses import replace

import pytest
import torch

from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.boxes import paired_iou
from detdistill.functional.masks import overlap_mask, score_mask
from detdistill.methods.shared.contract import teach_by_canvas
from detdistill.methods.shared.needs import PairError
from detdistill.methods.tbd import TBD, TaskQuality, tbd_feature_loss, tbd_harmony, tbd_harmony_loss, tbd_task_weights
from detdistill.structures import Clock, Target
from tests.methods.contract_checks import check_method
from tests.tiny import TinyDense, TinyRegions, tiny_batch

# No code was released, so there are no golden values: the functions are compared with values computed by hand.


@pytest.mark.parametrize("form", ["both", "product", "gap"])
def test_harmony_is_one_only_for_perfect_predictions_and_has_finite_gradients(form):
    grid = torch.linspace(0, 1, 11, dtype=torch.float64)
    scores, overlaps = torch.cartesian_prod(grid, grid).unbind(1)
    scores.requires_grad_(), overlaps.requires_grad_()
    harmony = tbd_harmony(scores, overlaps, form)
    found = harmony.detach()
    assert 0 <= float(found.min()) <= float(found.max()) <= 1 + 1e-12
    perfect = torch.isclose(found, torch.ones_like(found), atol=1e-9)
    assert bool(perfect[-1])
    if form != "gap":
        assert int(perfect.sum()) == 1
        assert float(found[(scores == 0) | (overlaps == 0)].max()) < 1e-5
    harmony.sum().backward()
    assert bool(torch.isfinite(scores.grad).all())
    assert bool(torch.isfinite(overlaps.grad).all())


def test_harmony_loss_by_hand_and_its_weights():
    student, teacher = torch.tensor([0.5, 0.1]).requires_grad_(), torch.tensor([0.8, 0.2]).requires_grad_()
    loss = tbd_harmony_loss(student, teacher)
    assert loss.item() == pytest.approx((0.8 * 0.3 + 0.2 * 0.1) / 1.0)
    loss.backward()
    assert student.grad.tolist() == pytest.approx([-0.8, -0.2])  # the harmonious prediction counts more
    assert teacher.grad is None
    assert tbd_harmony_loss(teacher, teacher).item() == 0.0


def test_no_positives_give_zero_connected_to_the_graph():
    student = torch.zeros(0, requires_grad=True)
    loss = tbd_harmony_loss(student, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.shape == (0,)


def test_task_weights_by_hand():
    student = TaskQuality(torch.tensor([0.5, 0.7, 0.3]), torch.tensor([0.5, 0.5, 0.9]))
    teacher = TaskQuality(torch.tensor([0.8, 0.8, 0.3]), torch.tensor([0.6, 0.5, 0.9]))
    image = torch.tensor([0, 0, 2])
    classes, boxes = tbd_task_weights(student, teacher, image, 4)
    # Image 0: mean errors 0.2 and 0.05; image 1 and 3 have no positives, image 2 no errors.
    assert classes.tolist() == pytest.approx([1.6, 1.0, 1.0, 1.0], abs=1e-5)
    assert (classes + boxes).tolist() == pytest.approx([2.0] * 4)
    swapped = tbd_task_weights(TaskQuality(*student[::-1]), TaskQuality(*teacher[::-1]), image, 4)
    assert torch.equal(swapped[0], boxes)
    assert torch.equal(swapped[1], classes)


def maps(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_full_masks_give_twice_the_mean_squared_error():
    student, teacher = maps(0, 2, 5, 4, 6), maps(1, 2, 5, 4, 6)
    full, one = torch.ones(2, 4, 6, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    loss = tbd_feature_loss(student, teacher, full, full, one, one)
    assert loss.item() == pytest.approx(2 * (student - teacher).square().mean().item(), rel=1e-12)


def test_each_task_has_its_mask_and_an_empty_mask_gives_zero():
    student, teacher = maps(2, 1, 5, 4, 6).requires_grad_(), maps(3, 1, 5, 4, 6).requires_grad_()
    classes, boxes = torch.zeros(2, 1, 4, 6, dtype=torch.float64)
    classes[0, 1, 2], classes[0, 3, 3] = 0.75, 0.25
    error = (student - teacher).square().mean(dim=1)[0].detach()
    weights = torch.tensor([1.5], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    loss = tbd_feature_loss(student, teacher, classes, boxes, *weights)
    assert loss.item() == pytest.approx(1.5 * (0.75 * error[1, 2] + 0.25 * error[3, 3]).item(), rel=1e-12)
    loss.backward()
    assert teacher.grad is None
    assert torch.equal((student.grad != 0).any(dim=1), classes > 0)
    assert tbd_feature_loss(student, student.detach(), classes, boxes, *weights).item() == 0.0


# ----------------------------------------------------------------------------------------------------------------- method


def learned(batch, student=None, teacher=None, **settings):
    torch.manual_seed(0)
    student = student or TinyDense()
    method = TBD(Teacher(teacher or TinyDense(channels=(12, 12), seed=1)), student, **settings)
    return method.learn(student, student(batch), teach_by_canvas(method, batch), batch, Clock(5, 10)).terms


def test_terms_by_hand():
    batch, student, teacher = tiny_batch(1), TinyDense(), TinyDense(seed=1)
    seen, taught = student(batch), teacher(batch)
    terms = learned(batch, student, teacher, harmony_weight=3.0, feature_weight=0.5)
    target, matched = batch.targets[0], student.assign(seen.prediction, batch).matched[0]
    index = torch.nonzero(matched >= 0).flatten()
    found = matched[index]
    sides = [
        TaskQuality(
            side.prediction.logits[0, index, target.labels[found]].sigmoid(),
            paired_iou(side.prediction.boxes_xyxy[0, index], target.boxes_xyxy[found]),
        )
        for side in (seen, taught)
    ]
    expected = 3.0 * tbd_harmony_loss(*(tbd_harmony(*side) for side in sides))
    assert terms["tbd_harmony"].item() == pytest.approx(expected.item(), rel=1e-5)
    weights = tbd_task_weights(*sides, torch.zeros_like(index), 1)
    expected = torch.zeros(())
    for level in range(2):
        masks = score_mask(taught.prediction, level), overlap_mask(taught.prediction, level, [target.boxes_xyxy])
        expected = expected + tbd_feature_loss(seen.features.maps[level], taught.features.maps[level], *masks, *weights)
    assert terms["tbd_feature"].item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    fixed = learned(batch, student, teacher, balance="fixed")["tbd_feature"].item()
    assert fixed != pytest.approx(2 * terms["tbd_feature"].item(), rel=1e-4)


def test_an_equal_student_has_no_loss():
    terms = learned(tiny_batch(3), TinyDense(seed=1), TinyDense(seed=1))
    assert {name: term.item() for name, term in terms.items()} == {"tbd_harmony": 0.0, "tbd_feature": 0.0}


def test_harmony_reaches_positives_and_features_reach_the_neck():
    batch, student = tiny_batch(1), TinyDense()
    method = TBD(Teacher(TinyDense(seed=1)), student)
    seen = student(batch)
    logits, boxes = (value.detach().requires_grad_() for value in (seen.prediction.logits, seen.prediction.boxes_xyxy))
    maps_of = tuple(level.detach().requires_grad_() for level in seen.features.maps)
    leaves = replace(
        seen,
        prediction=replace(seen.prediction, logits=logits, boxes_xyxy=boxes),
        features=replace(seen.features, maps=maps_of),
    )
    terms = method.learn(student, leaves, method.teach(batch), batch, Clock(0, 1)).terms
    terms["tbd_harmony"].backward(retain_graph=True)
    positive = student.assign(seen.prediction, batch).matched >= 0
    for tensor in (logits, boxes):
        assert bool((tensor.grad != 0).any(dim=-1)[positive].any())
        assert not bool((tensor.grad != 0).any(dim=-1)[~positive].any())
    assert all(level.grad is None for level in maps_of)
    before = logits.grad.clone()
    terms["tbd_feature"].backward()
    assert torch.equal(logits.grad, before)
    assert all(float(level.grad.abs().max()) > 0 for level in maps_of)


def test_classes_are_matched_by_name():
    plain, turned = TinyDense(("a", "b"), seed=1), TinyDense(("b", "a"), seed=1)
    with torch.no_grad():
        turned.head.logits.weight.copy_(plain.head.logits.weight.flip(0))
        turned.head.logits.bias.copy_(plain.head.logits.bias.flip(0))
    found = [learned(tiny_batch(), teacher=teacher) for teacher in (plain, turned)]
    assert [term.item() for term in found[0].values()] == pytest.approx([term.item() for term in found[1].values()])


def test_threshold_and_warm_up():
    batch = tiny_batch()
    assert learned(batch, threshold=1.0)["tbd_feature"].item() < learned(batch)["tbd_feature"].item()
    half, full = (learned(batch, warm_up=steps)["tbd_harmony"].item() for steps in (10, 0))
    assert half == pytest.approx(full / 2)
    assert set(learned(batch, harmony_weight=0.0)) == {"tbd_feature"}
    assert set(learned(batch, feature_weight=0.0)) == {"tbd_harmony"}


def test_images_without_boxes_keep_the_mask_of_classes():
    terms = learned(tiny_batch(boxes=False))
    assert terms["tbd_harmony"].item() == 0.0
    assert terms["tbd_harmony"].requires_grad
    assert terms["tbd_feature"].item() > 0


def test_bad_input_is_finite():
    whole, point, outside = [0.0, 0.0, 64.0, 64.0], [10.0, 10.0, 10.0, 10.0], [-20.0, 50.0, 80.0, 64.0]
    coarse = {"channels": (8, 8, 8), "strides": (8, 16, 64)}
    for boxes, levels in (([whole], {}), ([point], {}), ([whole, point, outside], coarse)):
        target = Target(torch.tensor(boxes), torch.zeros(len(boxes)).long(), torch.zeros(len(boxes)).bool())
        student = TinyDense(**levels)
        terms = learned(tiny_batch(1).with_targets([target]), student, TinyDense(seed=1, **levels))
        assert all(bool(torch.isfinite(term)) for term in terms.values())
        sum(terms.values()).backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)


def test_padded_cells_do_not_count():
    batch, student = tiny_batch(2), TinyDense()
    method = TBD(Teacher(TinyDense(seed=1)), student)
    seen, taught = student(batch), method.teach(batch)
    assert taught.features.padding is not None
    noisy = [level + 9.0 * mask[:, None] for level, mask in zip(seen.features.maps, taught.features.padding, strict=True)]
    other = replace(seen, features=replace(seen.features, maps=tuple(noisy)))
    terms, again = (method.learn(student, one, taught, batch, Clock(0, 1)).terms for one in (seen, other))
    assert terms["tbd_feature"].item() == again["tbd_feature"].item() > 0
    apart = replace(batch, canvases_hw=((64, 64), (48, 64)))
    assert all(bool(torch.isfinite(term)) for term in learned(apart).values())


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (TinyRegions, "the student tinyregions:patches predicts regions; it needs a student that predicts dense"),
        (
            lambda: TinyDense(strides=(8, 32)),
            "it compares predictions cell by cell, but the student tinydense:patches has strides",
        ),
    ],
)
def test_pairs_that_cannot_be_used_are_refused(student, message):
    with pytest.raises(PairError) as error:
        TBD(Teacher(TinyDense()), student())
    assert str(error.value).startswith(f"tbd: {message}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 2.0}, "threshold=2.0 is not a number from 0 to 1"),
        ({"harmony": "sum"}, "harmony=sum is not one of both, product, gap"),
        (
            {"harmony_weight": 0.0, "feature_weight": 0.0},
            "harmony_weight, feature_weight are all 0; nothing would be distilled",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(DetdistillError) as error:
        TBD(Teacher(TinyDense()), TinyDense(), **settings)
    assert str(error.value).startswith(f"tbd: {message}")


def test_contract():
    assert check_method(TBD) == ["dense 8 -> dense 8", "dense 16 -> dense 8"]
