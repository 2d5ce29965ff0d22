import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Teacher
from detdistill.functional.atss import atss_assign, atss_thresholds
from detdistill.losses import (
    ld_box_loss,
    ld_class_loss,
    ld_general_instances,
    ld_imitation_loss,
    ld_rebinned,
    ld_valuable_region,
)
from detdistill.methods.ld import LD
from detdistill.methods.shared.contract import teach_by_canvas
from detdistill.methods.shared.hyper_parameters import MethodError
from detdistill.methods.shared.needs import PairError
from detdistill.structures import IGNORED, Assignment, BoxDistributions, Clock, Features, Observation, Target
from tests.detectors.dense import own as own_dense
from tests.detectors.dense.shared import unequal_batch
from tests.golden import Golden, assert_golden
from tests.methods import contract_checks
from tests.methods.contract_checks import check_method
from tests.tiny import TinyDense, TinyHead, TinyQueries, tiny_batch

# ---------------------------------------------------------------------------------------------------------- the numbers


def golden_side(golden, side, dtype):
    """GFL of the file's settings, and what it sees on one side: the prediction of the file's maps and the neck's maps."""
    mine = copy.copy(golden)
    mine.arrays = dict(golden.arrays)
    for kind in ("cls", "reg"):
        for level in range(len(golden.levels(f"in_{kind}_{side}"))):
            mine.arrays[f"in_{kind}_{level}"] = golden.arrays[f"in_{kind}_{side}_{level}"]
    outputs = {"cls": "cls_logits", "reg": "bbox_regression"}
    detector, prediction, batch, leaves = own_dense.golden_prediction("gfl", mine, outputs, dtype, ["reg_max"])
    leaves["feat"] = [level.to(dtype).requires_grad_() for level in golden.levels(f"in_{side}")]
    strides = tuple(golden["in_strides"].tolist())
    return detector, Observation(Features(tuple(leaves["feat"]), strides), prediction=prediction), batch, leaves


def golden_terms(golden, dtype, **settings):
    """The terms of the method itself on the file's inputs, assignment and regions included."""
    meta = golden.meta
    student, seen, batch, leaves = golden_side(golden, "student", dtype)
    other, taught, _, _ = golden_side(golden, "teacher", dtype)
    teacher = Teacher(other)
    teacher.observe = lambda batch, look: taught.detach()
    weights = meta["loss_weights"]
    given = {
        "box_weight": float(weights["ld"]),
        "valuable_weight": float(weights["ld_vlr"]),
        "cls_weight": float(weights["kd"]),
        "imitation_weight": float(weights["im"]),
        "box_temperature": float(meta["T_ld"]),
        "cls_temperature": float(meta["T_kd"]),
        "gamma": float(meta["gamma_vlr"]),
        "candidates": meta["atss_topk"],
        "imitation": "fine_grained",
    }
    method = LD(teacher, student, **{**given, **settings})
    student.candidates = meta["atss_topk"]
    return method.learn(student, seen, method.teach(batch), batch, Clock(1, 10)).terms, leaves


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_the_released_code(dtype):
    golden = Golden("ld")
    terms, leaves = golden_terms(golden, dtype)
    for ours, theirs in {"ld_box": "ld", "ld_valuable": "ld_vlr", "ld_cls": "kd", "ld_imitation": "im_finegrained"}.items():
        assert_golden(terms[ours], torch.stack(golden.levels(f"out_loss_{theirs}")).sum().to(dtype))
    total = torch.stack(list(terms.values())).sum()
    assert_golden(total, golden["out_total"].to(dtype))
    total.backward()
    for name in ("cls", "reg"):
        for level, expected in zip(leaves[name], golden.levels(f"grad_student_{name}"), strict=True):
            assert_golden(level.grad, expected.to(dtype))
    for index, level in enumerate(leaves["feat"]):
        assert_golden(level.grad[:, :4], golden[f"grad_student_feat_{index}_ch0to3"].to(dtype))


