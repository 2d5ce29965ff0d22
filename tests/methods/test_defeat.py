from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.cells import level_of_box
from detdistill.methods.defeat import (
    DeFeat,
    DeFeatTaught,
    defeat_backbone_masks,
    defeat_decay,
    defeat_head_terms,
    defeat_map_terms,
    defeat_masks,
    start_small,
)
from detdistill.structures import Clock, Target
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

NOW = Clock(0, 1)


# ------------------------------------------------------------------------------------------------------------- golden


@pytest.fixture
def golden():
    return Golden("defeat")


def adapted(golden, part, maps):
    """Maps after the released adapters."""
    found = []
    for index, level in enumerate(maps):
        weight, bias = golden[f"param_{part}{index}.adapt.weight"], golden[f"param_{part}{index}.adapt.bias"]
        mapped = F.conv2d(level, weight, bias, padding=weight.shape[-1] // 2)
        found.append(mapped.relu() if part == "bb" else mapped)
    return found


def masks_of(golden, teachers):
    boxes = [own.reshape(-1, 4) for own in golden.levels("in_boxes")]
    shapes = [tuple(level.shape[-2:]) for level in teachers]
    return boxes, shapes, defeat_masks(boxes, golden["in_strides"].tolist(), shapes)


def test_masks_equal_the_released_code(golden):
    boxes, shapes, masks = masks_of(golden, golden.levels("in_teacher"))
    for mask, expected in zip(masks, golden.levels("out_mask"), strict=True):
        assert torch.equal(mask, expected > 0)
    (fine,) = defeat_backbone_masks(boxes, golden["in_strides"].tolist()[0], shapes[0], shapes[:1])
    assert torch.equal(fine, golden["out_backbone_mask"] > 0)


def test_values_and_gradients_equal_the_released_code(golden):
    weights, teachers = golden.meta["weights"], golden.levels("in_teacher")
    students = [level.requires_grad_() for level in golden.levels("in_student")]
    boxes, shapes, masks = masks_of(golden, teachers)
    neck = defeat_map_terms(adapted(golden, "l", students), teachers, masks)

    below, theirs = (
        [level.requires_grad_() for level in golden.levels("in_student_backbone")],
        golden.levels("in_teacher_backbone"),
    )
    strides, maps_hw = golden["in_strides"].tolist(), [tuple(level.shape[-2:]) for level in theirs]
    backbone_masks = defeat_backbone_masks(boxes, strides[0], shapes[0], maps_hw)
    backbone = defeat_map_terms(adapted(golden, "bb", below), theirs, backbone_masks)

    logits, labels = golden["in_student_roi_logits"].requires_grad_(), golden["in_roi_labels"]
    background = labels == golden.meta["background_label"]
    head = defeat_head_terms(logits, golden["in_teacher_roi_logits"], ~background, background, weights["head_cls_T"])

    terms = {
        "neck_fg": weights["hint_neck_w"] * neck.foreground,
        "neck_bg": weights["hint_neck_back_w"] * neck.background,
        "backbone_fg": weights["hint_bb_w"] * backbone.foreground,
        "backbone_bg": weights["hint_bb_back_w"] * backbone.background,
        "head_fg": weights["head_cls_w"] * head.foreground,
        "head_bg": weights["head_cls_back_w"] * head.background,
    }
    for name, value in terms.items():
        assert_golden(value, golden[f"out_{name}"])
    total = torch.stack(list(terms.values())).sum()
    assert_golden(total, golden["out_total"])
    total.backward()
    for name, inputs in {"student": students, "student_backbone": below}.items():
        for level, expected in zip(inputs, golden.levels(f"grad_{name}"), strict=True):
            assert_golden(level.grad, expected)
    assert_golden(logits.grad, golden["grad_student_roi_logits"])


# --------------------------------------------------------------------------------------------------------------- masks


def test_each_box_marks_cells_of_its_own_level_only():
    generator = torch.Generator().manual_seed(0)
    corners = 300 * torch.rand(40, 2, generator=generator)
    sides = 5 + 400 * torch.rand(40, 2, generator=generator) ** 2
    boxes = torch.cat([corners, (corners + sides).clamp(max=512)], dim=1)
    strides, shapes = (8, 16, 32), [(64, 64), (32, 32), (16, 16)]
    for box, level in zip(boxes, level_of_box(boxes, 3).tolist(), strict=True):
        marked = [int(mask.sum()) for mask in defeat_masks([box[None]], strides, shapes)]
        assert [index for index, count in enumerate(marked) if count] == [level]
    union = defeat_masks([boxes, boxes[:0]], strides, shapes)
    each = [torch.stack([defeat_masks([box[None]], strides, shapes)[level][0] for box in boxes]) for level in range(3)]
    assert all(torch.equal(mask[0], own.any(dim=0)) for mask, own in zip(union, each, strict=True))
    assert not any(bool(mask[1].any()) for mask in union)


def test_backbone_masks_take_all_boxes_and_the_nearest_cell():
    boxes = [torch.tensor([[0.0, 0.0, 16.0, 16.0], [0.0, 0.0, 300.0, 16.0]])]
    same, half, double = defeat_backbone_masks(boxes, 8, (4, 40), [(4, 40), (2, 20), (8, 80)])
    assert same.nonzero().tolist() == [[0, row, column] for row in range(2) for column in range(37)]
    assert torch.equal(half, same[:, ::2, ::2])
    assert torch.equal(double, same.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2))


