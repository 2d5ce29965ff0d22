from dataclasses import replace

import pytest
import torch

from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.assign import pairwise_iou
from detdistill.methods.rm_pfi import RMPFI, rm_pfi_feature_loss, rm_pfi_prediction_gap, rm_pfi_rank_loss
from detdistill.structures import Clock, Target
from tests.methods.contract_checks import check_method
from tests.tiny import TinyDense, TinyRegions, tiny_batch

NOW = Clock(0, 1)


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------- ranks


OBJECTS = torch.tensor([2, 0, 0, 1, 2, 2, 0])


def test_rank_loss_by_hand():
    student, teacher = torch.zeros(2, dtype=torch.float64, requires_grad=True), torch.tensor([1.0, 0.0]).double()
    loss = rm_pfi_rank_loss(student, teacher, torch.tensor([0, 0]), count=1)
    assert loss.item() == pytest.approx(0.110944, abs=1e-6)
    loss.backward()
    assert student.grad.tolist() == pytest.approx([0.5 - 0.731059, 0.731059 - 0.5], abs=1e-6)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_rank_loss_and_gradient_equal_a_loop_over_objects(temperature):
    student, teacher = 3 * noise(0, 7), 3 * noise(1, 7)
    mine, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = rm_pfi_rank_loss(mine, teacher, OBJECTS, 3, temperature)
    expected = torch.zeros((), dtype=torch.float64)
    for number in range(3):
        own = number == OBJECTS
        p, q = (teacher[own] / temperature).softmax(0), (other[own] / temperature).softmax(0)
        expected = expected + (p * (p / q).log()).sum() / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    loss.backward(), expected.backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_rank_loss_ignores_shifts_of_an_object_and_the_order():
    student, teacher = noise(0, 7), noise(1, 7)
    once = rm_pfi_rank_loss(student, teacher, OBJECTS, 3).item()
    shifted = student + noise(2, 3)[OBJECTS]
    assert rm_pfi_rank_loss(shifted, teacher, OBJECTS, 3).item() == pytest.approx(once, rel=1e-9)
    order = torch.tensor([3, 6, 0, 2, 5, 1, 4])
    assert rm_pfi_rank_loss(student[order], teacher[order], OBJECTS[order], 3).item() == pytest.approx(once, rel=1e-9)
    assert rm_pfi_rank_loss(teacher + 5, teacher, OBJECTS, 3).item() == pytest.approx(0.0, abs=1e-15)


def test_objects_with_one_positive_add_nothing():
    student = noise(0, 3).requires_grad_()
    loss = rm_pfi_rank_loss(student, noise(1, 3), torch.tensor([0, 1, 2]), 3)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.tolist() == [0.0, 0.0, 0.0]


def test_no_positives_give_a_zero_with_a_graph():
    student = torch.zeros(0, requires_grad=True)
    loss = rm_pfi_rank_loss(student, torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0)
    loss.backward()
    assert loss.item() == 0.0


def test_rank_loss_of_nearly_equal_and_of_extreme_scores_is_exact_in_float32():
    teacher = torch.rand(200, generator=torch.Generator().manual_seed(0))
    student = teacher + 1e-3 * torch.rand(200, generator=torch.Generator().manual_seed(1))
    objects = torch.arange(200) // 20
    exact = rm_pfi_rank_loss(student.double(), teacher.double(), objects, 10).item()
    assert rm_pfi_rank_loss(student, teacher, objects, 10).item() == pytest.approx(exact, rel=1e-3)
    extreme = torch.tensor([1e4, -1e4, 3e4]).requires_grad_()
    loss = rm_pfi_rank_loss(extreme, torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3, dtype=torch.int64), 1)
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(extreme.grad).all())


# ------------------------------------------------------------------------------------------------------------- features


def test_feature_loss_of_constants_is_their_product_whatever_the_size():
    for size in ((1, 1), (3, 7)):
        gap = torch.full((2, *size), 0.25)
        student, teacher = torch.zeros(2, 5, *size), torch.full((2, 5, *size), 3.0)
        assert rm_pfi_feature_loss([student], [teacher], [gap]).item() == pytest.approx(0.25 * 9)
        assert rm_pfi_feature_loss([student, teacher], [teacher, teacher], [gap, gap]).item() == pytest.approx(0.25 * 9 / 2)


def test_doubled_differences_quadruple_and_equal_predictions_or_features_give_zero():
    student, teacher, gap = noise(0, 2, 4, 3, 5), noise(1, 2, 4, 3, 5), noise(2, 2, 3, 5).square()
    once = rm_pfi_feature_loss([student], [teacher], [gap]).item()
    assert rm_pfi_feature_loss([2 * student - teacher], [teacher], [gap]).item() == pytest.approx(4 * once, rel=1e-12)
    assert rm_pfi_feature_loss([teacher], [teacher], [gap]).item() == 0.0
    assert rm_pfi_feature_loss([student], [teacher], [torch.zeros_like(gap)]).item() == 0.0


