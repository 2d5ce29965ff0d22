import pytest
import torch

from detdistill.functional.weighted_rows import weighted_rows


def example(index_type, count=4):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(7, 3, generator=generator, dtype=torch.float64).requires_grad_()
    index = torch.randint(7, (5, count), generator=generator).to(index_type)
    weights = torch.randn(5, count, generator=generator, dtype=torch.float64).requires_grad_()
    return table, index, weights


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
def test_sums_and_their_gradients(index_type, count):
    table, index, weights = example(index_type, count)
    expected = (table[index.long()] * weights[..., None]).sum(dim=1)
    found = weighted_rows(table, index, weights)
    torch.testing.assert_close(found, expected)
    change = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).t().contiguous().t()
    ours, theirs = (torch.autograd.grad(sums, (table, weights), change) for sums in (found, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_what_needs_no_gradient_gets_none():
    table, index, weights = example(torch.int32)
    weighted_rows(table, index, weights.detach()).sum().backward()
    torch.testing.assert_close(table.grad.sum(), 3 * weights.sum())
    assert weights.grad is None
    table.grad = None
    weighted_rows(table.detach(), index, weights).sum().backward()
    torch.testing.assert_close(weights.grad, table.detach().sum(dim=1)[index.long()])


def test_no_rows_at_all():
    table, index, weights = example(torch.int32)
    found = weighted_rows(table, index[:0], weights[:0])
    found.sum().backward()
    assert found.shape == (0, 3)
    assert not table.grad.any()
