import dataclasses
import math

import pytest
import torch

from detdistill.cache.absent_teacher import AbsentTeacher
from detdistill.cache.storage import CacheError
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.losses import kd_detr_loss, kd_detr_terms, kd_detr_weights
from detdistill.methods.kd_detr import KDDETR
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Clock, Look, Losses
from detdistill.training.from_cache import why_live_teacher
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method, without_boxes
from tests.tiny import TinyQueries, tiny_batch

TINY = "resnet10t,channels=8-16-32-64,stem=8,dim=32,heads=4,ffn=64,queries=10,encoder=1,decoder=2"
FAMILIES = ["detr", "conditional_detr", "dab_detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine"]
CLOCK = Clock(0, 10)


@pytest.fixture
def golden():
    return Golden("kd_detr")


# ------------------------------------------------------------------------------------------------ against released code


def test_values_and_gradients_equal_the_released_code(golden):
    hyper = golden.meta["hyper"]
    total, leaves = torch.zeros((), dtype=torch.float64), {}
    for group, short in (("specific", "auxrf"), ("general", "randomrf")):
        logits = golden[f"in_student_{group}_logits"].requires_grad_()
        boxes = golden[f"in_student_{group}_boxes"].requires_grad_()
        leaves |= {f"{group}_logits": logits, f"{group}_boxes": boxes}
        theirs = golden[f"in_teacher_{group}_logits"][-1], golden[f"in_teacher_{group}_boxes"][-1]
        weights = kd_detr_weights(theirs[0])
        terms = kd_detr_terms(logits, boxes, *theirs, weights, hyper["T"])
        assert_golden(weights, golden[f"out_weight_{group}"])
        for name, value in (("cls", terms.cls), ("bbox", terms.l1), ("giou", terms.giou)):
            assert_golden(value.sum(), golden[f"out_{group}_{name}"])
            if f"out_{group}_{name}_last_layer" in golden:
                assert_golden(value[-1], golden[f"out_{group}_{name}_last_layer"])
        factors = [hyper["weights"][f"loss_kd_{short}_{name}"] for name in ("cls", "bbox", "giou")]
        total = total + kd_detr_loss(terms, *factors)
    assert_golden(total, golden["out_total"])
    gradients = torch.autograd.grad(total, list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        assert_golden(gradient, golden[f"grad_student_{name}"])


# ------------------------------------------------------------------------------------------------------- invariants


def outputs(layers=3, images=2, queries=5, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(layers, images, queries, classes, generator=generator, dtype=torch.float64)
    boxes = 0.2 + 0.4 * torch.rand(layers, images, queries, 4, generator=generator, dtype=torch.float64)
    return logits, boxes


def test_the_same_outputs_lose_nothing():
    logits, boxes = outputs(layers=1)
    mine = logits.clone().requires_grad_(), boxes.clone().requires_grad_()
    terms = kd_detr_terms(*mine, logits[0], boxes[0], kd_detr_weights(logits[0]))
    assert float(terms.cls.detach().abs().max()) < 1e-12
    assert float(terms.l1.detach()) == 0
    assert float(terms.giou.detach()) < 1e-3
    (slope,) = torch.autograd.grad(terms.cls.sum(), mine[0], retain_graph=True)
    assert float(slope.abs().max()) < 1e-12
    (slope,) = torch.autograd.grad(terms.l1.sum(), mine[1])
    assert not slope.any()


def test_class_term_by_hand():
    """One query, two classes, T = 1: w T^2 / 2 times the divergence of (0.8, 0.2) from (0.5, 0.5)."""
    logits, boxes = torch.tensor([[[[0.0, 0.0]]]]), torch.tensor([[[[0.5, 0.5, 0.2, 0.2]]]])
    theirs = torch.tensor([[[math.log(4.0), 0.0]]])
    terms = kd_detr_terms(logits, boxes, theirs, boxes[0], torch.full((1, 1), 3.0), temperature=1.0)
    divergence = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert float(terms.cls) == pytest.approx(3 * divergence / 2, rel=1e-6)
    mean = kd_detr_terms(logits, boxes, theirs, boxes[0], torch.full((1, 1), 3.0), 1.0, "weighted_mean")
    assert float(mean.cls) == pytest.approx(divergence, rel=1e-6)


def test_nearly_equal_scores_keep_their_digits_in_float32():
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(1, 50, 80, generator=generator, dtype=torch.float64)
    mine = theirs + 0.01 * torch.randn(1, 1, 50, 80, generator=generator, dtype=torch.float64)
    boxes = torch.full((1, 1, 50, 4), 0.5, dtype=torch.float64)
    both = []
    for dtype in (torch.float32, torch.float64):
        logits = mine.to(dtype).requires_grad_()
        places = boxes.to(dtype)
        weights = torch.ones(1, 50, dtype=dtype)
        terms = kd_detr_terms(logits, places, theirs.to(dtype), places[0], weights, temperature=10.0)
        terms.cls.sum().backward()
        both.append((terms.cls, logits.grad))
    # The formula p (log p - log s) as it stands is off by 9 percent here.
    assert float(both[0][0].detach()) == pytest.approx(float(both[1][0].detach()), rel=1e-3)
    torch.testing.assert_close(both[0][1].double(), both[1][1], rtol=1e-3, atol=1e-7)


def test_a_constant_on_all_logits_of_a_query_moves_only_the_weights():
    logits, boxes = outputs()
    theirs, places = outputs(layers=1, seed=1)
    w = kd_detr_weights(theirs[0])
    expected = kd_detr_terms(logits, boxes, theirs[0], places[0], w)
    for mine, other in ((logits + 3, theirs[0]), (logits, theirs[0] - 2)):
        torch.testing.assert_close(kd_detr_terms(mine, boxes, other, places[0], w).cls, expected.cls)
    assert bool((kd_detr_weights(theirs[0] - 2) < w).all())


def test_weights_scale_the_class_term_and_leave_the_boxes():
    logits, boxes = outputs()
    theirs, places = outputs(layers=1, seed=1)
    w = kd_detr_weights(theirs[0])
    once, thrice = (kd_detr_terms(logits, boxes, theirs[0], places[0], factor * w) for factor in (1, 3))
    torch.testing.assert_close(thrice.cls, 3 * once.cls)
    torch.testing.assert_close(thrice.l1, once.l1)
    torch.testing.assert_close(thrice.giou, once.giou)
    mean = kd_detr_terms(logits, boxes, theirs[0], places[0], w, cls_reduction="weighted_mean")
    torch.testing.assert_close(mean.cls, once.cls * 4 / w.sum())
    torch.testing.assert_close(mean.l1, once.l1)


def test_weights_of_softmax_outputs_leave_the_background_out():
    logits = torch.tensor([[[0.0, 0.0, math.log(2.0)]]])
    assert float(kd_detr_weights(logits, softmax=True)) == pytest.approx(0.25)
    assert float(kd_detr_weights(logits)) == pytest.approx(2 / 3)


def test_no_gradient_to_the_teacher():
    logits, boxes = (value.requires_grad_() for value in outputs())
    theirs, places = (value.requires_grad_() for value in outputs(layers=1, seed=1))
    loss = kd_detr_loss(kd_detr_terms(logits, boxes, theirs[0], places[0], kd_detr_weights(theirs[0])))
    gradients = torch.autograd.grad(loss, [logits, boxes, theirs, places], allow_unused=True)
    assert [gradient is None for gradient in gradients] == [False, False, True, True]


# ---------------------------------------------------------------------------------------------------------- the method


def test_contract():
    assert check_method(KDDETR, general_points=6) == ["queries 8 -> queries 8"]


@pytest.mark.parametrize(
    "settings",
    [
        {"general_points": 0},
        {"general_points": 4, "specific_points": False, "rebalance": False},
        {"general_points": 4, "project": True, "cls_reduction": "weighted_mean"},
    ],
)
def test_contract_of_its_options(settings):
    expected = ["queries 8 -> queries 8"]
    if "project" in settings:
        expected.append("queries 16 -> queries 8")
    assert check_method(KDDETR, **settings) == expected


class Recorder(TinyQueries):
    """Notes the queries it was asked to decode."""

    def decode(self, features, seed, batch, attention=False):
        self.__dict__.setdefault("asked", []).append(seed)
        return super().decode(features, seed, batch, attention)


def pair(**settings):
    teacher, student = Teacher(Recorder(seed=1)), Recorder(seed=2)
    method = KDDETR(teacher, student, **{"general_points": 7} | settings)
    teacher.detector.asked.clear()
    student.asked.clear()
    return method, teacher, student


def learn(method, student, batch):
    return method.learn(student, student(batch), method.teach(batch), batch, CLOCK)


def test_both_decode_the_same_fresh_points():
    method, teacher, student = pair()
    batch = tiny_batch(2)
    drawn = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        teacher.forget()
        teacher.detector.asked.clear()
        student.asked.clear()
        learn(method, student, batch)
        own, general = teacher.detector.asked
        _, specific, also_general = student.asked
        for part in ("content", "position", "reference"):
            torch.testing.assert_close(getattr(specific, part), getattr(own, part), rtol=0, atol=0)
            torch.testing.assert_close(getattr(also_general, part), getattr(general, part), rtol=0, atol=0)
            assert not getattr(specific, part).requires_grad
        assert general.reference.shape == (2, 7, 4)
        assert torch.equal(general.reference[0], general.reference[1])  # one set for all images
        drawn.append(general)
    assert not torch.equal(drawn[0].content, drawn[1].content)
    assert torch.equal(drawn[0].content, drawn[2].content)
    assert abs(float(torch.cat([one.reference for one in drawn]).logit().mean())) < 0.5


def test_terms_are_those_of_the_pure_function():
    method, teacher, student = pair(general_points=0, temperature=3.0, cls_weight=0.5, l1_weight=2.0, giou_weight=4.0)
    batch = tiny_batch(2)
    with torch.no_grad():
        losses = learn(method, student, batch)
        theirs = teacher.observe(batch, Look(prediction=True)).prediction
        mine = student.decode(student.features(batch), theirs.seed, batch)
    w = kd_detr_weights(theirs.logits[-1])
    terms = kd_detr_terms(mine.logits, mine.boxes_cxcywh01, theirs.logits[-1], theirs.boxes_cxcywh01[-1], w, 3.0)
    assert list(losses.terms) == ["specific_cls_sum", "specific_l1", "specific_giou"]
    torch.testing.assert_close(losses.total(), kd_detr_loss(terms, 0.5, 2.0, 4.0))
    torch.testing.assert_close(losses.monitors["specific_weight"], w.mean())
    plain = pair(general_points=0, temperature=3.0, rebalance=False)[0]
    with torch.no_grad():
        again = learn(plain, student, batch).terms["specific_l1"]
    ones = kd_detr_terms(mine.logits, mine.boxes_cxcywh01, theirs.logits[-1], theirs.boxes_cxcywh01[-1], torch.ones_like(w))
    torch.testing.assert_close(again, 5 * ones.l1.sum())


def test_a_student_equal_to_the_teacher_has_nothing_to_learn():
    teacher, student = Teacher(TinyQueries(seed=1)), TinyQueries(seed=1)
    student.layers = student.layers[:1]  # the teacher's last layer is its only one, so that all student layers equal it
    teacher.detector.layers = teacher.detector.layers[:1]
    terms = learn(KDDETR(teacher, student), student, tiny_batch(2)).terms
    for name in ("specific_cls_sum", "specific_l1", "general_cls_sum", "general_l1"):
        assert float(terms[name].detach().abs()) < 1e-4, name
    assert float(terms["specific_giou"].detach()) < 2e-3


def test_detections_are_the_same_with_and_without_the_groups():
    method, _, student = pair()
    student.eval()
    batch = tiny_batch(2)
    with torch.no_grad():
        before = student.detect(student(batch).prediction, batch)
        seen = student(batch)
        method.learn(student, seen, method.teach(batch), batch, CLOCK)
        after = student.detect(student(batch).prediction, batch)
    for one, two, three in zip(before, student.detect(seen.prediction, batch), after, strict=True):
        assert torch.equal(one.boxes_xyxy, two.boxes_xyxy)
        assert torch.equal(one.scores, three.scores)


def test_boxes_of_the_images_do_not_matter():
    method, teacher, student = pair()
    batch = tiny_batch(2)
    found = []
    for images in (range(0), range(1), range(2)):
        torch.manual_seed(0)
        teacher.forget()
        found.append(float(learn(method, student, without_boxes(batch, images)).total().detach()))
    assert found[0] == found[1] == found[2]


def test_classes_are_compared_by_name():
    batch = tiny_batch(2)
    teacher = TinyQueries(classes=("b", "c", "a"), seed=1)
    other = TinyQueries(classes=("a", "b"), seed=1)
    other.load_state_dict(
        {**teacher.state_dict(), **{k: teacher.state_dict()[k][[2, 0]] for k in ("logits.weight", "logits.bias")}}
    )
    student = TinyQueries(seed=2)
    found = []
    for one in (teacher, other):
        torch.manual_seed(0)
        found.append(learn(KDDETR(Teacher(one), student), student, batch).total())
    torch.testing.assert_close(found[0], found[1])


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"general_points": 0, "specific_points": False},
            "specific_points=false and general_points=0 leave no points to distil; turn one on",
        ),
        ({"temperature": 0.0}, "temperature=0.0 is not a number above 0"),
        ({"l1_weight": -1.0}, "l1_weight=-1.0 is not a number, 0 or more"),
        (
            {"cls_weight": 0.0, "l1_weight": 0.0, "giou_weight": 0.0},
            "cls_weight, l1_weight, giou_weight are all 0; nothing would be distilled",
        ),
        ({"cls_reduction": "mean"}, "cls_reduction=mean is not one of sum, weighted_mean"),
    ],
)
def test_settings_out_of_range(settings, expected):
    with pytest.raises(DetdistillError) as error:
        KDDETR(Teacher(TinyQueries(seed=1)), TinyQueries(), **settings)
    assert str(error.value) == f"kd_detr: {expected}"


