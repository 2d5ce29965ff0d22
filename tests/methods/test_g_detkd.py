import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.regions import pool_boxes_on_all_levels
from detdistill.functional.relations import RowBank, overlapping_pairs
from detdistill.methods.g_detkd.loss import (
    g_detkd_blend,
    g_detkd_box_loss,
    g_detkd_ckd_loss,
    g_detkd_class_loss,
    g_detkd_level_weights,
    g_detkd_sgfi_loss,
    g_detkd_units,
)
from detdistill.methods.g_detkd.method import GDetKD
from detdistill.methods.g_detkd.parts import CellProjection, LevelMatching, region_width
from detdistill.methods.shared.needs import PairError
from detdistill.methods.shared.regions import has_area
from detdistill.structures import Clock, Features, Origin
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method, without_boxes
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

CLOCK = Clock(5, 10)
TINY = "resnet10t,channels=8-16-32-64,stem=8,neck=16,mlp=16,proposals=20,rois=16"


# --------------------------------------------------------------------------------------- against the re-implementation


def golden_boxes(golden):
    images = len(golden["in_student_0"])
    return [golden[f"in_boxes_{image}"].reshape(-1, 4) for image in range(images)]


def golden_matching(golden):
    adapt, first, second = (golden[f"param_{name}_weight"] for name in ("adapt", "embed1", "embed2"))
    levels = len(golden.levels("in_student"))
    matching = LevelMatching((adapt.shape[1],) * levels, len(adapt), True, (len(first), len(second))).to(adapt.dtype)
    parameters = {"adapters.0": "adapt", "embed1": "embed1", "embed2": "embed2"}
    state = {f"{mine}.{kind}": golden[f"param_{name}_{kind}"] for mine, name in parameters.items() for kind in ("weight", "bias")}
    matching.load_state_dict({**state, "tau": golden["param_tau"].reshape(1)})
    return matching


def test_sgfi_equals_the_golden_values_and_gradients():
    golden = Golden("g_detkd")
    student, matching = [level.requires_grad_() for level in golden.levels("in_student")], golden_matching(golden)
    boxes, size = golden_boxes(golden), golden.meta["roi_size"]
    pooled = pool_boxes_on_all_levels(Features(tuple(student), tuple(golden.meta["strides"])), boxes, size)
    if "out_roi_level0" in golden:
        assert_golden(pooled[0][: len(golden["out_roi_level0"])], golden["out_roi_level0"])
    teacher = golden["in_teacher_roi"]
    matched = matching(pooled, teacher)
    assert_golden(matched.weights, golden["out_sgfi_alpha"])
    total = golden.meta["sgfi"]["weight"] * g_detkd_sgfi_loss(matched.regions, teacher)
    assert_golden(total, golden["out_sgfi"])
    total.backward()
    for level, expected in zip(student, golden.levels("grad_student"), strict=True):
        assert_golden(level.grad, expected)
    names = {
        "tau": "tau",
        "embed1_weight": "embed1.weight",
        "embed2_weight": "embed2.weight",
        "adapt_weight": "adapters.0.weight",
    }
    names |= {"embed1_bias": "embed1.bias", "embed2_bias": "embed2.bias", "adapt_bias": "adapters.0.bias"}
    own = dict(matching.named_parameters())
    for theirs, mine in names.items():
        if f"grad_param_{theirs}" in golden:
            assert_golden(own[mine].grad.reshape(golden[f"grad_param_{theirs}"].shape), golden[f"grad_param_{theirs}"])


def test_ckd_equals_the_golden_values_and_gradients_of_successive_steps():
    golden = Golden("g_detkd")
    meta, boxes = golden.meta["ckd"], golden_boxes(golden)
    ignored = overlapping_pairs(boxes)
    pairs = [(i, j) for i, j in golden["out_ckd_overlapping_pairs"].reshape(-1, 2).tolist() if i != j]
    assert {(i, j) for i, j in torch.nonzero(ignored).tolist()} == set(pairs)
    bank, step, total = RowBank(10), 0, {}
    while f"in_ckd_student_step{step}" in golden:
        teacher = golden[f"in_ckd_teacher_step{step}"]
        for kind, with_positive in (("", False), ("infonce_", True)):
            student = golden[f"in_ckd_student_step{step}"].requires_grad_()
            loss = meta["weight"] * g_detkd_ckd_loss(
                student,
                teacher,
                meta["gamma"],
                bank=bank(teacher),
                ignored=ignored,
                positive_in_denominator=with_positive,
            )
            total[kind, step] = loss.detach()
            assert_golden(loss, golden[f"out_ckd_{kind}step{step}"])
            loss.backward()
            assert_golden(student.grad, golden[f"grad_student_ckd_{kind}step{step}"])
        bank.push(g_detkd_units(teacher))
        step += 1
    assert step > 1
    assert_golden(total["", 0] + golden["out_sgfi"], golden["out_total_step0"])


