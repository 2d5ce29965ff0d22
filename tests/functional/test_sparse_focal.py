import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from detdistill.functional import sparse_focal
from detdistill.functional.sparse_focal import focal_rows


def example(classes: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = (torch.randn(2, 50, classes) * scale).requires_grad_()
    return logits, torch.randint(-1, classes, (2, 50))


def by_torchvision(logits: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    targets = torch.nn.functional.one_hot(positive + 1, logits.shape[-1] + 1)[..., 1:].to(logits.dtype)
    return sigmoid_focal_loss(logits, targets, reduction="none").sum(dim=-1)


@pytest.mark.parametrize("classes", [1, 3, 1204])
@pytest.mark.parametrize("block", [7, sparse_focal.BLOCK])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_values_and_gradients_are_equal_to_those_of_torchvision(classes, block, scale, monkeypatch):
    monkeypatch.setattr(sparse_focal, "BLOCK", block)
    logits, positive = example(classes, scale)
    weights = torch.rand(2, 50)
    mine, theirs = focal_rows(logits, positive), by_torchvision(logits, positive)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad((mine * weights).sum(), logits)
    (expected,) = torch.autograd.grad((theirs * weights).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


def test_the_gradient_is_that_of_the_value():
    logits, positive = example(3)
    assert torch.autograd.gradcheck(lambda given: focal_rows(given, positive), logits.detach().double().requires_grad_())


def test_far_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4]], requires_grad=True)
    value = focal_rows(logits, torch.tensor([1, -1]))
    assert value.tolist() == [0.75e4 + 0.25e4, 0.75e4]
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient.tolist() == [[0.75, -0.25], [0.75, 0.0]]


def test_no_rows():
    logits = torch.zeros(0, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(focal_rows(logits, torch.zeros(0, dtype=torch.int64)).sum(), logits)
    assert gradient.shape == (0, 4)


def test_the_second_derivative_is_that_of_torchvision():
    logits, positive = example(3)
    found = []
    for loss in (focal_rows, by_torchvision):
        (gradient,) = torch.autograd.grad(loss(logits, positive).sum(), logits, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), logits)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    double = logits.detach()[:, :5].double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda given: focal_rows(given, positive[:, :5]), double)
