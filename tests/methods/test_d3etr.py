import dataclasses

import pytest
import torch

from detdistill.cache.absent_teacher import AbsentTeacher
from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.losses import d3etr_loss, d3etr_match, d3etr_terms
from detdistill.methods.d3etr import D3ETR, D3ETRQueries, D3ETRWeights, gathered_attention, spread_attention
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Clock, Losses
from tests.detectors.dense.shared import unequal_batch
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import (
    _Pair,
    assert_same,
    check_gradients,
    check_half_precision,
    check_method,
    check_state_dict,
    observe,
    without_boxes,
)
from tests.tiny import TinyQueries, tiny_batch

TINY = "resnet10t,channels=8-16-32-64,stem=8,dim=32,heads=4,ffn=64,queries=10,encoder=1,decoder=2"
DENSE = ["detr", "conditional_detr", "dab_detr"]
DEFORMABLE = ["deformable_detr", "rt_detr", "rt_detr_v2", "d_fine"]
CLOCK = Clock(0, 10)
ALL = ("cls", "l1", "giou", "self_attention", "cross_attention")


@pytest.fixture
def golden():
    return Golden("d3etr")


# ------------------------------------------------------------------------------------------ against the re-implementation


def test_values_matches_and_gradients_equal_the_reimplementation(golden):
    parts = ("logits", "boxes", "self_attn", "cross_attn")
    teacher = D3ETRQueries(*(golden[f"in_teacher_{part}"] for part in parts))
    costs = [golden.meta["hyper"]["cost"][name] for name in ("cls", "l1", "giou")]
    given = golden.meta["hyper"]["weights"]
    leaves, total = {}, torch.zeros((), dtype=torch.float64)
    for matching, prefix in (("adaptive", "distill"), ("fixed", "teacher")):
        inputs = {part: golden[f"in_student_{matching}_{part}"].requires_grad_() for part in parts}
        leaves |= {f"{matching}_{part}": value for part, value in inputs.items()}
        student = D3ETRQueries(*inputs.values())
        match = torch.arange(student.logits.shape[2]).expand(student.logits.shape[:3])
        if matching == "adaptive":
            match = d3etr_match(student, teacher, costs)
            assert torch.equal(match, golden["out_match"])
        terms = d3etr_terms(student, teacher, match)
        for name, value in zip(("class", "bbox", "giou", "self_attn", "cross_attn"), terms, strict=True):
            assert_golden(value, golden[f"out_{matching}_{name}"])
        names = ("class", "bbox", "giou", "self_attn", "cross_attn")
        weights = D3ETRWeights(*(given[f"{prefix}_loss_{name}"] for name in names))
        total = total + sum(d3etr_loss(terms, weights).values())
    assert_golden(total, golden["out_total"])
    for name, gradient in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
        assert_golden(gradient, golden[f"grad_student_{name}"])


# ------------------------------------------------------------------------------------------------------- invariants


def queries(count=6, layers=2, images=2, classes=3, cells=7, heads=2, seed=0, each=True):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(layers, images, *shape, generator=generator, dtype=torch.float64)

    boxes = torch.cat([0.3 + 0.4 * normal(count, 2).sigmoid(), 0.1 + 0.3 * normal(count, 2).sigmoid()], dim=-1)
    cross = normal(heads, count, cells).softmax(-1)
    among = normal(heads, count, count).softmax(-1)
    return D3ETRQueries(2 * normal(count, classes), boxes, among, cross if each else cross.sum(dim=3))


def permuted(one, order):
    cross = one.cross_attention
    return D3ETRQueries(
        one.logits[:, :, order],
        one.boxes_cxcywh01[:, :, order],
        one.self_attention[:, :, :, order][..., order],
        cross[:, :, :, order] if cross.ndim == 5 else cross,
    )


def straight(one):
    return torch.arange(one.logits.shape[2]).expand(one.logits.shape[:3])


