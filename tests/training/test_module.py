"""What a run trains, what it leaves alone, and what it watches."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from detdistill.data.discover import load_data
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Detector, Teacher
from detdistill.detectors.load import load_detector
from detdistill.methods.mgd import MGD
from detdistill.methods.pkd import PKD
from detdistill.methods.shared.contract import Stage, TeacherFree, teach_by_canvas
from detdistill.progress import Progress
from detdistill.settings import DistillSettings, TrainSettings
from detdistill.structures import Batch, Clock, Losses
from detdistill.training import session as session_module
from detdistill.training.callbacks import Checkpoints
from detdistill.training.folder import start_folder
from detdistill.training.module import StageModule
from detdistill.training.plan import Plan
from detdistill.training.run import run
from detdistill.training.session import Session, open_session
from detdistill.training.stage_loop import StageLoop
from tests.tiny import TinyDense
from tests.training import small
from tests.training.test_resume import kill_when


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> list[StageModule]:
    """All modules that were trained, with the batches they saw as ``module.ids``."""
    made: list[StageModule] = []
    build, step = StageModule.__init__, StageModule.training_step

    def remembered(self: Any, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        self.ids = []
        self.first = {name: value.clone() for name, value in self.student.state_dict().items()}
        made.append(self)

    def watched(self: Any, batch: Batch, index: int) -> Any:
        self.ids.append((batch.ids, batch.views))
        return step(self, batch, index)

    monkeypatch.setattr(StageModule, "__init__", remembered)
    monkeypatch.setattr(StageModule, "training_step", watched)
    return made


def student_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_detector(folder).state_dict()


# --------------------------------------------------------------------------------------------------- does it distil?


def test_the_method_trains_and_the_teacher_does_not(teacher: Path, tmp_path: Path, modules, monkeypatch):
    teachers: list[Teacher] = []
    observe = Teacher.observe

    def watched(self: Teacher, *arguments: Any, **options: Any) -> Any:
        assert not any(module.training for module in self.detector.modules())
        assert not any(p.requires_grad for p in self.detector.parameters())
        teachers.append(self)
        return observe(self, *arguments, **options)

    monkeypatch.setattr(Teacher, "observe", watched)
    small.distill(teacher, tmp_path / "run")
    (module,) = modules
    assert isinstance(module.method, MGD)
    state = small.checkpoint(tmp_path / "run")["state_dict"]
    assert {key.split(".")[0] for key in state} == {"student", "method"}
    assert set(state) == {f"student.{key}" for key in module.student.state_dict()} | {
        f"method.{key}" for key in module.method.state_dict()
    }
    optimized = {id(p) for group in module.optimizers().param_groups for p in group["params"]} if module._trainer else set()
    assert {id(p) for p in module.method.parameters()} <= optimized
    fresh = MGD(teachers[0], build_detector(small.MODEL, module.student.spec.classes))
    assert not small.differences(list(fresh.state_dict()), list(module.method.state_dict()))
    assert len(set(map(id, teachers))) == 1
    assert small.differences(dict(teachers[0].detector.state_dict()), dict(student_of(teacher))) == []
    assert teachers[0]._seen is None, "the last observation keeps its memory"


def test_every_part_of_student_and_method_moves(teacher: Path, tmp_path: Path, modules):
    small.distill(teacher, tmp_path / "run", checkpoint_every=1, steps=1)
    first = small.checkpoint(tmp_path / "run")["state_dict"]
    small.distill(teacher, tmp_path / "longer")
    last = small.checkpoint(tmp_path / "longer")["state_dict"]
    names = [name for name, _ in modules[0].named_parameters()]
    still = [name for name in names if torch.equal(first[name], last[name])]
    assert still == []


def test_baseline_and_distilled_start_alike_and_see_the_same(teacher: Path, tmp_path: Path, modules):
    small.train(tmp_path / "baseline", role="baseline")
    small.distill(teacher, tmp_path / "distilled")
    baseline, distilled = modules
    assert small.differences(baseline.first, distilled.first) == []
    assert baseline.ids == distilled.ids
    assert len(baseline.ids) == small.STEPS
    assert small.differences(dict(student_of(tmp_path / "baseline")), dict(student_of(tmp_path / "distilled"))) != []
    other = small.train(tmp_path / "other", role="baseline", seed=1)
    assert other.summary["seed"] == 1
    assert modules[2].ids != baseline.ids
    assert small.differences(modules[2].first, baseline.first) != []


@pytest.mark.parametrize("method", ["pkd", "fitnet"])
def test_without_weight_distillation_is_the_baseline(method: str, teacher: Path, tmp_path: Path):
    """Clipping is off: a method's own parameters have a gradient that counts in the norm."""
    small.train(tmp_path / "baseline", role="baseline", clip=0)
    small.distill(teacher, tmp_path / "distilled", method=method, dis=0.0, clip=0)
    assert small.differences(dict(student_of(tmp_path / "baseline")), dict(student_of(tmp_path / "distilled"))) == []
    names = [f"val/{name}" for name in ("AP", "AP50", "AR100")]
    scores = [[row[name] for row in small.rows(tmp_path / run) for name in names] for run in ("baseline", "distilled")]
    assert scores[0] == scores[1]