# --------------------------------------------------------------------------------------------------------- map losses


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_levels(seed):
    return [noise(seed, 2, 4, 6, 8), noise(seed + 1, 2, 8, 3, 4)]


MASKS = [noise(20, 2, 6, 8) > 1, noise(21, 2, 3, 4) > 0.3]


@pytest.mark.parametrize("normalization", ["level", "pyramid"])
def test_map_terms_equal_means_over_regions(normalization):
    students, teachers = two_levels(0), two_levels(2)
    terms = defeat_map_terms(students, teachers, MASKS, normalization)
    for value, masks in ((terms.foreground, MASKS), (terms.background, [~mask for mask in MASKS])):
        apart = [
            (mine - fixed).square().movedim(1, -1)[mask] / 2 for mine, fixed, mask in zip(students, teachers, masks, strict=True)
        ]
        levels = (
            [own.mean() for own in apart] if normalization == "level" else [torch.cat([own.flatten() for own in apart]).mean()]
        )
        assert value.item() == pytest.approx(torch.stack(levels).mean().item(), rel=1e-12)


def test_each_term_sees_its_region_only():
    students = [level.requires_grad_() for level in two_levels(0)]
    terms = defeat_map_terms(students, two_levels(2), MASKS)
    for value, masks in ((terms.foreground, MASKS), (terms.background, [~mask for mask in MASKS])):
        gradients = torch.autograd.grad(value, students, retain_graph=True)
        for gradient, mask in zip(gradients, masks, strict=True):
            assert torch.equal(gradient != 0, mask[:, None].expand_as(gradient))


def test_equal_maps_and_a_constant_difference():
    teachers = two_levels(2)
    assert [term.item() for term in defeat_map_terms(teachers, teachers, MASKS)] == [0.0, 0.0]
    students = [level + 3 for level in teachers]
    assert [term.item() for term in defeat_map_terms(students, teachers, MASKS)] == pytest.approx([4.5, 4.5], rel=1e-12)
    nothing = [torch.zeros_like(mask) for mask in MASKS]
    terms = defeat_map_terms([level.requires_grad_() for level in students], teachers, nothing)
    assert terms.foreground.item() == 0.0
    assert terms.background.item() == pytest.approx(4.5, rel=1e-12)
    terms.foreground.backward()
    assert [term.item() for term in defeat_map_terms(teachers, students, [~mask for mask in nothing])][1] == 0.0