ORDER = torch.tensor([3, 0, 5, 1, 4, 2])


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("softmax", [True, False])
def test_the_same_arrays_are_matched_to_themselves(each, softmax):
    one = queries(each=each)
    mine = D3ETRQueries(*(value.clone().requires_grad_() for value in one))
    match = d3etr_match(mine, one, softmax=softmax)
    assert torch.equal(match, straight(one))
    terms = d3etr_terms(mine, one, match, softmax=softmax)
    for zero in (terms.l1, terms.self_attention, terms.cross_attention):
        assert not zero.any()
    assert float(terms.giou.max().detach()) < 1e-3
    score = one.logits.softmax(-1) if softmax else one.logits.sigmoid()
    entropy = -score * score.log() - (0 if softmax else (1 - score) * (1 - score).log())
    torch.testing.assert_close(terms.cls.detach(), entropy.sum(dim=-1).mean(dim=(1, 2)))
    (slope,) = torch.autograd.grad(terms.cls.sum(), mine.logits)
    assert float(slope.abs().max()) < 1e-12


@pytest.mark.parametrize("each", [True, False])
def test_permuting_either_side_leaves_the_adaptive_loss(each):
    mine, theirs = queries(seed=1, each=each), queries(seed=2, each=each)
    expected = d3etr_terms(mine, theirs, d3etr_match(mine, theirs))
    for one, other in ((permuted(mine, ORDER), theirs), (mine, permuted(theirs, ORDER))):
        match = d3etr_match(one, other)
        assert bool((match.sort(dim=-1).values == torch.arange(6)).all())
        for name, value in zip(ALL, d3etr_terms(one, other, match), strict=True):
            torch.testing.assert_close(value, getattr(expected, name), msg=name)
    fixed, moved = (d3etr_terms(one, theirs, straight(one)) for one in (mine, permuted(mine, ORDER)))
    for name in ("cls", "l1", "giou", "self_attention"):
        assert not torch.allclose(getattr(fixed, name), getattr(moved, name)), name


def test_self_attention_is_permuted_on_both_axes():
    theirs = queries()
    mine = permuted(theirs, ORDER)
    assert not d3etr_terms(mine, theirs, d3etr_match(mine, theirs)).self_attention.any()
    rows_only = mine._replace(self_attention=theirs.self_attention[:, :, :, ORDER])
    assert float(d3etr_terms(rows_only, theirs, d3etr_match(mine, theirs)).self_attention.min()) > 1e-4


def test_matching_is_the_cheapest_and_blind_to_attention():
    mine, theirs = queries(count=3, layers=1, images=1, seed=1), queries(count=3, layers=1, images=1, seed=2)
    found = d3etr_match(mine, theirs, (1.0, 0.0, 0.0))[0, 0]
    x, p = mine.logits[0, 0], theirs.logits[0, 0].sigmoid()
    cost = -(p[None] * x.sigmoid().log()[:, None] + (1 - p[None]) * (1 - x.sigmoid()).log()[:, None]).sum(-1)
    best = min(
        ([a, b, c] for a in range(3) for b in range(3) for c in range(3) if len({a, b, c}) == 3),
        key=lambda order: float(cost[range(3), order].sum()),
    )
    assert found.tolist() == best
    blind = mine._replace(self_attention=None, cross_attention=None)
    assert torch.equal(d3etr_match(blind, theirs), d3etr_match(mine, theirs))


