"""``compare`` with exported files in place of runs."""

import json
from dataclasses import replace

import pytest
import torch

from detdistill import api, cli
from detdistill.compare import compare_runs
from detdistill.detectors.build import build_detector
from detdistill.errors import RunError
from detdistill.export.as_run import Measured, read_file_run
from detdistill.export.graphs import graph_of
from detdistill.export.proof import Stage
from detdistill.export.run import NOTES, Wanted, description, entry_of, example, note
from detdistill.export.write import write
from detdistill.files import checksum
from detdistill.settings import TrainSettings, as_plain
from detdistill.training.origin import known_origin
from detdistill.training.plan import view_settings
from tests.test_compare import METRICS, make_run

pytest.importorskip("onnxruntime")
MODEL = "fcos:resnet10t,channels=16-16-16-16,stem=8,neck=32,levels=3-4,convs=1"


class Images:
    """Stands for the validation images."""

    fingerprint, records = "val", ()


def make_file(run, name, ap, *, int8=False, size=None):
    """The exported file of a run, in a folder of its own, with its scores in export.json."""
    path = run.parent / "exported" / f"{run.name}-{name}"
    torch.manual_seed(0)
    detector = build_detector(MODEL, ("a", "b")).eval()
    graph = graph_of(detector)
    about = description(detector, graph, Wanted(path), view_settings(TrainSettings(size=size or TrainSettings().size)))
    about = replace(about, origin=known_origin(str(run)).to_plain(), int8=int8, canvas_hw=(64, 64))
    about = write(graph, about, example(about), path)
    metrics = {**dict.fromkeys(METRICS, -1.0), "AP": ap, "AP50": 2 * ap}
    stages = [
        Stage("torch", None, 1.0, ap, 1.0),
        Stage("onnx", str(path), 1.0, ap, 1.0, metrics=metrics, checksum=checksum(path)),
    ]
    note(path.parent / NOTES, path.name, entry_of(about, stages, Images()))
    return path


@pytest.fixture
def runs(tmp_path):
    """Baseline and distilled run of seeds 0 and 1, by role and seed."""
    aps = {("baseline", 0): 0.20, ("distilled", 0): 0.23, ("baseline", 1): 0.21, ("distilled", 1): 0.25}
    return {(role, seed): make_run(tmp_path / f"{role}-seed{seed}", role, seed, ap) for (role, seed), ap in aps.items()}


def test_files_pair_with_files_of_their_form(runs):
    aps = {("baseline", 0): 0.10, ("distilled", 0): 0.12, ("baseline", 1): 0.10, ("distilled", 1): 0.13}
    files = [make_file(runs[key], "model.int8.onnx", ap, int8=True) for key, ap in aps.items()]
    torch_gain, file_gain = compare_runs([*runs.values(), *files])
    assert (torch_gain.method, file_gain.method) == ("pkd", "pkd (onnx int8)")
    assert [pair.gain for pair in torch_gain.pairs] == pytest.approx([0.03, 0.04])
    assert [pair.gain for pair in file_gain.pairs] == pytest.approx([0.02, 0.03])
    assert (torch_gain.notes, file_gain.notes) == ((), ())
    assert [gain.method for gain in compare_runs(files)] == ["pkd (onnx int8)"]
    assert compare_runs(files, metric="AP50")[0].mean == pytest.approx(0.05)


def test_a_file_pairs_with_a_run_and_says_so(runs, capsys):
    file = make_file(runs["distilled", 0], "model.onnx", 0.22)
    (gain,) = compare_runs([runs["baseline", 0], file])
    assert (gain.method, gain.pairs[0].gain) == ("pkd (onnx)", pytest.approx(0.02))
    assert gain.notes[0] == "seed 0: the distilled student is onnx, the baseline torch"
    cli.main(["compare", str(runs["baseline", 0]), str(file)])
    assert "pkd (onnx)" in capsys.readouterr().out


