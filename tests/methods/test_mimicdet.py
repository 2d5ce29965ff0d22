import functools
import math
from dataclasses import replace

import pytest
import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import PREDICTION
from detdistill.errors import DetdistillError
from detdistill.losses import mimicdet_loss
from detdistill.methods.mimicdet import MimicDet
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Clock, Origin, Target
from tests.methods.contract_checks import check_method, without_boxes
from tests.tiny import TinyDense, TinyRegions, tiny_batch

CLOCK = Clock(5, 10)


def rows(seed, count=6, width=5):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- invariants


def test_the_value_equals_an_independent_formulation():
    mine, theirs = rows(0).requires_grad_(), rows(1)
    loss = mimicdet_loss(mine, theirs, 0.7)
    by_hand = 0.0
    for first, second in zip(mine.tolist(), theirs.tolist(), strict=True):
        product = sum(x * y for x, y in zip(first, second, strict=True))
        by_hand += 1 - product / math.hypot(*first) / math.hypot(*second)
    assert float(loss.detach()) == pytest.approx(0.7 * by_hand / len(mine), rel=1e-9)
    loss.backward()
    # gradient of -cos: the part of the other unit vector across the own one, divided by the own length
    length = mine.detach().norm(dim=1, keepdim=True)
    unit, other = mine.detach() / length, theirs / theirs.norm(dim=1, keepdim=True)
    expected = -0.7 / len(mine) * (other - (other * unit).sum(dim=1, keepdim=True) * unit) / length
    torch.testing.assert_close(mine.grad, expected, rtol=1e-9, atol=1e-12)


def test_equal_features_give_zero_and_opposite_ones_two():
    assert float(mimicdet_loss(rows(0), rows(0))) == pytest.approx(0, abs=1e-12)
    assert float(mimicdet_loss(rows(0), -rows(0))) == pytest.approx(2)
    assert 0 <= float(mimicdet_loss(rows(0), rows(1))) <= 2


def test_the_length_of_a_row_and_copies_of_all_boxes_change_nothing():
    mine, theirs = rows(0), rows(1)
    expected = float(mimicdet_loss(mine, theirs))
    scale = torch.rand(6, 1, dtype=torch.float64) + 0.1
    assert float(mimicdet_loss(scale * mine, 3 * theirs)) == pytest.approx(expected, rel=1e-12)
    assert float(mimicdet_loss(mine.repeat(2, 1), theirs.repeat(2, 1))) == pytest.approx(expected, rel=1e-12)


def test_no_box_is_zero_with_a_zero_gradient():
    mine = rows(0).requires_grad_()
    loss = mimicdet_loss(mine[:0], rows(1)[:0])
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not mine.grad.any()


def test_rows_of_zeros_have_no_gradient():
    mine, theirs = rows(0), rows(1)
    mine[0], theirs[1] = 0, 0
    mine.requires_grad_(), theirs.requires_grad_()
    mimicdet_loss(mine, theirs, detach_teacher=False).backward()
    for gradient in (mine.grad, theirs.grad):
        assert torch.isfinite(gradient).all()
        assert not gradient[:2].any()
        assert gradient[2:].abs().max() < 10


def test_the_teacher_gets_a_gradient_only_if_asked():
    theirs = rows(1).requires_grad_()
    mine = rows(0).requires_grad_()
    mimicdet_loss(mine, theirs).backward()
    assert theirs.grad is None
    mimicdet_loss(mine, theirs, detach_teacher=False).backward()
    assert theirs.grad.any()


# ---------------------------------------------------------------------------------------------------------- the method


def test_contract():
    assert check_method(MimicDet, width=16) == ["dense 8"]


def build(student=None, **settings):
    torch.manual_seed(0)
    student = student or TinyDense(seed=2)
    return student, MimicDet(None, student, **{"width": 16, **settings})


def learn(method, student, batch):
    torch.manual_seed(1)
    seen = student(batch, PREDICTION | method.requirements.student)
    return method.learn(student, seen, None, batch, CLOCK)


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_reach_head_neck_and_backbone(detach):
    student, method = build(detach_teacher=detach)
    terms = learn(method, student, tiny_batch(2)).terms
    assert list(terms) == ["mimicdet_regions", "mimicdet_class", "mimicdet_box"]

    def reached(term, module):
        parameters = list(module.parameters())
        found = torch.autograd.grad(terms[term], parameters, retain_graph=True, allow_unused=True)
        return any(gradient is not None and bool(gradient.any()) for gradient in found)

    for term in terms:
        assert reached(term, student.levels)
        assert reached(term, student.backbone)
        assert reached(term, method.region_head) == (term == "mimicdet_regions" or not detach)
        assert reached(term, student.head.classification) == (term == "mimicdet_class")
        assert reached(term, student.head.regression) == (term == "mimicdet_box")


def test_weights_scale_the_terms():
    batch = tiny_batch(2)
    student, method = build()
    plain = learn(method, student, batch).terms
    student, method = build(class_weight=3.0, box_weight=0.0, region_weight=0.5)
    found = learn(method, student, batch).terms
    assert list(found) == ["mimicdet_regions", "mimicdet_class"]
    assert float(found["mimicdet_regions"].detach()) == pytest.approx(0.5 * float(plain["mimicdet_regions"].detach()), rel=1e-5)
    student, method = build(class_weight=3.0)
    scaled = float(learn(method, student, batch).terms["mimicdet_class"].detach())
    assert scaled == pytest.approx(3 * float(plain["mimicdet_class"].detach()), rel=1e-5)