# ---------------------------------------------------------------------------------------------------------- head losses


def test_head_terms_by_hand_and_their_invariances():
    student, teacher, foreground = noise(0, 9, 5).requires_grad_(), noise(1, 9, 5), torch.arange(9) < 3
    for temperature, other in ((1.0, None), (2.0, None), (2.0, 0.5)):
        terms = defeat_head_terms(student, teacher, foreground, ~foreground, temperature, other)
        for value, rows, t in zip(terms, (slice(3), slice(3, 9)), (temperature, other or temperature), strict=True):
            log_p, log_q = ((logits[rows] / t).log_softmax(1) for logits in (teacher, student))
            expected = t**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
            assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    once = defeat_head_terms(student, teacher, foreground, ~foreground)
    shifted = defeat_head_terms(student + noise(2, 9, 1), teacher, foreground, ~foreground)
    assert [term.item() for term in shifted] == pytest.approx([term.item() for term in once], rel=1e-9)
    sigmoid = defeat_head_terms(student, teacher, foreground, ~foreground, 2.0, softmax=False)
    p, q = (teacher / 2).sigmoid(), (student / 2).sigmoid()
    both = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert sigmoid.foreground.item() == pytest.approx(4 * both[:3].sum(dim=1).mean().item(), rel=1e-9)


@pytest.mark.parametrize("softmax", [True, False])
def test_head_terms_of_equal_logits_and_of_empty_groups_are_zero(softmax):
    logits, everything = noise(0, 4, 5).requires_grad_(), torch.ones(4, dtype=torch.bool)
    for foreground in (everything, ~everything):
        terms = defeat_head_terms(logits, logits.detach(), foreground, ~foreground, 3.0, softmax=softmax)
        assert [term.item() for term in terms] == pytest.approx([0.0, 0.0], abs=1e-15)
        sum(terms).backward()
    assert logits.grad.abs().max().item() < 1e-15
    unequal = defeat_head_terms(logits, noise(1, 4, 5), ~everything, everything, softmax=softmax)
    assert unequal.foreground.item() == 0.0
    assert unequal.background.item() > 0


def test_decays():
    steps = (0.0, 0.125, 0.25, 0.5, 1.0)
    assert [defeat_decay(step, "none") for step in steps] == [1.0] * 5
    assert [defeat_decay(step, "linear") for step in steps] == [1.0, 0.875, 0.75, 0.5, 0.0]
    assert [defeat_decay(step, "cosine") for step in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])
    assert [defeat_decay(step, "up_down") for step in steps] == pytest.approx([1.0, 1.5, 2.0, 4 / 3, 0.0])


# -------------------------------------------------------------------------------------------------------------- method


def built(teacher=None, student=None, **settings):
    torch.manual_seed(0)
    student = student or TinyDense()
    return DeFeat(Teacher(teacher or type(student)(channels=(12, 12), seed=1)), student, **settings), student


def learned(batch, clock=NOW, autocast=False, **settings):
    method, student = built(**settings)
    look = method.requirements.student
    taught, seen = method.teach(batch), student(batch, replace(look, prediction=True))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return method.learn(student, seen, taught, batch, clock), method, student


def values(losses):
    return {name: term.item() for name, term in losses.terms.items()}


def with_boxes(batch, boxes):
    return batch.with_targets([Target(boxes, torch.zeros(len(boxes)).long(), torch.zeros(len(boxes)).bool())] * len(batch))


