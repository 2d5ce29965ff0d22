import functools
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import PREDICTION, Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.regions import features_at_origin
from detdistill.losses import head_ckd_loss, head_layer_loss, head_neck_loss, head_neck_mask
from detdistill.methods.head.method import HEAD
from detdistill.methods.head.parts import DenseAssistant, RegionAdapters
from detdistill.methods.shared.contract import Composition
from detdistill.methods.shared.needs import PairError
from detdistill.methods.shared.region_heads import AnchorLinear
from detdistill.structures import Clock, Features, Origin, Target
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method, without_boxes
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

CLOCK = Clock(5000, 10000)


# ------------------------------------------------------------------------------------------------ against released code


def origin_of(rows):
    """Rows of image, level, row, column and anchor (or ground truth)."""
    image, level, row, column, last = rows.unbind(dim=1)
    given = level < 0
    none = torch.full_like(last, -1)
    return Origin(image, level, torch.stack([row, column], dim=1), torch.where(given, none, last), torch.where(given, last, none))


def linear(golden, prefix):
    weight, bias = golden[f"param_{prefix}_weight"], golden[f"param_{prefix}_bias"]
    layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def test_values_and_gradients_equal_the_released_code():
    golden = Golden("head")
    weights = golden.meta["weights"]
    warm_up = int(re.search(r"\.\.(\d+)", weights["warmup"])[1])
    cells = [level.requires_grad_() for level in golden.levels("in_student_cls_tower")]
    hidden = [golden[f"in_assistant_{name}"].requires_grad_() for name in ("fc1", "fc2")]
    theirs = [golden[f"in_teacher_{name}"] for name in ("fc1", "fc2")]
    origin = origin_of(golden["in_roi_origin"])
    akd, psi = RegionAdapters([1, 1], [1, 1]), linear(golden, "ckd")
    akd[0], akd[1] = linear(golden, "akd_fc1"), linear(golden, "akd_fc2")
    steps = sorted(int(name.partition("iter")[2]) for name in golden.arrays if name.startswith("out_total_iter"))
    for step in steps:
        factor = Clock(step, 10 * step).warm_up(warm_up)
        found = {
            name: head_layer_loss([layer], [fixed], factor * weights[f"loss_{name}"])
            for name, layer, fixed in zip(("mimic_rcnn_aux", "mimic_rcnn"), akd(hidden), theirs, strict=True)
        }
        rows = features_at_origin(cells, origin)
        found["cross"] = head_ckd_loss(psi(rows), theirs[1], origin, factor * weights["loss_cross"])
        for name, loss in found.items():
            assert_golden(loss, golden[f"out_loss_{name}_iter{step}"])
        total = sum(found.values())
        assert_golden(total, golden[f"out_total_iter{step}"])
    assert_golden(rows, golden["out_ckd_student_indexed"])
    assert_golden(psi(rows), golden["out_ckd_student_adapted"])
    assert_golden(theirs[1][origin.level >= 0], golden["out_ckd_teacher_filtered"])
    total.backward()
    for level, expected in zip(cells, golden.levels("grad_student_cls_tower"), strict=True):
        assert_golden(level.grad, expected)
    for layer, name in zip(hidden, ("fc1", "fc2"), strict=True):
        assert_golden(layer.grad, golden[f"grad_student_assistant_{name}"])


