"""Runs with specialists: each teacher knows some classes, each image is labelled for those of one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detdistill import api
from detdistill.errors import DetdistillError
from detdistill.given import teachers_of
from detdistill.progress import Progress
from tests.training import small

LOW, HIGH = (f"digits:train=8,val=4,size=64,seed={seed},classes={classes}" for seed, classes in ((0, "0/1/2"), (3, "7/8/9")))
SHORT = {"epochs": 2, "monitor_every": 0}


@pytest.fixture(scope="module")
def specialists(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("specialists")
    for name, data in (("low", LOW), ("high", HIGH)):
        with Progress(quiet=True) as progress:
            api.train(small.MODEL, data, out=folder / name, progress=progress, **{**small.SETTINGS, **SHORT})
    return {"low": folder / "low", "high": folder / "high"}


def distill(teacher, data: str, method: str, **settings):
    with Progress(quiet=True) as progress:
        return api.distill(teacher, small.MODEL, data, method, progress=progress, **{**small.SETTINGS, **SHORT, **settings})


def test_a_student_of_all_classes_learns_from_both(specialists: dict[str, Path], tmp_path: Path):
    given = f"low={specialists['low']},high={specialists['high']}"
    text = "pkd@low+pkd@high"
    result = distill(given, f"{LOW}+{HIGH}", text, out=tmp_path / "run", unlabelled_score=0.0, baseline=True)
    summary = json.loads((tmp_path / "run" / "distilled-seed0" / "summary.json").read_text())
    assert summary["data"]["classes"] == ["0", "1", "2", "7", "8", "9"]
    assert list(summary["teachers"]) == ["low", "high"]
    assert [list(one["per_class"]) for one in summary["teachers"].values()] == [["0", "1", "2"], ["7", "8", "9"]]
    assert summary["teacher"] == given
    assert summary["teacher_metrics"] is None
    assert result.teacher_scores is None
    rows = small.rows(tmp_path / "run" / "distilled-seed0")
    assert {"train/pkd@low/pkd", "train/pkd@high/pkd"} <= rows[0].keys()
    assert max(float(row["unlabelled/boxes"] or 0) for row in rows if row.get("unlabelled/boxes")) > 0
    assert "unlabelled/boxes" not in small.rows(tmp_path / "run" / "baseline-seed0")[0]
    again = distill(given, f"{LOW}+{HIGH}", text, out=tmp_path / "run", unlabelled_score=0.0, baseline=True, resume=True)
    assert again.runs == result.runs


def test_one_teacher_after_the_other(specialists: dict[str, Path], tmp_path: Path):
    given = dict(specialists)
    distill(given, f"{LOW}+{HIGH}", "pkd@low>pkd@high", out=tmp_path / "run", unlabelled="background")
    stages = [row["stage"] for row in small.rows(tmp_path / "run")]
    assert list(dict.fromkeys(stages)) == ["distill-1", "distill"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 8  # 16 images, 4 at a time, 2 epochs in all


REFUSED = [
    ("low=LOW,low=HIGH", "pkd@low", {}, "teacher: two teachers are named low; give each a name of its own"),
    ("low=LOW,high=HIGH", "pkd@low", {}, "teacher high: no method learns from it"),
    ("low=LOW,high=HIGH", "pkd@low+pkd@hihg", {}, "pkd@hihg: there is no teacher 'hihg'; the teachers are low, high"),
    ("low=LOW,high=nowhere", "pkd@low+pkd@high", {}, "teacher high: "),
    ("low=LOW,high=HIGH", "pkd@low+fkd@high", {"cache": "c"}, "cache: it holds the outputs of one teacher; leave out --cache"),
    ("low=LOW,high=HIGH", "pkd@low+pkd@high", {"inherit": True}, "inherit: it copies from one teacher"),
    ("low=LOW,high=HIGH", "pkd@low>pkd@high", {"epochs": 3}, "epochs: 3 cannot be shared by the 2 turns of pkd@low>pkd@high"),
    (
        "low=LOW,high=HIGH",
        "pkd@low+bckd@high",
        {},
        "teacher high: bckd: it compares class scores, but the teacher does not know 0, 1, 2",
    ),
]


@pytest.mark.parametrize(("teacher", "method", "settings", "said"), REFUSED)
def test_bad_input_is_said_in_one_line(specialists: dict[str, Path], tmp_path: Path, teacher, method, settings, said):
    teacher = teacher.replace("LOW", str(specialists["low"])).replace("HIGH", str(specialists["high"]))
    with pytest.raises(DetdistillError) as error:
        distill(teacher, f"{LOW}+{HIGH}", method, out=tmp_path / "run", **settings)
    assert str(error.value).startswith(said)
    assert not (tmp_path / "run").exists()


def test_a_teacher_without_a_class_of_the_student_is_refused(specialists: dict[str, Path], tmp_path: Path):
    data = f"digits:train=8,val=4,size=64,classes=3/4+{LOW}"
    given = f"low={specialists['low']},high={specialists['high']}"
    with pytest.raises(
        DetdistillError, match=r"^teacher high: it knows none of the student's classes \(3, 4, 0, 1, 2\), only 7, 8, 9"
    ):
        distill(given, data, "pkd@low+pkd@high", out=tmp_path / "run")


def test_what_works_with_one_teacher_says_so(specialists: dict[str, Path], tmp_path: Path):
    given = f"low={specialists['low']},high={specialists['high']}"
    with pytest.raises(DetdistillError, match="doctor: it works with one trained teacher"):
        api.doctor(given, small.MODEL, f"{LOW}+{HIGH}", "pkd@low+pkd@high")
    with pytest.raises(DetdistillError, match="cache: it works with one trained teacher"):
        api.cache("self:ema", tmp_path / "cache", LOW, "pkd")


def test_a_name_begins_a_teacher_and_a_setting_does_not():
    assert teachers_of("a=x,b=torchvision:NAME,weights=DEFAULT", "pkd@a+pkd@b")[1] == {
        "a": "x",
        "b": "torchvision:NAME,weights=DEFAULT",
    }
    assert teachers_of("a=fcos:resnet18,width=0.5,b=y", "pkd@a+pkd@b")[1] == {"a": "fcos:resnet18,width=0.5", "b": "y"}
    assert teachers_of("fcos:resnet18,width=0.5", "pkd") == ("fcos:resnet18,width=0.5", {"": "fcos:resnet18,width=0.5"})
    assert teachers_of(None, "lgd") == (None, {})
    with pytest.raises(DetdistillError, match="teacher b: there is no model behind its name"):
        teachers_of("a=x,b=", "pkd@a+pkd@b")


def test_its_own_model_trained_first_is_the_teacher(tmp_path: Path):
    small.distill("self:trained", tmp_path / "run", "pkd", steps=2)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run-teacher", "run")]
    assert [one["role"] for one in summaries] == ["teacher", "distilled"]
    assert [one["steps"] for one in summaries] == [2, 2]
    assert summaries[1]["teacher"] == str(tmp_path / "run-teacher")
    assert summaries[0]["student"] == summaries[1]["student"]
    assert summaries[0]["seed"] != summaries[1]["seed"]  # otherwise the teacher would be the baseline of that seed
