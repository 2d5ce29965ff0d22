from dataclasses import dataclass

import pytest
import torch
from torch import nn

from detdistill.detectors.contract import (
    HasBackboneFeatures,
    HasCopies,
    HasQueries,
    HasRegions,
    HasTowers,
    Teacher,
)
from detdistill.methods.pkd import PKD
from detdistill.methods.shared.contract import Composition, Method, Stage
from detdistill.methods.shared.needs import Needs, PairError, check_pair
from detdistill.structures import Assignment, Clock, Losses, Observation, Taught, TaughtTogether
from tests.methods.contract_checks import MIDDLE, assert_same, check_method, run_stage
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

CLOCK = Clock(0, 10)


class Counting(TinyDense):
    """Counts how often the pyramid is computed."""

    runs = 0

    def features(self, batch):
        type(self).runs += 1
        return super().features(batch)


class Mimic(Method):
    """Mean squared difference of the finest maps through a 1x1 convolution."""

    slug, title, bibtex = "mimic_toy", "a toy", ""

    def __init__(self, teacher, student, *, weight=1.0):
        super().__init__(teacher, student)
        self.weight = weight
        self.adapter = nn.Conv2d(student.spec.channels[0], self.teacher.spec.channels[0], 1)

    def learn(self, student, seen, taught, batch, clock):
        mine = self.adapter(seen.features.maps[0]).float()
        return Losses({"maps": self.weight * (mine - taught.features.maps[0].float()).square().mean()})


class Soft(Method):
    """Sigmoid scores of a dense teacher."""

    slug, title, bibtex = "soft_toy", "a toy", ""
    needs = Needs(teacher_prediction=True, teacher_families=("dense",), student_families=("dense",), same_classes=True)

    def learn(self, student, seen, taught, batch, clock):
        difference = seen.prediction.logits.float().sigmoid() - taught.prediction.logits.float().sigmoid()
        return Losses({"scores": difference.square().mean()}, {"gap": difference.abs().mean().detach()})


class Doubled(Method):
    """Replaces the student's own loss by twice its value; teacher-free."""

    slug, title, bibtex = "doubled_toy", "a toy", ""
    needs = Needs(teacher=False)

    def learn(self, student, seen, taught, batch, clock):
        return Losses({"size": 0.01 * seen.features.maps[0].float().square().mean()})

    def supervise(self, student, seen, taught, batch):
        own = student.loss(seen.prediction, batch)
        return Losses({name: 2 * value for name, value in own.terms.items()})


class Tripled(Doubled):
    slug = "tripled_toy"


# ---------------------------------------------------------------------------------------------------------- check_pair


def test_a_missing_teacher_is_refused():
    with pytest.raises(PairError, match=r"^pkd: needs a teacher; give one with --teacher$"):
        PKD(None, TinyDense())


@pytest.mark.parametrize(("teacher", "student", "side"), [
    (TinyDense, TinyRegions, "student tinyregions:patches predicts regions; m needs a student"),
    (TinyQueries, TinyDense, "teacher tinyqueries:patches predicts queries; m needs a teacher"),
])  # fmt: skip
def test_a_family_that_cannot_serve_is_refused(teacher, student, side):
    needs = Needs(teacher_families=("dense",), student_families=("dense", "queries"))
    families = "dense or queries" if "student" in side else "dense"
    with pytest.raises(PairError) as refusal:
        check_pair("m", needs, Teacher(teacher()), student())
    assert str(refusal.value) == f"m: the {side} that predicts {families}"


def test_all_missing_capabilities_of_a_side_are_named_at_once():
    needs = Needs(student_capabilities=(HasTowers, HasCopies, HasBackboneFeatures), teacher_capabilities=(HasRegions,))
    with pytest.raises(PairError) as refusal:
        check_pair("m", needs, Teacher(TinyRegions()), TinyQueries())
    assert str(refusal.value) == (
        "m: the student tinyqueries:patches lacks towers (a dense head that can be resumed), copies of neck and head; "
        "run `detdistill methods --student tinyqueries:patches` for the methods that serve it"
    )
    with pytest.raises(PairError, match=r"the teacher tinydense:patches lacks regions \(a region head on given boxes\);"):
        check_pair("m", needs, Teacher(TinyDense()), TinyDense())
    with pytest.raises(PairError, match="lacks queries"):
        check_pair("m", Needs(student_capabilities=(HasQueries,)), Teacher(TinyDense()), TinyDense())
    check_pair("m", needs, Teacher(TinyRegions()), TinyDense())


