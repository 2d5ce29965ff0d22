import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detdistill.detectors.build import build_detector
from detdistill.detectors.contract import Detector, Teacher
from detdistill.errors import DetdistillError
from detdistill.methods.pkd import PKD
from detdistill.methods.scalekd.loss import (
    scalekd_box_loss,
    scalekd_class_loss,
    scalekd_feature_loss,
    scalekd_region_class_loss,
)
from detdistill.methods.scalekd.method import ScaleKD
from detdistill.methods.scalekd.parts import CrossScaleAttention, ScaleDecoupling, enlarged
from detdistill.methods.shared.contract import Composition
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Clock
from tests.methods.contract_checks import check_method, without_boxes
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

EARLY, LATE = Clock(0, 9), Clock(5, 9)
SMALL = {"width": 8, "heads": 2}
FEATURES = {"class_weight": 0.0, "box_weight": 0.0}


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------- the losses


def test_equal_sides_by_hand():
    """There is no released code, so no golden file: values computed by hand."""
    logits, half = torch.tensor([[[0.0, 2.0], [1.0, 0.0]]], dtype=torch.float64), math.log(2)
    entropy = sum(-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))))
    assert float(scalekd_class_loss(logits, logits, 4)) == pytest.approx((2 * half + entropy) / 4, rel=1e-12)
    only = torch.tensor([[True, False]])
    first = -sum(p * math.log(p) for p in (1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2)))) + half
    assert float(scalekd_class_loss(logits, logits, 1, mask=only)) == pytest.approx(first, rel=1e-12)
    assert float(scalekd_class_loss(logits, logits, 1, softmax=True)) == 0.0
    other = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    p = 1 / (1 + math.exp(2))
    divergence = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert float(scalekd_class_loss(other, logits, 2, softmax=True)) == pytest.approx(divergence / 2, rel=1e-9)
    assert float(scalekd_region_class_loss(other[0], logits[0])) == pytest.approx(divergence / 2, rel=1e-9)
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 2.0, 2.0]])
    assert float(scalekd_box_loss(boxes, boxes + torch.tensor([[0.5], [3.0]]))) == pytest.approx((0.125 + 2.5) / 2)
    assert float(scalekd_box_loss(boxes, boxes, "giou")) == pytest.approx(0.0, abs=1e-6)
    assert float(scalekd_box_loss(boxes[:1], boxes[1:], "giou")) == pytest.approx(0.75, rel=1e-5)


def test_the_gradient_is_zero_at_the_assistants_predictions_and_never_reaches_them():
    student, assistant = drawn(0, 1, 4, 3).requires_grad_(), drawn(1, 1, 4, 3).requires_grad_()
    scalekd_class_loss(student, assistant, 2).backward()
    torch.testing.assert_close(student.grad, (student.sigmoid() - assistant.sigmoid()).detach() / 2)
    scalekd_class_loss(student, assistant, 2, softmax=True).backward()
    scalekd_region_class_loss(student[0], assistant[0]).backward()
    scalekd_box_loss(student[0], assistant[0]).backward()
    assert assistant.grad is None


def test_padding_is_left_out_of_the_mean():
    student, teacher = drawn(0, 2, 3, 4, 4), drawn(1, 2, 3, 4, 4)
    padding = torch.zeros(2, 4, 4, dtype=torch.bool)
    torch.testing.assert_close(scalekd_feature_loss(student, teacher, padding), scalekd_feature_loss(student, teacher))
    padding[1, 2:] = True
    kept = torch.cat([(student - teacher)[0].flatten(), (student - teacher)[1, :, :2].flatten()])
    torch.testing.assert_close(scalekd_feature_loss(student, teacher, padding), kept.square().mean())
    assert float(scalekd_feature_loss(student, teacher, torch.ones_like(padding))) == 0.0


