from dataclasses import replace

import pytest
import torch

from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.attention import channel_attention, spatial_attention
from detdistill.methods.glamd import (
    GLAMD,
    GLAMDLevel,
    glamd_attention,
    glamd_box_loss,
    glamd_channel_loss,
    glamd_class_loss,
    glamd_feature_loss,
)
from detdistill.methods.shared.contract import teach_by_canvas
from detdistill.methods.shared.needs import PairError
from detdistill.structures import Clock
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method
from tests.tiny import TinyDense, TinyQueries, TinyRegions, tiny_batch


@pytest.fixture(params=["glamd", "glamd_two_stage"])
def golden(request):
    return Golden(request.param)


def golden_level(golden, level):
    """The student's map with gradient, and the terms, attention, and local losses of one level."""
    settings = golden.meta["hyperparameters"]
    student, teacher = golden[f"in_student_{level}"].requires_grad_(), golden[f"in_teacher_{level}"]
    part = GLAMDLevel(student.shape[1], teacher.shape[1]).to(student.dtype)
    part.load_state_dict(golden.parameters(f"param_l{level}."))
    patch, eps = settings["patch"], settings["eps_in_patch_norm"]
    terms, attention = part(student, teacher, settings["T"], patch, settings["channel_mask"], eps)
    local_feature = glamd_feature_loss(part.adapt_feature(student), teacher, attention, patch, eps)[1]
    local_channel = glamd_channel_loss(student, teacher, part.adapt_channel, patch)[1]
    return student, terms, attention, settings["w_feat_local"] * local_feature, settings["w_channel_local"] * local_channel


def head_losses(golden, level, mask):
    """The student's logits and boxes with gradient, and both losses of one level, unweighted."""
    logits, fixed = (golden[f"in_{side}_logits_{level}"] for side in ("student", "teacher"))
    boxes, fixed_boxes = (golden[f"in_{side}_boxes_{level}"] for side in ("student", "teacher"))
    logits.requires_grad_(), boxes.requires_grad_()
    anchors = golden.meta["hyperparameters"]["anchors"]
    one_by_one = [value.unflatten(1, (anchors, -1)).permute(0, 3, 4, 1, 2) for value in (logits, fixed)]  # [B, H, W, A, K]
    weights = mask[..., None].expand(*mask.shape, anchors)
    class_loss = glamd_class_loss(*one_by_one, weights / mask.sum())
    box_loss = glamd_box_loss(boxes, fixed_boxes, weights.flatten() / weights.numel())
    return logits, boxes, class_loss, box_loss


def test_values_and_gradients_equal_the_released_code(golden):
    settings = golden.meta["hyperparameters"]
    assert settings["w_feat_global"] == settings["w_feat_local"]
    assert settings["w_channel_global"] == settings["w_channel_local"]
    both_channels = 2 if settings["channel_combine"] == "global+local" else 1
    weights = {
        "feat": settings["w_feat_global"],
        "channel": both_channels * settings["w_channel_global"],
        "spatial": settings["w_spatial"],
        "cls_head": settings["w_cls"],
        "reg_head": settings["w_reg"],
    }
    inputs, sums = [], []
    for level in range(len(golden.levels("in_student"))):
        student, terms, attention, local_feature, local_channel = golden_level(golden, level)
        assert_golden(attention.local_cells[:, None], golden[f"out_local_mask_{level}"])
        assert_golden(attention.mask()[:, None], golden[f"out_mask_{level}"])
        assert_golden(local_feature, golden[f"out_local_feat_{level}"])
        assert_golden(local_channel, golden[f"out_local_channel_{level}"])
        logits, boxes, class_loss, box_loss = head_losses(golden, level, attention.mask())
        inputs.append((student, logits, boxes))
        sums.append(torch.stack([*terms, class_loss, box_loss]))
    found = dict(zip(weights, torch.stack(sums).sum(dim=0), strict=True))
    for name, value in found.items():
        assert_golden(weights[name] * value, golden[f"out_{name}"])
    total = sum(weights[name] * value for name, value in found.items())
    assert_golden(total, golden["out_total"])
    total.backward()
    for level, tensors in enumerate(inputs):
        for name, tensor in zip(("student", "student_logits", "student_boxes"), tensors, strict=True):
            assert_golden(tensor.grad, golden[f"grad_{name}_{level}"])


# -------------------------------------------------------------------------------------------------------------- attention


