import csv
import importlib.util
import json
import warnings

import pytest
import torch

from detdistill import api
from detdistill.data.digits import digits_folder
from detdistill.errors import DetdistillError
from detdistill.settings import TrainSettings
from detdistill.training.machine import check_machine

example = importlib.import_module("detdistill.demo")  # detdistill.demo is the function


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"epochs": 0}, "epochs: 0 is not a whole number, 1 or more"),
        ({"teacher_epochs": 0}, "epochs: 0 is not a whole number, 1 or more"),
        ({"train_images": 0}, "train_images: 0 is too small"),
        ({"seeds": (1, 1)}, "seeds: 1,1 must be different"),
        ({"method": "pdk"}, "no method 'pdk'"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_trained(tmp_path, settings, expected):
    with pytest.raises(DetdistillError, match=expected):
        example.demo(tmp_path / "demo", **settings)
    assert not (tmp_path / "demo").exists()


def test_images_of_an_earlier_demo_are_a_full_bar(tmp_path, monkeypatch):
    digits_folder(train=4, val=2, size=128, seed=0)

    def train(*_, progress, **__):
        (task,) = progress.rich.tasks
        assert (task.description, task.completed, task.total) == ("make the images", 6, 6)
        raise InterruptedError

    monkeypatch.setattr(api, "train", train)
    with pytest.raises(InterruptedError):
        example.demo(tmp_path / "demo", train_images=4, val_images=2)


def losses(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.slow
def test_the_demo_in_miniature(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(example.SETTINGS, "log_every", 1)
    folder = tmp_path / "demo"
    result = example.demo(folder, train_images=32, val_images=16, teacher_epochs=2, epochs=2)
    said = capsys.readouterr()
    assert [path.relative_to(folder).as_posix() for path in result.runs] == [
        "students/baseline-seed0",
        "students/distilled-seed0",
    ]
    for run in (folder / "teacher", *result.runs):
        assert {"config.yaml", "metrics.csv", "summary.json", "checkpoints", "student"} <= {path.name for path in run.iterdir()}
        assert json.loads((run / "summary.json").read_text())["steps"] == 8
        falling = losses(run)
        assert len(falling) == 8
        assert sum(falling[-3:]) < sum(falling[:3])
    comparison = json.loads((folder / "students" / "compare.json").read_text())
    assert comparison["gains"][0]["verdict"] == "one seed: no verdict"
    assert comparison["gains"][0]["pairs"][0]["seed"] == 0
    text = " ".join(said.out.split())
    assert "verdict" in text
    assert "faster convergence" in text
    assert (folder / "report.html").stat().st_size > 10_000
    assert "report: " in text
    student = result.runs[-1] / "student"
    spec = importlib.util.spec_from_file_location("load_student", student / "load_student.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.no_grad():
        found = module.load(student).eval()([torch.rand(3, 128, 128)])
    assert set(found[0]) >= {"boxes", "scores", "labels"}


@pytest.mark.parametrize(("capability", "precision"), [("AVX2", "32"), ("DEFAULT", "32"), ("AVX512", "bf16")])
def test_half_precision_only_where_the_cpu_has_it(monkeypatch, capability, precision):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert example.settings()["precision"] == precision
    wanted = TrainSettings(precision="bf16", device="cpu")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        check_machine(wanted)
    assert bool(told) == (precision == "32")
    assert all("no instructions for bf16" in str(one.message) for one in told)
