import dataclasses

import pytest
import torch

from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.methods.shared.needs import why_not
from detdistill.methods.tadf import TADF, tadf_box_loss, tadf_class_loss, tadf_decay, tadf_feature_loss, tadf_masks
from detdistill.structures import Clock, Target
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import _check_pair, _Pair, check_method, without_boxes
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

EARLY = Clock(0, 100)
FEATURES_ALONE = {"class_weight": 0.0, "box_weight": 0.0}


def test_the_mask_equals_that_of_defeats_code():
    golden = Golden("tadf")
    boxes, strides = [some.reshape(-1, 4) for some in golden.levels("in_boxes")], golden["in_strides"].tolist()
    expected = golden.levels("out_mask")
    masks = tadf_masks(boxes, strides, [tuple(level.shape[1:]) for level in expected])
    for mask, level in zip(masks, expected, strict=True):
        assert_golden(mask, level)


# --------------------------------------------------------------------------------------------------------------- masks

BOXES = [torch.tensor([[9.0, 12.0, 41.0, 50.0], [30.0, 8.0, 79.0, 30.0]]), torch.zeros(0, 4)]
STRIDES, SHAPES = [8, 16], [(8, 10), (4, 5)]


def test_masks_lie_in_boxes_and_more_boxes_never_lower_them():
    for all_levels in (False, True):
        both = tadf_masks(BOXES, STRIDES, SHAPES, all_levels=all_levels)
        ones = [tadf_masks([BOXES[0][[index]], BOXES[1]], STRIDES, SHAPES, all_levels=all_levels) for index in range(2)]
        for level in range(2):
            assert torch.equal(both[level], torch.maximum(ones[0][level], ones[1][level]))
            assert 0 <= float(both[level].min()) <= float(both[level].max()) <= 1
            assert not both[level][1].any()
        assert bool(both[1].any()) is all_levels  # both boxes belong to level 0
    assert not both[0][0, 7].any()  # row 7 begins at 56


def test_a_smaller_variance_makes_a_narrower_mask():
    wide, narrow = (tadf_masks(BOXES, STRIDES, SHAPES, variance)[0] for variance in (2.0, 0.5))
    assert bool((narrow <= wide).all())
    assert float(narrow.sum()) < float(wide.sum())


# ---------------------------------------------------------------------------------------------------------------- loss