def test_nothing_to_compare_is_zero_and_connected():
    logits, boxes = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
    dense = torch.zeros(2, 0, 3, requires_grad=True)
    losses = [scalekd_region_class_loss(logits, logits), scalekd_class_loss(dense, dense, 1.0)]
    losses += [scalekd_box_loss(boxes, boxes, kind) for kind in ("smooth_l1", "giou")]
    assert [float(loss.detach()) for loss in losses] == [0.0] * 4
    sum(losses).backward()
    assert all(tensor.grad is not None for tensor in (logits, boxes, dense))


# ------------------------------------------------------------------------------------------------------- the modules


def test_equal_features_lose_nothing_and_branches_differ_by_dilation_alone():
    torch.manual_seed(0)
    module = ScaleDecoupling(8).double()
    maps = drawn(0, 2, 8, 9, 9)
    assert float(scalekd_feature_loss(module(maps), module(maps.clone())).detach()) == 0.0
    constant = drawn(1, 1, 8, 1, 1).expand(1, 8, 9, 9)
    branches = module(constant).chunk(3, dim=1)
    for branch in branches[1:]:
        torch.testing.assert_close(branch[..., 3:6, 3:6], branches[0][..., 3:6, 3:6])
        assert not torch.allclose(branch, branches[0])  # at the border
    assert len(list(ScaleDecoupling(8, shared=False).parameters())) == 3 * len(list(module.parameters()))


@pytest.mark.parametrize("rates", [(2, 1), (4, 2), (8, 8)])
def test_attention_equals_the_plain_form(rates):
    torch.manual_seed(0)
    module = CrossScaleAttention(4, 6, 8, 4, [rates]).double()
    student, teacher = drawn(0, 2, 4, 5, 3), drawn(1, 2, 6, 8, 16)
    found = module(student, teacher, rates)
    assert found.shape == student.shape
    queries, read = module.query(student.flatten(2).mT), []
    for group, rate in enumerate(rates):
        blocks = module.reduce[str(rate)](teacher)
        rows = F.gelu(module.norm[str(rate)](blocks.flatten(2).mT))
        keys, values = module.key[group](rows), module.value[group](rows)
        values = values + module.near[group](values.mT.unflatten(2, blocks.shape[-2:])).flatten(2).mT
        for head in range(2):
            part = slice(2 * head, 2 * head + 2)
            weights = (queries[..., 4 * group :][..., part] @ keys[..., part].mT / math.sqrt(2)).softmax(dim=2)
            torch.testing.assert_close(weights.sum(dim=2), torch.ones_like(weights[..., 0]))
            read.append(weights @ values[..., part])
    plain = module.out(torch.cat(read, dim=2)).mT.unflatten(2, (5, 3))
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-12)


def test_padded_cells_of_the_teacher_are_not_read():
    """An image padded in its batch is read as the same image alone, at every rate; a map of one cell is read, too."""
    torch.manual_seed(0)
    rates = [(8, 4), (2, 1)]
    module = CrossScaleAttention(4, 6, 8, 4, rates).double()
    student, teacher = drawn(0, 1, 4, 5, 5), drawn(1, 1, 6, 6, 5)
    padded = F.pad(teacher, (0, 7, 0, 12), value=3.0)
    padding = torch.ones(1, *padded.shape[-2:], dtype=torch.bool)
    padding[:, :6, :5] = False
    for pair in rates:
        torch.testing.assert_close(module(student, padded, pair, padding), module(student, teacher, pair), rtol=1e-9, atol=1e-12)
        assert module(student, teacher[..., :1, :1], pair).isfinite().all()


def test_an_enlarged_batch_is_the_same_scene():
    batch = tiny_batch(2)
    assert enlarged(batch, 1) is batch
    large = enlarged(batch, 2)
    assert large.images.shape == (2, 3, 128, 128)
    assert torch.equal(large.sizes, 2 * batch.sizes)
    for mine, theirs, view, seen in zip(batch.targets, large.targets, batch.views, large.views, strict=True):
        assert torch.equal(theirs.boxes_xyxy, 2 * mine.boxes_xyxy)
        torch.testing.assert_close(seen.to_original(theirs.boxes_xyxy), view.to_original(mine.boxes_xyxy))
    assert torch.equal(large.padding_mask()[:, ::2, ::2], batch.padding_mask())