@pytest.mark.parametrize("imitation", ["inside", "general_instances"])
def test_other_imitated_regions_equal_the_released_code(imitation):
    golden = Golden("ld")
    terms, _ = golden_terms(golden, torch.float64, imitation=imitation, instances_of="batch")
    expected = golden.levels({"inside": "out_loss_im_fitnet", "general_instances": "out_loss_im_gibox"}[imitation])
    if not expected:
        pytest.skip("not in this file")
    assert_golden(terms["ld_imitation"], torch.stack(expected).sum())


def test_valuable_region_equals_the_released_code():
    golden = Golden("ld")
    levels = torch.cat([torch.full((len(a),), i) for i, a in enumerate(golden.levels("out_anchors"))])
    anchors, expected = torch.cat(golden.levels("out_anchors")), torch.cat(golden.levels("out_vlr"), dim=1)
    for image, boxes in enumerate(golden.levels("in_boxes")):
        found = ld_valuable_region(anchors, levels, boxes, golden.meta["gamma_vlr"], candidates=golden.meta["atss_topk"])
        assert_golden(found.weights, expected[image])


# ------------------------------------------------------------------------------------------------------- the functions


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_sides_give_exactly_zero_and_a_shift_of_a_side_changes_nothing():
    sides, classes, ones = random(0, 5, 4, 7), random(1, 5, 3), torch.ones(5, dtype=torch.float64)
    assert ld_box_loss(sides, sides, ones).item() == 0
    assert ld_class_loss(classes, classes, ones).item() == 0
    other = random(2, 5, 4, 7).requires_grad_()
    loss = ld_box_loss(other, sides, ones)
    assert ld_box_loss(other + random(3, 5, 4, 1), sides, ones).item() == pytest.approx(loss.item(), rel=1e-12)
    loss.backward()
    assert other.grad.sum(dim=-1).abs().max() < 1e-12


def test_scaled_logits_at_a_scaled_temperature():
    mine, fixed, ones = random(0, 5, 4, 7), random(1, 5, 4, 7), torch.ones(5, dtype=torch.float64)
    doubled = ld_box_loss(2 * mine, 2 * fixed, ones, temperature=20.0)
    assert doubled.item() == pytest.approx(4 * ld_box_loss(mine, fixed, ones, temperature=10.0).item(), rel=1e-12)


def test_weights_carry_no_gradient_and_nothing_chosen_is_zero():
    mine, weights = random(0, 5, 4, 7).requires_grad_(), random(1, 5).exp().requires_grad_()
    ld_box_loss(mine, random(2, 5, 4, 7), weights).backward()
    assert weights.grad is None
    empty = mine[:0]
    for loss in (ld_box_loss(empty, empty.detach(), weights[:0]), ld_imitation_loss(empty, empty.detach())):
        assert loss.item() == 0
        assert loss.requires_grad


def test_valuable_region_shrinks_with_gamma_and_has_its_bounds():
    anchors = torch.tensor([[x - 12.0, y - 12.0, x + 12.0, y + 12.0] for y in range(0, 64, 8) for x in range(0, 64, 8)])
    levels = torch.zeros(len(anchors), dtype=torch.int64)
    boxes = torch.tensor([[6.0, 6.0, 30.0, 34.0], [20.0, 20.0, 60.0, 50.0], [62.0, 62.0, 64.0, 64.0]])
    sizes = []
    for quality in ("iof", "iou"):
        for gamma in (1.0, 0.75, 0.5, 0.25, 0.0):
            found = ld_valuable_region(anchors, levels, boxes, gamma, quality)
            assert bool((found.weights <= 1).all())
            sizes.append(int((found.weights > 0).sum()))
    assert sizes[:5] == sorted(sizes[:5])
    assert sizes[5:] == sorted(sizes[5:])
    assert sizes[0] == sizes[5] == 0
    assert sizes[4] > 5
    nothing = ld_valuable_region(anchors, levels, boxes[:0])
    assert not nothing.weights.any()


