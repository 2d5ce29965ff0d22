"""The worked example of docs/writing-a-method.md keeps what the page says of it."""

import pytest
import torch
import torch.nn.functional as F

from detdistill.detectors.contract import Teacher
from detdistill.methods.shared.hyper_parameters import MethodError
from detdistill.structures import Clock
from tests.methods.contract_checks import check_method
from tests.methods.example_method import AttentionTransfer, attention_loss, attention_map
from tests.tiny import TinyDense, TinyRegions, tiny_batch


def maps(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_value_by_hand():
    student = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])  # of unit length: (0.6, 0.8) and (1, 0)
    teacher = torch.tensor([[[4.0, 3.0]], [[5.0, 0.0]]])  # (0.8, 0.6) and (1, 0)
    assert float(attention_loss([student], [teacher])) == pytest.approx((0.04 + 0.04) / 2)
    assert float(attention_loss([student, student], [teacher, student], weight=3.0)) == pytest.approx(3 * 0.04)


def test_is_two_minus_two_cosines():
    student, teacher = maps(0, 3, 4, 5), maps(1, 3, 4, 5)
    cosine = F.cosine_similarity(student.flatten(1), teacher.flatten(1)).mean()
    assert float(attention_loss([student], [teacher])) == pytest.approx(float(2 - 2 * cosine))


def test_scale_is_free_and_sizes_may_differ():
    teacher = maps(2, 2, 4, 6)
    assert float(attention_loss([100 * teacher], [teacher])) < 1e-12
    smaller = torch.ones(2, 2, 3, dtype=torch.float64)
    assert float(attention_loss([smaller], [torch.ones(2, 4, 6, dtype=torch.float64)])) < 1e-12


def test_gradient_is_that_of_the_student_alone():
    student, teacher = maps(3, 2, 2, 3).requires_grad_(), maps(4, 2, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda mine: attention_loss([mine], [teacher.detach()]), (student,))
    attention_loss([student], [teacher]).backward()
    assert teacher.grad is None


def test_contract():
    families = ("dense", "regions", "queries")
    pairs = {f"{theirs} {channels} -> {mine} 8" for theirs in families for mine in families for channels in (8, 16)}
    assert set(check_method(AttentionTransfer)) == pairs


def test_a_step_compares_the_teachers_attention_with_the_students():
    teacher, student, batch = Teacher(TinyRegions(seed=1)), TinyDense(seed=2), tiny_batch(2)
    method = AttentionTransfer(teacher, student, weight=2.0, levels=[-1])
    losses = method.step(student, batch, method.teach(batch), Clock(0, 10))
    mine, theirs = (attention_map(detector.features(batch).maps[-1]) for detector in (student, teacher.detector))
    assert losses.terms["attention"].item() == pytest.approx(attention_loss([mine], [theirs], 2.0).item(), rel=1e-5)
    assert losses.distilled == {"attention"}


def test_hyper_parameters_are_checked_by_their_types():
    with pytest.raises(MethodError, match=r"attention: weight=-1\.0 is not a number, 0 or more"):
        AttentionTransfer(Teacher(TinyDense()), TinyDense(), weight=-1.0)
