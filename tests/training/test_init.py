"""Starting from own weights (``init``), and early stopping (``patience``)."""

from __future__ import annotations

import json

import pytest
import torch

from detdistill import api
from detdistill.detectors.build import build_detector
from detdistill.detectors.inherit import start_from
from detdistill.detectors.load import load_detector
from detdistill.detectors.save import save_student
from detdistill.errors import ModelError, RunError
from detdistill.evaluation import Scores
from detdistill.settings import DistillSettings
from detdistill.training.callbacks import Checkpoints, Evaluation
from tests.training import small

CLASSES = tuple(str(digit) for digit in range(10))


def fresh(classes=CLASSES, seed=0, model=small.MODEL):
    torch.manual_seed(seed)
    return build_detector(model, classes)


def test_all_tensors_are_copied_and_shared_classes_by_name():
    source, student, before = fresh(("b", "x", "a"), 1), fresh(("a", "b", "c")), fresh(("a", "b", "c")).state_dict()
    found = start_from(student, source)
    mine, theirs = student.state_dict(), source.state_dict()
    assert len(found.copied) == len(mine)
    rows = "model.head.classification_head.cls_logits.bias"  # background, then the classes
    assert mine[rows].tolist() == [*theirs[rows][[0, 3, 1]].tolist(), before[rows][3].item()]
    others = [name for name in mine if "cls_logits" not in name]
    assert all(torch.equal(mine[name], theirs[name]) for name in others)
    assert not any(torch.equal(before[name], theirs[name]) for name in others if name.endswith("conv1.weight"))


def test_of_another_size_what_fits_is_taken_and_counted():
    found = start_from(fresh(), fresh(model=small.MODEL.replace("neck=32", "neck=64")))
    assert 20 < len(found.copied) < len(fresh().state_dict())
    reason = dict(found.skipped)["model.backbone.fpn.inner_blocks.0.0.weight"]
    assert reason == "its shape is [32, 16, 1, 1], the other's [64, 16, 1, 1]"


def test_a_run_starts_from_weights_and_says_so(tmp_path, capsys):
    """A rate of almost 0 leaves the weights as they were; a resumed run refuses other weights."""
    source = save_student(fresh(seed=5), tmp_path / "source")
    settings = {**small.SETTINGS, "epochs": 1, "lr": 1e-12, "weight_decay": 0.0, "init": str(source)}
    run = api.train(small.MODEL, small.DATA, out=tmp_path / "run", **settings)
    said = " ".join(capsys.readouterr().err.split())
    mine, theirs = load_detector(run.folder).state_dict(), load_detector(source).state_dict()
    assert f"started from {source}: {len(theirs)} of {len(theirs)} tensors" in said
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-6) for name in mine if name.endswith(("weight", "bias")))
    about = json.loads((run.folder / "summary.json").read_text())["init"]
    assert (about["from"], about["taken"], about["total"]) == (str(source), len(theirs), len(theirs))
    assert json.loads((run.folder / "inputs.json").read_text())["initial weights"] == about["fingerprint"]
    assert f"init: {source}" in (run.folder / "config.yaml").read_text()
    (run.folder / "summary.json").unlink()
    save_student(fresh(seed=6), source)
    with pytest.raises(RunError, match="the initial weights changed since the run started"):
        api.train(small.MODEL, small.DATA, out=run.folder, resume=True, **settings)
    with pytest.raises(RunError, match=r"cannot resume .*: init was '.*' and is now None"):
        api.train(small.MODEL, small.DATA, out=run.folder, resume=True, **{**settings, "init": None})


def test_weights_that_cannot_serve_are_refused_in_one_line(tmp_path):
    detr = "detr:resnet10t,channels=16-32-64-128,stem=16,dim=32,heads=2,ffn=32,encoder=1,decoder=1,queries=10"
    source = save_student(build_detector(detr, CLASSES), tmp_path / "source")
    said = r"init: \d+ of the \d+ tensors of fcos:.* \(\d % of its values\) fit those of .*source.*same architecture"
    with pytest.raises(RunError, match=said):
        small.train(tmp_path / "run", init=str(source))
    with pytest.raises(ModelError, match="has no weights"):
        small.train(tmp_path / "run", init="fcos:resnet18")
    assert not (tmp_path / "run").exists()


def scripted(aps):
    """Evaluations that find the given AP, one after the other, by optimizer step."""

    def run(self, trainer, module):
        step = trainer.global_step
        self.evaluate = lambda detector: Scores({**dict.fromkeys(("AP", "AP50"), aps[step // 6 - 1])}, {}, 8)
        return plain(self, trainer, module)

    plain = Evaluation.run
    return run


def test_a_run_stops_early_and_exactly_so_when_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluation, "run", scripted([0.1, 0.3, 0.2, 0.3, 0.9, 0.9]))
    settings = {"epochs": 6, "patience": 2}
    whole = small.train(tmp_path / "whole", **settings)
    assert (whole.summary["steps"], whole.summary["stopped_early"], whole.summary["best_ap"]) == (24, True, 0.3)
    assert [row["val/AP"] for row in small.rows(whole.folder) if row["val/AP"]] == ["0.1", "0.3", "0.2", "0.3"]

    def die_after(step):
        save = Checkpoints.on_train_epoch_end

        def saved(self, trainer, module):
            save(self, trainer, module)
            if trainer.global_step == step:
                small.die()

        return saved

    for step in (18, 24):
        folder = tmp_path / f"killed-{step}"
        with monkeypatch.context() as patched:
            patched.setattr(Checkpoints, "on_train_epoch_end", die_after(step))
            assert small.killed(lambda folder=folder: small.train(folder, **settings)) == -9
        again = small.train(folder, **settings, resume=True)
        assert (again.summary["steps"], again.summary["stopped_early"]) == (24, True)
        assert small.unequal_runs(whole.folder, folder) == []


def test_early_stopping_goes_with_no_baseline():
    with pytest.raises(RunError, match=r"patience: .*leave out --patience or --baseline"):
        DistillSettings(patience=2, baseline=True)
