"""Results of earlier stages: trained once, then used again."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from detdistill import api
from detdistill.errors import RunError
from detdistill.methods.shared.contract import Composition, Method, Stage
from detdistill.progress import Progress
from detdistill.structures import Losses
from detdistill.training import session
from detdistill.training.module import StageModule
from tests.training import small


class Lecturer(Method):
    """Learns a shift of the teacher's finest map first, then teaches the shifted map."""

    slug, title, bibtex = "lecturer_toy", "a toy", ""
    trained = 0

    def __init__(self, teacher, student, *, version: str = "1"):
        super().__init__(teacher, student)
        self.version = version
        self.shift = nn.BatchNorm2d(teacher.spec.channels[0])
        self.adapter = nn.Conv2d(student.spec.channels[0], teacher.spec.channels[0], 1)

    def _lesson(self, batch, taught, clock):
        assert taught is None
        type(self).trained += 1
        return Losses({"lesson": self.shift(self.teacher.observe(batch).features.maps[0]).square().mean()})

    def learn(self, student, seen, taught, batch, clock):
        wanted = nn.functional.batch_norm(
            taught.features.maps[0], self.shift.running_mean, self.shift.running_var, self.shift.weight, self.shift.bias
        )
        return Losses({"maps": 0.01 * (self.adapter(seen.features.maps[0]) - wanted.detach()).square().mean()})

    def stages(self, student):
        last = replace(self.distill_stage(student, ()), trains=lambda clock: (student, self.adapter))
        first = Stage(
            "lesson",
            self._lesson,
            lambda clock: (self.shift,),
            None,
            share=0.5,
            depends_on=f"{self.version} {self.teacher.fingerprint}",
            overrides={"lr": 0.01},
        )
        return first, last


@pytest.fixture
def toy(monkeypatch):
    """Built instead of whatever method a run names."""
    Lecturer.trained = 0
    state = {"version": "1", "together": False}

    def build(text, teacher, student):
        one = Lecturer(teacher, student, version=state["version"])
        return Composition([one], student) if state["together"] else one

    monkeypatch.setattr(session, "build_method", build)
    return state


def distill(teacher, out, stages, **settings):
    said = []
    with Progress(quiet=True) as progress:
        progress.say = lambda text, style="": said.append(str(text))
        wanted = {**small.SETTINGS, "score_teacher": False, "stages": stages, **settings}
        api.distill(str(teacher), small.MODEL, small.DATA, "pkd", out=out, progress=progress, **wanted)
    return said


def test_a_finished_stage_is_used_again_and_the_run_ends_the_same(teacher, tmp_path, toy):
    distill(teacher, tmp_path / "first", tmp_path / "stages")
    assert Lecturer.trained == 6
    (result,) = (tmp_path / "stages").glob("*.safetensors")
    said = distill(teacher, tmp_path / "second", tmp_path / "stages")
    assert Lecturer.trained == 6, "not trained again"
    assert [line for line in said if "trained before" in line] == [
        f"stage lesson: trained before, taken from {tmp_path}/stages/{result.name}"
    ]
    states = [small.checkpoint(tmp_path / name)["state_dict"] for name in ("first", "second")]
    assert small.differences(*states) == []
    assert any("method.shift.running_mean" in name and tensor.abs().sum() > 0 for name, tensor in states[0].items())
    assert {row["stage"] for row in small.rows(tmp_path / "second")} == {"distill"}


def test_what_the_result_depends_on_decides_whether_it_serves(teacher, tmp_path, toy):
    distill(teacher, tmp_path / "first", tmp_path / "stages", steps=2)
    trained = Lecturer.trained
    distill(teacher, tmp_path / "seed", tmp_path / "stages", steps=2, seed=3, flip=0.5, log_every=2)
    assert Lecturer.trained == trained, "seeds share it"
    toy["together"] = True
    distill(teacher, tmp_path / "together", tmp_path / "stages", steps=2)
    assert Lecturer.trained == trained, "compositions too"
    toy["together"] = False
    distill(teacher, tmp_path / "flip", tmp_path / "stages", steps=2, flip=0.0)
    assert Lecturer.trained == trained + 1, "other views"
    toy["version"] = "2"
    distill(teacher, tmp_path / "version", tmp_path / "stages", steps=2)
    assert Lecturer.trained == trained + 2
    assert len(list((tmp_path / "stages").glob("*.safetensors"))) == 3


def test_a_damaged_or_foreign_result_is_named(teacher, tmp_path, toy):
    distill(teacher, tmp_path / "first", tmp_path / "stages", steps=2)
    (result,) = (tmp_path / "stages").glob("*.safetensors")
    good = result.read_bytes()
    result.write_bytes(good[:40])
    with pytest.raises(RunError, match=rf"{result.name} is damaged .*delete it, then stage lesson is trained again"):
        distill(teacher, tmp_path / "second", tmp_path / "stages", steps=2)
    from safetensors.torch import save

    result.write_bytes(save({"0.weight": torch.zeros(3)}))
    with pytest.raises(RunError, match="does not fit stage lesson; delete it"):
        distill(teacher, tmp_path / "third", tmp_path / "stages", steps=2)


def test_a_resumed_run_trains_no_stage_twice(teacher, tmp_path, toy):
    distill(teacher, tmp_path / "whole", tmp_path / "stages")
    with Progress(quiet=True) as progress:
        wanted = {**small.SETTINGS, "score_teacher": False, "stages": tmp_path / "others", "out": tmp_path / "cut"}

        def dies():
            before = StageModule.training_step

            def step(self, batch, index):
                if self.stage.name == "distill" and self.global_step == 8:
                    small.die()
                return before(self, batch, index)

            StageModule.training_step = step
            api.distill(str(teacher), small.MODEL, small.DATA, "pkd", progress=progress, **wanted)

        assert small.killed(dies) == -9
        before = Lecturer.trained
        for path in (tmp_path / "others").glob("*"):
            path.unlink()  # the checkpoint holds it
        api.distill(str(teacher), small.MODEL, small.DATA, "pkd", progress=progress, **{**wanted, "resume": True})
    assert Lecturer.trained == before
    assert (
        small.differences(small.checkpoint(tmp_path / "whole")["state_dict"], small.checkpoint(tmp_path / "cut")["state_dict"])
        == []
    )


def test_a_folder_that_takes_nothing_is_said_and_the_run_goes_on(teacher, tmp_path, toy):
    (tmp_path / "file").write_text("in the way")
    said = distill(teacher, tmp_path / "first", tmp_path / "file" / "stages", steps=2)
    assert [line for line in said if "its result cannot be stored" in line]


def test_the_bar_of_an_earlier_stage_has_its_name(toy, teacher, tmp_path):
    """Else two bars of one run have the same title."""
    titles = []
    with Progress(quiet=True) as progress:
        bar = progress.bar
        progress.bar = lambda title, total: titles.append(title) or bar(title, total)
        wanted = {**small.SETTINGS, "score_teacher": False, "stages": tmp_path / "stages", "report": False}
        api.distill(str(teacher), small.MODEL, small.DATA, "pkd", out=tmp_path / "run", progress=progress, **wanted)
    assert titles[:2] == ["distil (pkd): lesson", "distil (pkd)"]