def test_valuable_region_equals_a_loop_over_anchors_and_boxes():
    generator = torch.Generator().manual_seed(4)
    anchors = torch.rand(40, 2, generator=generator, dtype=torch.float64) * 50
    anchors = torch.cat([anchors, anchors + 16], dim=1)
    boxes = anchors[:3] + torch.rand(3, 4, generator=generator, dtype=torch.float64) * 8
    levels = (torch.arange(40) % 2).sort().values
    thresholds = atss_thresholds(anchors, levels, boxes, 5)
    found = ld_valuable_region(anchors, levels, boxes, 0.2, "iou", 5)
    for a, expected in zip(anchors.tolist(), found.weights.tolist(), strict=True):
        best = 0.0
        for g, t in zip(boxes.tolist(), thresholds.tolist(), strict=True):
            shared = max(0, min(a[2], g[2]) - max(a[0], g[0])) * max(0, min(a[3], g[3]) - max(a[1], g[1]))
            iou = shared / ((a[2] - a[0]) * (a[3] - a[1]) + (g[2] - g[0]) * (g[3] - g[1]) - shared)
            rho = ((a[0] + a[2] - g[0] - g[2]) / 2) ** 2 + ((a[1] + a[3] - g[1] - g[3]) / 2) ** 2
            diagonal = (max(a[2], g[2]) - min(a[0], g[0])) ** 2 + (max(a[3], g[3]) - min(a[1], g[1])) ** 2
            if 0.2 * t <= iou - rho / diagonal < t:
                best = max(best, iou)
        assert expected == pytest.approx(best, abs=1e-9)


def test_general_instances_are_chosen_for_each_image():
    logits, fixed = torch.zeros(4, 2), torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 0.5]])
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]] * 3 + [[20.0, 0.0, 28.0, 8.0]])
    groups = torch.tensor([0, 1, 1, 1])
    assert ld_general_instances(logits, fixed, boxes, boxes, groups).tolist() == [0, 1, 3]
    assert ld_general_instances(logits, fixed, boxes, boxes, torch.zeros(4, dtype=torch.int64)).tolist() == [0, 3]
    assert ld_general_instances(logits, fixed, boxes, boxes, groups, count=1).tolist() == [0, 1]
    assert len(ld_general_instances(logits[:0], fixed[:0], boxes[:0], boxes[:0], groups[:0])) == 0


def test_more_steps_of_the_same_scale_are_exact():
    """A teacher with fewer bins of the same width: its distribution is a distribution on the student's bins."""
    fixed, positions = random(0, 3, 4, 5), torch.arange(5.0, dtype=torch.float64).expand(3, 4, 5)
    steps = torch.arange(9.0, dtype=torch.float64)
    moved = ld_rebinned(fixed, positions, steps, temperature=10.0)
    p = (moved / 10).softmax(dim=-1)
    torch.testing.assert_close(p[..., :5], (fixed / 10).softmax(dim=-1), rtol=1e-10, atol=1e-14)
    assert p[..., 5:].max() < 1e-30
    loss = ld_box_loss(torch.zeros(3, 4, 9, dtype=torch.float64), moved, torch.ones(3, dtype=torch.float64))
    assert bool(torch.isfinite(loss))
    same = ld_rebinned(fixed, positions, steps[:5], temperature=10.0)
    ones = torch.ones(3, dtype=torch.float64)
    assert ld_box_loss(fixed, same, ones).item() == pytest.approx(0, abs=1e-12)


def test_threshold_is_that_of_the_assignment():
    anchors = torch.tensor([[x - 12.0, y - 12.0, x + 12.0, y + 12.0] for y in range(0, 64, 8) for x in range(0, 64, 8)])
    levels, box = torch.zeros(len(anchors), dtype=torch.int64), torch.tensor([[10.0, 10.0, 40.0, 38.0]])
    matched, overlaps = atss_assign(anchors, levels, box, 9)
    assert bool((overlaps[matched >= 0] >= atss_thresholds(anchors, levels, box, 9)).all())


# ---------------------------------------------------------------------------------------------------------- the method