def test_terms_are_weighted_and_parts_without_weight_are_left_out():
    batch = tiny_batch()
    once = values(learned(batch, backbone=True, head="cells")[0])
    assert list(once) == [
        f"defeat_{part}_{side}" for part in ("neck", "backbone", "head") for side in ("foreground", "background")
    ]
    doubled = values(
        learned(
            batch,
            foreground_weight=6.0,
            background_weight=0.0,
            backbone=True,
            backbone_foreground_weight=0.0,
            backbone_background_weight=24.0,
            head="cells",
            head_foreground_weight=4.0,
            head_background_weight=0.0,
        )[0]
    )
    assert doubled == pytest.approx(
        {name: 2 * once[name] for name in ("defeat_neck_foreground", "defeat_backbone_background", "defeat_head_foreground")}
    )
    losses, method, _ = learned(batch, foreground_weight=0.0, background_weight=0.0, head="cells")
    assert list(losses.terms) == ["defeat_head_foreground", "defeat_head_background"]
    assert not list(method.parameters())
    halved = values(learned(batch, Clock(1, 2), backbone=True, head="cells", decay="linear")[0])
    assert halved == pytest.approx({name: value / 2 for name, value in once.items()})


@pytest.mark.parametrize("family", [TinyDense, TinyRegions])
def test_equal_detectors_with_identity_adapters_give_zero(family):
    method, student = built(family(seed=1), family(seed=1), backbone=True, head="cells" if family is TinyDense else "regions")
    for adapter in (*method.adapters, *(part[0] for part in method.backbone_adapters)):
        nn.init.dirac_(adapter.weight)
        nn.init.zeros_(adapter.bias)
    batch = tiny_batch()
    seen = student(batch, replace(method.requirements.student, prediction=True))
    losses = method.learn(student, seen, method.teach(batch), batch, NOW)
    assert values(losses) == pytest.approx(dict.fromkeys(losses.terms, 0.0), abs=1e-9)


def test_without_boxes_the_background_is_half_the_mean_square():
    batch = tiny_batch(boxes=False)
    losses, method, student = learned(batch)
    found = values(losses)
    assert found["defeat_neck_foreground"] == 0.0
    mine, theirs = method.paired_maps(student.features(batch), method.teach(batch).seen.features)
    expected = 12 * sum(F.mse_loss(own, fixed) for own, fixed in zip(mine, theirs, strict=True)) / 2 / len(mine)
    assert found["defeat_neck_background"] == pytest.approx(expected.item(), rel=1e-5)
    losses.total().backward()
    one_empty = values(learned(batch.with_targets([tiny_batch().targets[0], batch.targets[1]]))[0])
    assert all(value > 0 for value in one_empty.values())


def test_adapters_start_near_their_bias():
    method, _ = built(backbone=True)
    convolutions = [*method.adapters, *(part[0] for part in method.backbone_adapters)]
    assert [convolution.kernel_size for convolution in convolutions] == [(3, 3)] * 4
    assert all(0 < convolution.weight.abs().max().item() < 2e-4 for convolution in convolutions)
    drawn = nn.Conv2d(64, 64, 3)
    start_small(drawn)
    # The remainder of a normal number by 2: its variance is below 1.
    assert 0.8e-4 < drawn.weight.std().item() < 0.9e-4


@pytest.mark.parametrize("regions", ["teacher", "student", "both"])
def test_regions_give_the_loss_of_their_own_labels(regions):
    batch = tiny_batch(3)
    losses, method, student = learned(batch, student=TinyRegions(), head="regions", regions=regions, foreground_weight=0.0)
    found, taught = values(losses), method.teach(batch)
    assert (taught.regions is None) is (regions == "student")
    expected = torch.zeros(2)
    if taught.regions is not None:
        boxes = taught.regions.boxes()
        truth = torch.cat(
            [
                torch.tensor([any(_iou(box, other) >= 0.5 for other in target.boxes_xyxy) for box in own])
                for own, target in zip(boxes, batch.targets, strict=True)
            ]
        )
        features = student.features(batch), method.teacher.detector.features(batch)
        both = [
            side.regions(maps, boxes, batch).logits
            for side, maps in zip((student, method.teacher.detector), features, strict=True)
        ]
        assert bool(truth.any())
        expected += torch.stack(defeat_head_terms(*both, truth, ~truth)).detach()
    if regions != "teacher":
        student.train()
        prediction = student(batch, replace(method.requirements.student, prediction=True)).prediction
        matched = student.assign(prediction, batch).matched
        boxes = [prediction.boxes_xyxy[prediction.origin.image == image] for image in range(3)]
        theirs = method.teacher.detector.regions(method.teacher.detector.features(batch), boxes, batch).logits
        order = prediction.origin.image.argsort(stable=True)
        expected += torch.stack(
            defeat_head_terms(prediction.logits[order], theirs, matched[order] >= 0, matched[order] < 0)
        ).detach()
    assert [found["defeat_head_foreground"], found["defeat_head_background"]] == pytest.approx((2 * expected).tolist(), rel=1e-4)


