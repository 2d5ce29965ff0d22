import pytest
import torch

from detdistill.functional.distributions import project_distribution, step_positions


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("steps", [torch.arange(6.0), torch.tensor([-4.0, -1.0, 0.0, 0.5, 3.0, 9.0])])
def test_mass_is_kept_and_inside_the_steps_the_mean(steps):
    steps = steps.double()
    p = random(0, 3, 7).softmax(dim=-1)
    inside = steps[0] + (steps[-1] - steps[0]) * random(1, 3, 7).sigmoid()
    moved = project_distribution(p, inside, steps)
    torch.testing.assert_close(moved.sum(dim=-1), torch.ones(3).double())
    torch.testing.assert_close((moved * steps).sum(dim=-1), (p * inside).sum(dim=-1))
    assert bool((moved >= 0).all())


def test_positions_on_steps_are_exact_in_any_order():
    steps = torch.tensor([0.0, 1.0, 3.0])
    moved = project_distribution(torch.tensor([[0.2, 0.3, 0.5]]), torch.tensor([[3.0, 0.0, 1.0]]), steps)
    torch.testing.assert_close(moved, torch.tensor([[0.3, 0.5, 0.2]]))


def test_mass_beyond_the_ends_goes_to_the_ends():
    moved = project_distribution(torch.tensor([0.25, 0.75]), torch.tensor([-5.0, 99.0]), torch.arange(3.0))
    assert moved.tolist() == [0.25, 0.0, 0.75]
    assert project_distribution(torch.zeros(0, 4), torch.zeros(0, 4), torch.arange(3.0)).shape == (0, 3)


def test_equals_a_loop_over_masses():
    p, at, steps = random(0, 5).softmax(dim=0), random(1, 5) * 3, torch.tensor([-2.0, -0.5, 0.0, 2.5]).double()
    expected = [0.0] * 4
    for mass, x in zip(p.tolist(), at.tolist(), strict=True):
        x = min(max(x, -2.0), 2.5)
        i = max(k for k in range(3) if steps[k] <= x)
        w = (x - steps[i].item()) / (steps[i + 1] - steps[i]).item()
        expected[i] += mass * (1 - w)
        expected[i + 1] += mass * w
    assert project_distribution(p, at, steps).tolist() == pytest.approx(expected, rel=1e-12)


def test_positions_of_steps_on_another_scale():
    """Steps 0, 1 and 3 of a scale at 10, 12 and 16 lie 2 and a half units of -4 from 20."""
    one = torch.ones(1)
    found = step_positions(torch.tensor([0.0, 1.0, 3.0]), 10 * one, 2 * one, 20 * one, -4 * one)
    assert found.tolist() == [[2.5, 2.0, 1.0]]


def test_positions_on_an_empty_scale_are_finite():
    one = torch.ones(2)
    found = step_positions(torch.arange(3.0), one, one, one, torch.tensor([0.0, -1e-9]), least_unit=0.5)
    assert found.tolist() == [[0.0, 2.0, 4.0], [0.0, -2.0, -4.0]]