def test_values_and_gradients_without_a_teacher_equal_the_released_code():
    golden = Golden("head")
    cells = [level.requires_grad_() for level in golden.levels("in_student_cls_tower")]
    assistant = golden.levels("in_tf_fcos_cls_tower")
    weight, bias = golden["param_tf_fcos_weight"], golden["param_tf_fcos_bias"]
    adapted = [nn.functional.conv2d(level, weight, bias) for level in cells]
    levels = [
        head_layer_loss([mine], [fixed], golden.meta["weights"]["tf_fcos"])
        for mine, fixed in zip(adapted, assistant, strict=True)
    ]
    for index, loss in enumerate(levels):
        assert_golden(loss, golden[f"out_tf_loss_self_fcos_level{index}"])
    dense = head_layer_loss(adapted, assistant, golden.meta["weights"]["tf_fcos"])
    assert_golden(dense, golden["out_tf_loss_self_fcos_sum"])
    target, outputs = golden["in_assistant_fc2"], golden["param_tf_rcnn_decouple_weight"]
    psi = AnchorLinear(outputs.shape[1], target.shape[1], len(outputs) // target.shape[1]).double()
    psi.layer.load_state_dict({"weight": outputs, "bias": golden["param_tf_rcnn_decouple_bias"]})
    origin = origin_of(golden["in_roi_origin"])
    mine = psi(features_at_origin(cells, origin), origin.anchor[origin.level >= 0])
    regions = head_ckd_loss(mine, target, origin, golden.meta["weights"]["tf_rcnn"])
    assert_golden(regions, golden["out_tf_loss_self_rcnn"])
    assert_golden(dense + regions, golden["out_tf_total"])
    (dense + regions).backward()
    for level, expected in zip(cells, golden.levels("grad_student_tf_cls_tower"), strict=True):
        assert_golden(level.grad, expected)


# ------------------------------------------------------------------------------------------------------- invariants


def some_regions(count=7, given=(2, 5)):
    generator = torch.Generator().manual_seed(0)
    level = torch.randint(0, 2, (count,), generator=generator)
    level[list(given)] = -1
    cell = torch.randint(0, 4, (count, 2), generator=generator)
    image = torch.arange(count) % 2
    origin = Origin(image, level, cell, torch.zeros_like(level), torch.where(level < 0, 0, -1))
    maps = [torch.randn(2, 3, 4, 4, generator=generator, requires_grad=True) for _ in range(2)]
    return maps, origin, torch.randn(count, 3, generator=generator)


def test_equal_layers_lose_nothing():
    layers = [torch.randn(5, 4), torch.randn(5, 4)]
    assert float(head_layer_loss(layers, layers)) == 0.0


def test_ground_truth_regions_count_in_akd_and_not_in_ckd():
    maps, origin, theirs = some_regions()
    changed = theirs.clone()
    changed[origin.level < 0] += 5
    rows = features_at_origin(maps, origin)
    assert torch.equal(head_ckd_loss(rows, changed, origin), head_ckd_loss(rows, theirs, origin))
    mine = torch.zeros_like(theirs)
    assert head_layer_loss([mine], [changed]) > head_layer_loss([mine], [theirs])


def test_the_order_of_the_regions_changes_nothing():
    maps, origin, theirs = some_regions()
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    expected = head_ckd_loss(features_at_origin(maps, origin), theirs, origin)
    shuffled = head_ckd_loss(features_at_origin(maps, origin[order]), theirs[order], origin[order])
    torch.testing.assert_close(shuffled, expected)


def test_without_an_origin_ckd_is_zero_and_differentiable():
    maps, origin, theirs = some_regions(given=range(7))
    loss = head_ckd_loss(features_at_origin(maps, origin), theirs, origin)
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert all(not level.grad.any() for level in maps)


def test_targets_get_no_gradient():
    layers = [torch.ones(3, 2, requires_grad=True) for _ in range(3)]
    origin = Origin.given([3])
    origin = replace(origin, level=torch.zeros(3, dtype=torch.int64))
    (head_layer_loss([layers[0]], [2 * layers[1]]) + head_ckd_loss(layers[0], layers[2], origin)).backward()
    assert layers[0].grad is not None
    assert layers[1].grad is None
    assert layers[2].grad is None


def test_the_neck_mask_shares_one_among_boxes_and_the_gain_among_the_rest():
    boxes = [torch.tensor([[8.0, 0.0, 15.0, 7.0]]), torch.zeros(0, 4), torch.tensor([[-50.0, -50.0, 900.0, 900.0]])]
    mask = head_neck_mask(boxes, 8, (4, 4), 9.0)
    assert mask.shape == (3, 4, 4)
    assert mask[0, :2, 1:3].tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert mask[0].sum().item() == pytest.approx(10)
    assert mask[1].sum().item() == pytest.approx(9)  # no box: all is background
    assert mask[2].sum().item() == pytest.approx(1)
    maps = torch.randn(3, 5, 4, 4), torch.randn(3, 5, 4, 4)
    by_hand = ((maps[0] - maps[1]).square() * mask[:, None]).mean() * 0.1
    torch.testing.assert_close(head_neck_loss(maps[:1], maps[1:], [mask]), by_hand)


# ---------------------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({"decouple_anchors": True}, ["regions 8 -> dense 8", "regions 16 -> dense 8"]),
        ({"pair": "regions_to_regions", "ckd_weight": 1.0}, ["regions 8 -> regions 8", "regions 16 -> regions 8"]),
        ({"pair": "dense_to_dense", "neck_weight": 0.1}, ["dense 8 -> dense 8", "dense 16 -> dense 8"]),
        ({"pair": "teacher_free", "width": 16}, ["dense 8"]),
    ],
)
def test_contract(settings, pairs):
    assert check_method(HEAD, **settings) == pairs


