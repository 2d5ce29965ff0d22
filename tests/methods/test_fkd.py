import math
import re

import pytest
import torch

from detdistill.detectors.contract import Teacher
from detdistill.errors import DetdistillError
from detdistill.functional.attention import channel_attention, spatial_attention
from detdistill.losses import fkd_attention, fkd_loss
from detdistill.methods.fkd import FKD, FKDLevel, FKDTerms
from detdistill.structures import Clock
from tests.golden import Golden, assert_golden
from tests.methods.contract_checks import check_method
from tests.tiny import TinyDense, tiny_batch

RELEASED = {
    "s.nonlocal.": "student_nonlocal.",
    "t.nonlocal.": "teacher_nonlocal.",
    "s.adapt_": "adapt_",
    ".g.": ".values.",
    ".out.bn.": ".norm_",
}


def ours(name):
    """A name of the released state dict in our modules."""
    for theirs, part in RELEASED.items():
        name = name.replace(theirs, part)
    return name


def golden_level(golden, level):
    """Our modules with the parameters of one level; MMRazor pools by 2 and then by its ``maxpool_stride``."""
    released = golden.parameters(f"param_l{level}.")
    settings = golden.meta["levels"][level]
    assert settings.get("mode", "dot_product") == "dot_product"
    inner, channels = released["s.nonlocal.theta.weight"].shape[:2]
    pool = 2 * settings.get("maxpool_stride", 2) if settings.get("sub_sample", False) else 1
    part = FKDLevel(channels, reduction=channels // inner, pool=pool).double()
    part.load_state_dict({ours(name): value for name, value in released.items()})
    return part


def golden_temperature(golden, level):
    """The file's, where it departs from MMRazor's default of 0.5."""
    for settings in (
        golden.meta["levels"][level],
        *(group for group in golden.meta.values() if isinstance(group, dict)),
        golden.meta,
    ):
        for name, value in settings.items():
            named = re.search(r"(^|_)(t|tau|temp|temperature)$", name, re.IGNORECASE)
            if named and isinstance(value, int | float):
                return float(value)
    return 0.5


@pytest.fixture
def golden():
    return Golden("fkd")


def test_values_and_gradients_equal_the_released_code(golden):
    released = golden.meta["weights"]
    weights = {
        "feature": released.get("mask_l2_weight", 7e-5),
        "channel": released.get("channel_weight", 4e-3),
        "spatial": released.get("spatial_weight", 4e-3),
        "relation": released.get("nonloacl_weight", 7e-5),
    }
    students, teachers = golden.levels("in_student"), golden.levels("in_teacher")
    parts = [golden_level(golden, level) for level in range(len(students))]
    totals = []
    for level, (student, teacher, part) in enumerate(zip(students, teachers, parts, strict=True)):
        student.requires_grad_()
        cells, _ = fkd_attention(student, teacher, golden_temperature(golden, level))
        terms = part(student, teacher, cells)
        for name, short in zip(FKDTerms._fields, ("feat", "channel", "spatial", "nonlocal"), strict=True):
            if f"out_{short}_{level}" in golden:
                assert_golden(getattr(terms, name), golden[f"out_{short}_{level}"])
        totals.append(fkd_loss(terms, **weights))
        if f"out_total_{level}" in golden:
            assert_golden(totals[-1], golden[f"out_total_{level}"])
    total = torch.stack(totals).sum()
    assert_golden(total, golden["out_total"])
    total.backward()
    for level, (student, part) in enumerate(zip(students, parts, strict=True)):
        assert_golden(student.grad, golden[f"grad_student_{level}"])
        gradients = dict(part.named_parameters())
        expected = golden.parameters(f"grad_param_l{level}.")
        assert expected
        # Gradients that cancel (a bias before a normalisation) are rounding noise: compare those at the level's scale.
        scale = max(float(value.abs().max()) for value in expected.values())
        for name, value in expected.items():
            tolerance = 1e-9 * max(float(value.abs().max()), 1e-3 * scale)
            torch.testing.assert_close(gradients[ours(name)].grad, value, rtol=1e-9, atol=tolerance)


def test_attention_and_relations_equal_the_released_code(golden):
    for level, (student, teacher) in enumerate(zip(golden.levels("in_student"), golden.levels("in_teacher"), strict=True)):
        part, temperature = golden_level(golden, level), golden_temperature(golden, level)
        actual = {
            "out_spatial_mask_student": spatial_attention(student, temperature),
            "out_spatial_mask_teacher": spatial_attention(teacher, temperature),
            "out_channel_mask_student": channel_attention(student, temperature),
            "out_channel_mask_teacher": channel_attention(teacher, temperature),
            "out_relation_map_student": part.adapt_relation(part.student_nonlocal(student)),
            "out_relation_map_teacher": part.teacher_nonlocal(teacher),
        }
        for name, value in actual.items():
            if f"{name}_{level}" in golden:
                expected = golden[f"{name}_{level}"]
                assert_golden(value.reshape(expected.shape), expected)


def maps(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomized(module, seed):
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def identity_level(channels):
    part = FKDLevel(channels).double()
    with torch.no_grad():
        for adapter in (part.adapt_feature, part.adapt_channel, part.adapt_spatial, part.adapt_relation):
            adapter.weight.zero_()
            adapter.bias.zero_()
        for adapter in (part.adapt_feature, part.adapt_channel, part.adapt_relation):
            adapter.weight.view(channels, channels).copy_(torch.eye(channels))
        part.adapt_spatial.weight[0, 0, 1, 1] = 1
    return part


def terms_of(part, student, teacher, channel_mask=False):
    cells, channels = fkd_attention(student, teacher)
    return part(student, teacher, cells, channels if channel_mask else None)


@pytest.mark.parametrize("channel_mask", [False, True])
def test_zero_at_identity_with_finite_gradients(channel_mask):
    teacher = maps(0, 2, 6, 8, 10)
    student = teacher.clone().requires_grad_()
    part = identity_level(6)
    terms = terms_of(part, student, teacher, channel_mask)
    assert [term.item() for term in terms] == [0.0, 0.0, 0.0, 0.0]
    fkd_loss(terms).backward()
    assert torch.equal(student.grad, torch.zeros_like(student))
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in part.parameters())


def test_feature_loss_by_hand():
    student, teacher = maps(1, 2, 6, 8, 10), maps(2, 2, 6, 8, 10)
    part = identity_level(6)
    cells = torch.stack([80 * (level.abs().mean(1) / 0.5).flatten(1).softmax(1) for level in (student, teacher)]).mean(0)
    channels = torch.stack([6 * (level.abs().mean((2, 3)) / 0.5).softmax(1) for level in (student, teacher)]).mean(0)
    weighted = (teacher - student).square() * cells.view(2, 1, 8, 10)
    assert terms_of(part, student, teacher).feature.item() == pytest.approx(weighted.sum().sqrt().item(), rel=1e-12)
    expected = (weighted * channels[:, :, None, None]).sum().sqrt().item()
    assert terms_of(part, student, teacher, channel_mask=True).feature.item() == pytest.approx(expected, rel=1e-12)


def test_attention_sums_to_its_size_and_depends_on_scale():
    student, teacher = maps(3, 2, 6, 5, 7), maps(4, 2, 6, 5, 7)
    cells, channels = fkd_attention(student, teacher, 0.1, 0.2)
    assert cells.sum(dim=(1, 2)).tolist() == pytest.approx([35.0, 35.0])
    assert channels.sum(dim=1).tolist() == pytest.approx([6.0, 6.0])
    assert float(cells.min()) > 0
    assert float(channels.min()) > 0
    larger, _ = fkd_attention(3 * student, 3 * teacher, 0.1, 0.2)
    assert float((larger - cells).abs().max()) > 0.1


def test_image_order_does_not_matter_and_a_doubled_batch_gives_sqrt_2():
    student, teacher = maps(15, 3, 6, 8, 10), maps(16, 3, 6, 8, 10)
    part = randomized(FKDLevel(6, 2, 2), 17)
    once = [term.item() for term in terms_of(part, student, teacher, True)]
    order = torch.tensor([2, 0, 1])
    assert [term.item() for term in terms_of(part, student[order], teacher[order], True)] == pytest.approx(once, rel=1e-12)
    twice = terms_of(part, student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1), True)
    assert [term.item() for term in twice] == pytest.approx([math.sqrt(2) * term for term in once], rel=1e-12)


