"""The teacher's scores are kept by teacher, data and views."""

import pytest
import torch

from detdistill.data.discover import load_data
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.evaluation import Scores
from detdistill.progress import Progress
from detdistill.settings import DistillSettings
from detdistill.training import teacher_scores
from detdistill.training.teacher_scores import score_teacher
from tests.data.forms import make_coco

NAME = "fcos:resnet10t,channels=8-16-32-64,stem=8,neck=32,levels=3-4,convs=1"
SCORES = Scores({"AP": 0.5, "AP50": 0.6}, {"ant": 0.5}, 3, 1.5, {"missed": 0.1})


@pytest.fixture
def evaluated(monkeypatch, tmp_path):
    """How often a detector was evaluated; every evaluation gives ``SCORES``."""
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path / "cache"))
    found = []
    monkeypatch.setattr(teacher_scores, "evaluate", lambda *given, **named: found.append(1) or SCORES)
    return found


@pytest.fixture
def splits(tmp_path):
    return load_data(make_coco(tmp_path / "data"))


def teacher_of(splits, seed=0):
    torch.manual_seed(seed)
    return Teacher(build_detector(NAME, splits.train.classes))


def score(splits, seed=0, source=NAME, **settings):
    with Progress() as progress:
        return score_teacher(teacher_of(splits, seed), splits, DistillSettings(size=64, **settings), progress, source)


def test_the_same_teacher_data_and_views_are_scored_once(evaluated, splits, capsys):
    assert score(splits) == score(splits) == SCORES
    assert len(evaluated) == 1
    assert "AP 50.0  AP50 60.0 on 3 images, known from an earlier run" in capsys.readouterr().err


def test_other_weights_images_sizes_and_versions_are_scored_anew(evaluated, splits, tmp_path, monkeypatch):
    score(splits)
    score(splits, seed=1)
    score(splits, resize="stretch")
    (tmp_path / "more").mkdir()
    score(load_data(make_coco(tmp_path / "more" / "data", ids=(3, 2, 1))))
    monkeypatch.setattr(teacher_scores, "software", lambda: "another")
    score(splits)
    assert len(evaluated) == 5


def test_a_teacher_given_in_python_is_scored_each_time(evaluated, splits):
    score(splits, source=None)
    score(splits, source=None)
    assert len(evaluated) == 2


@pytest.mark.parametrize("text", ["", '{"key": 1}'])
def test_a_broken_file_is_replaced(text, evaluated, splits, tmp_path):
    score(splits)
    (kept,) = (tmp_path / "cache" / "teacher-scores").iterdir()
    kept.write_text(text)
    score(splits)
    score(splits)
    assert len(evaluated) == 2