def test_classes_the_teacher_does_not_know_are_named():
    teacher = Teacher(TinyDense(classes=("a", "b", "c")))
    check_pair("m", Needs(same_classes=True), teacher, TinyDense(classes=("c", "a")))
    with pytest.raises(PairError, match=r"the teacher does not know dog, cat; teacher classes: a, b, c;"):
        check_pair("m", Needs(same_classes=True), teacher, TinyDense(classes=("a", "dog", "cat")))
    many = tuple(f"x{index}" for index in range(7))
    with pytest.raises(PairError, match=r"does not know x0, x1, x2, x3, x4 \.\.\.;"):
        check_pair("m", Needs(same_classes=True), teacher, TinyDense(classes=many))
    check_pair("m", Needs(), teacher, TinyDense(classes=many))


def test_a_teacher_free_method_needs_none_and_says_so_when_asked():
    method = Doubled(None, TinyDense())
    assert method.teach(tiny_batch(1)) is None
    assert method.teachers() == ()
    with pytest.raises(AssertionError, match="doubled_toy has no teacher"):
        _ = method.teacher


# --------------------------------------------------------------------------------------------------------- one method


def test_a_step_is_the_own_loss_and_what_was_learned():
    teacher, student, batch = Teacher(TinyDense(seed=1)), TinyDense(seed=2), tiny_batch(2)
    method = Mimic(teacher, student, weight=3.0)
    losses = method.step(student, batch, method.teach(batch), CLOCK)
    seen = student(batch)
    own = student.loss(seen.prediction, batch).terms
    assert list(losses.terms) == ["cls", "box", "maps"]
    assert torch.equal(losses.terms["cls"], own["cls"])
    theirs = teacher.detector.features(batch).maps[0]
    torch.testing.assert_close(losses.terms["maps"], 3 * (method.adapter(seen.features.maps[0]) - theirs).square().mean())
    (stage,) = method.stages(student)
    assert (stage.name, stage.share, stage.depends_on) == ("distill", 1.0, "")
    assert stage.trains(CLOCK) == (student, method)
    assert stage.evaluates is student
    assert_same(stage.step(batch, CLOCK).terms, losses.terms, "")


def test_teach_observes_what_needs_declares():
    teacher, student, batch = Teacher(TinyDense(seed=1)), TinyDense(seed=2), tiny_batch(2)
    assert Mimic(teacher, student).teach(batch).prediction is None
    taught = Soft(teacher, student).teach(batch)
    assert_same(taught.prediction, teacher.detector(batch).prediction, "")
    assert taught.backbone_features is None

    class Deep(Mimic):
        needs = Needs(teacher_backbone=True)

    deep = Deep(teacher, student).teach(batch)
    assert_same(deep.backbone_features, teacher.detector.backbone_features(batch), "")
    assert deep.prediction is None


def test_the_state_dict_holds_the_adapters_and_no_teacher():
    method = Mimic(Teacher(TinyDense(seed=1)), TinyDense(seed=2))
    assert sorted(method.state_dict()) == ["adapter.bias", "adapter.weight"]
    assert len(list(method.parameters())) == 2
    method.train()
    assert not method.teacher.detector.training


def test_learn_must_be_defined():
    class Empty(Method):
        slug, title, bibtex = "empty", "", ""

    student, batch = TinyDense(), tiny_batch(1)
    with pytest.raises(TypeError, match=r"Empty must define learn"):
        Empty(Teacher(TinyDense()), student).step(student, batch, CLOCK)


# -------------------------------------------------------------------------------------------------------- composition


