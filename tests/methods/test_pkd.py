import pytest
import torch

from detdistill.losses import pkd_loss
from tests.golden import Golden, assert_golden


@pytest.fixture
def golden():
    return Golden("pkd")


def test_values_and_gradients_equal_the_released_code(golden):
    weight = golden.meta["loss_weight"]
    student = [level.requires_grad_() for level in golden.levels("in_student")]
    teacher = golden.levels("in_teacher")
    for index, expected in enumerate(golden.levels("out_loss")):
        assert_golden(pkd_loss([student[index]], [teacher[index]], weight), expected)
    total = pkd_loss(student, teacher, weight)
    assert_golden(total, golden["out_total"])
    total.backward()
    for level, expected in zip(student, golden.levels("grad_student"), strict=True):
        assert_golden(level.grad, expected)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_resizing_equals_the_released_code(golden, side):
    student = golden["in_resize_student"].requires_grad_()
    loss = pkd_loss([student], [golden["in_resize_teacher"]], golden.meta["loss_weight"], resize_student=side == "student")
    assert_golden(loss, golden[f"out_resize_{side}_loss"])
    loss.backward()
    assert_golden(student.grad, golden[f"grad_resize_{side}_student"])


def test_constant_channel_is_finite(golden):
    student = golden["in_const_student"].requires_grad_()
    loss = pkd_loss([student], [golden["in_const_teacher"]], golden.meta["loss_weight"])
    assert_golden(loss, golden["out_const_loss"])
    loss.backward()
    assert torch.isfinite(student.grad).all()


def maps(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_zero_for_any_positive_affine_map_of_the_teacher():
    teacher = maps(0, 2, 4, 5, 6)
    scale = torch.tensor([0.5, 1.0, 3.0, 100.0], dtype=torch.float64)[:, None, None]
    assert float(pkd_loss([teacher * scale + 7], [teacher])) < 1e-10
    count = 2 * 5 * 6
    assert float(pkd_loss([-teacher * scale], [teacher], weight=1.0)) == pytest.approx(2 * (count - 1) / count, rel=1e-5)


def test_is_one_minus_pearson():
    student, teacher = maps(1, 2, 3, 4, 4), maps(2, 2, 3, 4, 4)
    rows = [torch.stack([student[:, c].flatten(), teacher[:, c].flatten()]) for c in range(3)]
    correlation = torch.stack([torch.corrcoef(row)[0, 1] for row in rows]).mean()
    count = 2 * 4 * 4
    expected = 6 * (count - 1) / count * (1 - correlation)
    assert float(pkd_loss([student], [teacher])) == pytest.approx(float(expected), rel=1e-5)


def test_gradient_is_free_of_mean_and_scale_and_spares_the_teacher():
    student, teacher = maps(3, 2, 3, 4, 4).requires_grad_(), maps(4, 2, 3, 4, 4).requires_grad_()
    pkd_loss([student], [teacher]).backward()
    assert teacher.grad is None
    assert float(student.grad.mean(dim=(0, 2, 3)).abs().max()) < 1e-8
    assert float((student.grad * student).sum(dim=(0, 2, 3)).abs().max()) < 1e-5


def test_teacher_scale_does_not_matter_but_image_order_does():
    student, teacher = maps(5, 3, 2, 4, 4), maps(6, 3, 2, 4, 4)
    loss = float(pkd_loss([student], [teacher]))
    assert float(pkd_loss([student], [teacher * 1000])) == pytest.approx(loss, rel=1e-5)
    order = torch.tensor([2, 0, 1])
    assert float(pkd_loss([student[order]], [teacher[order]])) == pytest.approx(loss, rel=1e-12)
    assert float(pkd_loss([student[order]], [teacher])) != pytest.approx(loss, rel=1e-3)
