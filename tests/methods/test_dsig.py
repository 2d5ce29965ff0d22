import math
from dataclasses import replace

import pytest
import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.regions import pool_boxes
from detdistill.functional.relations import cosine_gram
from detdistill.losses import (
    dsig_box_loss,
    dsig_class_loss,
    dsig_edge_loss,
    dsig_feature_loss,
    dsig_mine,
    dsig_node_losses,
)
from detdistill.methods.dsig.method import DSIG
from detdistill.methods.odkd import ODKD
from detdistill.methods.shared.contract import Composition
from detdistill.methods.shared.needs import PairError
from detdistill.methods.shared.regions import of_class
from detdistill.structures import Clock, Features
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method, without_boxes
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

CLOCK = Clock(5, 10)
TINY = "resnet10t,channels=8-16-32-64,stem=8,neck=16,mlp=16,proposals=20,rois=16"


# ------------------------------------------------------------------------------------------------ against released code


def released(golden):
    """Boxes of each image (foreground first), and the index of the image and the foreground of all rows."""
    images = len(golden["in_student_0"])
    boxes = [torch.cat([golden[f"in_{kind}_boxes_{image}"].reshape(-1, 4) for kind in ("fg", "bg")]) for image in range(images)]
    fronts = [len(golden[f"in_fg_boxes_{image}"]) for image in range(images)]
    image = torch.cat([torch.full((len(given),), index) for index, given in enumerate(boxes)])
    foreground = torch.cat([torch.arange(len(given)) < front for given, front in zip(boxes, fronts, strict=True)])
    return boxes, image, foreground


def test_values_and_gradients_equal_the_released_code():
    golden = Golden("dsig")
    meta = golden.meta
    boxes, image, foreground = released(golden)
    student = [level.requires_grad_() for level in golden.levels("in_student")]
    teacher, strides = golden.levels("in_teacher"), tuple(golden["in_strides"].tolist())
    mine, theirs = (pool_boxes(Features(tuple(maps[:4]), strides[:4]), boxes, meta["roi_size"]) for maps in (student, teacher))
    heads = {
        f"{side}_{kind}": rows.flatten(1) @ golden[f"param_{side}_{kind}"]
        for side, rows in (("student", mine), ("teacher", theirs))
        for kind in ("cls", "reg")
    }
    heads["teacher_cls"] = heads["teacher_cls"] + golden["param_teacher_cls_bias"]
    mined = dsig_mine(heads["teacher_cls"], ~foreground, meta["mining_threshold"])
    for index in range(len(boxes)):
        if f"out_mined_bg_index_{index}" in golden:
            front = len(golden[f"in_fg_boxes_{index}"])
            found = torch.nonzero(mined[image == index]).flatten() - front
            assert torch.equal(found, golden[f"out_mined_bg_index_{index}"].reshape(-1))
    labels = torch.cat([golden[f"in_fg_labels_{index}"].reshape(-1) for index in range(len(boxes))])
    deltas = [of_class(heads[f"{side}_reg"].unflatten(1, (-1, 4))[foreground], labels) for side in ("student", "teacher")]
    weights = meta["weights"]
    nodes = dsig_node_losses(mine, theirs, image, foreground, ~foreground, meta["bg_alpha"])
    logits = heads["student_cls"], heads["teacher_cls"]
    terms = {
        "d_f": weights["feature"] * dsig_feature_loss(student, teacher),
        "roipool_fg": weights["node_fg"] * nodes.foreground,
        "roipool_bg": weights["node_bg"] * nodes.background,
        "region_corr_loss_pool": weights["edge"] * dsig_edge_loss(mine, theirs, image, foreground | mined),
        "d_roi_cls": weights["roi_cls"] * dsig_class_loss(*logits, meta["temperature"]),
        "d_roi_reg": weights["roi_reg"] * dsig_box_loss(*deltas, len(image), meta["smooth_l1_beta"]),
    }
    for name, value in terms.items():
        if f"out_loss_{name}" in golden:
            assert_golden(value, golden[f"out_loss_{name}"])
    total = torch.stack(list(terms.values())).sum()
    assert_golden(total, golden["out_total"])
    total.backward()
    for level, expected in zip(student, golden.levels("grad_student"), strict=True):
        assert_golden(level.grad, expected)