def test_a_composition_runs_the_shared_teacher_once_and_adds_all_losses():
    Counting.runs = 0
    teacher, student, batch = Teacher(Counting(seed=1)), TinyDense(seed=2), tiny_batch(2)
    parts = [PKD(teacher, student), Soft(teacher, student), Mimic(teacher, student)]
    together = Composition(parts, student)
    losses = together.step(student, batch, together.teach(batch), CLOCK)
    assert Counting.runs == 1
    assert list(losses.terms) == ["cls", "box", "pkd/pkd", "soft_toy/scores", "mimic_toy/maps"]
    assert list(losses.monitors) == ["soft_toy/gap"]
    alone = [method.step(student, batch, method.teach(batch), CLOCK) for method in parts]
    assert Counting.runs == 1
    torch.testing.assert_close(losses.terms["pkd/pkd"], alone[0].terms["pkd"], rtol=0, atol=0)
    torch.testing.assert_close(losses.terms["soft_toy/scores"], alone[1].terms["scores"], rtol=0, atol=0)
    own = student.loss(student(batch).prediction, batch).total()
    torch.testing.assert_close(losses.total(), sum(part.total() for part in alone) - 2 * own)
    assert together.teachers() == (teacher,)
    assert together.methods == tuple(parts)
    assert sorted(together.state_dict()) == ["parts.mimic_toy.adapter.bias", "parts.mimic_toy.adapter.weight"]


def test_knowledge_of_a_composition_does_not_depend_on_the_order_of_its_methods():
    teacher, student, batch = Teacher(TinyDense(seed=1)), TinyDense(seed=2), tiny_batch(2)
    for slugs in ((PKD, Soft), (Soft, PKD)):
        teacher.forget()
        taught = Composition([part(teacher, student) for part in slugs], student).teach(batch)
        by_method = dict(zip(slugs, taught.parts, strict=True))
        assert by_method[PKD].prediction is None
        assert by_method[Soft].prediction is not None


def test_a_composition_learns_the_same_from_split_and_stacked_knowledge():
    teacher, student, batch = Teacher(TinyDense(seed=1)), TinyDense(seed=2), tiny_batch(3)
    together = Composition([PKD(teacher, student), Soft(teacher, student), Doubled(None, student)], student)
    taught = together.teach(batch)
    assert taught.parts[2] is None
    seen = student(batch)
    again = TaughtTogether.stack(taught.split(3))
    expected = together.learn(student, seen, taught, batch, CLOCK).terms
    assert_same(together.learn(student, seen, again, batch, CLOCK).terms, expected, "", rtol=1e-6)


def test_two_teachers_run_once_each():
    first, second = Teacher(TinyDense(seed=1)), Teacher(TinyRegions(seed=1))
    student = TinyDense(seed=2)
    together = Composition([PKD(first, student), Mimic(second, student)], student)
    assert together.teachers() == (first, second)
    taught = together.teach(tiny_batch(1))
    assert_same(taught.parts[1].features, second.detector.features(tiny_batch(1)), "")


def test_one_override_of_the_own_loss_is_used_and_two_are_refused():
    teacher, student, batch = Teacher(TinyDense(seed=1)), TinyDense(seed=2), tiny_batch(2)
    together = Composition([PKD(teacher, student), Doubled(None, student)], student)
    terms, own = (
        together.step(student, batch, together.teach(batch), CLOCK).terms,
        student.loss(student(batch).prediction, batch).terms,
    )
    assert list(terms) == ["cls", "box", "pkd/pkd", "doubled_toy/size"]
    assert torch.equal(terms["cls"], 2 * own["cls"])
    with pytest.raises(PairError, match=r"^doubled_toy and tripled_toy both replace the student's own loss"):
        Composition([Doubled(None, student), PKD(teacher, student), Tripled(None, student)], student)