def test_gradients_reach_all_parts_and_the_student_but_not_the_teacher_or_the_attention():
    student, teacher = maps(18, 2, 6, 8, 10).requires_grad_(), maps(19, 2, 6, 8, 10).requires_grad_()
    part = randomized(FKDLevel(6, 2, 2), 20)
    cells, channels = fkd_attention(student, teacher)
    assert not cells.requires_grad
    assert not channels.requires_grad
    fkd_loss(part(student, teacher, cells, channels)).backward()
    assert teacher.grad is None
    assert float(student.grad.abs().max()) > 0
    for name, parameter in part.named_parameters():
        assert float(parameter.grad.abs().max()) > 0, name
    # A variable attention in a caller's hands is a constant too.
    free = cells.clone().requires_grad_()
    part(student, teacher, free).feature.backward()
    assert free.grad is None


def test_profiles_are_the_released_settings_and_an_argument_overrides_its_own_only():
    def built(**settings):
        return FKD(Teacher(TinyDense()), TinyDense(), **settings)

    two_stage, one_stage = built(), built(profile="one_stage", relation_weight=0.0)
    assert two_stage.weights == {"feature": 7e-5, "channel": 4e-3, "spatial": 4e-3, "relation": 7e-5}
    assert one_stage.weights == {"feature": 4.2e-4, "channel": 2.4e-2, "spatial": 2.4e-2, "relation": 0.0}
    assert two_stage.temperatures == {"spatial_temperature": 0.5, "channel_temperature": 0.5}
    assert one_stage.temperatures == {"spatial_temperature": 0.1, "channel_temperature": 0.1}
    assert (two_stage.channel_mask, one_stage.channel_mask) == (False, True)
    assert [part.student_nonlocal.pool for part in two_stage.parts] == [8, 4]
    assert [part.teacher_nonlocal.theta.out_channels for part in built(reductions=(2,)).parts] == [4, 4]
    assert [part.student_nonlocal.pool for part in built(levels=(1,)).parts] == [4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_weight": -1.0}, "fkd: feature_weight=-1.0"),
        ({"channel_weight": float("nan")}, "fkd: channel_weight=nan"),
        ({"spatial_temperature": 0.0}, "fkd: spatial_temperature=0.0"),
        ({"profile": "anchor_free"}, "fkd: profile='anchor_free' is not one of two_stage, one_stage"),
        ({"pools": (8, 0)}, r"fkd: pools=\[8, 0\]"),
        ({"reductions": ()}, r"fkd: reductions=\[\]"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(DetdistillError, match=message):
        FKD(Teacher(TinyDense()), TinyDense(), **settings)


def learned(batch, autocast=False, **settings):
    torch.manual_seed(0)
    method = FKD(Teacher(TinyDense(channels=(12, 12), seed=1)), TinyDense(), **settings)
    student = TinyDense()
    taught, seen = method.teach(batch), student(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return method, seen, taught, method.learn(student, seen, taught, batch, Clock(0, 1)).terms


@pytest.mark.parametrize("profile", ["two_stage", "one_stage"])
def test_terms_are_the_weighted_sums_over_levels(profile):
    method, seen, taught, terms = learned(tiny_batch(), profile=profile)
    expected = torch.zeros(4)
    for level, part in enumerate(method.parts):
        student, teacher = method.adapters[level](seen.features.maps[level]), taught.features.maps[level]
        cells, channels = fkd_attention(student, teacher, *([0.5, 0.5] if profile == "two_stage" else [0.1, 0.1]))
        expected += torch.stack(part(student, teacher, cells, channels if profile == "one_stage" else None))
    factor = 1 if profile == "two_stage" else 6
    expected = factor * expected * torch.tensor([7e-5, 4e-3, 4e-3, 7e-5])
    assert [terms[f"fkd_{name}"].item() for name in FKDTerms._fields] == pytest.approx(expected.tolist(), rel=1e-5)


def test_boxes_do_not_matter():
    with_boxes, without = learned(tiny_batch())[-1], learned(tiny_batch(boxes=False))[-1]
    assert with_boxes.keys() == without.keys()
    batch = tiny_batch()
    moved = batch.with_targets([*batch.targets[1:], batch.targets[0]])
    assert [term.item() for term in learned(batch)[-1].values()] == [term.item() for term in learned(moved)[-1].values()]


def test_autocast_does_not_reach_the_losses():
    plain, mixed = (learned(tiny_batch(), autocast)[-1] for autocast in (False, True))
    assert {name: term.dtype for name, term in mixed.items()} == dict.fromkeys(plain, torch.float32)
    assert [term.item() for term in mixed.values()] == [term.item() for term in plain.values()]


@pytest.mark.parametrize("profile", ["two_stage", "one_stage"])
def test_contract(profile):
    assert len(check_method(FKD, profile=profile)) == 18