def test_dis_scales_what_is_learned(teacher: Path, tmp_path: Path):
    for dis in (1.0, 3.0):
        small.distill(teacher, tmp_path / str(dis), method="pkd", dis=dis, steps=1)
    one, three = (small.rows(tmp_path / name)[0] for name in ("1.0", "3.0"))
    assert float(three["train/pkd"]) == pytest.approx(3 * float(one["train/pkd"]), rel=1e-5)
    assert three["train/classification"] == one["train/classification"]
    assert float(three["loss"]) - float(one["loss"]) == pytest.approx(2 * float(one["train/pkd"]), rel=1e-4)


def test_the_distillation_weight_reaches_a_stage_of_hints(teacher: Path, tmp_path: Path, modules):
    hints = {}
    for weight in (1.0, 3.0, 0.0):
        folder = tmp_path / str(weight)
        small.distill(teacher, folder, method="fitnet,hint_share=1", distill_weight=weight, steps=2, clip=0, weight_decay=0)
        hints[weight] = [row for row in small.rows(folder) if row["stage"] == "hint" and row["loss"]]
        assert len(hints[weight]) == 2
    first = {weight: float(rows[0]["train/fitnet"]) for weight, rows in hints.items()}
    assert first[1.0] > 0
    assert first[3.0] == pytest.approx(3 * first[1.0], rel=1e-5)
    assert float(hints[3.0][0]["loss"]) == pytest.approx(first[3.0], rel=1e-5)
    assert [float(row["loss"]) for row in hints[0.0]] == [0.0, 0.0]
    for weight, (hint, distill) in zip(hints, zip(modules[::2], modules[1::2], strict=True), strict=True):
        weights = [name for name, _ in hint.student.named_parameters()]
        moved = [name for name in weights if not torch.equal(hint.first[name], distill.first[name])]
        assert bool(moved) == (weight > 0), f"weight {weight}: {moved[:3]}"


class Relabelling(TeacherFree):
    """Shrinks every box to its middle, by how far training is; one term, which is distilled."""

    slug, title, bibtex = "relabelling", "a toy", ""
    seen: Sequence[Any] = ()

    def relabel(self, student: Detector, features: Any, batch: Batch, clock: Clock) -> tuple[Batch, Losses]:
        targets = []
        for target in batch.targets:
            middle = (target.boxes_xyxy[:, :2] + target.boxes_xyxy[:, 2:]).repeat(1, 2) / 2
            targets.append(replace(target, boxes_xyxy=middle + (target.boxes_xyxy - middle) * (1 - 0.5 * clock.progress)))
        return batch.with_targets(targets), Losses({"chosen": features.maps[0].square().mean()})

    def learn(self, student: Any, seen: Any, taught: Any, batch: Batch, clock: Clock) -> Losses:
        type(self).seen = [*type(self).seen, (clock.step, batch.targets)]
        return Losses({})


