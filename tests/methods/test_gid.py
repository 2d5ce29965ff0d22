import math
from dataclasses import replace

import pytest
import torch

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.assign import max_iou_assign, pairwise_iou
from detdistill.functional.regions import decode_boxes, pool_boxes
from detdistill.methods.gid import (
    GID,
    GIDInstances,
    _fraction_inside,
    gid_feature_loss,
    gid_instances,
    gid_relation_loss,
    gid_response_loss,
)
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Assignment, Clock, Dense, Features
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method, without_boxes
from tests.tiny import TinyDense, TinyRegions, tiny_batch

CLOCK = Clock(1, 10)

# --------------------------------------------------------------------------------------------------------- golden values


def golden_dense(golden, side, dtype):
    """The prediction of one side, its leaves of logits and deltas by level."""
    logits, deltas = ([level.to(dtype) for level in golden.levels(f"in_{name}_{side}")] for name in ("cls", "reg"))
    for leaf in (*logits, *deltas):
        leaf.requires_grad_(side == "student")
    anchors = golden.levels("in_anchors")
    priors = torch.cat(anchors).to(dtype).expand(len(logits[0]), -1, -1)
    together = torch.cat(deltas, dim=1)
    levels = torch.cat([torch.full((len(level),), index) for index, level in enumerate(anchors)])
    places = torch.arange(len(levels))
    boxes = decode_boxes(together, priors)
    cells = torch.stack([places, places], dim=1)
    return Dense(torch.cat(logits, dim=1), together, boxes, priors, levels, cells, places), logits, deltas


def golden_instances(golden, student, teacher):
    selection = golden.meta["gi"]
    return gid_instances(
        student,
        teacher.logits,
        teacher.boxes_xyxy,
        golden["in_image_sizes"],
        score="diff_of_max",
        count=selection["post_topk"],
        nms=selection["nms"],
        candidates=selection["pre_topk"],
        min_side=selection["min_side"],
    )


def golden_mask(golden, student, instances):
    matched = [
        max_iou_assign(priors, boxes, 0.5, 0.4, 1e-12)
        for priors, boxes in zip(student.priors_xyxy, instances.boxes_xyxy, strict=True)
    ]
    return torch.stack(matched) >= 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_instances_losses_and_gradients_equal_the_port(dtype):
    golden = Golden("gid")
    student, logits, deltas = golden_dense(golden, "student", dtype)
    teacher, _, _ = golden_dense(golden, "teacher", dtype)
    instances = golden_instances(golden, student, teacher)
    for image, boxes in enumerate(golden.levels("out_gi_boxes")):
        assert_golden(instances.boxes_xyxy[image], boxes.to(dtype))
        assert_golden(instances.scores[image], golden[f"out_gi_scores_{image}"].to(dtype))
    mask = golden_mask(golden, student, instances)
    assert torch.equal(mask, golden["out_response_mask"])
    maps = {side: [level.to(dtype) for level in golden.levels(f"in_{side}")] for side in ("student", "teacher")}
    for level in maps["student"]:
        level.requires_grad_()
    strides, roi = tuple(golden["in_strides"].tolist()), golden.meta["roi"]
    pooled = [
        pool_boxes(Features(tuple(maps[side]), strides), instances.boxes_xyxy, roi["size"], sampling_ratio=roi["sampling_ratio"])
        for side in ("student", "teacher")
    ]
    modes, weights = golden.meta["modes"], golden.meta["weights"]
    response = gid_response_loss(
        student.logits[mask],
        teacher.logits[mask],
        student.deltas[mask],
        teacher.deltas[mask],
        class_distance=modes["cls"].lower(),
        box_distance=modes["reg"].lower(),
        class_beta=modes.get("cls_beta", 0.0),
        box_beta=modes["reg_beta"],
    )
    terms = {
        "feature": weights["feature"] * gid_feature_loss(*pooled, modes["feature"].lower(), modes["feature_beta"]),
        "relation": weights["relation"] * gid_relation_loss(*pooled, modes["relation_beta"]),
        "cls_logits": weights["cls"] * response.classification,
        "reg_deltas": weights["reg"] * response.box,
    }
    for name, term in terms.items():
        assert_golden(term, golden[f"out_loss_distill_{name}"].to(dtype))
    total = sum(terms.values())
    assert_golden(total, golden["out_total"].to(dtype))
    total.backward()
    for leaves, name in ((maps["student"], ""), (logits, "_cls"), (deltas, "_reg")):
        for level, leaf in enumerate(leaves):
            expected = golden[f"grad_student{name}_{level}"].to(dtype)
            assert_golden(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf), expected)


