"""Students and teachers given in Python, from the examples of docs/detectors.md to what is refused."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import detdistill
from detdistill import api
from detdistill.errors import ModelError, RunError
from detdistill.structures import Detections
from detdistill.training.own_models import own_student

DOC = Path(__file__).parents[1] / "docs" / "detectors.md"
CLASSES = [str(digit) for digit in range(10)]
DATA = "digits:train=16,val=4,size=64,seed=0"
QUICK = {"size": 64, "batch": 8, "device": "cpu", "threads": 1, "epochs": 1, "report": False, "monitor_every": 0}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.p3 = nn.Conv2d(3, 4, 8, stride=8)
        self.head = nn.Linear(4, 10)

    def forward(self, images):
        return self.head(self.p3(images).mean(dim=(2, 3)))

    def own_loss(self, output, batch):
        return {"own": self.head(self.p3(batch.images).mean(dim=(2, 3))).square().mean()}


def loss(output, batch):
    return {"count": output.square().mean()}


def detect(output, batch):
    box = torch.tensor([[4.0, 4.0, 30.0, 30.0]])
    return [Detections(box, one.sigmoid().max().reshape(1), one.argmax().reshape(1)) for one in output]


def wrapped(net=None, **options):
    net = Net() if net is None else net
    return detdistill.wrap(net, taps=["p3"], **{"loss": loss, "detect": detect, "classes": CLASSES, **options})


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "student" / "model.safetensors")


def test_the_examples_of_the_documentation_run(tmp_path, monkeypatch, capsys):
    examples = re.findall(r"<!-- example: own \w+ -->\n+```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    scope = {}
    exec(compile(examples[0], str(DOC), "exec"), scope)
    said = capsys.readouterr().out
    assert re.fullmatch(r"pkd: AP [+-]\d+\.\d \(.* \.\. .*\), (gain|no gain shown|worse), 2 seeds\n", said)
    summaries = [json.loads((run / "summary.json").read_text()) for run in scope["result"].runs]
    assert [(one["role"], one["seed"], one["student"]) for one in summaries] == [
        ("baseline", 0, "own:Net"),
        ("distilled", 0, "own:Net"),
        ("baseline", 1, "own:Net"),
        ("distilled", 1, "own:Net"),
    ]
    assert {one["teacher"] for one in summaries[1::2]} == {"own:Net"}
    assert (tmp_path / "runs" / "own" / "report.html").exists()
    exec(compile(examples[1], str(DOC), "exec"), scope)
    assert set(scope["losses"].terms) == {"classes", "boxes", "pkd"}


def test_every_run_starts_from_a_fresh_copy_and_a_finished_one_is_read_again(tmp_path):
    detector = wrapped()
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    quick = {**QUICK, "lr": 1e-9, "weight_decay": 0.0, "baseline": True, "seeds": (0, 1), "score_teacher": False}
    result = api.distill(detector, detector, DATA, "pkd", out=tmp_path / "copied", **quick)
    for run in result.runs:
        for name, tensor in weights(run).items():
            torch.testing.assert_close(tensor, before[f"model.{name}"], rtol=0, atol=1e-6)
    result = api.distill(detector, wrapped, DATA, "pkd", out=tmp_path / "built", **quick)
    stems = [weights(run)["p3.weight"] for run in result.runs]
    torch.testing.assert_close(stems[0], stems[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(stems[2], stems[3], rtol=0, atol=1e-6)
    assert (stems[0] - stems[2]).abs().max() > 0.01, "another seed, other weights"
    one = {key: value for key, value in quick.items() if key not in ("baseline", "seeds", "score_teacher")}
    trained = api.train(wrapped, DATA, out=tmp_path / "alone", **one)
    again = api.train(wrapped, DATA, out=tmp_path / "alone", resume=True, **one)
    assert all(torch.equal(a, b) for a, b in zip(trained.student.parameters(), again.student.parameters(), strict=True))
    assert again.scores.metrics == trained.scores.metrics
    with pytest.raises(ModelError, match="own:Net was given in Python; it cannot be built from its name"):
        api.train("own:Net", DATA, **one)


def test_what_cannot_be_a_student_is_refused_in_one_line(tmp_path):
    net = Net()
    frozen = wrapped(Net()).requires_grad_(False)
    shared = wrapped()
    for student, said in (
        (wrapped(loss=None), "student: Net was wrapped without loss; give them to wrap"),
        (wrapped(loss=None, detect=None), "student: Net was wrapped without loss and detect"),
        (net, r"student: a Net is no detector yet; wrap it: detdistill\.wrap\(model, taps="),
        (frozen, "student: no parameter of Net can be trained"),
        (detdistill.Teacher(wrapped()), "student: a Teacher is frozen"),
        (
            wrapped(net, loss=lambda o, b: net.own_loss(o, b)),
            "student: loss of Net refers to the model itself, .* give a function",
        ),
        (Net, r"student: a type cannot be trained"),
        (Net().forward, "missing 1 required"),
        (lambda: net, r"student: the function returned a Net, not a detector; return detdistill\.wrap"),
        (lambda: shared, "student: the function returns the same model twice"),
        (3, "student: a int cannot be trained"),
    ):
        with pytest.raises((ModelError, TypeError), match=said):
            api.distill(wrapped(), student, DATA, "pkd", out=tmp_path / "run", **QUICK)
    with pytest.raises(ModelError, match=r"the classes \(none\), but the data have \(0, 1, .*give wrap\(\.\.\., classes"):
        api.train(wrapped(classes=()), DATA, out=tmp_path / "run", **QUICK)
    with pytest.raises(RunError, match="jobs, devices, on: own:Net was given in Python and cannot be sent"):
        api.distill("runs/x", wrapped(), DATA, "pkd", baseline=True, jobs=2, out=tmp_path / "run", **QUICK)
    bound = functools.partial(wrapped, net, loss=lambda o, b: net.own_loss(o, b))
    with pytest.raises(ModelError, match="returns the same model twice"):
        own_student(bound)
    with pytest.raises(ModelError, match="ema evaluates a copy"):
        api.train(own_loss_by_closure, DATA, ema=0.9, out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


def own_loss_by_closure():
    net = Net()
    return wrapped(net, loss=lambda output, batch: net.own_loss(output, batch))


def test_functions_that_move_with_the_copy_are_allowed():
    net = Net()
    copied = own_student(wrapped(net, loss=net.own_loss)).build()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    batch = detdistill.Batch(
        torch.rand(1, 3, 64, 64), torch.tensor([[64, 64]]), (), ids=(0,), views=(detdistill.View((64, 64), (64, 64)),)
    )
    assert copied.loss(copied(batch).prediction, batch).terms["own"] > 0


def test_objects_that_are_no_detectors_are_named():
    with pytest.raises(
        ModelError, match=r"Teacher: needs a detector, not a str; load it first: Teacher\(detdistill\.load_detector"
    ):
        detdistill.Teacher("runs/teacher")
    with pytest.raises(ModelError, match="Teacher: a Net is no detector yet"):
        detdistill.Teacher(Net())
    with pytest.raises(detdistill.DetdistillError, match="build_method: teacher: a str is no detector"):
        detdistill.build_method("pkd", "runs/teacher", wrapped())
    with pytest.raises(detdistill.DetdistillError, match="build_method: student: a Net is no detector"):
        detdistill.build_method("pkd", wrapped(), Net())
    teacher = wrapped()
    assert detdistill.build_method("pkd", teacher, wrapped()).teacher.detector is teacher
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_several_devices_need_a_script(monkeypatch):
    import __main__

    monkeypatch.delattr(__main__, "__file__", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RunError, match=r"devices: 2 processes cannot be started from a notebook or an interactive session"):
        api.train("fcos:resnet18", DATA, devices=2)