def test_a_run_trains_on_the_targets_that_its_method_chooses(teacher: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(session_module, "build_method", lambda text, teacher, student: Relabelling(teacher, student))
    monkeypatch.setattr(Relabelling, "seen", ())
    settings = DistillSettings(**small.SETTINGS, out=tmp_path / "run", distill_weight=2.0)
    plan = Plan(small.MODEL, small.DATA, settings, role="distilled", teacher=str(teacher))
    given: list[Any] = []
    step = StageModule.training_step
    monkeypatch.setattr(StageModule, "training_step", lambda self, b, i: given.append(b.targets) or step(self, b, i))
    run(open_session(plan, load_data(small.DATA), Teacher(load_detector(teacher))), Progress(quiet=True))
    assert len(given) == len(Relabelling.seen) == small.STEPS
    for (number, chosen), original in zip(Relabelling.seen, given, strict=True):
        for mine, theirs in zip(chosen, original, strict=True):
            sides, before = (boxes[:, 2:] - boxes[:, :2] for boxes in (mine.boxes_xyxy, theirs.boxes_xyxy))
            torch.testing.assert_close(sides, before * (1 - 0.5 * number / small.STEPS), rtol=1e-4, atol=1e-4)
    row = small.rows(tmp_path / "run")[0]
    terms = [float(row[name]) for name in row if name.startswith("train/") and row[name]]
    assert float(row["train/chosen"]) > 0
    assert float(row["loss"]) == pytest.approx(sum(terms), rel=1e-4)


def test_inherit_copies_the_head(teacher: Path, tmp_path: Path, modules):
    shown = Console(file=io.StringIO(), width=200)
    result = small.distill(teacher, tmp_path / "run", console=shown, inherit=True)
    assert re.search(r"^\d+ tensors of neck and head inherited from the teacher", shown.file.getvalue(), flags=re.MULTILINE)
    theirs = student_of(teacher)
    parts = modules[0].student.parts()
    names = parts.names(modules[0].student, (*parts.neck, *parts.head))
    assert {name.split(".")[1] for name in names} == {"backbone", "head"}
    head = {name: value for name, value in modules[0].first.items() if name in names}
    assert len(head) > 10
    assert all(torch.equal(value, theirs[name]) for name, value in head.items())
    assert not all(torch.equal(value, theirs[name]) for name, value in modules[0].first.items())
    assert json.loads((result.folder / "summary.json").read_text())["inherit"] is True


def test_shares_sum_to_one_and_are_measured_on_time(teacher: Path, tmp_path: Path):
    for accumulate in (1, 2):
        folder = tmp_path / str(accumulate)
        small.distill(teacher, folder, monitor_every=3, log_every=2, accumulate=accumulate, batch=4 // accumulate, ema=0.5)
        measured = [row for row in small.rows(folder) if row["share/mgd"]]
        assert [int(row["step"]) for row in measured] == [1, 4, 7, 10]
        for row in measured:
            shares = [float(value) for name, value in row.items() if name.startswith("share/")]
            assert len(shares) == 4
            assert sum(shares) == pytest.approx(1, abs=1e-5)
            assert min(shares) > 0
        logged = [int(row["step"]) for row in small.rows(folder) if row["loss"]]
        assert logged == [1, 2, 4, 6, 7, 8, 10, 12]


def test_measuring_shares_changes_nothing(teacher: Path, tmp_path: Path):
    small.distill(teacher, tmp_path / "a", monitor_every=0)
    small.distill(teacher, tmp_path / "b", monitor_every=1)
    states = [small.checkpoint(tmp_path / name)["state_dict"] for name in ("a", "b")]
    assert small.differences(*states) == []


def test_half_precision_runs_networks_in_it_and_computes_losses_in_float32(teacher: Path, tmp_path: Path, monkeypatch, modules):
    kinds: list[Any] = []
    learn = PKD.learn

    def watched(self, student, seen, taught, batch, clock):
        losses = learn(self, student, seen, taught, batch, clock)
        kinds.append((seen.features.maps[0].dtype, taught.features.maps[0].dtype, losses.terms["pkd"].dtype))
        kinds.append(torch.is_autocast_enabled("cpu"))  # networks may run again inside
        return losses

    convolved = []
    monkeypatch.setattr(PKD, "learn", watched)
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: convolved.append(forward(self, x)) or convolved[-1])
    small.distill(teacher, tmp_path / "run", method="pkd", precision="bf16", steps=1, evaluate_every=5, monitor_every=0)
    assert kinds == [(torch.float32, torch.float32, torch.float32), True]
    assert torch.bfloat16 in {tensor.dtype for tensor in convolved}
    assert {p.dtype for p in modules[0].parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------------------ averages and batches


def test_moving_average_by_hand(tmp_path: Path, modules, monkeypatch):
    history: list[dict[str, torch.Tensor]] = []
    step = StageModule.optimizer_step

    def watched(self: Any, *arguments: Any, **options: Any) -> None:
        step(self, *arguments, **options)
        history.append({name: p.detach().clone() for name, p in self.student.named_parameters()})

    monkeypatch.setattr(StageModule, "optimizer_step", watched)
    small.train(tmp_path / "run", ema=0.75)
    assert len(history) == small.STEPS
    expected = history[0]
    for weights in history[1:]:
        expected = {name: 0.75 * expected[name] + 0.25 * value for name, value in weights.items()}
    exported = student_of(tmp_path / "run")
    for name, value in expected.items():
        torch.testing.assert_close(exported[name], value, rtol=1e-5, atol=1e-6)
    assert small.differences({name: exported[name] for name in expected}, history[-1]) != []


def pixel_stage(student: TinyDense) -> Stage:
    """A layer without batch statistics, and a loss that is a mean over images."""
    layer = student.backbone[0]

    def step(batch: Batch, taught: None, clock: Clock) -> Losses:
        return Losses({"mse": (layer(batch.images) - 1).square().mean()})

    return Stage("train", step, lambda clock: (layer,), None)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_halves_make_the_step_of_one_batch(optimizer: Any, tmp_path: Path, monkeypatch):
    """For losses that are means over images. Detection losses are divided by the positives of their own batch instead, so
    there two halves weigh each half's boxes differently, as everywhere; batch statistics differ as well.
    """
    ends = []
    for batch, accumulate in ((4, 1), (2, 2)):
        student = TinyDense()
        settings = TrainSettings(
            **{**small.SETTINGS, "batch": batch, "accumulate": accumulate, "optimizer": optimizer, "clip": 0.5, "flip": 0.0},
            out=tmp_path / f"{batch}",
        )
        plan = Plan(small.MODEL, small.DATA, settings)
        splits = load_data(small.DATA)
        session = Session(plan, splits, student, None, None, None, teach_by_canvas, None)
        loop = StageLoop(session, start_folder(settings.out, plan.config()), Progress(quiet=True))
        loop.fit(pixel_stage(student), [])
        assert loop.trained_steps == small.STEPS
        assert loop.images_seen == 48
        ends.append(student.backbone[0].weight.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- stages


def test_frozen_parts_stay_frozen(teacher: Path, tmp_path: Path, modules, monkeypatch):
    build = build_detector

    def frozen(name: str, classes: Sequence[str]) -> Detector:
        detector = build(name, classes)
        for parameter in detector.model.backbone.body.parameters():
            parameter.requires_grad_(False)
        return detector

    monkeypatch.setattr(session_module, "build_detector", frozen)
    small.distill(teacher, tmp_path / "run")
    (module,) = modules
    last = dict(module.student.named_parameters())
    body = {name for name in last if name.startswith("model.backbone.body.")}
    assert body
    assert all(torch.equal(last[name], module.first[name]) for name in body)
    assert [name for name in set(last) - body if torch.equal(last[name], module.first[name])] == []


class Toy(TeacherFree):
    """Three stages: its own layer, then the student's pyramid for two epochs, then both on the task."""

    slug = "toy"
    title = "toy"
    bibtex = ""

    def __init__(self, teacher: Teacher | None, student: Detector) -> None:
        super().__init__(teacher, student)
        self.own = nn.Conv2d(32, 32, 1)

    def match(self, student: Detector, batch: Batch, taught: None) -> Losses:
        assert taught is None, "these stages learn from nobody"
        return Losses(
            {f"match{level}": (self.own(maps) - 1).square().mean() for level, maps in enumerate(student.features(batch).maps)}
        )

    def learn(self, student: Any, seen: Any, taught: Any, batch: Batch, clock: Clock) -> Losses:
        noise = torch.rand_like(seen.features.maps[0])
        return Losses({"toy": (self.own(seen.features.maps[0]) - noise).square().mean()})

    def stages(self, student: Detector) -> tuple[Stage, ...]:
        neck = student.model.backbone.fpn
        return (
            Stage("own", lambda batch, taught, clock: self.match(student, batch, taught), lambda clock: (self,), None, share=0.5),
            Stage("neck", lambda batch, taught, clock: self.match(student, batch, taught), lambda clock: (neck,), None),
            *super().stages(student),
        )


STAGES = {"own": 6, "neck": 12, "distill": 12}


def run_toy(out: Path, teacher: Path, resume: bool = False) -> Any:
    settings = DistillSettings(**{**small.SETTINGS, "checkpoint_every": 1}, out=out, resume=resume)
    plan = Plan(small.MODEL, small.DATA, settings, role="distilled", teacher=str(teacher))
    session = open_session(plan, load_data(small.DATA), Teacher(load_detector(teacher)))
    return run(session, Progress(quiet=True))


def test_three_stages(teacher: Path, tmp_path: Path, modules, monkeypatch):
    monkeypatch.setattr(session_module, "build_method", lambda text, teacher, student: Toy(teacher, student))
    result = run_toy(tmp_path / "run", teacher)
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = {stage: [int(row["step"]) for row in rows if row["stage"] == stage and row["loss"]] for stage in STAGES}
    assert steps == {stage: list(range(1, count + 1)) for stage, count in STAGES.items()}
    assert {row["stage"] for row in rows if row["val/AP"]} == {"distill"}
    assert [float(row["seconds"]) for row in rows] == sorted(float(row["seconds"]) for row in rows)
    assert result.summary["steps"] == 24  # the method's own layer is no part of the student's budget
    assert result.summary["images_seen"] == 96
    own, neck, distill = modules
    parameters = {name for name, _ in own.student.named_parameters()}
    moved = [
        {name for name in parameters if not torch.equal(first.first[name], then.first[name])}
        for first, then in ((own, neck), (neck, distill))
    ]
    assert moved[0] == set()
    assert moved[1] == {name for name in parameters if name.startswith("model.backbone.fpn.")}
    assert all(not torch.equal(distill.first[name], p) for name, p in distill.student.named_parameters())


class Handing(Toy):
    """Hands its trained layer over to the student's pyramid before the last stage, and writes down that it did."""

    handed: Path

    def __init__(self, teacher: Teacher | None, student: Detector) -> None:
        super().__init__(teacher, student)
        self.own = nn.Conv2d(32, 32, 3, padding=1)

    def before(self, student: Detector) -> None:
        with self.handed.open("a") as file:
            file.write("handed over\n")
        with torch.no_grad():
            student.model.backbone.fpn.layer_blocks[0][0].weight.copy_(self.own.weight)

    def stages(self, student: Detector) -> tuple[Stage, ...]:
        own, _, distill = super().stages(student)
        return own, replace(distill, before=lambda: self.before(student), trains=lambda clock: (student,))


def test_weights_are_handed_over_once_when_a_stage_starts(teacher: Path, tmp_path: Path, modules, monkeypatch):
    monkeypatch.setattr(session_module, "build_method", lambda text, teacher, student: Handing(teacher, student))
    monkeypatch.setattr(Handing, "handed", tmp_path / "whole.txt", raising=False)
    whole = run_toy(tmp_path / "whole", teacher)
    own, distill = modules
    place = "model.backbone.fpn.layer_blocks.0.0.weight"
    assert Handing.handed.read_text() == "handed over\n"
    assert torch.equal(distill.first[place], own.method.own.weight), "what the first stage has trained, not what it began with"
    assert not torch.equal(own.first[place], distill.first[place])
    assert not torch.equal(dict(distill.student.named_parameters())[place], distill.first[place]), "and it is trained on"
    assert whole.summary["steps"] == 12
    for stage, step, lines in (("own", 4, 1), ("distill", 7, 0)):
        folder = tmp_path / f"{stage}{step}"
        with monkeypatch.context() as patched:
            patched.setattr(Handing, "handed", tmp_path / "killed.txt")
            kill_when(patched, Checkpoints, "on_train_batch_end", "after", step, stage)
            assert small.killed(lambda folder=folder: run_toy(folder, teacher)) == -9
        monkeypatch.setattr(Handing, "handed", tmp_path / f"resumed-{stage}.txt")
        run_toy(folder, teacher, resume=True)
        written = Handing.handed.read_text().splitlines() if Handing.handed.exists() else []
        assert len(written) == lines, f"resumed in {stage}"
        assert small.unequal_runs(tmp_path / "whole", folder) == []


@pytest.mark.parametrize(("stage", "step"), [("own", 4), ("neck", 6), ("neck", 12), ("distill", 1), ("distill", 7)])
def test_three_stages_resume_bit_equal(stage: str, step: int, teacher: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(session_module, "build_method", lambda text, teacher, student: Toy(teacher, student))
    whole = run_toy(tmp_path / "whole", teacher)
    with monkeypatch.context() as patched:
        where = "on_train_epoch_end" if step == STAGES[stage] else "on_train_batch_end"
        kill_when(patched, Checkpoints, where, "after", step, stage)
        assert small.killed(lambda: run_toy(tmp_path / "run", teacher)) == -9
    resumed = run_toy(tmp_path / "run", teacher, resume=True)
    assert small.unequal_runs(tmp_path / "whole", tmp_path / "run") == []
    assert {key: resumed.summary[key] for key in ("steps", "images_seen")} == {"steps": 24, "images_seen": 96}
    assert whole.summary["metrics"] == resumed.summary["metrics"]