class SidesHead(TinyHead):
    """Boxes from the means of distributions; a step is a stride."""

    def __init__(self, channels, num_classes, bins):
        super().__init__(channels, num_classes)
        self.sides, self.bins = nn.Conv2d(channels, 4 * bins, 1), bins

    def finish(self, hidden, batch):
        dense = super().finish(hidden, batch)
        last = self._advance(hidden, self.tower_depth)
        sides = torch.cat([self.sides(level).flatten(2) for level in last.regression], dim=2).transpose(1, 2)
        found = self.distributions(replace(dense, deltas=sides))
        means = (found.logits.softmax(dim=-1) * found.steps).sum(dim=-1)
        return replace(dense, deltas=sides, boxes_xyxy=found.origins + found.units * means)

    def distributions(self, dense):
        priors = dense.priors_xyxy
        centers = (priors[..., :2] + priors[..., 2:]) / 2
        units = (priors[..., 2:3] - priors[..., :1]) * priors.new_tensor([-1.0, -1.0, 1.0, 1.0])
        logits = dense.deltas.unflatten(-1, (4, -1))
        return BoxDistributions(logits, centers.repeat(1, 1, 2), units, torch.arange(self.bins, dtype=logits.dtype))


class TinySides(TinyDense):
    """A dense detector with distributions."""

    def __init__(self, *arguments, bins=5, seed=0, **options):
        super().__init__(*arguments, seed=seed, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 100)
            self.head = SidesHead(self.spec.channels[0], len(self.spec.classes), bins)
        self.spec = replace(self.spec, box_bins=bins)

    def distributions(self, prediction, batch):
        return self.head.distributions(prediction)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"imitation_weight": 2.0, "exclude_positives": True, "quality": "iou"},
        {"match": "objects"},
    ],
    ids=["default", "general instances", "objects"],
)
def test_contract(settings, monkeypatch):
    monkeypatch.setattr(contract_checks, "TinyDense", TinySides)
    assert check_method(LD, **settings) == ["dense 8 -> dense 8", "dense 16 -> dense 8"]


def learned(student, teacher, batch, **settings):
    method = LD(Teacher(teacher), student, **settings)
    return method.learn(student, student(batch), teach_by_canvas(method, batch), batch, Clock(1, 10)).terms


def finite(student, terms):
    sum(terms.values()).backward()
    assert all(bool(torch.isfinite(term)) for term in terms.values())
    assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)


def test_equal_detectors_have_no_loss():
    student = TinySides(seed=1)
    terms = learned(student, TinySides(seed=1), tiny_batch(3), imitation_weight=2.0)
    assert [term.item() for term in terms.values()] == [0, 0, 0, 0]


@pytest.mark.parametrize("bins", [3, 8])
def test_other_bins_are_matched_by_position(bins):
    """A teacher with more bins whose further bins are empty teaches what the teacher without them teaches."""
    batch, student = tiny_batch(3), TinySides(seed=1)
    terms = learned(student, TinySides(seed=2, bins=bins), batch)
    finite(student, terms)
    assert terms["ld_box"].item() > 0
    small, large = TinySides(seed=2), TinySides(seed=2, bins=8)
    large.load_state_dict(small.state_dict() | {name: t for name, t in large.state_dict().items() if ".sides." in name})
    with torch.no_grad():
        weight, bias = large.head.sides.weight.view(4, 8, -1), large.head.sides.bias.view(4, 8)
        weight[:, 5:], bias[:, 5:] = 0, -1e3
        weight[:, :5], bias[:, :5] = small.head.sides.weight.view(4, 5, -1), small.head.sides.bias.view(4, 5)
    expected, found = learned(student, small, batch), learned(student, large, batch)
    for name, term in expected.items():
        assert found[name].item() == pytest.approx(term.item(), rel=1e-4)