# -------------------------------------------------------------------------------------------------------- pure functions


def test_instances_lie_in_their_image_are_large_and_far_from_each_other():
    golden = Golden("gid")
    student, _, _ = golden_dense(golden, "student", torch.float64)
    teacher, _, _ = golden_dense(golden, "teacher", torch.float64)
    sizes, selection = golden["in_image_sizes"], golden.meta["gi"]
    for score in ("max_abs_diff", "diff_of_max"):
        found = gid_instances(student, teacher.logits, teacher.boxes_xyxy, sizes, score=score, count=6)
        for boxes, scores, size in zip(found.boxes_xyxy, found.scores, sizes.tolist(), strict=True):
            assert 1 < len(boxes) <= 6
            assert bool((boxes >= 0).all())
            assert bool((boxes <= torch.tensor([size[1], size[0]] * 2)).all())
            assert bool(((boxes[:, 2:] - boxes[:, :2]) > selection["min_side"]).all())
            assert torch.equal(scores, scores.sort(descending=True).values)
            assert float(pairwise_iou(boxes, boxes).fill_diagonal_(0).max()) <= 0.3


def test_teacher_and_student_may_be_swapped():
    golden = Golden("gid")
    student, _, _ = golden_dense(golden, "student", torch.float64)
    teacher, _, _ = golden_dense(golden, "teacher", torch.float64)
    sizes = golden["in_image_sizes"]
    for score in ("max_abs_diff", "diff_of_max"):
        one = gid_instances(student, teacher.logits, teacher.boxes_xyxy, sizes, score=score)
        other = gid_instances(teacher, student.logits, student.boxes_xyxy, sizes, score=score)
        for mine, theirs in zip((*one.boxes_xyxy, *one.predictions), (*other.boxes_xyxy, *other.predictions), strict=True):
            assert torch.equal(mine, theirs)


def test_score_and_box_by_hand():
    """Two classes swap their scores: the paper's score sees that, the port's does not. A tie takes the student's box."""
    logits = torch.tensor([[[2.0, -2.0], [0.0, 0.0]]])
    other = torch.tensor([[[-2.0, 2.0], [1.0, 0.0]]])
    mine = torch.tensor([[[0.0, 0.0, 20.0, 20.0], [40.0, 40.0, 60.0, 60.0]]])
    zero = torch.zeros(2, dtype=torch.int64)
    student = Dense(logits, mine, mine, mine, zero, torch.zeros(2, 2, dtype=torch.int64), zero)
    sizes = torch.tensor([[64, 64]])
    paper = gid_instances(student, other, mine + 2, sizes)
    difference = torch.tensor([2.0]).sigmoid() - torch.tensor([-2.0]).sigmoid()
    torch.testing.assert_close(paper.scores[0], torch.cat([difference, torch.tensor([1.0]).sigmoid() - 0.5]))
    assert paper.boxes_xyxy[0].tolist() == [[0.0, 0.0, 20.0, 20.0], [42.0, 42.0, 62.0, 62.0]]
    port = gid_instances(student, other, mine + 2, sizes, score="diff_of_max")
    assert port.predictions[0].tolist() == [1, 0]
    assert float(port.scores[0][1]) == 0.0
    nobody = gid_instances(student, other, mine, sizes, torch.zeros(1, 2, dtype=torch.bool))
    assert [len(part[0]) for part in nobody] == [0, 0, 0]


