import math

import pytest
import torch
import torch.nn.functional as F

from detdistill.functional import soft_targets
from detdistill.functional.focal import quality_focal_loss
from detdistill.functional.soft_targets import (
    binary_kl_divergence,
    focal_kl_divergence,
    kl_divergence,
    largest_score_gap,
    mean_kl_divergence,
    soft_binary_cross_entropy,
    soft_binary_rows,
    soft_cross_entropy,
)

LOSSES = {
    "kl_divergence": kl_divergence,
    "mean_kl_divergence": mean_kl_divergence,
    "soft_cross_entropy": soft_cross_entropy,
    "binary_kl_divergence": binary_kl_divergence,
    "focal_kl_divergence": focal_kl_divergence,
    "soft_binary_cross_entropy": lambda student, teacher: soft_binary_cross_entropy(student, teacher.sigmoid()),
    "gap_weighted": lambda student, teacher: soft_binary_cross_entropy(student, teacher.sigmoid(), 1.0),
    "soft_binary_rows": lambda student, teacher: soft_binary_rows(student, teacher, 1.0),
}


def logits(seed, *shape, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- divergence of softmaxes


def test_kl_by_hand():
    # p = (2/3, 1/3) against q = (1/2, 1/2)
    teacher = torch.tensor([[math.log(2.0), 0.0]], dtype=torch.float64)
    expected = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert kl_divergence(torch.zeros_like(teacher), teacher).item() == pytest.approx(expected, rel=1e-14)
    assert mean_kl_divergence(torch.zeros_like(teacher), teacher).item() == pytest.approx(expected / 2, rel=1e-14)
    # with T = 2 the teacher's odds are sqrt(2)
    p = math.sqrt(2) / (1 + math.sqrt(2))
    expected = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 - 2 * p))
    assert kl_divergence(torch.zeros_like(teacher), teacher, 2.0).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_kl_equals_torchs(temperature, dim):
    student, teacher = logits(0, 3, 4, 5), logits(1, 3, 4, 5)
    rows = [F.log_softmax(side / temperature, dim) for side in (student, teacher)]
    expected = temperature**2 * F.kl_div(*rows, reduction="none", log_target=True).sum(dim)
    torch.testing.assert_close(kl_divergence(student, teacher, temperature, dim), expected, rtol=1e-10, atol=1e-13)
    mean = mean_kl_divergence(student, teacher, temperature, dim)
    torch.testing.assert_close(mean, expected / student.shape[dim], rtol=1e-10, atol=1e-13)


def test_gradient_of_kl_is_the_temperature_times_the_gap():
    student, teacher = logits(2, 6, 5).requires_grad_(), logits(3, 6, 5).requires_grad_()
    weights = torch.arange(1.0, 7, dtype=torch.float64)
    (kl_divergence(student, teacher, 3.0) * weights).sum().backward()
    gap = (student / 3).softmax(1) - (teacher / 3).softmax(1)
    torch.testing.assert_close(student.grad, (3 * weights[:, None] * gap).detach(), rtol=1e-12, atol=1e-14)
    assert teacher.grad is None


def test_kl_keeps_its_digits_where_rows_are_nearly_equal():
    teacher = logits(4, 200, 20)
    student = teacher + logits(5, 200, 20, scale=0.1)
    exact = kl_divergence(student.float().double(), teacher.float().double(), 10.0)
    found = kl_divergence(student.float(), teacher.float(), 10.0).double()
    assert float(((found - exact).abs() / exact).max()) < 1e-4
    # and the exact values are those of the formula, seen with twice the digits
    rows = [F.log_softmax(side.float().double() / 10, 1) for side in (student, teacher)]
    torch.testing.assert_close(exact, 100 * (rows[1].exp() * (rows[1] - rows[0])).sum(1), rtol=1e-6, atol=0)


def test_kl_of_extreme_rows_is_finite():
    student = torch.tensor([[300.0, 0.0, 0.0], [0.0, 0.0, -300.0], [-300.0, 300.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 300.0, 0.0], [300.0, 0.0, 0.0], [-300.0, 300.0, 0.0]])
    divergence = kl_divergence(student, teacher)
    assert divergence.tolist() == pytest.approx([300.0, math.log(2), 0.0])
    divergence.sum().backward()
    expected = student.detach().softmax(1) - teacher.softmax(1)
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-6)


def test_kl_is_zero_at_equality_positive_elsewhere_and_blind_to_shifts():
    student, teacher = logits(6, 50, 7), logits(7, 50, 7)
    assert torch.equal(kl_divergence(teacher, teacher, 4.0), torch.zeros(50, dtype=torch.float64))
    assert float(kl_divergence(student, teacher).min()) > 0
    shifted = kl_divergence(student + torch.arange(50.0)[:, None], teacher - 3)
    torch.testing.assert_close(shifted, kl_divergence(student, teacher), rtol=1e-10, atol=1e-12)