def maps(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def patches(height, width, side):
    """Slices of all patches of a map."""
    for row in range(0, height, side):
        for column in range(0, width, side):
            yield slice(row, row + side), slice(column, column + side)


@pytest.mark.parametrize(("height", "width", "side"), [(9, 16, 7), (3, 4, 7), (1, 1, 7), (14, 7, 7), (5, 6, 2), (4, 5, 1)])
def test_attention_equals_that_of_each_patch_alone(height, width, side):
    student, teacher = maps(0, 2, 6, height, width), maps(1, 2, 6, height, width)
    attention = glamd_attention(student, teacher, 0.5, side)
    expected = (spatial_attention(student, 0.5) + spatial_attention(teacher, 0.5)) / 2
    torch.testing.assert_close(attention.cells, expected)
    torch.testing.assert_close(attention.channels, (channel_attention(student, 0.5) + channel_attention(teacher, 0.5)) / 2)
    for rows, columns in patches(height, width, side):
        mine, theirs = student[..., rows, columns], teacher[..., rows, columns]
        cells = (spatial_attention(mine, 0.5) + spatial_attention(theirs, 0.5)) / 2
        torch.testing.assert_close(attention.local_cells[:, rows, columns], cells)
        channels = (channel_attention(mine, 0.5) + channel_attention(theirs, 0.5)) / 2
        torch.testing.assert_close(attention.local_channels[:, :, rows.start // side, columns.start // side], channels)
    assert attention.mask().sum(dim=(1, 2)).tolist() == pytest.approx([height * width] * 2)


def test_losses_equal_those_of_patches_one_after_the_other():
    student, teacher = maps(2, 2, 6, 9, 12), maps(3, 2, 6, 9, 12)
    attention = glamd_attention(student, teacher, 0.5, 4)
    adapter = torch.nn.Linear(6, 6).double()
    feature, channel = [], []
    for rows, columns in patches(9, 12, 4):
        mine, theirs = student[..., rows, columns], teacher[..., rows, columns]
        weights = attention.local_cells[:, None, rows, columns]
        channels = attention.local_channels[:, :, rows.start // 4, columns.start // 4, None, None]
        feature.append(((mine - theirs).square() * weights * channels).sum().sqrt())
        gap = theirs.mean(dim=(2, 3)) - adapter(mine.mean(dim=(2, 3)))
        channel.append((gap + 1e-6).square().sum().sqrt())
    whole, in_patches = glamd_feature_loss(student, teacher, attention, 4)
    torch.testing.assert_close(in_patches, torch.stack(feature).sum())
    weights = attention.cells[:, None] * attention.channels[:, :, None, None]
    torch.testing.assert_close(whole, ((student - teacher).square() * weights).sum().sqrt())
    torch.testing.assert_close(glamd_channel_loss(student, teacher, adapter, 4)[1], torch.stack(channel).mean())


def test_one_patch_over_the_whole_map_is_the_map():
    student, teacher = maps(4, 2, 6, 5, 4), maps(5, 2, 6, 5, 4)
    attention = glamd_attention(student, teacher, 0.1, 7)
    torch.testing.assert_close(attention.local_cells, attention.cells)
    torch.testing.assert_close(attention.mask(), attention.cells)
    whole, in_patches = glamd_feature_loss(student, teacher, attention, 7)
    assert whole.item() == pytest.approx(in_patches.item(), rel=1e-12)


def test_the_content_of_a_patch_changes_only_its_own_attention():
    student, teacher = maps(6, 1, 6, 8, 8), maps(7, 1, 6, 8, 8)
    before = glamd_attention(student, teacher, 0.5, 4)
    student[..., :4, 4:] = student[..., :4, 4:].roll(1, dims=-1)
    after = glamd_attention(student, teacher, 0.5, 4)
    changed = before.local_cells != after.local_cells
    assert bool(changed[:, :4, 4:].any())
    assert not bool(changed[:, 4:].any())
    assert not bool(changed[:, :4, :4].any())


def test_cells_without_any_strength_are_ordinary_cells():
    """The released code takes them for padding; a patch of zeros is then NaN."""
    nothing = torch.zeros(1, 6, 8, 8, dtype=torch.float64)
    attention = glamd_attention(nothing, nothing, 0.1, 7)
    assert torch.equal(attention.mask(), torch.ones_like(attention.cells))


def identity(channels):
    part = GLAMDLevel(channels, channels).double()
    with torch.no_grad():
        for adapter in (part.adapt_feature, part.adapt_channel, part.adapt_spatial):
            adapter.weight.zero_()
            adapter.bias.zero_()
        for adapter in (part.adapt_feature, part.adapt_channel):
            adapter.weight.view(channels, channels).copy_(torch.eye(channels))
        part.adapt_spatial.weight[0, 0, 1, 1] = 1
    return part


@pytest.mark.parametrize("eps", [0.0, 1e-10])
def test_equal_maps_have_no_loss_and_finite_gradients(eps):
    student = maps(8, 2, 6, 8, 9).requires_grad_()
    terms, _ = identity(6)(student, student.detach(), eps=eps)
    sum(terms).backward()
    assert bool(torch.isfinite(student.grad).all())
    assert terms.feature.item() == pytest.approx(4 * eps**0.5 / 2)  # four patches
    assert terms.spatial.item() == 0.0
    assert terms.channel.item() == pytest.approx(1e-6 * (2 * 6) ** 0.5 / 2, rel=1e-6)


def test_gradients_reach_adapters_and_student_but_not_the_teacher():
    student, teacher = maps(9, 2, 4, 8, 9).requires_grad_(), maps(10, 2, 6, 8, 9).requires_grad_()
    torch.manual_seed(0)
    part = GLAMDLevel(4, 6).double()
    terms, attention = part(student, teacher)
    assert not any(value.requires_grad for value in attention)
    sum(terms).backward()
    assert teacher.grad is None
    for tensor in (student, *part.parameters()):
        assert float(tensor.grad.abs().max()) > 0


def test_swapping_images_and_padding_change_nothing():
    student, teacher = maps(11, 2, 6, 9, 10), maps(12, 2, 6, 9, 10)
    torch.manual_seed(0)
    part = GLAMDLevel(6, 6).double()
    with torch.no_grad():
        part.adapt_spatial.weight.zero_()[0, 0, 1, 1] = 0.5  # the 3x3 convolution would see the border
    expected, attention = part(student, teacher)
    swapped, _ = part(student.flip(0), teacher.flip(0))
    assert [term.item() for term in swapped] == pytest.approx([term.item() for term in expected], rel=1e-12)
    around = torch.full((2, 6, 16, 20), 3.0, dtype=torch.float64)
    around[..., :9, :10] = student
    wide = torch.zeros_like(around)
    wide[..., :9, :10] = teacher
    around.requires_grad_()
    padding = torch.ones(2, 16, 20, dtype=torch.bool)
    padding[:, :9, :10] = False
    padded, wider = part(around, wide, padding=padding)
    assert wider.mask()[padding].unique().tolist() == [0.0]
    torch.testing.assert_close(wider.mask()[:, :9, :10], attention.mask())
    assert [term.item() for term in padded] == pytest.approx([term.item() for term in expected], rel=1e-12)
    sum(padded).backward()
    assert not bool(around.grad.masked_select(padding[:, None]).any())


def test_head_losses_by_hand():
    logits, fixed = torch.tensor([[0.0, 1.0], [2.0, -1.0]]).requires_grad_(), torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    glamd_class_loss(logits, fixed, torch.tensor([0.5, 0.0])).backward()
    assert not bool(logits.grad.any())
    box = torch.tensor([[0.0, 0.0, 4.0, 4.0], [9.0, 9.0, 10.0, 10.0]])
    other = torch.tensor([[0.0, 0.0, 4.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
    assert glamd_box_loss(box, box, torch.ones(2)).item() == 0.0
    assert glamd_box_loss(other, box, torch.tensor([0.5, 0.25])).item() == pytest.approx(0.25 + 0.25 * (1 - 1e-6))


# ----------------------------------------------------------------------------------------------------------------- method


def learned(batch, teacher=None, student=None, **settings):
    torch.manual_seed(0)
    student = student or TinyDense()
    method = GLAMD(Teacher(teacher or TinyDense(channels=(12, 12), seed=1)), student, **settings)
    return method.learn(student, student(batch), teach_by_canvas(method, batch), batch, Clock(0, 1)).terms


def test_terms_are_the_weighted_sums_over_levels():
    batch, student, teacher = tiny_batch(1), TinyDense(), TinyDense(channels=(12, 12), seed=1)
    torch.manual_seed(0)
    method = GLAMD(Teacher(teacher), student)
    seen, taught = student(batch), method.teach(batch)
    terms = method.learn(student, seen, taught, batch, Clock(0, 1)).terms
    expected = dict.fromkeys(terms, torch.zeros(()))
    for level, part in enumerate(method.parts):
        found, attention = part(seen.features.maps[level], taught.features.maps[level])
        here = seen.prediction.levels == level
        mask = attention.mask().flatten(1)  # the tiny head lists cells row by row, one anchor
        weights = {"class": mask / mask.sum(), "box": mask / mask.numel()}
        head = {
            "class": glamd_class_loss(seen.prediction.logits[:, here], taught.prediction.logits[:, here], weights["class"]),
            "box": glamd_box_loss(seen.prediction.boxes_xyxy[:, here], taught.prediction.boxes_xyxy[:, here], weights["box"]),
        }
        for name, value in {**found._asdict(), **head}.items():
            expected[f"glamd_{name}"] = expected[f"glamd_{name}"] + method.weights[name] * value
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-5
    )


def test_profiles_are_the_released_settings():
    def settings(detector, **given):
        method = GLAMD(Teacher(detector()), detector(), **given)
        return method.weights, method.settings_of_attention

    one_stage = {"feature": 4.2e-4, "channel": 2.4e-2, "spatial": 2.4e-2, "class": 0.1, "box": 0.1}
    two_stage = {"feature": 7e-5, "channel": 4e-3, "spatial": 4e-3, "class": 0.1, "box": 0.1}
    assert settings(TinyDense) == (one_stage, {"temperature": 0.1, "patch": 7, "channel_mask": True, "eps": 0.0})
    expected = two_stage | {"feature": 0.5}, {"temperature": 2.0, "patch": 3, "channel_mask": False, "eps": 1e-10}
    assert settings(TinyRegions, profile="two_stage", feature_weight=0.5, temperature=2.0, patch=3) == expected


def test_the_first_stages_are_compared():
    student = TinyRegions()
    terms = learned(tiny_batch(), TinyRegions(channels=(12, 12), seed=1), student, profile="two_stage")
    (terms["glamd_class"] + terms["glamd_box"]).backward()
    assert float(student.rpn.logits.weight.grad.abs().max()) > 0
    assert float(student.rpn.deltas.weight.grad.abs().max()) > 0
    assert student.logits.weight.grad is None


def test_features_alone_serve_any_pair():
    assert set(learned(tiny_batch(), TinyRegions(seed=1), TinyQueries(), class_weight=0.0, box_weight=0.0)) == {
        "glamd_feature",
        "glamd_channel",
        "glamd_spatial",
    }


def test_classes_are_matched_by_name():
    plain, turned = TinyDense(("a", "b"), seed=1), TinyDense(("b", "a"), seed=1)
    with torch.no_grad():
        turned.head.logits.weight.copy_(plain.head.logits.weight.flip(0))
        turned.head.logits.bias.copy_(plain.head.logits.bias.flip(0))
    found = [learned(tiny_batch(), teacher)["glamd_class"].item() for teacher in (plain, turned)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_images_on_canvases_of_their_own_and_levels_of_one_cell_are_finite():
    apart = replace(tiny_batch(2), canvases_hw=((64, 64), (48, 64)))
    coarse = {"channels": (8, 8, 8), "strides": (8, 16, 64)}
    for batch, levels in ((apart, {}), (tiny_batch(2), coarse), (tiny_batch(1, boxes=False), {})):
        student = TinyDense(**levels)
        terms = learned(batch, TinyDense(seed=1, **levels), student)
        assert all(bool(torch.isfinite(term)) for term in terms.values())
        sum(terms.values()).backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("teacher", "student", "settings", "message"),
    [
        (
            TinyRegions,
            TinyRegions,
            {},
            "the student tinyregions:patches predicts regions; it needs a student that predicts dense",
        ),
        (TinyDense, TinyDense, {"profile": "two_stage"}, "the student tinydense:patches predicts dense; it needs a student that"),
    ],
)
def test_pairs_that_cannot_be_used_are_refused(teacher, student, settings, message):
    with pytest.raises(PairError) as error:
        GLAMD(Teacher(teacher()), student(), **settings)
    assert str(error.value).startswith(f"glamd: {message}")


def test_equal_cells_are_needed_for_the_head_only():
    teacher, student = TinyDense(strides=(8, 32), seed=1), TinyDense()
    with pytest.raises(PairError, match="glamd: it compares predictions cell by cell"):
        GLAMD(Teacher(teacher), student)
    assert len(GLAMD(Teacher(teacher), student, class_weight=0.0, box_weight=0.0).pairs) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": 0}, "patch=0 is not a whole number, 1 or more"),
        ({"temperature": 0.0}, "temperature=0.0 is not a number above 0 or none"),
        (
            {f"{name}_weight": 0.0 for name in ("feature", "channel", "spatial", "class", "box")},
            "feature_weight, channel_weight, spatial_weight, class_weight, box_weight are all 0; nothing would be distilled",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(DetdistillError) as error:
        GLAMD(Teacher(TinyDense()), TinyDense(), **settings)
    assert str(error.value).startswith(f"glamd: {message}")


def test_contract():
    assert check_method(GLAMD) == ["dense 8 -> dense 8", "dense 16 -> dense 8"]
    assert check_method(GLAMD, profile="two_stage") == ["regions 8 -> regions 8", "regions 16 -> regions 8"]
