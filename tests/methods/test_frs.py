import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.methods.frs import FRS, frs_class_loss, frs_feature_loss, frs_richness
from detdistill.methods.shared.contract import teach_by_canvas
from detdistill.methods.shared.needs import why_not
from detdistill.structures import Clock, Dense
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import _check_pair, _Pair, check_method, without_boxes
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

LATE = Clock(500, 1000)


def maps(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapter(parameters):
    weight = parameters["weight"]
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2).double()
    layer.load_state_dict(parameters)
    return layer


def test_values_and_gradients_equal_the_released_code():
    golden = Golden("frs")
    settings = golden.meta["hyperparameters"]
    students = [level.requires_grad_() for level in golden.levels("in_student")]
    scores = [level.requires_grad_() for level in golden.levels("in_student_logits")]
    richness = [frs_richness(level) for level in golden.levels("in_teacher_logits")]
    for mask, expected in zip(richness, golden.levels("out_mask"), strict=True):
        assert_golden(mask, expected)
    layers = [adapter(golden.parameters(f"param_l{level}.adapt.")) for level in range(len(students))]
    adapted = [layer(student) for layer, student in zip(layers, students, strict=True)]
    features = frs_feature_loss(adapted, golden.levels("in_teacher"), richness, settings["feat_weight"])
    classes = frs_class_loss(scores, golden.levels("in_teacher_logits"), richness, settings["cls_weight"])
    warm = Clock(settings["warm_iter_of_out_warm"], 10**6).warm_up(settings["warm_step"])
    for name, value in (("feat", features), ("cls", classes)):
        assert_golden(value, golden[f"out_{name}"])
        assert_golden(warm * value, golden[f"out_{name}_warm"])
    assert_golden(features + classes, golden["out_total"])
    (features + classes).backward()
    for level, (student, score, layer) in enumerate(zip(students, scores, layers, strict=True)):
        assert_golden(student.grad, golden[f"grad_student_{level}"])
        assert_golden(score.grad, golden[f"grad_student_logits_{level}"])
        for name, parameter in layer.named_parameters():
            assert_golden(parameter.grad, golden[f"grad_param_l{level}.adapt.{name}"])


# ---------------------------------------------------------------------------------------------------------------- loss


def test_richness_is_the_best_score_and_soft():
    logits = maps(0, 2, 6, 4, 5)
    mask = frs_richness(logits)
    assert torch.equal(mask, logits.amax(dim=1).sigmoid())
    assert torch.equal(mask, frs_richness(torch.cat([logits, torch.full_like(logits[:, :1], -30.0)], dim=1)))
    assert 0 < float(mask.min()) < float(mask.max()) < 1


def test_equal_maps_give_zero_and_equal_scores_no_gradient():
    teacher, logits = maps(0, 2, 4, 5, 6), maps(1, 2, 6, 5, 6)
    richness = [frs_richness(logits)]
    assert frs_feature_loss([teacher], [teacher], richness).item() == 0.0
    student = logits.clone().requires_grad_()
    loss = frs_class_loss([student], [logits], richness, 1.0)
    loss.backward()
    assert float(student.grad.abs().max()) < 1e-12
    score = logits.sigmoid()
    entropy = -(score * score.log() + (1 - score) * (1 - score).log()).sum(dim=1)
    assert loss.item() == pytest.approx(((richness[0] * entropy).sum() / richness[0].sum()).item(), rel=1e-9)


def test_saturated_scores_keep_their_gradient():
    student = torch.full((1, 1, 1, 1), -200.0, requires_grad=True)
    teacher = torch.full((1, 1, 1, 1), 5.0)
    frs_class_loss([student], [teacher], [frs_richness(teacher)], 1.0).backward()
    assert student.grad.item() == pytest.approx(-torch.tensor(5.0).sigmoid().item())


def test_duplicating_the_batch_changes_nothing_but_a_shift_of_the_teachers_logits_does():
    student, teacher, mine, theirs = maps(0, 2, 4, 5, 6), maps(1, 2, 4, 5, 6), maps(2, 2, 6, 5, 6), maps(3, 2, 6, 5, 6)

    def both(times=1, shift=0.0):
        s, t, z, y = (level.repeat(times, 1, 1, 1) for level in (student, teacher, mine, theirs + shift))
        return frs_feature_loss([s], [t], [frs_richness(y)]).item(), frs_class_loss([z], [y], [frs_richness(y)]).item()

    assert both(2) == pytest.approx(both(), rel=1e-12)
    assert both(shift=1.0)[0] != pytest.approx(both()[0], rel=1e-3)