# ------------------------------------------------------------------------------------------------------- invariants


def rows(seed, count=7):
    return torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGE = torch.tensor([0, 0, 0, 0, 1, 1, 2])
FRONT = torch.tensor([True, True, False, False, False, False, True])


def test_nodes_are_means_of_an_image_added_over_images():
    student, teacher = rows(0), rows(1)
    squares = (student - teacher).square().flatten(1).mean(dim=1)
    found = dsig_node_losses(student, teacher, IMAGE, FRONT, ~FRONT, 3.0)
    assert float(found.foreground) == pytest.approx(float(squares[:2].mean() + squares[6]), rel=1e-12)
    # image 0 has as many of both, image 1 no foreground, image 2 no background
    assert float(found.background) == pytest.approx(3 * float(squares[2:4].mean()), rel=1e-12)
    doubled = dsig_node_losses(student, teacher, IMAGE, FRONT, ~FRONT, 6.0)
    assert float(doubled.background) == pytest.approx(2 * float(found.background), rel=1e-12)
    assert doubled.foreground == found.foreground
    neither = dsig_node_losses(student, teacher, IMAGE, FRONT, torch.zeros_like(FRONT))
    assert float(neither.background) == 0.0


def test_edges_ignore_the_length_of_a_node_and_nodes_do_not():
    student, teacher = rows(0), rows(1)
    every = torch.ones_like(FRONT)
    expected = float(dsig_edge_loss(student, teacher, IMAGE, every))
    assert float(dsig_edge_loss(5 * student, teacher, IMAGE, every)) == pytest.approx(expected, rel=1e-12)
    assert dsig_node_losses(5 * student, teacher, IMAGE, FRONT, ~FRONT) != dsig_node_losses(
        student, teacher, IMAGE, FRONT, ~FRONT
    )
    edges = cosine_gram(student.flatten(1))
    torch.testing.assert_close(edges, edges.T)
    torch.testing.assert_close(edges.diagonal(), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-6)
    assert float(edges.abs().max()) <= 1 + 1e-12
    by_hand = 0.0
    for image in range(3):
        grams = [cosine_gram(side[image == IMAGE].flatten(1)) for side in (student, teacher)]
        by_hand += 0.5 * float((grams[0] - grams[1]).square().mean())
    assert expected == pytest.approx(by_hand, rel=1e-12)