def test_the_override_gets_its_own_methods_knowledge():
    @dataclass(frozen=True)
    class Note(Taught):
        weight: torch.Tensor

    class Noted(Method):
        slug, title, bibtex = "noted_toy", "", ""
        needs = Needs(teacher=False)

        def teach(self, batch):
            return Note(torch.full((len(batch),), 4.0))

        def learn(self, student, seen, taught, batch, clock):
            return Losses({"nothing": seen.features.maps[0].sum() * 0})

        def supervise(self, student, seen, taught, batch):
            return Losses({"own": student.loss(seen.prediction, batch).total() * taught.weight.mean()})

    teacher, student, batch = Teacher(TinyDense(seed=1)), TinyDense(seed=2), tiny_batch(2)
    terms = Composition([PKD(teacher, student), Noted(None, student)], student).step(student, batch, CLOCK).terms
    torch.testing.assert_close(terms["own"], 4 * student.loss(student(batch).prediction, batch).total())


def test_a_method_named_twice_is_refused():
    teacher, student = Teacher(TinyDense(seed=1)), TinyDense(seed=2)
    with pytest.raises(PairError, match=r"^method pkd\+pkd: each method may be named once$"):
        Composition([PKD(teacher, student), PKD(teacher, student)], student)


# -------------------------------------------------------------------------------------------------------------- stages


class Staged(Mimic):
    """Three stages: an encoder alone, an encoder with a decoder, then the student with the encoder frozen after half."""

    slug = "staged_toy"

    def __init__(self, teacher, student):
        super().__init__(teacher, student)
        self.encoder, self.decoder = nn.Linear(2, 3), nn.Linear(3, 2)

    def _warm(self, batch, clock):
        return Losses({"encode": self.encoder(batch.images.new_ones(1, 2)).square().mean()})

    def _rebuild(self, batch, clock):
        one = batch.images.new_ones(1, 2)
        return Losses({"rebuild": (self.decoder(self.encoder(one)) - one).square().mean()})

    def learn(self, student, seen, taught, batch, clock):
        encoded = self.encoder(batch.images.new_ones(1, 2)).float().square().mean()
        return Losses({**super().learn(student, seen, taught, batch, clock).terms, "encoded": encoded})

    def stages(self, student):
        def trains(clock):
            return (student, self.adapter, self.encoder) if clock.progress < 0.5 else (student, self.adapter)

        return (
            Stage("warm", self._warm, lambda clock: (self.encoder,), None, 0.25, "fingerprint"),
            Stage("rebuild", self._rebuild, lambda clock: (self.encoder, self.decoder), None, 0.5),
            Stage("distill", lambda batch, clock: self.step(student, batch, self.teach(batch), clock), trains, student),
        )


def reached(stage, student, method, batch, clock):
    run_stage(stage, student, method, batch, clock)
    names = [name for name, p in method.named_parameters() if p.grad is not None]
    return {name.split(".")[0] for name in names} | ({"student"} if student.backbone[0].weight.grad is not None else set())


def test_a_method_of_three_stages_trains_what_each_says():
    teacher, student, batch = Teacher(TinyDense(seed=1)), TinyDense(seed=2), tiny_batch(2)
    method = Staged(teacher, student)
    warm, rebuild, distill = method.stages(student)
    assert reached(warm, student, method, batch, CLOCK) == {"encoder"}
    assert reached(rebuild, student, method, batch, CLOCK) == {"encoder", "decoder"}
    assert reached(distill, student, method, batch, CLOCK) == {"encoder", "adapter", "student"}
    assert reached(distill, student, method, batch, MIDDLE) == {"adapter", "student"}
    assert (warm.share, warm.depends_on, warm.evaluates, distill.evaluates) == (0.25, "fingerprint", None, student)


def test_a_composition_puts_earlier_stages_in_a_row_and_the_last_together():
    class Other(Staged):
        slug = "other_toy"

    teacher, student, batch = Teacher(TinyDense(seed=1)), TinyDense(seed=2), tiny_batch(2)
    together = Composition([Staged(teacher, student), PKD(teacher, student), Other(teacher, student)], student)
    stages = together.stages(student)
    assert [stage.name for stage in stages] == ["warm", "rebuild", "warm", "rebuild", "distill"]
    first, _, other = together.methods
    assert stages[0].trains(CLOCK) == (first.encoder,)
    assert stages[2].trains(CLOCK) == (other.encoder,)
    last = stages[-1]
    trained = {id(parameter) for module in last.trains(MIDDLE) for parameter in module.parameters()}
    assert id(first.adapter.weight) in trained
    assert id(first.encoder.weight) not in trained
    assert id(first.encoder.weight) in {id(p) for module in last.trains(CLOCK) for p in module.parameters()}
    assert id(student.head.logits.weight) in trained
    losses = last.step(batch, CLOCK)
    assert list(losses.terms) == ["cls", "box", *(f"{m}/{t}" for m, t in [
        ("staged_toy", "maps"), ("staged_toy", "encoded"), ("pkd", "pkd"), ("other_toy", "maps"), ("other_toy", "encoded"),
    ])]  # fmt: skip


