import dataclasses
import itertools

import pytest
import torch
from torch import nn

from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.methods.fgfi import FGFI, fgfi_loss, fgfi_masks, fgfi_virtual_anchors
from detdistill.methods.shared.contract import teach_by_canvas
from detdistill.structures import Clock, Target
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method, without_boxes
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch

NOW = Clock(500, 1000)


class TinyAnchors(TinyDense):
    """Like ``TinyDense``, but the prior of each cell is four strides wide and high."""

    def predict(self, features, batch):
        dense = super().predict(features, batch)
        center = (dense.priors_xyxy[..., :2] + dense.priors_xyxy[..., 2:]) / 2
        half = 2.0 * torch.tensor(self.spec.strides)[dense.levels, None]
        return dataclasses.replace(dense, priors_xyxy=torch.cat([center - half, center + half], dim=-1))


def boxes_of(golden):
    return [boxes.reshape(-1, 4) for boxes in golden.levels("in_boxes")]


def adapter(parameters):
    weight = parameters["weight"]
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2).double()
    layer.load_state_dict(parameters)
    return layer


# -------------------------------------------------------------------------------------------------------------- golden


def test_the_official_form_equals_the_released_code():
    golden = Golden("fgfi")
    settings = golden.meta["hyperparameters"]
    (mask,) = fgfi_masks([golden["in_anchors"]], boxes_of(golden), settings["psi"], "official")
    assert torch.equal(mask, golden["out_mask_0"][:, 0].bool())
    assert 2 * int(mask.sum()) == int(golden["out_norm"])
    student, layer = golden["in_student_0"].requires_grad_(), adapter(golden.parameters("param_adapt."))
    adapted = layer(student).relu()
    total = fgfi_loss([adapted], [golden["in_teacher_0"]], [mask], settings["imitation_weight"], "official")
    assert_golden(total, golden["out_total"])
    total.backward()
    assert_golden(student.grad, golden["grad_student_0"])
    for name, parameter in layer.named_parameters():
        assert_golden(parameter.grad, golden[f"grad_param_adapt.{name}"])


def test_the_fpn_form_equals_the_released_code():
    golden = Golden("fgfi_fpn")
    masks = fgfi_masks(golden.levels("in_anchors"), boxes_of(golden), golden.meta["phi"])
    for mask, expected in zip(masks, golden.levels("out_mask"), strict=True):
        assert torch.equal(mask, expected.bool())
    students = [level.requires_grad_() for level in golden.levels("in_student")]
    adapted = [adapter(golden.parameters(f"param_l{level}.adapt."))(student) for level, student in enumerate(students)]
    total = fgfi_loss(adapted, golden.levels("in_teacher"), masks, golden.meta["weight"])
    assert_golden(total, golden["out_total"])
    total.backward()
    for student, expected in zip(students, golden.levels("grad_student"), strict=True):
        assert_golden(student.grad, expected)


# --------------------------------------------------------------------------------------------------------------- masks

SHAPES = [(8, 10), (4, 5)]
ANCHORS = fgfi_virtual_anchors([8, 16], SHAPES)
BOXES = [torch.tensor([[9.0, 12.0, 41.0, 50.0], [60.0, 8.0, 79.0, 30.0]]), torch.zeros(0, 4)]
EVERY = {"form": "fpn", "all_levels": True}


def test_every_box_selects_a_cell_and_an_empty_image_none():
    for settings in ({"form": "official"}, EVERY):
        for level in fgfi_masks(ANCHORS, BOXES, **settings):
            assert level.dtype == torch.bool
            assert not level[1].any()
        for box in BOXES[0]:
            assert all(bool(level.any()) for level in fgfi_masks(ANCHORS, [box[None]], **settings))


def test_a_box_counts_on_the_level_of_its_size_only():
    small, large = torch.tensor([[0.0, 0.0, 50.0, 50.0]]), torch.tensor([[0.0, 0.0, 79.0, 300.0]])
    for box, level in ((small, 0), (large, 1)):
        found = [bool(mask.any()) for mask in fgfi_masks(ANCHORS, [box])]
        assert found == [level == 0, level == 1]


def test_a_larger_psi_never_adds_cells():
    masks = [fgfi_masks(ANCHORS, BOXES, psi, **EVERY) for psi in (0.0, 0.3, 0.5, 0.8, 1.0)]
    for looser, tighter in itertools.pairwise(masks):
        assert all(bool((a | ~b).all()) for a, b in zip(looser, tighter, strict=True))
    assert not any(bool(level.any()) for level in masks[-1])
    for level, anchors in zip(masks[0], ANCHORS, strict=True):  # psi 0: all cells with an anchor that overlaps a box
        low, high = anchors[..., None, :2], anchors[..., None, 2:]
        overlaps = (torch.maximum(low, BOXES[0][:, :2]) < torch.minimum(high, BOXES[0][:, 2:])).all(dim=-1)
        assert torch.equal(level[0], overlaps.any(dim=(2, 3)))