@pytest.mark.parametrize(("count", "others"), [(4, 6), (6, 4)])
def test_other_numbers_of_queries_pair_the_smaller_number(count, others):
    mine, theirs = queries(count, seed=1), queries(others, seed=2)
    match = d3etr_match(mine, theirs)
    assert bool(((match >= 0).sum(dim=-1) == 4).all())
    terms = d3etr_terms(mine, theirs, match)
    for layer in range(2):  # by hand: means over the pairs
        distances, among, cross = [], [], []
        for image in range(2):
            rows = torch.nonzero(match[layer, image] >= 0).flatten()
            partner = match[layer, image, rows]
            assert len(set(partner.tolist())) == 4
            distances.append(
                (mine.boxes_cxcywh01[layer, image, rows] - theirs.boxes_cxcywh01[layer, image, partner]).abs().sum(-1)
            )
            first, second = mine.self_attention[layer, image], theirs.self_attention[layer, image]
            among.append((first[:, rows][..., rows] - second[:, partner][..., partner]).square().mean())
            first, second = mine.cross_attention[layer, image], theirs.cross_attention[layer, image]
            cross.append((first[:, rows] - second[:, partner]).square().mean())
        torch.testing.assert_close(terms.l1[layer], torch.cat(distances).mean())
        torch.testing.assert_close(terms.self_attention[layer], torch.stack(among).mean())
        torch.testing.assert_close(terms.cross_attention[layer], torch.stack(cross).mean())


def test_gradients_reach_the_student_only():
    mine, theirs = (D3ETRQueries(*(value.requires_grad_() for value in queries(seed=seed))) for seed in (1, 2))
    loss = sum(d3etr_loss(d3etr_terms(mine, theirs, d3etr_match(mine, theirs))).values())
    gradients = torch.autograd.grad(loss, [*mine, *theirs], allow_unused=True)
    assert [gradient is None for gradient in gradients] == [False] * 4 + [True] * 4
    assert all(bool(gradient.any()) for gradient in gradients[:4])


def test_maps_find_their_place_under_other_padding():
    small, large = [(2, 3), (1, 2)], [(3, 4), (2, 2)]
    attention = torch.rand(2, 3, 1, 5, 8)
    maps = spread_attention(attention, small, summed=False)
    assert [tuple(level.shape) for level in maps] == [(3, 2, 1, 5, 2, 3), (3, 2, 1, 5, 1, 2)]
    assert torch.equal(gathered_attention(maps, small), attention)
    wide = gathered_attention(maps, large)
    assert wide.shape == (2, 3, 1, 5, 16)
    torch.testing.assert_close(wide.sum(), attention.sum())
    assert torch.equal(wide[0, 1, 0, 3, :12].view(3, 4)[:2, :3], attention[0, 1, 0, 3, :6].view(2, 3))
    assert torch.equal(gathered_attention(spread_attention(wide, large, summed=False), small), attention)
    summed = spread_attention(attention, small, summed=True)
    torch.testing.assert_close(gathered_attention(summed, small), attention.sum(dim=3))


# ---------------------------------------------------------------------------------------------------------- the method


def test_contract():
    assert check_method(D3ETR) == ["queries 8 -> queries 8"]


@pytest.mark.parametrize(
    "settings",
    [
        {"matching": "adaptive", "cross_maps": "each"},
        {"matching": "adaptive", "self_attention_weight": 0.0, "cross_attention_weight": 0.0},
    ],
)
def test_contract_of_its_options(settings):
    assert check_method(D3ETR, **settings) == ["queries 8 -> queries 8", "queries 16 -> queries 8"]


def test_learned_maps_between_widths():
    pair = _Pair(D3ETR, {"project": True, "average_heads": True}, TinyQueries, TinyQueries, 16)
    check_gradients(pair)
    check_state_dict(pair)
    check_half_precision(pair)


def build_pair(**settings):
    teacher, student = Teacher(TinyQueries(seed=1)), TinyQueries(seed=2)
    return D3ETR(teacher, student, **settings), teacher, student


def learn(method, student, batch):
    return method.learn(student, observe(method, student, batch), method.teach(batch), batch, CLOCK).terms


