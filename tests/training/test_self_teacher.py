"""The student's own moving average as its teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detdistill.errors import RunError
from detdistill.training.callbacks import Checkpoints
from detdistill.training.self_teacher import AverageTeacher, OwnAverage, read_self
from tests.tiny import TinyDense
from tests.training import small
from tests.training.test_resume import kill_when


def test_the_average_is_that_of_the_formula():
    student = TinyDense()
    teacher = OwnAverage(0.6).of(student)
    name, weight = next((name, p) for name, p in student.named_parameters())
    expected = weight.detach().clone()
    for step, value in enumerate((1.0, 2.0, 4.0, 8.0), start=1):
        with torch.no_grad():
            weight.fill_(value)
        teacher.follow(student)
        decay = min(0.6, 1 - 1 / step)  # 0, 0.5, 0.6, 0.6: the start is forgotten at once
        expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(teacher.detector.state_dict()[name], expected.expand_as(weight))
    assert not any(p.requires_grad for p in teacher.detector.parameters())
    assert not teacher.detector.training


def test_its_state_is_restored_exactly():
    student = TinyDense()
    first = AverageTeacher(student, 0.9)
    for _ in range(3):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(0.1)
        first.follow(student)
    second = AverageTeacher(TinyDense(seed=3), 0.9)
    second.load_state_dict(first.state_dict())
    assert small.differences(first.state_dict(), second.state_dict()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("self:emma", "teacher self:emma: there is no self:emma (did you mean 'ema'?); self:ema is the student's moving average"),
        ("self:fcos:resnet50", "both have the student's architecture, so none is given"),
        ("self:ema,decay=1", "teacher self:ema,decay=1: decay '1' is not a number from 0 to below 1"),
        ("self:ema,rate=1", "teacher self:ema,rate=1: no setting 'rate'; write --teacher self:ema,decay=0.999"),
        ("self:trained,decay=0.9", "teacher self:trained,decay=0.9: self:trained has no settings"),
    ],
)
def test_other_words_are_refused(text, said):
    with pytest.raises(RunError) as error:
        read_self(text)
    assert said in str(error.value)


def test_what_is_read():
    assert read_self("self:ema") == OwnAverage(0.999)
    assert read_self("self:ema,decay=0.9") == OwnAverage(0.9)
    assert read_self("self:trained") is None


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path: Path, monkeypatch):
    settings = {"checkpoint_every": 1, "method": "pkd", "epochs": 1}
    small.distill("self:ema,decay=0.7", tmp_path / "whole", **settings)
    with monkeypatch.context() as patched:
        kill_when(patched, Checkpoints, "on_train_batch_end", "after", 3)
        assert small.killed(lambda: small.distill("self:ema,decay=0.7", tmp_path / "run", **settings)) == -9
    small.distill("self:ema,decay=0.7", tmp_path / "run", **settings, resume=True)
    assert small.unequal_runs(tmp_path / "whole", tmp_path / "run") == []
    averages = [small.checkpoint(tmp_path / name)["detdistill"]["averages"] for name in ("whole", "run")]
    assert averages[0][0]["steps"] == 6
    assert small.differences(*averages) == []


def test_a_cache_and_an_inherited_head_are_refused(tmp_path: Path):
    with pytest.raises(RunError, match="cache: self:ema changes with the student; leave out --cache"):
        small.distill("self:ema", tmp_path / "run", "pkd", cache=str(tmp_path / "cache"))
    with pytest.raises(RunError, match="inherit: self:ema is made from the student, so there is nothing to copy"):
        small.distill("self:ema", tmp_path / "run", "pkd", inherit=True)
