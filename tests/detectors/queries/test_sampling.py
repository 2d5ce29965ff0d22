"""Deformable attention of transformers' models, sampled by weighted cells: the library's values and gradients."""

import copy

import pytest
import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.queries.shared import sampling
from tests.detectors.queries.deformable import doubled
from tests.tiny import tiny_batch

SHORT = "resnet10t,channels=8-16-32-64,stem=8,dim=32,heads=2,ffn=64,queries=10,decoder=2"  # 16 channels in each head
NAMES = {
    f"deformable_detr:{SHORT},encoder=1": sampling.SampledByCells,
    f"rt_detr:{SHORT},encoder=1": sampling.SampledByCells,
    f"d_fine:{SHORT},encoder=1": sampling.SampledByLists,
}


def samplers(detector):
    """All places of the model where deformable attention is sampled."""
    found = [module for module in detector.modules() if isinstance(module, sampling.SampledByCells)]
    cores = [getattr(module, "ms_deformable_attn_core", None) for module in detector.modules()]
    return found + [core for core in cores if isinstance(core, sampling.SampledByLists)]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_equal_the_librarys(name, monkeypatch):
    torch.manual_seed(0)
    detector = build_detector(name, ["a", "b"]).double().eval()
    assert samplers(detector)
    assert all(type(one) is NAMES[name] for one in samplers(detector))
    batch = doubled(tiny_batch(2))
    found = []
    for fast in (True, False):
        asked = []
        monkeypatch.setattr(sampling, "faster", lambda value, fast=fast, asked=asked: asked.append(value.shape) or fast)
        detector.zero_grad()
        queries = detector(batch).prediction  # not the loss: D-FINE's of the library does not run in float64
        (queries.logits.square().mean() + queries.boxes_cxcywh01.square().mean()).backward()
        assert asked
        outputs = {"logits": queries.logits, "boxes": queries.boxes_cxcywh01}
        found.append((outputs, {key: p.grad.clone() for key, p in detector.named_parameters() if p.grad is not None}))
    for mine, theirs in zip(*found, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-9, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


def test_state_dict_copies_and_repeats_stay():
    torch.manual_seed(0)
    detector = build_detector(next(iter(NAMES)), ["a"])
    names, count = set(detector.state_dict()), len(samplers(detector))
    assert not any("plain" in name for name in names)
    sampling.sample_by_cells(detector.model)
    other = copy.deepcopy(detector)
    sampling.sample_by_cells(other.model)
    assert set(other.state_dict()) == names
    assert len(samplers(detector)) == len(samplers(other)) == count


def test_half_precision_and_traces_use_the_librarys_sampling():
    assert sampling.faster(torch.zeros(1, 1, 1, 16))
    assert not sampling.faster(torch.zeros(1, 1, 1, 8)), "grid_sample is faster for narrow heads"
    assert not sampling.faster(torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert sampling.faster(torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16))
