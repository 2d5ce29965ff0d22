from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from detdistill.cache.storage import CacheError
from detdistill.detectors.contract import Teacher
from detdistill.functional.precision import full_precision
from detdistill.methods.pkd import PKD
from detdistill.methods.shared.contract import Composition, Method, Stage, TeacherFree, part_of, teach_by_canvas
from detdistill.methods.shared.hyper_parameters import MethodError
from detdistill.methods.shared.needs import Needs, PairError
from detdistill.structures import WHOLE_TOWER, Assignment, Clock, Look, Losses, Observation, Taught, TaughtTogether, map_tensors
from detdistill.values import Weight
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

    def __init__(self, teacher, student, *, weight: Weight = 1.0):
        super().__init__(teacher, student)
        self.weight = weight
        self.adapter = nn.Conv2d(student.spec.channels[0], self.teacher.spec.channels[0], 1)

    def learn(self, student, seen, taught, batch, clock):
        with full_precision("cpu"):
            mine = self.adapter(seen.features.maps[0])
            return Losses({"maps": self.weight * (mine - taught.features.maps[0]).square().mean()})


class Soft(Method):
    """Sigmoid scores of a dense teacher."""

    slug, title, bibtex = "soft_toy", "a toy", ""

    @classmethod
    def needs(cls, **settings):
        dense = ("dense",)
        return Needs(teacher=Look(prediction=True), teacher_families=dense, student_families=dense, same_classes=True)

    def learn(self, student, seen, taught, batch, clock):
        difference = seen.prediction.logits.sigmoid() - taught.prediction.logits.sigmoid()
        return Losses({"scores": difference.square().mean()}, {"gap": difference.abs().mean().detach()})


class Doubled(TeacherFree):
    """Replaces the student's own loss by twice its value; teacher-free."""

    slug, title, bibtex = "doubled_toy", "a toy", ""

    def learn(self, student, seen, taught, batch, clock):
        return Losses({"size": 0.01 * seen.features.maps[0].square().mean()})

    def supervise(self, student, seen, taught, batch):
        own = student.loss(seen.prediction, batch)
        return Losses({name: 2 * value for name, value in own.terms.items()})


class Tripled(Doubled):
    slug = "tripled_toy"


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
    assert stage.learns_from is method
    assert stage.before is None
    assert_same(stage.step(batch, method.teach(batch), CLOCK).terms, losses.terms, "")
    assert losses.distilled == {"maps"}


def test_a_step_learns_from_what_it_is_handed_and_asks_nobody():
    teacher, student, batch = Teacher(Counting(seed=1)), TinyDense(seed=2), tiny_batch(2)
    method = Mimic(teacher, student)
    taught = method.teach(batch)
    teacher.forget()
    Counting.runs = 0
    doubled = map_tensors(taught, lambda tensor: 2 * tensor if tensor.is_floating_point() else tensor)
    maps = method.step(student, batch, doubled, CLOCK).terms["maps"]
    mine = method.adapter(student.features(batch).maps[0])
    torch.testing.assert_close(maps, (mine - 2 * taught.features.maps[0]).square().mean())
    assert Counting.runs == 0


def test_teach_observes_what_needs_declares():
    teacher, student, batch = Teacher(TinyDense(seed=1)), TinyDense(seed=2), tiny_batch(2)
    assert Mimic(teacher, student).teach(batch).prediction is None
    taught = Soft(teacher, student).teach(batch)
    assert_same(taught.prediction, teacher.detector(batch).prediction, "")
    assert taught.backbone_features is None

    class Deep(Mimic):
        @classmethod
        def needs(cls, *, weight):
            return Needs(teacher=Look(backbone=True, towers=(1,)) if weight > 1 else Look(towers=(WHOLE_TOWER,)))

    deep = Deep(teacher, student, weight=2).teach(batch)
    assert_same(deep.backbone_features, teacher.detector.backbone_features(batch), "")
    assert_same(deep.towers, (teacher.detector.tower(deep.features, 1),), "")
    assert deep.prediction is None
    whole = Deep(teacher, student).teach(batch)
    assert whole.backbone_features is None
    assert_same(whole.towers, (teacher.detector.tower(whole.features),), "")