KINDS = {
    "regions_to_dense": (TinyRegions, TinyDense),
    "regions_to_regions": (TinyRegions, TinyRegions),
    "dense_to_dense": (TinyDense, TinyDense),
    "teacher_free": (None, TinyDense),
}


def build(pair="regions_to_dense", teacher=None, student=None, **settings):
    torch.manual_seed(0)
    theirs, mine = KINDS[pair]
    student = student or mine(seed=2)
    if pair == "teacher_free":
        settings = {"width": 16, **settings}
    teacher = teacher or (theirs and theirs(seed=1))
    return student, HEAD(teacher and Teacher(teacher), student, pair=pair, **settings)


def learn(method, student, batch, clock=CLOCK):
    torch.manual_seed(1)
    seen = student(batch, PREDICTION | method.requirements.student)
    return method.learn(student, seen, method.teach(batch), batch, clock)


@pytest.mark.parametrize("pair", list(KINDS))
def test_gradients_go_where_the_paper_says(pair):
    student, method = build(pair, ckd_weight=1.0)
    terms = learn(method, student, tiny_batch(2)).terms
    assert list(terms) == ["head_assistant", *(["head_akd"] if pair != "teacher_free" else []), "head_ckd"]
    own = [*student.head.classification.parameters()] if hasattr(student, "head") else [*student.embed.parameters()]
    neck = [*student.levels.parameters()]
    assistants = [method.dense, method.regions] if pair == "teacher_free" else [method.assistant]
    others = [parameter for assistant in assistants for parameter in assistant.parameters()]

    def reached(term, parameters):
        found = torch.autograd.grad(terms[term], parameters, retain_graph=True, allow_unused=True)
        return any(gradient is not None and bool(gradient.any()) for gradient in found)

    for term in terms:
        assert reached(term, neck), term
        assert reached(term, own) == (term == "head_ckd"), term
        assert reached(term, others) == (term != "head_ckd"), term


def test_an_equal_pyramid_and_identities_lose_nothing():
    student, method = build("regions_to_regions", student=TinyRegions(seed=1), ckd_weight=1.0)
    for adapter in (*method.akd, *method.ckd):
        nn.init.eye_(adapter.weight)
        nn.init.zeros_(adapter.bias)
    terms = learn(method, student, tiny_batch(2)).terms
    assert [float(terms[name].detach()) for name in ("head_akd", "head_ckd")] == [0.0, 0.0]
    assert float(terms["head_assistant"].detach()) > 0
    for first, second in zip(method.assistant.embed.parameters(), student.embed.parameters(), strict=True):
        assert torch.equal(first, second)  # it starts with the teacher's weights


def test_weights_rise_over_the_first_steps():
    student, method = build()
    batch = tiny_batch(2)
    full = learn(method, student, batch, Clock(2000, 10000)).terms
    for step, factor in ((0, 0.0), (1000, 0.5), (9000, 1.0)):
        terms = learn(method, student, batch, Clock(step, 10000)).terms
        assert torch.equal(terms["head_assistant"], full["head_assistant"])
        for name in ("head_akd", "head_ckd"):
            assert float(terms[name].detach()) == pytest.approx(factor * float(full[name].detach()), rel=1e-6)


