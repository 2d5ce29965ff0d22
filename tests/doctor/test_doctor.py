"""What the doctor finds: every broken thing that it is asked to find, and nothing about a sound pair."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import detdistill
from detdistill import api, cli
from detdistill.data.discover import load_data
from detdistill.doctor import cost, data, learning, pair, teacher
from detdistill.doctor.case import Case, Probe
from detdistill.doctor.findings import CAN_SAY, Diagnosis, Finding, Table, percent
from detdistill.doctor.trial import Course, Look, Trial
from detdistill.errors import RunError
from detdistill.progress import Progress
from detdistill.settings import DistillSettings
from detdistill.structures import Batch, Dense, Detections
from detdistill.training.plan import Plan
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch
from tests.training import small

DATA = "digits:train=60,val=50,size=64,seed=0"
CLASSES = tuple(str(digit) for digit in range(10))
SETTINGS: dict[str, Any] = {"size": 64, "batch": 4, "device": "cpu", "lr": 0.01, "schedule": "constant"}


class Oracle(TinyDense):
    """Detects the ground truth; ``shift`` exchanges the classes, ``least`` is the size below which it finds nothing."""

    shift, least = 0, 0

    def detect(self, prediction: Dense, batch: Batch) -> list[Detections]:
        if batch.padding_hw[0] < self.least:
            return [Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)) for _ in batch.targets]
        return [Detections(t.boxes_xyxy, torch.ones(len(t)), (t.labels + self.shift) % 10) for t in batch.targets]


def oracle(shift: int = 0, least: int = 0, classes: Sequence[str] = CLASSES, width: int = 8) -> Oracle:
    found = Oracle(classes, channels=(width, width))
    found.shift, found.least = shift, least
    return found


def student(width: int = 8) -> TinyDense:
    return TinyDense(CLASSES, channels=(width, width), seed=1)


def diagnose(master: Any, learner: Any = None, method: str = "pkd,weight=1", **settings: Any) -> Diagnosis:
    with Progress(quiet=True) as progress:
        wanted = {**SETTINGS, "probe_steps": 6, "images": 20, **settings}
        return api.doctor(master, learner or student(), wanted.pop("data", DATA), method, progress=progress, **wanted)


def case_of(master: TinyDense | None, method: str = "pkd,weight=1", known: dict[str, Any] | None = None, **settings: Any) -> Case:
    from detdistill.detectors.contract import Teacher

    wanted = DistillSettings(method=method, **{**SETTINGS, **settings})
    plan = Plan("own:student", DATA, wanted, role="distilled", teacher="own:teacher", build=student)
    taught = None if master is None else Teacher(master)
    return Case(plan, load_data(DATA), taught, None, known or {}, "cpu", 20, 4, Progress(quiet=True))


@pytest.fixture(scope="module")
def sound() -> Diagnosis:
    """The diagnosis of a pair without fault."""
    return diagnose(oracle(), baseline=True, seeds=(0, 1), epochs=2)


# ------------------------------------------------------------------------------------------------------------ a sound pair


def test_a_sound_pair_may_start(sound: Diagnosis):
    assert [(one.check, one.what) for one in sound.findings if one.level != "fine"] == []
    assert (sound.level, sound.exit_code) == ("fine", 0)
    checks = {one.check for one in sound.findings}
    assert checks == {
        "data",
        "classes",
        "teacher",
        "pair",
        "inputs",
        "levels",
        "norms",
        "terms",
        "shares",
        "learning",
        "probe",
        "cost",
    }
    assert sound.numbers["teacher"] == {"AP": pytest.approx(1), "AP50": pytest.approx(1), "images": 20, "size": 64}
    assert sound.numbers["unmatched"]["unmatched"] == 0
    shares = sound.numbers["terms"]
    assert set(shares) == {"cls", "box", "pkd"}
    assert sum(term["shares"][0] for term in shares.values()) == pytest.approx(1, abs=1e-5)
    heart = sound.numbers["by_heart"]
    assert heart["alone"][0] == pytest.approx(heart["distilled"][0], rel=1e-4), "both begin with the same weights"
    assert heart["alone"][-1] < 0.9 * heart["alone"][0]
    assert heart["terms"][-1] < heart["terms"][0]
    assert sound.numbers["cost"]["steps"] == 30


def test_the_page_and_the_document(sound: Diagnosis):
    console = Console(file=io.StringIO(), width=80)
    sound.render(console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= 80
    assert "Nothing forbids the start; no warnings." in shown
    assert "Share of the student's gradient" in shown
    assert "Forecast (2 distilled, 2 baselines, 30 steps each)" in shown
    assert " ".join(shown.split()).endswith(CAN_SAY)
    document = json.loads(json.dumps(sound.document()))
    assert document["level"] == "fine"
    assert document["numbers"]["cost"]["cache_store"] in ("float32", "bfloat16", "float16", "int8")
    assert {"level", "check", "what", "where", "todo"} == set(document["findings"][0])


def test_the_forecast_of_disk_is_right_within_a_quarter(tmp_path: Path):
    wide = oracle(width=64)
    with Progress(quiet=True) as progress:
        found = diagnose(wide, student(64), "pkd", epochs=1).numbers["cost"]
        views = {"size": 64, "batch": 4, "device": "cpu"}
        made = api.cache(wide, tmp_path / "cache", DATA, "pkd", progress=progress, store=found["cache_store"], **views)
        written = sum(path.stat().st_size for path in (tmp_path / "cache" / "shards").iterdir())
        assert made.records == 120
        assert found["cache_bytes"] == pytest.approx(written, rel=0.25)
        options = {**SETTINGS, "epochs": 1, "report": False, "score_teacher": False}
        run = api.distill(wide, student(64), DATA, "pkd", out=tmp_path / "run", progress=progress, **options)
    folders = (run.folder / "checkpoints", run.folder / "student")
    assert found["run_bytes"] == pytest.approx(sum(p.stat().st_size for one in folders for p in one.iterdir()), rel=0.25)
    assert found["steps"] == 15 == json.loads((run.folder / "summary.json").read_text())["steps"]


# -------------------------------------------------------------------------------------------------------- what is broken


def only(found: Diagnosis, check: str, level: str) -> str:
    """The one finding of a check and a level."""
    (one,) = found.of(check, level)  # type: ignore[arg-type]
    return f"{one.what} | {one.where} | {one.todo}"


def test_a_teacher_with_random_weights_is_found():
    text = "|".join(f"{one.what}" for one in teacher.scores(case_of(TinyDense(CLASSES, seed=3))) if one.level == "stop")
    assert "it knows next to nothing of these images" in text


def test_a_wrong_order_of_classes_is_found_and_named():
    (stop,) = (one for one in teacher.scores(case_of(oracle(shift=3))) if one.level == "stop")
    assert "its boxes lie on objects, but its classes are mixed up: it calls '0' '3'" in stop.what
    assert "0 of " in stop.what
    assert stop.todo == "give the classes in the order in which the teacher was trained"
    assert all(one.level == "fine" for one in teacher.scores(case_of(oracle())))


def test_a_teacher_that_was_never_loaded_is_found_on_the_command_line(capsys: pytest.CaptureFixture[str]):
    words = [
        "--teacher",
        small.MODEL,
        "--student",
        small.MODEL,
        "--data",
        DATA,
        "--size",
        "64",
        "--device",
        "cpu",
        "--json",
        "true",
    ]
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", *words])
    assert ended.value.code == 2
    document = json.loads(capsys.readouterr().out)
    (stop,) = (one for one in document["findings"] if one["level"] == "stop")
    assert stop["what"].endswith("it was built, but its weights were never loaded")
    assert stop["todo"] == "give a run folder, a checkpoint, or a model string with weights=..."
    assert [one["what"] for one in document["findings"] if one["check"] == "doctor"] == ["further checks were left out"]


def test_batch_norms_that_saw_images_are_trained():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert teacher.never_trained(model)
    model.train()(torch.rand(2, 3, 4, 4))
    assert not teacher.never_trained(model)
    assert not teacher.never_trained(nn.Conv2d(3, 4, 1))


def test_weights_that_are_not_numbers_are_found():
    broken = oracle()
    with torch.no_grad():
        broken.levels.convs[0].weight[0, 0] = torch.nan
    found = diagnose(broken)
    assert found.exit_code == 2
    assert "1 of its 20 tensors hold NaN or infinity: levels.convs.0.weight" in only(found, "teacher", "stop")
    (stop,) = teacher.output(case_of(broken))
    assert "feature maps of stride 8 are NaN" in stop.what


def test_a_method_without_a_gradient_is_found():
    found = diagnose(oracle(), method="pkd,weight=0", probe_steps=2)
    assert "no distillation term has a gradient into the student" in only(found, "terms", "stop")
    assert only(found, "terms", "warning").startswith("no gradient into the student (it is 0 in every batch) | pkd")
    assert not found.of("shares")


def test_classes_that_the_teacher_spells_otherwise_are_found():
    theirs = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "Nine")
    found = diagnose(oracle(classes=theirs))
    text = only(found, "classes", "stop")
    assert "the teacher does not know 9" in text
    assert "take a teacher of these classes" in text
    assert data.near_misses(["Helmet", "cat", "safty vest"], ("helmet", "dog", "safety_vest")) == [
        ("Helmet", "helmet"),
        ("safty vest", "safety_vest"),
    ]
    lenient = case_of(oracle(classes=theirs), other_classes=True)
    assert [one.level for one in data.class_names(lenient)] == ["warning"]


def test_a_pair_that_no_method_fits_and_data_that_do_not_exist_are_findings(tmp_path: Path):
    found = diagnose(oracle(), method="dsig")
    assert "dsig" in only(found, "pair", "stop")
    missing = diagnose(oracle(), data=str(tmp_path / "nowhere"))
    assert [(one.level, one.check) for one in missing.findings] == [("stop", "data")]
    with pytest.raises(RunError, match=r"probe_steps: 0 is not a whole number, 1 or more"):
        diagnose(oracle(), probe_steps=0)
    assert detdistill.doctor is api.doctor


def test_an_image_size_that_does_not_suit_the_teacher_is_found():
    suits = teacher.scores(case_of(oracle(least=96), size=96, known={"size": 96}))
    assert [one.level for one in suits] == ["fine"]
    found = list(teacher.scores(case_of(oracle(least=96), known={"size": 96})))
    assert [one.level for one in found] == ["stop", "warning"]
    assert (
        found[1].what
        == "AP 0.0 at the run's size 64 (letterbox), 100.0 at its own 96 (letterbox): it suffers from images of this size"
    )
    assert found[1].todo == "train with --size 96 --resize letterbox, or take a teacher of the run's size"


def test_statistics_of_another_scale_are_found():
    case = case_of(oracle())
    case.opened.student.spec = replace(case.opened.student.spec, mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
    found = list(data.inputs(case))
    assert [(one.level, one.what.split(":")[0]) for one in found] == [
        ("warning", "the student's normalisation does not suit the images"),
        ("fine", found[1].what.split(":")[0]),
    ]


def test_boxes_without_a_positive_are_counted():
    case = case_of(oracle())
    assert [one.level for one in pair.unmatched(case)] == ["fine"]
    half = case.opened.student
    assign = half.assign

    def none_of_the_first(prediction: Any, batch: Batch) -> Any:
        found = assign(prediction, batch)
        return replace(found, matched=found.matched.masked_fill(found.matched == 0, -1))

    half.assign = none_of_the_first  # type: ignore[method-assign]
    (warning,) = pair.unmatched(case)
    images = sum(len(batch) for batch in case.batches)
    assert warning.what.startswith(f"{images} of {case.numbers['unmatched']['boxes']} boxes looked at have no positive")
    assert "its finest stride 8" in warning.what


@pytest.mark.parametrize("kind", [TinyDense, TinyRegions, TinyQueries])
def test_every_family_says_which_boxes_have_a_positive(kind: type[TinyDense]):
    batch = tiny_batch(count=3)
    boxes = {(image, index) for image, target in enumerate(batch.targets) for index in range(len(target))}
    found = pair.matched_boxes(kind().train(), batch)
    assert found <= boxes
    assert len(found) >= len(boxes) - 1, "of boxes whose centres lie in the same cells, one is left out"


def test_small_batches_of_batch_norms_and_levels_of_one_cell_are_found():
    case = case_of(oracle(), batch=2, accumulate=2)
    case.opened.student.norm = nn.BatchNorm2d(4)
    (warning,) = pair.batch_norms(case)
    assert warning.what == "1 batch norms see 2 images at a time, so their statistics are noisy; --accumulate does not help them"
    case.opened.student.spec = replace(case.opened.student.spec, strides=(8, 64))
    coarse, common = pair.levels(case)
    assert coarse.what == "images of 64x64 pixels leave one cell on the levels of stride 64"
    assert "1 in common" in common.what


# ------------------------------------------------------------------------------------------- judgements of numbers by hand


def look(**changes: Any) -> Look:
    norms = {"cls": 2.0, "kd": 98.0}
    return Look(**{"values": {"cls": 1.0, "kd": 9.0}, "shares": {"cls": 0.02, "kd": 0.98}, "norms": norms, "own_norm": 2.0,
                   "distilled_norm": 98.0, "distilled": frozenset(("kd",)), **changes})  # fmt: skip


def course(*own: float, distilled: float = 1.0, broken: str = "") -> Course:
    return Course(own, tuple(distilled for _ in own), {"kd": (distilled,) * len(own)}, 0.1, 0.05, broken)


def stub(before: Look, after: Look | None = None, heart: Any = None, **changes: Any) -> Any:
    probe = Probe(course(2, 1, 1), course(2, 1, 1), before, before, after or before, (), 0)
    settings = DistillSettings(method="toy", **changes)
    batches = [SimpleNamespace(ids=(1, 2))]
    return SimpleNamespace(probe=probe, settings=settings, tables=[], numbers={}, by_heart=heart, steps=3, batches=batches)


def test_shares_that_drown_or_vanish_come_with_the_weight_that_would_not():
    (drowns,) = learning.shares(stub(look()))
    assert "distillation makes 98 % of the student's gradient at step 0" in drowns.what
    assert drowns.todo == "--balance 0.3 holds a share; on this batch --distill_weight 0.0087 would give 30 %"
    weak = look(norms={"cls": 2.0, "kd": 0.002}, distilled_norm=0.002, shares={"cls": 0.999, "kd": 0.001})
    (vanishes,) = learning.shares(stub(weak))
    assert "0.1 % of the student's gradient: next to nothing" in vanishes.what
    assert "--distill_weight 4.3e+02" in vanishes.todo
    (held,) = learning.shares(stub(look(), balance=0.3))
    assert held.level == "fine"


def test_terms_that_are_not_numbers_or_do_not_reach_the_student():
    (stop,) = learning.terms(stub(look(values={"cls": 1.0, "kd": float("nan")})))
    assert (stop.level, stop.what) == ("stop", "kd is not finite on the first batch")
    warning, stop = learning.terms(stub(look(norms={"cls": 2.0, "kd": None})))
    assert (warning.where, warning.what) == ("kd", "no gradient into the student (its value is 9)")
    assert stop.level == "stop"
    (none,) = learning.terms(stub(look(distilled=frozenset())))
    assert none.level == "fine"


def test_a_batch_that_is_not_learnt():
    good, stuck, rises = course(2, 1, 1, 1), course(2, 1.99, 1.99, 1.99), course(2, 4, 4, 4)
    assert [one.level for one in learning.by_heart(stub(look(), heart=(good, good)))] == ["fine"]
    (warning,) = learning.by_heart(stub(look(), heart=(stuck, stuck)))
    assert warning.what == "alone, the student cannot learn one batch: its loss loses 0.5 % in 3 steps"
    (held_back,) = learning.by_heart(stub(look(), heart=(good, stuck)))
    assert held_back.what == "distilled, the own loss falls by 0.5 % where it falls by 50 % alone"
    assert "the own loss rises from 2 to 4" in next(iter(learning.by_heart(stub(look(), heart=(rises, good))))).what
    (stop,) = learning.by_heart(stub(look(), heart=(good, course(2, broken="loss term kd at step 0"))))
    assert stop.what == "loss term kd at step 0 is not finite on one batch at the peak learning rate, distilled"


def test_a_loss_that_explodes_ends_the_trial():
    case = case_of(oracle(), lr=1e30, clip=0)
    found = Trial(case.session(), "cpu", 6).run(case.batches)
    assert found.broken
    assert len(found.own) < 6


def test_half_precision_is_compared():
    assert list(learning.half_precision(case_of(oracle()))) == []
    (found,) = learning.half_precision(case_of(oracle(), precision="bf16"))
    assert found.level == "fine"
    assert found.what.startswith("bf16 changes no loss term by more than")


def test_room_for_memory_and_disk():
    assert [one.level for one in cost._room("disk", 100, 1000, "x")] == ["fine"]
    assert [one.level for one in cost._room("disk", 950, 1000, "x")] == ["warning"]
    (stop,) = cost._room("memory", 2_000_000, 1_000_000, "lower --batch")
    assert (stop.level, stop.what) == ("stop", "about 2 MB of memory, 1 MB free: it will not fit")
    assert [one.level for one in cost._room("memory", 5, None, "x")] == ["fine"]
    assert cost.training_steps(DistillSettings(batch=4, epochs=3, accumulate=2), 21) == (9, 3)
    assert cost.training_steps(DistillSettings(batch=4, steps=7), 21) == (7, 2)


def test_levels_order_the_page_and_the_exit_code():
    findings = (
        Finding("fine", "data", "all is well"),
        Finding("warning", "levels", "w", "here", "do that"),
        Finding("stop", "teacher", "s"),
    )
    for some, code in ((findings, 2), (findings[:2], 1), (findings[:1], 0), ((), 0)):
        assert Diagnosis("about", some).exit_code == code
    table = Table("numbers", ("", "one"), (("a", "1"),))
    console = Console(file=io.StringIO(), width=80)
    Diagnosis("about", findings, (table,)).render(console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[:8] == [
        "about",
        "",
        "Do not start: 1 reason, 1 warning.",
        "",
        "STOP     teacher    s.",
        "warning  levels     here: w.",
        "                 -> do that.",
        "fine     data       all is well.",
    ]
    assert [percent(value) for value in (0.00123, 0.05, 0.314, 1.0)] == ["0.12 %", "5 %", "31 %", "100 %"]