def pooled(seed, count=5):
    return torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_relation_ignores_scale_and_offset():
    student, teacher = pooled(0), pooled(1)
    loss = float(gid_relation_loss(student, teacher))
    assert loss > 0
    assert float(gid_relation_loss(student * 7, teacher)) == pytest.approx(loss, rel=1e-9)
    assert float(gid_relation_loss(student + pooled(2, 1), teacher)) == pytest.approx(loss, rel=1e-9)
    assert float(gid_relation_loss(teacher * 3, teacher)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_instances_have_no_relation(count):
    student = pooled(0, count).requires_grad_()
    loss = gid_relation_loss(student, pooled(1, count)) + gid_feature_loss(student, pooled(0, count))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not student.grad.any()


def test_equal_instances_have_a_finite_gradient():
    student = torch.ones(4, 3, 2, 2, requires_grad=True)
    gid_relation_loss(student, torch.ones(4, 3, 2, 2)).backward()
    assert bool(student.grad.isfinite().all())


def test_feature_and_response_by_hand():
    ones = torch.ones(2, 3, 2, 2)
    assert float(gid_feature_loss(3 * ones, ones)) == pytest.approx(4 * 3)  # squares, summed over channels
    assert float(gid_feature_loss(3 * ones, ones, "l1")) == pytest.approx(2 * 3)
    zeros, boxes = torch.zeros(2, 2), torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 2)
    terms = gid_response_loss(zeros, zeros, boxes, boxes + 0.05)
    assert float(terms.classification) == pytest.approx(2 * math.log(2))
    assert float(terms.box) == pytest.approx(4 * 0.5 * 0.05**2 / 0.1, rel=1e-4)
    giou = gid_response_loss(zeros, zeros, boxes, boxes + 10.0, box_distance="giou", class_distance="l2")
    assert (float(giou.classification), float(giou.box)) == (0.0, pytest.approx(1 + 200 / 400))
    softmax = gid_response_loss(zeros, zeros, boxes, boxes, softmax=True)
    assert float(softmax.classification) == pytest.approx(math.log(2))
    none = gid_response_loss(zeros[:0], zeros[:0], boxes[:0], boxes[:0])
    assert (float(none.classification), float(none.box)) == (0.0, 0.0)


def test_fraction_inside_by_hand():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    inside = _fraction_inside(boxes, torch.tensor([[0.0, 0.0, 5.0, 100.0], [8.0, 0.0, 10.0, 10.0]]))
    torch.testing.assert_close(inside, torch.tensor([0.5, 0.0]))
    assert _fraction_inside(boxes, boxes[:0]).tolist() == [0.0, 0.0]


# --------------------------------------------------------------------------------------------------------------- method


def test_contract():
    dense, regions = (["{0} 8 -> {0} 8", "{0} 16 -> {0} 8"] for _ in range(2))
    expected = [name.format("dense") for name in dense] + [name.format("regions") for name in regions]
    assert check_method(GID) == expected


def learn(method, student, batch):
    return method.learn(student, student(batch).float(), method.teach(batch), batch, CLOCK)


def test_all_terms_are_zero_between_equal_networks():
    batch = tiny_batch(3)
    for kind in (TinyDense, TinyRegions):
        student = kind(seed=1).eval()
        losses = learn(GID(Teacher(kind(seed=1)), student, adapter="none", class_distance="l2"), student, batch)
        assert losses.terms.keys() == {"gid_feature", "gid_relation", "gid_class", "gid_box"}
        assert all(abs(float(term.detach())) < 1e-5 for term in losses.terms.values())


def test_gradients_reach_what_belongs_to_an_instance_and_nothing_else():
    student, batch = TinyDense(seed=1), tiny_batch(3)
    method = GID(Teacher(TinyDense(seed=2)), student)
    seen, asked = student(batch), []
    for tensor in (seen.prediction.logits, seen.prediction.deltas):
        tensor.retain_grad()
    own = student.assign

    def record(prediction, given):
        asked.append(given.targets)
        return own(prediction, given)

    student.assign = record
    method.learn(student, seen, method.teach(batch), batch, CLOCK).total().backward()
    belongs = own(seen.prediction, batch.with_targets(asked[0])).matched >= 0
    assert 0 < int(belongs.sum()) < belongs.numel()
    for tensor in (seen.prediction.logits, seen.prediction.deltas):
        assert not tensor.grad[~belongs].any()
        assert tensor.grad[belongs].any()
    assert all(bool(target.boxes_xyxy.requires_grad) is False for target in asked[0])
    assert all(parameter.grad is not None for parameter in method.adapters.parameters())