def _iou(box, other):
    corner, opposite = torch.maximum(box[:2], other[:2]), torch.minimum(box[2:], other[2:])
    shared = (opposite - corner).clamp(min=0).prod()
    return float(shared / ((box[2:] - box[:2]).prod() + (other[2:] - other[:2]).prod() - shared))


def test_samples_bound_the_regions_and_are_drawn_by_image():
    batch = tiny_batch(3)
    few, _ = built(student=TinyRegions(), head="regions", samples=4)
    taught = few.teach(batch).regions
    assert taught.count.tolist() == [4, 4, 4]
    few.teacher.forget()
    torch.manual_seed(99)
    alone = replace(batch, **{name: getattr(batch, name)[:1] for name in ("images", "sizes", "targets", "ids", "views")})
    torch.testing.assert_close(few.teach(alone).regions.boxes_xyxy, taught.boxes_xyxy[:1])


def test_cells_compare_positives_and_negatives_of_the_student():
    batch = tiny_batch()
    losses, method, student = learned(batch, head="cells", temperature=2.0, background_temperature=4.0)
    prediction = student(batch).prediction
    theirs = method.teach(batch).seen.prediction.logits
    matched = student.assign(prediction, batch).matched.flatten()
    flat = prediction.logits.flatten(0, 1), theirs.flatten(0, 1)
    expected = defeat_head_terms(*flat, matched >= 0, matched == -1, 2.0, 4.0, softmax=False)
    found = values(losses)
    assert found["defeat_head_foreground"] == pytest.approx(2 * expected.foreground.item(), rel=1e-5)
    assert found["defeat_head_background"] == pytest.approx(2 * expected.background.item(), rel=1e-5)


def test_other_masks():
    batch = tiny_batch()
    everything = values(learned(batch, mask="ones")[0])
    assert everything["defeat_neck_background"] == 0.0
    assert everything["defeat_neck_foreground"] > 0
    for student in (TinyDense(), TinyRegions()):
        near, method, _ = learned(batch, student=student, mask="anchors")
        assert all(value > 0 for value in values(near).values())
        seen = student(batch)
        shapes = [tuple(level.shape[-2:]) for level in seen.features.maps]
        masks = method._masks(seen, [target.boxes_xyxy for target in batch.targets], shapes)
        assert [tuple(mask.shape[1:]) for mask in masks] == shapes
        assert int(masks[0].sum()) > 0
        assert int(masks[1].sum()) == 0  # all boxes are small


def test_crowd_boxes_are_background():
    batch = tiny_batch(count=1)
    crowd = batch.with_targets([replace(batch.targets[0], crowd=torch.ones(len(batch.targets[0]), dtype=torch.bool))])
    assert values(learned(crowd)[0]) == values(learned(tiny_batch(count=1, boxes=False))[0])