def test_moving_a_box_by_a_stride_moves_the_mask_by_a_cell():
    anchors = fgfi_virtual_anchors([8], [(24, 24)])
    box = torch.tensor([[70.0, 61.0, 101.0, 94.0]])
    before, after = (fgfi_masks(anchors, [some])[0] for some in (box, box + 8))
    assert bool(before.any())
    assert torch.equal(after[:, 1:, 1:], before[:, :-1, :-1])


def test_boxes_without_area_select_nothing():
    flat = torch.tensor([[10.0, 10.0, 10.0, 30.0], [5.0, 5.0, 5.0, 5.0]])
    for settings in ({"form": "official"}, {"form": "fpn"}):
        assert not any(bool(level.any()) for level in fgfi_masks(ANCHORS, [flat], **settings))


def test_one_box_over_everything_and_a_level_of_one_cell():
    anchors = fgfi_virtual_anchors([8, 64], [(8, 8), (1, 1)])
    masks = fgfi_masks(anchors, [torch.tensor([[0.0, 0.0, 64.0, 64.0]])], **EVERY)
    assert all(bool(mask.any()) for mask in masks)


def test_virtual_anchors_are_those_of_rpn_and_retinanet():
    rpn, retinanet = fgfi_virtual_anchors([4], [(2, 3)])[0], fgfi_virtual_anchors([8], [(2, 3)])[0]
    assert rpn.shape == (2, 3, 3, 4)
    assert retinanet.shape == (2, 3, 9, 4)
    width, height = (rpn[1, 2, :, 2:] - rpn[1, 2, :, :2]).unbind(1)
    assert (width * height).tolist() == pytest.approx([32.0**2] * 3)
    assert (height / width).tolist() == pytest.approx([0.5, 1.0, 2.0])
    assert ((rpn[1, 2, 0, :2] + rpn[1, 2, 0, 2:]) / 2).tolist() == [8.0, 4.0]
    sides = (retinanet[0, 0, ::3, 2:] - retinanet[0, 0, ::3, :2]).prod(dim=1).sqrt()
    assert sides.tolist() == pytest.approx([32 * 2 ** (step / 3) for step in range(3)])


# ---------------------------------------------------------------------------------------------------------------- loss