def test_a_file_without_a_partner_is_refused(runs):
    file = make_file(runs["distilled", 0], "model.onnx", 0.22)
    expected = "stands for the distilled run of seed 0, and no baseline of the same student, data and seed is given"
    for given in ([file], [runs["distilled", 0], file], [runs["baseline", 1], runs["distilled", 1], file]):
        with pytest.raises(RunError, match=expected):
            compare_runs(given)
    teacher = make_run(runs["baseline", 0].parent / "teacher", "teacher", 0, 0.5)
    with pytest.raises(RunError, match="stands for the teacher run of seed 0, which has no pair"):
        compare_runs([*runs.values(), make_file(teacher, "model.onnx", 0.5)])


def test_two_files_of_one_form_and_seed(runs):
    first, second = (make_file(runs["distilled", 0], name, 0.22) for name in ("a.onnx", "b.onnx"))
    with pytest.raises(RunError, match=r"two pkd \(onnx\) runs with seed 0: .*a.onnx and .*b.onnx; give one of them"):
        compare_runs([runs["baseline", 0], first, second])


def test_a_file_for_another_size_has_another_budget(runs):
    file = make_file(runs["distilled", 0], "model.onnx", 0.22, size=96)
    with pytest.raises(RunError, match="unequal budgets, seed 0: size 640 and 96"):
        compare_runs([runs["baseline", 0], file])


def test_scores_that_are_not_those_of_the_file(runs):
    file = make_file(runs["distilled", 0], "model.onnx", 0.22)
    notes = json.loads((file.parent / NOTES).read_text())
    changed = json.loads(json.dumps(notes))
    changed[file.name]["stages"][1]["checksum"] = "1 00000000"
    (file.parent / NOTES).write_text(json.dumps(changed))
    with pytest.raises(RunError, match=r"is not the file that export.json beside it tells of; give --data to measure it"):
        read_file_run(file)
    changed = json.loads(json.dumps(notes))
    changed[file.name]["stages"][1]["metrics"] = None
    (file.parent / NOTES).write_text(json.dumps(changed))
    with pytest.raises(RunError, match="exported without --data, so its AP is not known; give --data"):
        read_file_run(file)
    (file.parent / NOTES).unlink()
    with pytest.raises(RunError, match=r"no export.json beside it tells its AP; give --data"):
        read_file_run(file)
    assert read_file_run(file, Measured({"AP": 0.3}, "val"))["metrics"] == {"AP": 0.3}


def test_files_are_measured_on_given_data(runs, monkeypatch):
    from types import SimpleNamespace

    from detdistill.api import models
    from detdistill.data import discover

    file = make_file(runs["distilled", 0], "model.onnx", 0.22)
    monkeypatch.setattr(discover, "load_split", lambda data, split: (Images(), []))
    monkeypatch.setattr(models, "evaluate", lambda model, data: SimpleNamespace(metrics={"AP": 0.24}))
    (gain,) = api.compare([runs["baseline", 0], file], data="cells")
    assert gain.pairs[0].gain == pytest.approx(0.04)
    monkeypatch.setattr(Images, "fingerprint", "other")
    with pytest.raises(RunError, match="were evaluated on different images"):
        api.compare([runs["baseline", 0], file], data="cells")
    with pytest.raises(RunError, match="only exported files are evaluated, and none is given; leave out --data"):
        api.compare(list(runs.values()), data="cells")


def test_a_file_of_no_run(tmp_path):
    detector = build_detector(MODEL, ("a", "b")).eval()
    graph, path = graph_of(detector), tmp_path / "model.onnx"
    about = description(detector, graph, Wanted(path), view_settings(TrainSettings(size=64)))
    write(graph, about, example(about), path)
    with pytest.raises(RunError, match="does not say of which run it was made; export the run folder again"):
        compare_runs([path])


def test_the_origin_in_a_file_has_the_settings_that_must_agree(runs):
    from detdistill.settings import BUDGET

    found = read_file_run(make_file(runs["distilled", 0], "model.onnx", 0.22))
    budget = {name: value for name, value in as_plain(TrainSettings()).items() if name in BUDGET}
    assert found["config"] == {**budget, "distill_weight": 1.0}