def test_without_a_teacher_ckd_stops_and_assistants_warm_up():
    student, method = build("teacher_free")
    batch = tiny_batch(2)
    full = learn(method, student, batch, Clock(5000, 9000)).terms
    late = learn(method, student, batch, Clock(6000, 9000)).terms
    assert float(late["head_ckd"].detach()) == 0.0
    assert torch.equal(late["head_assistant"], full["head_assistant"])
    half = learn(method, student, batch, Clock(1000, 9000)).terms
    for name in full:
        assert float(half[name].detach()) == pytest.approx(0.5 * float(full[name].detach()), rel=1e-5)
    student, method = build("teacher_free", ckd_until=1.0)
    assert float(learn(method, student, batch, Clock(9000, 9000)).terms["head_ckd"].detach()) > 0


def test_weights_scale_the_terms():
    batch = tiny_batch(2)
    student, method = build(warmup_iters=0)
    plain = learn(method, student, batch).terms
    student, method = build(warmup_iters=0, assistant_weight=2.0, akd_weight=1.0, ckd_weight=8.0)
    scaled = learn(method, student, batch).terms
    for name, factor in (("head_assistant", 2.0), ("head_akd", 0.5), ("head_ckd", 4.0)):
        assert float(scaled[name].detach()) == pytest.approx(factor * float(plain[name].detach()), rel=1e-5)
    student, method = build(assistant_weight=0.0, akd_weight=0.0)
    assert list(learn(method, student, batch).terms) == ["head_ckd"]
    assert method.assistant is None
    student, method = build(akd_weight=0.0, ckd_weight=0.0)  # "assist" alone
    assert list(learn(method, student, batch).terms) == ["head_assistant"]


def test_a_given_teacher_is_ignored_without_a_teacher():
    _, method = build("teacher_free", teacher=TinyRegions(seed=1))
    assert method.teachers() == ()
    assert method.teach(tiny_batch(1)) is None


def test_only_one_assistant_without_a_teacher():
    batch = tiny_batch(2)
    for kind, names in (("dense", [True, False]), ("regions", [False, True])):
        student, method = build("teacher_free", assistants=kind)
        assert [method.dense is not None, method.regions is not None] == names
        assert all(float(term.detach()) > 0 for term in learn(method, student, batch).terms.values())


def test_the_student_is_exported_alone():
    student, method = build()
    assert set(student.state_dict()) == set(TinyDense().state_dict())
    assert not {id(p) for p in method.parameters()} & {id(p) for p in student.parameters()}


@functools.cache
def bad_batches():
    batch = tiny_batch(2)
    plain = Target(torch.tensor([[0.0, 0.0, 64.0, 64.0]]), torch.tensor([0]), torch.tensor([False]))
    border = replace(plain, boxes_xyxy=torch.tensor([[-4.0, 10.0, 6.0, 80.0]]))
    flat = replace(plain, boxes_xyxy=torch.tensor([[9.0, 9.0, 9.0, 20.0]]))
    crowd = replace(plain, crowd=torch.tensor([True]))
    pairs = [(plain, border), (flat, plain), (crowd, flat)]
    return [without_boxes(batch, range(2)), without_boxes(batch, range(1)), *map(batch.with_targets, pairs)]


@pytest.mark.parametrize("pair", list(KINDS))
def test_bad_boxes_are_finite(pair):
    student, method = build(pair, ckd_weight=1.0)
    for batch in bad_batches():
        losses = learn(method, student, batch)
        losses.total().backward()
        assert all(math.isfinite(float(term.detach())) for term in losses.terms.values())
        for parameter in (*student.parameters(), *method.parameters()):
            assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all())


@pytest.mark.parametrize("pair", ["regions_to_dense", "teacher_free"])
def test_no_surviving_proposal_is_finite(pair):
    student, method = build(pair)
    batch = without_boxes(tiny_batch(2), range(2))
    seen = student(batch, PREDICTION | method.requirements.student)
    point = replace(seen.prediction, boxes_xyxy=torch.full_like(seen.prediction.boxes_xyxy, 7.0))
    losses = method.learn(student, replace(seen, prediction=point), method.teach(batch), batch, CLOCK)
    assert float(losses.monitors["regions"]) == 0.0
    if pair == "regions_to_dense":
        assert [float(term.detach()) for term in losses.terms.values()] == [0.0, 0.0, 0.0]
    losses.total().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in (*student.parameters(), *method.parameters()) if p.grad is not None)