def maps(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.zeros(2, 5, 6, dtype=torch.bool)
MASK[0, 1:3, 2:4] = True


def test_zero_and_gradients_only_in_the_mask():
    student, teacher = maps(0, 2, 4, 5, 6).requires_grad_(), maps(1, 2, 4, 5, 6).requires_grad_()
    assert fgfi_loss([teacher], [teacher], [MASK]).item() == 0.0
    fgfi_loss([student], [teacher], [MASK]).backward()
    assert torch.equal(student.grad != 0, MASK[:, None].expand_as(student))
    assert teacher.grad is None


def test_both_forms_differ_by_the_channels():
    student, teacher = maps(0, 2, 4, 5, 6), maps(1, 2, 4, 5, 6)
    official = fgfi_loss([student], [teacher], [MASK], 0.01, "official")
    assert official.item() == pytest.approx(0.01 * 4 * fgfi_loss([student], [teacher], [MASK], 1.0).item(), rel=1e-12)
    assert fgfi_loss([student], [teacher], [MASK], form="official").item() == official.item()


def test_neither_an_empty_image_nor_a_copy_of_the_batch_changes_the_loss():
    student, teacher = maps(0, 2, 4, 5, 6), maps(1, 2, 4, 5, 6)
    for form in ("official", "fpn"):
        with_empty = fgfi_loss([student], [teacher], [MASK], form=form)
        without = fgfi_loss([student[:1]], [teacher[:1]], [MASK[:1]], form=form)
        twice = fgfi_loss([student.repeat(2, 1, 1, 1)], [teacher.repeat(2, 1, 1, 1)], [MASK.repeat(2, 1, 1)], form=form)
        assert with_empty.item() == pytest.approx(without.item(), rel=1e-12) == pytest.approx(twice.item(), rel=1e-12)


def test_no_near_cell_gives_zero_with_a_gradient():
    student = maps(0, 2, 4, 5, 6).requires_grad_()
    loss = fgfi_loss([student], [maps(1, 2, 4, 5, 6)], [torch.zeros_like(MASK)], form="official")
    loss.backward()
    assert loss.item() == 0.0
    assert not student.grad.any()


# -------------------------------------------------------------------------------------------------------------- method


def built(teacher=None, **settings):
    torch.manual_seed(0)
    student = TinyDense()
    return FGFI(Teacher(teacher or TinyAnchors(channels=(12, 12), seed=1)), student, **settings), student


def learned(batch, clock=NOW, **settings):
    method, student = built(**settings)
    return method.learn(student, student(batch), method.teach(batch), batch, clock)


@pytest.mark.parametrize("settings", [{"form": "official", "psi": 0.4}, {}, {"all_levels": True}])
def test_the_term_is_the_loss_of_the_teachers_masks(settings):
    batch = tiny_batch()
    method, student = built(**settings)
    dense = method.teacher.observe(batch, dataclasses.replace(method.requirements.teacher, prediction=True)).prediction
    anchors = [dense.priors_xyxy[0, dense.levels == level].view(n, n, 1, 4) for level, n in ((0, 8), (1, 4))]
    form, rest = settings.get("form", "fpn"), {name: settings[name] for name in ("psi", "all_levels") if name in settings}
    masks = fgfi_masks(anchors, [target.boxes_xyxy for target in batch.targets], form=form, **rest)
    mine = method.adapters(student.features(batch).maps)
    assert all(bool((level >= 0).all()) for level in mine) is (form == "official")
    expected = fgfi_loss(mine, method.teacher.observe(batch).features.maps, masks, form=form)
    losses = learned(batch, **settings)
    assert losses.terms["fgfi"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses.monitors["near_cells"].item() == sum(int(mask.sum()) for mask in masks) / 2


def test_points_and_queries_get_virtual_anchors():
    batch = tiny_batch()
    for kind in (TinyDense, TinyRegions, TinyQueries):
        method, _ = built(kind(channels=(12, 12), seed=1))
        features = method.teacher.observe(batch).features
        anchors = method._anchors(features, batch)
        assert [level.shape for level in anchors] == [(8, 8, 9, 4), (4, 4, 9, 4)]
    own, _ = built(TinyDense(seed=1), anchors="own")
    assert [level.shape for level in own._anchors(features, batch)] == [(8, 8, 1, 4), (4, 4, 1, 4)]
    with pytest.raises(DetdistillError, match=r"fgfi: the teacher tinyqueries:patches has no anchors; use anchors=virtual"):
        built(TinyQueries(), anchors="own")


def test_warm_up_switches_the_loss_off():
    batch = tiny_batch()
    off, on = (learned(batch, Clock(step, 1000), form="official").terms["fgfi"] for step in (399, 400))
    assert off.item() == 0.0
    assert on.item() > 0.0
    assert learned(batch, Clock(0, 1000)).terms["fgfi"].item() > 0.0


def test_defaults_are_the_released_ones():
    several, _ = built()
    assert (several.form, several.warm_steps, isinstance(several.adapters[0], nn.Conv2d)) == ("fpn", 0, True)
    single = FGFI(Teacher(TinyDense(channels=(8,), strides=(8,))), TinyDense(channels=(8,), strides=(8,)))
    assert (single.form, single.warm_steps, isinstance(single.adapters[0][1], nn.ReLU)) == ("official", 400, True)
    weight = several.adapters[0].weight.detach()
    assert 1e-5 < float(weight.abs().max()) < 2e-4


def test_cells_are_few_and_crowd_boxes_and_padding_select_none():
    batch = tiny_batch(3)
    method, _ = built(psi=0.9)
    near = method.teach(batch).near
    assert 0 < sum(len(level) for level in near) < 3 * 80
    crowd = [Target(target.boxes_xyxy, target.labels, torch.ones_like(target.crowd)) for target in batch.targets]
    assert sum(len(level) for level in method.teach(batch.with_targets(crowd)).near) == 0
    apart = dataclasses.replace(batch, canvases_hw=tuple(view.size_hw for view in batch.views))
    alone = teach_by_canvas(method, apart).near[0]
    assert int(alone.cells[alone.image == 1, 0].max()) < 6  # the second image is 48 pixels high


def test_fewer_teacher_levels():
    torch.manual_seed(0)
    student = TinyDense(channels=(8, 8), strides=(8, 16))
    method = FGFI(Teacher(TinyDense(channels=(12,), strides=(16,), seed=1)), student, form="fpn")
    batch = tiny_batch()
    assert len(method.pairs) == 1
    assert method.learn(student, student(batch), method.teach(batch), batch, NOW).terms["fgfi"].item() > 0


def test_a_batch_without_boxes_is_zero():
    batch = without_boxes(tiny_batch(2), range(2))
    for settings in ({}, {"form": "official"}):
        loss = learned(batch, **settings).terms["fgfi"]
        loss.backward()
        assert loss.item() == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"psi": 1.5}, "psi=1.5 is not a number from 0 to 1"),
        ({"weight": -1.0}, "weight=-1.0 is not a number, 0 or more, or none"),
        ({"form": "single"}, "form=single is not one of official, fpn, or none"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(DetdistillError) as error:
        built(**settings)
    assert str(error.value).startswith(f"fgfi: {message}")


def test_contract():
    assert len(check_method(FGFI)) == 18