def test_ground_truth_does_not_count_but_for_the_kinds():
    student, batch = TinyDense(seed=1), tiny_batch(3)
    empty = without_boxes(batch, range(3))
    teacher = Teacher(TinyDense(seed=2))
    terms = [learn(GID(teacher, student, adapter="none"), student, one).total() for one in (batch, empty)]
    assert torch.equal(*terms)
    counts = {
        (kind, len(one.targets[0])): float(learn(GID(teacher, student, keep=kind), student, one).monitors["gid_instances"])
        for kind in ("all", "pos", "semi_pos", "neg")
        for one in (batch, empty)
    }
    boxes = len(batch.targets[0])
    assert counts["pos", 0] == counts["semi_pos", 0] == 0
    assert counts["neg", 0] == counts["all", 0] == counts["all", boxes] > 0
    assert sum(counts[kind, boxes] for kind in ("pos", "semi_pos", "neg")) <= counts["all", boxes]


def test_an_image_in_a_batch_has_the_instances_of_the_image_alone():
    student, teacher, batch = TinyDense(seed=1), TinyDense(seed=2), tiny_batch(2)

    def instances(one):
        mine, theirs = student(one).prediction, teacher(one).prediction
        return gid_instances(mine, theirs.logits, theirs.boxes_xyxy, one.sizes)

    whole = instances(batch)
    for image in range(2):
        alone = instances(batch._on_canvas([image], batch.padding_hw))
        torch.testing.assert_close(alone.boxes_xyxy[0], whole.boxes_xyxy[image])


def test_classes_are_matched_by_name():
    student, batch = TinyDense(seed=1), tiny_batch(2)
    turned = TinyDense(classes=("b", "a"), seed=2)
    for parameter in turned.head.logits.parameters():
        parameter.data = parameter.data.flip(0)
    values = []
    for teacher in (TinyDense(seed=2), turned):
        values.append(learn(GID(Teacher(teacher), student, adapter="none"), student, batch).total())
    torch.testing.assert_close(values[0], values[1])


def test_fewer_levels_one_cell_one_image_and_nothing_large_enough():
    batch = tiny_batch(1)
    student = TinyDense(seed=1, strides=(32, 64))
    for settings in ({}, {"levels": [1]}, {"min_side": 1000.0}):
        method = GID(Teacher(TinyDense(seed=2, strides=(32, 64))), student, **settings)
        losses = learn(method, student, batch)
        losses.total().backward()
        assert all(bool(term.isfinite()) for term in losses.terms.values())
    assert float(losses.total().detach()) == float(losses.monitors["gid_instances"]) == 0
    with pytest.raises(PairError, match=r"gid: it compares predictions cell by cell, .*\(32, 64\)"):
        GID(Teacher(TinyDense(channels=(8,), strides=(32,))), student)


def test_all_cells_ignored():
    student, batch = TinyDense(seed=1), tiny_batch(2)
    student.assign = lambda prediction, _: Assignment(torch.full(prediction.logits.shape[:2], -2))
    losses = learn(GID(Teacher(TinyDense(seed=2)), student), student, batch)
    assert float(losses.terms["gid_class"].detach()) == float(losses.terms["gid_box"].detach()) == 0
    assert float(losses.terms["gid_feature"].detach()) > 0


OPTIONS = "resnet10t,channels=8-16-32-64,stem=8,neck=32,levels=3-5,convs=1"


@pytest.mark.parametrize(
    ("teacher", "student", "settings"),
    [
        ("retinanet", "retinanet", {}),
        ("gfl", "gfl", {}),
        ("gfl", "fcos", {"box_distance": "giou"}),
        ("reppoints", "paa", {"box_distance": "giou"}),
    ],
)
def test_dense_pairs(teacher, student, settings):
    batch = tiny_batch(2)
    torch.manual_seed(0)
    frozen, learner = (build_detector(f"{kind}:{OPTIONS}", ("a", "b")) for kind in (teacher, student))
    losses = GID(Teacher(frozen), learner, **settings).step(
        learner, batch, GID(Teacher(frozen), learner, **settings).teach(batch), CLOCK
    )
    losses.total().backward()
    assert all(bool(term.isfinite()) for term in losses.terms.values())


