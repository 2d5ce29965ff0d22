import math
import re
from dataclasses import replace

import pytest
import torch

from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.masks import foreground_mask
from detdistill.losses import fitnet_loss, fitnet_modified_loss, fitnet_normalized_loss
from detdistill.methods.fitnet import FitNet, FitNetAttentionAdapter
from detdistill.methods.shared.align import LevelPair
from detdistill.structures import Clock
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method
from tests.tiny import TinyDense, TinyQueries, tiny_batch


@pytest.fixture
def golden():
    return Golden("fitnet")


def released(flags):
    """Our function for mmrazor's flags."""
    reduction = "dist" if flags.get("dist") else "mean" if flags.get("div_element") else "batch"
    loss = fitnet_normalized_loss if flags.get("normalize", True) else fitnet_loss
    return lambda student, teacher: loss(student, teacher, reduction=reduction)


def check_golden(golden, name, loss):
    student = [level.requires_grad_() for level in golden.levels("in_student")]
    teacher = golden.levels("in_teacher")
    for index, expected in enumerate(golden.levels(f"out_{name}")):
        assert_golden(loss([student[index]], [teacher[index]]), expected)
    total = loss(student, teacher)
    assert_golden(total, golden[f"out_{name}"])
    total.backward()
    for level, expected in zip(student, golden.levels(f"grad_student_{name}"), strict=False):
        assert_golden(level.grad, expected)


def test_every_flag_of_mmrazor_equals_the_released_code(golden):
    assert golden.meta["variants"]
    for name, flags in golden.meta["variants"].items():
        check_golden(golden, name, released(flags))


def test_united_perception_equals_the_released_code(golden):
    check_golden(golden, "up_neck_mimic", lambda s, t: fitnet_normalized_loss(s, t, mean_over_levels=True))


def test_warm_up_equals_the_released_code(golden):
    student, teacher = golden.levels("in_student"), golden.levels("in_teacher")
    names = [match for name in golden.arrays if (match := re.fullmatch(r"out_up_neck_mimic_warm_(\d+)_of_(\d+)", name))]
    for match in names:
        step, length = int(match[1]), int(match[2])
        loss = fitnet_normalized_loss(student, teacher, Clock(step, 10 * length).warm_up(length), mean_over_levels=True)
        assert_golden(loss, golden[match[0]])


