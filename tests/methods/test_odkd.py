import math
from dataclasses import replace

import pytest
import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.losses import odkd_box_loss, odkd_class_loss, odkd_hint_loss, odkd_worse
from detdistill.methods.odkd import ODKD
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Clock, Dense
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method, without_boxes
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

CLOCK = Clock(5, 10)


# --------------------------------------------------------------------------------------------- against third-party code


def test_class_values_and_gradients_equal_the_third_party_code():
    golden = Golden("odkd")
    settings = golden.meta["hyperparameters"]
    student = golden["in_student_logits"].requires_grad_()
    soft = odkd_class_loss(student, golden["in_teacher_logits"], settings["T"], background_weight=1.0)
    assert_golden(soft, golden["out_soft"])
    total = settings["mu"] * golden["in_hard_cls"] + (1 - settings["mu"]) * soft
    assert_golden(total, golden["out_cls"])
    total.backward()
    assert_golden(student.grad, golden["grad_student_logits"])


def test_box_values_and_gradients_equal_the_third_party_code():
    golden = Golden("odkd")
    settings = golden.meta["hyperparameters"]
    student = golden["in_student_deltas"].requires_grad_()
    teacher, target = golden["in_teacher_deltas"], golden["in_target_deltas"]
    assert torch.equal(odkd_worse(student, teacher, target, settings["margin"]), golden["out_active"])
    bounded = odkd_box_loss(student, teacher, target, settings["margin"])
    assert_golden(bounded, golden["out_bounded"])
    total = golden["in_smooth_l1"] + settings["nu"] * bounded
    assert_golden(total, golden["out_reg"])
    total.backward()
    assert_golden(student.grad, golden["grad_student_deltas"])
    for name, deltas in (("student", golden["in_student_deltas"]), ("teacher", teacher)):
        assert_golden((deltas - target).square().sum(dim=1).mean(), golden[f"out_{name}_error_mean"])


# ------------------------------------------------------------------------------------------------------- invariants