def test_gap_is_the_mean_over_object_classes():
    student, teacher = noise(0, 2, 6, 3), noise(1, 2, 6, 3)
    expected = (student.sigmoid() - teacher.sigmoid()).square().mean(dim=2)
    torch.testing.assert_close(rm_pfi_prediction_gap(student, teacher), expected)
    expected = (student.softmax(2) - teacher.softmax(2))[..., :2].square().mean(dim=2)
    torch.testing.assert_close(rm_pfi_prediction_gap(student, teacher, softmax=True), expected)


# -------------------------------------------------------------------------------------------------------------- method


class ManyPositives(TinyDense):
    """Every cell whose centre lies in a box is positive; of several boxes, the first."""

    def assign(self, prediction, batch):
        assignment = super().assign(prediction, batch)
        matched = assignment.matched.clone()
        centers = (prediction.priors_xyxy[..., :2] + prediction.priors_xyxy[..., 2:]) / 2
        for image, target in enumerate(batch.targets):
            for box in reversed(range(len(target))):
                x1y1, x2y2 = target.boxes_xyxy[box, :2], target.boxes_xyxy[box, 2:]
                inside = ((centers[image] > x1y1) & (centers[image] < x2y2)).all(dim=1) & ~target.crowd[box]
                matched[image, inside] = box
        return replace(assignment, matched=matched)


def built(teacher=None, student=None, **settings):
    torch.manual_seed(0)
    student = student or ManyPositives()
    return RMPFI(Teacher(teacher or TinyDense(channels=(12, 12), seed=1)), student, **settings), student