def test_class_scores_of_the_valuable_region_by_hand():
    """Mean over the region's cells of a level of the divergence of the classes, summed over levels."""
    student, teacher, batch = TinySides(seed=2), TinySides(seed=1), tiny_batch(2)
    found = learned(student, teacher, batch, valuable_cls_weight=3.0, gamma=0.0)
    plain = learned(student, teacher, batch, gamma=0.0)
    assert found.keys() - plain.keys() == {"ld_valuable_cls"}
    alone = learned(student, teacher, batch, valuable_cls_weight=3.0, gamma=0.0, box_weight=0, valuable_weight=0, cls_weight=0)
    torch.testing.assert_close(alone, {"ld_valuable_cls": found["ld_valuable_cls"]})
    with torch.no_grad():
        mine, theirs = (one(batch).prediction for one in (student, teacher))
    assignment = student.assign(mine, batch)
    expected = 0.0
    for level in mine.levels.unique():
        values = []
        for image, target in enumerate(batch.targets):
            allowed = torch.nonzero(assignment.matched[image] != -2).flatten()
            region = ld_valuable_region(mine.priors_xyxy[image, allowed], mine.levels[allowed], target.boxes_xyxy, 0.0)
            for place in allowed[region.weights > 0]:
                if mine.levels[place] == level:
                    p, q = ((one.logits[image, place] / 2).softmax(dim=0) for one in (theirs, mine))
                    values.append(4 * (p * (p / q).log()).mean())
        expected += torch.stack(values).mean() if values else 0.0
    assert float(expected) > 0
    torch.testing.assert_close(found["ld_valuable_cls"], 3 * expected, rtol=1e-4, atol=1e-6)


def test_terms_reach_only_their_own_outputs():
    batch, student = tiny_batch(3), TinySides(seed=1)
    for settings, reached in (({"cls_weight": 0}, "sides"), ({"box_weight": 0, "valuable_weight": 0}, "logits")):
        student.zero_grad()
        sum(learned(student, TinySides(seed=2), batch, **settings).values()).backward()
        outputs = {name: getattr(student.head, name).weight.grad for name in ("sides", "logits")}
        assert {name for name, grad in outputs.items() if grad is not None and grad.any()} == {reached}


def test_classes_are_matched_by_name():
    batch, student = tiny_batch(3), TinySides(seed=1)
    teacher, same = TinySides(classes=("b", "c", "a"), seed=2), TinySides(seed=2)
    state = teacher.state_dict()
    for name in ("head.logits.weight", "head.logits.bias"):
        state[name] = state[name][[2, 0]]
    same.load_state_dict(state)
    for match in ("cells", "objects"):
        expected, found = learned(student, same, batch, match=match), learned(student, teacher, batch, match=match)
        assert [term.item() for term in found.values()] == pytest.approx([t.item() for t in expected.values()], rel=1e-5)


class AllIgnored(TinySides):
    def assign(self, prediction, batch):
        return Assignment(torch.full(prediction.logits.shape[:2], IGNORED))


@pytest.mark.parametrize("match", ["cells", "objects"])
def test_nothing_to_compare_is_zero(match):
    for student, batch in ((TinySides(seed=1), tiny_batch(boxes=False)), (AllIgnored(seed=1), tiny_batch())):
        terms = learned(student, TinySides(seed=2), batch, match=match)
        finite(student, terms)
        assert [term.item() for term in terms.values()] == [0, 0, 0]


@pytest.mark.parametrize(
    "boxes", [[[0.0, 0.0, 64.0, 64.0]], [[60.0, 60.0, 64.0, 64.0], [0.0, 0.0, 0.0, 0.0]]], ids=["all", "border"]
)
@pytest.mark.parametrize("match", ["cells", "objects"])
def test_odd_boxes_are_finite(boxes, match):
    count = len(boxes)
    target = Target(torch.tensor(boxes), torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.bool))
    student, teacher = (TinySides(strides=(8, 64), seed=seed) for seed in (1, 2))  # one cell on the second level
    finite(student, learned(student, teacher, tiny_batch(1).with_targets([target]), match=match))


def test_an_image_counts_in_a_batch_as_alone():
    """Sums over predictions add up over images, and every image is compared with what its teacher saw alone."""
    batch = tiny_batch(3)
    batch = replace(batch, canvases_hw=tuple(view.size_hw for view in batch.views))
    student, teacher = TinySides(seed=1), TinySides(seed=2)
    alone = [learned(student, teacher, batch._on_canvas([i], batch.canvases_hw[i]), cls_weight=0) for i in range(3)]
    for name, term in learned(student, teacher, batch, cls_weight=0).items():
        # the student's convolutions see the padding of the batch at the lower border
        assert term.item() == pytest.approx(sum(part[name].item() for part in alone), rel=0.05)