def maps(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EVERYWHERE = torch.ones(2, 4, 5, dtype=torch.bool)
LOSSES = {
    "mean": lambda s, t: fitnet_loss([s], [t]),
    "batch": lambda s, t: fitnet_loss([s], [t], reduction="batch"),
    "dist": lambda s, t: fitnet_loss([s], [t], reduction="dist"),
    "normalized": lambda s, t: fitnet_normalized_loss([s], [t]),
    "modified": lambda s, t: fitnet_modified_loss([s], [t], [EVERYWHERE.repeat(len(s) // 2, 1, 1)]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_equal_maps_give_zero_and_a_finite_zero_gradient(name):
    teacher = maps(0, 2, 3, 4, 5)
    student = teacher.clone().requires_grad_()
    loss = LOSSES[name](student, teacher)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert float(student.grad.abs().max()) == 0.0


@pytest.mark.parametrize(
    ("name", "growth"), [("mean", 1), ("batch", 1), ("dist", math.sqrt(2)), ("normalized", 1), ("modified", 1)]
)
def test_duplicating_the_batch(name, growth):
    student, teacher = maps(0, 2, 3, 4, 5), maps(1, 2, 3, 4, 5)
    once = float(LOSSES[name](student, teacher))
    twice = float(LOSSES[name](student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1)))
    assert twice == pytest.approx(growth * once, rel=1e-12)


def test_only_the_normalized_form_ignores_the_scale_of_an_image():
    student, teacher = maps(0, 2, 3, 4, 5), maps(1, 2, 3, 4, 5)
    scaled = student.clone()
    scaled[1] *= 7
    assert float(LOSSES["normalized"](scaled, teacher)) == pytest.approx(float(LOSSES["normalized"](student, teacher)), rel=1e-12)
    assert float(LOSSES["mean"](scaled, teacher)) > 2 * float(LOSSES["mean"](student, teacher))


def test_normalized_is_two_minus_two_cosines():
    student, teacher = maps(0, 2, 3, 4, 5), maps(1, 2, 3, 4, 5)
    cosines = torch.nn.functional.cosine_similarity(student.flatten(1), teacher.flatten(1))
    assert float(LOSSES["normalized"](student, teacher)) == pytest.approx(float((2 - 2 * cosines).mean()), rel=1e-12)
    assert float(LOSSES["normalized"](-3 * teacher, teacher)) == pytest.approx(4.0)


def test_normalized_zero_map_is_finite():
    student = torch.zeros(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    loss = LOSSES["normalized"](student, maps(1, 2, 3, 4, 5))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1.0)
    assert float(student.grad.abs().max()) <= 2.0


def test_united_perception_is_mmrazor_divided_by_levels():
    student, teacher = [maps(0, 2, 3, 4, 5), maps(1, 2, 3, 2, 2)], [maps(2, 2, 3, 4, 5), maps(3, 2, 3, 2, 2)]
    summed = float(fitnet_normalized_loss(student, teacher))
    assert float(fitnet_normalized_loss(student, teacher, mean_over_levels=True)) == pytest.approx(summed / 2, rel=1e-12)


def test_half_is_the_papers_factor():
    student, teacher = maps(0, 2, 3, 4, 5), maps(1, 2, 3, 4, 5)
    assert float(fitnet_loss([student], [teacher], half=True)) == pytest.approx(float(LOSSES["mean"](student, teacher)) / 2)


def test_student_is_resized_to_the_teacher():
    student = torch.full((1, 2, 2, 3), 3.0, dtype=torch.float64)
    assert float(fitnet_loss([student], [torch.ones(1, 2, 4, 6, dtype=torch.float64)])) == pytest.approx(4.0)


def test_no_gradient_reaches_the_teacher():
    for loss in LOSSES.values():
        student, teacher = maps(0, 2, 3, 4, 5).requires_grad_(), maps(1, 2, 3, 4, 5).requires_grad_()
        loss(student, teacher).backward()
        assert teacher.grad is None
        assert float(student.grad.abs().max()) > 0


# ----------------------------------------------------------------------------------------------------------- modified


def test_modified_counts_foreground_cells_only():
    student, teacher = maps(0, 2, 3, 4, 5).requires_grad_(), maps(1, 2, 3, 4, 5)
    boxes = [torch.tensor([[10.0, 10.0, 19.0, 29.0]]), torch.zeros(0, 4)]  # columns 1..2, rows 1..3
    mask = foreground_mask(boxes, [(40, 50)] * 2, (4, 5))
    assert torch.nonzero(mask).tolist() == [[0, row, column] for row in (1, 2, 3) for column in (1, 2)]
    loss = fitnet_modified_loss([student], [teacher], [mask])
    inside = (student - teacher)[0, :, 1:4, 1:3].square().mean()
    assert float(loss.detach()) == pytest.approx(float(inside.detach()), rel=1e-12)
    loss.backward()
    outside = ~mask[:, None].expand_as(student)
    assert float(student.grad[outside].abs().max()) == 0.0
    changed = student.detach().masked_fill(outside, 100.0)
    assert float(fitnet_modified_loss([changed], [teacher], [mask])) == pytest.approx(float(loss.detach()), rel=1e-12)


def test_modified_without_boxes_is_zero_and_connected():
    student = maps(0, 2, 3, 4, 5).requires_grad_()
    loss = fitnet_modified_loss([student], [maps(1, 2, 3, 4, 5)], [torch.zeros_like(EVERYWHERE)])
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert float(student.grad.abs().max()) == 0.0


def test_modified_adapter_serves_different_channels_and_mixes_levels():
    torch.manual_seed(0)
    adapter = FitNetAttentionAdapter([LevelPair(0, 0, 5, 8), LevelPair(1, 1, 7, 12)], layers=1)
    levels = [torch.randn(2, 5, 4, 4), torch.randn(2, 7, 2, 2)]
    before = adapter(levels)
    assert [level.shape for level in before] == [(2, 8, 4, 4), (2, 12, 2, 2)]
    after = adapter([levels[0], levels[1] + 1])
    assert float((after[0] - before[0]).detach().abs().max()) > 1e-3
    plain = FitNetAttentionAdapter([LevelPair(0, 0, 5, 8), LevelPair(1, 1, 7, 8)], layers=0)
    assert torch.equal(plain([levels[0], levels[1] + 1])[0], plain(levels)[0])


# ------------------------------------------------------------------------------------------------------------- method


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reduction": "dist", "always_adapt": True, "warm_iters": 100},
        {"variant": "normalized", "mean_over_levels": True},
        {"variant": "modified", "attention_layers": 1},
        {"hint_share": 1.0},
    ],
)
def test_contract(settings):
    checked = check_method(FitNet, **settings)
    assert len(checked) == 18


def learn(clock=None, batch=None, **settings):
    student = TinyDense(seed=1)
    batch = batch or tiny_batch()
    method = FitNet(Teacher(TinyDense(seed=2)), student, **settings)
    return method.learn(student, student(batch), method.teach(batch), batch, clock or Clock(1, 10))


def test_weight_and_warm_up_scale_the_term():
    full = float(learn().total().detach())
    assert float(learn(weight=3.0).total().detach()) == pytest.approx(3 * full, rel=1e-6)
    assert float(learn(Clock(25, 1000), warm_iters=100).total().detach()) == pytest.approx(full / 4, rel=1e-6)
    assert float(learn(Clock(0, 1000), warm_iters=100).total().detach()) == 0.0
    assert float(learn(Clock(100, 1000), warm_iters=100).total().detach()) == pytest.approx(full, rel=1e-6)


def test_identical_detectors_agree():
    student, batch = TinyDense(seed=1), tiny_batch()
    method = FitNet(Teacher(TinyDense(seed=1)), student)
    losses = method.learn(student, student(batch), method.teach(batch), batch, Clock(0, 1))
    assert float(losses.total().detach()) == 0.0
    assert float(losses.monitors["cosine"]) == pytest.approx(1.0)


def test_modified_reads_the_boxes_and_leaves_crowds_out():
    batch = tiny_batch()
    crowd = batch.with_targets([replace(target, crowd=torch.ones_like(target.crowd)) for target in batch.targets])
    assert float(learn(batch=batch, variant="modified", attention_layers=0).total().detach()) > 0
    assert float(learn(batch=crowd, variant="modified", attention_layers=0).total().detach()) == 0.0


def test_hints_come_first_and_alone():
    student, batch = TinyDense(seed=1), tiny_batch()
    method = FitNet(Teacher(TinyDense(seed=2)), student, hint_share=0.5)
    hint, distill = method.stages(student)
    assert (hint.name, hint.share, hint.evaluates) == ("hint", 0.5, None)
    assert set(hint.step(batch, method.teach(batch), Clock(0, 1)).terms) == {"fitnet"}
    assert set(distill.step(batch, method.teach(batch), Clock(0, 1)).terms) == {"cls", "box"}
    assert len(FitNet(Teacher(TinyDense(seed=2)), student).stages(student)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "normalised"}, "variant=normalised is not one of plain, normalized, modified (did you mean 'normalized'?)"),
        ({"reduction": "sum"}, "reduction=sum is not one of mean, batch, dist, or none"),
        ({"weight": -1.0}, "weight=-1.0 is not a number, 0 or more"),
        ({"weight": math.nan}, "weight=nan is not a number, 0 or more"),
        ({"warm_iters": -1}, "warm_iters=-1 is not a whole number, 0 or more"),
        ({"variant": "modified", "reduction": "batch"}, "reduction means nothing to variant 'modified'; leave it out"),
        ({"variant": "normalized", "half": True}, "half means nothing to variant 'normalized'; leave it out"),
        ({"mean_over_levels": True}, "mean_over_levels means nothing to variant 'plain'; leave it out"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(DetdistillError) as error:
        FitNet(Teacher(TinyDense()), TinyQueries(), **settings)
    assert str(error.value) == f"fitnet: {message}"