# ------------------------------------------------------------------------------------------------------- invariants


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matching(levels=3, channels=4, width=6, shared=True, **settings):
    torch.manual_seed(0)
    return LevelMatching((channels,) * levels, width, shared, (5, 3), **settings).double()


def plainly(module, pooled, teacher, adapters):
    """SGFI as its formula is written, with every adapted level."""
    adapted = [adapter(level) for adapter, level in zip(adapters, pooled, strict=True)]

    def embed(regions):
        rows = module.embed2(module.embed1(regions).relu()).flatten(1)
        return rows.relu() if module.relu else rows

    scores = torch.stack([(embed(level) * embed(teacher)).sum(dim=1) for level in adapted], dim=1) / module.tau
    weights = scores.softmax(dim=1)
    return sum(level * weights[:, i, None, None, None] for i, level in enumerate(adapted)), weights


@pytest.mark.parametrize(("shared", "relu", "size"), [(True, True, 7), (True, False, 9), (False, True, 11)])
def test_the_folded_adapter_equals_the_plain_form_with_gradients(shared, relu, size):
    module = matching(shared=shared, relu=relu, tau=0.3)
    pooled, teacher = [drawn(level, 5, 4, size, size).requires_grad_() for level in range(3)], drawn(9, 5, 6, size, size)
    adapters = list(module.adapters) * (3 if shared else 1)
    learned = [*pooled, *module.parameters()]
    found, expected = module(pooled, teacher), plainly(module, pooled, teacher, adapters)
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(g_detkd_sgfi_loss(both, teacher), learned) for both in (found.regions, expected[0])]
    for mine, plain in zip(*grads, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-12)
        assert mine.any()
    torch.testing.assert_close(found.weights.sum(dim=1), torch.ones(5, dtype=torch.float64))


def test_one_level_is_a_plain_mean_square_and_equal_levels_need_no_weights():
    module, teacher = matching(levels=1), drawn(9, 5, 6, 7, 7)
    pooled = drawn(0, 5, 4, 7, 7)
    expected = F.mse_loss(module.adapters[0](pooled), teacher)
    torch.testing.assert_close(g_detkd_sgfi_loss(module([pooled], teacher).regions, teacher), expected)
    for tau in (0.01, 1.0, 30.0):
        module = matching(tau=tau)
        torch.nn.init.dirac_(module.adapters[0].weight)
        torch.nn.init.zeros_(module.adapters[0].bias)
        same = module.adapters[0](pooled)
        assert float(g_detkd_sgfi_loss(module([pooled] * 3, same).regions, same).detach()) == pytest.approx(0.0, abs=1e-25)


def test_a_temperature_at_its_bound_is_finite():
    module = matching(tau=0.0)
    with torch.no_grad():
        module.tau.fill_(-1.0)
    found = module([1e3 * drawn(level, 5, 4, 7, 7) for level in range(3)], drawn(9, 5, 6, 7, 7))
    assert found.weights.isfinite().all()
    assert found.regions.isfinite().all()


def test_the_most_similar_level_weighs_most():
    keys = torch.stack([torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 9.0]])])
    weights = g_detkd_level_weights(keys, torch.tensor([[2.0, 0.0]]), tau=2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 3.0, 0.0]]).softmax(dim=1))
    blended = g_detkd_blend([torch.full((1, 1, 2, 2), value) for value in (1.0, 2.0, 3.0)], weights)
    assert blended[0, 0, 0, 0] == pytest.approx(float((weights * torch.tensor([1.0, 2.0, 3.0])).sum()))


def test_contrast_is_not_negative_and_sees_no_length():
    student, teacher, bank = drawn(0, 6, 5), drawn(1, 6, 5), g_detkd_units(drawn(2, 4, 5))
    expected = float(g_detkd_ckd_loss(student, teacher, bank=bank))
    assert expected > 0
    lengths = torch.tensor([[0.1], [3.0], [1.0], [7.0], [2.0], [50.0]], dtype=torch.float64)
    assert float(g_detkd_ckd_loss(lengths * student, teacher, bank=bank)) == pytest.approx(expected, rel=1e-10)
    assert float(g_detkd_ckd_loss(student, lengths.flip(0) * teacher, bank=bank)) == pytest.approx(expected, rel=1e-10)