def test_boxes_without_a_cell_are_not_compared_and_the_others_at_most_as_asked():
    student, method = build()
    batch = tiny_batch(2)
    origin = Origin(
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([0, -1, 1, 0]),
        torch.zeros(4, 2, dtype=torch.int64),
        torch.tensor([0, -1, 0, 0]),
        torch.tensor([-1, 0, -1, -1]),
    )
    assert method._chosen(origin, 2).tolist() == [0, 2, 3]
    student, method = build(max_mimic=2)
    assert float(learn(method, student, batch).monitors["mimicked"]) == 2.0
    student, method = build(max_mimic=100000, regions_per_image=100000)
    assert 2 < float(learn(method, student, batch).monitors["mimicked"]) < 100


def test_boxes_are_pooled_from_the_level_below_their_own():
    batch, losses = tiny_batch(2), []
    for staggered in (True, False):
        student, method = build(TinyDense(channels=(8, 8, 8), strides=(8, 16, 32), seed=2), staggered=staggered)
        losses.append(learn(method, student, batch).terms["mimicdet_class"])
    assert not torch.equal(*losses)


def test_the_student_is_exported_alone():
    student, method = build()
    assert set(student.state_dict()) == set(TinyDense().state_dict())
    assert not {id(p) for p in method.parameters()} & {id(p) for p in student.parameters()}


def test_an_image_counts_by_its_boxes():
    """With as many boxes in each image, the loss of a batch is the mean over the images alone."""
    batch = replace(tiny_batch(2), sizes=torch.full((2, 2), 64))
    batch = batch.with_targets([batch.targets[0]] * 2)
    student, method = build(regions_per_image=1000, nms=1.0)
    whole = learn(method, student, batch).terms
    alone = [learn(method, student, batch._on_canvas([image], (64, 64))).terms for image in range(2)]
    for name, value in whole.items():
        mean = sum(float(terms[name].detach()) for terms in alone) / 2
        assert float(value.detach()) == pytest.approx(mean, rel=1e-5)


@functools.cache
def bad_batches():
    batch = tiny_batch(2)
    plain = Target(torch.tensor([[0.0, 0.0, 64.0, 64.0]]), torch.tensor([0]), torch.tensor([False]))
    border = replace(plain, boxes_xyxy=torch.tensor([[-4.0, 10.0, 6.0, 80.0]]))
    flat = replace(plain, boxes_xyxy=torch.tensor([[9.0, 9.0, 9.0, 20.0]]))
    crowd = replace(plain, crowd=torch.tensor([True]))
    pairs = [(plain, border), (flat, plain), (crowd, flat)]
    return [without_boxes(batch, range(2)), without_boxes(batch, range(1)), *map(batch.with_targets, pairs)]


@pytest.mark.parametrize("strides", [(8, 16), (8, 64)])
def test_bad_boxes_and_a_level_of_one_cell_are_finite(strides):
    student, method = build(TinyDense(strides=strides, seed=2))
    for batch in bad_batches():
        losses = learn(method, student, batch)
        losses.total().backward()
        assert all(math.isfinite(float(term.detach())) for term in losses.terms.values())
        for parameter in (*student.parameters(), *method.parameters()):
            assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all())


def test_no_surviving_proposal_is_zero():
    student, method = build()
    batch = without_boxes(tiny_batch(2), range(2))
    seen = student(batch, PREDICTION | method.requirements.student)
    point = replace(seen.prediction, boxes_xyxy=torch.full_like(seen.prediction.boxes_xyxy, 7.0))
    losses = method.learn(student, replace(seen, prediction=point), None, batch, CLOCK)
    assert [float(term.detach()) for term in losses.terms.values()] == [0.0, 0.0, 0.0]
    losses.total().backward()


def test_several_anchors_of_a_cell_have_their_own_adapters():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        name = "retinanet:resnet10t,channels=8-16-32-64,stem=8,neck=32,levels=3-5,convs=1"
        student = build_detector(name, ["a", "b"]).train()
    student, method = build(student)
    assert method.class_adapter.layer.out_features == 9 * 16
    losses = learn(method, student, tiny_batch(2))
    losses.total().backward()
    assert all(float(term.detach()) > 0 for term in losses.terms.values())
    assert all(parameter.grad is not None for parameter in method.parameters())
    student, method = build(student, decouple_anchors=False)
    assert method.class_adapter.layer.out_features == 16
    assert math.isfinite(float(learn(method, student, tiny_batch(2)).total().detach()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_weight": -1.0}, "class_weight=-1.0 is not a number, 0 or more"),
        ({"class_weight": 0.0, "box_weight": 0.0}, "class_weight, box_weight are all 0; nothing would be distilled"),
        ({"region_weight": 0.0}, "region_weight=0 leaves the region head untrained, and it is the only teacher here"),
        ({"tower_depth": 9}, "it looks at the towers of the student tinydense:patches after 9 blocks, but they have 2"),
        ({"positive_iou": 2.0}, "positive_iou=2.0 is not a number from 0 to 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(DetdistillError) as error:
        build(**settings)
    assert str(error.value).startswith(f"mimicdet: {message}")


def test_refused_students_are_told_why():
    uneven = TinyDense()
    uneven.spec = replace(uneven.spec, channels=(8, 12))
    for student, message in (
        (TinyRegions(), "the student tinyregions:patches predicts regions; it needs a student that predicts dense"),
        (uneven, "take a student whose neck has equal channels"),
    ):
        with pytest.raises(PairError) as error:
            build(student)
        assert message in str(error.value)