# -------------------------------------------------------------------------------------- the checks that all methods pass


def test_pkd_keeps_the_contract_on_every_pair():
    checked = check_method(PKD)
    assert len(checked) == 18
    assert "queries 16 -> dense 8" in checked


def test_toy_methods_keep_the_contract():
    assert check_method(Soft) == ["dense 8 -> dense 8", "dense 16 -> dense 8"]
    assert check_method(Doubled) == ["dense 8", "regions 8", "queries 8"]
    assert "regions 16 -> queries 8" in check_method(Staged)


class Leaky(Mimic):
    """What ``teach`` says follows the student."""

    def __init__(self, teacher, student):
        super().__init__(teacher, student)
        self._student = [student]

    def teach(self, batch):
        with torch.no_grad():
            return Observation(self._student[0].features(batch))


class Random(Mimic):
    """What ``teach`` says is random."""

    def teach(self, batch):
        taught = super().teach(batch)
        return Observation(taught.features.__class__(tuple(m + torch.rand(()) for m in taught.features.maps), (8, 16)))


class Attached(Mimic):
    """What ``teach`` says carries a gradient."""

    def teach(self, batch):
        features = super().teach(batch).features
        return Observation(features.__class__(tuple(self.adapter(m) for m in features.maps), (8, 16)))


class Detached(Mimic):
    """The student learns nothing."""

    def learn(self, student, seen, taught, batch, clock):
        return super().learn(student, seen.detach(), taught, batch, clock)


class Idle(Mimic):
    """A module that nothing trains."""

    def __init__(self, teacher, student):
        super().__init__(teacher, student)
        self.idle = nn.Linear(1, 1)


class Holding(Mimic):
    """The teacher's own neck in the state dict."""

    def __init__(self, teacher, student):
        super().__init__(teacher, student)
        self.neck = self.teacher.detector.neck


class PerBox(Mimic):
    """Divides by the number of boxes."""

    def learn(self, student, seen, taught, batch, clock):
        boxes = sum(len(target) for target in batch.targets)
        loss = super().learn(student, seen, taught, batch, clock).terms["maps"]
        return Losses({"maps": loss * boxes / torch.tensor(float(boxes))})


class HalfPrecision(Mimic):
    """Forgets to cast."""

    def learn(self, student, seen, taught, batch, clock):
        mine = self.adapter(seen.features.maps[0])
        return Losses({"maps": (mine - taught.features.maps[0]).mean()})


@dataclass(frozen=True)
class WholeBatch(Taught):
    features: torch.Tensor
    assignment: Assignment | None = None


class Unsplittable(Mimic):
    """What ``teach`` says has no images first."""

    def teach(self, batch):
        return WholeBatch(super().teach(batch).features.maps[0].flatten(0, 1))

    def learn(self, student, seen, taught, batch, clock):
        mine = self.adapter(seen.features.maps[0]).float().flatten(0, 1)
        return Losses({"maps": (mine - taught.features[: len(mine)]).square().mean()})


@pytest.mark.parametrize(("broken", "message"), [
    (Leaky, "teach changed with the student"),
    (Random, "random state"),
    (Attached, "carries a gradient"),
    (Detached, "no gradient of learn"),
    (Idle, r"no gradient reaches the method's own \['idle.bias', 'idle.weight'\]"),
    (Holding, "keep a copy"),
    (PerBox, "without boxes"),
    (HalfPrecision, "cast before the loss"),
    (Unsplittable, None),
])  # fmt: skip
def test_the_checks_find_what_they_are_for(broken, message):
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check_method(broken)
