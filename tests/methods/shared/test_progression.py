"""``pkd@a>pkd@b``: methods one after the other."""

from dataclasses import replace

from detdistill.detectors.contract import Teacher
from detdistill.methods.pkd import PKD
from detdistill.methods.shared.compose import build_method
from detdistill.methods.shared.contract import Stage
from detdistill.methods.shared.progression import Progression
from detdistill.structures import Clock
from tests.tiny import TinyDense


class Warmed(PKD):
    """Begins with a stage of its own; the last stage is half as long as the run."""

    trains_alone = ("warm",)

    def stages(self, student):
        (last,) = super().stages(student)
        return Stage("warm", last.step, last.trains, None, share=0.25), replace(last, share=0.5)


def test_a_progression_shares_the_run_and_trains_one_method_at_a_time():
    student, both = TinyDense(), {name: Teacher(TinyDense(seed=seed)) for name, seed in (("small", 1), ("large", 2))}
    method = build_method("pkd@small>fitnet@large+bckd@large", both, student)
    assert isinstance(method, Progression)
    first, second = method.stages(student)
    assert [(stage.name, stage.share) for stage in (first, second)] == [("distill-1", 0.5), ("distill", 0.5)]
    assert first.learns_from is method.methods[0]
    assert first.learns_from.teachers() == (both["small"],)
    assert second.learns_from is not None
    assert second.learns_from.teachers() == (both["large"],)
    trained = {id(module) for module in first.trains(Clock(0, 10))}
    assert trained == {id(student), id(method.methods[0])}
    assert method.teachers() == tuple(both.values())
    assert method.members == ("pkd", "fitnet@large", "bckd@large")
    assert [look.prediction for look in method.looks().values()] == [False, True]  # only bckd reads a prediction


def test_earlier_stages_keep_their_length_and_the_last_ones_share_the_run():
    student, teacher = TinyDense(), Teacher(TinyDense(seed=1))
    method = Progression([Warmed(teacher, student), PKD(teacher, student), Warmed(teacher, student)], student)
    found = [(stage.name, stage.share) for stage in method.stages(student)]
    assert found == [("warm-1", 0.25), ("distill-1", 0.5 / 3), ("distill-2", 1 / 3), ("warm", 0.25), ("distill", 0.5 / 3)]
    assert (method.members, method.teachers(), method.trains_alone) == (("pkd",), (teacher,), ("warm",))
