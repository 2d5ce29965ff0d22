import copy
from dataclasses import replace

import pytest
import torch

from detdistill.cache.absent_teacher import AbsentTeacher
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.functional.counting import number_of_positives
from detdistill.functional.focal import distribution_mean
from detdistill.losses import bckd_box_loss, bckd_class_loss, bckd_weights
from detdistill.methods.bckd import BCKD
from detdistill.methods.shared.contract import teach_by_canvas
from detdistill.methods.shared.hyper_parameters import MethodError
from detdistill.methods.shared.needs import PairError
from detdistill.structures import IGNORED, NEGATIVE, Assignment, Clock, Target
from tests.detectors.dense.own import CLASSES
from tests.detectors.dense.shared import unequal_batch
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

# ---------------------------------------------------------------------------------------------------------- the numbers


def flat(maps):
    """[B, P, R] of one level's map [B, R, H, W]."""
    return maps.flatten(2).transpose(1, 2)


def released_boxes(sides, anchors, stride, bins):
    """Boxes of GFL's distributions, in strides."""
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2 / stride
    distances = distribution_mean(sides, bins)
    return torch.cat([centers - distances[..., :2], centers + distances[..., 2:]], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_the_released_code(dtype):
    golden = Golden("bckd")
    meta, strides = golden.meta, golden["in_strides"].tolist()
    leaves = {
        (side, kind): [level.to(dtype).requires_grad_(side == "student") for level in golden.levels(f"in_{kind}_{side}")]
        for side in ("student", "teacher")
        for kind in ("cls", "reg")
    }
    labels, given = golden.levels("out_assigned_labels"), golden.levels("out_label_weights")
    matched = torch.cat(labels, dim=1).apply_(lambda label: 0 if 0 <= label < meta["num_classes"] else NEGATIVE)
    assignment = Assignment(matched.masked_fill(torch.cat(given, dim=1) == 0, IGNORED))
    levels = torch.cat([torch.full((label.shape[1],), level) for level, label in enumerate(labels)])
    like = torch.ones((), dtype=dtype)
    weights = bckd_weights(assignment, levels, like, "skip")
    normalizer = number_of_positives(assignment, like)
    assert int(normalizer) == int(golden["out_num_pos"])
    totals = []
    for level, anchors in enumerate(golden.levels("out_anchors")):
        logits, boxes = {}, {}
        for side in ("student", "teacher"):
            logits[side] = flat(leaves[side, "cls"][level])
            sides = flat(leaves[side, "reg"][level])
            boxes[side] = released_boxes(sides, anchors.to(dtype), strides[level], meta["reg_max"] + 1)
        mine = weights[:, levels == level]
        pair = logits["student"], logits["teacher"]
        terms = {
            "cls": bckd_class_loss(*pair, mine, normalizer, meta["beta"]),
            "loc": bckd_box_loss(boxes["student"], boxes["teacher"], *pair, mine, normalizer),
        }
        for name, term in terms.items():
            totals.append(meta["loss_weights"][f"{name}_kd"] * term)
            assert_golden(totals[-1].to(dtype), golden[f"out_loss_{name}_kd_{level}"].to(dtype))
    total = torch.stack(totals).sum()
    assert_golden(total, golden["out_total"].to(dtype))
    total.backward()
    for kind in ("cls", "reg"):
        for level, expected in zip(leaves["student", kind], golden.levels(f"grad_student_{kind}"), strict=True):
            assert_golden(level.grad, expected.to(dtype))


# ------------------------------------------------------------------------------------------------------- the functions


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def boxes_of(seed, *shape):
    corner = random(seed, *shape, 2) * 5
    return torch.cat([corner, corner + random(seed + 50, *shape, 2).exp()], dim=-1)


def test_equal_sides_give_exactly_zero():
    logits, boxes, weights = random(0, 2, 7, 3), boxes_of(1, 2, 7), torch.ones(2, 7, dtype=torch.float64)
    assert float(bckd_class_loss(logits, logits, weights, 3.0)) == 0
    assert float(bckd_box_loss(boxes, boxes_of(9, 2, 7), logits, logits, weights, 3.0)) == 0


def test_a_shift_of_all_logits_is_seen():
    logits, weights = random(0, 2, 7, 3), torch.ones(2, 7, dtype=torch.float64)
    assert float(bckd_class_loss(logits + 0.5, logits, weights, 1.0)) > 0.1


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("overlap", ["giou", "iou"])
def test_values_equal_a_loop_over_locations(beta, overlap):
    logits, fixed = random(0, 5, 3), random(1, 5, 3)
    boxes, targets = boxes_of(2, 5), boxes_of(3, 5)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0], dtype=torch.float64)
    classes = places = 0.0
    for p in range(5):
        gaps = []
        for c in range(3):
            s, t = (1 / (1 + (-value[p, c]).exp()) for value in (logits, fixed))
            gaps.append(float((t - s).abs()))
            classes += float(weights[p] * (t - s).abs() ** beta * -(t * s.log() + (1 - t) * (1 - s).log()))
        a, b = boxes[p], targets[p]
        shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
        hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
        similarity = shared / union - ((hull - union) / hull if overlap == "giou" else 0)
        places += float(weights[p] * max(gaps) * (1 - similarity))
    assert float(bckd_class_loss(logits, fixed, weights, 2.0, beta)) == pytest.approx(classes / 2, rel=1e-12)
    found = bckd_box_loss(boxes, targets, logits, fixed, weights, 2.0, overlap)
    assert float(found) == pytest.approx(places / 2, rel=1e-12)