def test_the_student_shows_what_needs_declares():
    class Towered(Mimic):
        @classmethod
        def needs(cls, **settings):
            return Needs(student=Look(backbone=True, towers=(0, 2)))

        def learn(self, student, seen, taught, batch, clock):
            assert_same(seen.backbone_features, student.backbone_features(batch), "")
            assert [tower.depth for tower in seen.towers] == [0, 2]
            assert_same(seen.towers[1], student.tower(seen.features), "")
            assert_same(seen.prediction, student.predict(seen.features, batch), "")
            return super().learn(student, seen, taught, batch, clock)

    teacher, student, batch = Teacher(TinyDense(seed=1)), TinyDense(seed=2), tiny_batch(2)
    method = Towered(teacher, student)
    expected = Mimic(teacher, student)
    expected.load_state_dict(method.state_dict())
    terms = method.step(student, batch, method.teach(batch), CLOCK).terms
    assert_same(terms, expected.step(student, batch, method.teach(batch), CLOCK).terms, "")
    # In a composition, its members see the union.
    together = Composition([Soft(teacher, student), method], student)
    assert together.requirements.student == Look(backbone=True, towers=(0, 2))
    shared = together.step(student, batch, together.teach(batch), CLOCK).terms
    assert torch.equal(shared["mimic_toy/maps"], terms["maps"])


def test_hyper_parameters_are_checked_before_the_constructor_runs():
    teacher, student = Teacher(TinyDense(seed=1)), TinyDense(seed=2)
    with pytest.raises(MethodError) as refusal:
        Mimic(teacher, student, weight=-1.0)
    assert str(refusal.value) == "mimic_toy: weight=-1.0 is not a number, 0 or more"
    with pytest.raises(MethodError) as refusal:
        Mimic(teacher, student, wieght=1.0)
    assert str(refusal.value) == "mimic_toy has no hyper-parameter 'wieght' (did you mean 'weight'?); it has: weight"
    assert Mimic(teacher, student).settings == {"weight": 1.0}
    assert Mimic(teacher, student, weight=2).settings == {"weight": 2.0}
    assert Doubled(None, student).settings == {}


def test_a_teacher_free_method_looks_at_no_teacher():
    teacher, batch = Teacher(Counting(seed=1)), tiny_batch(1)
    Counting.runs = 0
    for method in (Doubled(None, TinyDense()), Doubled(teacher, TinyDense())):
        assert method.requirements.teacher is None
        assert method.teach(batch) is None
        assert method.teachers() == ()
        with pytest.raises(AssertionError, match="doubled_toy has no teacher"):
            _ = method.teacher
    assert Counting.runs == 0


def test_a_method_looks_at_its_teacher_only_if_its_hyper_parameters_need_one():
    class Optional(Soft):
        def __init__(self, teacher, student, *, taught: bool = True):
            super().__init__(teacher, student)

        @classmethod
        def needs(cls, *, taught):
            return super().needs() if taught else Needs(teacher=None)

    teacher, student = Teacher(TinyDense(seed=1)), TinyDense(seed=2)
    assert Optional(teacher, student).looks() == {teacher: Look(prediction=True)}
    alone = Optional(teacher, student, taught=False)
    assert alone.looks() == {}
    assert alone.teach(tiny_batch(1)) is None


def test_the_state_dict_holds_the_adapters_and_no_teacher():
    method = Mimic(Teacher(TinyDense(seed=1)), TinyDense(seed=2))
    assert sorted(method.state_dict()) == ["adapter.bias", "adapter.weight"]
    assert len(list(method.parameters())) == 2
    method.train()
    assert not method.teacher.detector.training


def test_a_method_is_that_of_a_paper_unless_it_says_otherwise():
    class Ours(Mimic):
        published = False

    assert Mimic.published
    assert not Ours.published


def test_learn_must_be_defined():
    class Empty(Method):
        slug, title, bibtex = "empty", "", ""

    student, batch = TinyDense(), tiny_batch(1)
    with pytest.raises(TypeError, match=r"Empty must define learn"):
        Empty(Teacher(TinyDense()), student).step(student, batch, None, CLOCK)