def test_contrast_of_one_region_or_of_two_equal_boxes_is_zero():
    one = drawn(0, 1, 5).requires_grad_()
    loss = g_detkd_ckd_loss(one, drawn(1, 1, 5))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not one.grad.any()
    ignored = overlapping_pairs([torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(2, 1)])
    for positive_in_denominator in (True, False):
        loss = g_detkd_ckd_loss(drawn(0, 2, 5), drawn(1, 2, 5), ignored=ignored, positive_in_denominator=positive_in_denominator)
        assert float(loss) == 0.0


def test_embeddings_of_zeros_have_a_finite_gradient():
    student = torch.zeros(3, 4, requires_grad=True)
    g_detkd_ckd_loss(student, torch.zeros(3, 4)).backward()
    assert student.grad.isfinite().all()


def test_predictions_by_hand():
    logits = torch.tensor([[math.log(2.0), math.log(3.0), math.log(5.0)]])  # probabilities 0.2, 0.3 and the background
    student = torch.zeros(1, 2, 4)
    teacher = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [-1.0, 1.0, 0.0, 2.0]]])
    # 0.2 * 1 - 0.3 * 1, 0.2 + 0.3, 0, 0.6
    assert float(g_detkd_box_loss(student, teacher, logits)) == pytest.approx(0.1 + 0.5 + 0.6, rel=1e-6)
    assert float(g_detkd_box_loss(student, teacher, logits, "mean")) == pytest.approx(1.2 / 4, rel=1e-6)
    assert float(g_detkd_box_loss(student[:, :1], teacher, logits)) == pytest.approx(1.2, rel=1e-6)
    assert float(g_detkd_class_loss(torch.zeros(1, 3), logits)) == pytest.approx(
        sum(p * math.log(3 * p) for p in (0.2, 0.3, 0.5)), rel=1e-5
    )
    assert float(g_detkd_class_loss(logits, logits, 3.0)) == 0.0


def test_no_regions_are_zero_and_connected():
    rows, regions = torch.zeros(0, 5, requires_grad=True), torch.zeros(0, 2, 7, 7, requires_grad=True)
    deltas = torch.zeros(0, 2, 4, requires_grad=True)
    logits = torch.zeros(0, 3, requires_grad=True)
    nobody = torch.zeros(0, 0, dtype=torch.bool)
    losses = [
        g_detkd_ckd_loss(rows, rows, bank=torch.ones(2, 5), ignored=nobody),
        g_detkd_sgfi_loss(regions, regions),
        g_detkd_class_loss(logits, logits),
        g_detkd_box_loss(deltas, deltas, logits),
    ]
    assert [float(loss.detach()) for loss in losses] == [0.0] * 4
    sum(losses).backward()
    assert all(tensor.grad is not None for tensor in (rows, regions, deltas, logits))


def test_each_anchor_and_each_width_has_its_own_projection():
    origin = Origin(*(torch.tensor(part) for part in ([0, 1, 0], [1, 0, 0], [[0, 1], [2, 0], [1, 1]], [1, 0, 1], [-1] * 3)))
    for channels in ((3, 3), (3, 5)):
        maps = [drawn(level, 2, width, 4, 4) for level, width in enumerate(channels)]
        module = CellProjection(channels, anchors=2, width=4).double()
        assert len(module.projections) == len(set(channels))
        found = module(maps, origin)
        for row, (image, level, (y, x), anchor) in enumerate([(0, 1, (0, 1), 1), (1, 0, (2, 0), 0), (0, 0, (1, 1), 1)]):
            weight = module.projections[level % len(module.projections)].weight[4 * anchor : 4 * anchor + 4]
            torch.testing.assert_close(found[row], weight @ maps[level][image, :, y, x])
        assert module(maps, origin[torch.arange(0)]).shape == (0, 4)