def test_a_poor_cell_contributes_nearly_nothing_and_no_richness_at_all_is_finite():
    student, teacher, logits = maps(0, 1, 4, 2, 2), maps(1, 1, 4, 2, 2), maps(2, 1, 6, 2, 2)
    logits[..., 0, 0] = -40.0
    changed = student.clone()
    changed[..., 0, 0] += 5
    losses = [frs_feature_loss([some], [teacher], [frs_richness(logits)]).item() for some in (student, changed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    nothing = frs_feature_loss([student.float()], [teacher.float()], [torch.zeros(1, 2, 2)])
    assert nothing.item() == 0.0


def test_softmax_scores_are_compared_by_cross_entropy_of_each_anchor():
    mine, theirs = maps(0, 2, 2 * 4, 3, 3), maps(1, 2, 2 * 4, 3, 3)  # 2 anchors, 3 classes and the background
    mask = torch.rand(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = torch.zeros(3, 3, dtype=torch.float64).repeat(2, 1, 1)
    for anchor in range(2):
        part = slice(4 * anchor, 4 * anchor + 4)
        expected += F.cross_entropy(mine[:, part], theirs[:, part].softmax(dim=1), reduction="none")
    loss = frs_class_loss([mine], [theirs], [mask], 0.5, softmax_outputs=4)
    assert loss.item() == pytest.approx((0.5 * (mask * expected).sum() / mask.sum()).item(), rel=1e-12)


def test_the_teacher_gets_no_gradient():
    teacher, logits = maps(1, 2, 4, 5, 6).requires_grad_(), maps(3, 2, 6, 5, 6).requires_grad_()
    student, mine = maps(0, 2, 4, 5, 6).requires_grad_(), maps(2, 2, 6, 5, 6).requires_grad_()
    mask = [frs_richness(logits)]
    (frs_feature_loss([student], [teacher], mask) + frs_class_loss([mine], [logits], mask)).backward()
    assert teacher.grad is logits.grad is None
    assert all(bool(side.grad.abs().amin() > 0) for side in (student, mine))


# -------------------------------------------------------------------------------------------------------------- method


def built(teacher=TinyDense, student=TinyDense, **settings):
    torch.manual_seed(0)
    student = student()
    return FRS(Teacher(teacher(channels=(12, 12), seed=1)), student, **settings), student


def learned(batch, clock=LATE, **settings):
    method, student = built(**settings)
    return method.learn(student, student(batch), method.teach(batch), batch, clock).terms


def test_terms_are_the_losses_of_maps_and_logits():
    batch = tiny_batch()
    method, student = built()
    taught, prediction = method.teach(batch), student(batch).prediction
    richness = [frs_richness(level) for level in taught.logits]
    torch.testing.assert_close(taught.richness, tuple(richness))
    mine = method.adapters(student.features(batch).maps)
    scores = [
        prediction.logits[:, prediction.levels == level].transpose(1, 2).unflatten(2, (n, n)) for level, n in ((0, 8), (1, 4))
    ]
    terms = learned(batch)
    expected = frs_feature_loss(mine, taught.features.maps, richness), frs_class_loss(scores, taught.logits, richness)
    assert [terms["frs_features"].item(), terms["frs_classes"].item()] == pytest.approx([e.item() for e in expected], rel=1e-5)


def test_warm_up_is_linear():
    batch = tiny_batch()
    full = learned(batch)
    for step, part in ((0, 0.0), (250, 0.5), (5000, 1.0)):
        terms = learned(batch, Clock(step, 10000))
        assert [terms[name].item() for name in full] == pytest.approx([part * term.item() for term in full.values()], rel=1e-6)


def test_boxes_are_not_used():
    batch = tiny_batch()
    empty = without_boxes(batch, range(2))
    assert {name: term.item() for name, term in learned(batch).items()} == {n: t.item() for n, t in learned(empty).items()}


def test_profiles_and_weights():
    def weights(**settings):
        method, _ = built(**settings)
        return method.feature_weight, method.class_weight

    assert weights() == (0.005, 0.02)
    assert weights(profile="faster_rcnn") == (0.002, 0.1)
    assert weights(profile="fcos", class_weight=3.0) == (0.01, 3.0)
    assert weights(profile="gfl", class_term=False) == (0.1, 0.0)
    assert list(learned(tiny_batch(), feature_weight=0.0)) == ["frs_classes"]
    assert list(learned(tiny_batch(), class_term=False)) == ["frs_features"]


def test_without_the_class_term_no_logits_are_stored():
    batch = tiny_batch()
    assert built(class_term=False)[0].teach(batch).logits == ()
    assert [level.shape for level in built()[0].teach(batch).logits] == [(2, 2, 8, 8), (2, 2, 4, 4)]


def test_classes_are_matched_by_name():
    torch.manual_seed(0)
    teacher, batch = TinyDense(classes=("x", "b", "a"), seed=1), tiny_batch()
    method = FRS(Teacher(teacher), student := TinyDense())
    taught, seen = method.teach(batch), student(batch)
    theirs = method._scores(seen, taught, taught.richness)[1]
    assert torch.equal(theirs[0], taught.logits[0][:, [2, 1]])


def test_softmax_heads_leave_out_the_background():
    class Softmax(TinyDense):
        def __init__(self, **given):
            super().__init__(classes=("a", "b", "c"), **given)
            self.spec = dataclasses.replace(self.spec, classes=("a", "b"), softmax=True)

        def predict(self, features, batch):
            return dataclasses.replace(super().predict(features, batch), softmax=True)

    batch = tiny_batch()
    method, student = built(Softmax, Softmax)
    assert method.softmax_outputs == 3
    taught = method.teach(batch)
    expected = taught.logits[0].softmax(dim=1)[:, :2].amax(dim=1)
    torch.testing.assert_close(taught.richness[0], expected)
    terms = method.learn(student, student(batch), taught, batch, LATE).terms
    assert all(bool(torch.isfinite(term)) and term.item() > 0 for term in terms.values())


def test_two_stages_compare_the_first():
    batch = tiny_batch()
    method, student = built(TinyRegions, TinyRegions)
    taught = method.teach(batch)
    first = method.teacher.observe(batch, dataclasses.replace(method.requirements.teacher)).prediction.first
    assert isinstance(first, Dense)
    torch.testing.assert_close(taught.richness[0].flatten(1), first.logits[:, first.levels == 0, 0].sigmoid())
    assert set(method.learn(student, student(batch), taught, batch, LATE).terms) == {"frs_features", "frs_classes"}


def test_images_on_canvases_of_their_own_equal_single_images():
    batch = tiny_batch(3)
    apart = dataclasses.replace(batch, canvases_hw=tuple(view.size_hw for view in batch.views))
    method, _ = built()
    taught = teach_by_canvas(method, apart)
    assert not taught.richness[0][1, 6:].any()  # 48 of 64 pixels
    assert not taught.richness[1][1, 3:].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_weight": 0.0, "class_weight": 0.0}, "feature_weight, class_weight are all 0"),
        ({"feature_weight": 0.0, "class_term": False}, "feature_weight, class_weight are all 0"),
        ({"kernel": 2}, "kernel=2 is not one of 1, 3"),
        ({"warm_steps": -1}, "warm_steps=-1 is not a whole number, 0 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(DetdistillError) as error:
        built(**settings)
    assert str(error.value).startswith(f"frs: {message}")


def test_a_teacher_without_a_dense_head_is_refused():
    method, student = built()
    reason = why_not(method.requirements, Teacher(TinyQueries()), student)
    assert reason == "the teacher tinyqueries:patches predicts queries; it needs a teacher that predicts dense or regions"


def test_unlike_heads_are_refused_with_the_class_term_only():
    class Sigmoid(TinyRegions):
        def __init__(self, **given):
            super().__init__(**given)
            self.spec = dataclasses.replace(self.spec, softmax=False)

    with pytest.raises(DetdistillError, match=r"predict different things; use class_term=false"):
        built(Sigmoid, TinyDense)
    built(TinyRegions, TinyQueries, class_term=False)


def test_contract():
    alike = [f"{family} {channels} -> {family} 8" for family in ("dense", "regions") for channels in (8, 16)]
    assert check_method(FRS, warm_steps=0) == alike


def test_contract_of_features_alone():
    _check_pair(_Pair(FRS, {"class_term": False, "warm_steps": 0}, TinyRegions, TinyQueries, 16))