def test_each_term_reaches_only_its_own_output():
    logits, fixed = random(0, 2, 5, 3).requires_grad_(), random(1, 2, 5, 3).requires_grad_()
    boxes, targets = boxes_of(2, 2, 5).requires_grad_(), boxes_of(3, 2, 5).requires_grad_()
    weights = torch.ones(2, 5, dtype=torch.float64)
    weights[0, 2] = 0
    bckd_box_loss(boxes, targets, logits, fixed, weights, 2.0).backward()
    assert logits.grad is None
    assert fixed.grad is None
    assert targets.grad is None
    assert not boxes.grad[0, 2].any()
    bckd_class_loss(logits, fixed, weights, 2.0).backward()
    assert not logits.grad[0, 2].any()
    assert bool((logits.grad.abs().sum(dim=-1) > 0).sum() == 9)
    assert fixed.grad is None


def test_half_precision_boxes_and_extreme_logits_are_finite():
    logits = torch.tensor([[60.0, -60.0]], requires_grad=True)
    boxes = torch.tensor([[0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    total = bckd_class_loss(logits, -logits, torch.ones(1), 1.0)
    total = total + bckd_box_loss(boxes, torch.tensor([[0.0, 0.0, 1333.0, 800.0]]).half(), logits, -logits, torch.ones(1), 1.0)
    total.backward()
    assert bool(torch.isfinite(total))
    assert bool(torch.isfinite(logits.grad).all() & torch.isfinite(boxes.grad).all())


def test_levels_without_positives_count_only_with_all():
    assignment = Assignment(torch.tensor([[NEGATIVE, 1, NEGATIVE, NEGATIVE], [NEGATIVE, NEGATIVE, NEGATIVE, IGNORED]]))
    levels = torch.tensor([0, 0, 1, 1])
    assert bckd_weights(assignment, levels, torch.ones(())).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert bckd_weights(assignment, levels, torch.ones(()), "all").tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    nothing = Assignment(torch.full((2, 4), NEGATIVE))
    assert not bckd_weights(nothing, levels, torch.ones(())).any()


# ---------------------------------------------------------------------------------------------------------- the method


def learned(student, teacher, batch, **settings):
    method = BCKD(Teacher(teacher), student, **settings)
    return method.learn(student, student(batch), teach_by_canvas(method, batch), batch, Clock(1, 10)).terms


def test_terms_are_those_of_the_functions():
    student, teacher, batch = TinyDense(seed=1), TinyDense(seed=2), tiny_batch(3)
    mine, theirs = student(batch).prediction, teacher(batch).prediction
    assignment = student.assign(mine, batch)
    weights, normalizer = bckd_weights(assignment, mine.levels, mine.logits), number_of_positives(assignment, mine.logits)
    pair = mine.logits, theirs.logits
    expected = [
        bckd_class_loss(*pair, weights, normalizer).item(),
        4 * bckd_box_loss(mine.boxes_xyxy, theirs.boxes_xyxy, *pair, weights, normalizer).item(),
    ]
    terms = learned(student, teacher, batch)
    assert [terms[name].item() for name in ("bckd_cls", "bckd_box")] == pytest.approx(expected, rel=1e-6)
    assert learned(student, teacher, batch, box_weight=0).keys() == {"bckd_cls"}
    doubled = learned(student, teacher, batch, cls_weight=2, box_weight=8)
    assert [doubled[name].item() for name in terms] == pytest.approx([2 * value for value in expected], rel=1e-6)


def test_classes_are_matched_by_name():
    student, batch = TinyDense(classes=("a", "b"), seed=1), tiny_batch()
    teacher = TinyDense(classes=("b", "c", "a"), seed=2)
    same = TinyDense(classes=("a", "b"), seed=2)
    same.load_state_dict(
        {name: value[[2, 0]] if name.startswith("head.logits.") else value for name, value in teacher.state_dict().items()}
    )
    expected, found = learned(student, same, batch), learned(student, teacher, batch)
    assert [term.item() for term in found.values()] == pytest.approx([term.item() for term in expected.values()], rel=1e-6)


def test_teacher_may_have_more_levels_and_one_level_may_be_chosen():
    batch = tiny_batch()
    student = TinyDense(channels=(8,), strides=(8,), seed=1)
    both = TinyDense(seed=2)
    found = learned(student, both, batch)
    assert all(bool(torch.isfinite(term)) for term in found.values())
    wide = TinyDense(seed=1)
    apart = [learned(wide, both, batch, levels=[level], level_rule="all") for level in (0, 1)]
    whole = learned(wide, both, batch, level_rule="all")
    for name, term in whole.items():
        assert (apart[0][name] + apart[1][name]).item() == pytest.approx(term.item(), rel=1e-6)


def test_a_batch_without_positives_gives_zero_or_all_locations():
    student, teacher, batch = TinyDense(seed=1), TinyDense(seed=2), tiny_batch(boxes=False)
    skipped = learned(student, teacher, batch)
    sum(skipped.values()).backward()
    assert [term.item() for term in skipped.values()] == [0, 0]
    assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)
    assert all(term.item() > 0 for term in learned(student, teacher, batch, level_rule="all").values())


class AllIgnored(TinyDense):
    def assign(self, prediction, batch):
        return Assignment(torch.full(prediction.logits.shape[:2], IGNORED))


def test_ignored_locations_count_nothing():
    student, batch = AllIgnored(seed=1), tiny_batch()
    for rule in ("skip", "all"):
        terms = learned(student, TinyDense(seed=2), batch, level_rule=rule)
        assert [term.item() for term in terms.values()] == [0, 0]


@pytest.mark.parametrize(
    "boxes", [[], [[0.0, 0.0, 64.0, 64.0]], [[60.0, 60.0, 64.0, 64.0], [0.0, 0.0, 0.0, 0.0]]], ids=["none", "all", "border"]
)
def test_odd_boxes_are_finite(boxes):
    batch = tiny_batch(1)
    zeros = torch.zeros(len(boxes))
    target = Target(torch.tensor(boxes).reshape(-1, 4), zeros.long(), zeros.bool())
    student = TinyDense(strides=(8, 64), seed=1)  # one cell on the second level
    terms = learned(student, TinyDense(strides=(8, 64), seed=2), batch.with_targets([target]))
    sum(terms.values()).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)


def test_an_image_counts_in_a_batch_as_alone():
    """Sums over images: with all levels, the terms times the divisor add up; cells beyond an image's canvas count nothing."""
    batch = tiny_batch(3)
    batch = replace(batch, canvases_hw=tuple(view.size_hw for view in batch.views))
    student, teacher = TinyDense(seed=1), TinyDense(seed=2)

    def sums(part):
        normalizer = number_of_positives(student.assign(student(part).prediction, part), part.images)
        return torch.stack([term * normalizer for term in learned(student, teacher, part, level_rule="all").values()])

    alone = [sums(batch._on_canvas([image], batch.canvases_hw[image])) for image in range(3)]
    inner = torch.stack(alone).sum(dim=0)
    together = sums(batch)
    # The student's 3x3 convolutions see the padding of the batch, which changes the cells at the lower border a little.
    torch.testing.assert_close(together, inner, rtol=0.02, atol=0)


SMALL = "resnet10t,channels=8-16-32-64,stem=8,neck=32,levels=3-5,convs=1"


def test_detectors_of_different_coding_teach_each_other():
    """Distributions and points: boxes are compared after decoding."""
    student, teacher = (build_detector(f"{kind}:{SMALL}", CLASSES) for kind in ("gfl", "fcos"))
    terms = learned(student.train(), teacher, unequal_batch(), level_rule="all")
    sum(terms.values()).backward()
    assert all(term.item() > 0 for term in terms.values())
    assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)