# ---------------------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, ["regions 8 -> regions 8", "regions 16 -> regions 8"]),
        (
            {"profile": "one_stage", "num_rois": 6, "positive_in_denominator": False},
            ["regions 8 -> dense 8", "regions 16 -> dense 8"],
        ),
        (
            {"teacher_profile": "one_stage", "profile": "one_stage", "adapter": "per_level", "queue_batches": 0},
            ["dense 8 -> dense 8", "dense 16 -> dense 8"],
        ),
        (
            {"ckd_weight": 0.0, "class_weight": 0.0, "box_weight": 0.0, "levels": [1]},
            [f"{kind} {width} -> regions 8" for kind in ("dense", "regions", "queries") for width in (8, 16)],
        ),
    ],
)
def test_contract(settings, wanted):
    assert check_method(GDetKD, **settings) == wanted


def build(student=None, teacher=None, **settings):
    torch.manual_seed(0)
    student = student or TinyRegions(seed=2)
    return student, GDetKD(Teacher(teacher or TinyRegions(seed=1)), student, **settings)


def learn(batch, student=None, teacher=None, **settings):
    student, method = build(student, teacher, **settings)
    return run(method, student, batch)


def run(method, student, batch):
    torch.manual_seed(3)
    method.teacher.forget()
    seen = student(batch, replace(method.requirements.student, prediction=True))
    return method.learn(student, seen, method.teach(batch), batch, CLOCK)


ONE = {"profile": "one_stage"}


def test_terms_of_homogeneous_and_heterogeneous_pairs():
    batch = tiny_batch(2)
    assert list(learn(batch).terms) == ["g_detkd_sgfi", "g_detkd_ckd", "g_detkd_class", "g_detkd_box"]
    assert list(learn(batch, TinyDense(seed=2), **ONE).terms) == ["g_detkd_sgfi", "g_detkd_ckd"]
    alone = learn(batch, sgfi_weight=0.0, class_weight=0.0, box_weight=0.0)
    assert list(alone.terms) == ["g_detkd_ckd"]
    tower = learn(batch, teacher=TinyDense(seed=1), teacher_profile="one_stage")
    assert list(tower.terms) == ["g_detkd_sgfi", "g_detkd_ckd"]
    assert all(math.isfinite(float(term.detach())) for term in tower.terms.values())


def test_weights_scale_their_terms():
    batch = tiny_batch(2)
    once, names = learn(batch).terms, ("sgfi", "ckd", "class", "box")
    thrice = learn(batch, **{f"{name}_weight": 3.0 for name in names}).terms
    for name in names:
        torch.testing.assert_close(thrice[f"g_detkd_{name}"], 3 * once[f"g_detkd_{name}"])
    mean = learn(batch, box_reduction="mean").terms["g_detkd_box"]
    torch.testing.assert_close(4 * mean, once["g_detkd_box"])


def test_an_equal_teacher_predicts_the_same():
    losses = learn(tiny_batch(2), TinyRegions(seed=1), projection="shared")
    assert float(losses.terms["g_detkd_class"].detach()) == pytest.approx(0.0, abs=1e-12)
    assert float(losses.terms["g_detkd_box"].detach()) == pytest.approx(0.0, abs=1e-12)
    assert float(losses.terms["g_detkd_sgfi"].detach()) > 0  # the adapter is new


def test_the_bank_adds_negatives_of_the_batches_before():
    student, method = build(class_weight=0.0, box_weight=0.0, sgfi_weight=0.0, queue_batches=2)
    batch, losses, counts = tiny_batch(2), [], []
    for _ in range(4):
        losses.append(float(run(method, student, batch).terms["g_detkd_ckd"].detach()))
        counts.append(len(method.bank.rows))
    rows = counts[0]
    assert counts == [rows, 2 * rows, 2 * rows, 2 * rows]
    assert losses[0] < losses[1] < losses[2] == losses[3]
    torch.testing.assert_close(method.bank.rows.norm(dim=1), torch.ones(2 * rows))
    assert not method.bank.rows.requires_grad
    with torch.no_grad():
        run(method, student, tiny_batch(2, seed=5))
    assert len(method.bank.rows) == 2 * rows


def test_gradients_reach_all_but_the_teacher():
    for student, settings in ((TinyRegions(seed=2), {}), (TinyDense(seed=2), ONE)):
        student, method = build(student, **settings)
        losses = run(method, student, tiny_batch(2))
        losses.total().backward()
        for name, parameter in method.named_parameters():
            assert parameter.grad is not None, name
        assert all(conv.weight.grad.any() for conv in student.levels.convs)
        assert all(parameter.grad is None for parameter in method.teacher.detector.parameters())