def maps(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_features_by_the_formula_and_only_inside_boxes():
    masks = [mask.double() for mask in tadf_masks(BOXES, STRIDES, SHAPES, all_levels=True)]
    students = [maps(level, 2, 4, *shape).requires_grad_() for level, shape in enumerate(SHAPES)]
    teachers = [maps(9 + level, 2, 4, *shape).requires_grad_() for level, shape in enumerate(SHAPES)]
    sums = [(m[:, None] * (s - t).square()).sum() for s, t, m in zip(students, teachers, masks, strict=True)]
    by_level = sum(total / (2 * mask.sum()) for total, mask in zip(sums, masks, strict=True))
    by_all = sum(sums) / (2 * sum(mask.sum() for mask in masks))
    loss = tadf_feature_loss(students, teachers, masks, 3.0)
    assert loss.item() == pytest.approx(3 * by_level.item(), rel=1e-12)
    assert tadf_feature_loss(students, teachers, masks, divisor="all").item() == pytest.approx(by_all.item(), rel=1e-12)
    loss.backward()
    assert teachers[0].grad is None
    for student, mask in zip(students, masks, strict=True):
        assert torch.equal(student.grad != 0, (mask > 0)[:, None].expand_as(student))
    assert tadf_feature_loss(teachers, teachers, masks).item() == 0.0
    nothing = tadf_feature_loss(students, teachers, [0 * mask for mask in masks])
    nothing.backward()
    assert nothing.item() == 0.0


def test_classes_count_only_where_the_teacher_is_better():
    student, teacher = maps(0, 5, 4).requires_grad_(), maps(1, 5, 4)
    labels = torch.tensor([0, 1, 2, 0, 1])
    p, q = teacher.softmax(dim=1), student.softmax(dim=1)
    better = p.gather(1, labels[:, None]) > q.gather(1, labels[:, None])
    assert 0 < int(better.sum()) < 5
    each = (p * (p.log() - q.log())).sum(dim=1)
    loss = tadf_class_loss(student, teacher, labels, 2.0)
    assert loss.item() == pytest.approx(2 * each[better[:, 0]].mean().item(), rel=1e-9)
    loss.backward()
    assert torch.equal(student.grad.any(dim=1), better[:, 0])
    assert tadf_class_loss(teacher, teacher, labels).item() == 0.0
    worse = torch.nn.functional.one_hot(labels, 4) * -20.0
    closed = tadf_class_loss(student, worse.double(), labels)
    closed.backward()
    assert closed.item() == 0.0


PROPOSALS = torch.tensor([[0.0, 0.0, 40.0, 40.0], [10.0, 10.0, 50.0, 30.0]], dtype=torch.float64)
TARGETS = torch.tensor([[4.0, 4.0, 44.0, 44.0], [10.0, 10.0, 50.0, 34.0]], dtype=torch.float64)


def test_boxes_count_only_where_the_teacher_improves_the_proposal():
    teacher = torch.stack([TARGETS[0], PROPOSALS[1] - 5])  # the second is worse than its proposal
    student = PROPOSALS.clone().requires_grad_()
    loss = tadf_box_loss(student, teacher, PROPOSALS, TARGETS, 2.0)
    # The deltas of the first are 0 and 4 / 40 * 10 = 1 for x and y, 0 for the sides; smooth L1 of 1 is 0.5.
    assert loss.item() == pytest.approx(2 * 2 * 0.5, rel=1e-9)
    loss.backward()
    assert student.grad.any(dim=1).tolist() == [True, False]
    closed = tadf_box_loss(student, PROPOSALS - 7, PROPOSALS, TARGETS)
    assert closed.item() == 0.0
    assert tadf_box_loss(teacher, teacher, PROPOSALS, TARGETS).item() == 0.0


def test_the_decay_falls_from_one_to_one_over_parts():
    epochs, steps = 12, 7
    found = [tadf_decay(epoch * steps + step, epochs * steps, epochs) for epoch in range(epochs) for step in range(steps)]
    expected = [1 - epoch / epochs for epoch in range(epochs) for _ in range(steps)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert tadf_decay(99, 100, 1) == 1.0
    assert tadf_decay(500, 100, 12) == pytest.approx(1 / 12)


# -------------------------------------------------------------------------------------------------------------- method


def built(teacher=None, student=TinyRegions, **settings):
    torch.manual_seed(0)
    student = student()
    return TADF(Teacher(teacher or TinyRegions(channels=(12, 12), seed=1)), student, **settings), student


def learned(batch, clock=EARLY, **settings):
    method, student = built(**settings)
    return method.learn(student, student(batch), method.teach(batch), batch, clock)


def test_terms_are_the_losses_of_maps_and_shared_proposals():
    batch = tiny_batch()
    losses = learned(batch)
    method, student = built()
    seen = student(batch)
    masks = tadf_masks([target.boxes_xyxy for target in batch.targets], (8, 16), [(8, 8), (4, 4)])
    features = method.teacher.observe(batch).features
    mine = method.adapters(seen.features.maps)
    positives = student.positives(seen.prediction, student.assign(seen.prediction, batch), batch)
    assert len(positives) > 2
    boxes = seen.prediction.boxes_xyxy[positives.index]
    split = [boxes[positives.image == image] for image in range(2)]
    theirs = method.teacher.detector.regions(features, split, batch)
    refined = theirs.refined_xyxy[torch.arange(len(boxes)), positives.labels]
    expected = (
        tadf_feature_loss(mine, features.maps, masks),
        tadf_class_loss(positives.logits, theirs.logits, positives.labels),
        tadf_box_loss(positives.boxes_xyxy, refined, boxes, positives.targets_xyxy),
    )
    assert list(losses.terms) == ["tadf_features", "tadf_classes", "tadf_boxes"]
    assert [term.item() for term in losses.terms.values()] == pytest.approx([value.item() for value in expected], rel=1e-5)
    assert float(losses.monitors["better_classes"]) > 0


def test_classes_are_matched_by_name():
    teacher = TinyRegions(classes=("x", "b", "a"), seed=1)
    batch = tiny_batch()
    method, student = built(teacher)
    found = method._regions(student, student(batch), batch)
    split = [found.proposals_xyxy[found.positives.image == image] for image in range(2)]
    theirs = teacher.regions(method.teacher.observe(batch).features, split, batch)
    torch.testing.assert_close(found.teacher_logits, theirs.logits[:, [2, 1, 3]])
    column = torch.tensor([2, 1])[found.positives.labels]
    torch.testing.assert_close(found.teacher_xyxy, theirs.refined_xyxy[torch.arange(len(column)), column])


def test_all_terms_decay_and_zero_weights_leave_terms_out():
    batch = tiny_batch()
    full, late = learned(batch).terms, learned(batch, Clock(99, 100)).terms
    assert [late[name].item() for name in full] == pytest.approx([term.item() / 12 for term in full.values()], rel=1e-6)
    assert list(learned(batch, feature_weight=0.0, box_weight=0.0).terms) == ["tadf_classes"]
    assert list(learned(batch, **FEATURES_ALONE).terms) == ["tadf_features"]


def test_no_gradient_reaches_the_proposals_or_the_teacher():
    batch = tiny_batch()
    method, student = built()
    seen = student(batch)
    assert not seen.prediction.boxes_xyxy.requires_grad
    terms = method.learn(student, seen, method.teach(batch), batch, EARLY).terms
    (terms["tadf_classes"] + terms["tadf_boxes"]).backward()
    assert student.logits.weight.grad.any()
    assert all(parameter.grad is None for parameter in method.teacher.detector.parameters())


def test_no_boxes_no_positives_and_crowds():
    batch = tiny_batch()
    empty = without_boxes(batch, range(2))
    terms = learned(empty).terms
    sum(terms.values()).backward()
    assert [term.item() for term in terms.values()] == [0.0, 0.0, 0.0]
    crowd = [Target(target.boxes_xyxy, target.labels, torch.ones_like(target.crowd)) for target in batch.targets]
    assert learned(batch.with_targets(crowd)).terms["tadf_features"].item() == 0.0


def test_boxes_beyond_the_image_and_over_all_of_it():
    batch = tiny_batch(1)
    label, crowd = torch.tensor([1]), torch.tensor([False])
    for box in ([[-9.0, -9.0, 80.0, 90.0]], [[60.0, 60.0, 64.0, 64.0]], [[64.0, 64.0, 64.0, 64.0]]):
        losses = learned(batch.with_targets([Target(torch.tensor(box), label, crowd)]))
        assert all(bool(torch.isfinite(term)) for term in losses.terms.values())
        assert losses.terms["tadf_features"].item() > 0


def test_a_class_agnostic_teacher_has_one_set_of_boxes():
    class Agnostic(TinyRegions):
        def _second(self, *given):
            regions = super()._second(*given)
            return dataclasses.replace(regions, deltas=regions.deltas[:, :1], refined_xyxy=regions.refined_xyxy[:, :1])

    batch = tiny_batch()
    method, student = built(Agnostic(channels=(12, 12), seed=1))
    assert method._regions(student, student(batch), batch).teacher_xyxy.shape[1:] == (4,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_weight": 0.0, **FEATURES_ALONE}, "feature_weight, class_weight, box_weight are all 0"),
        ({"decay_parts": 0}, "decay_parts=0 is not a whole number, 1 or more"),
        ({"divisor": "levels"}, "divisor=levels is not one of level, all"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(DetdistillError) as error:
        built(**settings)
    assert str(error.value).startswith(f"tadf: {message}")


def test_detectors_without_regions_are_refused_unless_features_alone_are_compared():
    method, student = built()
    needs = method.requirements
    assert why_not(needs, Teacher(TinyDense()), student).startswith("the teacher tinydense:patches predicts dense")
    assert why_not(needs, method.teacher, TinyQueries()).startswith("the student tinyqueries:patches predicts queries")
    assert needs.why_live()
    alone, _ = built(TinyDense(), TinyQueries, **FEATURES_ALONE)
    assert not alone.requirements.why_live()


def test_contract():
    assert check_method(TADF) == ["regions 8 -> regions 8", "regions 16 -> regions 8"]


def test_contract_of_features_alone():
    _check_pair(_Pair(TADF, FEATURES_ALONE, TinyDense, TinyQueries, 16))