def test_the_teacher_sees_images_of_other_canvases_apart_and_its_result_keeps_their_order():
    teacher, batch = Teacher(Counting(seed=1)), tiny_batch(3)  # the second image is 48 pixels high
    method = Mimic(teacher, TinyDense(seed=2))
    Counting.runs = 0
    whole = teach_by_canvas(method, batch)
    assert Counting.runs == 1
    apart = teach_by_canvas(method, replace(batch, canvases_hw=((64, 64), (48, 64), (64, 64))))
    assert Counting.runs == 1 + 2
    for mine, together in zip(apart.features.maps, whole.features.maps, strict=True):
        rows = mine.shape[2] * 48 // 64
        torch.testing.assert_close(mine[:, :, :rows], together[:, :, :rows])


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

    class Noted(TeacherFree):
        slug, title, bibtex = "noted_toy", "", ""

        def teach(self, batch):
            return Note(torch.full((len(batch),), 4.0))

        def learn(self, student, seen, taught, batch, clock):
            return Losses({"nothing": seen.features.maps[0].sum() * 0})

        def supervise(self, student, seen, taught, batch):
            return Losses({"own": student.loss(seen.prediction, batch).total() * taught.weight.mean()})

    teacher, student, batch = Teacher(TinyDense(seed=1)), TinyDense(seed=2), tiny_batch(2)
    together = Composition([PKD(teacher, student), Noted(None, student)], student)
    terms = together.step(student, batch, together.teach(batch), CLOCK).terms
    torch.testing.assert_close(terms["own"], 4 * student.loss(student(batch).prediction, batch).total())


def test_a_method_named_twice_is_refused():
    teacher, student = Teacher(TinyDense(seed=1)), TinyDense(seed=2)
    with pytest.raises(PairError, match=r"^method pkd\+pkd: each method may be named once$"):
        Composition([PKD(teacher, student), PKD(teacher, student)], student)


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
def test_each_method_of_a_composition_needs_a_name(names):
    student = TinyDense()
    with pytest.raises(ValueError, match="zip"):
        Composition([Doubled(None, student), PKD(Teacher(student), student)], student, names)


# ------------------------------------------------------------------------------------------------------------- relabel


class Moved(TeacherFree):
    """Moves every box by what a layer says of the student's features; its layer learns to move by one pixel."""

    slug, title, bibtex = "moved_toy", "a toy", ""

    def __init__(self, teacher, student):
        super().__init__(teacher, student)
        self.mover = nn.Linear(student.spec.channels[0], 1)

    def shift(self, features):
        with full_precision("cpu"):
            return self.mover(features.maps[0].float().mean(dim=(0, 2, 3)))[0]

    def relabel(self, student, features, batch, clock):
        shift = self.shift(features)
        moved = [replace(target, boxes_xyxy=target.boxes_xyxy + shift.detach()) for target in batch.targets]
        return batch.with_targets(moved), Losses({"one_pixel": (shift - 1).square()}, {"shift": shift.detach()})

    def learn(self, student, seen, taught, batch, clock):
        with full_precision("cpu"):
            return Losses({"size": 0.01 * seen.features.maps[0].square().mean()})


class MovedAgain(Moved):
    slug = "moved_again_toy"


def moved_by_hand(method, student, batch):
    features = student.features(batch)
    shift = method.shift(features)
    targets = [replace(target, boxes_xyxy=target.boxes_xyxy + shift.detach()) for target in batch.targets]
    return features, shift, batch.with_targets(targets)


@pytest.mark.parametrize("student_class", [TinyDense, TinyRegions, TinyQueries])
def test_targets_chosen_between_features_and_prediction_are_those_of_the_step(student_class):
    student, batch = student_class(seed=2), tiny_batch(3)
    method = Moved(None, student)
    losses = method.step(student, batch, None, CLOCK)
    features, shift, changed = moved_by_hand(method, student, batch)
    prediction = student.predict(features, changed)
    own = student.loss(prediction, changed).terms
    assert_same({name: losses.terms[name] for name in own}, dict(own), "")
    assert not torch.equal(losses.terms["box"], student.loss(student(batch).prediction, batch).terms["box"])
    torch.testing.assert_close(losses.terms["one_pixel"], (shift - 1).square())
    assert losses.distilled == {"one_pixel", "size"}
    assert torch.equal(losses.monitors["shift"], shift)
    losses.terms["one_pixel"].backward()
    assert method.mover.weight.grad.any()
    assert student.backbone[0].weight.grad.any(), "choosing targets may teach the student's features"