def test_an_image_without_boxes_counts_by_its_regions():
    """Without ground truth a dense student has negatives; an image without any region counts nothing."""
    batch = without_boxes(tiny_batch(2), range(2))
    losses = learn(batch, TinyDense(seed=2), num_rois=4, **ONE)
    assert float(losses.monitors["regions"]) == 4.0
    assert all(float(term.detach()) > 0 for term in losses.terms.values())


def nothing(prediction, images):
    """A dense prediction whose boxes in some images have no area."""
    boxes = prediction.boxes_xyxy.clone()
    boxes[images] = boxes[images][..., [0, 1, 0, 1]]
    return replace(prediction, boxes_xyxy=boxes)


@pytest.mark.parametrize("teacher", [TinyRegions, TinyDense])
def test_an_image_without_regions_changes_nothing_and_no_region_is_zero(teacher):
    """The first image fills the batch, the second is padded; without its regions only the first counts."""
    settings = ONE if teacher is TinyRegions else {**ONE, "teacher_profile": "one_stage"}
    batch = tiny_batch(2)
    values = []
    for images, given in (([1], batch), ([], batch._on_canvas([0], (64, 64))), ([0, 1], batch)):
        student, method = build(TinyDense(seed=2), teacher(seed=1), **settings)
        seen = student(given, replace(method.requirements.student, prediction=True))
        seen = replace(seen, prediction=nothing(seen.prediction, images))
        torch.manual_seed(3)
        losses = method.learn(student, seen, method.teach(given), given, CLOCK)
        losses.total().backward()
        values.append({name: float(term.detach()) for name, term in losses.terms.items()})
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert set(values[2].values()) == {0.0}
    assert len(method.bank.rows) == 0
    assert student.levels.convs[0].weight.grad is not None


def test_regions_without_area_are_left_out_and_their_order_means_nothing():
    batch = tiny_batch(3)
    student, method = build()
    seen, taught = student(batch), method.teach(batch)
    expected = method.learn(student, seen, taught, batch, CLOCK)
    mine = seen.prediction
    order = torch.randperm(len(mine.boxes_xyxy), generator=torch.Generator().manual_seed(0))
    flat = mine.rows(torch.tensor([0, 3]))
    flat = replace(flat, boxes_xyxy=flat.boxes_xyxy[:, [0, 1, 0, 3]])
    mixed = mine.rows(order)
    joined = type(mine).stack([mixed, flat])  # gives `flat` the image 1, too
    joined = replace(joined, origin=replace(joined.origin, image=torch.cat([mixed.origin.image, flat.origin.image])))
    student, method = build()
    found = method.learn(student, replace(seen, prediction=joined), taught, batch, CLOCK)
    for name, term in found.terms.items():
        torch.testing.assert_close(term, expected.terms[name], rtol=1e-5, atol=1e-6)
    usable = int(has_area(mine.boxes_xyxy).sum())
    assert found.monitors["regions"] == expected.monitors["regions"] == pytest.approx(usable / 3)
    empty = method.learn(student, replace(seen, prediction=mine.rows(order[:0])), taught, batch, CLOCK)
    empty.total().backward()
    assert {float(term.detach()) for term in empty.terms.values()} == {0.0}


def test_odd_boxes_and_levels_of_one_cell_are_finite():
    """One box over everything, boxes on the border, a teacher with fewer levels, levels of one cell."""
    batch = tiny_batch(2)
    boxes = torch.tensor([[0.0, 0.0, 64.0, 48.0], [60.0, 40.0, 64.0, 48.0]])
    batch = batch.with_targets(
        [replace(t, boxes_xyxy=boxes, labels=torch.tensor([0, 1]), crowd=torch.zeros(2).bool()) for t in batch.targets]
    )
    for given, wide in ((batch, True), (batch._on_canvas([1], (64, 64)), False)):
        for student, settings in ((TinyRegions, {}), (TinyDense, ONE)):
            coarse = student(strides=(16, 64), channels=(8, 8), seed=2)
            losses = learn(given, coarse, TinyRegions(channels=(16,), strides=(16,), seed=1), **settings)
            losses.total().backward()
            assert math.isfinite(float(losses.total().detach())), wide


