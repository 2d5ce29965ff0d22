from dataclasses import replace

import pytest
import torch

from detdistill.cache.encoding import encode
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.paa import paa_candidates, paa_costs, paa_select
from detdistill.methods.lad import LAD, lad_label_terms, lad_region, lad_soft_terms, lad_switched_costs
from detdistill.methods.shared.needs import PairError
from detdistill.structures import IGNORED, NEGATIVE, Assignment, Clock, Target
from tests.detectors.dense.test_paa import golden_prediction
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method, without_boxes
from tests.tiny import TinyDense, TinyRegions, tiny_batch

CLOCK = Clock(1, 10)
NOBODY = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))

# --------------------------------------------------------------------------------------------------------- golden values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_labels_losses_and_gradients_equal_mmdet(dtype):
    golden = Golden("lad")
    teacher, theirs, batch, _ = golden_prediction(golden, "teacher", dtype)
    _, mine, _, leaves = golden_prediction(golden, "student", dtype)
    candidates = paa_candidates(theirs.priors_xyxy, teacher.valid(theirs, batch), batch.targets)
    costs = paa_costs(theirs, candidates, batch.targets)
    images = torch.nonzero(candidates >= 0)[:, 0]
    for image in range(len(batch)):
        here = candidates[image] >= 0
        assert torch.equal(torch.nonzero(here).flatten(), golden[f"out_candidate_index_{image}"])
        assert torch.equal(candidates[image, here], golden[f"out_candidate_gt_{image}"])
        assert_golden(costs[images == image], golden[f"out_candidate_teacher_loss_{image}"].to(dtype))
    matched = paa_select(costs, candidates, theirs.levels, golden.meta["topk"])
    assert torch.equal(class_labels(matched, batch, golden), golden["out_labels"])
    assert int((matched >= 0).sum()) == int(golden["out_num_pos"])
    weights = golden.meta["loss_weights"]
    terms = lad_label_terms(mine.logits, mine.boxes_xyxy, mine.quality, matched, batch.targets, weights["bbox"], weights["iou"])
    for term, name in zip(terms, ("cls", "bbox", "iou"), strict=True):
        assert_golden(term, golden[f"out_loss_{name}"].to(dtype))
    total = sum(terms)
    assert_golden(total, golden["out_total"].to(dtype))
    total.backward()
    assert_gradients(leaves, golden, dtype)


def class_labels(matched, batch, golden):
    labels = [torch.cat([target.labels, torch.tensor([golden.meta["num_classes"]])]) for target in batch.targets]
    return torch.stack([mine[row] for mine, row in zip(labels, matched, strict=True)])


