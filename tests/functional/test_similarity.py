import pytest
import torch

from detdistill.functional.similarity import mean_cosine


def test_direction_counts_and_scale_does_not():
    first = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert float(mean_cosine([first], [5 * first])) == pytest.approx(1.0)
    assert float(mean_cosine([first], [-first])) == pytest.approx(-1.0)
    assert float(mean_cosine([first, first], [first, -first])) == pytest.approx(0.0, abs=1e-6)


def test_has_no_graph():
    assert not mean_cosine([torch.ones(1, 1, 2, 2, requires_grad=True)], [torch.ones(1, 1, 2, 2)]).requires_grad