def test_terms_are_those_of_the_pure_functions():
    method, teacher, student = build_pair(self_attention_weight=3.0, cross_attention_weight=2.0, cross_maps="each", l1_weight=7.0)
    batch = tiny_batch(2)
    with torch.no_grad():
        found = learn(method, student, batch)
        features, other = student.features(batch), teacher.detector.features(batch)
        own = student.decode(features, student.seed(features, batch), batch, attention=True)
        wanted = teacher.detector.decode(other, teacher.detector.seed(other, batch), batch, attention=True)
        group = student.decode(features, wanted.seed, batch, attention=True)
        mine, theirs, fixed = (
            D3ETRQueries(q.logits, q.boxes_cxcywh01, q.self_attention, q.attention) for q in (own, wanted, group)
        )
    weights = D3ETRWeights(1.0, 7.0, 2.0, 3.0, 2.0)
    adaptive = d3etr_loss(d3etr_terms(mine, theirs, d3etr_match(mine, theirs)), weights)
    same = d3etr_loss(d3etr_terms(fixed, theirs, straight(fixed)), weights)
    expected = {f"adaptive_{k}": v for k, v in adaptive.items()} | {f"fixed_{k}": v for k, v in same.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_halves_and_terms_can_be_left_out():
    batch = tiny_batch(2)
    for matching in ("adaptive", "fixed"):
        method, _, student = build_pair(matching=matching)
        assert list(learn(method, student, batch)) == [f"{matching}_{name}" for name in ALL]
    method, _, student = build_pair(matching="adaptive", cross_attention_weight=0.0)
    assert list(learn(method, student, batch)) == [f"adaptive_{name}" for name in ALL[:4]]
    method, _, student = build_pair(matching="fixed", self_attention_weight=0.0)
    assert list(learn(method, student, batch)) == ["fixed_cls", "fixed_l1", "fixed_giou", "fixed_cross_attention"]


def test_a_student_equal_to_the_teacher_has_only_the_entropy_left():
    teacher, student = Teacher(TinyQueries(seed=1)), TinyQueries(seed=1)
    terms = learn(D3ETR(teacher, student), student, tiny_batch(2))
    for name, value in terms.items():
        if name.endswith("giou"):
            assert float(value.detach()) < 1e-2
        elif not name.endswith("cls"):
            assert float(value.detach()) < 1e-6, name


def test_detections_are_the_same_with_and_without_the_group():
    method, _, student = build_pair()
    student.eval()
    batch = tiny_batch(2)
    with torch.no_grad():
        before = student.detect(student(batch).prediction, batch)
        seen = observe(method, student, batch)
        method.learn(student, seen, method.teach(batch), batch, CLOCK)
        after = student.detect(student(batch).prediction, batch)
    for one, two, three in zip(before, student.detect(seen.prediction, batch), after, strict=True):
        assert torch.equal(one.boxes_xyxy, two.boxes_xyxy)
        assert torch.equal(one.scores, three.scores)


def test_boxes_of_the_images_do_not_matter():
    method, _, student = build_pair()
    batch = tiny_batch(2)
    found = [learn(method, student, without_boxes(batch, range(count))) for count in range(3)]
    for name in found[0]:
        assert float(found[0][name].detach()) == float(found[1][name].detach()) == float(found[2][name].detach())


def test_classes_are_compared_by_name():
    batch, student = tiny_batch(2), TinyQueries(seed=2)
    teacher, other = TinyQueries(classes=("b", "c", "a"), seed=1), TinyQueries(classes=("a", "b"), seed=1)
    state = teacher.state_dict()
    other.load_state_dict({**state, **{name: state[name][[2, 0]] for name in ("logits.weight", "logits.bias")}})
    first, second = (learn(D3ETR(Teacher(one), student), student, batch) for one in (teacher, other))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name])