# -------------------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"box_loss": "giou", "residual": True}, 6),
        ({**FEATURES, "sdf": "fixed", "branches": "separate", "teacher_scale": 1}, 18),
    ],
)
def test_contract(settings, count):
    checked = check_method(ScaleKD, **SMALL, **settings)
    assert len(checked) == count
    assert all(name.endswith("dense 8") for name in checked) or count == 18


def build(student=None, teacher=None, **settings):
    torch.manual_seed(0)
    student = student or TinyDense(seed=2)
    return student, ScaleKD(Teacher(teacher or TinyDense(seed=1)), student, **{**SMALL, **settings})


def run(method, student, batch, clock=LATE):
    torch.manual_seed(3)
    method.teacher.forget()
    seen = student(batch, replace(method.requirements.student, prediction=True))
    return method.learn(student, seen, method.teach(batch), batch, clock)


def test_equal_backbones_and_adapters_lose_nothing_and_a_fixed_side_stays():
    batch = tiny_batch(2)
    for sdf in ("shared", "separate", "fixed"):
        student, method = build(TinyDense(seed=1), sdf=sdf, teacher_scale=1, **FEATURES)
        method.adapters[1].load_state_dict(method.adapters[0].state_dict())
        sides = [method.teacher_decoupling, *method.adapters[1:]]
        if method.teacher_decoupling is not None:
            method.teacher_decoupling.load_state_dict(method.decoupling.state_dict())
        # padded cells of both sides are equal here, and they are left out
        assert float(run(method, student, batch).terms["scalekd_feature"].detach()) == pytest.approx(0.0, abs=1e-12)
        fixed = [not p.requires_grad for side in sides if side is not None for p in side.parameters()]
        assert all(fixed) if sdf == "fixed" else not any(fixed)


def grads_of(loss, module):
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [g for g in torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) if g is not None and g.any()]


def test_the_assistants_loss_trains_it_alone_and_the_students_losses_leave_it_alone():
    student, method = build()
    losses = run(method, student, tiny_batch(2))
    assert list(losses.terms) == ["scalekd_feature", "scalekd_assistant", "scalekd_class", "scalekd_box"]
    assert set(losses.monitors) == {"assistant_cls", "assistant_box"}
    assistant = nn.ModuleList([method.attention, method.head])
    assert not grads_of(losses.terms["scalekd_assistant"], student)
    assert len(grads_of(losses.terms["scalekd_assistant"], assistant)) == len(list(assistant.parameters()))
    for name in ("scalekd_feature", "scalekd_class", "scalekd_box"):
        assert grads_of(losses.terms[name], student)
        assert not grads_of(losses.terms[name], assistant)
    assert grads_of(losses.terms["scalekd_feature"], method.adapters)
    assert method.trains_alone == ("scalekd_assistant",)
    assert Composition([method, PKD(method.teacher, student)], student).trains_alone == ("scalekd/scalekd_assistant",)


@pytest.mark.parametrize(("settings", "last"), [({}, 2), ({"warmup_steps": 5}, 4), ({"warmup_steps": 0}, -1)])
def test_the_student_imitates_after_the_warm_up(settings, last):
    student, method = build(**settings)
    for step in (0, 2, 3, 4, 5):
        terms = run(method, student, tiny_batch(2), Clock(step, 9)).terms
        assert [bool(terms[f"scalekd_{name}"] > 0) for name in ("class", "box")] == [step > last] * 2
        assert terms["scalekd_feature"] > 0


@pytest.mark.parametrize(("settings", "frozen"), [({}, 1), ({"freeze_steps": 3}, 3), ({"freeze_steps": 0}, 0)])
def test_the_backbone_is_frozen_at_first(settings, frozen):
    student, method = build(**settings)
    (stage,) = method.stages(student)
    own = {id(p) for p in student.backbone.parameters()}
    everything = {id(p) for p in (*student.parameters(), *method.parameters())}
    for step in range(5):
        trained = {id(p) for module in stage.trains(Clock(step, 9)) for p in module.parameters()}
        assert trained == (everything - own if step < frozen else everything)