def test_regions_are_limited_and_may_be_fewer_than_asked():
    batch = tiny_batch(2)
    counts = []
    for settings in ({"regions_per_image": 4}, {"max_proposals": 2}, {"regions_per_image": 100000}):
        student, method = build(**settings)
        counts.append(float(learn(method, student, batch).monitors["regions"]))
    assert counts[0] == 4.0
    assert counts[1] == 2 + sum(map(len, batch.targets)) / 2
    assert counts[1] < counts[2] < 200


def test_an_image_counts_by_its_regions():
    """With as many regions in each image, the loss of a batch is the mean over the images alone."""
    batch = replace(tiny_batch(2), sizes=torch.full((2, 2), 64))
    batch = batch.with_targets([batch.targets[0]] * 2)
    student, method = build(regions_per_image=1000, nms=1.0, before_nms=9)
    whole = learn(method, student, batch).terms
    alone = [learn(method, student, batch._on_canvas([image], (64, 64))).terms for image in range(2)]
    for name in ("head_akd", "head_ckd"):
        mean = sum(float(terms[name].detach()) for terms in alone) / 2
        assert float(whole[name].detach()) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("strides", [(8,), (8, 64), (8, 16, 32)])
@pytest.mark.parametrize("pair", list(KINDS))
def test_pyramids_of_other_levels(pair, strides):
    """A teacher with fewer levels; for the assistants, a student with other levels and a level of one cell."""
    settings = {"channels": (8,) * len(strides), "strides": strides}
    student, method = build(pair, student=KINDS[pair][1](seed=2, **settings), teacher=KINDS[pair][0] and _one_level(pair))
    batch = tiny_batch(1)
    losses = learn(method, student, batch)
    assert math.isfinite(float(losses.total().detach()))
    losses.total().backward()


def _one_level(pair):
    return KINDS[pair][0](seed=1, channels=(8,), strides=(8,))


def test_a_teacher_with_more_classes_trains_the_assistant_in_its_labels():
    batch = tiny_batch(2)
    for pair in ("regions_to_dense", "dense_to_dense"):
        teacher = KINDS[pair][0](classes=("b", "c", "a"), seed=1)
        student, method = build(pair, teacher=teacher, assistant_warmup_iters=0)
        assert [target.labels.tolist() for target in method._in_teachers_labels(batch).targets] == [
            [[2, 0][label] for label in target.labels.tolist()] for target in batch.targets
        ]
        assert math.isfinite(float(learn(method, student, batch).total().detach()))


def test_the_composition_runs_the_teachers_head_once_for_a_two_stage_student():
    student, method = build("regions_to_regions")
    other = type("Other", (HEAD,), {"slug": "other"})(method.teacher, student, pair="regions_to_regions")
    together, batch, runs = Composition([method, other], student), tiny_batch(2), []
    regions = method.teacher.detector.regions
    method.teacher.detector.regions = lambda *given: runs.append(1) or regions(*given)
    together.step(student, batch, together.teach(batch), CLOCK)
    assert len(runs) == 1


# ----------------------------------------------------------------------------------------------- the dense assistant


def test_the_dense_assistant_matches_points_by_centre_and_size():
    assistant = DenseAssistant(8, 2, (8, 16), convs=1)
    tower = assistant.tower(Features((torch.zeros(1, 8, 16, 16), torch.zeros(1, 8, 8, 8)), (8, 16)))
    points, strides, limits = assistant._points(tower, torch.zeros(1))
    assert points[:2].tolist() == [[4.0, 4.0], [12.0, 4.0]]
    boxes = torch.tensor([[8.0, 16.0, 40.0, 48.0], [0.0, 0.0, 128.0, 128.0], [24.0, 24.0, 40.0, 40.0]])
    matched = assistant._matched(points, strides, limits, boxes)
    small = matched[strides == 8].reshape(16, 16)
    assert small[3:5, 3:5].tolist() == [[2, 2], [2, 2]]  # the smaller of two boxes
    assert small[3:5, 2].tolist() == [0, 0]  # beside the smaller one
    assert small[3:5, 1].tolist() == [-1, -1]  # inside the box, but 12 pixels from its centre
    assert not (small == 1).any()  # its farthest side is beyond 64 pixels
    large = matched[strides == 16].reshape(8, 8)
    assert large[3:5, 3:5].tolist() == [[1, 1], [1, 1]]
    assert not (large == 0).any()
    assert (assistant._matched(points, strides, limits, boxes[:0]) == -1).all()


