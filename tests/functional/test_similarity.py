import pytest
import torch

from detdistill.functional.similarity import cosine_distance, mean_cosine


def test_direction_counts_and_scale_does_not():
    first = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert float(mean_cosine([first], [5 * first])) == pytest.approx(1.0)
    assert float(mean_cosine([first], [-first])) == pytest.approx(-1.0)
    assert float(mean_cosine([first, first], [first, -first])) == pytest.approx(0.0, abs=1e-6)


def test_has_no_graph():
    assert not mean_cosine([torch.ones(1, 1, 2, 2, requires_grad=True)], [torch.ones(1, 1, 2, 2)]).requires_grad


def test_mean_over_images_and_levels_of_hand_made_cosines():
    """Cosines 1 and 0 of the images of the first level, 0.6 and 0.8 of the second."""
    student = [torch.tensor([[[[1.0, 0.0]]], [[[1.0, 0.0]]]]), torch.tensor([[[[3.0, 4.0]]], [[[3.0, 4.0]]]])]
    teacher = [torch.tensor([[[[2.0, 0.0]]], [[[0.0, 2.0]]]]), torch.tensor([[[[1.0, 0.0]]], [[[0.0, 1.0]]]])]
    assert float(mean_cosine(student, teacher)) == pytest.approx((1 + 0 + 0.6 + 0.8) / 4)
    apart = [torch.eye(2).view(1, 2, 1, 2)], [torch.eye(2).flip(0).view(1, 2, 1, 2)]  # orthogonal as wholes
    assert float(mean_cosine(*apart)) == 0.0


def test_pyramids_of_unequal_length_are_refused():
    one = torch.ones(1, 1, 2, 2)
    with pytest.raises(ValueError, match="shorter"):
        mean_cosine([one, one], [one])


def test_distance_of_rows_by_hand():
    """Cosines 0.6, -1 and, for a row of zeros, 0."""
    first = torch.tensor([[3.0, 4.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    second = torch.tensor([[5.0, 0.0, 0.0], [0.0, -7.0, 0.0], [1.0, 0.0, 0.0]])
    for one, other in ((first, second), (second, first)):
        assert float(cosine_distance(one, other)) == pytest.approx((0.4 + 2 + 1) / 3)


def test_distance_of_no_rows_is_zero_and_connected():
    rows = torch.zeros(0, 4, requires_grad=True)
    cosine_distance(rows, rows).backward()
    assert float(cosine_distance(rows, rows).detach()) == 0
    assert rows.grad.shape == (0, 4)


def test_gradients_of_the_distance_agree_with_finite_differences_and_rows_of_zeros_have_none():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(cosine_distance, rows)
    zero = torch.zeros(1, 4, requires_grad=True)
    cosine_distance(zero, torch.ones(1, 4)).backward()
    assert not zero.grad.any()
    zero.grad, other = None, torch.ones(1, 4, requires_grad=True)
    cosine_distance(other, zero).backward()
    assert not zero.grad.any()
    assert not other.grad.any()