def test_other_classes_and_other_class_outputs_are_refused():
    with pytest.raises(PairError, match="the teacher does not know z"):
        KDDETR(Teacher(TinyQueries(classes=("a", "b"))), TinyQueries(classes=("a", "z")))
    softmax = TinyQueries()
    softmax.spec = dataclasses.replace(softmax.spec, softmax=True)
    with pytest.raises(
        PairError, match=r"the teacher \S+ has softmax and the student tinyqueries:patches sigmoid classes; methods"
    ):
        KDDETR(Teacher(softmax), TinyQueries())


def test_one_class_is_refused_where_a_softmax_says_nothing():
    teacher, student = (TinyQueries(classes=("a",)) for _ in range(2))
    with pytest.raises(PairError, match=r"a softmax over one class \(a\) is always 1.*set kd_detr,cls_weight=0"):
        KDDETR(Teacher(teacher), student)
    KDDETR(Teacher(teacher), student, cls_weight=0.0)


def test_queries_of_another_width_are_refused():
    expected = r"reads contents of 8 channels \(these have 16\) and position embeddings of 8 channels .* set kd_detr,project=true"
    with pytest.raises(PairError, match=expected):
        KDDETR(Teacher(TinyQueries(channels=(16, 16))), TinyQueries())


def test_without_the_live_teacher_only_the_specific_points_work():
    live, student, batch = Teacher(TinyQueries(seed=1)), TinyQueries(seed=2), tiny_batch(2)
    described = dataclasses.replace(live.spec, queries=live.queries)
    absent = AbsentTeacher(described, live.fingerprint)
    with pytest.raises(PairError) as error:
        KDDETR(absent, student)
    assert str(error.value).partition("; methods that could serve")[0] == (
        "kd_detr: the general points are random queries that the live teacher decodes anew in each step, which a cache does not "
        "hold (kd_detr,general_points=0 turns them off; the specific points learn from the cache); "
        "give the teacher too (--teacher tinyqueries:patches)"
    )
    online, offline = (KDDETR(teacher, student, general_points=0) for teacher in (live, absent))
    taught = online.teach(batch)
    expected = online.learn(student, student(batch), taught, batch, CLOCK).total()
    torch.testing.assert_close(offline.learn(student, student(batch), taught, batch, CLOCK).total(), expected)
    # What the teacher's queries are made of is in the cache, so another width is refused, or bridged, before the first image.
    other = TinyQueries(channels=(4, 4))
    with pytest.raises(PairError, match=r"contents of 4 channels \(these have 8\)"):
        KDDETR(absent, other, general_points=0)
    bridged = KDDETR(absent, other, general_points=0, project=True)
    alike = KDDETR(live, other, general_points=0, project=True)
    alike.load_state_dict(bridged.state_dict())
    assert sum(p.numel() for p in bridged.parameters()) == 2 * (8 * 4 + 4)
    torch.testing.assert_close(
        bridged.learn(other, other(batch), taught, batch, CLOCK).total(),
        alike.learn(other, other(batch), taught, batch, CLOCK).total(),
    )
    with pytest.raises(PairError, match="predicts dense; it needs a teacher that predicts queries"):
        KDDETR(AbsentTeacher(dataclasses.replace(described, family="dense"), ""), student, general_points=0)
    with pytest.raises(CacheError, match="the cache has no description of its queries, because the cache is from an earlier"):
        KDDETR(AbsentTeacher(live.spec, live.fingerprint), student, general_points=0)