def test_what_a_detector_makes_of_its_targets_it_makes_of_the_changed_ones():
    """The ground truth that two-stage detectors insert among their regions; and ``learn`` is handed the changed batch."""
    handed = []

    class Watching(Moved):
        def learn(self, student, seen, taught, batch, clock):
            handed.append((seen.prediction, batch))
            return super().learn(student, seen, taught, batch, clock)

    student, batch = TinyRegions(seed=2), tiny_batch(2)
    method = Watching(None, student)
    method.step(student, batch, None, CLOCK)
    _, _, changed = moved_by_hand(method, student, batch)
    ((prediction, given),) = handed
    assert_same(given.targets, changed.targets, "")
    inserted = prediction.boxes_xyxy[prediction.origin.ground_truth >= 0]
    assert torch.equal(inserted, torch.cat([target.boxes_xyxy for target in changed.targets]))


def test_a_method_that_relabels_is_taught_about_the_original_boxes_and_runs_the_backbone_once():
    Counting.runs = 0
    student, batch = Counting(seed=2), tiny_batch(2)
    Moved(None, student).step(student, batch, None, CLOCK)
    assert Counting.runs == 1


def test_one_choice_of_targets_serves_a_composition_and_two_are_refused():
    teacher, student, batch = Teacher(TinyDense(seed=1)), TinyDense(seed=2), tiny_batch(2)
    moved = Moved(None, student)
    together = Composition([PKD(teacher, student), moved], student)
    losses = together.step(student, batch, together.teach(batch), CLOCK)
    alone = moved.step(student, batch, None, CLOCK)
    assert list(losses.terms) == ["cls", "box", "moved_toy/one_pixel", "pkd/pkd", "moved_toy/size"]
    assert losses.distilled == {"moved_toy/one_pixel", "pkd/pkd", "moved_toy/size"}
    for name in ("cls", "box"):
        assert torch.equal(losses.terms[name], alone.terms[name])
    assert torch.equal(losses.terms["moved_toy/one_pixel"], alone.terms["one_pixel"])
    assert torch.equal(losses.monitors["moved_toy/shift"], alone.monitors["shift"])
    with pytest.raises(PairError) as refusal:
        Composition([moved, PKD(teacher, student), MovedAgain(None, student)], student)
    assert str(refusal.value) == (
        "moved_toy and moved_again_toy both replace the student's targets; a composition can hold only one of them"
    )


def test_without_a_choice_the_targets_stay():
    student, batch = TinyDense(seed=2), tiny_batch(2)
    method = Doubled(None, student)
    changed, losses = method.relabel(student, student.features(batch), batch, CLOCK)
    assert changed is batch
    assert losses.terms == {}


# -------------------------------------------------------------------------------------------------------------- stages