def assert_gradients(leaves, golden, dtype):
    for name, levels in leaves.items():
        for level, leaf in enumerate(levels):
            assert_golden(leaf.grad, golden[f"grad_student_{name}_{level}"].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_soft_labels_and_gradients_equal_the_released_code(dtype):
    golden = Golden("lad_solad")
    _, theirs, batch, _ = golden_prediction(golden, "teacher", dtype)
    _, mine, _, leaves = golden_prediction(golden, "student", dtype)
    sizes, weights = golden["in_image_sizes"], golden.meta["loss_weights"]
    overlaps = lad_region(theirs.boxes_xyxy, batch.targets, sizes, golden.meta["min_iou"])
    assert_golden(overlaps[overlaps > 0], golden["out_region_weight"].to(dtype))
    boxes = mine.boxes_xyxy, theirs.boxes_xyxy
    terms = lad_soft_terms(
        mine.logits, theirs.logits, *boxes, mine.quality, theirs.quality, overlaps, sizes, power=golden.meta["gamma"]
    )
    weighted = {
        "cls": weights["kd_cls"] * terms.classification,
        "bbox": weights["kd_bbox"] * terms.box,
        "centerness": weights["kd_iou"] * terms.iou,
    }
    for name, term in weighted.items():
        assert_golden(term, golden[f"out_loss_kd_{name}"].to(dtype))
    total = sum(weighted.values())
    assert_golden(total, golden["out_total"].to(dtype))
    total.backward()
    assert_gradients(leaves, golden, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_switched_labels_equal_the_released_colad(dtype):
    golden = Golden("lad_solad")
    teacher, theirs, batch, _ = golden_prediction(golden, "teacher", dtype)
    _, mine, _, _ = golden_prediction(golden, "student", dtype)
    candidates = paa_candidates(theirs.priors_xyxy, teacher.valid(theirs, batch), batch.targets)
    both = [paa_costs(prediction, candidates, batch.targets).detach() for prediction in (mine, theirs)]
    costs, fraction = lad_switched_costs(*both, candidates, theirs.levels)
    matched = paa_select(costs, candidates, theirs.levels, golden.meta["topk"])
    assert torch.equal(class_labels(matched, batch, golden), golden["out_colad_labels"])
    assert int((matched >= 0).sum()) == int(golden["out_colad_num_pos"])
    assert_golden(fraction, golden["out_colad_teacher_ratio"].to(dtype))


# -------------------------------------------------------------------------------------------------------- pure functions


def soft_inputs(seed=0):
    """Student's and teacher's logits, boxes and quality of two images, overlaps and sizes."""
    golden = Golden("lad_solad")
    _, theirs, batch, _ = golden_prediction(golden, "teacher")
    _, mine, _, leaves = golden_prediction(golden, "student")
    return mine, theirs, batch, leaves


def test_soft_terms_are_zero_at_equality_and_without_boxes():
    mine, theirs, batch, leaves = soft_inputs()
    overlaps = lad_region(theirs.boxes_xyxy, batch.targets, batch.sizes)
    same = lad_soft_terms(
        theirs.logits, theirs.logits, theirs.boxes_xyxy, theirs.boxes_xyxy, theirs.quality, theirs.quality, overlaps, batch.sizes
    )
    assert all(abs(float(term.detach())) < 1e-12 for term in same)
    nothing = lad_region(theirs.boxes_xyxy, [NOBODY, NOBODY], batch.sizes)
    assert not nothing.any()
    terms = lad_soft_terms(
        mine.logits, theirs.logits, mine.boxes_xyxy, theirs.boxes_xyxy, mine.quality, theirs.quality, nothing, batch.sizes
    )
    assert all(float(term.detach()) == 0 for term in terms)
    sum(terms).backward()
    assert all(not leaf.grad.any() for levels in leaves.values() for leaf in levels)


def test_boxes_and_iou_have_no_gradient_outside_the_region():
    mine, theirs, batch, _ = soft_inputs()
    overlaps = lad_region(theirs.boxes_xyxy, batch.targets, batch.sizes)
    terms = lad_soft_terms(
        mine.logits, theirs.logits, mine.boxes_xyxy, theirs.boxes_xyxy, mine.quality, theirs.quality, overlaps, batch.sizes
    )
    for term, leaf in ((terms.box, mine.boxes_xyxy), (terms.iou, mine.quality)):
        (gradient,) = torch.autograd.grad(term, leaf, retain_graph=True)
        assert not gradient[overlaps == 0].any()
        assert gradient[overlaps > 0].any()


def test_switch_by_hand_and_with_equal_networks():
    candidates = torch.tensor([[0, 0, 0, 1, NEGATIVE, IGNORED], [0, 0, -1, -1, -1, -1]])
    levels = torch.tensor([0, 0, 1, 1, 0, 0])
    student, teacher = torch.tensor([1.0, 1.1, 2.0, 5.0, 1.0, 3.0]), torch.tensor([1.0, 3.0, 3.0, 4.0, 2.0, 2.1])
    costs, fraction = lad_switched_costs(student, teacher, candidates, levels)
    # box 0 of image 0: the teacher separates level 0; one candidate on level 1, cheaper for the student; box 1: for the teacher
    assert costs.tolist() == [1.0, 3.0, 2.0, 4.0, 1.0, 3.0]
    assert float(fraction) == pytest.approx((2 / 3 + 0) / 2)
    assert torch.equal(lad_switched_costs(student, student, candidates, levels)[0], student)
    none, zero = lad_switched_costs(student[:0], student[:0], candidates.clamp(max=-1), levels)
    assert (len(none), float(zero)) == (0, 0.0)


def test_label_terms_without_positives_or_with_all_cells_ignored():
    logits = torch.zeros(2, 5, 3, requires_grad=True)
    boxes = torch.zeros(2, 5, 4, requires_grad=True)
    for value in (NEGATIVE, IGNORED):
        terms = lad_label_terms(logits, boxes, logits[..., 0], torch.full((2, 5), value), [NOBODY, NOBODY])
        assert float(terms.bbox_regression.detach()) == float(terms.iou.detach()) == 0
        assert (float(terms.classification.detach()) > 0) == (value == NEGATIVE)
        logits.grad = boxes.grad = None
        sum(terms).backward()
        assert bool(logits.grad.isfinite().all())
        assert bool(boxes.grad.isfinite().all())


# --------------------------------------------------------------------------------------------------------------- method


@pytest.mark.parametrize("settings", [{}, {"form": "solad", "switch": True}])
def test_contract(settings):
    assert check_method(LAD, **settings) == ["dense 8 -> dense 8", "dense 16 -> dense 8"]


OPTIONS = "resnet10t,channels=8-16-32-64,stem=8,neck=32,convs=1"


def paa(seed=0, levels="3-5", classes=("a", "b"), kind="paa"):
    torch.manual_seed(seed)
    detector = build_detector(f"{kind}:{OPTIONS},levels={levels}", classes)
    for name, parameter in detector.named_parameters():
        if name.endswith(("cls_logits.weight", "bbox_reg.weight", "bbox_ctrness.weight")):
            torch.nn.init.normal_(parameter, std=0.1)
    return detector.eval()


def test_the_teacher_s_labels_are_the_student_s_own_where_both_are_equal():
    student, batch = paa(), tiny_batch(3)
    method = LAD(Teacher(paa()), student)
    seen, taught = student(batch), method.teach(batch)
    found = method.supervise(student, seen, taught, batch).terms
    own = student.loss(seen.prediction, batch).terms
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)
    switched = LAD(Teacher(paa()), student, switch=True)
    losses = switched.supervise(student, seen, switched.teach(batch), batch)
    assert all(torch.allclose(losses.terms[name], own[name]) for name in own)
    assert float(losses.monitors["teacher_costs"]) == 0  # ties go to the student


def test_released_losses_differ_from_paa_s_in_the_box_term_only():
    student, batch = paa(1), tiny_batch(2)
    seen = student(batch)
    terms = []
    for losses in ("own", "released"):
        method = LAD(Teacher(paa(2)), student, losses=losses)
        terms.append(method.supervise(student, seen, method.teach(batch), batch).terms)
    assert terms[0].keys() == terms[1].keys()
    for name in terms[0]:
        assert torch.allclose(terms[0][name], terms[1][name]) == (name != "bbox_regression")


def test_labels_take_a_few_hundred_bytes_and_do_not_depend_on_the_student():
    teacher, batch = Teacher(paa(2)), tiny_batch(2)
    taught = [LAD(teacher, paa(seed)).teach(batch) for seed in (0, 1)]
    assert torch.equal(taught[0].labels.places, taught[1].labels.places)
    assert torch.equal(taught[0].labels.ground_truth, taught[1].labels.ground_truth)
    assert taught[0].prediction is None
    for piece in taught[0].split(2):
        assert len(encode(piece, "float16").data) < 2000


def test_labels_go_to_the_level_of_their_stride():
    batch = tiny_batch(2, size=192)
    student, teacher = paa(1, levels="4-5"), Teacher(paa(2))
    method = LAD(teacher, student)
    cells = method.teach(batch).labels
    prediction = student(batch).prediction
    assignment = cells.with_strides(student.spec.strides).on(prediction, batch)
    theirs = teacher.observe(batch, method.requirements.teacher).prediction
    whole = teacher.detector.assign(theirs, batch).matched
    for level in (0, 1):
        mine = assignment.matched[:, prediction.levels == level]
        assert torch.equal(mine, whole[:, theirs.levels == level + 1])
    assert (assignment.matched >= 0).any()
    with pytest.raises(PairError, match=r"lad: it compares predictions cell by cell, but the student .* has strides \(8, 16"):
        LAD(Teacher(paa(2, levels="4-5")), paa(1))


def test_classes_are_matched_by_name():
    batch, student = tiny_batch(2), paa(1)
    turned = paa(2, classes=("b", "a"))
    head = turned.model.head.classification_head.cls_logits
    for parameter in (head.weight, head.bias):
        parameter.data = parameter.data.flip(0)
    for form in ("lad", "solad"):
        values = []
        for teacher in (paa(2), turned):
            method = LAD(Teacher(teacher), student, form=form)
            values.append(method.step(student, batch, method.teach(batch), CLOCK).terms)
        assert all(torch.allclose(values[0][name], values[1][name], rtol=1e-5) for name in values[0])


def test_any_dense_pair_of_equal_cells():
    """RetinaNet: nine anchors of a cell; FCOS teaches PAA: points and anchors, one of a cell each."""
    batch = tiny_batch(2)
    for teacher, student in (("retinanet", "retinanet"), ("fcos", "paa"), ("paa", "fcos"), ("gfl", "atss")):
        for form in ("lad", "solad"):
            learner = paa(1, kind=student)
            method = LAD(Teacher(paa(2, kind=teacher)), learner, form=form)
            losses = method.step(learner, batch, method.teach(batch), CLOCK)
            assert all(bool(term.isfinite()) for term in losses.terms.values())
            losses.total().backward()
            assert ("lad_iou" in losses.terms) == (form == "solad" and {teacher, student} == {"fcos", "paa"})


def test_own_rule_with_static_labels_changes_nothing():
    batch, student = tiny_batch(2), paa(1, kind="atss")
    method = LAD(Teacher(paa(2, kind="atss")), student, rule="own")
    seen = student(batch)
    found = method.supervise(student, seen, method.teach(batch), batch).terms
    assert all(torch.equal(found[name], term) for name, term in student.loss(seen.prediction, batch).terms.items())


def test_an_image_in_a_batch_is_the_image_alone():
    """Padding, no boxes, one box over everything, boxes on the border: labels and soft terms of single images add up."""
    batch = without_boxes(tiny_batch(4), range(1))
    targets = list(batch.targets)
    targets[1] = replace(targets[1], boxes_xyxy=torch.tensor([[0.0, 0.0, 64.0, 48.0]]), labels=torch.tensor([1]))
    targets[1] = replace(targets[1], crowd=torch.tensor([False]))
    corner = torch.tensor([[60.0, 60.0, 64.0, 64.0], [0.0, 60.0, 0.0, 64.0]])
    targets[2] = Target(corner, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool))
    batch = batch.with_targets(targets)
    method = LAD(Teacher(TinyDense(seed=1)), TinyDense(seed=2), form="solad")
    whole = method.teach(batch).labels.split(4)
    for image, piece in enumerate(whole):
        method.teacher.forget()
        alone = method.teach(batch._on_canvas([image], batch.padding_hw)).labels
        count = alone.ground_truth.shape[1]
        assert torch.equal(piece.ground_truth[:, :count], alone.ground_truth)
        assert torch.equal(piece.places[:, :count], alone.places)
        assert bool((piece.ground_truth[:, count:] == NEGATIVE).all())
    assert bool((whole[0].ground_truth < 0).all())