def test_mined_are_the_background_regions_that_the_teacher_does_not_recognise():
    logits = torch.tensor([[0.0, 3.0], [3.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
    background = torch.tensor([True, True, True, False])
    assert dsig_mine(logits, background).tolist() == [False, True, True, False]  # log 2 is 0.69
    assert dsig_mine(logits, background, 0.7).tolist() == [False, True, False, False]
    assert torch.equal(dsig_mine(logits, background, 0.0), background)
    assert not dsig_mine(logits, background, 1e9).any()


def test_equal_sides_lose_nothing():
    student = rows(0).requires_grad_()
    logits, deltas = torch.randn(7, 3), torch.randn(4, 4)
    losses = [
        *dsig_node_losses(student, student, IMAGE, FRONT, ~FRONT),
        dsig_edge_loss(student, student, IMAGE, FRONT),
        dsig_feature_loss([student], [student]),
        dsig_class_loss(logits, logits, 2.0),
        dsig_box_loss(deltas, deltas, 7),
    ]
    assert [float(loss.detach()) for loss in losses] == [0.0] * 6


def test_predictions_by_hand():
    logits, fixed = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[math.log(4.0), 0.0], [1.0, 0.0]])
    divergence = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert float(dsig_class_loss(logits, fixed)) == pytest.approx(divergence / 4, rel=1e-5)  # the mean over 2 x 2 entries
    assert float(dsig_class_loss(logits * 2, fixed * 2, 2.0)) == pytest.approx(divergence, rel=1e-5)
    deltas = torch.tensor([[1.0, -2.0, 0.0, 0.5]])
    assert float(dsig_box_loss(deltas, torch.zeros(1, 4), 7)) == pytest.approx(3.5 / 7)
    assert float(dsig_box_loss(deltas, torch.zeros(1, 4), 7, beta=1.0)) == pytest.approx((0.5 + 1.5 + 0.125) / 7)


def test_no_regions_are_zero_and_connected_and_no_gradient_reaches_the_teacher():
    student, teacher = rows(0).requires_grad_(), rows(1).requires_grad_()
    nobody = torch.zeros_like(FRONT)
    logits, deltas = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
    for image, front in ((IMAGE, nobody), (IMAGE[:0], FRONT[:0])):
        sides = student[: len(image)], teacher[: len(image)]
        nodes = dsig_node_losses(*sides, image, front, front)
        total = sum(nodes) + dsig_edge_loss(*sides, image, front) + dsig_class_loss(logits, logits.detach())
        total = total + dsig_box_loss(deltas, deltas.detach(), 0)
        total.backward()
        assert float(total.detach()) == 0.0
        assert not student.grad.any()
    (sum(dsig_node_losses(student, teacher, IMAGE, FRONT, ~FRONT)) + dsig_edge_loss(student, teacher, IMAGE, FRONT)).backward()
    assert student.grad.any()
    assert teacher.grad is None


# ---------------------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, ["regions 8 -> regions 8"]),
        ({"first_class_weight": 1.0, "first_box_weight": 1.0, "beta": 0.5, "mine_threshold": None}, ["regions 8 -> regions 8"]),
        (
            {"class_weight": 0.0, "box_weight": 0.0, "mine_threshold": 0.0},
            ["dense 8 -> regions 8", "regions 8 -> regions 8", "queries 8 -> regions 8"],
        ),
        ({"profile": "one_stage", "size": 2, "max_regions": 5}, ["dense 8 -> dense 8"]),
    ],
)
def test_contract(settings, wanted):
    assert check_method(DSIG, **settings) == wanted


def build(student=None, teacher=None, **settings):
    student = student or TinyRegions(seed=2)
    return student, DSIG(Teacher(teacher or TinyRegions(seed=1)), student, **settings)


def learn(batch, student=None, teacher=None, **settings):
    student, method = build(student, teacher, **settings)
    return method.learn(student, student(batch), method.teach(batch), batch, CLOCK)


def test_an_equal_teacher_teaches_nothing():
    batch = tiny_batch(3)
    losses = learn(batch, TinyRegions(seed=1), first_class_weight=1.0, first_box_weight=1.0)
    assert len(losses.terms) == 8
    assert all(float(term.detach()) == pytest.approx(0.0, abs=1e-12) for term in losses.terms.values())
    dense = learn(batch, TinyDense(seed=1), TinyDense(seed=1), profile="one_stage")
    assert list(dense.terms) == ["dsig_foreground", "dsig_edges", "dsig_class", "dsig_box", "dsig_features"]
    assert all(float(term.detach()) == pytest.approx(0.0, abs=1e-12) for term in dense.terms.values())