def test_a_teacher_of_more_classes_is_read_in_the_students_order():
    batch = tiny_batch(2)
    student, method = build(teacher=TinyRegions(classes=("b", "x", "a"), seed=1))
    seen, taught = student(batch), method.teach(batch)
    terms = method.learn(student, seen, taught, batch, CLOCK).terms
    theirs = method.teacher.predict_regions(seen.prediction, taught.features, batch)
    rows = has_area(seen.prediction.boxes_xyxy)
    mine, logits = seen.prediction.rows(rows), theirs.logits[rows][:, [2, 0, 3]]
    torch.testing.assert_close(terms["g_detkd_class"], g_detkd_class_loss(mine.logits, logits))
    box = g_detkd_box_loss(mine.deltas, theirs.deltas[rows][:, [2, 0]], logits)
    torch.testing.assert_close(terms["g_detkd_box"], box)


def test_real_pairs_learn():
    batch, dense = tiny_batch(2), "resnet10t,channels=8-16-32-64,stem=8,neck=32,levels=3-5,convs=1"
    pairs = [("cascade_rcnn", f"faster_rcnn:{TINY}", {}), ("faster_rcnn", f"cascade_rcnn:{TINY}", {})]
    pairs += [("faster_rcnn", f"retinanet:{dense}", ONE)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for teacher, name, settings in pairs:
            student, theirs = build_detector(name, ["a", "b"]), build_detector(f"{teacher}:{TINY}", ["b", "c", "a"])
            assert region_width(theirs) == 16
            method = GDetKD(Teacher(theirs), student.train(), **settings)
            losses = method.step(student, batch, method.teach(batch), CLOCK)
            losses.total().backward()
            assert math.isfinite(float(losses.total().detach()))
            assert len(losses.distilled) == (2 if settings else 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 5}, "size=5 is not a whole number, 7 or more"),
        ({"gamma": 0.0}, "gamma=0.0 is not a number above 0"),
        ({"ignore_iou": 1.5}, "ignore_iou=1.5 is not a number from 0 to 1"),
        ({"levels": [2]}, "levels=[2]: give each level once, from 0 to 1"),
        (
            {"class_weight": 1.0, **ONE},
            "class_weight compares region heads, so it needs profile=two_stage and teacher_profile=two_stage; leave it out",
        ),
        (
            {"projection": "shared", **ONE},
            "projection=shared needs profile=two_stage and teacher_profile=two_stage; leave it out",
        ),
        (
            {"sgfi_weight": 0.0, "ckd_weight": 0.0, "class_weight": 0.0, "box_weight": 0.0},
            "sgfi_weight, ckd_weight, class_weight, box_weight are all 0; nothing would be distilled",
        ),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(DetdistillError) as error:
        build(TinyDense() if settings.get("profile") else None, **settings)
    assert str(error.value) == f"g_detkd: {message}"


def test_refused_pairs_are_told_why():
    uneven, mute = TinyDense(), TinyRegions()
    uneven.spec = replace(uneven.spec, channels=(8, 12))
    regions = mute.regions
    mute.regions = lambda *given: replace(regions(*given), hidden=())
    wider = TinyRegions(channels=(16, 16))
    wider.embed, wider.logits, wider.deltas = torch.nn.Linear(64, 20), torch.nn.Linear(20, 3), torch.nn.Linear(20, 8)
    refused = [
        ({"student": TinyDense()}, "the student tinydense:patches predicts dense; it needs a student that predicts regions"),
        ({"student": TinyQueries(), **ONE}, "the student tinyqueries:patches predicts queries; it needs a student that predicts"),
        ({"teacher": TinyDense()}, "the teacher tinydense:patches predicts dense; it needs a teacher that predicts regions"),
        ({"teacher": TinyRegions(classes=("a",))}, "g_detkd: it compares class scores, but the teacher does not know b"),
        ({"teacher": wider, "projection": "shared"}, "have 12 numbers, the teacher's 20, so one projection cannot read both"),
        ({"teacher": mute}, "the teacher tinyregions:patches does not show the last layer of its region head"),
        ({"student": uneven, **ONE}, "set g_detkd,adapter=per_level"),
        ({"teacher": uneven, "teacher_profile": "one_stage"}, "take a teacher whose neck has equal channels"),
    ]
    for settings, message in refused:
        with pytest.raises(PairError) as error:
            build(**settings)
        assert message in str(error.value)
    classless = learn(tiny_batch(2), teacher=TinyRegions(classes=("a",)), class_weight=0.0, box_weight=0.0)
    assert list(classless.terms) == ["g_detkd_sgfi", "g_detkd_ckd"]