def test_the_student_is_saved_without_the_method():
    student, method = build()
    names = set(student.state_dict())
    losses = run(method, student, tiny_batch(2))
    losses.total().backward()
    assert set(student.state_dict()) == names
    assert not any(p is q for p in method.parameters() for q in student.parameters())


def test_weights_scale_their_terms():
    batch = tiny_batch(2)
    once = run(*reversed(build()), batch).terms
    factors = {"feature_weight": 0.02, "class_weight": 0.6, "box_weight": 0.05, "assistant_weight": 2.0}
    more = run(*reversed(build(**factors)), batch).terms
    for name, factor in {"feature": 2, "class": 3, "box": 1, "assistant": 2}.items():
        torch.testing.assert_close(more[f"scalekd_{name}"], factor * once[f"scalekd_{name}"])


def test_terms_by_the_functions():
    student, method = build(residual=True)
    batch = tiny_batch(2)
    taught, seen = method.teach(batch), student(batch, replace(method.requirements.student, prediction=True))
    assert [level.shape[-1] for level in taught.features.maps] == [16, 8]  # twice the student's
    assert method.partners == [1, 1]  # stride 16 in the large image is 8 in the student's
    terms = method.learn(student, seen, taught, batch, LATE).terms
    features = method._assist(seen.features, taught)
    theirs, mine = method.head.predict(features, batch), seen.prediction
    assignment = student.assign(mine, batch)
    positive = assignment.matched >= 0
    torch.testing.assert_close(terms["scalekd_assistant"], student.loss(theirs, batch, assignment).total())
    box = scalekd_box_loss(mine.deltas[positive], theirs.deltas[positive])
    torch.testing.assert_close(terms["scalekd_box"], 0.05 * box)
    inside = (mine.cells * torch.tensor([8, 16])[mine.levels][:, None])[None, :, 0] < batch.sizes[:, :1]
    count = sum(max(1, int(row.sum())) for row in positive)
    expected = scalekd_class_loss(mine.logits, theirs.logits, count, mask=inside)
    torch.testing.assert_close(terms["scalekd_class"], 0.2 * expected)


def test_images_without_boxes_have_class_terms_only():
    student, method = build()
    terms = run(method, student, without_boxes(tiny_batch(2), range(2))).terms
    assert float(terms["scalekd_box"].detach()) == 0.0
    assert all(float(terms[f"scalekd_{name}"].detach()) > 0 for name in ("feature", "class", "assistant"))


def test_odd_boxes_and_levels_of_one_cell_are_finite():
    """One box over everything, one without area, levels of one cell, a teacher of one level and other classes."""
    boxes = torch.tensor([[0.0, 0.0, 64.0, 48.0], [10.0, 10.0, 10.0, 30.0]])
    batch = tiny_batch(2)
    batch = batch.with_targets(
        [replace(t, boxes_xyxy=boxes, labels=torch.tensor([0, 1]), crowd=torch.zeros(2).bool()) for t in batch.targets]
    )
    teacher = TinyDense(classes=("z",), channels=(16,), strides=(64,), seed=1)
    for given in (batch, batch._on_canvas([1], (64, 64))):
        for settings in ({}, {"teacher_scale": 1, "box_loss": "giou", "sdf": "separate", "rates": (2, 2)}):
            student, method = build(TinyDense(strides=(32, 64), seed=2), teacher, **settings)
            losses = run(method, student, given)
            losses.total().backward()
            assert math.isfinite(float(losses.total().detach()))


class CopiedRegions(TinyRegions):
    """A tiny two-stage detector whose head can be copied."""

    def copy_head(self, fresh=False):
        return copy.deepcopy(self)

    def copy_neck(self, fresh=False):
        return copy.deepcopy(self.levels)