def test_the_fixed_group_can_have_the_detection_loss_under_the_teachers_assignment():
    batch, student = tiny_batch(2), TinyQueries(seed=2)
    teacher = Teacher(TinyQueries(classes=("b", "c", "a"), seed=1))
    for matching in ("fixed", "both"):
        method = D3ETR(teacher, student, matching=matching, detection_weight=3.0)
        found = learn(method, student, batch)
        seed = method.teach(batch).seed
        group = student.decode(student.features(batch), seed, batch)
        labels = torch.tensor([2, 0])  # a and b among the teacher's classes
        named = batch.with_targets([dataclasses.replace(one, labels=labels[one.labels]) for one in batch.targets])
        with torch.no_grad():
            matched = teacher.detector.assign(teacher.detector(named).prediction, named)
        torch.testing.assert_close(found["fixed_detection"], 3 * student.loss(group, batch, matched).total())
        own = student.loss(group, batch, student.assign(group, batch)).total()
        assert not torch.isclose(found["fixed_detection"], 3 * own)  # the student would match others
    plain = learn(D3ETR(teacher, student), student, batch)
    assert plain.keys() == found.keys() - {"fixed_detection"}
    assert D3ETR(teacher, student).teach(batch).matched is None


def test_the_detection_loss_of_the_group_reaches_the_student_and_survives_a_cache():
    method, _, student = build_pair(detection_weight=1.0)
    batch = tiny_batch(2)
    taught = method.teach(batch)
    again = type(taught).stack(taught.split(2))
    seen = observe(method, student, batch)
    first, second = (method.learn(student, seen, one, batch, CLOCK).terms["fixed_detection"] for one in (taught, again))
    torch.testing.assert_close(first, second)
    first.backward()
    assert student.layers[0].weight.grad.any()
    assert student.content.grad is None


def test_softmax_classes_of_the_group():
    """DETR has one more output, the background, which is no label."""
    torch.manual_seed(0)
    teacher, student = (build_detector(f"detr:{TINY}", ["a", "b"]) for _ in range(2))
    method = D3ETR(Teacher(teacher), student, detection_weight=1.0, self_attention_weight=0.0, cross_attention_weight=0.0)
    assert float(learn(method, student, tiny_batch(2))["fixed_detection"].detach()) > 0


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"matching": "hungarian"}, "matching=hungarian is not one of both, adaptive, fixed"),
        ({"cross_maps": "all"}, "cross_maps=all is not one of each, sum, or none"),
        ({"giou_weight": -1.0}, "giou_weight=-1.0 is not a number, 0 or more"),
        (
            {"detection_weight": 1.0, "matching": "adaptive"},
            "detection_weight=1 is for fixed matching; set matching=both or fixed",
        ),
        ({"l1_cost": float("nan")}, "l1_cost=nan is not a number, 0 or more"),
        (
            dict.fromkeys([f"{name}_weight" for name in ALL], 0.0),
            "cls_weight, l1_weight, giou_weight, self_attention_weight, cross_attention_weight are all 0; nothing would be "
            "distilled",
        ),
    ],
)
def test_settings_out_of_range(settings, expected):
    with pytest.raises(DetdistillError) as error:
        build_pair(**settings)
    assert str(error.value) == f"d3etr: {expected}"


class Deep(TinyQueries):
    num_layers = 3


def test_pairs_that_cannot_be_compared_are_refused_with_a_way_out():
    softmax = TinyQueries()
    softmax.spec = dataclasses.replace(softmax.spec, softmax=True)
    coarse = TinyQueries(strides=(16, 32))
    cases = [
        (TinyQueries(), TinyQueries(classes=("a", "z")), "the teacher does not know z"),
        (softmax, TinyQueries(), "tinyqueries:patches has softmax and the student tinyqueries:patches sigmoid classes; methods"),
        (Deep(), TinyQueries(), "has 3 layers and the student 2; add decoder=3 to the student's name, or take a method that"),
        (coarse, TinyQueries(), "(16, 32) in teacher tinyqueries:patches and (8, 16) in student tinyqueries:patches; set cross_"),
        (TinyQueries(channels=(16, 16)), TinyQueries(), "contents of 8 channels (these have 16) and position embeddings of 8 ch"),
    ]
    for teacher, student, expected in cases:
        with pytest.raises(PairError) as error:
            D3ETR(Teacher(teacher), student)
        assert expected in str(error.value)
        assert "\n" not in str(error.value)