@pytest.mark.parametrize(
    "box", [[0.0, 0.0, 64.0, 64.0], [63.5, 63.5, 64.0, 64.0], [-9.0, -9.0, 3.0, 200.0], [80.0, 80.0, 90.0, 90.0]]
)
@pytest.mark.parametrize("mask", ["boxes", "anchors"])
def test_boxes_on_and_beyond_the_border(box, mask):
    losses, *_ = learned(with_boxes(tiny_batch(), torch.tensor([box])), backbone=True, head="cells", mask=mask)
    losses.total().backward()
    assert all(value >= 0 and value == value and value < 1e9 for value in values(losses).values())


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (TinyDense(channels=(12, 16), strides=(16, 32), seed=1), TinyDense()),  # one common level
        (TinyDense(strides=(32, 64), seed=1), TinyDense(strides=(32, 64))),  # a level of one cell
    ],
)
def test_other_pyramids(teacher, student):
    losses, method, _ = learned(tiny_batch(count=1), teacher=teacher, student=student, backbone=True)
    losses.total().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())


def test_a_box_keeps_its_level_when_finer_levels_are_left_out():
    batch = with_boxes(tiny_batch(count=1), torch.tensor([[0.0, 0.0, 40.0, 40.0]]))
    assert values(learned(batch, levels=(1,))[0])["defeat_neck_foreground"] > 0
    method, _ = built(levels=(1,))
    assert method.base == 112.0


def test_half_precision_does_not_reach_the_losses():
    settings = {"backbone": True, "head": "cells"}
    plain, mixed = (learned(tiny_batch(), autocast=autocast, **settings)[0].terms for autocast in (False, True))
    assert {name: term.dtype for name, term in mixed.items()} == dict.fromkeys(plain, torch.float32)
    assert all(torch.equal(mixed[name], term) for name, term in plain.items())


@pytest.mark.parametrize(
    ("teacher", "student", "settings", "message"),
    [
        (
            TinyDense,
            TinyDense,
            {"foreground_weight": 0, "background_weight": 0},
            "foreground_weight, background_weight are all 0",
        ),
        (
            TinyDense,
            TinyQueries,
            {"mask": "anchors"},
            "mask=anchors needs a student with anchors or points; tinyqueries:patches has none",
        ),
        (
            TinyDense,
            TinyDense,
            {"head": "regions"},
            "the student tinydense:patches predicts dense; it needs a student that predicts regions",
        ),
        (TinyRegions, TinyDense, {"head": "cells"}, "the teacher tinyregions:patches predicts regions"),
        (TinyDense, TinyDense, {"temperature": 0.0}, "temperature=0.0 is not a number above 0"),
        (TinyDense, TinyDense, {"mask": "gt"}, "mask=gt is not one of boxes, anchors, ones"),
    ],
)
def test_what_does_not_fit_is_refused(teacher, student, settings, message):
    with pytest.raises(DetdistillError) as error:
        built(teacher(seed=1), student(), **settings)
    assert str(error.value).startswith(f"defeat: {message}")


def test_teacher_with_other_classes_is_refused_for_the_head_only():
    strange = TinyRegions(classes=("a", "c"), seed=1)
    with pytest.raises(DetdistillError, match="it compares class scores, but the teacher does not know b"):
        built(strange, TinyRegions(), head="regions")
    reordered = TinyRegions(classes=("c", "b", "a"), seed=1)
    method, _ = built(reordered, TinyRegions(), head="regions")
    assert method.columns == [2, 1, 3]
    built(strange, TinyRegions())


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({"backbone": True, "mask": "boxes"}, 18),
        ({"head": "cells"}, 2),
        ({"head": "regions", "samples": 6}, 2),
        ({"head": "regions", "regions": "both"}, 2),
    ],
)
def test_contract(settings, pairs):
    assert len(check_method(DeFeat, **settings)) == pairs


def test_the_losses_fall_in_training():
    batch = tiny_batch()
    method, student = built(student=TinyRegions(), head="regions", backbone=True)
    taught = method.teach(batch)
    assert isinstance(taught, DeFeatTaught)
    optimizer = torch.optim.AdamW([*student.parameters(), *method.parameters()], lr=3e-3)
    history = []
    for _ in range(40):
        seen = student(batch, replace(method.requirements.student, prediction=True))
        total = method.learn(student, seen, taught, batch, NOW).total()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    assert history[-1] < 0.7 * history[0]