def test_two_stage_students_imitate_on_their_own_regions():
    settings = {"profile": "two_stage", "feature_weight": 0.0}
    batch = tiny_batch(3)
    student, method = build(CopiedRegions(seed=2), CopiedRegions(seed=1), **settings)
    losses = run(method, student, batch)
    assert list(losses.terms) == ["scalekd_assistant", "scalekd_class", "scalekd_box"]
    assert not grads_of(losses.terms["scalekd_assistant"], student)
    assert all(grads_of(losses.terms[f"scalekd_{name}"], student) for name in ("class", "box"))
    # an assistant that passes the student's features on to the same head predicts the same
    student, method = build(CopiedRegions(seed=2), CopiedRegions(seed=1), residual=True, **settings)
    nn.init.zeros_(method.attention.out.weight)
    nn.init.zeros_(method.attention.out.bias)
    for kind in ("smooth_l1", "giou"):
        method.box_loss = kind
        terms = run(method, student, batch).terms
        assert [float(terms[f"scalekd_{name}"].detach()) for name in ("class", "box")] == pytest.approx([0.0, 0.0], abs=1e-6)
    seen = student(batch)
    seen = replace(seen, prediction=seen.prediction.rows(torch.arange(0)))
    nothing = method.learn(student, seen, method.teach(batch), batch, LATE).terms
    assert [float(nothing[f"scalekd_{name}"].detach()) for name in ("class", "box")] == [0.0, 0.0]


def test_real_pairs_learn():
    batch, body = tiny_batch(2), "resnet10t,channels=8-16-32-64,stem=8,neck=32"
    two = f"faster_rcnn:{body},mlp=16,proposals=20,rois=16"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = Teacher(build_detector(f"gfl:{body},levels=3-5,convs=1", ["x"]))
        for name, settings in (
            (f"gfl:{body},levels=3-5,convs=1", {"box_loss": "giou"}),
            (two, {"profile": "two_stage"}),
        ):
            student = build_detector(name, ["a", "b"]).train()
            method = ScaleKD(teacher, student, **SMALL, **settings)
            losses = method.step(student, batch, method.teach(batch), LATE)
            losses.total().backward()
            assert math.isfinite(float(losses.total().detach()))
            assert len(losses.distilled) == 4
            missed = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
            assert missed == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_scale": 3}, "teacher_scale=3 is not one of 1, 2"),
        ({"heads": 3}, "heads=3 must be even, and width=8 a multiple of it"),
        ({"width": 7}, "heads=2 must be even, and width=7 a multiple of it"),
        ({"warmup_steps": -1}, "warmup_steps=-1 is not a whole number, 0 or more, or none"),
        ({**FEATURES, "feature_weight": 0.0}, "feature_weight, class_weight, box_weight are all 0; nothing would be distilled"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(DetdistillError) as error:
        build(**settings)
    assert str(error.value) == f"scalekd: {message}"


class Whole(TinyDense):
    """A detector that does not name its parts, like a wrapped model."""

    parts = Detector.parts


def test_refused_pairs_are_told_why():
    uneven, binned, fixed, bare = (TinyDense() for _ in range(4))
    uneven.spec = replace(uneven.spec, channels=(8, 12))
    binned.spec = replace(binned.spec, box_bins=17)
    fixed.spec = replace(fixed.spec, fixed_size_hw=(64, 64))
    bare.spec = replace(bare.spec, backbone=None)
    refused = [
        ({"student": TinyQueries()}, "the student tinyqueries:patches predicts queries; it needs a student that predicts dense"),
        ({"student": TinyRegions(), "profile": "two_stage"}, "the student tinyregions:patches lacks copies of neck and head"),
        ({"student": uneven}, "set scalekd,class_weight=0,box_weight=0"),
        ({"teacher": uneven}, "the levels of the teacher tinydense:patches have (8, 12) channels"),
        ({"student": binned}, "set scalekd,box_loss=giou"),
        ({"teacher": fixed}, "reads images of (64, 64) only; set scalekd,teacher_scale=1"),
        ({"teacher": bare}, "the teacher tinydense:patches does not know its backbone's channels; set scalekd,feature_weight=0"),
        ({"student": Whole()}, "define parts(), or set scalekd,freeze_steps=0"),
    ]
    for settings, message in refused:
        with pytest.raises(PairError) as error:
            build(**settings)
        assert message in str(error.value)