def test_without_the_live_teacher():
    live, student, batch = Teacher(TinyQueries(seed=1)), TinyQueries(seed=2), tiny_batch(2)
    absent = AbsentTeacher(dataclasses.replace(live.spec, queries=live.queries), live.fingerprint)
    with pytest.raises(PairError, match="has 2 layers and the student 3"):
        D3ETR(absent, Deep(seed=2))
    # Learned maps are built from the cache's description of the queries.
    other = TinyQueries(channels=(4, 4), seed=2)
    online, offline = (D3ETR(teacher, other, project=True, average_heads=True) for teacher in (live, absent))
    offline.load_state_dict(online.state_dict())
    taught = online.teach(batch)
    found = [m.learn(other, observe(m, other, batch), taught, batch, CLOCK).terms for m in (online, offline)]
    assert_same(*found, "")
    assert any(True for _ in offline.parameters())
    assert not list(D3ETR(absent, student).parameters())


# -------------------------------------------------------------------------------------------------------- real adapters


def build(family, seed=0, **changes):
    text = TINY
    for name, value in changes.items():
        start = text.index(f"{name}=")
        text = text.replace(text[start:].split(",")[0], f"{name}={value}")
    torch.manual_seed(seed)
    return build_detector(f"{family}:{text}", ["a", "b"])


