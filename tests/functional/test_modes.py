import pytest
import torch
from torch import nn

from detdistill.functional.modes import evaluating, frozen, keeping_statistics


def network():
    """Two batch norms, of which the owner keeps one in evaluation mode, and a frozen layer."""
    torch.manual_seed(0)
    parts = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)))
    parts[3][0].eval()
    parts[3][1].bias.requires_grad_(False)
    return parts.double()


def modes(module):
    return [part.training for part in module.modules()]


def test_evaluating_switches_all_off_and_gives_each_its_own_mode_back():
    parts = network()
    before = modes(parts)
    assert before == [True, True, True, True, True, False, True]
    with evaluating(parts):
        assert not any(modes(parts))
    assert modes(parts) == before


def test_evaluating_gives_the_modes_back_after_an_error_and_after_somebody_switched_inside():
    parts = network()
    before = modes(parts)
    with pytest.raises(KeyError), evaluating(parts):
        raise KeyError
    assert modes(parts) == before
    with evaluating(parts):
        parts.train()
    assert modes(parts) == before


def test_evaluating_inside_evaluating():
    parts = network()
    before = modes(parts)
    with evaluating(parts):
        with evaluating(parts[3]):
            assert not any(modes(parts))
        assert not any(modes(parts))
    assert modes(parts) == before


def test_evaluating_keeps_statistics_and_drops_nothing():
    parts, inputs = network(), torch.randn(5, 3, dtype=torch.float64)
    running = parts[1].running_mean.clone()
    with evaluating(parts):
        first, second = parts(inputs), parts(inputs)
    assert torch.equal(first, second)
    assert torch.equal(parts[1].running_mean, running)
    normed = parts[0](inputs) / (1 + parts[1].eps) ** 0.5  # running mean 0, variance 1
    expected = parts[3][1](normed / (1 + parts[3][0].eps) ** 0.5)
    torch.testing.assert_close(first, expected)
    parts(inputs)
    assert not torch.equal(parts[1].running_mean, running)


def test_frozen_lets_gradients_through_and_none_in():
    parts, inputs = network().eval(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    parts(inputs).sum().backward()
    expected, inputs.grad = inputs.grad, None
    parts.zero_grad()
    with frozen(parts):
        assert not any(parameter.requires_grad for parameter in parts.parameters())
        outputs = parts(inputs)
    outputs.sum().backward()  # after the end
    assert torch.equal(inputs.grad, expected)
    assert all(parameter.grad is None for parameter in parts.parameters())


def test_frozen_opens_what_was_open_also_after_an_error():
    parts = network()
    before = [parameter.requires_grad for parameter in parts.parameters()]
    assert before.count(False) == 1
    with pytest.raises(KeyError), frozen(parts):
        raise KeyError
    assert [parameter.requires_grad for parameter in parts.parameters()] == before
    parts.eval()(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
    assert [parameter.grad is not None for parameter in parts.parameters()] == before


def test_frozen_leaves_modes_alone_and_a_shared_parameter_outside_is_frozen_too():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    with frozen(first):
        assert first.training
        assert not second.weight.requires_grad
        assert second.bias.requires_grad
    assert second.weight.requires_grad


def test_keeping_statistics_normalises_by_the_batch_and_leaves_the_buffers():
    parts = network()
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    before = {name: tensor.clone() for name, tensor in parts.state_dict().items()}
    torch.manual_seed(1)
    with keeping_statistics(parts):
        kept = parts(rows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts.state_dict().items())
    kept.sum().backward()
    torch.manual_seed(1)
    assert torch.equal(parts(rows), kept)
    assert int(parts[1].num_batches_tracked) == 1
    assert int(parts[3][0].num_batches_tracked) == 0  # its owner keeps it in evaluation mode
