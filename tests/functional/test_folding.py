"""Folded batch norms: the same outputs, from detectors that stay as they are."""

from types import SimpleNamespace

import pytest
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from detdistill.functional.folding import FoldedNorms
from detdistill.structures import Features, Look, Observation
from tests.tiny import tiny_batch


class Net(nn.Module):
    """A detector without a head: a norm of each kind, each after a convolution of its own."""

    def __init__(self, *norms):
        super().__init__()
        self.spec = SimpleNamespace(family="features", fixed_size_hw=None)
        generator = torch.Generator().manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, bias=index % 2 == 0) for index in range(len(norms)))
        self.norms = nn.ModuleList(norms)
        for tensor in self.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        self.eval()

    def run(self, maps):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            maps = norm(conv(maps))
        return maps

    def observe(self, batch, look=None):
        return Observation(Features((self.run(batch.images),), (1,)))


class Twice(Net):
    """The first norm follows two convolutions."""

    def run(self, maps):
        return self.norms[1](self.convs[1](self.norms[0](self.convs[0](self.norms[0](maps)))))


class Shared(Net):
    """One convolution, and a norm for each of two levels, as in heads with statistics by level."""

    def run(self, maps):
        return self.norms[0](self.convs[0](maps)) + self.norms[1](self.convs[0](maps / 2))


class Branching(Net):
    """The output of a convolution is also read by something else."""

    def run(self, maps):
        found = self.convs[0](maps)
        return self.norms[0](found) + found


class Viewing(Net):
    """Needs the default layout."""

    def run(self, maps):
        return super().run(maps.view(maps.shape[0], -1).view(maps.shape))


@torch.no_grad()
def passes(net):
    """Number of pairs, the largest relative difference of a folded pass, and whether it was one."""
    folded, batch = FoldedNorms(net), tiny_batch()
    own = net.run(batch.images)
    with folded.running(batch) as fast:
        found = net.run(fast.images)
    return len(folded.pairs), ((found - own).abs().max() / own.abs().max()).item(), fast is not batch


def test_every_kind_of_norm_is_folded_and_the_detector_stays_as_it_was():
    frozen = FrozenBatchNormAct2d(3, act_layer=nn.SiLU)
    net = Net(nn.BatchNorm2d(3, eps=0.1), BatchNormAct2d(3, act_layer=nn.SiLU), FrozenBatchNorm2d(3, eps=0.2), frozen)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    attributes = [set(vars(module)) for module in net.modules()]
    pairs, difference, ran = passes(net)
    assert (pairs, ran) == (4, True)
    assert difference < 1e-5
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [set(vars(module)) for module in net.modules()] == attributes
    assert all(parameter.requires_grad for parameter in net.convs.parameters())


@pytest.mark.parametrize(("kind", "pairs"), [(Twice, 1), (Shared, 0)])
def test_only_a_norm_with_a_convolution_of_its_own_is_folded(kind, pairs):
    found, difference, ran = passes(kind(nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    assert (found, ran) == (pairs, True)
    assert difference < 1e-5


@pytest.mark.parametrize("kind", [Branching, Viewing])
def test_a_detector_whose_outputs_would_change_runs_as_it_is(kind):
    _, difference, ran = passes(kind(nn.BatchNorm2d(3)))
    assert not ran
    assert difference == 0


@torch.no_grad()
def test_changed_weights_are_folded_anew_and_other_passes_are_the_detectors_own():
    net, batch = Net(nn.BatchNorm2d(3)), tiny_batch()
    folded = FoldedNorms(net)
    with folded.running(batch) as fast:
        first = net.run(fast.images)
    net.load_state_dict({name: tensor * 2 for name, tensor in net.state_dict().items()})
    with folded.running(batch) as fast:
        second = net.run(fast.images)
    torch.testing.assert_close(second, net.run(batch.images), rtol=1e-5, atol=1e-5)
    assert (second - first).abs().max() > 0.1
    with torch.enable_grad(), folded.running(batch) as same:
        assert same is batch
    net.train()
    for one in (folded, FoldedNorms(net)):
        with one.running(batch) as same:
            assert same is batch


@torch.no_grad()
def test_an_error_inside_leaves_no_trace_and_half_precision_folds_in_float32():
    net, batch = Net(nn.BatchNorm2d(3)), tiny_batch()
    own = net.convs[0].weight
    folded = FoldedNorms(net)
    with pytest.raises(KeyError), folded.running(batch):
        raise KeyError
    assert net.convs[0].weight is own
    with folded.running(batch) as fast, torch.autocast("cpu", torch.bfloat16):
        assert net.convs[0].weight.dtype == torch.float32
        assert net.observe(fast, Look()).features.maps[0].dtype == torch.bfloat16