def test_one_teacher_for_several_layers():
    student, teacher = logits(8, 3, 2, 4, 5).requires_grad_(), logits(9, 2, 4, 5)
    together = kl_divergence(student, teacher, 2.0)
    assert torch.equal(together, torch.stack([kl_divergence(layer, teacher, 2.0) for layer in student]))
    together.sum().backward()
    expected = 2 * ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)).detach()
    torch.testing.assert_close(student.grad, expected, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------------------------------------- cross-entropies


def test_weighted_cross_entropy_adds_to_the_classes_that_are_weighted():
    student, teacher = logits(10, 9, 4), logits(11, 9, 4)
    plain = soft_cross_entropy(student, teacher, 2.0)
    p, log_q = (teacher / 2).softmax(1), (student / 2).log_softmax(1)
    weighted = soft_cross_entropy(student, teacher, 2.0, torch.tensor([1.0, 1, 1, 1.5], dtype=torch.float64))
    torch.testing.assert_close(weighted - plain, -0.5 * p[:, 3] * log_q[:, 3], rtol=1e-11, atol=1e-13)
    transposed = soft_cross_entropy(student.T, teacher.T, 2.0, torch.tensor([1.0, 1, 1, 1.5], dtype=torch.float64), dim=0)
    torch.testing.assert_close(transposed, weighted, rtol=1e-12, atol=1e-14)


def test_cross_entropy_is_kl_and_the_teachers_entropy():
    student, teacher = logits(12, 9, 4), logits(13, 9, 4)
    entropy = torch.distributions.Categorical(logits=teacher).entropy()
    crossed = soft_cross_entropy(student, teacher)
    torch.testing.assert_close(crossed, kl_divergence(student, teacher) + entropy, rtol=1e-11, atol=1e-13)
    same = teacher.clone().requires_grad_()
    soft_cross_entropy(same, teacher).sum().backward()
    torch.testing.assert_close(same.grad, torch.zeros_like(same), rtol=0, atol=1e-14)


def test_one_hot_teachers_give_torchs_cross_entropy():
    student, labels = logits(14, 9, 4), torch.arange(9) % 4
    teacher = torch.full((9, 4), -1e3, dtype=torch.float64).scatter(1, labels[:, None], 1e3)
    weights = torch.tensor([1.0, 2, 3, 1.5], dtype=torch.float64)
    expected = F.cross_entropy(student, labels, weights, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(student, teacher, class_weights=weights), expected, rtol=1e-12, atol=1e-14)


def test_binary_cross_entropy_by_its_formula():
    student, teacher = logits(15, 8, 3), logits(16, 8, 3).sigmoid()
    s = student.sigmoid()
    expected = -teacher * s.log() - (1 - teacher) * (1 - s).log()
    torch.testing.assert_close(soft_binary_cross_entropy(student, teacher), expected, rtol=1e-11, atol=1e-13)
    for power in (1.0, 2.0):
        weighted = (teacher - s).abs() ** power * expected
        torch.testing.assert_close(soft_binary_cross_entropy(student, teacher, power), weighted, rtol=1e-11, atol=1e-13)


def test_quality_focal_loss_is_the_same_function():
    student, quality = logits(17, 30, 4).float().requires_grad_(), logits(18, 30, 4).sigmoid().float()
    found = quality_focal_loss(student, quality, 2.0)
    gap = (quality - student.sigmoid()).abs() ** 2.0
    expected = gap * F.binary_cross_entropy_with_logits(student, quality, reduction="none")
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in (found, expected)]
    assert torch.equal(*gradients)
    assert torch.equal(soft_binary_cross_entropy(student, quality, 2.0), expected)


def test_gap_weighted_entropy_is_zero_with_zero_gradient_at_the_target():
    student = logits(19, 5, 3).requires_grad_()
    for power in (1.0, 2.0):
        loss = soft_binary_cross_entropy(student, student.sigmoid(), power)
        assert torch.equal(loss, torch.zeros_like(loss))
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert torch.equal(gradient, torch.zeros_like(gradient))
    (gradient,) = torch.autograd.grad(soft_binary_cross_entropy(student, student.sigmoid()).sum(), student)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)


# ------------------------------------------------------------------------------------------------------ sigmoids' divergence


def test_binary_divergence_is_that_of_two_classes():
    student, teacher = logits(20, 8, 3), logits(21, 8, 3)
    two = [torch.stack([side, torch.zeros_like(side)], dim=-1) for side in (student, teacher)]
    torch.testing.assert_close(binary_kl_divergence(student, teacher), kl_divergence(*two), rtol=1e-10, atol=1e-13)