def learned(batch, autocast=False, **settings):
    method, student = built(**settings)
    taught, seen = method.teach(batch), student(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return method.learn(student, seen, taught, batch, NOW), method, student


def values(losses):
    return {name: term.item() for name, term in losses.terms.items()}


def alone(batch, image):
    names = ("images", "sizes", "targets", "ids", "views")
    return replace(batch, **{name: getattr(batch, name)[image : image + 1] for name in names})


def test_terms_equal_a_loop_over_objects_and_levels():
    batch = tiny_batch(3)
    losses, method, student = learned(batch)
    mine, theirs = student(batch).prediction, method.teach(batch).prediction
    matched = student.assign(mine, batch).matched
    found, count = {"class": 0.0, "box": 0.0}, 0
    for image, target in enumerate(batch.targets):
        for box in range(len(target)):
            own = matched[image] == box
            if not bool(own.any()):
                continue
            count += 1
            label, truth = int(target.labels[box]), target.boxes_xyxy[box : box + 1]
            scores = {
                "class": [side.logits[image, own, label].sigmoid() for side in (mine, theirs)],
                "box": [pairwise_iou(side.boxes_xyxy[image, own], truth)[:, 0] for side in (mine, theirs)],
            }
            for name, (student_scores, teacher_scores) in scores.items():
                p, q = teacher_scores.double().softmax(0), student_scores.double().softmax(0)
                found[name] += (p * (p / q).log()).sum().item()
    assert count == losses.monitors["ranked"].item() > 3
    gap = (mine.logits.sigmoid() - theirs.logits.sigmoid()).square().mean(dim=2)
    guided = 0.0
    for level, (own, fixed) in enumerate(
        zip(*method.paired_maps(student.features(batch), method.teach(batch).features), strict=True)
    ):
        weight = gap[:, mine.levels == level].view(3, *own.shape[-2:])
        guided += (weight * (own - fixed).square().mean(dim=1)).mean().item() / 2
    expected = {"rank_class": 4 * found["class"] / count, "rank_box": 4 * found["box"] / count, "guided_features": 1.5 * guided}
    assert values(losses) == pytest.approx(expected, rel=1e-4)


def test_ranks_reach_positives_only_and_guided_features_no_prediction():
    batch = tiny_batch()
    for detach, reached in ((True, False), (False, True)):
        method, student = built(detach_gaps=detach)
        seen, taught = student(batch), method.teach(batch)
        prediction = seen.prediction
        losses = method.learn(student, seen, taught, batch, NOW)
        inputs = (prediction.logits, prediction.boxes_xyxy)
        positive = student.assign(prediction, batch).matched >= 0
        for name, index in (("rank_class", 0), ("rank_box", 1)):
            gradients = torch.autograd.grad(losses.terms[name], inputs, allow_unused=True, retain_graph=True)
            assert gradients[1 - index] is None
            assert bool(gradients[index][positive].any())
            assert not bool(gradients[index][~positive].any())
        (gradient,) = torch.autograd.grad(losses.terms["guided_features"], prediction.logits, allow_unused=True)
        assert (gradient is not None) is reached


def test_equal_detectors_give_zero():
    losses, method, _ = learned(tiny_batch(), teacher=ManyPositives(seed=1), student=ManyPositives(seed=1))
    assert values(losses) == pytest.approx(dict.fromkeys(losses.terms, 0.0), abs=1e-9)
    assert not list(method.parameters())


def test_options_turn_terms_off():
    batch = tiny_batch()
    every = values(learned(batch)[0])
    for settings, names in (
        ({"rank": "class"}, ["rank_class", "guided_features"]),
        ({"rank": "box"}, ["rank_box", "guided_features"]),
        ({"rank_weight": 0.0}, ["guided_features"]),
        ({"feature_weight": 0.0}, ["rank_class", "rank_box"]),
    ):
        assert values(learned(batch, **settings)[0]) == pytest.approx({name: every[name] for name in names})
    logits = values(learned(batch, scores="logits")[0])
    assert logits["rank_class"] != every["rank_class"]
    assert logits["rank_box"] == every["rank_box"]
    assert len(list(built(TinyDense(seed=1), always_adapt=True)[0].parameters())) == 4
    assert len(list(built(feature_weight=0.0)[0].parameters())) == 0


def test_ranks_of_a_batch_are_the_mean_over_the_objects_of_its_images():
    batch = tiny_batch(3)
    together = learned(batch)[0]
    apart = [learned(alone(batch, image))[0] for image in range(3)]
    counts = [losses.monitors["ranked"].item() for losses in apart]
    for name in ("rank_class", "rank_box"):
        mean = sum(values(losses)[name] * count for losses, count in zip(apart, counts, strict=True)) / sum(counts)
        assert values(together)[name] == pytest.approx(mean, rel=1e-5)


def test_without_boxes_only_the_features_learn():
    losses, _, student = learned(tiny_batch(boxes=False))
    assert values(losses)["rank_class"] == values(losses)["rank_box"] == losses.monitors["ranked"].item() == 0.0
    assert values(losses)["guided_features"] > 0
    losses.total().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("box", [[0.0, 0.0, 64.0, 64.0], [63.0, 63.0, 64.0, 64.0], [5.0, 5.0, 5.0, 5.0]])
def test_odd_boxes(box):
    target = Target(torch.tensor([box]), torch.zeros(1).long(), torch.zeros(1).bool())
    losses, *_ = learned(tiny_batch(count=1).with_targets([target]))
    losses.total().backward()
    assert all(bool(torch.isfinite(term)) for term in losses.terms.values())


def test_crowd_boxes_are_no_objects():
    batch = tiny_batch(count=1)
    crowd = batch.with_targets([replace(batch.targets[0], crowd=torch.ones(len(batch.targets[0]), dtype=torch.bool))])
    assert values(learned(crowd)[0]) == values(learned(tiny_batch(count=1, boxes=False))[0])


def test_chosen_levels_and_classes_in_another_order():
    batch = tiny_batch()
    coarse, method, student = learned(batch, levels=(1,))
    prediction = student(batch).prediction
    assigned = student.assign(prediction, batch).matched[:, prediction.levels == 1]
    assert coarse.monitors["ranked"].item() == sum(len(set(row[row >= 0].tolist())) for row in assigned)
    assert len(method.adapters) == 1
    teacher = TinyDense(seed=1)
    reordered = TinyDense(classes=("c", "b", "a"), seed=1)
    state = teacher.state_dict()
    for name in ("head.logits.weight", "head.logits.bias"):
        state[name] = torch.cat([state[name].new_zeros(1, *state[name].shape[1:]), state[name].flip(0)])
    reordered.load_state_dict(state)
    assert values(learned(batch, teacher=reordered)[0]) == pytest.approx(values(learned(batch, teacher=teacher)[0]))


def test_half_precision_does_not_reach_the_losses():
    plain, mixed = (learned(tiny_batch(), autocast=autocast)[0].terms for autocast in (False, True))
    assert {name: term.dtype for name, term in mixed.items()} == dict.fromkeys(plain, torch.float32)
    assert all(torch.equal(mixed[name], term) for name, term in plain.items())


@pytest.mark.parametrize(
    ("teacher", "student", "settings", "message"),
    [
        (TinyDense, TinyDense, {"rank_weight": 0, "feature_weight": 0}, "rank_weight, feature_weight are all 0"),
        (TinyDense, TinyRegions, {}, "the student tinyregions:patches predicts regions; it needs a student that predicts dense"),
        (lambda seed: TinyDense(strides=(16, 32)), TinyDense, {}, "it compares predictions cell by cell, but the student"),
        (lambda seed: TinyDense(classes=("a",)), TinyDense, {}, "it compares class scores, but the teacher does not know b"),
        (TinyDense, TinyDense, {"rank": "cls"}, "rank=cls is not one of both, class, box (did you mean 'class'?)"),
    ],
)
def test_what_does_not_fit_is_refused(teacher, student, settings, message):
    with pytest.raises(DetdistillError) as error:
        built(teacher(seed=1), student(), **settings)
    assert str(error.value).startswith(f"rm_pfi: {message}")


def test_contract():
    assert check_method(RMPFI) == ["dense 8 -> dense 8", "dense 16 -> dense 8"]


def test_the_losses_fall_in_training():
    batch = tiny_batch()
    method, student = built(scores="logits")
    taught = method.teach(batch)
    optimizer = torch.optim.AdamW([*student.parameters(), *method.parameters()], lr=3e-3)
    history = []
    for _ in range(40):
        total = method.learn(student, student(batch), taught, batch, NOW).total()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    assert history[-1] < 0.5 * history[0]