def check_real(teacher, student, batch, **settings):
    """A step: finite terms; gradients reach encoder and decoder of the student, and none the teacher."""
    method = D3ETR(Teacher(teacher), student.train(), **settings)
    losses = method.step(student, batch, method.teach(batch), CLOCK)
    kinds = [f"{matching}_{name}" for matching in method.matchings for name in ALL if f"{matching}_{name}" in losses.terms]
    only = Losses({name: losses.terms[name] for name in kinds}).total()
    assert bool(torch.isfinite(only))
    only.backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None and bool(p.grad.any())}
    for part in ("decoder", "encoder", "backbone"):
        assert any(part in name for name in reached), part
    assert all(p.grad is not None for p in method.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    return kinds


@pytest.mark.parametrize("family", [*DENSE, *DEFORMABLE])
def test_one_family_with_other_numbers_of_queries(family):
    batch = tiny_batch(2, 128)
    both = [f"{matching}_{name}" for matching in ("adaptive", "fixed") for name in ALL]
    assert check_real(build(family, queries=14), build(family, seed=1), batch) == both


def test_between_families():
    batch = tiny_batch(2, 128)
    assert len(check_real(build("rt_detr"), build("d_fine", seed=1), batch)) == 10
    assert len(check_real(build("conditional_detr"), build("dab_detr", seed=1), batch, matching="adaptive")) == 5
    assert len(check_real(build("dab_detr"), build("conditional_detr", seed=1), batch, project=True)) == 10
    no_maps = {"self_attention_weight": 0.0, "cross_attention_weight": 0.0}
    mixed = build("deformable_detr"), build("conditional_detr", seed=1)
    with pytest.raises(PairError, match=r"the strides are .* set cross_attention_weight=0"):
        D3ETR(Teacher(mixed[0]), mixed[1])
    assert len(check_real(*mixed, batch, **no_maps)) == 6


def test_heads():
    few = build("detr", heads=2)
    with pytest.raises(PairError, match=r"has 2 heads and the student 4; set average_heads=true, or self_attention_weight=0"):
        D3ETR(Teacher(few), build("detr", seed=1))
    assert len(check_real(few, build("detr", seed=1), tiny_batch(2, 128), average_heads=True)) == 10


def test_a_detector_without_attention_maps_is_refused():
    adamixer = build_detector("adamixer:resnet10t,channels=8-16-32-64,stem=8,queries=4,decoder=2", ["a", "b"])
    for kind, given in (("self_attention", {}), ("cross_attention", {"self_attention_weight": 0.0})):
        reason = "AdaMixer samples points and has no attention maps"
        expected = rf"shows no {kind} maps of its features: .* {reason}; take a DETR that shows them, or set {kind}_weight=0$"
        with pytest.raises(PairError, match=expected):
            D3ETR(Teacher(adamixer), adamixer, **given)
    D3ETR(Teacher(adamixer), adamixer, self_attention_weight=0.0, cross_attention_weight=0.0)


@pytest.mark.parametrize("family", DEFORMABLE)
def test_scattered_attention_of_deformable_decoders(family):
    """Non-negative; at most one for each query and head, and one where every sample lies well inside."""
    detector = build(family).eval()
    batch = tiny_batch(2, 128)
    with torch.no_grad():
        features = detector.features(batch)
        seed = detector.seed(features, batch)
        center = torch.full_like(seed.reference, 0.5)
        center[..., 2:] = 0.05
        shown = detector.decode(features, seed, batch, attention=True)
        if family == "deformable_detr":  # its valid ratios and its offsets in cells of the coarsest level
            for layer in detector.model.model.decoder.layers:
                layer.encoder_attn.sampling_offsets.weight.zero_()
                layer.encoder_attn.sampling_offsets.bias.zero_()
        middle = detector.decode(features, dataclasses.replace(seed, reference=center), batch, attention=True)
    assert float(shown.attention.min()) >= 0
    assert float(shown.attention.sum(dim=-1).max()) < 1 + 1e-5
    first = middle.attention[0].sum(dim=(2, 3))  # [B, heads] over queries and cells
    torch.testing.assert_close(first, torch.full_like(first, shown.attention.shape[3]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*DENSE, *DEFORMABLE])
def test_self_attention_of_every_family(family):
    """Rows add up to one, and they are what the library's own plain form says."""
    detector = build(family).eval()
    batch, seen = unequal_batch(), []
    with torch.no_grad():
        features = detector.features(batch)
        seed = detector.seed(features, batch)
        plain = detector.decode(features, seed, batch)
        shown = detector.decode(features, seed, batch, attention=True)
        names = [name for name, _ in detector.model.model.decoder.layers[0].named_modules() if name.split(".")[-1] == "self_attn"]
        for layer in detector.model.model.decoder.layers:
            inner = layer.get_submodule(names[-1])
            inner.register_forward_hook(lambda module, given, result: seen.append(result[1]))
        detector.config._attn_implementation = "eager"
        detector.decode(features, seed, batch)
    assert plain.self_attention is None
    assert shown.self_attention.shape == (2, 3, 4, 10, 10)
    torch.testing.assert_close(shown.self_attention.sum(dim=-1), torch.ones(2, 3, 4, 10))
    torch.testing.assert_close(shown.self_attention, torch.stack(seen[-2:]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shown.logits, plain.logits, rtol=1e-4, atol=1e-5)
    assert shown.split(3)[1].self_attention.shape == (2, 1, 4, 10, 10)


def test_queries_of_the_same_index_need_no_matching():
    """Values and gradients are those of a matching that names every query by its own index."""
    generator = torch.Generator().manual_seed(0)

    def queries(grad):
        parts = [
            torch.rand(shape, generator=generator) for shape in ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 2, 5, 5), (2, 3, 2, 5, 7))
        ]
        return D3ETRQueries(*(part.requires_grad_(grad) for part in parts))

    mine, theirs = queries(True), queries(False)
    found = []
    for match in (None, torch.arange(5).expand(2, 3, 5)):
        terms = d3etr_terms(mine, theirs, match)
        total = torch.stack([term.sum() for term in terms]).sum()
        found.append((*terms, *torch.autograd.grad(total, list(mine))))
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
