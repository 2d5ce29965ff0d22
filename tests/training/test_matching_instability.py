"""``--instability``: logged beside every evaluation, without a trace in what is trained, and through an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from detdistill import api
from detdistill.data.discover import load_data
from detdistill.detectors.build import build_detector
from detdistill.detectors.load import load_student
from detdistill.detectors.probe import tiny_name
from detdistill.errors import DetdistillError
from detdistill.evaluation.instability import first_images, index_vectors, instability, instability_of_layers
from detdistill.progress import Progress
from detdistill.settings import TrainSettings
from detdistill.training.callbacks import Checkpoints
from detdistill.training.machine import seed_everything
from detdistill.training.run import view_settings
from tests.training import small
from tests.training.test_resume import kill_when

MODEL = tiny_name("deformable_detr")
SETTINGS: dict[str, Any] = {**small.SETTINGS, "size": 128, "batch": 8, "lr": 0.02, "monitor_every": 0, "instability": 5}


def train(out: Path, model: str = MODEL, **settings: Any) -> Any:
    with Progress(quiet=True) as progress:
        return api.train(model, small.DATA, out=out, progress=progress, **{**SETTINGS, **settings})


def logged(folder: Path, column: str) -> list[float]:
    return [float(row[column]) for row in small.rows(folder) if row.get(column)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "measured"
    train(folder, checkpoint_every=1)
    return folder


def test_two_epochs_log_what_the_functions_say(measured: Path):
    splits = load_data(small.DATA)
    settings = TrainSettings(**SETTINGS)
    images = first_images(splits.val, 5)
    seed_everything(0)
    vectors = [index_vectors(build_detector(MODEL, splits.train.classes), images, view_settings(settings))]
    vectors.append(index_vectors(load_student(measured / "student"), images, view_settings(settings)))
    assert vectors[0].shape == (2, 5, 10)
    changes, layers = logged(measured, "val/IS"), logged(measured, "val/IS_layers")
    assert len(changes) == len(layers) == 2
    assert layers[1] == pytest.approx(instability_of_layers(vectors[1]), rel=1e-5)
    most = 2 * sum(len(record.labels) for record in images.records) / 5
    assert all(0 < change <= most for change in changes)
    # From before training to its end in two steps of an epoch, or in one: the last weights are the same.
    assert instability(*vectors) <= sum(changes) + 1e-4
    where = [(row["step"], row["epoch"]) for row in small.rows(measured) if row.get("val/IS")]
    assert where == [(row["step"], row["epoch"]) for row in small.rows(measured) if row.get("val/AP")]


def test_one_epoch_is_compared_with_the_weights_before_it(tmp_path: Path):
    train(tmp_path / "run", epochs=1)
    splits = load_data(small.DATA)
    seed_everything(0)
    detectors = (build_detector(MODEL, splits.train.classes), load_student(tmp_path / "run" / "student"))
    views = view_settings(TrainSettings(**SETTINGS))
    expected = instability(*(index_vectors(detector, first_images(splits.val, 5), views) for detector in detectors))
    assert logged(tmp_path / "run", "val/IS") == [pytest.approx(expected, rel=1e-5)]
    assert expected > 0


def test_it_leaves_no_trace_in_what_is_trained(measured: Path, tmp_path: Path):
    train(tmp_path / "plain", checkpoint_every=1, instability=0)
    students = [(folder / "student" / "model.safetensors").read_bytes() for folder in (measured, tmp_path / "plain")]
    assert students[0] == students[1]
    assert not any("IS" in name for name in small.rows(tmp_path / "plain")[0])


@pytest.mark.parametrize("step", [2, 5])
def test_killed_and_resumed_logs_the_same(step: int, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patched:
        kill_when(patched, Checkpoints, "on_train_batch_end", "after", step)
        assert small.killed(lambda: train(tmp_path / "run", checkpoint_every=1)) == -9
    train(tmp_path / "run", checkpoint_every=1, resume=True)
    assert small.unequal_runs(measured, tmp_path / "run") == []
    states = [small.checkpoint(folder)["callbacks"]["MatchingInstability"] for folder in (measured, tmp_path / "run")]
    assert torch.equal(states[0]["before"], states[1]["before"])


@pytest.mark.parametrize(("before", "after"), [(0, 5), (5, 3)])
def test_resumed_with_another_number_it_begins_anew(before: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patched:
        kill_when(patched, Checkpoints, "on_train_batch_end", "after", 2)
        assert small.killed(lambda: train(tmp_path / "run", checkpoint_every=1, instability=before)) == -9
    train(tmp_path / "run", checkpoint_every=1, instability=after, resume=True)
    assert len(logged(tmp_path / "run", "val/IS")) == 1
    assert len(logged(tmp_path / "run", "val/IS_layers")) == 2


def test_baseline_and_distilled_runs_log_it_too(measured: Path, tmp_path: Path):
    with Progress(quiet=True) as progress:
        wanted = {**SETTINGS, "epochs": 1, "score_teacher": False, "baseline": True, "ema": 0.5}
        result = api.distill(str(measured), MODEL, small.DATA, "pkd", out=tmp_path / "both", progress=progress, **wanted)
    assert [len(logged(folder, "val/IS")) for folder in result.runs] == [1, 1]


def test_a_detector_without_queries_is_refused_before_anything_is_made(measured: Path, tmp_path: Path):
    sentence = r"^instability: fcos:\S+ has no queries that are matched to boxes one to one; .* leave out --instability$"
    with pytest.raises(DetdistillError, match=sentence):
        train(tmp_path / "run", small.MODEL)
    with pytest.raises(DetdistillError, match=sentence), Progress(quiet=True) as progress:
        api.distill(str(measured), small.MODEL, small.DATA, "pkd", out=tmp_path / "run", progress=progress, **SETTINGS)
    assert not (tmp_path / "run").exists()