def test_a_run_from_a_cache_says_why_it_needs_the_teacher():
    assert why_live_teacher("pkd") == why_live_teacher("pkd+kd_detr,general_points=0") == ""
    assert why_live_teacher("pkd+kd_detr,general_points=20").startswith("kd_detr: the general points are random queries")


# -------------------------------------------------------------------------------------------------------- real adapters


def build(family, changes="", seed=0):
    torch.manual_seed(seed)
    return build_detector(f"{family}:{TINY}{changes}", ["a", "b"])


def check_real(teacher, student, **settings):
    """A step: finite, and gradients reach the student's decoder and the method's layers, none the teacher."""
    batch = tiny_batch(2, 128)
    method = KDDETR(Teacher(teacher), student.train(), general_points=5, **settings)
    losses = method.step(student, batch, method.teach(batch), CLOCK)
    kinds = [f"{group}_{name}" for group in ("specific", "general") for name in ("cls_sum", "l1", "giou")]
    assert set(kinds) <= set(losses.terms)
    taught = method.teach(batch)
    only = Losses({name: losses.terms[name] for name in kinds}).total()
    assert bool(torch.isfinite(only))
    only.backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert any("decoder" in name for name in reached)
    assert any("backbone" in name for name in reached)
    assert all(p.grad is not None for p in method.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher.training
    return method, taught


@pytest.mark.parametrize("family", FAMILIES)
def test_one_family_of_other_depth_and_number_of_queries(family):
    torch.manual_seed(0)
    teacher = build_detector(f"{family}:{TINY.replace('queries=10', 'queries=14').replace('decoder=2', 'decoder=3')}", ["a", "b"])
    method, taught = check_real(teacher, build(family, seed=1))
    assert taught.logits.shape[1] == 14
    assert not list(method.parameters())


@pytest.mark.parametrize(
    ("teacher", "student", "gap"),
    [
        ("deformable_detr", "rt_detr", "reference boxes (these have points)"),
        ("rt_detr", "deformable_detr", "position embeddings"),
        ("dab_detr", "conditional_detr", "position embeddings"),
        ("d_fine", "dab_detr", ""),
        ("rt_detr", "rt_detr_v2", ""),
        ("deformable_detr", "conditional_detr", ""),
    ],
)
def test_between_families(teacher, student, gap):
    theirs, mine = build(teacher), build(student, seed=1)
    if gap:
        with pytest.raises(PairError) as error:
            KDDETR(Teacher(theirs), mine)
        assert f"the student's decoder reads {gap}" in str(error.value)
        method, _ = check_real(theirs, mine, project=True)
        assert list(method.parameters())
    else:
        check_real(theirs, mine)


def test_points_that_only_the_teacher_can_derive_are_not_shared():
    teacher, student = build("conditional_detr"), build("deformable_detr")
    with pytest.raises(PairError, match=r"derives its reference points from position embeddings.*general_points=0"):
        KDDETR(Teacher(teacher), student)
    KDDETR(Teacher(teacher), student, general_points=0)


def test_detr_against_a_sigmoid_family_is_refused():
    with pytest.raises(PairError, match=r"has softmax and the student conditional_detr:\S+ sigmoid classes; methods that could"):
        KDDETR(Teacher(build("detr")), build("conditional_detr"))


def test_building_the_method_leaves_the_student_alone():
    student = build("rt_detr").train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    teacher = Teacher(build("rt_detr", seed=1))
    state = torch.get_rng_state()
    KDDETR(teacher, student)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(module.training for module in student.modules())