def test_regions_are_pooled_once_by_both_detectors():
    student, method = build()
    batch = tiny_batch(3)
    seen, taught = student(batch), method.teach(batch)
    terms = method.learn(student, seen, taught, batch, CLOCK).terms
    mine = seen.prediction
    theirs = method.teacher.predict_regions(mine, taught.features, batch)
    front = student.assign(mine, batch).matched >= 0
    expected = dsig_node_losses(mine.pooled, theirs.pooled, mine.origin.image, front, ~front)
    torch.testing.assert_close(terms["dsig_foreground"], 0.5 * expected.foreground)
    torch.testing.assert_close(terms["dsig_background"], 0.5 * expected.background)
    nodes = front | dsig_mine(theirs.logits, ~front)
    edges = dsig_edge_loss(mine.pooled, theirs.pooled, mine.origin.image, nodes)
    torch.testing.assert_close(terms["dsig_edges"], 2 * edges)
    torch.testing.assert_close(terms["dsig_class"], 3 * dsig_class_loss(mine.logits, theirs.logits))
    together = Composition([method, ODKD(method.teacher, student)], student)
    runs, regions = [], method.teacher.detector.regions
    method.teacher.detector.regions = lambda *given: runs.append(1) or regions(*given)
    together.step(student, batch, together.teach(batch), CLOCK)
    assert len(runs) == 1


def test_the_own_pooling_keeps_the_order_of_the_regions():
    student, method = build(class_weight=0.0, box_weight=0.0, mine_threshold=0.0)
    batch = tiny_batch(3)
    seen, taught = student(batch), method.teach(batch)
    expected = method.learn(student, seen, taught, batch, CLOCK).terms
    order = torch.randperm(len(seen.prediction.boxes_xyxy), generator=torch.Generator().manual_seed(0))
    mixed = replace(seen, prediction=seen.prediction.rows(order))
    for name, term in method.learn(student, mixed, taught, batch, CLOCK).terms.items():
        torch.testing.assert_close(term, expected[name])


def test_images_without_objects_have_mined_nodes_only():
    batch = tiny_batch(3)
    terms = learn(without_boxes(batch, range(3))).terms
    assert float(terms["dsig_foreground"].detach()) == 0.0
    assert float(terms["dsig_background"].detach()) == 0.0
    assert float(terms["dsig_box"].detach()) == 0.0
    assert all(float(terms[name].detach()) > 0 for name in ("dsig_edges", "dsig_class", "dsig_features"))


def test_nodes_and_edges_are_added_over_images():
    """The batch's value is the sum of the values of its images alone; the last image fills the batch, the first has a border."""
    batch = tiny_batch(2)
    boxes = torch.tensor([[0.0, 0.0, 64.0, 48.0], [5.0, 5.0, 30.0, 30.0]])
    targets = [replace(batch.targets[0], boxes_xyxy=boxes, labels=torch.tensor([0, 1]), crowd=torch.zeros(2).bool())] * 2
    batch = batch.with_targets(targets)
    student, method = build()

    def nodes_and_edges(given):
        terms = method.learn(student, student(given), method.teach(given), given, CLOCK).terms
        return sum(float(terms[f"dsig_{name}"].detach()) for name in ("foreground", "background", "edges"))

    alone = [nodes_and_edges(batch._on_canvas([image], (64, 64))) for image in range(2)]
    assert nodes_and_edges(batch) == pytest.approx(sum(alone), rel=1e-5)


def test_the_pooled_levels_of_two_stage_detectors_end_at_p5():
    student, method = build()
    batch = tiny_batch(2)
    losses = method.learn(student, student(batch), method.teach(batch), batch, CLOCK)
    losses.total().backward()
    assert student.logits.weight.grad is not None
    assert student.deltas.weight.grad is not None
    assert all(p.grad is None for p in student.rpn.parameters())