def test_binary_divergence_of_saturated_scores():
    teacher = torch.tensor([-1e4, 1e4, 1e4], requires_grad=False)
    student = torch.tensor([0.0, 0.0, -50.0], requires_grad=True)
    divergence = binary_kl_divergence(student, teacher)
    assert divergence.tolist() == pytest.approx([math.log(2), math.log(2), 50.0])
    focal = focal_kl_divergence(student, teacher)
    assert focal.tolist() == pytest.approx([math.log(2) * 0.5**0.5, math.log(2) * 0.5**0.5, 50.0], rel=1e-5)
    (divergence + focal).sum().backward()
    assert bool(torch.isfinite(student.grad).all())


def test_focal_divergence_by_its_formula_and_at_equality():
    student, teacher = logits(22, 8, 3), logits(23, 8, 3)
    s, t = student.sigmoid(), teacher.sigmoid()
    divergence = t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()
    for power in (0.5, 2.0):
        expected = ((t - s) ** 2 + 1e-6) ** (power / 2) * divergence
        torch.testing.assert_close(focal_kl_divergence(student, teacher, power), expected, rtol=1e-9, atol=1e-12)
    same = teacher.clone().requires_grad_()
    loss = focal_kl_divergence(same, teacher)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros_like(loss))
    torch.testing.assert_close(same.grad, torch.zeros_like(same), rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences_and_none_reach_the_teacher(name):
    student, teacher = logits(24, 4, 3).requires_grad_(), logits(25, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda mine: LOSSES[name](mine, teacher.detach()), student)
    LOSSES[name](student, teacher).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_no_rows_give_a_zero_with_a_graph(name):
    student = torch.zeros(0, 3, requires_grad=True)
    total = LOSSES[name](student, torch.zeros(0, 3)).sum()
    total.backward()
    assert total.item() == 0.0
    assert student.grad.shape == (0, 3)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_is_near_float64(name):
    student, teacher = logits(26, 40, 6), logits(27, 40, 6)
    exact = LOSSES[name](student, teacher)
    torch.testing.assert_close(LOSSES[name](student.float(), teacher.float()).double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_divergence_does_not_depend_on_how_many_rows_are_taken_at_a_time(monkeypatch, dim):
    seeded = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 5, generator=seeded, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    found = []
    for chunk in (1, 10**9):
        monkeypatch.setitem(soft_targets.ROWS_CHUNK, "cpu", chunk)
        value = kl_divergence(student, teacher, 2.0, dim)
        found.append((value, *torch.autograd.grad(value.square().sum(), student)))
    for one, whole in zip(*found, strict=True):
        assert torch.equal(one, whole)
    p, q = ((side / 2).softmax(dim) for side in (teacher, student))
    torch.testing.assert_close(found[0][0], 4 * (p * (p.log() - q.log())).sum(dim))


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_sums_over_classes_equal_the_single_cross_entropies_and_their_gradient(power, monkeypatch):
    monkeypatch.setattr("detdistill.functional.soft_targets.ROWS_CHUNK", {"cpu": 12})  # four rows at a time
    torch.manual_seed(0)
    logits = (4 * torch.randn(3, 5, 3, dtype=torch.float64)).requires_grad_()
    teacher, by = 4 * torch.randn(3, 5, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    (soft_binary_cross_entropy(logits, teacher.sigmoid(), power).sum(-1) * by).sum().backward()
    wanted, logits.grad = logits.grad, None
    rows = soft_binary_rows(logits, teacher, power)
    (rows * by).sum().backward()
    assert torch.allclose(rows, soft_binary_cross_entropy(logits, teacher.sigmoid(), power).sum(-1), rtol=1e-12)
    assert torch.allclose(logits.grad, wanted, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda given: soft_binary_rows(given, teacher, power), (logits,))


def test_rows_of_equal_scores_have_no_loss_and_no_gradient():
    logits = torch.tensor([[0.5, -80.0, 90.0]], requires_grad=True)
    rows = soft_binary_rows(logits, logits.detach(), 1.0)
    rows.sum().backward()
    assert rows.tolist() == [0.0]
    assert logits.grad.tolist() == [[0.0, 0.0, 0.0]]
    assert soft_binary_rows(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0,)


def test_largest_gap_of_the_scores_of_a_row(monkeypatch):
    monkeypatch.setattr("detdistill.functional.soft_targets.ROWS_CHUNK", {"cpu": 3})
    mine = torch.tensor([[[0.0, 99.0], [-99.0, 0.0], [99.0, 1.0]]], requires_grad=True)
    gaps = largest_score_gap(mine, torch.tensor([[[0.0, 0.0], [99.0, 0.0], [99.0, 1.0]]]))
    assert gaps.tolist() == [[0.5, 1.0, 0.0]]
    assert not gaps.requires_grad


def test_blocks_hold_whole_rows_and_about_as_many_numbers_as_wanted(monkeypatch):
    monkeypatch.setattr(soft_targets, "ROWS_CHUNK", {"cpu": 13})
    assert list(soft_targets._blocks(torch.zeros(6, 4))) == [slice(0, 3), slice(3, 6)]
    assert list(soft_targets._blocks(torch.zeros(2, 40))) == [slice(0, 1), slice(1, 2)]
