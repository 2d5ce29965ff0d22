"""Learning rates by hand, and which parameters decay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Detector
from detdistill.errors import RunError
from detdistill.settings import TrainSettings
from detdistill.training.optimizers import build_optimizer, build_schedule


def rates(total: int, **settings: Any) -> list[float]:
    """The rate of each step, and the one after the last."""
    wanted = TrainSettings(**settings)
    optimizer = build_optimizer([nn.Linear(2, 2)], wanted)
    schedule = build_schedule(optimizer, wanted, total)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*seen, optimizer.param_groups[0]["lr"]]


def test_constant_with_warm_up():
    assert rates(6, schedule="constant", lr=0.5) == [0.5] * 7
    assert rates(6, schedule="constant", lr=1.0, warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1])


def test_cosine_ends_at_zero():
    seen = rates(8, schedule="cosine", lr=2.0)
    assert seen == pytest.approx([1 + math.cos(math.pi * step / 8) for step in range(9)], abs=1e-6)
    assert seen[0] == 2.0
    assert seen[4] == pytest.approx(1.0)
    assert seen[8] == 0.0
    warm = rates(8, schedule="cosine", lr=2.0, warmup_steps=1)
    assert warm[0] == 1.0
    assert warm[1:] == seen[1:]


def test_step_falls_at_two_thirds_and_eleven_twelfths():
    seen = rates(12, schedule="step", lr=1.0)
    assert seen == pytest.approx([1.0] * 8 + [0.1] * 3 + [0.01] * 2)


def test_one_cycle_peaks_after_15_percent():
    seen = rates(100, schedule="one_cycle", lr=1e-2)
    # torch puts the peak at 0.15 * 101 - 1 = 14.15; from there half a cosine falls to step 100.
    after = (1 + math.cos(math.pi * (15 - 14.15) / (100 - 14.15))) / 2
    assert max(seen) == seen[15] == pytest.approx(1e-2 * after, rel=1e-6)
    assert seen[0] == pytest.approx(1e-2 / 25)
    assert seen[100] == pytest.approx(1e-2 / 25 / 1e4)
    assert seen[50:] == sorted(seen[50:], reverse=True)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_biases_and_norms_do_not_decay(optimizer: str):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Linear(4, 2))
    built = build_optimizer([model, model[0]], TrainSettings(optimizer=optimizer, weight_decay=0.1, lr=0.5))  # type: ignore[arg-type]
    decayed = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert len(decayed) == sum(len(group["params"]) for group in built.param_groups) == len(list(model.parameters()))
    assert [decayed[id(p)] for p in model.parameters()] == [0.1, 0, 0, 0, 0, 0, 0.1, 0]
    # With no gradient from the loss, only decay moves anything.
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    built.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        expected = old * (1 - 0.5 * 0.1) if parameter.ndim > 1 else old
        torch.testing.assert_close(parameter.detach(), expected)


def test_a_module_without_matrices_or_without_vectors():
    assert len(build_optimizer([nn.BatchNorm2d(3)], TrainSettings()).param_groups) == 1
    assert len(build_optimizer([nn.Linear(2, 2, bias=False)], TrainSettings()).param_groups) == 1


@pytest.mark.parametrize("schedule", ["one_cycle", "step"])
def test_backbones_at_a_rate_of_their_own(schedule: Any):
    student = build_detector("deformable_detr:resnet10t,channels=16-16-16-16,stem=8,dim=32,queries=5", ("a",))
    settings = TrainSettings(lr=0.5, backbone_lr_factor=0.1, schedule=schedule)
    optimizer = build_optimizer([student, nn.Linear(2, 2)], settings)
    total = 20
    scheduler = build_schedule(optimizer, settings, total)
    in_backbone = {id(p) for name, p in student.named_parameters() if name.startswith("model.model.backbone.")}
    seen = []
    for _ in range(total):
        slow, fast = (
            {group["lr"] for group in optimizer.param_groups if (id(group["params"][0]) in in_backbone) == inside}
            for inside in (True, False)
        )
        assert len(slow) == len(fast) == 1
        assert slow.pop() == pytest.approx(0.1 * max(fast))
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert max(seen) == pytest.approx(0.5, rel=0.05)  # the first group's rate is the one that is logged
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len([*student.parameters()]) + 2
    slower = [group for group in optimizer.param_groups if group["lr"] < 0.5 * optimizer.param_groups[0]["lr"]]
    assert {id(p) for group in slower for p in group["params"]} == in_backbone


def test_a_detector_without_a_known_backbone_is_refused(monkeypatch):
    student = build_detector("fcos:resnet10t,channels=16-16-16-16,stem=8,neck=32,levels=3-4,convs=1", ("a",))
    monkeypatch.setattr(type(student), "parts", Detector.parts)
    with pytest.raises(RunError) as error:
        build_optimizer([student], TrainSettings(backbone_lr_factor=0.1))
    assert str(error.value) == (
        f"backbone_lr_factor: {student.spec.name} does not say which of its modules are backbone, neck and head; define parts(), "
        f"or leave the factor at 1"
    )
    build_optimizer([student], TrainSettings())