def test_no_region_survives():
    batch = tiny_batch(2)
    for student, teacher, settings in (
        (TinyDense(seed=2), TinyDense(seed=1), {"profile": "one_stage"}),
        (TinyRegions(seed=2), TinyRegions(seed=1), {}),
    ):
        student, method = build(student, teacher, **settings)
        seen, taught = student(batch), method.teach(batch)
        if settings:
            flat = seen.prediction.boxes_xyxy[..., [0, 1, 0, 1]]
            prediction = replace(seen.prediction, boxes_xyxy=flat)
        else:
            prediction = seen.prediction.rows(torch.arange(0))
        losses = method.learn(student, replace(seen, prediction=prediction), taught, batch, CLOCK)
        losses.total().backward()
        assert math.isfinite(float(losses.total().detach()))
        assert float(losses.terms["dsig_foreground"].detach()) == 0.0
        assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_classes_are_matched_by_name():
    batch = tiny_batch(3)
    student, method = build(teacher=TinyRegions(classes=("b", "c", "a"), seed=1), temperature=2.0)
    seen, taught = student(batch), method.teach(batch)
    terms = method.learn(student, seen, taught, batch, CLOCK).terms
    theirs = method.teacher.predict_regions(seen.prediction, taught.features, batch)
    expected = dsig_class_loss(seen.prediction.logits, theirs.logits[:, [2, 0, 3]], 2.0)
    torch.testing.assert_close(terms["dsig_class"], 3 * expected)
    positives = student.positives(seen.prediction, student.assign(seen.prediction, batch), batch)
    mine = of_class(seen.prediction.deltas[positives.index], positives.labels)
    fixed = of_class(theirs.deltas[positives.index], torch.tensor([2, 0])[positives.labels])
    torch.testing.assert_close(terms["dsig_box"], (mine - fixed).abs().sum() / len(seen.prediction.logits))


def test_every_pair_of_two_stage_detectors_learns():
    batch, names = tiny_batch(2), ("faster_rcnn", "cascade_rcnn")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teachers = [Teacher(build_detector(f"{name}:{TINY}", ["b", "c", "a"])) for name in names]
        students = [build_detector(f"{name}:{TINY}", ["a", "b"]) for name in names]
        for teacher in teachers:
            for student in students:
                method = DSIG(teacher, student.train(), first_class_weight=1.0)
                losses = method.step(student, batch, method.teach(batch), CLOCK)
                assert math.isfinite(float(losses.total().detach()))
                assert len(losses.distilled) == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile": "dense"}, "profile=dense is not one of two_stage, one_stage"),
        ({"alpha": -1.0}, "alpha=-1.0 is not a number, 0 or more"),
        ({"mine_threshold": -0.5}, "mine_threshold=-0.5 is not a number, 0 or more, or none"),
        ({"temperature": 0.0}, "temperature=0.0 is not a number above 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(DetdistillError) as error:
        build(**settings)
    assert str(error.value) == f"dsig: {message}"


def test_refused_pairs_are_told_why():
    binned, coarse = TinyDense(seed=1), TinyDense(seed=1)
    binned.spec = replace(binned.spec, box_bins=17)
    coarse.spec = replace(coarse.spec, classes=("a",))
    one = {"profile": "one_stage"}
    refused = [
        ({"teacher": TinyRegions(channels=(16, 16))}, "dsig: it has no adapter, but the student tinyregions:patches has (8, 8)"),
        ({"teacher": TinyRegions(classes=("a",))}, "dsig: it compares class scores, but the teacher does not know b"),
        ({"student": TinyDense()}, "the student tinydense:patches predicts dense; it needs a student that predicts regions"),
        ({"teacher": TinyQueries()}, "the teacher tinyqueries:patches predicts queries; it needs a teacher that predicts"),
        ({"student": TinyDense(), "teacher": binned, **one}, "set dsig,profile=one_stage,box_weight=0"),
        ({"student": coarse, "teacher": TinyDense(), **one}, "set dsig,profile=one_stage,class_weight=0"),
    ]
    for settings, message in refused:
        with pytest.raises(PairError) as error:
            build(**settings)
        assert message in str(error.value)
    with pytest.raises(DetdistillError, match="background_weight means nothing to profile=one_stage; leave it out"):
        build(TinyDense(), TinyDense(), background_weight=1.0, **one)