def test_two_stage_pair():
    batch = tiny_batch(2)
    torch.manual_seed(0)
    options = "resnet10t,channels=8-16-32-64,stem=8,neck=32,mlp=16,proposals=10,rois=8"
    frozen, learner = (build_detector(f"faster_rcnn:{options}", ("a", "b")) for _ in range(2))
    method = GID(Teacher(frozen), learner.train())
    taught = method.teach(batch)
    assert taught.prediction.logits.shape[-1] == 1  # objectness
    losses = method.step(learner, batch, taught, CLOCK)
    losses.total().backward()
    assert all(bool(term.isfinite()) for term in losses.terms.values())
    assert float(losses.monitors["gid_instances"]) > 0


def test_half_precision_is_finite():
    student, batch = TinyDense(seed=1), tiny_batch(2)
    method = GID(Teacher(TinyDense(seed=2)), student)
    with torch.autocast("cpu", torch.bfloat16):
        losses = method.step(student, batch, method.teach(batch), CLOCK)
    assert all(term.dtype == torch.float32 and bool(term.isfinite()) for term in losses.terms.values())


def test_diverged_predictions_are_no_instances():
    student, batch = TinyDense(seed=1), tiny_batch(2)
    mine, theirs = student(batch).prediction, TinyDense(seed=2)(batch).prediction
    broken = replace(mine, logits=torch.full_like(mine.logits, torch.nan))
    found = gid_instances(broken, theirs.logits, theirs.boxes_xyxy, batch.sizes)
    assert isinstance(found, GIDInstances)
    assert all(len(boxes) == 0 for boxes in found.boxes_xyxy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "max"}, "score=max is not one of max_abs_diff, diff_of_max"),
        ({"instances": 0}, "instances=0 is not a whole number, 1 or more"),
        ({"nms": 1.5}, "nms=1.5 is not a number from 0 to 1"),
        ({"relation_beta": 0.0}, "relation_beta=0.0 is not a number above 0"),
        (
            {"feature_weight": 0.0, "relation_weight": 0.0, "class_weight": 0.0, "box_weight": 0.0},
            "feature_weight, relation_weight, class_weight, box_weight are all 0",
        ),
        ({"levels": [5]}, "levels=[5]: student level 5 has no partner; levels with one: [0, 1] (strides [8, 16])"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(DetdistillError) as error:
        GID(Teacher(TinyDense()), TinyDense(), **settings)
    assert str(error.value).startswith(f"gid: {message}")


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(PairError, match=r"gid: .*does not know a; its classes: b, c"):
        GID(Teacher(TinyDense(classes=("b", "c"))), TinyDense())
    with pytest.raises(PairError, match="gid: adapter=none needs equal channels, but the student has 8, the teacher 16"):
        GID(Teacher(TinyDense(channels=(16, 16))), TinyDense(), adapter="none")
    torch.manual_seed(0)
    gfl, fcos = (build_detector(f"{kind}:{OPTIONS}", ("a", "b")) for kind in ("gfl", "fcos"))
    with pytest.raises(PairError, match=r"has 0 bins of a side, the teacher .* 17; use box_distance=giou"):
        GID(Teacher(gfl), fcos)
    points, batch = build_detector(f"reppoints:{OPTIONS}", ("a", "b")), tiny_batch(1)
    refusal = r"the student fcos:\S+ encodes a box by 4 numbers, the teacher reppoints:\S+ by 18; use box_distance=giou"
    with pytest.raises(PairError, match=refusal):
        GID(Teacher(points), fcos)
    GID(Teacher(points), fcos, class_weight=0.0, box_weight=0.0)
    points.spec = replace(points.spec, coding=None)  # as in a cache of an earlier version: only the prediction shows it
    with pytest.raises(PairError, match=refusal):
        learn(GID(Teacher(points), fcos), fcos, batch)
    sigmoid = TinyRegions()
    sigmoid.spec = replace(sigmoid.spec, softmax=False)
    with pytest.raises(PairError, match=r"predicts dense, the teacher .* regions; take two detectors of one family"):
        GID(Teacher(sigmoid), TinyDense())