def test_the_dense_assistant_learns():
    torch.manual_seed(0)
    assistant, batch = DenseAssistant(8, 2, (8, 16), convs=1), tiny_batch(2)
    features = Features((torch.randn(2, 8, 8, 8), torch.randn(2, 8, 4, 4)), (8, 16))
    optimizer, losses = torch.optim.Adam(assistant.parameters(), lr=1e-2), []
    for _ in range(30):
        tower = assistant.tower(features)
        loss = assistant.loss(tower, assistant.predict(tower), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


# ------------------------------------------------------------------------------------------------------ real detectors


TWO_STAGE = "resnet10t,channels=8-16-32-64,stem=8,neck=16,mlp=16,proposals=20,rois=16"
DENSE = "resnet10t,channels=8-16-32-64,stem=8,neck=32,levels=3-5,convs=1"


def test_real_detectors_assist():
    """A cascade with mask branches on a student with fewer levels than it pools from, a dense teacher, and no teacher."""
    batch = tiny_batch(2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cascade = Teacher(build_detector(f"cascade_mask_rcnn:{TWO_STAGE}", ["a", "b"]))
        dense = Teacher(build_detector(f"gfl:{DENSE}", ["a", "b"]))
        student = build_detector(f"retinanet:{DENSE}", ["a", "b"]).train()
    for settings in (
        {"teacher": cascade},
        {"teacher": dense, "pair": "dense_to_dense"},
        {"teacher": None, "pair": "teacher_free", "width": 16},
    ):
        method = HEAD(settings.pop("teacher"), student, **settings)
        losses = learn(method, student, batch)
        assert all(float(term.detach()) > 0 for term in losses.terms.values())
        losses.total().backward()
        assert [name for name, parameter in method.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"akd_weight": -1.0}, "akd_weight=-1.0 is not a number, 0 or more, or none"),
        (
            {"assistant_weight": 0.0, "akd_weight": 0.0, "ckd_weight": 0.0},
            "assistant_weight, akd_weight, ckd_weight are all 0; nothing would be distilled",
        ),
        ({"tower_depth": 9}, "it looks at the towers of the student tinydense:patches after 9 blocks, but they have 2"),
        (
            {"pair": "teacher_free", "assistant_weight": 0.0},
            "assistant_weight=0 leaves the assistants untrained, and without a teacher the student would learn from random "
            "features; give a weight above 0",
        ),
        (
            {"pair": "teacher_free", "neck_weight": 1.0},
            "neck_weight compares with a teacher's neck, but pair=teacher_free has no teacher",
        ),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(DetdistillError) as error:
        build(**settings)
    assert str(error.value).startswith(f"head: {message}")


def test_refused_pairs_are_told_why():
    refused = [
        ({"student": TinyRegions()}, "the student tinyregions:patches predicts regions; it needs a student that predicts dense"),
        ({"teacher": TinyDense()}, "the teacher tinydense:patches predicts dense; it needs a teacher that predicts regions"),
        ({"pair": "dense_to_dense", "student": TinyQueries()}, "it needs a student that predicts dense"),
        ({"teacher": TinyRegions(classes=("a",))}, "the teacher does not know b; its classes: a"),
        ({"teacher": _uneven()}, "an assistant that reads the student's features needs a teacher whose neck has equal channels"),
        (
            {"pair": "dense_to_dense", "student": TinyDense(channels=(8,), strides=(8,))},
            "reads levels of strides (8, 16), but the student tinydense:patches has (8,); give the student levels= with all",
        ),
    ]
    for settings, message in refused:
        with pytest.raises(PairError) as error:
            build(**settings)
        assert message in str(error.value)
    build(teacher=TinyRegions(classes=("a",)), assistant_weight=0.0)  # features alone need no classes


def _uneven():
    detector = TinyRegions()
    detector.spec = replace(detector.spec, channels=(8, 12))
    return detector
