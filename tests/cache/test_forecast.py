import dataclasses

import pytest
import torch

from detdistill.cache.forecast import Probe, forecast, in_bytes, in_seconds, loss_changes, stranger
from detdistill.cache.storage import CacheError
from detdistill.detectors.contract import Teacher
from detdistill.methods.shared.compose import build_method
from detdistill.structures import Features, Observation
from tests.methods.contract_checks import assert_same
from tests.tiny import TinyDense, TinyRegions, tiny_batch


def pyramid_of_coco(height, width, channels=256):
    """P3 to P7 of one image: noise, which cannot be compressed."""
    generator = torch.Generator().manual_seed(0)
    maps, side = [], (height // 8, width // 8)
    for _ in range(5):
        maps.append(torch.randn(1, channels, *side, generator=generator))
        side = tuple(-(-length // 2) for length in side)
    return Observation(Features(tuple(maps), (8, 16, 32, 64, 128)))


def test_fitnet_on_coco_is_forecast_in_terabytes_from_one_image():
    """118,287 images, both flips, 800 x 1333, 256 channels: the paper gives 3.8 TB."""
    probe = Probe(seconds=0.1)
    batch = dataclasses.replace(tiny_batch(1), images=torch.zeros(1, 3, 800, 1088))
    probe.add(batch, [(pyramid_of_coco(800, 1088),)])
    ahead = forecast(probe, ((800, 1088) for _ in range(118_287 * 2)), free=500 * 10**9)
    assert ahead.records == 236_574
    assert 3.8e12 < ahead.bytes["float32"] < 4.6e12
    assert ahead.bytes["float16"] == pytest.approx(ahead.bytes["float32"] / 2, rel=1e-3)
    assert ahead.bytes["float32"] / 4 < ahead.bytes["int8"] < ahead.bytes["float32"] / 3.6
    assert ahead.seconds == pytest.approx(236_574 * 0.1)
    assert ahead.bytes["int8"] * 0.6 < ahead.bytes["int6"] < ahead.bytes["int8"] * 0.75
    with pytest.raises(CacheError, match=r"would need about 4.39 TB as float32, D has 500 GB free; try fewer views"):
        ahead.check("float32", "D")
    with pytest.raises(CacheError, match=r"try --store int8 \(1\.\d+ TB\)"):
        dataclasses.replace(ahead, free=2 * 10**12).check("float32", "D")
    dataclasses.replace(ahead, free=5 * 10**12).check("float32", "D")
    dataclasses.replace(ahead, free=None).check("float32", "D")
    assert "free space unknown" in dataclasses.replace(ahead, free=None).lines("int8")[0]


def test_bytes_and_seconds_grow_with_the_pixels_that_are_to_come():
    probe = Probe(pixels=100, seconds=2.0)
    probe.bytes["int8"] = 50
    ahead = forecast(probe, [(10, 10), (10, 20)], None, writers=2)
    assert (ahead.records, ahead.bytes["int8"], ahead.seconds) == (2, 150, 3.0)


@pytest.mark.parametrize("text", ["fitnet", "pkd", "fgd+mgd", "fitnet,hint_share=0.5", "fitnet,hint_share=0.5+pkd"])
def test_the_change_of_losses_is_zero_exact_and_small_otherwise(text):
    teacher = Teacher(TinyDense(channels=(16, 16), seed=1))
    student = TinyDense(seed=2)
    torch.manual_seed(0)
    method = build_method(text, teacher, student)
    batch = tiny_batch(3)
    piece = [(one,) * (2 if "+" in text else 1) for one in teacher.observe(batch).split(3)]
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    changes = loss_changes(method, student, batch, piece)
    assert changes["float32"] == 0
    assert 0 < changes["float16"] < changes["bfloat16"] < 0.01
    assert 0 < changes["int8"] < 0.05
    assert_same(dict(student.state_dict()), before, "")


def test_the_smallest_store_that_changes_little_is_chosen():
    probe = Probe(pixels=1, bytes={"float32": 400, "float16": 200, "bfloat16": 200, "int8": 105, "int6": 70})
    probe.changes = {"float32": 0.0, "float16": 1e-4, "bfloat16": 1e-3, "int8": 0.009, "int6": 0.0}
    assert probe.choose() == "int8"
    probe.changes["int8"] = 0.011
    assert probe.choose() == "float16"
    probe.changes |= {"float16": 0.5, "bfloat16": 0.5}
    assert probe.choose() == "float32"


@pytest.mark.parametrize("detector_class", [TinyDense, TinyRegions])
def test_a_stranger_is_of_the_same_build_and_knows_nothing(detector_class):
    detector = detector_class(seed=1)
    other = stranger(detector)
    assert other.spec == detector.spec
    weights = dict(detector.named_parameters())
    for name, weight in other.named_parameters():
        assert torch.equal(weight.flatten().sort().values, weights[name].flatten().sort().values)
        assert weight.requires_grad
    assert not torch.equal(other(tiny_batch(1)).features.maps[0], detector(tiny_batch(1)).features.maps[0])


def test_numbers_for_people():
    assert [in_bytes(n) for n in (12, 3_400, 5.6e9, 3.8e12, 2.5e15)] == ["12 B", "3.4 kB", "5.6 GB", "3.8 TB", "2500 TB"]
    assert [in_seconds(s) for s in (5, 200, 9000)] == ["5 s", "3 min", "2.5 h"]