# ------------------------------------------------------------------------------------------- detectors of two families


SMALL = "resnet10t,channels=8-16-32-64,stem=8,neck=32,levels=3-5,convs=1"
FINE = "resnet10t,channels=8-16-32-64,stem=8,dim=32,heads=4,ffn=64,queries=20,encoder=1,decoder=2"


@functools.cache
def real(kind):
    torch.manual_seed(1)
    options = FINE if kind == "d_fine" else SMALL
    return build_detector(f"{kind}:{options}", own_dense.CLASSES).eval()


@pytest.mark.parametrize("kind", ["gfl", "d_fine"])
def test_the_means_of_the_distributions_are_the_boxes(kind):
    batch, detector = unequal_batch(), real(kind)
    with torch.no_grad():
        prediction = detector(batch).prediction
    found = detector.distributions(prediction, batch)
    sides = found.origins + found.units * (found.logits.softmax(dim=-1) * found.steps).sum(dim=-1)
    if kind == "gfl":
        boxes = prediction.boxes_xyxy
    else:
        center, half = prediction.boxes_cxcywh01[-1].split(2, dim=-1)
        boxes = torch.cat([center - half / 2, center + half / 2], dim=-1) * batch.sizes.flip(1).repeat(1, 2)[:, None]
    torch.testing.assert_close(sides, boxes, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("pair", [("gfl", "d_fine"), ("d_fine", "gfl"), ("d_fine", "d_fine")], ids="->".join)
def test_detectors_of_two_families_are_compared_by_object(pair):
    teacher, student = (copy.deepcopy(real(kind)) for kind in pair)
    terms = learned(student, teacher, unequal_batch(), match="objects")
    finite(student, terms)
    assert terms.keys() == {"ld_box", "ld_cls", *(["ld_valuable"] if pair[1] == "gfl" else [])}
    if pair == ("d_fine", "d_fine"):
        assert [term.item() for term in terms.values()] == pytest.approx([0, 0], abs=1e-5)
    else:
        assert all(term.item() > 0 for term in terms.values())


def test_a_query_teacher_serves_from_records():
    batch = unequal_batch()
    method = LD(Teacher(copy.deepcopy(real("d_fine"))), copy.deepcopy(real("gfl")), match="objects")
    whole = method.teach(batch)
    again = type(whole).stack(whole.split(len(batch)))
    assert torch.equal(again.sides, whole.sides)
    assert bool(whole.known.any())


@pytest.mark.parametrize(
    ("teacher", "student", "settings", "message"),
    [
        (TinyDense, TinySides, {}, "the teacher tinydense.* predicts each side as one number"),
        (TinySides, TinyDense, {}, "the student tinydense.* predicts each side as one number"),
        (TinySides, TinyQueries, {"match": "objects"}, "the student tinyqueries.* one number"),
        (lambda: TinySides(classes=("a", "c")), TinySides, {}, "the teacher does not know b"),
        (lambda: TinySides(channels=(8,), strides=(8,)), TinySides, {}, r"strides \(8, 16\)"),
        (lambda: TinySides(classes=("a",)), lambda: TinySides(classes=("a",)), {}, "set ld,cls_weight=0"),
        (lambda: copy.deepcopy(real("d_fine")), lambda: copy.deepcopy(real("gfl")), {}, "set ld,match=objects"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(teacher, student, settings, message):
    with pytest.raises(PairError, match=f"ld: .*{message}"):
        LD(Teacher(teacher()), student(), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": 1.5},
        {"box_weight": 0, "valuable_weight": 0, "cls_weight": 0},
        {"imitation": "decouple"},
        {"match": "objects", "imitation_weight": 1.0},
    ],
)
def test_hyper_parameters_are_checked(settings):
    with pytest.raises(MethodError, match="ld"):
        LD(Teacher(TinySides()), TinySides(), **settings)