def rows(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_logits_have_the_teachers_entropy_and_no_gradient():
    logits = rows(0, 9, 5).requires_grad_()
    loss = odkd_class_loss(logits, logits.detach(), background_weight=1.0)
    p = logits.detach().softmax(dim=1)
    assert float(loss.detach()) == pytest.approx(float(-(p * p.log()).sum(dim=1).mean()), rel=1e-12)
    (slope,) = torch.autograd.grad(loss, logits)
    assert float(slope.abs().max()) < 1e-15
    (slope,) = torch.autograd.grad(odkd_class_loss(logits, logits.detach()), logits)
    assert float(slope.abs().max()) > 1e-3


def test_the_background_counts_half_as_much_again():
    student, teacher = rows(0, 9, 5), rows(1, 9, 5)
    more = odkd_class_loss(student, teacher) - odkd_class_loss(student, teacher, background_weight=1.0)
    of_background = -(teacher.softmax(dim=1) * student.log_softmax(dim=1))[:, -1]
    assert float(more) == pytest.approx(0.5 * float(of_background.mean()), rel=1e-10)
    assert float(odkd_class_loss(student + 3, teacher - rows(2, 9, 1))) == pytest.approx(float(odkd_class_loss(student, teacher)))


def test_a_sigmoid_is_a_pair_of_object_and_background():
    student, teacher = rows(0, 9, 1), rows(1, 9, 1)
    pairs = [torch.cat([logits, torch.zeros_like(logits)], dim=1) for logits in (student, teacher)]
    for temperature in (1.0, 2.0):
        expected = float(odkd_class_loss(*pairs, temperature))
        assert float(odkd_class_loss(student, teacher, temperature, softmax=False)) == pytest.approx(expected, rel=1e-12)
    confident = odkd_class_loss(torch.tensor([[-300.0]]), torch.tensor([[300.0]]), softmax=False)
    assert float(confident) == pytest.approx(300.0)


def test_the_teacher_switches_the_penalty_on_and_off():
    target = torch.zeros(1, 4, dtype=torch.float64)
    good, bad = target + 0.1, (target + 0.2)
    for student, teacher, margin, wanted in (
        (good, bad, 0.0, 0.0),
        (bad, good, 0.0, 0.16),
        (good, good, 0.0, 0.0),
        (good, good, 0.01, 0.04),
        (good, target, 0.0, 0.04),
        (good, bad, 0.2, 0.04),
    ):
        mine = student.clone().requires_grad_()
        fixed, truth = teacher.clone().requires_grad_(), target.clone().requires_grad_()
        loss = odkd_box_loss(mine, fixed, truth, margin)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(wanted)
        assert bool(mine.grad.any()) is (wanted > 0)
        assert fixed.grad is None
        assert truth.grad is None
    both = odkd_box_loss(torch.cat([good, bad]), torch.cat([bad, good]), torch.cat([target, target]))
    assert float(both) == pytest.approx(0.08)  # regions that are switched off count


def test_nothing_to_compare_is_zero_and_connected():
    logits, deltas = torch.zeros(0, 5, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
    total = odkd_class_loss(logits, logits.detach()) + odkd_box_loss(deltas, deltas.detach(), deltas.detach())
    total.backward()
    assert float(total.detach()) == 0.0
    assert logits.grad.shape == (0, 5)


def test_hints_are_means_or_sums():
    student, teacher = rows(0, 2, 3, 4, 4), rows(1, 2, 3, 4, 4)
    gap = student - teacher
    wanted = {("l2", "mean"): gap.square().mean(), ("l1", "mean"): gap.abs().mean(), ("l2", "batch"): gap.square().sum() / 2}
    for (norm, reduction), value in wanted.items():
        loss = odkd_hint_loss([student, student], [teacher, student], norm, reduction)
        assert float(loss) == pytest.approx(float(value) / 2, rel=1e-12)  # the mean over levels
    assert float(odkd_hint_loss([torch.full((1, 1, 2, 2), 3.0)], [torch.ones(1, 1, 4, 6)])) == pytest.approx(4.0)


# ---------------------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize(
    ("settings", "count"),
    [({"mu_end": 0.2, "nu_end": 1.0, "box_norm": "sampled"}, 2), ({"rcn_weight": 0.0, "mix_hard": False, "hint": "backbone"}, 4)],
)
def test_contract(settings, count):
    checked = check_method(ODKD, **settings)
    assert len(checked) == count
    assert "regions 16 -> regions 8" in checked
    assert ("dense 8 -> dense 8" in checked) == (count == 4)


def test_hints_alone_serve_any_pair():
    student, method = build(TinyDense(seed=2), TinyQueries(seed=1), rcn_weight=0.0, rpn_weight=0.0)
    batch = tiny_batch(2)
    assert list(method.learn(student, student(batch), method.teach(batch), batch, CLOCK).terms) == ["odkd_hint"]


def build(student=None, teacher=None, **settings):
    torch.manual_seed(0)
    student = student or TinyRegions(seed=2)
    return student, ODKD(Teacher(teacher or TinyRegions(seed=1)), student, **settings)


def learn(batch, clock=CLOCK, student=None, teacher=None, **settings):
    student, method = build(student, teacher, **settings)
    return method.learn(student, student(batch), method.teach(batch), batch, clock)


def test_the_detectors_class_loss_counts_mu_in_total():
    batch = tiny_batch(3)
    student, method = build(hint_weight=0.0, nu=0.0, mu=0.2, rpn_weight=0.0)
    losses = method.step(student, batch, method.teach(batch), CLOCK)
    assert list(losses.distilled) == ["odkd_rcn_class"]
    method.mix_hard = False
    soft = method.step(student, batch, method.teach(batch), CLOCK).terms["odkd_rcn_class"]
    total = losses.terms["cls"] + losses.terms["odkd_rcn_class"]
    torch.testing.assert_close(total, 0.2 * losses.terms["cls"] + soft)


def test_the_first_stage_is_compared_on_its_own_sample():
    batch = tiny_batch(2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student, teacher = (build_detector(f"faster_rcnn:{TINY.format(8)}", ["a", "b"]) for _ in range(2))
        student, method = build(student.train(), teacher, hint_weight=0.0, nu=0.0, mu=0.25, rcn_weight=0.0)
        losses = method.step(student, batch, method.teach(batch), CLOCK)
        method.mix_hard = False
        torch.manual_seed(1)
        seen = student(batch)
        soft = method.learn(student, seen, method.teach(batch), batch, CLOCK).terms["odkd_rpn_class"]
        method.mix_hard = True
        mixed = method.learn(student, seen, method.teach(batch), batch, CLOCK).terms["odkd_rpn_class"]
        hard = student.loss(seen.prediction, batch).terms["loss_objectness"]
    torch.testing.assert_close(mixed + 0.75 * hard, soft)
    assert math.isfinite(float(losses.total().detach()))


def test_boxes_are_bounded_on_the_students_positives():
    batch = tiny_batch(3)
    student, method = build(hint_weight=0.0, mu=1.0, rpn_weight=0.0)
    seen, taught = student(batch), method.teach(batch)
    losses = method.learn(student, seen, taught, batch, CLOCK)
    positives = student.positives(seen.prediction, student.assign(seen.prediction, batch), batch)
    theirs = method.teacher.predict_regions(seen.prediction, taught.features, batch)
    worse, error = [], []
    for row, label, target in zip(positives.index, positives.labels, positives.targets_xyxy, strict=True):
        corner, opposite = seen.prediction.boxes_xyxy[row].split(2)
        both = []
        for boxes in (seen.prediction.refined_xyxy[row, label], theirs.refined_xyxy[row, label]):
            moved = 10 * ((boxes[:2] + boxes[2:]) - (target[:2] + target[2:])) / 2 / (opposite - corner)
            grown = 5 * ((boxes[2:] - boxes[:2]).clamp(min=1e-6) / (target[2:] - target[:2])).log()
            both.append(moved.square().sum() + grown.square().sum())
        worse.append(bool(both[0] > both[1]))
        error.append(both[0] if worse[-1] else 0 * both[0])
    assert len(worse) > 2
    assert float(losses.terms["odkd_rcn_box"].detach()) == pytest.approx(0.5 * float(sum(error).detach()) / len(error), rel=1e-4)
    assert float(losses.monitors["rcn_worse"]) == pytest.approx(sum(worse) / len(worse))
    sampled = learn(batch, hint_weight=0.0, mu=1.0, rpn_weight=0.0, box_norm="sampled").terms["odkd_rcn_box"]
    ratio = len(worse) / len(seen.prediction.boxes_xyxy)
    assert float(sampled.detach()) == pytest.approx(float(losses.terms["odkd_rcn_box"].detach()) * ratio, rel=1e-4)


def test_an_equal_teacher_switches_no_box_on():
    losses = learn(tiny_batch(3), student=TinyRegions(seed=1), mu=1.0, hint_weight=0.0)
    assert [float(term.detach()) for term in losses.terms.values()] == [0.0, 0.0]


def test_shares_change_linearly():
    batch = tiny_batch(2)
    start, end = (
        float(learn(batch, clock, mu=1.0, mu_end=0.0).terms["odkd_rcn_class"].detach()) for clock in (Clock(0, 4), Clock(4, 4))
    )
    half = float(learn(batch, Clock(2, 4), mu=1.0, mu_end=0.0).terms["odkd_rcn_class"].detach())
    assert start == 0.0
    assert half == pytest.approx(end / 2, rel=1e-5)
    nothing = float(learn(batch, Clock(0, 4), nu=0.0, nu_end=1.0).terms["odkd_rcn_box"].detach())
    assert nothing == 0.0


def test_the_hint_reaches_features_and_adapters_only():
    student, method = build(rcn_weight=0.0, rpn_weight=0.0)
    batch = tiny_batch(2)
    method.learn(student, student(batch), method.teach(batch), batch, CLOCK).total().backward()
    assert all(p.grad is not None for p in method.adapters.parameters())
    assert student.levels.convs[0].weight.grad is not None
    assert all(p.grad is None for module in student.parts().head for p in module.parameters())


def test_no_boxes_leave_the_background():
    losses = learn(without_boxes(tiny_batch(2), range(2)))
    assert float(losses.terms["odkd_rcn_box"].detach()) == 0.0
    assert float(losses.terms["odkd_rpn_box"].detach()) == 0.0
    assert float(losses.terms["odkd_rcn_class"].detach()) != 0.0


def test_regions_without_area_and_no_regions_are_finite():
    student, method = build(hint_weight=0.0)
    batch = tiny_batch(2)
    target = replace(batch.targets[0], boxes_xyxy=batch.targets[0].boxes_xyxy[:, [0, 1, 0, 1]])
    batch = batch.with_targets([target, batch.targets[1]])
    seen, taught = student(batch), method.teach(batch)
    flat = replace(seen.prediction, boxes_xyxy=seen.prediction.boxes_xyxy[:, [0, 1, 0, 1]])
    for prediction in (flat, replace(seen.prediction.rows(torch.arange(0)), first=seen.prediction.first)):
        student.zero_grad()
        losses = method.learn(student, replace(seen, prediction=prediction), taught, batch, CLOCK)
        losses.total().backward(retain_graph=True)
        assert math.isfinite(float(losses.total().detach()))
        assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_predictions_are_paired_by_stride_and_class_name():
    batch, student = tiny_batch(2), TinyDense(seed=2)
    teacher = TinyDense(classes=("b", "c", "a"), channels=(8, 8, 8), strides=(4, 8, 16), seed=1)
    student, method = build(student, teacher, rcn_weight=0.0, hint_weight=0.0, nu=0.0)
    seen, taught = student(batch), method.teach(batch)
    term = method.learn(student, seen, taught, batch, CLOCK).terms["odkd_rpn_class"]
    dense = taught.first
    assert isinstance(dense, Dense)
    theirs = dense.logits[:, dense.levels > 0][..., [2, 0]]
    expected = odkd_class_loss(seen.prediction.logits.flatten(0, 1), theirs.flatten(0, 1), softmax=False)
    assert float(term.detach()) == pytest.approx(0.5 * float(expected.detach()), rel=1e-5)


TINY = "resnet10t,channels=8-16-32-64,stem=8,neck={},mlp=16,proposals=20,rois=16"


def test_every_pair_of_two_stage_detectors_learns():
    batch = tiny_batch(2)
    names = ("faster_rcnn", "cascade_rcnn")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teachers = [Teacher(build_detector(f"{name}:{TINY.format(16)}", ["b", "c", "a"])) for name in names]
        students = [build_detector(f"{name}:{TINY.format(8)}", ["a", "b"]) for name in names]
        for teacher in teachers:
            for student in students:
                method = ODKD(teacher, student.train())
                losses = method.step(student, batch, method.teach(batch), CLOCK)
                assert math.isfinite(float(losses.total().detach()))
                assert len(losses.distilled) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mu": 1.5}, "mu=1.5 is not a number from 0 to 1"),
        ({"temperature": 0.0}, "temperature=0.0 is not a number above 0"),
        ({"margin": -1.0}, "margin=-1.0 is not a number, 0 or more"),
        ({"hint": "fpn"}, "hint=fpn is not one of neck, backbone"),
        (
            {"rpn_weight": 0.0, "rcn_weight": 0.0, "hint_weight": 0.0},
            "rpn_weight, rcn_weight, hint_weight are all 0; nothing would be distilled",
        ),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(DetdistillError) as error:
        build(**settings)
    assert str(error.value) == f"odkd: {message}"


def test_refused_pairs_are_told_why():
    fewer = TinyRegions(classes=("a",), seed=1)
    refused = [
        ({"teacher": fewer}, "odkd: it compares class scores, but the teacher does not know b"),
        ({"student": TinyDense()}, "the student tinydense:patches predicts dense; it needs a student that predicts regions"),
        ({"student": TinyDense(), "rcn_weight": 0.0}, "sigmoid"),
        ({"teacher": TinyRegions(channels=(8,), strides=(8,))}, "it compares predictions cell by cell"),
        ({"student": TinyDense(), "teacher": TinyDense(classes=("a",)), "rcn_weight": 0.0}, "the teacher does not know b"),
    ]
    for settings, message in refused:
        with pytest.raises(PairError) as error:
            build(**settings)
        assert message in str(error.value)
    build(teacher=fewer, rcn_weight=0.0)  # objectness has no classes
