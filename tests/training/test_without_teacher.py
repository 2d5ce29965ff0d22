"""Methods that bring their own teacher run without ``--teacher``, are compared, and may be cached."""

import json

import pytest

from detdistill import api
from detdistill.errors import RunError
from detdistill.progress import Progress
from tests.training.small import DATA, MODEL, SETTINGS, rows

DICOD = "dicod,classifier=test_resnet,size=32,classifier_epochs=0.5"


def test_a_baseline_and_a_run_without_teacher(tmp_path):
    settings = {**SETTINGS, "steps": 2, "baseline": True, "stages": tmp_path / "stages", "out": tmp_path / "runs"}
    with Progress(quiet=True) as progress:
        result = api.distill(None, MODEL, DATA, DICOD, progress=progress, **settings)
    baseline, distilled = (json.loads((run / "summary.json").read_text()) for run in result.runs)
    assert (baseline["role"], distilled["role"]) == ("baseline", "distilled")
    assert distilled["teacher"] is None
    assert distilled["method"] == DICOD
    assert distilled["steps"] == baseline["steps"] == 2  # the classifier's are no part of the student's budget
    totals = {(row["stage"], row["total"]) for row in rows(result.runs[1])}
    assert totals == {("classifier", "1"), ("distill", "2")}  # half as long, in steps as in epochs
    assert distilled["images_seen"] == 8
    assert result.gains[0].teacher == "none"


def test_the_label_encoder_is_trained_once_for_all_seeds(tmp_path):
    settings = {**SETTINGS, "steps": 3, "seeds": (0, 1), "stages": tmp_path / "stages", "out": tmp_path / "runs"}
    with Progress(quiet=True) as progress:
        result = api.distill(None, MODEL, DATA, "labelenc,auxiliary_until=0.5", progress=progress, **settings)
    first, second = ({(row["stage"], row["total"]) for row in rows(run)} for run in result.runs)
    assert first == {("encoder", "4"), ("distill", "3")}
    assert second == {("distill", "3")}
    assert len(list((tmp_path / "stages").glob("*.safetensors"))) == 1


def test_other_methods_ask_for_a_teacher(tmp_path):
    with pytest.raises(RunError, match=r"teacher: pkd needs a teacher \(--teacher\), a cache"):
        api.distill(None, MODEL, DATA, f"pkd+{DICOD}", out=tmp_path / "run", **SETTINGS)