class Staged(Mimic):
    """Three stages: an encoder alone, an encoder with a decoder, then the student with the encoder frozen after half."""

    slug = "staged_toy"

    def __init__(self, teacher, student):
        super().__init__(teacher, student)
        self.encoder, self.decoder = nn.Linear(2, 3), nn.Linear(3, 2)

    def _warm(self, batch, taught, clock):
        with full_precision("cpu"):
            return Losses({"encode": self.encoder(batch.images.new_ones(1, 2)).square().mean()})

    def _rebuild(self, batch, taught, clock):
        one = batch.images.new_ones(1, 2)
        with full_precision("cpu"):
            return Losses({"rebuild": (self.decoder(self.encoder(one)) - one).square().mean()})

    def learn(self, student, seen, taught, batch, clock):
        with full_precision("cpu"):
            encoded = self.encoder(batch.images.new_ones(1, 2)).square().mean()
        return Losses({**super().learn(student, seen, taught, batch, clock).terms, "encoded": encoded})

    def stages(self, student):
        def trains(clock):
            return (student, self.adapter, self.encoder) if clock.progress < 0.5 else (student, self.adapter)

        return (
            Stage("warm", self._warm, lambda clock: (self.encoder,), None, share=0.25, depends_on="fingerprint"),
            Stage("rebuild", self._rebuild, lambda clock: (self.encoder, self.decoder), None, share=0.5),
            replace(self.distill_stage(student, ()), trains=trains),
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
    assert last.learns_from is together
    losses = last.step(batch, together.teach(batch), CLOCK)
    assert list(losses.terms) == ["cls", "box", *(f"{m}/{t}" for m, t in [
        ("staged_toy", "maps"), ("staged_toy", "encoded"), ("pkd", "pkd"), ("other_toy", "maps"), ("other_toy", "encoded"),
    ])]  # fmt: skip


def test_stages_of_a_composition_learn_from_their_own_method():
    teacher, student, batch = Teacher(TinyDense(seed=1)), TinyDense(seed=2), tiny_batch(3)
    hinting, soft = Hinting(teacher, student), Soft(teacher, student)
    together = Composition([soft, hinting], student)
    hint, distill = together.stages(student)
    assert hint.learns_from is hinting
    assert distill.learns_from is together
    taught = together.teach(batch)
    assert part_of(taught, together, together) is taught
    assert part_of(taught, together, hinting) is taught.parts[1]
    assert part_of(taught, together, soft).prediction is not None
    alone = hinting.stages(student)[0].step(batch, hinting.teach(batch), CLOCK)
    assert_same(hint.step(batch, part_of(taught, together, hinting), CLOCK).terms, alone.terms, "")
    assert hint.step(batch, part_of(taught, together, hinting), CLOCK).distilled == {"maps"}


def test_what_is_handed_over_before_the_last_stage_is_handed_over_by_every_member():
    handed = []

    class Handing(Staged):
        slug = "handing_toy"

        def stages(self, student):
            *earlier, last = super().stages(student)
            return *earlier, replace(last, before=lambda: handed.append(self.slug))

    class HandingToo(Handing):
        slug = "handing_too_toy"

    teacher, student = Teacher(TinyDense(seed=1)), TinyDense(seed=2)
    parts = [Handing(teacher, student), PKD(teacher, student), HandingToo(teacher, student)]
    last = Composition(parts, student).stages(student)[-1]
    assert handed == []
    last.before()
    assert handed == ["handing_toy", "handing_too_toy"]
    assert Composition(parts[1:2], student).stages(student)[-1].before is None


# -------------------------------------------------------------------------------------- the checks that all methods pass


def test_pkd_keeps_the_contract_on_every_pair():
    checked = check_method(PKD)
    assert len(checked) == 18
    assert "queries 16 -> dense 8" in checked


def test_toy_methods_keep_the_contract():
    assert check_method(Soft) == ["dense 8 -> dense 8", "dense 16 -> dense 8"]
    assert check_method(Doubled) == ["dense 8", "regions 8", "queries 8"]
    assert "regions 16 -> queries 8" in check_method(Staged)
    assert "queries 8 -> dense 8" in check_method(Hinting)
    assert "regions 8 -> dense 8" in check_method(Prepared)
    assert check_method(Moved) == ["dense 8", "regions 8", "queries 8"]


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
        self.levels = self.teacher.detector.levels


class PerBox(Mimic):
    """Divides by the number of boxes."""

    def learn(self, student, seen, taught, batch, clock):
        boxes = sum(len(target) for target in batch.targets)
        loss = super().learn(student, seen, taught, batch, clock).terms["maps"]
        return Losses({"maps": loss * boxes / torch.tensor(float(boxes))})


class HalfPrecision(Mimic):
    """A loss in the networks' precision."""

    def learn(self, student, seen, taught, batch, clock):
        return Losses({"maps": self.adapter(seen.features.maps[0] - taught.features.maps[0]).square().mean(dtype=torch.bfloat16)})


class HalfArithmetic(Mimic):
    """A float32 loss of half precision numbers."""

    def learn(self, student, seen, taught, batch, clock):
        mine = self.adapter(seen.features.maps[0])
        return Losses({"maps": (mine.float() - taught.features.maps[0]).square().mean()})


class Hinting(Mimic):
    """Begins with a stage of hints."""

    def hint(self, student, batch, taught, clock):
        return super().learn(student, student(batch).float(), taught, batch, clock).as_distilled()

    def stages(self, student):
        def step(batch, taught, clock):
            return self.hint(student, batch, taught, clock)

        return Stage("hint", step, lambda clock: (student, self), None, self), *super().stages(student)


class Unmarked(Hinting):
    """Does not say that hints are distilled."""

    def hint(self, student, batch, taught, clock):
        return replace(super().hint(student, batch, taught, clock), distilled=frozenset())


class Impatient(Hinting):
    """Asks the teacher itself for hints."""

    def hint(self, student, batch, taught, clock):
        return super().hint(student, batch, self.teach(batch), clock)


class ImpatientAlone(Hinting):
    """Asks the teacher itself in a stage that is said to learn from nobody."""

    def stages(self, student):
        def step(batch, taught, clock):
            seen, taught = student(batch).float(), self.teach(batch).float()
            with full_precision("cpu"):
                return Losses({"maps": (self.adapter(seen.features.maps[0]) - taught.features.maps[0]).square().mean()})

        return Stage("own", step, lambda clock: (student,), None), *Method.stages(self, student)


class Prepared(Mimic):
    """Begins with an encoder, whose result is stored, and reads it while it learns."""

    def __init__(self, teacher, student):
        super().__init__(teacher, student)
        self.encoder = nn.Linear(2, 3)

    def fingerprint(self):
        return "fingerprint"

    def encoded(self, batch):
        with full_precision("cpu"):
            return self.encoder(batch.images.new_ones(1, 2)).square().mean()

    def learn(self, student, seen, taught, batch, clock):
        return Losses({**super().learn(student, seen, taught, batch, clock).terms, "encoded": self.encoded(batch)})

    def stages(self, student):
        def step(batch, taught, clock):
            return Losses({"encode": self.encoded(batch)})

        return Stage("encoder", step, lambda clock: (self.encoder,), None, depends_on=self.fingerprint()), *super().stages(
            student
        )


class Beside(Prepared):
    """Stores in a file not all that its earlier stage has learnt."""

    def __init__(self, teacher, student):
        super().__init__(teacher, student)
        self.seen = []

    def stages(self, student):
        def step(batch, taught, clock):
            self.seen.append(1.0)
            return Losses({"encode": self.encoded(batch)})

        first, *others = super().stages(student)
        return replace(first, step=step), *others

    def encoded(self, batch):
        return super().encoded(batch) * (1 + sum(self.seen))


class OfTheStudent(Prepared):
    """Trains the student in a stage whose result is said to be reusable."""

    def stages(self, student):
        def step(batch, taught, clock):
            return Losses({"encode": self.encoded(batch) + student(batch).features.maps[0].square().mean()})

        first, *others = super().stages(student)
        return replace(first, step=step, trains=lambda clock: (self.encoder, student)), *others


class OfTheTeacher(Prepared):
    """Names its result by what only the teacher itself shows."""

    def fingerprint(self):
        return f"{self.teacher.present}"


class Sociable(Prepared):
    """Learns otherwise in company: its earlier stage draws from the state that others left."""

    drawn = 0

    def stages(self, student):
        def step(batch, taught, clock):
            Sociable.drawn += 1
            return Losses({"encode": self.encoded(batch) * Sociable.drawn})

        first, *others = super().stages(student)
        return replace(first, step=step), *others


class Aloof(Mimic):
    """Looks at the teacher itself while it learns."""

    def learn(self, student, seen, taught, batch, clock):
        live = self.teacher.observe(batch, Look(backbone=True)).backbone_features.float()
        losses = super().learn(student, seen, taught, batch, clock)
        return Losses({"maps": losses.terms["maps"] * live.maps[0].mean()})


@dataclass(frozen=True)
class WholeBatch(Taught):
    features: torch.Tensor
    assignment: Assignment | None = None


class Unsplittable(Mimic):
    """What ``teach`` says has no images first."""

    def teach(self, batch):
        return WholeBatch(super().teach(batch).features.maps[0].flatten(0, 1))

    def learn(self, student, seen, taught, batch, clock):
        with full_precision("cpu"):
            mine = self.adapter(seen.features.maps[0]).flatten(0, 1)
            return Losses({"maps": (mine - taught.features[: len(mine)]).square().mean()})


@pytest.mark.parametrize(("broken", "message"), [
    (Leaky, "teach changed with the student"),
    (Random, "random state"),
    (Attached, "carries a gradient"),
    (Detached, "no gradient of learn"),
    (Idle, r"no gradient reaches the method's own \['idle.bias', 'idle.weight'\]"),
    (Holding, "keep a copy"),
    (PerBox, "without boxes"),
    (HalfPrecision, "compute it in full_precision"),
    (HalfArithmetic, "in half precision in a bf16 run"),
    (Unmarked, r"stage hint: \{'maps'\}"),
    (Impatient, "only its description is in the cache"),
    (ImpatientAlone, "only its description is in the cache"),
    (Beside, "learning from records gives another loss: .*encoded"),
    (OfTheStudent, "stage encoder trains what is not in the method"),
    (OfTheTeacher, "depends_on is another one without the teacher"),
    (Sociable, "in a composition, batch 0, encoder/encode is"),
    (Aloof, "only its description is in the cache"),
    (Unsplittable, None),
])  # fmt: skip
def test_the_checks_find_what_they_are_for(broken, message):
    with pytest.raises((AssertionError, RuntimeError, CacheError), match=message):
        check_method(broken)