def test_other_anchors_are_refused_before_the_first_image(monkeypatch):
    batch = unequal_batch()
    student = build_detector(f"retinanet:{SMALL}", CLASSES)
    teacher = build_detector(f"retinanet:{SMALL},anchors=2", CLASSES)
    shown = (
        r"anchor 0 of stride 8 has 46x22 pixels in the student retinanet:\S+ and 22x12 in the teacher retinanet:\S+,anchors=2;"
    )
    for detector in (student, teacher):
        monkeypatch.setattr(detector, "observe_features", lambda *_: pytest.fail("an image was shown"))
    for side in (Teacher(teacher), AbsentTeacher(teacher.spec, "fingerprint")):
        with pytest.raises(PairError, match=f"bckd: it compares predictions of equal anchors, but {shown}"):
            BCKD(side, student)
    monkeypatch.undo()
    assert learned(student.eval(), copy.deepcopy(student), batch)["bckd_cls"].item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(PairError, match=r"bckd: .*\(9, 9, 9\) anchors"):
        BCKD(Teacher(build_detector(f"atss:{SMALL}", CLASSES)), student)


def test_anchors_that_no_description_states_are_refused_by_the_first_batch():
    """A cache of an earlier version, or a detector from elsewhere."""
    student, teacher = (build_detector(f"retinanet:{SMALL}{more}", CLASSES) for more in ("", ",anchors=2"))
    teacher.spec = replace(teacher.spec, coding=None)
    with pytest.raises(PairError, match=r"bckd: .*anchor 0 of level 0 has 46x22 pixels in the student and 22x12 in the teacher"):
        learned(student, teacher, unequal_batch())