def test_levels_of_one_cell_and_half_precision():
    student = TinyDense(seed=2, strides=(32, 64))
    method = LAD(Teacher(TinyDense(seed=1, strides=(32, 64))), student, form="solad")
    batch = tiny_batch(1)
    with torch.autocast("cpu", torch.bfloat16):
        losses = method.step(student, batch, method.teach(batch), CLOCK)
    losses.total().backward()
    assert all(term.dtype == torch.float32 and bool(term.isfinite()) for term in losses.terms.values())


def test_all_cells_ignored():
    batch, student = tiny_batch(2), TinyDense(seed=2)
    method = LAD(Teacher(TinyDense(seed=1)), student)
    method.teacher.detector.assign = lambda prediction, _: Assignment(torch.full(prediction.logits.shape[:2], IGNORED))
    method.rule = "own"
    losses = method.supervise(student, student(batch), method.teach(batch), batch)
    assert float(losses.total().detach()) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "hard"}, "form=hard is not one of lad, solad, soft"),
        ({"min_iou": 2.0}, "min_iou=2.0 is not a number from 0 to 1"),
        ({"switch": True, "form": "soft"}, "switch=true chooses between costs of labels; give form=lad or solad, and rule=paa"),
        ({"switch": True, "rule": "own"}, "switch=true chooses between costs of labels; give form=lad or solad, and rule=paa"),
        (
            {"form": "soft", "class_weight": 0.0, "box_weight": 0.0, "iou_weight": 0.0},
            "class_weight, box_weight, iou_weight are all 0",
        ),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(DetdistillError) as error:
        LAD(Teacher(TinyDense()), TinyDense(), **settings)
    assert str(error.value).startswith(f"lad: {message}")


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(PairError, match=r"lad: the teacher .* predicts regions; it needs a teacher that predicts dense"):
        LAD(Teacher(TinyRegions()), TinyDense())
    with pytest.raises(PairError, match=r"lad: .*the teacher does not know a; its classes: b, c"):
        LAD(Teacher(TinyDense(classes=("b", "c"))), TinyDense())
    with pytest.raises(PairError, match=r"lad: it compares predictions cell by cell, but the student .* \(9, 9, 9\) anchors"):
        LAD(Teacher(paa(kind="fcos")), paa(kind="retinanet"))