def test_anchors_of_levels_that_are_left_out_may_differ():
    student, teacher = (build_detector(f"retinanet:{SMALL}", CLASSES) for _ in range(2))
    (*fine, coarse) = teacher.spec.coding.anchors_wh
    other = replace(teacher.spec.coding, anchors_wh=(*fine, coarse[::-1]))
    teacher.spec = replace(teacher.spec, coding=other)
    assert len(BCKD(Teacher(teacher), student, levels=[0, 1]).pairs) == 2
    with pytest.raises(PairError, match="anchor 0 of stride 32 has"):
        BCKD(Teacher(teacher), student, levels=[0, -1])


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (TinyRegions, TinyDense, "the teacher .* predicts regions"),
        (TinyDense, TinyQueries, "the student .* predicts queries"),
        (lambda: TinyDense(classes=("a", "c")), TinyDense, "the teacher does not know b"),
        (lambda: TinyDense(channels=(8,), strides=(8,)), TinyDense, r"strides \(8, 16\)"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(teacher, student, message):
    with pytest.raises(PairError, match=f"bckd: .*{message}"):
        BCKD(Teacher(teacher()), student())


@pytest.mark.parametrize("settings", [{"beta": 0.5}, {"cls_weight": 0, "box_weight": 0}, {"overlap": "diou"}])
def test_hyper_parameters_are_checked(settings):
    with pytest.raises(MethodError, match="bckd"):
        BCKD(Teacher(TinyDense()), TinyDense(), **settings)


@pytest.mark.parametrize("settings", [{}, {"level_rule": "all", "overlap": "iou", "beta": 2.0}])
def test_contract(settings):
    assert check_method(BCKD, **settings) == ["dense 8 -> dense 8", "dense 16 -> dense 8"]
